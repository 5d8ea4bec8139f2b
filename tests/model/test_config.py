"""A network's shape as a value: what makes no sense is refused by name."""

import dataclasses
from typing import Any, get_args

import pytest

from model import recurrence
from model.config import BASELINES, Activation, ModelConfig


def test_the_defaults_make_sense() -> None:
    assert ModelConfig().kind == "residual"


def test_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().units = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kind": "transformer"}, "kind"),
        ({"blocks": ()}, "blocks"),
        ({"blocks": (2, 0)}, "blocks"),
        ({"growth": 0}, "growth"),
        ({"activation": "sigmoid"}, "activation"),
        ({"bottleneck_dropout": 1.0}, "dropout"),
        ({"transition_dropout": -0.5}, "dropout"),
        ({"layers": 0}, "layers"),
        ({"layers": 3}, "layers of a residual network come in pairs"),
        ({"units": 0}, "units"),
        ({"norm": "both"}, "norm"),
        ({"horizon": -1}, "horizon"),
        ({"memory": "none"}, "memory"),
        ({"bound": "wall"}, "bound"),
        ({"weighted": True}, "weighted is about the average"),
        ({"head": "mean"}, r"head must be step, last or tokens, got 'mean' \(the mean over time is model.average\)"),
        ({"filters": -1}, "filters"),
        ({"kernel": 4}, "kernel must be odd"),
        ({"head": "tokens", "filters": 2}, "filters: a token has no neighbours"),
        ({"head": "tokens", "missing": True}, "missing: a token cannot be absent"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"input_dropout": -0.1}, "dropout"),
        ({"view": "side"}, "view"),
        ({"reset": "hard"}, "reset must be none or soft, got 'hard'"),
        ({"reset": "soft", "head": "last"}, "reset needs a class at every step to learn where it changes: head is 'last'"),
        ({"reset": "soft", "head": "tokens"}, "reset needs a class at every step"),
        ({"boundary_units": 0}, "boundary_units"),
        ({"boundary_layers": 0}, "boundary_layers"),
        ({"boundary_horizon": 0}, "boundary_horizon"),
        ({"motion": False, "positions": False}, "motion, positions and bones"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^model: {named}"):
        ModelConfig(**changes)


def test_plain_stacks_may_have_any_number_of_layers() -> None:
    assert ModelConfig(kind="plain", layers=3).layers == 3


@pytest.mark.parametrize("kind", BASELINES)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm": "before"}, 'norm = "before" stands between'),
        ({"horizon": 30}, "horizon bounds u"),
        ({"memory": "last"}, "memory initialises u"),
        ({"activation": "tanh"}, "activation is that of an IndRNN"),
        ({"bound": "penalty"}, "bound is that of u"),
        ({"filters": 2}, "filters make an IndRNN layer"),
        ({"reset": "soft"}, "reset clears the state of an IndRNN"),
    ],
)
def test_a_baseline_refuses_what_only_an_indrnn_has(kind: Any, changes: dict[str, Any], named: str) -> None:
    assert ModelConfig(kind=kind).kind == kind
    with pytest.raises(ValueError, match=f"^model: {named}.*{kind}"):
        ModelConfig(kind=kind, **changes)


def test_activations_are_those_of_the_recurrence() -> None:
    assert get_args(Activation) == get_args(recurrence.Activation)
