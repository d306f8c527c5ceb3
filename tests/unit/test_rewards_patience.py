"""How long a sample may be graded after others have hung."""

import pytest

from mindspeed_mm_rl.rewards.patience import Patience


def test_patience_by_hand():
    patience = Patience(30.0)
    waits = []
    for _ in range(5):
        waits.append(patience.seconds())
        patience.late()
    assert waits == [30.0, 7.5, 1.875, 1.0, 1.0]
    for _ in range(999):
        patience.in_time(0.01)
    assert patience.seconds() == 1.0
    patience.in_time(0.01)
    assert patience.seconds() == 4.0
    patience.late()
    assert patience.seconds() == 1.0


def test_slow_samples_that_were_graded_keep_their_time():
    patience = Patience(30.0)
    patience.in_time(0.8)
    for _ in range(10):
        patience.late()
    assert patience.seconds() == pytest.approx(2.4)
    patience.in_time(15.0)
    assert patience.seconds() == 30.0, "never above the bound"


def test_a_bound_below_the_least_is_kept():
    patience = Patience(0.5)
    patience.late()
    assert patience.seconds() == 0.5
