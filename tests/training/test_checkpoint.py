"""Checkpoints come back as they were, whole or not at all."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.synthetic import clip_set, config
from training import checkpoint
from training.checkpoint import Checkpoint, CheckpointError, Subject, build, load, save
from training.config import ConfigError


def example(**sections: Any) -> Checkpoint:
    settings, subject = config(**sections), Subject.of(clip_set(12))
    torch.manual_seed(0)
    network = build(settings, subject)
    optimizer = torch.optim.AdamW(network.parameters())
    sum(p.square().sum() for p in network.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    return Checkpoint(settings, subject, 3, build(settings, subject).state_dict(), network.state_dict(), optimizer.state_dict(), 0.5)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    before = example(data={"options": {"units": "m", "frame_shape": [2]}})
    save(before, tmp_path / "last.pt")
    after = load(tmp_path / "last.pt")
    for name in ("config", "subject", "epoch", "best", "weights", "training_weights", "optimizer"):
        assert same(getattr(before, name), getattr(after, name)), name


def test_a_network_taught_streams_comes_back_with_its_class_of_nothing(tmp_path: Path) -> None:
    settings = config(streams={"together": ["subject"], "stay": [2, 3]})
    assert settings.streams is not None
    subject = Subject.of(clip_set(12), settings.streams)
    assert subject.classes == (*clip_set(12).classes, "nothing")
    weights = build(settings, subject).state_dict()
    save(Checkpoint(settings, subject, 1, weights, weights, {}, 0.5), tmp_path / "last.pt")
    after = load(tmp_path / "last.pt")
    assert (after.config, after.subject) == (settings, subject)
    assert after.network().classes == 4


def test_the_network_has_the_weights_to_evaluate() -> None:
    found = example()
    network = found.network()
    assert not network.training
    assert same(dict(network.state_dict()), dict(found.weights))
    assert not same(dict(network.state_dict()), dict(found.training_weights))


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(example(), tmp_path / "last.pt")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save(example(), tmp_path / "last.pt")
    monkeypatch.undo()
    assert load(tmp_path / "last.pt").epoch == 3


def test_a_checkpoint_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pt: no such checkpoint; train first"):
        load(tmp_path / "none.pt")


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    save(example(), tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    for content in (b"", b"hello", good[: len(good) // 2], good[:-100]):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"bad\.pt: not a checkpoint of this project"):
            load(tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load(tmp_path)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_code_in_a_checkpoint_never_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"format": 1, "config": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load(tmp_path / "evil.pt")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("value", [{"weights": {}}, [1], {"format": 2}])
def test_files_of_something_else_are_refused(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        load(tmp_path / "other.pt")


def _without(key: str) -> Any:
    return lambda value: {k: v for k, v in value.items() if k != key}


@pytest.mark.parametrize(
    "change",
    [
        _without("subject"),
        _without("optimizer"),
        lambda v: v | {"surplus": 1},
        lambda v: v | {"config": v["config"] | {"surplus": 1}},
        lambda v: v | {"subject": _without("fps")(v["subject"])},
    ],
)
def test_checkpoints_of_another_version_are_refused(tmp_path: Path, change: Any) -> None:
    save(example(), tmp_path / "old.pt")
    torch.save(change(torch.load(tmp_path / "old.pt", weights_only=True)), tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match=r"old\.pt: a checkpoint of another version"):
        load(tmp_path / "old.pt")


def test_weights_that_do_not_fit_are_said_so_in_a_line() -> None:
    found = example()
    del found.weights["head.bias"]
    with pytest.raises(CheckpointError, match=r"do not fit its configuration: .*head\.bias") as error:
        found.network()
    assert "\n" not in str(error.value)


def test_data_that_do_not_fit_the_model_are_said_so() -> None:
    with pytest.raises(ConfigError, match=r"synthetic: frames of shape \(13, 3\) without a layout"):
        build(config(), Subject((), (13, 3), None, 1.0, "", clip_set(3).source))
