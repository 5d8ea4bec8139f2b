"""A network's shape as a value: what makes no sense is refused by name."""

import dataclasses
from typing import Any

import pytest

from model.config import ModelConfig


def test_the_defaults_make_sense() -> None:
    assert ModelConfig().kind == "residual"


def test_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().units = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kind": "dense"}, "kind"),
        ({"layers": 0}, "layers"),
        ({"layers": 3}, "layers of a residual network come in pairs"),
        ({"units": 0}, "units"),
        ({"norm": "both"}, "norm"),
        ({"horizon": -1}, "horizon"),
        ({"memory": "none"}, "memory"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"input_dropout": -0.1}, "dropout"),
        ({"view": "side"}, "view"),
        ({"motion": False, "positions": False}, "motion and positions"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^model: {named}"):
        ModelConfig(**changes)


def test_plain_stacks_may_have_any_number_of_layers() -> None:
    assert ModelConfig(kind="plain", layers=3).layers == 3
