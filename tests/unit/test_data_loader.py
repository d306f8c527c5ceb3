"""The loader: order, exact position, what is dropped and counted, what ends the run."""

from __future__ import annotations

import json
import shutil

import pytest

from mindspeed_mm_rl.data.images import expand_image_tokens
from mindspeed_mm_rl.data.loader import PromptLoader
from tests.data_files import data_plan, make_hf_folder, png, row, run_geo3k, write_rows, write_vl_settings

LONG = "<image>" + "x" * 600


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    return make_hf_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture
def open_loader(hf_folder, tmp_path):
    loaders = []

    def make(rows, **changes):
        # A folder for each: a file that is rewritten while it is open is nothing to read from.
        folder = tmp_path / str(len(loaders))
        folder.mkdir()
        path = write_rows(folder / "train.parquet", rows) if isinstance(rows, list) else rows
        loaders.append(PromptLoader(data_plan(path, hf_folder, **changes)))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def numbered(count):
    return [row(f"<image>Find x{i}.", [png(56 + 28 * (i % 3), 56, seed=i)], answer=str(i)) for i in range(count)]


def answers(prompts):
    return [int(prompt.answer) for prompt in prompts]


def test_prompt_fields_by_hand(open_loader):
    loader = open_loader([row("<image><image>Find x.", [png(56, 84), png(28, 28)], answer="9")])
    (prompt,) = loader.next_prompts(1)
    assert [image.grid_thw for image in prompt.images] == [(1, 4, 6), (1, 2, 2)]
    # 6 and 1 image tokens instead of one each.
    assert prompt.expanded_length == len(prompt.token_ids) + 5
    image_token = loader.builder.renderer.image_token_id
    assert prompt.token_ids.count(image_token) == 2
    grids = [image.grid_thw for image in prompt.images]
    assert expand_image_tokens(prompt.token_ids, grids, image_token, 2).count(image_token) == 7
    assert (prompt.prompt_id, prompt.answer, prompt.data_source) == (0, "9", "hiyouga/geometry3k")
    assert prompt.extra["row"].endswith("train.parquet, row 0")


def test_an_epoch_is_every_row_once_in_an_order_of_its_own(open_loader):
    loader = open_loader(numbered(11))
    first, second = answers(loader.next_prompts(11)), answers(loader.next_prompts(11))
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second
    assert first != list(range(11))


def test_order_depends_on_the_seed_alone(open_loader, tmp_path):
    path = write_rows(tmp_path / "train.parquet", numbered(11))
    drawn = [
        answers(prompt for size in sizes for prompt in open_loader(path, num_workers=workers, seed=seed).next_prompts(size))
        for sizes, workers, seed in (((11,), 1, 1), ((11,), 4, 1), ((11,), 1, 2))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    in_pieces = open_loader(path)
    assert answers(in_pieces.next_prompts(3) + in_pieces.next_prompts(7) + in_pieces.next_prompts(1)) == drawn[0]


def test_the_shuffled_order_never_changes_between_versions(open_loader):
    assert answers(open_loader(numbered(8), seed=1).next_prompts(8)) == [2, 4, 7, 5, 0, 6, 3, 1]


def test_no_shuffle_keeps_the_file_order(open_loader):
    assert answers(open_loader(numbered(5), shuffle=False).next_prompts(12)) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_state_continues_exactly(open_loader, tmp_path):
    path = write_rows(tmp_path / "train.parquet", [row(LONG), *numbered(6), row(images=[b"broken"])])
    straight, first, second = (open_loader(path, skip_bad_rows=True) for _ in range(3))
    whole = straight.next_prompts(20)
    begin = first.next_prompts(9)
    second.load_state(json.loads(json.dumps(first.state())))
    rest = second.next_prompts(11)
    assert answers(begin + rest) == answers(whole)
    assert [prompt.prompt_id for prompt in begin + rest] == list(range(20))
    assert second.counts == straight.counts
    assert second.state() == straight.state()


def test_load_state_drops_what_was_drawn_ahead(open_loader):
    loader = open_loader(numbered(9), num_workers=3)
    state = loader.state()
    first = answers(loader.next_prompts(4))
    loader.load_state(state)
    assert answers(loader.next_prompts(4)) == first


def test_state_of_other_data_or_order_is_refused(open_loader, tmp_path):
    path = write_rows(tmp_path / "train.parquet", numbered(3))
    state = open_loader(path).state()
    with pytest.raises(ValueError, match="the save has seed 1, this run has 2"):
        open_loader(path, seed=2).load_state(state)
    with pytest.raises(ValueError, match="the save has shuffling True, this run has False"):
        open_loader(path, shuffle=False).load_state(state)
    with pytest.raises(ValueError, match="the save has data files"):
        open_loader(numbered(4)).load_state(state)


def test_too_long_prompts_are_dropped_and_counted(open_loader):
    loader = open_loader([row(LONG), *numbered(3)], shuffle=False)
    length = open_loader(numbered(1)).next_prompts(1)[0].expanded_length
    assert answers(loader.next_prompts(4)) == [0, 1, 2, 0]
    assert loader.counts == {"rows": 6, "prompts": 4, "too_long": 2, "bad_rows": 0}
    # The bound itself fits.
    assert open_loader(numbered(1), max_prompt_length=length).next_prompts(1)
    with pytest.raises(ValueError, match=rf"max_prompt_length \({length - 1} tokens\): the shortest has {length}"):
        open_loader(numbered(1), max_prompt_length=length - 1).next_prompts(1)


def test_image_tokens_count_towards_the_length(open_loader):
    big = row("<image>Find x0.", [png(280, 280)], answer="100")
    small = open_loader(numbered(1)).next_prompts(1)[0].expanded_length
    # 100 merged patches against 4.
    assert answers(open_loader([big], max_prompt_length=small + 96).next_prompts(1)) == [100]
    loader = open_loader([big, *numbered(1)], shuffle=False, max_prompt_length=small + 95)
    assert answers(loader.next_prompts(1)) == [0]
    assert loader.counts["too_long"] == 1


@pytest.mark.parametrize("entry", ["next_prompts", "scan"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(images=[png(56, 56)[:200]]), "row 2: an image is corrupt"),
        (row(images=[]), "row 2: the prompt has 1 <image> markers but the row has 0 images"),
        (row(answer=None) | {"reward_model": {"style": "rule", "ground_truth": ""}}, "row 2: the answer is missing"),
        (row("<image>" * 5, [png(28, 28)] * 5), "row 2: 5 images, but generate_config.limit_mm_image_per_prompt is 4"),
        (row(images=[png(4, 900)]), "row 2: an image of 4 x 900 pixels has an aspect ratio over 200"),
    ],
)
def test_a_bad_row_is_named_or_skipped_and_counted(open_loader, bad, message, entry):
    rows = [*numbered(2), bad, *numbered(2)]
    run = {"next_prompts": lambda loader: loader.next_prompts(8), "scan": lambda loader: loader.scan()}[entry]
    with pytest.raises(ValueError, match="train.parquet, " + message):
        run(open_loader(rows))
    lenient = open_loader(rows, skip_bad_rows=True, shuffle=False)
    if entry == "scan":
        report = lenient.scan()
        assert (report.rows, report.usable, report.too_long, len(report.bad_rows)) == (5, 4, 0, 1)
    else:
        assert answers(lenient.next_prompts(8)) == [0, 1, 0, 1, 0, 1, 0, 1]
        assert lenient.counts == {"rows": 10, "prompts": 8, "too_long": 0, "bad_rows": 2}


def test_only_bad_rows_end_with_the_first_of_them(open_loader):
    broken = open_loader([row(images=[b"x"])] * 3, skip_bad_rows=True, shuffle=False)
    for run in (broken.scan, lambda: broken.next_prompts(1)):
        with pytest.raises(ValueError, match="no row of .*train.parquet can be used: .*row 0: an image is corrupt"):
            run()


def test_scan_counts_lengths_and_moves_nothing(open_loader):
    loader = open_loader([row(LONG), *numbered(3)], shuffle=False)
    report = loader.scan()
    assert (report.rows, report.usable, report.too_long, report.bad_rows) == (4, 3, 1, ())
    assert report.longest_prompt > 600
    assert loader.counts["rows"] == 0
    with pytest.raises(ValueError, match="the shortest has"):
        open_loader([row(LONG)]).scan()


def test_marked_prompts_without_the_column_end_the_run_even_when_bad_rows_may_be_skipped(hf_folder, tmp_path):
    path = write_rows(tmp_path / "train.parquet", [row()], drop=("images",))
    with pytest.raises(ValueError, match="has no column 'images'"):
        PromptLoader(data_plan(path, hf_folder, skip_bad_rows=True))


def test_prompts_with_and_without_pictures_mix(open_loader):
    loader = open_loader([row("2 + 3?", [], answer="0"), *numbered(1)], shuffle=False)
    text, picture = loader.next_prompts(2)
    assert text.images == () and text.expanded_length == len(text.token_ids)
    assert len(picture.images) == 1


def test_text_models_need_no_picture_settings(hf_folder, tmp_path):
    folder = shutil.copytree(hf_folder, tmp_path / "text")
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / "preprocessor_config.json").unlink()
    path = write_rows(tmp_path / "train.parquet", [row("2 + 3?", [])], drop=("images",))
    loader = PromptLoader(data_plan(path, folder))
    assert loader.builder.image_settings is None
    assert loader.scan().usable == 1
    assert loader.next_prompts(2)[1].prompt_id == 1
    loader.close()


def test_real_pictures_with_the_real_tokenizer(data_dir, tmp_path):
    run_geo3k("--local_data", data_dir / "geometry3k", "--local_dir", tmp_path / "geo3k")
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data_dir / "tokenizer_qwen25" / name, folder)
    write_vl_settings(folder, 151655)
    loader = PromptLoader(data_plan(tmp_path / "geo3k", folder, max_pixels=100 * 784, max_prompt_length=400))
    report = loader.scan()
    assert (report.rows, report.usable + report.too_long) == (500, 500)
    prompts = loader.next_prompts(40)
    for prompt in prompts:
        tokens = sum(image.num_tokens(2) for image in prompt.images)
        expanded = expand_image_tokens(prompt.token_ids, [image.grid_thw for image in prompt.images], 151655, 2)
        assert expanded.count(151655) == tokens
        assert len(expanded) == prompt.expanded_length <= 400
        assert prompt.images[0].pixels.shape[0] * prompt.images[0].pixels.shape[1] <= 100 * 784
    text = loader.builder.renderer.tokenizer.decode(prompts[0].token_ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>")
    assert text.endswith("MUST BE put in \\boxed{}.<|im_end|>\n<|im_start|>assistant\n")
    loader.close()
