"""Preparation of text data sets: what is written, what is counted, and what a wrong input is told."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from mindspeed_mm_rl.cli.main import app
from mindspeed_mm_rl.data.indexed import IndexedColumn, column_name
from mindspeed_mm_rl.data.preprocess.command import run
from mindspeed_mm_rl.data.preprocess.settings import Settings, load_settings
from tests.data_files import SCRIPTS, byte_tokenizer, make_hf_folder

DATASETS = SCRIPTS.parent / "configs" / "datasets"
R1 = {"handler_name": "R1AlpacaStyleInstructionHandler", "dataset_additional_keys": ["labels"]}
QUESTIONS = {"map_keys": {"prompt": "problem", "query": "", "response": "answer", "system": ""}}
# Every key of the system that users come from, at its default.
ALL_KEYS = {
    "handler_name": "R1AlpacaStyleInstructionHandler",
    "streaming": False,
    "json_keys": ["text"],
    "split_sentences": False,
    "keep_newlines": False,
    "prompt_type": "empty",
    "prompt_type_path": None,
    "dataset_additional_keys": [],
    "interleave_probs": None,
    "overwrite_cache": False,
    "seed": 1234,
    "cache_dir": "~/cache",
    "map_keys": None,
    "pack": False,
    "neat_pack": False,
    "script_data_dir": None,
    "tokenizer_type": "HuggingFaceTokenizer",
    "tokenizer_not_use_fast": True,
    "vocab_file": None,
    "merge_file": None,
    "append_eod": False,
    "tokenizer_name_or_path": None,
    "seq_length": None,
    "make_vocab_size_divisible_by": 128,
    "pad_vocab_size_to": None,
    "placeholder_token": "ки",
    "reward_tokens": [],
    "dataset_impl": "mmap",
    "workers": 1,
    "n_subs": 1,
    "log_interval": 100,
    "merge_group_keys": None,
    "enable_thinking": False,
}


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    return make_hf_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture
def prepare(tmp_path, hf_folder):
    """Writes records and a YAML file, prepares them; the report."""

    def make(records, name="data.jsonl", **keys):
        write(tmp_path / name, records)
        keys = {"input": str(tmp_path / name), "output_prefix": str(tmp_path / "out" / "set")} | keys
        (tmp_path / "set.yaml").write_text(json.dumps({"tokenizer_name_or_path": str(hf_folder)} | keys))
        return run(tmp_path / "set.yaml")

    return make


def write(path: Path, records) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


def column(tmp_path: Path, name: str, prefix: str = "set") -> list[list[int]]:
    ids = IndexedColumn(column_name(tmp_path / "out" / prefix, name))
    return [ids[i].tolist() for i in range(len(ids))]


def texts(tmp_path: Path, name: str) -> list[str]:
    return byte_tokenizer().batch_decode(column(tmp_path, name))


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.parquet"])
def test_prompts_and_answers_by_hand(tmp_path, prepare, name):
    records = [
        {"problem": "2 + 3?", "answer": "5"},
        {"problem": "", "answer": "1"},
        {"problem": "x" * 200, "answer": "7"},
        {"problem": "6 * 7?", "answer": ""},
        {"problem": "ä?", "answer": "\\frac{1}{2}"},
    ]
    report = prepare(records, name, prompt_type="default", seq_length=100, **R1, **QUESTIONS)
    assert (report.rows, report.kept) == (5, 2)
    assert report.dropped == {"no prompt": 1, "no response": 1, "at least 100 tokens (seq_length)": 1}
    assert texts(tmp_path, "input_ids") == ["Human: 2 + 3?\nAssistant:", "Human: ä?\nAssistant:"]
    assert texts(tmp_path, "labels") == ["5", "\\frac{1}{2}"]
    # One token per byte; ä has two.
    assert [len(row) for row in column(tmp_path, "attention_mask")] == [24, 21]
    assert report.longest == 24
    assert report.lines("input_ids")[0] == (
        "rows: 5, kept: 2, dropped: 3 (at least 100 tokens (seq_length): 1, no prompt: 1, no response: 1)"
    )


def test_a_sample_as_long_as_seq_length_is_dropped_and_one_shorter_is_kept(prepare):
    records = [{"problem": "x" * 9, "answer": "1"}, {"problem": "x" * 10, "answer": "1"}]
    assert prepare(records, seq_length=10, **R1, **QUESTIONS).kept == 1


def test_messages_ground_truth_and_more_columns(tmp_path, prepare):
    record = {
        "prompt": [
            {"role": "system", "content": "S."},
            {"role": "user", "content": "a?"},
            {"role": "assistant", "content": "b."},
            {"role": "user", "content": "c?"},
        ],
        "reward_model": {"ground_truth": "34", "style": "rule"},
        "data_source": "math_dapo",
        "level": {"n": 3},
    }
    keys = {"map_keys": {"prompt": "prompt", "query": "", "response": "reward_model", "system": ""}, "prompt_type": "qwen"}
    more = ["labels", "data_source", "level"]
    prepare([record], "data.parquet", handler_name="Math17kAlpacaStyleInstructionHandler", dataset_additional_keys=more, **keys)
    assert texts(tmp_path, "input_ids") == [
        "<|im_start|>system\nS.<|im_end|>\n<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nb.<|im_end|>\n"
        "<|im_start|>user\nc?<|im_end|>\n<|im_start|>assistant\n"
    ]
    assert [texts(tmp_path, name) for name in more] == [["34"], ["math_dapo"], ['{"n": 3}']]


def test_pairs_share_the_prompt_and_mask_it(tmp_path, prepare):
    record = {"system": "", "question": "Q?", "chosen": "good", "rejected": "bad!!"}
    report = prepare(
        [record, record | {"rejected": None}],
        handler_name="AlpacaStylePairwiseHandler",
        prompt_type="qwen3",
        enable_thinking=True,
        map_keys={"prompt": "question", "query": "", "system": "system"},
    )
    assert report.dropped == {"no response": 1}
    prompt = "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n"
    thought = "<think>\n\n</think>\n\n"
    assert texts(tmp_path, "chosen_input_ids") == [f"{prompt}{thought}good<|im_end|>\n"]
    assert texts(tmp_path, "rejected_input_ids") == [f"{prompt}{thought}bad!!<|im_end|>\n"]
    (ids,), (labels,) = column(tmp_path, "rejected_input_ids"), column(tmp_path, "rejected_labels")
    # 24 bytes and 3 tokens of the prompt's markup are masked: "user\nQ?" 7, "\n" 1, "assistant\n" 10.
    assert labels == [-100] * 21 + ids[21:]


def test_pairs_may_be_dialogues_or_one_list(tmp_path, prepare):
    keys = {"handler_name": "AlpacaStylePairwiseHandler", "map_keys": {"prompt": "q", "query": ""}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "best"}]
    prepare([{"q": "q", "chosen": messages, "rejected": ["x", "worst"]}], **keys)
    assert texts(tmp_path, "chosen_input_ids") == ["qbest"]
    assert texts(tmp_path, "rejected_input_ids") == ["qworst"]


def test_dialogues_train_on_answers_alone(tmp_path, prepare):
    record = {"instruction": "c", "input": "d", "output": "ef", "past": [["a", "b"]]}
    keys = {"handler_name": "AlpacaStyleInstructionHandler", "prompt_type": "default", "map_keys": {"history": "past"}}
    prepare([record], append_eod=True, **keys)
    assert texts(tmp_path, "input_ids") == ["Human: a\nAssistant:b<|im_end|>\nHuman: c\nd\nAssistant:ef<|im_end|><|im_end|>"]
    (ids,), (labels,) = column(tmp_path, "input_ids"), column(tmp_path, "labels")
    trained = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    assert byte_tokenizer().decode(trained) == "b<|im_end|>ef<|im_end|><|im_end|>"
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


def test_output_is_whole_or_not_at_all(tmp_path, prepare):
    good, bad = {"problem": "2 + 3?", "answer": "5"}, {"problem": ["no", "text"], "answer": "5"}
    prepare([good], **R1, **QUESTIONS)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(before) == 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in before} == {0o640}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    with pytest.raises(ValueError, match="data.jsonl, row 1: a message of column 'problem' lacks the text"):
        prepare([good, bad], **R1, **QUESTIONS)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ValueError, match=r"none of the 1 rows of .* is kept .no response: 1."):
        prepare([good | {"answer": ""}], **R1, **QUESTIONS)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_columns_of_another_preparation_are_not_mixed_in(prepare):
    record = {"problem": "2 + 3?", "answer": "5", "level": "easy"}
    prepare([record], **QUESTIONS, **(R1 | {"dataset_additional_keys": ["labels", "level"]}))
    with pytest.raises(ValueError, match="set has the columns level of another preparation; remove them or choose another prefix"):
        prepare([record], **R1, **QUESTIONS)


def test_joined_columns(tmp_path, prepare):
    for prefix, problem in (("a", "one?"), ("b", "two?")):
        prepare([{"problem": problem, "answer": problem[:1]}], output_prefix=str(tmp_path / "out" / prefix), **R1, **QUESTIONS)
    keys = ["packed_input_ids_document", "packed_labels_document"]
    joined = {"input": str(tmp_path / "out"), "output_prefix": str(tmp_path / "out" / "set"), "merge_group_keys": keys}
    (tmp_path / "join.yaml").write_text(json.dumps(joined))
    assert run(tmp_path / "join.yaml") is None
    assert texts(tmp_path, "input_ids") == ["one?", "two?"]
    assert texts(tmp_path, "labels") == ["o", "t"]


def test_every_known_key_is_accepted_at_its_default(tmp_path):
    path = tmp_path / "all.yaml"
    path.write_text(json.dumps({"input": "a.json", "output_prefix": "b"} | ALL_KEYS))
    settings, notes = load_settings(path, ["seq_length=7", "map_keys.prompt=problem"])
    assert (settings.seq_length, settings.map_keys.prompt, settings.map_keys.response) == (7, "problem", "output")
    assert "nothing is drawn at random" in " ".join(notes)
    path.write_text("input: a.json\noutput-prefix: b\nmap-keys: {query: ''}\n")
    assert load_settings(path)[0] == Settings(input="a.json", output_prefix="b", map_keys={"query": None})


@pytest.mark.parametrize("name", ["math_17k", "deepscaler", "orca_rlhf"])
def test_examples_load(name):
    settings, notes = load_settings(DATASETS / f"{name}.yaml")
    assert settings.log_interval == 1000
    assert not notes


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"input": "nowhere.json"}, "input: nowhere.json doesn't exist; a data set of the hub is downloaded first"),
        ({"input": str(SCRIPTS / "geo3k.py")}, r"geo3k.py isn't offered; files end in .jsonl, .json, .parquet"),
        ({"handler_name": ""}, "handler_name: there is no handler ''; choose R1AlpacaStyleInstructionHandler, Math17k"),
        ({"handler_name": "R1Handler"}, "did you mean R1AlpacaStyleInstructionHandler"),
        ({"handler_name": "AlpacaStyleProcessRewardHandler"}, "isn't offered; models of process rewards aren't trained here"),
        ({"handler_name": "AlpacaStyleInstructionHandler"}, "dataset_additional_keys: AlpacaStyleInstructionHandler writes input_ids"),
        ({"append_eod": True}, "append_eod is for AlpacaStyleInstructionHandler alone"),
        ({"prompt_type": "quen"}, "prompt_type: there is no template 'quen'; did you mean qwen"),
        ({"prompt_type": "llama3"}, "ends turns with <.eot_id.>, which is no token of"),
        ({"enable_thinking": True}, "enable_thinking: prompt_type empty knows no thoughts"),
        ({"prompt_type_path": "templates.json"}, "prompt_type_path: templates.json can't be read as JSON"),
        ({"map_keys": {"prompt": "problme"}}, "map_keys.prompt: the data set has no column 'problme'; its columns are problem, answer"),
        ({"map_keys": {}}, "doesn't say which column is the prompt and no column 'instruction'; its columns are problem, answer"),
        ({"map_keys": {"promt": "problem"}}, "unknown key promt; did you mean prompt"),
        ({"dataset_additional_keys": ["label"]}, "dataset_additional_keys: the data set has no column 'label'"),
        ({"tokenizer_name_or_path": None}, "tokenizer_name_or_path is missing: give a Hugging Face folder"),
        ({"tokenizer_name_or_path": "nowhere"}, "tokenizer_name_or_path: nowhere is not a folder"),
        ({"pack": True}, "pack: True isn't offered; leave samples apart: training packs them itself"),
        ({"tokenizer_type": "Llama2Tokenizer"}, "tokenizer_type: Llama2Tokenizer isn't offered; give a Hugging Face folder"),
        ({"seq_length": 0}, "seq_length: 0 isn't allowed; it must be greater than 0"),
        ({"seq_lenght": 5}, "unknown key seq_lenght; did you mean seq_length"),
        ({"output_prefix": None}, "output_prefix is missing: The files are <output_prefix>_packed_<column>_document.bin"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, prepare, monkeypatch, keys, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        prepare([{"problem": "2 + 3?", "answer": "5"}], **({**R1, **QUESTIONS} | keys))
    assert not (tmp_path / "out").exists()


def test_broken_lines_are_named(tmp_path, prepare):
    with pytest.raises(ValueError, match="data.jsonl, line 1: a row must be an object"):
        prepare([7], **R1, **QUESTIONS)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jsonl").write_text('{"problem": "2 + 3?", "answer": "5"}\n\n{"problem": \n')
    with pytest.raises(ValueError, match="a.jsonl, line 3: not valid JSON"):
        prepare([], input=str(tmp_path / "broken"), **R1, **QUESTIONS)
    (tmp_path / "broken" / "b.parquet").write_bytes(b"noise")
    with pytest.raises(ValueError, match="broken holds a mixture of .jsonl, .parquet files"):
        prepare([], input=str(tmp_path / "broken"), **R1, **QUESTIONS)
    with pytest.raises(ValueError, match="b.parquet is not a readable parquet file"):
        prepare([], input=str(tmp_path / "broken" / "b.parquet"), **R1, **QUESTIONS)
    with pytest.raises(ValueError, match="data.jsonl has no rows"):
        prepare([], **R1, **QUESTIONS)


def test_the_command_prepares_and_overrides(tmp_path, hf_folder):
    write(tmp_path / "data.jsonl", [{"problem": "2 + 3?", "answer": "5"}, {"problem": "6 * 7?", "answer": ""}])
    keys = {"input": str(tmp_path / "nowhere"), "tokenizer_name_or_path": str(hf_folder), **R1, **QUESTIONS}
    (tmp_path / "set.yaml").write_text(json.dumps(keys))
    given = [f"input={tmp_path}/data.jsonl", f"output_prefix={tmp_path}/out/set", "prompt_type=default"]
    result = CliRunner().invoke(app, ["preprocess", "--config", str(tmp_path / "set.yaml"), *given])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("rows: 2, kept: 1, dropped: 1 (no response: 1)\n")
    assert texts(tmp_path, "input_ids") == ["Human: 2 + 3?\nAssistant:"]


def test_the_command_ends_in_one_line(tmp_path):
    result = CliRunner().invoke(app, ["preprocess", "--config", str(tmp_path / "nowhere.yaml")])
    assert (result.exit_code, result.stderr) == (2, f"error: configuration file {tmp_path}/nowhere.yaml doesn't exist\n")
