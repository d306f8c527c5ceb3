"""Preference pairs: what a row becomes, by file kind and form; what is dropped, named or counted; exact position."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mindspeed_mm_rl.data.indexed import IndexedWriter, column_name
from mindspeed_mm_rl.data.pairs import PairLoader
from mindspeed_mm_rl.data.preprocess.command import run
from tests.data_files import byte_tokenizer, data_plan, make_hf_folder, png
from tests.unit.test_preprocess import DATASETS

START = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
TURN = "<|im_end|>\n<|im_start|>assistant\n"


def said(text, role="user"):
    return {"role": role, "content": text}


def pair(number=0, **columns):
    return {"prompt": f"{number} + 1?", "chosen": f"{number + 1}", "rejected": f"{number}"} | columns


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    return make_hf_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture
def open_pairs(hf_folder, tmp_path):
    loaders = []

    def make(rows, **changes):
        path = rows
        if isinstance(rows, list):
            path = tmp_path / f"{len(loaders)}.jsonl"
            path.write_text("\n".join(map(json.dumps, rows)))
        loaders.append(PairLoader(data_plan(path, hf_folder, **changes)))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def texts(drawn):
    decode = byte_tokenizer().decode
    return decode(drawn.prompt_ids), decode(drawn.chosen_ids), decode(drawn.rejected_ids)


def numbers(pairs):
    return [int(texts(drawn)[2].removesuffix("<|im_end|>")) for drawn in pairs]


SAME = [
    pair(),
    pair(prompt=[said("0 + 1?")]),
    pair(prompt=[{"role": "user", "content": [{"type": "text", "text": "0 + "}, {"type": "text", "text": "1?"}]}]),
    pair(chosen=[said("1", "assistant")], rejected=said("0", "assistant")),
    pair(chosen=[said("0 + 1?"), said("1", "assistant")], rejected=[said("0 + 1?"), said("0", "assistant")]),
    pair(prompt=None, chosen=[said("0 + 1?"), said("1", "assistant")], rejected=[said("0 + 1?"), said("0", "assistant")]),
    {"question": "0 + 1?", "system": "", "chosen": "1<|im_end|>", "rejected": "0"},
]


@pytest.mark.parametrize("record", SAME)
def test_every_form_of_a_pair_gives_the_same_tokens(open_pairs, record):
    (drawn,) = open_pairs([record]).next_pairs(1)
    # A response ends with the end token, as a rollout does, and with nothing behind it.
    assert texts(drawn) == (f"{START}0 + 1?{TURN}", "1<|im_end|>", "0<|im_end|>")
    assert (drawn.pair_id, drawn.images) == (0, ())


def test_system_message_and_earlier_turns_come_from_the_question_or_the_conversation(open_pairs):
    asked = pair(prompt=None, system="Count.", question="0 + 1?")
    talked = [said("Count.", "system"), said("Hi"), said("Ho", "assistant"), said("0 + 1?")]
    more = pair(prompt="0 + 1?", chosen=[*talked, said("1", "assistant")])
    first, second = open_pairs([asked, more], shuffle=False).next_pairs(2)
    opened = "<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\n"
    assert texts(first)[0] == f"{opened}0 + 1?{TURN}"
    assert texts(second)[0] == f"{opened}Hi{TURN}Ho<|im_end|>\n<|im_start|>user\n0 + 1?{TURN}"
    assert texts(second)[1:] == ("1<|im_end|>", "0<|im_end|>")


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_pictures_by_hand(open_pairs, tmp_path, suffix):
    (tmp_path / "a.png").write_bytes(png(56, 84))
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "Find x."}]
    record = pair(prompt=[{"role": "user", "content": parts}])
    if suffix == ".json":
        path = tmp_path / "pairs.json"
        path.write_text(json.dumps([record | {"images": ["a.png"]}]))
    else:
        path = tmp_path / "pairs.parquet"
        pq.write_table(pa.Table.from_pylist([record | {"images": [{"bytes": None, "path": "a.png"}]}]), path)
    (drawn,) = open_pairs(path).next_pairs(1)
    # 4 x 6 patches, four of which are one token.
    assert texts(drawn)[0] == f"{START}<|vision_start|>{'<|image_pad|>' * 6}<|vision_end|>Find x.{TURN}"
    assert [image.grid_thw for image in drawn.images] == [(1, 4, 6)]


def test_a_pairs_key_says_what_is_in_it(open_pairs, tmp_path):
    for number in (0, 1):
        (tmp_path / f"{number}.png").write_bytes(png(56, 56, seed=number))
    marked = pair(prompt="<image>0 + 1?")
    records = [pair(), pair(), pair(chosen="2"), pair(prompt="0 + 1!"), marked | {"images": "0.png"}, marked | {"images": "1.png"}]
    keys = [drawn.key for drawn in open_pairs(records, shuffle=False).next_pairs(6)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 5


def write_columns(prefix, **columns):
    for name, rows in columns.items():
        path = column_name(prefix, name)
        writer = IndexedWriter(Path(f"{path}.bin"), Path(f"{path}.idx"))
        for row in rows:
            writer.add(row)
        writer.finish()
    return prefix


def test_prepared_columns_are_drawn_as_they_are(open_pairs, tmp_path):
    prefix = write_columns(
        tmp_path / "dpo",
        chosen_input_ids=[[5, 6, 7, 8]],
        chosen_labels=[[-100, -100, 7, 8]],
        rejected_input_ids=[[5, 6, 9]],
        rejected_labels=[[-100, -100, 9]],
    )
    (drawn,) = open_pairs(prefix).next_pairs(1)
    assert (drawn.prompt_ids, drawn.chosen_ids, drawn.rejected_ids) == ((5, 6), (7, 8), (9,))


GOOD = {
    "chosen_input_ids": [[5, 6, 7]],
    "chosen_labels": [[-100, 6, 7]],
    "rejected_input_ids": [[5, 8]],
    "rejected_labels": [[-100, 8]],
}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"rejected_input_ids": [[4, 8]]}, r"dpo_packed_\*_document, row 0: chosen and rejected have different prompts"),
        ({"chosen_labels": [[-100, 6, -100]]}, "row 0: chosen_labels must be masked over the prompt and equal chosen_input_ids behind it"),
        ({"chosen_labels": [[-100, 6]]}, "row 0: chosen_labels must be masked"),
        ({"chosen_labels": [[-100] * 3]}, "row 0: the answer 'chosen' is empty: all of its labels are masked"),
        ({"chosen_labels": [[5, 6, 7]]}, "row 0: the prompt is empty: no label is masked"),
        ({"rejected_input_ids": [[5, 6, 7]], "rejected_labels": [[-100, 6, 7]]}, "row 0: chosen and rejected are the same answer"),
        ({"rejected_input_ids": [[5, 300]], "rejected_labels": [[-100, 300]]}, "prepared response has token id 300, but the tokenizer"),
        ({"rejected_labels": []}, "the columns of .* differ in rows"),
    ],
)
def test_prepared_columns_that_are_wrong_are_named(open_pairs, tmp_path, columns, message):
    prefix = write_columns(tmp_path / "dpo", **(GOOD | columns))
    with pytest.raises(ValueError, match=message):
        open_pairs(prefix).next_pairs(1)


def test_other_files_are_named(open_pairs, tmp_path):
    with pytest.raises(ValueError, match="has the columns input_ids but not chosen_input_ids, chosen_labels.*AlpacaStylePairwiseHandler"):
        open_pairs(write_columns(tmp_path / "rl", input_ids=[[1]]))
    with pytest.raises(ValueError, match="0.jsonl: its first row has no column 'rejected'; the columns are prompt, chosen"):
        open_pairs([{"prompt": "?", "chosen": "1"}])
    pq.write_table(pa.Table.from_pylist([{"prompt": "?", "answer": "1"}]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet has no column 'chosen'; the columns are prompt, answer"):
        open_pairs(tmp_path / "a.parquet")


def test_pairs_of_preprocess_data_are_drawn_as_those_of_its_input(open_pairs, tmp_path, hf_folder):
    records = [{"system": "Count.", "question": f"{n} + 1?", "chosen": f"{n + 1}", "rejected": f"{n}"} for n in range(3)]
    (tmp_path / "orca.jsonl").write_text("\n".join(map(json.dumps, records)))
    given = {"input": tmp_path / "orca.jsonl", "tokenizer_name_or_path": hf_folder, "output_prefix": tmp_path / "dpo"}
    given |= {"prompt_type": "chat_template", "enable_thinking": "null"}
    run(DATASETS / "orca_rlhf.yaml", [f"{key}={value}" for key, value in given.items()])
    prepared = open_pairs(tmp_path / "dpo", shuffle=False).next_pairs(3)
    direct = open_pairs(tmp_path / "orca.jsonl", shuffle=False).next_pairs(3)
    assert [drawn.prompt_ids for drawn in prepared] == [drawn.prompt_ids for drawn in direct]
    # The template closes a turn with a line break; nothing is sampled after the end token.
    assert [texts(drawn)[1:] for drawn in prepared] == [tuple(f"{text}\n" for text in texts(drawn)[1:]) for drawn in direct]


BAD = [
    (pair(chosen=" "), "empty", "the answer 'chosen' is empty"),
    (pair(rejected=None), "empty", "the answer 'rejected' is empty"),
    (pair(chosen=[said("", "assistant")]), "empty", "the answer 'chosen' is empty"),
    (pair(prompt=""), "empty", r"the prompt \(column 'prompt'\) is empty"),
    (pair(prompt=None, chosen=[said("?"), said("1", "assistant")]), "empty", "the prompt is missing: it has no column, and not both"),
    (pair(rejected="1"), "equal", "chosen and rejected are the same answer"),
    (pair(prompt="<image>?", images=["nowhere.png"]), "missing_image", "image file .*nowhere.png does not exist"),
    (pair(prompt="<image>?", images=[{"bytes": None, "path": None}]), "missing_image", "an image has neither bytes nor a path"),
    (pair(prompt="<image>?"), "bad_rows", "the prompt has 1 <image> markers but the row has 0 images"),
    (pair(chosen="<|image_pad|>"), "bad_rows", "the response has image tokens"),
    (
        pair(chosen=[said("?"), said("1", "assistant")]),
        "bad_rows",
        "the prompt, the conversation of chosen and the conversation of rejected",
    ),
    (pair(prompt=[said("0 + 1?"), said("1", "assistant")]), "bad_rows", "the assistant has the last word of the prompt"),
    (pair(chosen=[said("0 + 1?")]), "bad_rows", "the last message of column 'chosen' must be the assistant's, not the user's"),
    (pair(prompt=[{"role": "user", "content": [{"type": "video"}]}]), "bad_rows", "a message of column 'prompt' lacks the text"),
    (pair(prompt=None, question="?", system=["S"]), "bad_rows", "column 'system' must hold text, not list"),
    (pair(videos=["a.mp4"]), "bad_rows", "column 'videos' is not empty"),
]


@pytest.mark.parametrize(("bad", "rule", "message"), BAD)
def test_a_bad_pair_is_named_or_counted_by_its_rule(open_pairs, bad, rule, message):
    rows = [pair(0), bad, pair(2)]
    for look in (lambda loader: loader.next_pairs(3), lambda loader: loader.scan()):
        with pytest.raises(ValueError, match=rf"\.jsonl, row 1: {message}"):
            look(open_pairs(rows))
    lenient = open_pairs(rows, skip_bad_rows=True, shuffle=False)
    report = lenient.scan()
    assert (report.rows, report.usable, report.too_long, report.rules) == (3, 2, 0, {rule: 1})
    drawn = lenient.next_pairs(3)
    assert (numbers(drawn), [one.pair_id for one in drawn]) == ([0, 2, 0], [0, 1, 2])
    assert lenient.counts == {"rows": 4, "pairs": 3, "too_long": 0, "empty": 0, "equal": 0, "missing_image": 0, "bad_rows": 0} | {rule: 1}


def test_over_long_pairs_are_dropped_and_counted(open_pairs):
    prompt, whole = (len(open_pairs([pair()]).next_pairs(1)[0].prompt_ids) + more for more in (0, 2))
    long_prompt, long_answer = pair(1, prompt="10 + 1?"), pair(2, rejected="22")
    loader = open_pairs([long_prompt, pair(), long_answer], shuffle=False, max_prompt_length=prompt, max_pair_length=whole)
    assert loader.scan().too_long == 2
    assert numbers(loader.next_pairs(2)) == [0, 0]
    assert (loader.counts["rows"], loader.counts["too_long"]) == (5, 3)
    # No bound but the prompt's.
    assert numbers(open_pairs([long_prompt, long_answer], shuffle=False, max_prompt_length=prompt).next_pairs(1)) == [22]
    message = (
        rf"max_prompt_length \({prompt} tokens\) and megatron_training.seq_length \({whole}\): the shortest has a prompt of {prompt}, "
    )
    with pytest.raises(ValueError, match=message + rf"{whole + 1} with its longer answer"):
        open_pairs([long_prompt | {"rejected": "111"}, long_answer], max_prompt_length=prompt, max_pair_length=whole).next_pairs(1)


def test_an_epoch_is_every_pair_once_and_the_seed_its_order(open_pairs, tmp_path):
    rows = [pair(n) for n in range(8)]
    loader = open_pairs(rows, seed=1)
    first, second = numbers(loader.next_pairs(8)), numbers(loader.next_pairs(8))
    # The order of the same number of prompts.
    assert first == [2, 4, 7, 5, 0, 6, 3, 1]
    assert sorted(second) == list(range(8)) and second != first
    assert numbers(open_pairs(rows, seed=2).next_pairs(8)) != first


def test_state_continues_exactly(open_pairs, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, [pair(n) for n in range(5)] + [pair(rejected=""), pair(7, prompt="x" * 600)])))
    straight, before, after = (open_pairs(path, skip_bad_rows=True) for _ in range(3))
    whole = straight.next_pairs(14)
    begun = before.next_pairs(6)
    after.load_state(json.loads(json.dumps(before.state())))
    assert begun + after.next_pairs(8) == whole
    assert [one.pair_id for one in whole] == list(range(14))
    assert after.state() == straight.state()


def test_held_out_rows_are_the_last_ones_and_never_trained_on(open_pairs, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, [pair(n) for n in range(7)] + [pair(rejected="1")])))
    train = open_pairs(path, row_slice=(None, -3))
    assert sorted(numbers(train.next_pairs(10))) == sorted([*range(5)] * 2)
    held_out = open_pairs(path, row_slice=(-3, None), shuffle=False, skip_bad_rows=True)
    assert numbers(held_out.next_pairs(10, until=len(held_out.rows))) == [5, 6]
    with pytest.raises(ValueError, match="pairs.jsonl, row 7: chosen and rejected are the same"):
        open_pairs(path, row_slice=(-3, None)).scan()
    with pytest.raises(ValueError, match=r"the save has rows \[None, -3\], this run has \[None, -2\]; restore it"):
        open_pairs(path, row_slice=(None, -2)).load_state(train.state())
    with pytest.raises(ValueError, match="has 8 rows, which is too few to hold some of them out: none is left"):
        open_pairs(path, row_slice=(None, -8))


def test_real_pairs_with_the_real_tokenizer(data_dir, hf_folder, tmp_path):
    source = data_dir / "preference" / "train.jsonl"
    if not source.is_file():
        pytest.skip(f"no {source}")
    loader = PairLoader(data_plan(source, hf_folder, max_prompt_length=4096, row_slice=(None, -50)))
    report = loader.scan()
    assert (report.rows, report.too_long, report.bad_rows) == (450, 2, ())
    by_question = {record["question"]: record for record in map(json.loads, source.read_text().splitlines())}
    for drawn in loader.next_pairs(40):
        prompt, chosen, rejected = texts(drawn)
        record = by_question[prompt.removesuffix(TURN).rpartition("<|im_start|>user\n")[2]]
        assert (chosen, rejected) == tuple(f"{record[name]}<|im_end|>" for name in ("chosen", "rejected"))
    loader.close()
