"""Evaluation: numbers worked by hand, names, the best save. A table of written answers stands for the rollout engine."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

import pytest
from rich.console import Console

from mindspeed_mm_rl.algorithms.pass_at_k import accuracies, pass_at_k
from mindspeed_mm_rl.config.plan import EvalPlan, Plan
from mindspeed_mm_rl.data.loader import PromptLoader
from mindspeed_mm_rl.report import evaluation_curves, evaluation_table
from mindspeed_mm_rl.rewards.pool import RewardPool
from mindspeed_mm_rl.rewards.scoring import RewardSettings
from mindspeed_mm_rl.trainer.best import Best, remembered_best
from mindspeed_mm_rl.trainer.evaluate import Evaluator, Tally, eval_data, file_labels, named
from mindspeed_mm_rl.trainer.resume import Start
from mindspeed_mm_rl.trainer.sampler import GroupSampler
from mindspeed_mm_rl.trainer.save_folder import BEST_TRACKER
from mindspeed_mm_rl.trainer.state import RunState
from mindspeed_mm_rl.types import Rollout, RolloutGroup, RolloutRequest, Sampling
from mindspeed_mm_rl.workers.failure import WorkerDied
from mindspeed_mm_rl.workers.group import Trainers
from tests.data_files import make_hf_folder, row, write_rows
from tests.plans import reward_plan, whole_plan

HANGS = "<think>x</think> \\boxed{9^{9^{9^{9^{9}}}}}"


def test_pass_at_k_by_hand() -> None:
    assert [pass_at_k(4, 1, k) for k in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)
    assert [pass_at_k(3, c, 3) for c in (0, 1, 3)] == [0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"pass@5 of 1 right among 4 samples"):
        pass_at_k(4, 1, 5)


@pytest.mark.parametrize(("n", "c", "k"), [(6, 2, 3), (7, 1, 2), (8, 5, 4), (5, 4, 2)])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample(n: int, c: int, k: int) -> None:
    subsets = list(combinations(range(n), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(min(subset) < c for subset in subsets) / len(subsets))


def test_accuracies_by_hand() -> None:
    # 1 of 3, none, all: pass@2 of the first is 1 - C(2, 2) / C(3, 2) = 2/3.
    values = accuracies([1, 0, 3], 3)
    assert values == pytest.approx({"mean@3": 4 / 9, "pass@1": 4 / 9, "pass@2": 5 / 9, "pass@3": 2 / 3})
    assert accuracies([1, 0], 1) == {"mean@1": 0.5, "pass@1": 0.5}


class Written:
    """Answers every prompt with the texts of its answer: {right answer: texts, one per sample}."""

    def __init__(self, texts: dict[str, list[str]], tokenizer) -> None:
        self.texts, self.tokenizer = texts, tokenizer
        self.asked: list[tuple[int, Sampling]] = []

    def generate(self, requests: list[RolloutRequest], images: list, sampling: Sampling) -> Iterator[RolloutGroup]:
        for request in reversed(requests):
            self.asked.append((request.prompt_id, sampling))
            texts = self.texts[self.tokenizer.decode(request.token_ids).split("Find ")[1].split(".")[0]]
            ids, first = map(self.tokenizer.encode, texts), request.prompt_id * len(texts)
            samples = tuple(Rollout(first + k, list(tokens), [], "stop", 0) for k, tokens in enumerate(ids))
            yield RolloutGroup(request.prompt_id, request.expanded_length, samples)


class Group:
    """Of trainer or critic ranks; dead in a phase."""

    def __init__(self, dead_in: str = "") -> None:
        self.dead_in = dead_in

    def check_alive(self, doing: str) -> None:
        if doing == self.dead_in:
            raise WorkerDied(f"died in {doing}")


@pytest.fixture(scope="module")
def rewards() -> Iterator[RewardPool]:
    with RewardPool(RewardSettings(**asdict(reward_plan(workers=2, timeout_seconds=1.0)))) as pool:
        yield pool


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Two files: 3 rows of one source, and 2 rows of which one has the same source and one has none."""
    folder = make_hf_folder(tmp_path / "hf")

    def rows(sources: list[str]) -> list[dict]:
        return [row(f"Find {chr(97 + i)}.", [], answer=str(i), data_source=source) for i, source in enumerate(sources)]

    files = write_rows(tmp_path / "first.parquet", rows(["geo"] * 3)), write_rows(tmp_path / "second.parquet", rows(["geo", ""]))
    plan = whole_plan(folder, files[0], tmp_path)
    evaluation = EvalPlan(tuple(map(str, files)), 2, False, samples_per_prompt=2, temperature=1.0, max_rows=0, reward=plan.reward)
    return replace(plan, run=replace(plan.run, train_iters=5, prompts_per_generation=2, save_interval=4), eval=evaluation)


def boxed(*answers: str) -> list[str]:
    return [f"<think>so</think> \\boxed{{{answer}}}" for answer in answers]


@pytest.fixture
def make(plan: Plan, rewards: RewardPool):
    loaders: list[PromptLoader] = []

    def made(texts: dict[str, list[str]], **changes) -> tuple[Evaluator, Written]:
        changed = replace(plan, eval=replace(plan.eval, **changes))
        loaders.extend(map(PromptLoader, eval_data(changed)))
        own = loaders[-len(changed.eval.data) :]
        tokenizer = own[0].builder.renderer.tokenizer
        rollout = Written(texts, tokenizer)
        return Evaluator(RunState(Start(changed)), own, GroupSampler(changed, Trainers(Group()), rollout, rewards, tokenizer)), rollout

    yield made
    for loader in loaders:
        loader.close()


def test_every_row_is_evaluated_once_each_time_and_named_by_its_source(make) -> None:
    # a: answer 0, b: answer 1, c: answer 2.
    evaluator, rollout = make({"a": boxed("0", "0"), "b": boxed("1", "7"), "c": boxed("7", "7")})
    values = evaluator.evaluate()
    assert [(values[f"eval/geo/first/{m}"]) for m in ("mean@2", "pass@1", "pass@2", "num_prompts")] == pytest.approx([0.5, 0.5, 2 / 3, 3])
    assert (values["eval/geo/second/mean@2"], values["eval/second/mean@2"], values["eval/second/num_prompts"]) == (1.0, 0.5, 1)
    assert values["eval/mean@2"] == pytest.approx((0.5 + 1.0 + 0.5) / 3)
    assert values["eval/second/response_length/mean"] == len(boxed("1")[0])
    assert evaluator.evaluate() == values | {"timing/eval": pytest.approx(values["timing/eval"], abs=10)}
    first, second = rollout.asked[:5], rollout.asked[5:]
    assert first == second and sorted(prompt_id for prompt_id, _ in first) == [0, 1, 2, 3, 4]
    assert {sampling for _, sampling in first} == {Sampling(2, 1.0, "evaluation", with_logprobs=False)}


def test_a_source_that_is_called_as_a_file_is_kept_apart_from_it() -> None:
    def tally(right: int) -> Tally:
        return Tally([right], [1], [0.0])

    values = named({("geo", "geo"): tally(1), ("", "geo"): tally(0), ("sums", "geo"): tally(1)})
    assert (values["eval/geo/geo/mean@1"], values["eval/geo/mean@1"], values["eval/sums/mean@1"]) == (1.0, 0.0, 1.0)
    assert values["eval/mean@1"] == pytest.approx(2 / 3)


def test_only_the_first_rows(make) -> None:
    evaluator, rollout = make({"a": boxed("0", "0"), "b": boxed("1", "7")}, max_rows=1)
    assert {name: value for name, value in evaluator.evaluate().items() if name.endswith("num_prompts")} == {
        "eval/geo/first/num_prompts": 1.0, "eval/geo/second/num_prompts": 1.0,
    }  # fmt: skip
    # Ids leave room for the rows that were left out.
    assert [prompt_id for prompt_id, _ in rollout.asked] == [0, 3]


def test_an_answer_whose_grading_hangs_is_wrong(make, plan: Plan) -> None:
    evaluator, _ = make({"a": [boxed("0")[0], HANGS]}, max_rows=1, data=plan.eval.data[:1])
    values = evaluator.evaluate()
    assert (values["eval/geo/mean@2"], values["eval/geo/pass@2"]) == (0.5, 1.0)
    assert values["eval/timeouts"] + values["eval/crashes"] == 1


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_a_death_is_seen_while_others_grade(make, role: str) -> None:
    evaluator, _ = make({"a": boxed("0", "0")}, max_rows=1)
    evaluator.sampler.trainers = Trainers(**{"actor": Group(), "critic": Group()} | {role: Group(dead_in="rewards")})
    with pytest.raises(WorkerDied):
        evaluator.evaluate()


def test_only_iterations_with_a_save_can_be_the_best(make) -> None:
    """Evaluations after 2, 4 and 5 (the last); saves after 4 and 5."""
    texts = {"a": boxed("0", "0"), "b": boxed("1", "1"), "c": boxed("2", "2")}
    evaluator, rollout = make(texts, max_rows=1, at_start=True)
    assert evaluator.after(0)["eval/mean@2"] == 1.0 and evaluator.state.best is None
    evaluator, rollout = make(texts, max_rows=1)
    assert [iteration for iteration in range(6) if evaluator.is_due(iteration)] == [2, 4, 5]
    assert evaluator.after(2)["eval/mean@2"] == 1.0 and evaluator.state.best is None
    assert evaluator.after(3) == {}
    rollout.texts = texts | {"a": boxed("0", "7")}
    evaluator.after(4)
    assert evaluator.state.best == Best(4, "eval/mean@2", 0.5)
    evaluator.after(5)
    assert evaluator.state.best.iteration == 4, "of equal ones the earlier"
    rollout.texts = texts
    evaluator.after(5)
    assert evaluator.state.best == Best(5, "eval/mean@2", 1.0)


def test_best_is_remembered_while_it_is_measured_in_the_same_way(plan: Plan) -> None:
    contents = {"best": {"iteration": 4, "metric": "eval/mean@2", "value": 0.5}, "plan": asdict(plan)}
    best = Best(4, "eval/mean@2", 0.5)
    assert remembered_best(contents, replace(plan.eval, interval=1, at_start=True)) == best
    assert remembered_best(contents, None) == best
    for change in ({"temperature": 0.5}, {"samples_per_prompt": 4}, {"max_rows": 2}, {"data": plan.eval.data[:1]}):
        assert remembered_best(contents, replace(plan.eval, **change)) is None
    assert remembered_best({}, plan.eval) is None


def test_a_best_save_that_is_not_here_is_forgotten(plan: Plan) -> None:
    """Removed by hand, or left in the folder of the run that is continued in another one."""
    best = {"iteration": 4, "metric": "eval/mean@2", "value": 0.5}
    state = RunState(Start(plan, contents={"best": best, "plan": asdict(plan)}))
    state.resume({}, None, None)
    assert state.best is None
    (Path(plan.run.save) / "iter_0000004").mkdir(parents=True)
    state.resume({}, None, None)
    assert state.best == Best(**best) and (Path(plan.run.save) / BEST_TRACKER).read_text() == "4\n"


def test_files_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "v1.5.parquet").touch()
    paths = ("a/test", str(tmp_path / "v1.5.parquet"), "b/test", "gsm8k")
    assert file_labels(paths) == ["test_1", "v1.5", "test_3", "gsm8k"]


def test_the_loader_stops_where_it_is_told_and_begins_again(plan: Plan) -> None:
    with closing(PromptLoader(eval_data(plan)[0])) as loader:
        assert [len(loader.next_prompts(2, until=3)) for _ in range(3)] == [2, 1, 0]
        loader.rewind()
        assert [prompt.prompt_id for prompt in loader.next_prompts(2)] == [0, 1]
        assert loader.counts["rows"] == 2


def test_table_and_curves_of_evaluations() -> None:
    records = [
        {"iteration": 0, "eval/a/b/mean@2": 0.25, "eval/a/b/pass@2": 0.5, "eval/a/b/response_length/mean": 7.0},
        {"iteration": 1, "dapo/score/mean": 1.0},
        {"iteration": 2, "eval/a/b/mean@2": 0.75, "eval/a/b/pass@2": 1.0, "eval/a/b/response_length/mean": 8.5},
    ]
    shown = io.StringIO()
    Console(file=shown, width=100).print(evaluation_table(records, best=2))
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.getvalue().splitlines() if "a/b" in line]
    assert cells == [["0", "a/b", "0.25", "0.5", "7"], ["* 2", "a/b", "0.75", "1", "8.5"]]
    assert "* iteration 2 is the best save" in shown.getvalue()
    assert evaluation_curves(records) == {"evaluation": ("eval/a/b/mean@2",)}
    assert evaluation_table(records[1:2], None) is None and evaluation_curves(records[1:2]) == {}
