"""Events: what the rules mean, against a second implementation that reads the whole history again at every row, and that cuts do not show."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.contract import ManifestError
from model.events import Event, EventRules, EventState, advance, close

CLASSES = ("nothing", "wave", "point")
RULES = EventRules(nothing="nothing", enter=0.6, leave=0.4, least=3, gap=2)


def rows(*pairs: tuple[float, float]) -> npt.NDArray[np.float32]:
    """Scores of wave and point; the rest is nothing's."""
    return np.array([(1 - wave - point, wave, point) for wave, point in pairs], np.float32)


def run(scores: npt.NDArray[np.float32], rules: EventRules = RULES, first: int = 0) -> list[Event]:
    return advance(rules, CLASSES, EventState(), scores, np.arange(first, first + len(scores)))[1]


def plain(events: list[Event]) -> list[tuple[str, str, int, int]]:
    return [(event.event, event.label, event.frame, event.decided) for event in events]


def test_a_class_starts_when_it_has_held_and_ends_when_it_has_gone() -> None:
    wave = [0.0, 0.7, 0.5, 0.7, 0.8, 0.9, 0.3, 0.5, 0.3, 0.2, 0.1]
    events = run(rows(*((score, 0.0) for score in wave)), first=100)
    assert plain(events) == [("start", "wave", 103, 105), ("end", "wave", 108, 109)]
    assert events[0].score == pytest.approx(np.mean(wave[3:6]))
    assert events[1].score == pytest.approx(np.mean(wave[3:8]))  # what is no longer part of it does not count
    assert [event.cause for event in events] == [None, None]


def test_another_class_takes_over() -> None:
    scores = rows(*[(0.9, 0.0)] * 4, *[(0.2, 0.7)] * 1, *[(0.45, 0.5)], *[(0.1, 0.8)] * 3)
    slow = EventRules(nothing="nothing", enter=0.6, leave=0.05, least=3, gap=2)
    events = run(scores, slow)
    assert plain(events) == [("start", "wave", 0, 2), ("end", "wave", 6, 8), ("start", "point", 6, 8)]
    assert events[1].score == pytest.approx((4 * 0.9 + 0.2 + 0.45) / 6)
    assert events[2].score == pytest.approx(0.8)


def test_what_begins_under_an_event_starts_no_earlier_than_its_end() -> None:
    """Point holds from row 4 on, but wave is only gone from row 5 on."""
    scores = rows(*[(0.9, 0.0)] * 4, (0.4, 0.6), *[(0.1, 0.8)] * 4)
    rules = EventRules(nothing="nothing", enter=0.6, leave=0.4, least=4, gap=2)
    assert plain(run(scores, rules)) == [("start", "wave", 0, 3), ("end", "wave", 5, 6), ("start", "point", 5, 7)]


def test_pooled_rules_take_what_is_taken_for_two_in_turns_for_one() -> None:
    """Something goes on for twelve rows, called wave, then point, then wave; then there are three rows of nothing, and four of point."""
    seen = rows(*[(0.9, 0.05)] * 4, *[(0.2, 0.7)] * 4, *[(0.8, 0.1)] * 4, *[(0.05, 0.05)] * 3, *[(0.1, 0.6)] * 4)
    apart = EventRules(nothing="nothing", enter=0.6, leave=0.4, least=3, gap=2)
    assert [event.label for event in run(seen, apart)] == ["wave", "wave", "point", "point", "wave", "wave", "point"]
    pooled = dataclasses.replace(apart, pooled=True)
    assert plain(run(seen, pooled)) == [("start", "wave", 0, 2), ("end", "wave", 12, 13), ("start", "point", 15, 17)]
    assert [event.score for event in run(seen, pooled)] == pytest.approx([0.9, (4 * 0.9 + 4 * 0.2 + 4 * 0.8) / 12, 0.6])


def test_pooled_rules_name_what_is_best_on_average_and_need_not_be_sure_which() -> None:
    seen = rows((0.5, 0.4), (0.2, 0.6), (0.3, 0.5), (0.9, 0.0))
    pooled = EventRules(nothing="nothing", enter=0.7, leave=0.4, least=3, gap=2, pooled=True)
    assert plain(run(seen, pooled)) == [("start", "point", 0, 2)]
    assert run(seen, dataclasses.replace(pooled, pooled=False)) == []


def test_nothing_never_starts_and_without_it_every_class_may() -> None:
    idle = np.tile(np.array([0.9, 0.05, 0.05], np.float32), (10, 1))
    assert run(idle) == []
    every = EventRules(nothing=None, enter=0.6, leave=0.4, least=3, gap=2)
    assert plain(run(idle, every)) == [("start", "nothing", 0, 2)]


def test_a_score_that_trembles_about_a_threshold_gives_one_event() -> None:
    wave = [0.9] * 3 + [0.39, 0.41] * 50 + [0.59, 0.61] * 50
    assert plain(run(rows(*((score, 0.0) for score in wave)))) == [("start", "wave", 0, 2)]


def test_rows_need_not_be_frames() -> None:
    """Two rows of one frame, then frames without a row: lengths count rows, places are frames."""
    scores = rows(*[(0.9, 0.0)] * 4, *[(0.1, 0.0)] * 2)
    _, events = advance(RULES, CLASSES, EventState(), scores, np.array([7, 7, 8, 12, 20, 20]))
    assert plain(events) == [("start", "wave", 7, 8), ("end", "wave", 20, 20)]


def test_a_reset_ends_what_is_open() -> None:
    state, _ = advance(RULES, CLASSES, EventState(), rows(*[(0.9, 0.0)] * 5, (0.3, 0.0)), np.arange(6))
    assert (state.label, state.start) == ("wave", 0)
    after, events = close(RULES, CLASSES, state, 6)
    assert events == [Event("end", "wave", pytest.approx((5 * 0.9 + 0.3) / 6), 6, 6, "reset")]  # type: ignore[arg-type]
    assert close(RULES, CLASSES, after, 6)[1] == []
    again, events = advance(RULES, CLASSES, after, rows(*[(0.9, 0.0)] * 3), np.arange(6, 9))
    assert plain(events) == [("start", "wave", 6, 8)]
    assert again.score == pytest.approx(0.9)


def test_runs_before_a_reset_do_not_count_after_it() -> None:
    state, _ = advance(RULES, CLASSES, EventState(), rows(*[(0.9, 0.0)] * 2), np.arange(2))
    state, events = close(RULES, CLASSES, state, 2)
    assert events == []
    assert advance(RULES, CLASSES, state, rows(*[(0.9, 0.0)] * 2), np.arange(2, 4))[1] == []


def reference(rules: EventRules, scores: npt.NDArray[np.float32], frames: list[int]) -> list[tuple[Any, ...]]:
    """The same meaning, written backwards: at every row look back over everything since the last start."""
    values = scores.astype(np.float64)
    eligible = [i for i, name in enumerate(CLASSES) if name != rules.nothing]
    if rules.pooled:
        return pooled_reference(rules, values, eligible, frames)
    best = [max(eligible, key=lambda i: (values[t, i], -i)) for t in range(len(values))]
    found: list[tuple[Any, ...]] = []
    label, begun, opened, ended = None, 0, -1, 0  # the open class, its first row, the row that decided it, the frame of the last end
    for t in range(len(values)):
        back = t - rules.gap + 1
        if label is not None and back > opened and (values[back : t + 1, label] < rules.leave).all():
            found.append(("end", CLASSES[label], values[begun:back, label].mean(), frames[back], frames[t]))
            label, ended = None, frames[back]
        back = t
        while back > opened and best[back] == best[t] != label and values[back, best[t]] >= rules.enter:
            back -= 1
        if t - back >= rules.least:
            first = back + 1
            if label is not None:
                found.append(("end", CLASSES[label], values[begun:first, label].mean(), frames[first], frames[t]))
                ended = frames[first]
            label, begun, opened = best[t], first, t
            found.append(("start", CLASSES[label], values[first : t + 1, label].mean(), max(frames[first], ended), frames[t]))
    return found


def pooled_reference(rules: EventRules, values: npt.NDArray[np.float64], eligible: list[int], frames: list[int]) -> list[tuple[Any, ...]]:
    happening = 1 - values[:, CLASSES.index(rules.nothing or "")]
    found: list[tuple[Any, ...]] = []
    label, begun, after, ended = None, 0, 0, 0  # the open class, its first row, the first row that may count for what comes next, the frame of the last end
    for t in range(len(values)):
        if label is not None:
            back = t - rules.gap + 1
            if back >= after and (happening[back : t + 1] < rules.leave).all():
                found.append(("end", CLASSES[label], values[begun:back, label].mean(), frames[back], frames[t]))
                label, ended, after = None, frames[back], t + 1
        else:
            first = t - rules.least + 1
            if first >= after and (happening[first : t + 1] >= rules.enter).all():
                sums = values[first : t + 1].sum(0)
                label, begun, after = max(eligible, key=lambda i: (sums[i], -i)), first, t + 1
                found.append(("start", CLASSES[label], sums[label] / rules.least, max(frames[first], ended), frames[t]))
    return found


SCORES = st.lists(st.sampled_from([(0.0, 0.0), (0.35, 0.0), (0.5, 0.5), (0.65, 0.2), (0.95, 0.0), (0.1, 0.7), (0.3, 0.65), (0.39, 0.61)]), max_size=60)
RULE = st.builds(
    lambda nothing, **rules: (
        EventRules(nothing=nothing or None, pooled=nothing == "nothing", **rules) if nothing != "apart" else EventRules("nothing", **rules)
    ),
    nothing=st.sampled_from(["", "apart", "nothing"]),
    enter=st.sampled_from([0.45, 0.6]),
    leave=st.sampled_from([0.1, 0.4, 0.45]),
    least=st.integers(1, 5),
    gap=st.integers(1, 5),
)


@settings(max_examples=400, deadline=None)
@given(RULE, SCORES, st.lists(st.integers(0, 2), min_size=60, max_size=60))
def test_events_are_what_the_rules_say(rules: EventRules, pairs: list[tuple[float, float]], jumps: list[int]) -> None:
    scores = rows(*pairs).reshape(-1, 3)
    frames = np.cumsum(jumps)[: len(scores)].astype(np.int64)
    _, events = advance(rules, CLASSES, EventState(), scores, frames)
    expected = reference(rules, scores, frames.tolist())
    assert plain(events) == [(kind, label, frame, decided) for kind, label, _, frame, decided in expected]
    np.testing.assert_allclose([event.score for event in events], [row[2] for row in expected], rtol=1e-12)


@settings(max_examples=200, deadline=None)
@given(RULE, SCORES, st.lists(st.integers(0, 60), max_size=6))
def test_cuts_do_not_show(rules: EventRules, pairs: list[tuple[float, float]], cuts: list[int]) -> None:
    """The state travels through JSON at each cut, as it does in a session's record."""
    scores = rows(*pairs).reshape(-1, 3)
    frames = np.arange(len(scores))
    whole, expected = advance(rules, CLASSES, EventState(), scores, frames)
    state, events = EventState(), []
    places = sorted({0, len(scores), *(cut for cut in cuts if cut < len(scores))})
    for begin, end in itertools.pairwise(places):
        state, more = advance(rules, CLASSES, state, scores[begin:end], frames[begin:end])
        state = EventState.from_dict(json.loads(json.dumps(state.to_dict())))
        events += more
    assert events == expected
    assert state == whole


@settings(max_examples=200, deadline=None)
@given(RULE, SCORES)
def test_starts_and_ends_take_turns_and_never_overlap(rules: EventRules, pairs: list[tuple[float, float]]) -> None:
    events = run(rows(*pairs).reshape(-1, 3), rules)
    for number, event in enumerate(events):
        assert event.event == ("start", "end")[number % 2]
        assert event.frame <= event.decided
    for before, after in itertools.pairwise(events):
        assert before.frame <= after.frame
        assert before.decided <= after.decided
        assert before.label == after.label or after.event == "start"


def test_shapes_and_states_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit 3 classes"):
        advance(RULES, CLASSES, EventState(), np.zeros((2, 4), np.float32), np.arange(2))
    with pytest.raises(ValueError, match="do not fit 3 classes"):
        advance(RULES, CLASSES, EventState(), np.zeros((2, 3), np.float32), np.arange(3))
    with pytest.raises(ValueError, match="rules are of other classes: 'nothing' is none of these"):
        advance(RULES, ("rest", "wave", "point"), EventState(), np.zeros((2, 3), np.float32), np.arange(2))
    with pytest.raises(ValueError, match="'clap' is none of these"):
        advance(RULES, CLASSES, EventState(label="clap"), np.zeros((2, 3), np.float32), np.arange(2))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"enter": 0.0}, "enter"),
        ({"enter": 1.01}, "enter"),
        ({"enter": float("nan")}, "enter"),
        ({"leave": 0.0}, "leave"),
        ({"leave": 0.61}, "leave"),
        ({"leave": float("nan")}, "leave"),
        ({"least": 0}, "least"),
        ({"gap": 0}, "gap"),
        ({"pooled": True}, "pooled"),
    ],
)
def test_rules_that_make_no_sense_are_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ManifestError, match=rf"events\.{field} "):
        EventRules(**{"nothing": None, "enter": 0.6, "leave": 0.4, "least": 3, "gap": 2, **changes})


def test_needs_numpy_alone() -> None:
    program = "import sys, model.events; sys.exit(any(m in sys.modules for m in ('torch', 'onnx', 'numba', 'onnxruntime')))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2], timeout=60)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 60),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([None, "nothing"]),
    st.sampled_from([0.2, 0.5, 0.9]),
    st.booleans(),
)
def test_every_state_that_rows_leave_is_admitted(seed: int, count: int, least: int, gap: int, nothing: str | None, keep: float, pooled: bool) -> None:
    """Rows that keep a score for a while, now and then several of one frame; a reset is somewhere in between."""
    random = np.random.default_rng(seed)
    rules = EventRules(nothing=nothing, enter=0.5, leave=0.3, least=least, gap=gap, pooled=pooled and nothing is not None)
    state, frame = EventState(), 0
    scores = random.dirichlet(np.full(3, 0.3)).astype(np.float32)
    for _ in range(count):
        if random.random() > keep:
            scores = random.dirichlet(np.full(3, 0.3)).astype(np.float32)
        state, _ = advance(rules, CLASSES, state, scores[None], np.array([frame]))
        state.check(CLASSES, frame + 1)
        frame += int(random.random() < 0.7)
        if random.random() < 0.05:
            state, _ = close(rules, CLASSES, state, frame + 1)
            state.check(CLASSES, frame + 1)
            frame += 1


@pytest.mark.parametrize(
    "state",
    [
        EventState(label="clap", rows=3, total=2.0), EventState(label="wave"), EventState(rows=3, total=2.0),
        EventState(label="wave", rows=3, total=float("nan")),
        EventState(label="wave", rows=3, start=10), EventState(label="wave", rows=3, start=-1), EventState(gone=1), EventState(label="wave", rows=3, gone=1),
        EventState(label="wave", rows=3, gone=1, gone_rows=4), EventState(candidate="wave"), EventState(run=1), EventState(candidate="clap", run=1),
        EventState(label="wave", rows=3, candidate="point", run=1), EventState(label="wave", rows=3, candidate="wave", run=1, run_rows=2),
        EventState(run_sum=float("inf")), EventState(ended=10),
        EventState(candidate="wave", run=1, run_sums=(0.9, 0.1)), EventState(candidate="wave", run=1, run_sums=(0.9, float("inf"), 0.0)),
        EventState(run_sums=(0.9, 0.1, 0.0)), EventState(label="wave", rows=3, candidate="point", run=1, run_rows=1, run_sums=(0.9, 0.1, 0.0)),
    ],
    ids=str,
)  # fmt: skip
def test_states_that_no_rows_leave_are_refused(state: EventState) -> None:
    with pytest.raises(ValueError):
        state.check(CLASSES, 9)
