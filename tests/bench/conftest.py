"""People to stream and toys to stream them to, for the tests of the benchmarks that do so."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.contract import EventRules
from tests.toy_models import Toy, write_toy

ACTIONS = ("rising", "falling", "waving")
RULES = EventRules(nothing="nothing", enter=0.4, leave=0.3, least=3, gap=3)
BODIES = Toy(shape=(13, 3), layout="body-13", classes=(*ACTIONS, "nothing"), events=RULES)
PLAIN = Toy(shape=(13, 3), layout="body-13", classes=ACTIONS)


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Clips of people of thirteen joints, a configuration for them, and models with and without a class for nothing, all by their option's name."""
    pytest.importorskip("tomli_w", reason="tomli-w is not installed (extra `train`): benchmarks of streams are not tested on toys")
    from tests.training.synthetic import clip_set, write_config, write_folder

    folder = tmp_path_factory.mktemp("toys")
    write_toy(folder / "models", "bodies", BODIES)
    write_toy(folder / "models", "plain", PLAIN)
    write_toy(folder / "models", "older", PLAIN, version="9")
    write_toy(folder / "models", "older", BODIES, version="10")
    write_toy(folder / "models", "channels")
    data = write_folder(folder / "data", clip_set(60, joints=13))
    config = write_config(folder / "toy.toml", data={"options": {"units": "metres", "fps": 30, "layout": "body-13"}})
    return {"models": folder / "models", "data": data, "config": config}


def arguments(toys: dict[str, Path], model: str, *more: str) -> list[str]:
    """Options of a benchmark of streams."""
    return [*(value for name, path in toys.items() for value in (f"--{name}", str(path))), "--model", model, *more]
