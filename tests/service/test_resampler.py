"""The resampler: what a step is made of, and that however frames are cut into calls, the steps are the same bits."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import TooLarge, WrongTime
from service.resampler import Floats, Resampled, ResamplerState, Times, read_times, resample, stream_times


def ramp(times: Times) -> Floats:
    """Frames (count, 1) whose value is their time: so is that of every step between two of them."""
    return times.astype(np.float32)[:, None]


def at_rate(fps: float, count: int) -> Times:
    return np.arange(count) / fps


def run(fps: float, rate: float, count: int) -> Resampled:
    times = at_rate(fps, count)
    return resample(ResamplerState(), rate, times, ramp(times))


def test_half_the_rate_gives_two_steps_a_frame() -> None:
    done = run(15, 30, 4)
    np.testing.assert_allclose(done.steps[:, 0], np.arange(7) / 30, rtol=1e-6)
    assert done.owners.tolist() == [0, 1, 1, 2, 2, 3, 3]


def test_twice_the_rate_gives_every_second_frame_to_the_bit() -> None:
    frames = np.random.default_rng(1).normal(size=(9, 2, 3)).astype(np.float32)
    done = resample(ResamplerState(), 30, at_rate(60, 9), frames)
    assert done.steps.tobytes() == frames[::2].tobytes()
    assert done.owners.tolist() == [0, 2, 4, 6, 8]


def test_a_frame_has_the_scores_of_the_last_step_at_or_before_it() -> None:
    done = run(60, 30, 6)
    scores = np.array([[0.0], [2.0], [4.0]], np.float32)
    assert done.spread(scores, None)[:, 0].tolist() == [0, 0, 2, 2, 4, 4]
    rest = resample(done.state, 30, np.array([6, 7, 8]) / 60, np.zeros((3, 1), np.float32))
    assert rest.spread(np.array([[6.0], [8.0]], np.float32), scores[-1])[:, 0].tolist() == [6, 6, 8]
    between = resample(rest.state, 30, np.array([9]) / 60, np.zeros((1, 1), np.float32))
    assert len(between.steps) == 0
    assert between.spread(np.empty((0, 1), np.float32), np.array([8.0], np.float32)).tolist() == [[8.0]]


@settings(deadline=None)
@given(st.integers(1, 120), st.integers(1, 120), st.integers(1, 200), st.integers(0, 10**9))
def test_steps_are_where_exact_arithmetic_puts_them(fps: int, rate: int, count: int, begin: int) -> None:
    """Also after a billion frames, where times are no longer exact, and a reset."""
    times = np.arange(begin, begin + count) / fps
    done = resample(ResamplerState(time=(begin - 1) / fps), rate, times, ramp(times - times[0]))
    expected: list[int] = []
    made = 0
    for frame in range(count):
        due = frame * Fraction(rate, fps) // 1 + 1
        expected += [frame] * int(due - made)
        made = int(due)
    assert done.owners.tolist() == expected
    np.testing.assert_allclose(done.steps[:, 0], np.arange(len(expected)) / rate, rtol=1e-5, atol=1e-4)


def test_nothing_is_known_before_its_time() -> None:
    """Causal: what comes later changes no step that was made."""
    times = at_rate(20, 40)
    one = np.random.default_rng(2).normal(size=(40, 3)).astype(np.float32)
    other = one.copy()
    other[25:] = 9
    first, second = (resample(ResamplerState(), 30, times, frames) for frames in (one, other))
    made = int((first.owners < 25).sum())
    assert first.steps[:made].tobytes() == second.steps[:made].tobytes()


FRAMES = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).normal(size=(40, 2, 3)).astype(np.float32))
STEPS_APART = st.lists(st.sampled_from([1e-9, 0.003, 1 / 60, 1 / 30, 0.05, 0.3, 2.0, 2.1, 100.0]), min_size=40, max_size=40)


@settings(deadline=None, max_examples=200)
@given(FRAMES, STEPS_APART, st.lists(st.integers(1, 39), max_size=8), st.sampled_from([7.5, 25.0, 30.0]), st.lists(st.integers(0, 39), max_size=10))
def test_cuts_do_not_show(frames: Floats, apart: list[float], cuts: list[int], rate: float, missing: list[int]) -> None:
    """Uneven times, gaps, missing joints; the state travels through JSON at each cut."""
    frames = frames.copy()
    frames[missing, 1] = np.nan
    times = np.cumsum(apart)
    whole = resample(ResamplerState(), rate, times, frames)
    state, steps, owners = ResamplerState(), [], []
    for begin, end in itertools.pairwise(sorted({0, 40, *cuts})):
        part = resample(state, rate, times[begin:end], frames[begin:end])
        steps.append(part.steps)
        owners += (part.owners + begin).tolist()
        state = ResamplerState.from_dict(json.loads(json.dumps(part.state.to_dict())), (2, 3))
    assert np.concatenate(steps).tobytes() == whole.steps.tobytes()
    assert owners == whole.owners.tolist()
    assert state.to_dict() == whole.state.to_dict()
    assert whole.steps.dtype == np.float32


def test_between_missing_and_seen_the_nearer_one_is_taken() -> None:
    frames = np.array([[[0, 0, 0], [1, 1, 1]], [[4, 4, 4], [np.nan] * 3], [[8, 8, 8], [9, 9, 9]]], np.float32)
    done = resample(ResamplerState(), 40, at_rate(10, 3), frames)
    joint, other = done.steps[:, 1, 0], done.steps[:, 0, 0]
    np.testing.assert_array_equal(other, np.arange(9))
    np.testing.assert_array_equal(joint, [1, 1, np.nan, np.nan, np.nan, np.nan, 9, 9, 9])


def test_a_gap_is_not_made_up_for() -> None:
    times = np.array([0.0, 0.1, 2.1, 4.2, 4.3, 1e9, 1e9 + 0.1])
    done = resample(ResamplerState(), 10, times, ramp(times))
    assert np.bincount(done.owners, minlength=7).tolist() == [1, 1, 20, 1, 1, 1, 1]  # two seconds are filled, more are not
    assert done.steps[done.owners == 3][0, 0] == np.float32(4.2)  # the frame after a gap is a step as it is


def test_after_a_reset_the_next_frame_is_a_step() -> None:
    state = run(45, 30, 3).state
    assert state.step == 2
    done = resample(state.restarted(), 30, np.array([3, 4, 5]) / 45, np.array([[30.0], [40.0], [50.0]], np.float32))
    assert done.owners.tolist() == [0, 2]
    np.testing.assert_allclose(done.steps[:, 0], [30, 45], rtol=1e-6)


def test_seconds_since_1970_do() -> None:
    """Their last digits are lost to rounding, and steps that fall on frames still do."""
    t = 1.7e9 + np.arange(1000) / 30
    state, times = stream_times(ResamplerState(), 0, t)
    frames = np.random.default_rng(3).normal(size=(1000, 2)).astype(np.float32)
    assert resample(state, 30, times, frames).steps.tobytes() == frames.tobytes()


def test_too_many_steps_are_refused() -> None:
    with pytest.raises(TooLarge, match="send fewer at once"):
        resample(ResamplerState(), 1000.0, at_rate(0.5, 100), np.zeros((100, 1000), np.float32))


@pytest.mark.parametrize(
    ("t", "frame", "said"),
    [
        (None, 7, "no list of times"),
        ([1.0, 2.0], 7, "2 times for 3 frames"),
        ([1.0, "2", 3.0], 8, "frame 8: t must be a number of seconds"),
        ([1.0, 2.0, True], 9, "frame 9"),
        ([float("nan"), 2.0, 3.0], 7, "frame 7"),
        ([1.0, 2.0, float("inf")], 9, "frame 9"),
        ([1.0, 10**400, 3.0], 8, "frame 8"),
        ([-1e13, 2.0, 3.0], 7, "frame 7"),
    ],
)
def test_times_that_are_none(t: Any, frame: int, said: str) -> None:
    with pytest.raises(WrongTime, match=said) as caught:
        read_times(t, 3, 7)
    assert caught.value.facts == {"frame": frame}


def test_time_goes_on() -> None:
    state, times = stream_times(ResamplerState(), 0, read_times([5, 5.5, 7], 3, 0))
    assert times.tolist() == [0, 0.5, 2]
    later = resample(state, 30, times, ramp(times)).state
    assert stream_times(later, 3, np.array([7.25]))[1].tolist() == [2.25]
    for t, frame in (([7.0, 8.0], 3), ([6.0], 3), ([8.0, 9.0, 9.0], 5), ([8.0, 7.5], 4)):
        with pytest.raises(WrongTime, match=f"frame {frame}: t must increase") as caught:
            stream_times(later, 3, np.array(t))
        assert caught.value.facts == {"frame": frame}
    with pytest.raises(WrongTime, match="frame 3"):  # a reset forgets the past, not the time
        stream_times(later.restarted(), 3, np.array([7.0]))


def test_steps_are_as_the_model_takes_them() -> None:
    steps = run(20, 30, 5).steps
    assert (steps.dtype, steps.flags.c_contiguous) == (np.float32, True)
