"""What each verifier says of hand-written responses, and how scores become rewards."""

import pytest

from mindspeed_mm_rl.rewards.format import boxed_content, thinks_then_answers, thinks_then_boxes
from mindspeed_mm_rl.rewards.math import minerva_normalised
from mindspeed_mm_rl.rewards.registry import VERIFIERS, accuracy_name, check_verifiers, find_verifier, score_names
from mindspeed_mm_rl.rewards.scoring import RewardSettings, SampleScore, overlong_penalty, score_group, score_sample, weigh, wrong_sample
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


@pytest.mark.parametrize(
    ("given", "answer", "right"),
    [
        ("55", "55", 1.0),
        ("55.0", "55", 1.0),
        ("55^\\circ", "55", 1.0),
        ("\\sqrt{288}", "12 \\sqrt { 2 }", 1.0),  # geometry3k writes with blanks
        ("\\frac{10}{4}", "\\frac{5}{2}", 1.0),  # by math-verify: mathruler asks for reduced fractions
        ("56", "55", 0.0),
        ("", "55", 0.0),
        ("hello world", "55", 0.0),
        ("12\\sqrt{3}", "12 \\sqrt { 2 }", 0.0),
        ("5" * 301, "5" * 301, 0.0),  # nobody's answer is that long
        ("2**3", "8", 0.0),  # never evaluated
    ],
)
def test_acc_compares_boxed_answers(given, answer, right):
    assert score("acc", f"<think>x</think> \\boxed{{{given}}}", answer) == right


def test_geo3k_is_nine_tenths_accuracy_and_one_tenth_format():
    assert score("geo3k", GOOD, "55") == 1.0
    assert score("geo3k", "\\boxed{55}", "55") == 0.9
    assert score("geo3k", GOOD, "56") == 0.1
    assert score("geo3k", "55", "55") == 0.0


def test_text_verifiers():
    tagged = "<think>a</think><answer>\\boxed{5}</answer>"
    assert score("base_acc", tagged, "5") == 1.0
    assert score("base_acc", "\\boxed{5}", "5") == 0.0
    assert score("base_acc", tagged, "6") == 0.0
    assert score("math_17k_acc", "\\boxed{5}", "5") == 1.0
    assert score("math_17k_acc", "\\boxed{\\frac{10}{4}}", "\\frac{5}{2}") == 0.0
    assert score("math_verify_reward", tagged.replace("5", "\\frac{10}{4}"), "\\frac{5}{2}") == 1.0
    assert score("math_verify_reward", "\\boxed{5}", "5") == 0.0
    assert score("strict_format", tagged, "") == 1.0
    assert score("strict_format", tagged + "</answer>", "") == -0.5


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


def test_accuracy_is_apart_from_the_score():
    assert score_names(["geo3k"]) == ("geo3k", "acc", "format")
    assert [accuracy_name(names) for names in (["geo3k"], ["format", "base_acc"], ["format"])] == ["acc", "base_acc", "acc"]
    assert score_sample("\\boxed{55}", "55", ["format"]) == SampleScore({"format": 0.0}, accuracy=1.0)
    assert score_sample("Answer: 5", "6", ["acc_for_dapo"]) == SampleScore({"acc_for_dapo": -1.0}, accuracy=0.0)
    assert score_sample("\\boxed{55}", "55", ["geo3k"]) == SampleScore({"geo3k": 0.9, "acc": 1.0, "format": 0.0}, accuracy=1.0)


@pytest.mark.parametrize(("length", "penalty"), [(10, 0.0), (1536, 0.0), (1792, -0.5), (2048, -1.0), (3000, -1.0)])
def test_overlong_penalty_grows_over_the_buffer(length, penalty):
    assert overlong_penalty(length, max_tokens=2048, buffer=512, factor=1.0) == penalty
    assert overlong_penalty(length, max_tokens=2048, buffer=512, factor=0.5) == penalty / 2
    assert overlong_penalty(length, max_tokens=2048, buffer=0, factor=1.0) == 0.0


def test_group_scores_of_pictures_know_weights_and_penalty():
    rule = settings(verifiers=("acc", "format"), weights=(2.0, 0.5), overlong_buffer=512)
    group = score_group([GOOD, "\\boxed{55}", GOOD], [10, 1792, 2048], "55", "hiyouga/geometry3k", rule)
    assert group.scores == {"acc": [1.0, 1.0, 1.0], "format": [1.0, 0.0, 1.0]}
    assert group.rewards == [2.5, 1.5, 1.5]
    assert group.overlong_penalties == [0.0, -0.5, -1.0]
    assert group.accuracy == [1.0, 1.0, 1.0]


def test_a_killed_grading_scores_lowest():
    killed = weigh([wrong_sample(("acc_for_dapo",))], [5], settings(verifiers=("acc_for_dapo",)), timeouts=1)
    assert (killed.rewards, killed.accuracy, killed.timeouts) == ([-1.0], [0.0], 1)


def test_settings_that_cannot_work_are_refused():
    for changes, words in (
        ({"weights": (1.0, 2.0)}, "must have the same length"),
        ({"verifiers": (), "weights": ()}, "at least 1"),
        ({"overlong_buffer": 2048}, "overlong_buffer .2048. must be below max_tokens .2048."),
        ({"timeout_seconds": 0.0}, "timeout_seconds > 0"),
    ):
        with pytest.raises(ValueError, match=words):
            settings(**changes)
    with pytest.raises(ValueError, match="1 responses to grade but 2 lengths"):
        score_group(["a"], [1, 2], "5", "", settings())


def test_a_verifier_that_raises_is_named_with_its_sample():
    with pytest.raises(RuntimeError, match=r"acc_for_dapo.* failed on sample 1 of a prompt of 'gsm8k'"):
        score_group(["no line", "Answer: 5"], [1, 1], None, "gsm8k", settings(verifiers=("acc_for_dapo",)))
