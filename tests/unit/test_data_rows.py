"""Parquet rows and chat rendering: every complaint is one sentence with file, row or column."""

from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mindspeed_mm_rl.data.chat import ChatRenderer, content_parts
from mindspeed_mm_rl.data.rows import PromptColumns, file_digest
from mindspeed_mm_rl.data.sources import ParquetRows, parquet_files
from tests.data_files import make_hf_folder, png, row, write_rows


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    return make_hf_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def renderer(hf_folder):
    return ChatRenderer(hf_folder)


def prompt_rows(path):
    return ParquetRows(path, PromptColumns())


def test_rows_in_any_order_over_groups_and_files(tmp_path):
    for shard in range(2):
        rows = [row(answer=str(10 * shard + i)) for i in range(5)]
        write_rows(tmp_path / f"train-0000{shard}-of-00002.parquet", rows, rows_per_group=2)
    rows = prompt_rows(tmp_path)
    assert len(rows) == 10
    assert [rows[i].answer for i in (9, 0, 4, 5, 2)] == ["14", "0", "4", "10", "2"]
    assert rows[6].where.endswith("train-00001-of-00002.parquet, row 1")
    with pytest.raises(IndexError):
        rows[10]


def test_row_contents(tmp_path):
    images = [png(28, 28, 1), png(28, 56, 2)]
    rows = prompt_rows(write_rows(tmp_path / "train.parquet", [row("<image>and<image>", images)]))
    assert rows[0].images == tuple(images)
    assert rows[0].messages == ({"role": "user", "content": "<image>and<image>"},)
    assert rows[0].data_source == "hiyouga/geometry3k"
    assert rows[0].extra["split"] == "train"
    assert rows.digests() == {"train.parquet": file_digest(tmp_path / "train.parquet")}


def test_a_content_in_parts_is_its_text_with_a_marker_for_each_picture(tmp_path):
    parts = [{"type": "text", "text": "Left: "}, {"type": "image", "text": None}, {"type": "text", "text": " Find x."}]
    bad = [{"type": "video", "text": None}]
    prompts = [[{"role": "user", "content": content}] for content in (parts, bad)]
    rows = prompt_rows(write_rows(tmp_path / "train.parquet", [row() | {"prompt": prompt} for prompt in prompts]))
    assert rows[0].messages == ({"role": "user", "content": "Left: <image> Find x."},)
    with pytest.raises(ValueError, match="row 1: a message of column 'prompt' lacks the text of role or content"):
        rows[1]


def test_images_may_be_files_beside_the_parquet(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(28, 28))
    by_path = row(images=[]) | {"images": [{"bytes": None, "path": "pictures/a.png"}]}
    gone = row(images=[]) | {"images": [{"bytes": None, "path": "pictures/b.png"}]}
    rows = prompt_rows(write_rows(tmp_path / "train.parquet", [by_path, gone]))
    assert rows[0].images == (png(28, 28),)
    with pytest.raises(ValueError, match=r"train.parquet, row 1: image file .*b.png does not exist"):
        rows[1]


def test_the_answer_is_the_ground_truth_and_else_what_extra_info_has(tmp_path):
    # verl's rows of GSM8K: the whole worked solution stands in extra_info, and no response could equal it.
    worked = row(answer="72") | {
        "extra_info": {"split": "train", "index": 0, "answer": "48 / 2 = 24, 48 + 24 = 72\n#### 72", "question": ""}
    }
    without = row(answer="7") | {"reward_model": {"style": "rule", "ground_truth": None}}
    missing = row(answer=" ")
    rows = prompt_rows(write_rows(tmp_path / "train.parquet", [worked, without, missing]))
    assert rows[0].answer == "72"
    assert rows[1].answer == "7"
    with pytest.raises(ValueError, match=r"train.parquet, row 2: the answer is missing"):
        rows[2]
    only_reward = prompt_rows(write_rows(tmp_path / "b.parquet", [row()], drop=("extra_info",)))
    assert only_reward[0].answer == "5"
    with pytest.raises(ValueError, match=r"c.parquet has neither reward_model.ground_truth nor extra_info.answer"):
        prompt_rows(write_rows(tmp_path / "c.parquet", [row()], drop=("extra_info", "reward_model")))


def test_prompts_without_pictures_need_no_images_column(tmp_path):
    text = prompt_rows(write_rows(tmp_path / "text.parquet", [row("2 + 3?", [])], drop=("images",)))
    text.check_marked_images()
    assert text[0].images == ()
    marked = prompt_rows(write_rows(tmp_path / "marked.parquet", [row("2 + 3?", []), row()], drop=("images",)))
    with pytest.raises(ValueError, match=r"marked.parquet has no column 'images', but its prompts have <image> markers .row 1."):
        marked.check_marked_images()


def test_unusable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.parquet does not exist"):
        prompt_rows(tmp_path / "nowhere.parquet")
    with pytest.raises(ValueError, match="holds neither train.parquet"):
        prompt_rows(tmp_path)
    (tmp_path / "noise.parquet").write_bytes(b"noise")
    with pytest.raises(ValueError, match="noise.parquet is not a readable parquet file"):
        prompt_rows(tmp_path / "noise.parquet")
    with pytest.raises(ValueError, match="has no column 'question'; the columns are data_source, prompt"):
        ParquetRows(write_rows(tmp_path / "a.parquet", [row()]), PromptColumns("question"))
    with pytest.raises(ValueError, match="column 'images' must be a list of {bytes, path}, not list<"):
        prompt_rows(write_rows(tmp_path / "b.parquet", [row() | {"images": ["a.png"]}]))
    empty = pa.Table.from_pylist([row()]).slice(0, 0)
    pq.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="empty.parquet has no rows"):
        prompt_rows(tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="row 0: column 'prompt' must be a list of {role, content} messages"):
        prompt_rows(write_rows(tmp_path / "c.parquet", [row() | {"prompt": "Find x."}]))[0]
    answered = [*row()["prompt"], {"role": "assistant", "content": "5"}]
    with pytest.raises(ValueError, match="row 0: the assistant has the last word of the prompt: nothing is left to answer"):
        prompt_rows(write_rows(tmp_path / "e.parquet", [row() | {"prompt": answered}]))[0]
    with pytest.raises(ValueError, match="row 0: column 'videos' is not empty"):
        prompt_rows(write_rows(tmp_path / "d.parquet", [row() | {"videos": ["a.mp4"]}]))[0]


def test_a_folder_prefers_the_whole_file(tmp_path):
    write_rows(tmp_path / "train-00000-of-00001.parquet", [row()])
    assert parquet_files(tmp_path) == (tmp_path / "train-00000-of-00001.parquet",)
    write_rows(tmp_path / "train.parquet", [row()])
    assert parquet_files(tmp_path) == (tmp_path / "train.parquet",)


def test_markers_become_image_parts_in_order():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>left, <image><image> right"}]
    assert content_parts(messages) == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "left, "},
                {"type": "image"},
                {"type": "image"},
                {"type": "text", "text": " right"},
            ],
        },
    ]


def test_rendering_by_hand(renderer):
    token_ids = renderer.token_ids([{"role": "user", "content": "<image>Find x."}], num_images=1)
    assert renderer.tokenizer.decode(token_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Find x.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert token_ids.count(renderer.image_token_id) == 1
    text = renderer.token_ids([{"role": "system", "content": "Hi."}, {"role": "user", "content": "2 + 3?"}], num_images=0)
    assert (
        renderer.tokenizer.decode(text) == "<|im_start|>system\nHi.<|im_end|>\n<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_numbers_of_markers_images_and_tokens_must_agree(renderer):
    with pytest.raises(ValueError, match="the prompt has 1 <image> markers but the row has 2 images"):
        renderer.token_ids([{"role": "user", "content": "<image>"}], num_images=2)
    with pytest.raises(ValueError, match="gives 1 image tokens for 0 images"):
        renderer.token_ids([{"role": "user", "content": "what is <|image_pad|>?"}], num_images=0)


def test_a_token_that_the_model_has_no_embedding_for_is_named(hf_folder, tmp_path):
    folder = shutil.copytree(hf_folder, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    vocabulary = ChatRenderer(folder).tokenizer.convert_tokens_to_ids("<|image_pad|>")
    (folder / "config.json").write_text(json.dumps(config | {"text_config": {"vocab_size": vocabulary}}))
    message = rf"token id {vocabulary} \('<\|image_pad\|>'\), but the model in .* ends at {vocabulary - 1} \(config.json: vocab_size\)"
    with pytest.raises(ValueError, match=message):
        ChatRenderer(folder).token_ids([{"role": "user", "content": "<image>"}], num_images=1)


def test_a_text_template_is_refused_for_pictures_only(hf_folder, tmp_path):
    folder = shutil.copytree(hf_folder, tmp_path / "hf")
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    renderer = ChatRenderer(folder)
    assert renderer.tokenizer.decode(renderer.token_ids([{"role": "user", "content": "Hi"}], 0)) == "<|im_start|>user\nHi<|im_end|>\n"
    with pytest.raises(ValueError, match="must be the template of the vision-language model"):
        renderer.token_ids([{"role": "user", "content": "<image>"}], 1)


def test_template_beside_the_tokenizer(hf_folder, tmp_path):
    folder = shutil.copytree(hf_folder, tmp_path / "hf")
    template = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()
    messages = [{"role": "user", "content": "<image>Find x."}]
    assert ChatRenderer(folder).token_ids(messages, 1) == ChatRenderer(hf_folder).token_ids(messages, 1)
    (folder / "chat_template.json").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        ChatRenderer(folder)


def test_folders_that_are_no_model_are_named(hf_folder, tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        ChatRenderer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no usable tokenizer"):
        ChatRenderer(tmp_path)
    # Of these alone transformers makes a tokenizer without a single word, and every text would be no tokens at all.
    for name in ("chat_template.jinja", "config.json"):
        shutil.copy(hf_folder / name, tmp_path)
    with pytest.raises(ValueError, match="has no usable tokenizer .*: copy tokenizer.json and tokenizer_config.json"):
        ChatRenderer(tmp_path)
    text_model = shutil.copytree(hf_folder, tmp_path / "text")
    (text_model / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="reads text alone"):
        ChatRenderer(text_model).token_ids([{"role": "user", "content": "<image>"}], 1)
