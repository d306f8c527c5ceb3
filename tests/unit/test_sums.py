"""The tiny text task: sums that a rule checks, none of which is in two splits, and a model that can write nothing else."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from mindspeed_mm_rl.data.chat import ChatRenderer
from mindspeed_mm_rl.data.indexed import IndexedRows
from mindspeed_mm_rl.data.rows import PromptColumns
from mindspeed_mm_rl.data.sources import open_rows
from mindspeed_mm_rl.rewards.registry import find_verifier

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "rl" / "quickstart"


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(QUICKSTART))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(QUICKSTART))
        import sums

        sums.write_splits(folder := tmp_path_factory.mktemp("sums") / "data", seed=0)
    return folder


def test_a_chain_by_hand():
    import sums

    chain = sums.Chain(7, (5, -3, 8))
    assert (chain.question(), chain.answer()) == ("7 + 5 - 3 + 8 =", 17)
    assert sums.solution(chain) == "7+5=12,12-3=9,9+8=17\\boxed{17}"
    assert sums.parse(chain.question()) == chain
    # Every result slips, and the next line goes on from it.
    first, second, third, boxed = re.split(r",|\\boxed", sums.solution(chain, random.Random(0), slips=1.0))
    wrong = [int(line.split("=")[1]) for line in (first, second, third)]
    assert first.startswith("7+5=") and second.startswith(f"{wrong[0]}-3=") and third.startswith(f"{wrong[1]}+8=")
    assert wrong[0] != 12 and boxed == f"{{{wrong[2]}}}"


def test_splits_are_disjoint_and_the_same_for_a_seed(data, tmp_path):
    import sums

    splits = {name: sums.read_chains(data / f"{name}.jsonl") for name in sums.SPLITS}
    assert {name: len(chains) for name, chains in splits.items()} == sums.SPLITS
    together = [chain for chains in splits.values() for chain in chains]
    assert len(set(together)) == len(together)
    assert all(min(chain.first + sum(chain.changes[:n]) for n in range(sums.TERMS)) >= 0 for chain in together)
    for seed, same in ((0, True), (1, False)):
        sums.write_splits(tmp_path / str(seed), seed)
        assert ((tmp_path / str(seed) / "rl/test.jsonl").read_bytes() == (data / "rl/test.jsonl").read_bytes()) is same


def test_rows_are_read_by_training_and_solutions_are_right(data):
    import sums

    rows, verify = open_rows(data / "rl", PromptColumns(), IndexedRows), find_verifier("math_17k_acc")
    assert len(rows) == sums.SPLITS["rl/train"]
    for row in (rows[number] for number in range(20)):
        chain = sums.parse(row.messages[0]["content"])
        assert (row.answer, row.data_source) == (str(chain.answer()), "chain_sum")
        assert verify.score(sums.solution(chain), row.answer) == 1.0
        assert verify.score(sums.solution(chain, random.Random(0), slips=1.0), row.answer) == 0.0


def test_the_tokenizer_is_the_same_when_it_is_read_back(tmp_path):
    import sums
    import tiny_text_model

    tiny_text_model.write_model(tmp_path / "model", seed=0)
    renderer, made = ChatRenderer(tmp_path / "model"), tiny_text_model.make_tokenizer()
    assert len(renderer.tokenizer) == tiny_text_model.VOCABULARY
    solution = sums.solution(sums.Chain(7, (5, -3, 8)))
    tokens = renderer.tokenizer.tokenize(solution)
    assert tokens == [*"7+5=12,12-3=9,9+8=17", "\\boxed{", "1", "7", "}"]
    prompt = renderer.token_ids([{"role": "user", "content": "7 + 5 - 3 + 8 ="}], num_images=0)
    for read in (renderer.tokenizer, made):
        assert read(solution).input_ids == made(solution).input_ids
        assert read.decode(prompt) == "<|im_start|>user\n7 + 5 - 3 + 8 =<|im_end|>\n<|im_start|>assistant\n"


def test_what_is_there_is_not_made_again(data, tmp_path, monkeypatch):
    import prepare_sums

    made = []
    steps = {tmp_path / name: (name, lambda seed, name=name: made.append((name, seed))) for name in ("a", "b")}
    monkeypatch.setattr(prepare_sums, "STEPS", steps)
    (tmp_path / "a").mkdir()
    config = QUICKSTART.parent / "configs/grpo_trainer_qwen25_tiny.yaml"
    monkeypatch.setattr("sys.argv", ["prepare_sums.py", "--config", str(config), "--seed", "3"])
    prepare_sums.main()
    assert made == [("b", 3)]
