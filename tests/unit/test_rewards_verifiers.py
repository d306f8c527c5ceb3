"""What each verifier says of hand-written responses, and how scores become rewards."""

import pytest

from mindspeed_mm_rl.rewards.format import boxed_content, thinks_then_answers, thinks_then_boxes
from mindspeed_mm_rl.rewards.minerva import minerva_normalised
from mindspeed_mm_rl.rewards.registry import VERIFIERS, check_verifiers, find_verifier, judge_name, killed_scores, score_names
from mindspeed_mm_rl.rewards.scoring import Question, RewardSettings, SampleScore, killed_sample, overlong_penalty, score_sample, weigh
from mindspeed_mm_rl.rewards.worker import self_check

GOOD = "<think>Angles add up to 180.</think> So \\boxed{55}"


def settings(**changes):
    values = {
        "verifiers": ("geo3k",),
        "weights": (1.0,),
        "overlong_buffer": 0,
        "overlong_penalty_factor": 1.0,
        "max_tokens": 2048,
        "workers": 1,
        "timeout_seconds": 5.0,
    }
    return RewardSettings(**{**values, **changes})


def score(name, text, answer):
    return find_verifier(name).score(text, answer)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{55}", "55"),
        ("\\boxed{1} then \\boxed{ \\frac{1}{2} }.", "\\frac{1}{2}"),
        ("\\boxed{}", ""),
        ("\\boxed{5", None),
        ("the answer is 5", None),
    ],
)
def test_boxed_content_is_the_last_balanced_box(text, content):
    assert boxed_content(text) == content


def test_the_asked_shape_is_a_thought_and_then_a_box():
    assert thinks_then_boxes("<think>a\nb</think>\n\\boxed{5} done")
    assert not thinks_then_boxes("well <think>a</think> \\boxed{5}")
    assert not thinks_then_boxes("<think>a \\boxed{5}</think>")
    assert not thinks_then_boxes("<think>a</think> \\boxed{5")
    assert thinks_then_answers("<think>a</think><answer>\\boxed{5}</answer>")
    assert not thinks_then_answers("<think>a</think>\\boxed{5}<answer></answer>")


def test_shape_check_is_linear_in_the_response():
    # A backtracking regex needs minutes for this.
    assert not thinks_then_boxes("<think>" * 20000 + "</think>" * 20000)


def test_geo3k_is_nine_tenths_accuracy_and_one_tenth_format():
    assert score("geo3k", GOOD, "55") == 1.0
    assert score("geo3k", "\\boxed{55}", "55") == 0.9
    assert score("geo3k", GOOD, "56") == 0.1
    assert score("geo3k", "55", "55") == 0.0


TAGGED = "<think>a</think><answer>\\boxed{5}</answer>"


@pytest.mark.parametrize(
    ("name", "text", "answer", "value"),
    [
        ("acc", "so \\boxed{5}", "5", 1.0),
        ("acc", "so \\boxed{5.0001} cm", "5", 1.0),
        ("acc", "so \\boxed{6}", "5", -0.5),
        ("acc", "the answer is 5", "5", -1.0),
        ("acc", "so \\boxed{}", "5", -1.0),
        ("acc", "so \\boxed{5", "5", 1.0),
        ("acc", "so \\boxed 5$.", "5", 1.0),
        ("acc", "\\boxed{6}<|im_start|>assistant\\boxed{5}<|im_end|>\\boxed{6}", "5", 1.0),
        ("base_acc", TAGGED, "5", 1.0),
        ("base_acc", TAGGED, "6", 0.0),
        ("base_acc", "\\boxed{5}", "5", 0.0),
        ("math_17k_acc", "\\boxed{5}", "5", 1.0),
        ("math_17k_acc", "\\boxed{\\frac{10}{4}}", "\\frac{5}{2}", 0.0),
        ("math_17k_acc", "5", "5", 0.0),
        ("acc_for_ppo", "\\boxed{5}", "5", 1.0),
        ("acc_for_ppo", "\\boxed{6}", "5", 0.0),
        ("acc_for_dapo", "Answer: 5", "5", 1.0),
        ("acc_for_dapo", "\\boxed{5}", "5", -1.0),
        ("math_verify_reward", TAGGED.replace("5", "\\frac{10}{4}"), "\\frac{5}{2}", 1.0),
        ("math_verify_reward", TAGGED, "6", 0.0),
        ("math_verify_reward", "\\boxed{5}", "5", 0.0),
        ("retool_reward", "so \\boxed{5}", "5", 1.0),
        ("retool_reward", "so \\boxed{5.0}", "5", -1.0),
        ("retool_reward", "\\boxed{5}" + "x" * 100, "5", -1.0),
        ("format", "<think>a</think> \n<answer>5</answer>", "", 1.0),
        ("format", "<think>a</think><answer>5</answer>\nmore", "", 1.0),
        ("format", "<think>a</think><answer>5</answer> more", "", 0.0),
        ("format", "<think>a</think> so <answer>5</answer>", "", 0.0),
        ("format", " <think>a</think><answer>5</answer>", "", 0.0),
        ("strict_format", TAGGED, "", 1.0),
        ("strict_format", TAGGED + "</answer>", "", -0.5),
        ("strict_format", TAGGED + "\n", "", -0.5),
        ("strict_format", "<think>a</think><answer>5</answer>", "", -0.5),
        ("strict_format", TAGGED.replace("5}", "5} or \\boxed{6}"), "", -0.5),
        ("strict_format", "<think>\\boxed{5}</think><answer></answer>", "", -0.5),
        ("strict_format", TAGGED.replace("5}", "\n5}"), "", -0.5),
        ("step", "Let us see.", "", 0.0),
        ("step", "1. Add", "", 1 / 3),
        ("step", "First, add.\n2. Next, divide.", "", 2 / 3),
        ("step", "Step 1: a\nStep 2: b\n- c\n* d\nFinally, e", "", 1.0),
    ],
)
def test_values_of_the_text_verifiers(name, text, answer, value):
    assert score(name, text, answer) == value


def test_what_a_killed_grading_is_worth():
    assert killed_scores(VERIFIERS) == dict.fromkeys(VERIFIERS, 0.0) | {"acc_for_dapo": -1.0, "retool_reward": -1.0}


def test_acc_for_dapo_takes_the_last_answer_line_of_the_tail():
    assert score("acc_for_dapo", "Answer: 3\nAnswer: $1,000$ dollars", "1000") == 1.0
    assert score("acc_for_dapo", "Answer: 7\nAnswer: 8", "7") == -1.0
    assert score("acc_for_dapo", "Answer: 7\n" + "x" * 300, "7") == -1.0
    assert minerva_normalised("x = \\text{a} frac12 ") == "afrac{1}{2}"


def test_every_verifier_grades_its_own_examples_right():
    self_check(tuple(VERIFIERS))


def test_unknown_verifier_names_the_nearest():
    with pytest.raises(ValueError, match="'geo3kk', which does not exist; did you mean 'geo3k'"):
        check_verifiers(["format", "geo3kk"])
    with pytest.raises(ValueError, match="did you mean 'acc_for_dapo'"):
        settings(verifiers=("acc_dapo",))


def graded(text, answer, names, **question):
    return score_sample(text, Question(answer, **question), names)


def test_accuracy_is_apart_from_the_score():
    assert score_names(["geo3k"]) == ("geo3k", "geo3k_acc", "geo3k_format")
    judges = [judge_name(names) for names in (["geo3k"], ["format", "base_acc"], ["format"], ["a.py:f", "acc"], ["format", "a.py:f"])]
    assert judges == ["geo3k_acc", "base_acc", "math_17k_acc", "acc", "a.py:f"]
    assert graded("\\boxed{55}", "55", ["format"]) == SampleScore({"format": 0.0}, accuracy=1.0)
    assert graded("\\boxed{5}", "6", ["acc"]) == SampleScore({"acc": -0.5}, accuracy=0.0)
    assert graded("Answer: 5", "6", ["acc_for_dapo"]) == SampleScore({"acc_for_dapo": -1.0}, accuracy=0.0)
    assert graded("\\boxed{55}", "55", ["geo3k"]) == SampleScore({"geo3k": 0.9, "geo3k_acc": 1.0, "geo3k_format": 0.0}, accuracy=1.0)


@pytest.mark.parametrize(("length", "penalty"), [(10, 0.0), (1536, 0.0), (1792, -0.5), (2048, -1.0), (3000, -1.0)])
def test_overlong_penalty_grows_over_the_buffer(length, penalty):
    assert overlong_penalty(length, max_tokens=2048, buffer=512, factor=1.0) == penalty
    assert overlong_penalty(length, max_tokens=2048, buffer=512, factor=0.5) == penalty / 2
    assert overlong_penalty(length, max_tokens=2048, buffer=0, factor=1.0) == 0.0


def group_of(texts, lengths, answer, rule, source=""):
    used = rule.rule(source)
    return weigh([graded(text, answer, used.verifiers, data_source=source) for text in texts], lengths, rule, used)


def test_group_scores_of_pictures_know_weights_and_penalty():
    rule = settings(verifiers=("geo3k_acc", "geo3k_format"), weights=(2.0, 0.5), overlong_buffer=512)
    group = group_of([GOOD, "\\boxed{55}", GOOD], [10, 1792, 2048], "55", rule)
    assert group.scores == {"geo3k_acc": [1.0, 1.0, 1.0], "geo3k_format": [1.0, 0.0, 1.0]}
    assert group.rewards == [2.5, 1.5, 1.5]
    assert group.overlong_penalties == [0.0, -0.5, -1.0]
    assert group.accuracy == [1.0, 1.0, 1.0]


def test_a_source_has_verifiers_of_its_own():
    """Exactly the name; every other source goes by the rule of all data."""
    rule = settings(verifiers=("acc",), by_source=(("openai/gsm8k", ("math_17k_acc", "step"), (1.0, 3.0)),))
    gsm8k, other, longer = (group_of(["1. \\boxed{5}"], [1], "6", rule, name) for name in ("openai/gsm8k", "", "openai/gsm8k/main"))
    assert (gsm8k.scores, gsm8k.rewards) == ({"math_17k_acc": [0.0], "step": [1 / 3]}, [1.0])
    assert other.scores == longer.scores == {"acc": [-0.5]}


def test_model_scores_are_weighed_with_the_others():
    rule = settings(verifiers=("acc", "reward_model"), weights=(1.0, 0.5), reward_model="/model")
    group = weigh([graded("\\boxed{5}", "5", rule.verifiers)], [1], rule, model_scores=[-3.0])
    assert (group.scores, group.rewards) == ({"acc": [1.0], "reward_model": [-3.0]}, [-0.5])


def test_a_killed_grading_scores_lowest():
    killed = weigh([killed_sample(("acc_for_dapo",))], [5], settings(verifiers=("acc_for_dapo",)), timeouts=1)
    assert (killed.rewards, killed.accuracy, killed.timeouts) == ([-1.0], [0.0], 1)


def test_settings_that_cannot_work_are_refused():
    for changes, words in (
        ({"weights": (1.0, 2.0)}, "must have the same length"),
        ({"verifiers": (), "weights": ()}, "at least 1"),
        ({"overlong_buffer": 2048}, "overlong_buffer .2048. must be below max_tokens .2048."),
        ({"timeout_seconds": 0.0}, "timeout_seconds > 0"),
        ({"by_source": (("gsm8k", ("accc",), (1.0,)),)}, "'accc', which does not exist; did you mean 'acc'"),
        ({"verifiers": ("reward_model",)}, "rl_config.reward_model is not given"),
        ({"verifiers": ("a.py:f", "b.py:f"), "weights": (1.0, 1.0)}, "b.py:f is called f in the metrics, as a.py:f"),
        ({"verifiers": ("a.py:acc",)}, "a.py:acc is called acc in the metrics"),
        ({"verifiers": ("a.py",)}, "'a.py' must be path/to/file.py:name"),
    ):
        with pytest.raises(ValueError, match=words):
            settings(**changes)
    with pytest.raises(ValueError, match="1 responses to grade but 2 lengths"):
        weigh([killed_sample(("geo3k",))], [1, 2], settings())
