"""Which runs go to the event loop, told from made-up times."""

from __future__ import annotations

import itertools

import pytest

from service.inline import AGAIN, INLINE_S, LATELY_S, SELDOM, TRIED, TRY, Inline

SHORT, LONG = INLINE_S / 4, 3 * INLINE_S


def play(inline: Inline, runs: int, frames: int, here_s: float, there_s: float) -> list[bool]:
    """Whether each of so many runs was on the event loop, where it would take `here_s` and on the thread `there_s`."""
    places = []
    for _ in range(runs):
        places.append(inline.allows(1, frames))
        if places[-1]:
            inline.ran_here(frames, here_s)
        else:
            inline.ran_there(frames, there_s)
    return places


def test_short_runs_stay_here() -> None:
    places = play(Inline(), 1000, 1, SHORT, INLINE_S)
    assert places == [False] + [True] * 999, "how long it takes on the thread is known first"


def test_what_is_only_longer_on_the_thread_is_found_out() -> None:
    places = play(Inline(), 100, 4, 0.9 * INLINE_S, 0.9 * TRIED * INLINE_S)
    assert places == [False] + [True] * 99


def test_what_is_long_on_the_thread_is_not_even_tried() -> None:
    assert True not in play(Inline(), 10 * AGAIN, 32, LONG, LONG)


def test_a_try_that_takes_long_is_the_only_one() -> None:
    assert sum(play(Inline(), AGAIN, 32, 1.0, INLINE_S)) == 1


def test_what_is_long_here_is_tried_ever_more_seldom() -> None:
    runs = 4 * SELDOM
    places = play(Inline(), runs, 8, 1.1 * INLINE_S, 1.5 * INLINE_S)
    tries = [number for number in range(1, runs) if places[number] and not places[number - 1]]
    pauses = [after - before for before, after in itertools.pairwise(tries)]
    assert pauses == sorted(pauses)
    assert pauses[0] <= 2 * AGAIN + TRY
    assert pauses[-1] >= SELDOM
    assert sum(places) <= (len(tries) + 1) * TRY


def test_a_run_that_grew_long_leaves() -> None:
    inline = Inline()
    play(inline, 50, 1, SHORT, INLINE_S)
    places = play(inline, 50, 1, LONG, LONG)
    assert True in places[:1]
    assert True not in places[20:]


def test_one_interrupted_run_says_nothing() -> None:
    inline = Inline()
    play(inline, 50, 1, SHORT, INLINE_S)
    assert inline.allows(1, 1)
    inline.ran_here(1, 1.0)
    assert play(inline, 10, 1, SHORT, INLINE_S) == [True] * 10


def test_sizes_are_judged_apart() -> None:
    inline = Inline()
    play(inline, 50, 64, LONG, LONG)
    play(inline, 2, 1, SHORT, INLINE_S)
    assert inline.allows(1, 1)
    assert not inline.allows(1, 64)


def test_small_batches_of_many_streams_use_the_thread() -> None:
    """A run of all of them together would be too long: event loop and model work side by side."""
    inline = Inline()
    play(inline, 50, 1, SHORT, INLINE_S)
    now = 1000.0
    for stream in range(1, 4):
        inline.saw([stream], now)
        assert inline.allows(1, 1)
    inline.saw([1, 2, 3, 4, 5], now)
    assert not inline.allows(1, 1)
    now += LATELY_S
    inline.saw([1], now)
    assert not inline.allows(1, 1), "the others were there just before"
    now += LATELY_S
    inline.saw([1], now)
    assert inline.allows(1, 1)


def test_streams_of_long_ago_do_not_count() -> None:
    inline = Inline()
    play(inline, 50, 1, SHORT, INLINE_S)
    inline.saw(range(1, 100), 1000.0)
    inline.saw([1], 1000.0 + 2 * LATELY_S)
    assert inline.allows(1, 1)


def test_how_long_a_batch_takes_is_told_by_the_last_of_its_size() -> None:
    inline = Inline()
    assert inline.takes(512) == 0.0
    inline.ran_there(600, 0.006)
    assert inline.takes(512) == pytest.approx(0.00512)
    assert inline.takes(64) == 0.0
    inline.ran_there(512, 0.0256)
    assert inline.takes(600) == pytest.approx(0.03)
