from __future__ import annotations

import json

import numpy as np
import pytest

from model.contract import EventRules
from service import detector
from service.detector import Detector

RULES = EventRules(nothing="rest", enter=0.6, leave=0.4, least=1, gap=1)
CLASSES = ("rest", "wave")


def waves(count: int) -> Detector:
    """Waves at every second frame: started at 0, 2, ..., ended at 1, 3, ..."""
    made = Detector(RULES, CLASSES)
    wave = (np.arange(count) % 2 == 0).astype(np.float32)
    made.advance(np.stack([1 - wave, wave], axis=1), np.arange(count), lambda frame: frame / 10)
    return made


def test_events_are_kept_until_they_are_acknowledged() -> None:
    made = waves(6)
    assert [one.event.decided for one in made.decided(0, 6)] == [0, 1, 2, 3, 4, 5]
    assert [one.event.event for one in made.decided(2, 4)] == ["start", "end"]
    made.forget(3)
    assert [one.event.decided for one in made.decided(0, 6)] == [3, 4, 5]
    assert made.forgotten == 0


def test_the_oldest_are_forgotten_at_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "KEPT_EVENTS", 4)
    made = waves(10)
    assert [one.event.decided for one in made.kept] == [6, 7, 8, 9]
    assert made.forgotten == 6
    made.forget(9)
    made.advance(np.array([[0.1, 0.9], [0.9, 0.1]], np.float32), np.array([10, 11]), float)
    assert [one.event.decided for one in made.kept] == [9, 10, 11]
    assert made.forgotten == 6


def test_the_end_by_a_reset_belongs_to_no_frame() -> None:
    made = waves(5)
    assert made.open_event(lambda frame: frame / 10) == {"label": "wave", "score": 1.0, "frame": 4, "time": 0.4}
    (end,) = made.close(5, lambda frame: frame / 10)
    assert json.loads(json.dumps(end.to_dict())) == {
        "event": "end", "label": "wave", "score": 1.0, "frame": 5, "decided": 5, "time": 0.5, "cause": "reset",
    }  # fmt: skip
    assert made.open_event(float) is None
    made.advance(np.array([[0.1, 0.9]], np.float32), np.array([5]), float)
    assert [one.event.event for one in made.decided(5, 6)] == ["start"]
    assert [one.event.event for one in made.decided(5, 6, resets=True)] == ["end", "start"]
    assert made.of_reset(5) == [end]
    made.forget(6)
    assert made.of_reset(5) == []


def test_only_a_reset_is_named_as_cause() -> None:
    assert "cause" not in waves(2).kept[1].to_dict()
