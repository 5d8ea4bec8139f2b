"""When what fails is tried again, on a clock of the test's own."""

from __future__ import annotations

from service.client_errors import Unreachable
from service.client_patience import Patience
from service.client_values import Retry
from service.errors import Deadline, Draining, Overloaded

RETRY = Retry(give_up_s=10.0, first_s=0.1, longest_s=2.0)


def test_what_was_lost_is_tried_at_once_then_after_pauses_that_double_until_it_is_given_up() -> None:
    patience, now, pauses = Patience(RETRY), 100.0, []
    patience.failed(Unreachable("lost"), now)
    while (pause := patience.pause_s(now)) is not None:
        pauses.append(pause)
        now += pause
        patience.failed(Unreachable("refused"), now)
    assert pauses[0] == 0
    for pause, longest in zip(pauses[1:6], [0.1, 0.2, 0.4, 0.8, 1.6], strict=True):
        assert longest / 2 <= pause <= longest
    assert all(1.0 <= pause <= 2.0 for pause in pauses[6:-1])
    assert now == 110.0  # the last try is when time is up, not before
    assert patience.given_up() == f"was lost and did not come back within 10 s, in {len(pauses)} attempts: refused"


def test_success_begins_anew() -> None:
    patience = Patience(RETRY)
    patience.failed(Unreachable("lost"), 0.0)
    patience.pause_s(0.0)
    assert patience.left_s(4.0) == 6.0
    patience.succeeded()
    assert patience.left_s(4.0) == 10.0
    assert patience.pause_s(50.0) == 0
    assert patience.tries == 1


def test_a_refusal_says_when_to_come_again_but_one_that_goes_away_does_not_know() -> None:
    patience = Patience(RETRY)
    patience.failed(Overloaded("busy", retry_after=3), 0.0)
    assert patience.pause_s(0.0) == 3.0
    patience.failed(Draining("going", retry_after=5), 3.0)
    assert 0.05 <= (patience.pause_s(3.0) or 0) <= 0.1
    hasty = Patience(RETRY)
    hasty.failed(Deadline("too slow"), 0.0)
    assert 0.05 <= (hasty.pause_s(0.0) or 0) <= 0.1  # not at once, where nothing was lost
    late = Patience(RETRY)
    late.failed(Overloaded("busy", retry_after=600), 0.0)
    assert late.pause_s(0.0) == 10.0
    assert late.pause_s(10.0) is None
