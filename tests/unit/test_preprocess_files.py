"""IndexedDataset files in both directions, training rows made of them, rows of JSON files, and the three real data sets."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mindspeed_mm_rl.data.indexed import IndexedColumn, IndexedRows, IndexedWriter, column_files, column_name
from mindspeed_mm_rl.data.json_rows import JsonRows
from mindspeed_mm_rl.data.loader import PromptLoader
from mindspeed_mm_rl.data.preprocess.command import run
from mindspeed_mm_rl.data.preprocess.encoding import tokenizer_of
from mindspeed_mm_rl.data.preprocess.output import new_columns
from mindspeed_mm_rl.data.rows import PromptColumns
from mindspeed_mm_rl.data.sources import open_rows
from tests.data_files import byte_tokenizer, data_plan, make_hf_folder
from tests.unit.test_preprocess import DATASETS

SEQUENCES = [[5, 1, 2**31 - 1], [7], [-100, 0, 3, 4], [151935, 2]]


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """Of a model that reads text alone."""
    folder = make_hf_folder(tmp_path_factory.mktemp("hf"))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return folder


def megatron_column(path, sequences, dtype=np.int32) -> None:
    """Written by megatron-core's own builder."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=dtype)
    for sequence in sequences:
        builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{path}.idx")


def write_column(path, sequences) -> None:
    writer = IndexedWriter(path.with_name(f"{path.name}.bin"), path.with_name(f"{path.name}.idx"))
    for sequence in sequences:
        writer.add(sequence)
    writer.finish()


def rows_of(column) -> list[list[int]]:
    return [column[i].tolist() for i in range(len(column))]


def test_a_full_disk_leaves_nothing(tmp_path):
    own = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        message = f"output_prefix: {tmp_path}/new can't be written to .File too large"
        with pytest.raises(ValueError, match=message), new_columns([tmp_path / "new" / name for name in "ab"]) as writers:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, own[1]))
            for writer in writers * 10:
                writer.add([1] * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, own)
    assert not list((tmp_path / "new").iterdir())


def test_files_are_those_of_megatrons_builder_byte_for_byte(tmp_path):
    megatron_column(tmp_path / "theirs", SEQUENCES)
    write_column(tmp_path / "ours", SEQUENCES)
    for suffix in (".idx", ".bin"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_megatron_reads_ours(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    write_column(tmp_path / "ours", SEQUENCES)
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == SEQUENCES
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_columns_of_megatron_are_read(tmp_path, dtype):
    sequences = [[1, 2, 3], [4], [65000, 6]]
    megatron_column(tmp_path / "theirs", sequences, dtype)
    assert rows_of(IndexedColumn(tmp_path / "theirs")) == sequences


def test_a_dropped_sample_may_have_left_an_empty_document(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"))
    builder.add_item(torch.tensor([1, 2]))
    builder.end_document()
    builder.end_document()
    builder.add_item(torch.tensor([3]))
    builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    assert rows_of(IndexedColumn(tmp_path / "a")) == [[1, 2], [3]]


def test_damaged_columns_are_named(tmp_path):
    write_column(tmp_path / "a", SEQUENCES)
    index, content = tmp_path / "a.idx", tmp_path / "a.bin"
    whole = index.read_bytes()
    content.write_bytes(content.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"a.bin doesn't belong to a.idx: it has 36 bytes, not 40"):
        IndexedColumn(tmp_path / "a")
    index.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="a.idx is damaged: 121 bytes don't fit 4 sequences in 5 documents"):
        IndexedColumn(tmp_path / "a")
    index.write_bytes(whole[:17] + b"\x09" + whole[18:])
    with pytest.raises(ValueError, match="version 1 and type 9; version 1 and types 1 to 8 can be read"):
        IndexedColumn(tmp_path / "a")
    index.write_bytes(b"noise")
    with pytest.raises(ValueError, match="a.idx is no index of an IndexedDataset"):
        IndexedColumn(tmp_path / "a")
    content.unlink()
    with pytest.raises(ValueError, match="a.bin does not exist"):
        IndexedColumn(tmp_path / "a")


@pytest.fixture
def prepared(tmp_path):
    """A prefix in the layout that users have, of three questions, written by megatron's builder."""
    encode = byte_tokenizer().encode
    columns = {
        "input_ids": [encode(f"{i} + 3?") for i in range(3)],
        "attention_mask": [[1] * 6] * 3,
        "labels": [encode(str(i + 3)) for i in range(3)],
        "data_source": [encode("sums")] * 3,
        "level": [encode("easy")] * 3,
    }
    for name, sequences in columns.items():
        megatron_column(column_name(tmp_path / "data", name), sequences)
    return tmp_path / "data"


def prompts_of(path, hf_folder, count, **changes) -> Iterator:
    loader = PromptLoader(data_plan(path, hf_folder, shuffle=False, **changes))
    try:
        report = loader.scan()
        yield report
        yield from loader.next_prompts(count)
    finally:
        loader.close()


def test_training_draws_prompts_of_a_prefix(prepared, hf_folder):
    report, *prompts = prompts_of(prepared, hf_folder, 3)
    assert (report.rows, report.usable, report.longest_prompt) == (3, 3, 6)
    assert [prompt.answer for prompt in prompts] == ["3", "4", "5"]
    assert byte_tokenizer().decode(prompts[1].token_ids) == "1 + 3?"
    assert (prompts[1].expanded_length, prompts[1].data_source, prompts[1].extra["level"]) == (6, "sums", "easy")
    assert prompts[1].extra["row"].endswith("data_packed_*_document, row 1")
    with pytest.raises(ValueError, match="the shortest has 6; raise max_prompt_length"):
        list(prompts_of(prepared, hf_folder, 1, max_prompt_length=5))


def test_columns_that_are_no_prompts_are_refused(prepared, hf_folder, tmp_path):
    write_column(tmp_path / "data_packed_labels_document", [[-100, 3], [4], [5]])
    with pytest.raises(ValueError, match="row 0: column labels has masked ids .-100., as supervised data have"):
        next(prompts_of(prepared, hf_folder, 1))
    write_column(tmp_path / "data_packed_labels_document", [[3]])
    with pytest.raises(ValueError, match="differ in rows .*they aren't of one preparation"):
        next(prompts_of(prepared, hf_folder, 1))
    write_column(tmp_path / "data_packed_labels_document", [[3], [4], [5]])
    write_column(tmp_path / "data_packed_input_ids_document", [[3], [9999], [5]])
    last = len(tokenizer_of(hf_folder)) - 1
    with pytest.raises(ValueError, match=f"row 1: the prepared prompt has token id 9999, but the tokenizer of .* ends at {last}"):
        next(prompts_of(prepared, hf_folder, 1))
    for file in column_files(prepared).values():
        file.unlink()
    with pytest.raises(ValueError, match="does not exist, and no data_packed_.*_document.idx beside it"):
        next(prompts_of(prepared, hf_folder, 1))
    write_column(tmp_path / "data_packed_chosen_input_ids_document", [[3]])
    with pytest.raises(ValueError, match="holds preference pairs .chosen_input_ids."):
        next(prompts_of(prepared, hf_folder, 1))


def test_rows_of_trl_are_drawn_through_the_chat_template(tmp_path, hf_folder):
    rows = [{"prompt": "2 + 3?", "answer": 5}, {"prompt": [{"role": "user", "content": "6?"}], "answer": "6", "data_source": "sums"}]
    (tmp_path / "train.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)))
    _, first, second = prompts_of(tmp_path, hf_folder, 2)
    start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    assert byte_tokenizer().decode(first.token_ids) == f"{start}2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    assert (first.answer, second.answer, second.data_source) == ("5", "6", "sums")
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows, indent=2))
    assert [row.answer for row in map(JsonRows(array, PromptColumns()).__getitem__, (1, 0))] == ["6", "5"]


def test_rows_of_verl_in_json(tmp_path):
    row = {"prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": {"a": 1}}, "data_source": "kk"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row | {"extra_info": {"index": 4}}))
    (found,) = (open_rows(tmp_path / "a.jsonl", PromptColumns(), IndexedRows)[i] for i in range(1))
    assert (found.answer, found.data_source, found.extra, found.images) == ('{"a": 1}', "kk", {"index": 4}, ())


def test_json_rows_that_are_wrong_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"prompt": "2 + 3?", "answer": "5"})

    def rows(*lines):
        path.write_text("\n".join(lines))
        return JsonRows(path, PromptColumns())

    with pytest.raises(ValueError, match="a.jsonl has no rows"):
        rows("", "")
    with pytest.raises(ValueError, match="has no column 'prompt'; the columns are question"):
        rows('{"question": "2 + 3?"}')
    with pytest.raises(ValueError, match="its first row has neither reward_model.ground_truth nor extra_info.answer nor answer"):
        rows('{"prompt": "2 + 3?"}')
    with pytest.raises(ValueError, match="a.jsonl, line 2: not valid JSON"):
        rows(good, "{")[1]
    with pytest.raises(ValueError, match="a.jsonl, row 1: the answer is missing"):
        rows(good, '{"prompt": "2 + 3?", "answer": ""}')[1]
    with pytest.raises(ValueError, match="a.jsonl, row 1: column 'prompt' must be a list"):
        rows(good, '{"answer": "5"}')[1]
    with pytest.raises(ValueError, match="not valid JSON"):
        rows("[1,")


@pytest.fixture(scope="module")
def qwen(data_dir):
    folder = data_dir / "tokenizer_qwen25"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return tokenizer_of(folder)


def prepare_real(config, source, data_dir, tmp_path, *overrides):
    given = [f"input={data_dir / source}", f"tokenizer_name_or_path={data_dir / 'tokenizer_qwen25'}", f"output_prefix={tmp_path / 'data'}"]
    report = run(DATASETS / f"{config}.yaml", [*given, *overrides])
    assert report.rows == report.kept + sum(report.dropped.values())
    return report, lambda name: IndexedColumn(column_name(tmp_path / "data", name))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_math_17k_reads_back(data_dir, tmp_path, qwen):
    report, column = prepare_real("math_17k", "dapo_like/train.parquet", data_dir, tmp_path)
    records = pq.read_table(data_dir / "dapo_like" / "train.parquet").to_pylist()
    assert (report.rows, report.kept, report.changed) == (len(records), len(records), 0)
    assert qwen.batch_decode(rows_of(column("input_ids"))) == [record["prompt"][0]["content"] for record in records]
    assert qwen.batch_decode(rows_of(column("labels"))) == [record["reward_model"]["ground_truth"] for record in records]
    rows = IndexedRows(tmp_path / "data", qwen.decode)
    assert (len(rows), rows[7].answer) == (len(records), records[7]["reward_model"]["ground_truth"])


def test_deepscaler_reads_back(data_dir, tmp_path, qwen):
    report, column = prepare_real("deepscaler", "deepscaler_math/train.jsonl", data_dir, tmp_path, "seq_length=256")
    records = lines_of(data_dir / "deepscaler_math" / "train.jsonl")
    prompts, answers = (qwen.batch_decode(rows_of(column(name))) for name in ("input_ids", "labels"))
    assert report.dropped["at least 256 tokens (seq_length)"] == len(records) - len(prompts) > 0
    by_problem = {record["problem"]: record["answer"] for record in records}
    problems = [prompt.split("\\boxed{}.\n", 1)[1].removesuffix("<|im_end|>\n<|im_start|>assistant\n") for prompt in prompts]
    assert [by_problem[problem] for problem in problems] == answers


def test_preference_pairs_read_back(data_dir, tmp_path, qwen):
    report, column = prepare_real("orca_rlhf", "preference/train.jsonl", data_dir, tmp_path)
    records = lines_of(data_dir / "preference" / "train.jsonl")
    assert (report.rows, report.kept) == (500, 500)
    for name in ("chosen", "rejected"):
        ids, labels = rows_of(column(f"{name}_input_ids")), rows_of(column(f"{name}_labels"))
        trained = [[label for label in row if label != -100] for row in labels]
        thought = "<think>\n\n</think>\n\n"
        assert qwen.batch_decode(trained) == [f"{thought}{record[name]}<|im_end|>\n" for record in records]
        prompts = [row[: -len(answer)] for row, answer in zip(ids, trained, strict=True)]
        question = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
        assert qwen.batch_decode(prompts) == [question.format(record["question"]) for record in records]
