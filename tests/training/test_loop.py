"""A run: learns, is the same from the same seed, and goes on after a stop as if there had been none."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.indrnn import Recurrence
from model.network import Network
from tests.training.synthetic import clip_set, config, cued_clips, recording_set
from training import checkpoint, loop
from training.checkpoint import BEST, LAST, CheckpointError, load
from training.config import Config, ConfigError, StreamConfig
from training.datasets.clips import Frames
from training.evaluate import evaluate, evaluate_streams
from training.loop import METRICS, Progress, TrainingDiverged, train
from training.splits import Data, split
from training.streams import Streams

STREAM = StreamConfig(together=("subject",))
GAPPY: dict[str, Any] = {"model": {"missing": True}, "augment": {"drop_joints": 0.3}}


class Stop(BaseException):
    """A power cut."""


def fit(settings: Config, folder: Path, clips: Data | None = None, *, resume: bool = False, stop: tuple[int, int] = (0, 0)) -> Path:
    """Trains in `folder`; `stop` is the epoch and batch after which the power goes (batch 0: after the whole epoch)."""

    def watch(progress: Progress) -> None:
        if progress.epoch == stop[0] and (progress.batch == stop[1] if stop[1] else progress.row is not None):
            raise Stop

    parts = split(settings, clips or clip_set(48))
    folder.mkdir(exist_ok=True)
    return train(settings, parts.whole("training"), None if settings.final else parts.whole("validation"), folder, resume=resume, watch=watch)


def outcome(folder: Path) -> tuple[Any, ...]:
    """Everything that must be the same bit for bit: weights, running means, optimiser, metrics without their times."""
    found = load(folder / LAST)
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    tensors = [*found.weights.items(), *found.training_weights.items()]
    tensors += [(f"{i}.{name}", value) for i, state in found.optimizer["state"].items() for name, value in state.items()]
    return (
        found.epoch,
        found.best,
        [{key: value for key, value in row.items() if key not in ("seconds", "waiting")} for row in rows],
        {name: value.numpy().tobytes() for name, value in tensors},
        {name: value.numpy().tobytes() for name, value in load(folder / BEST).weights.items()},
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    fit(config(**GAPPY), folder)
    return folder


@pytest.mark.parametrize("stop", [(1, 0), (2, 0), (3, 2), (4, 0), (2, 1)])
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path: Path, uninterrupted: Path, stop: tuple[int, int]) -> None:
    with pytest.raises(Stop):
        fit(config(**GAPPY), tmp_path, stop=stop)
    torch.rand(7)  # the world has moved on
    fit(config(**GAPPY), tmp_path, resume=True)
    assert outcome(tmp_path) == outcome(uninterrupted)


@pytest.mark.parametrize("name", [BEST, LAST])
@pytest.mark.parametrize("half_a_line", [False, True])
def test_a_stop_between_the_files_of_an_epoch_loses_nothing(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, name: str, half_a_line: bool
) -> None:
    saved: list[int] = []

    def save(state: checkpoint.Checkpoint, path: Path) -> None:
        if path.name == name and state.epoch == 3:
            raise Stop
        saved.append(state.epoch)
        checkpoint.save(state, path)

    monkeypatch.setattr(loop, "save", save)
    with pytest.raises(Stop):
        fit(replace(config(**GAPPY)), tmp_path)
    monkeypatch.undo()
    if half_a_line:
        rows = (tmp_path / METRICS).read_text()
        (tmp_path / METRICS).write_text(rows[:-20])
    assert max(saved) == 2 or name == LAST
    fit(config(**GAPPY), tmp_path, resume=True)
    assert outcome(tmp_path) == outcome(uninterrupted)


def test_a_resumed_run_remembers_what_was_best(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        fit(config(), tmp_path, stop=(2, 0))
    unbeatable = replace(load(tmp_path / LAST), best=2.0)
    for name in (LAST, BEST):
        checkpoint.save(unbeatable, tmp_path / name)
    fit(config(), tmp_path, resume=True)
    assert load(tmp_path / BEST).epoch == 2
    assert (load(tmp_path / LAST).epoch, load(tmp_path / LAST).best) == (4, 2.0)


def test_a_run_that_is_done_stays_as_it_is(tmp_path: Path, uninterrupted: Path) -> None:
    for name in (LAST, BEST, METRICS):
        (tmp_path / name).write_bytes((uninterrupted / name).read_bytes())
    assert fit(config(**GAPPY), tmp_path, resume=True) == tmp_path / BEST
    assert outcome(tmp_path) == outcome(uninterrupted)


def test_same_seed_same_bits_other_seed_other_bits(tmp_path: Path, uninterrupted: Path) -> None:
    fit(config(**GAPPY), tmp_path / "again")
    assert outcome(tmp_path / "again") == outcome(uninterrupted)
    fit(config(**GAPPY, seed=1), tmp_path / "other")
    assert outcome(tmp_path / "other")[3] != outcome(uninterrupted)[3]


@pytest.mark.parametrize("changes", [{"seed": 1}, {"train": {"epochs": 5}}, {"model": {"missing": True, "units": 9}}])
def test_resuming_with_another_configuration_is_refused(tmp_path: Path, uninterrupted: Path, changes: dict[str, Any]) -> None:
    (tmp_path / LAST).write_bytes((uninterrupted / LAST).read_bytes())
    with pytest.raises(CheckpointError, match="another configuration"):
        fit(config(**GAPPY | changes), tmp_path, resume=True)


def test_resuming_with_other_data_is_refused(tmp_path: Path, uninterrupted: Path) -> None:
    (tmp_path / LAST).write_bytes((uninterrupted / LAST).read_bytes())
    with pytest.raises(CheckpointError, match="other data"):
        fit(config(**GAPPY), tmp_path, replace(clip_set(48), fps=15.0), resume=True)


def test_resuming_what_an_earlier_version_kept_is_refused(tmp_path: Path, uninterrupted: Path) -> None:
    checkpoint.save(replace(load(uninterrupted / LAST), schedule={}), tmp_path / LAST)
    with pytest.raises(CheckpointError, match="an earlier version, which kept no schedule"):
        fit(config(**GAPPY), tmp_path, resume=True)


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"norm": "after"}, "train": {"epochs": 12}},
        {"model": {"kind": "residual", "units": 16}, "train": {"epochs": 12}},
        {"model": {"missing": True}, "train": {"epochs": 12, "early": 0.0}, "augment": {"drop_joints": 0.3}},
        {"model": {"head": "last", "memory": "last"}, "train": {"epochs": 12}},
    ],
)
def test_a_tiny_run_learns(tmp_path: Path, sections: dict[str, Any]) -> None:
    clips = clip_set(120)
    settings = config(**sections)
    best = fit(settings, tmp_path, clips)
    test = split(settings, clips).test
    assert test is not None
    assert evaluate(load(best).network(), test).accuracy > 0.85  # chance is a third
    rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert load(best).best == max(row["validation_accuracy"] for row in rows)


def test_the_best_epoch_is_kept_not_the_last(tmp_path: Path) -> None:
    fit(config(train={"epochs": 6}), tmp_path)
    rows = [json.loads(line)["validation_accuracy"] for line in (tmp_path / METRICS).read_text().splitlines()]
    assert load(tmp_path / BEST).epoch == max(i for i, value in enumerate(rows, 1) if value == max(rows))
    assert load(tmp_path / LAST).epoch == 6


def test_a_final_run_trains_on_everything_and_keeps_its_last_epoch(tmp_path: Path) -> None:
    fit(config(final=True, train={"epochs": 2}), tmp_path)
    assert load(tmp_path / BEST).epoch == 2
    assert "validation_accuracy" not in (tmp_path / METRICS).read_text()


@pytest.mark.parametrize("early", [0.0, 1.0])
def test_clips_of_one_frame_train_and_count(tmp_path: Path, early: float) -> None:
    settings, clips = config(train={"early": early, "epochs": 15}), clip_set(48, shortest=1, longest=1)
    best = fit(settings, tmp_path, clips)
    result = evaluate(load(best).network(), clips)
    assert math.isfinite(result.loss)
    assert result.accuracy > 0.85  # the second channel tells


def test_recurrent_weights_end_inside_their_bound(tmp_path: Path) -> None:
    network = load(fit(config(train={"learning_rate": 0.3, "epochs": 2}), tmp_path)).network()
    recurrences = [module for module in network.modules() if isinstance(module, Recurrence)]
    assert all(bool((r.u.abs() <= r.bound + 1e-6).all()) and r.bound < 1 for r in recurrences)


def test_what_a_penalty_asks_is_part_of_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(train={"epochs": 1})
    fit(settings, tmp_path / "free")
    monkeypatch.setattr(Network, "penalty", lambda network: 5 + 0 * network.head.weight.sum())
    fit(settings, tmp_path / "dear")
    losses = [json.loads((tmp_path / name / METRICS).read_text())["loss"] for name in ("free", "dear")]
    assert losses[1] == pytest.approx(losses[0] + 5, abs=1e-4)


def test_missing_values_need_a_model_that_takes_them(tmp_path: Path) -> None:
    clips = clip_set(48)
    clips.frames[0][2] = np.nan
    with pytest.raises(ConfigError, match=r"values are missing in training clips: set model\.missing = true"):
        fit(config(), tmp_path, clips)


def test_divergence_is_said_and_the_last_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    whole = loop.sequence_loss

    def broken(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return whole(*arguments, **options) * (math.nan if calls > 4 else 1)

    monkeypatch.setattr(loop, "sequence_loss", broken)
    with pytest.raises(TrainingDiverged, match="loss is nan in epoch 2"):
        fit(config(), tmp_path)
    assert load(tmp_path / LAST).epoch == 1


def test_gradients_that_are_not_finite_spoil_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last batch of an epoch, whose weights would be kept: no loss would show it."""
    calls, whole = 0, loop.sequence_loss

    def broken(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = whole(*arguments, **options)
        return loss + (loss - loss.detach()).sqrt() if calls == 4 else loss  # adds 0, whose gradient is infinite

    monkeypatch.setattr(loop, "sequence_loss", broken)
    with pytest.raises(TrainingDiverged, match="gradients are not finite in epoch 1, batch 4"):
        fit(config(), tmp_path)
    assert not (tmp_path / LAST).exists()


@pytest.mark.parametrize(
    "section",
    [
        {"schedule": "one-cycle", "optimizer": "adam"},
        {"schedule": "plateau", "plateau_patience": 0},
        {"schedule": "constant", "class_weights": "balanced"},
        {"precision": "bfloat16"},
        {"precision": "float16"},
    ],
)
def test_every_way_to_train_resumes_as_if_there_had_been_no_stop(tmp_path: Path, section: dict[str, Any]) -> None:
    settings = config(train=section)
    fit(settings, tmp_path / "whole")
    with pytest.raises(Stop):
        fit(settings, tmp_path / "cut", stop=(2, 0))
    fit(settings, tmp_path / "cut", resume=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert outcome(tmp_path / "whole")[2][-1]["loss"] < outcome(tmp_path / "whole")[2][0]["loss"]


def test_ends_early_once_validation_has_not_got_better_for_long_enough_and_stays_ended(tmp_path: Path) -> None:
    settings = config(train={"epochs": 60, "early_stop": 3})
    best = fit(settings, tmp_path)
    rows = [json.loads(line)["validation_accuracy"] for line in (tmp_path / METRICS).read_text().splitlines()]
    assert 3 < len(rows) < 60
    first = rows.index(max(rows)) + 1
    assert len(rows) == first + 3
    assert load(best).best == max(rows)
    before = outcome(tmp_path)
    fit(settings, tmp_path, resume=True)
    assert outcome(tmp_path) == before


def test_half_precision_ends_near_full_precision(tmp_path: Path) -> None:
    losses = []
    for precision in ("float32", "bfloat16", "float16"):
        fit(config(train={"precision": precision, "epochs": 6}), tmp_path / precision)
        losses.append(json.loads((tmp_path / precision / METRICS).read_text().splitlines()[-1])["loss"])
    assert losses[1:] == [pytest.approx(losses[0], rel=0.05)] * 2
    assert len(set(losses)) == 3  # it was at work


def test_the_share_of_time_without_a_batch_is_kept(tmp_path: Path) -> None:
    fit(config(), tmp_path)
    assert all(0 <= json.loads(line)["waiting"] <= 1 for line in (tmp_path / METRICS).read_text().splitlines())


STREAMS: dict[str, Any] = {"streams": {"steps": 4, "frames": 16, "validation": [4, 4], "together": ["subject"], "dropped": 0.2}}


@pytest.mark.parametrize("stop", [(1, 0), (2, 3)])
@pytest.mark.parametrize("data", [clip_set(48), recording_set(16)])
def test_a_resumed_run_on_streams_equals_one_that_was_never_stopped(tmp_path: Path, stop: tuple[int, int], data: Data) -> None:
    settings = config(**GAPPY, **STREAMS, train={"epochs": 3})
    fit(settings, tmp_path / "whole", data)
    with pytest.raises(Stop):
        fit(settings, tmp_path / "cut", data, stop=stop)
    torch.rand(7)
    fit(settings, tmp_path / "cut", data, resume=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    rows = outcome(tmp_path / "whole")[2]
    assert load(tmp_path / "whole" / BEST).best == max(row["validation_accuracy"] for row in rows)
    assert load(tmp_path / "whole" / BEST).subject.classes[-1] == "nothing"


@pytest.mark.parametrize(("sections", "carried"), [(STREAMS, True), ({}, False)])
def test_on_streams_the_state_is_carried_through_an_epoch_and_on_clips_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], carried: bool
) -> None:
    states: list[tuple[torch.Tensor, torch.Tensor]] = []
    whole = loop._forward

    def forward(*arguments: Any) -> Any:
        found = whole(*arguments)
        states.append((arguments[2].clone(), found[2]))
        return found

    monkeypatch.setattr(loop, "_forward", forward)
    fit(config(train={"epochs": 2}, **sections), tmp_path)
    per_epoch = len(states) // 2
    assert per_epoch > 1
    for i, (before, after) in enumerate(states):
        assert not after.requires_grad
        if carried and i % per_epoch:
            assert torch.equal(before, states[i - 1][1])
            assert before.any()
        else:
            assert not before.any()


def test_a_network_taught_streams_stays_right_on_them_and_one_taught_clips_does_not(tmp_path: Path) -> None:
    """Clips of which the first frames tell: remembering is easy to learn from clips, forgetting is not."""
    clips, accuracy = cued_clips(), {}
    sections: dict[str, Any] = {
        "model": {"units": 24, "horizon": 0, "dropout": 0.0},
        "augment": {"noise": 0.02, "speed": 1.0, "cut_start": 0.0, "scale": 0.0},
    }
    ways: dict[str, dict[str, Any]] = {
        "clips": {"train": {"epochs": 25, "batch": 16, "max_frames": 64}},
        "streams": {"train": {"epochs": 12, "batch": 16}, "streams": {"steps": 10, "frames": 64, "validation": [4, 10], "together": ["subject"]}},
    }
    for name, way in ways.items():
        settings = config(**sections, **way)
        network = load(fit(settings, tmp_path / name, clips)).network()
        test = split(settings, clips).named("test")
        made = Streams(test, replace(STREAM, nothing="nothing" if settings.streams else ""))
        running = [evaluate_streams(network, [made.stream(form, i, seed=1, actions=20) for i in range(10)]).accuracy for form in made.forms]
        accuracy[name] = [*running, evaluate(network, test).accuracy]
    assert accuracy["clips"][2] > 0.95  # it has learnt what there is to learn from clips
    for form in (0, 1):
        assert accuracy["streams"][form] > 0.85
        assert accuracy["streams"][form] > accuracy["clips"][form] + 0.25


def test_on_streams_a_network_learns_to_clear_its_state_where_the_class_changes(tmp_path: Path) -> None:
    """By then one that is equal but for the reset still answers with what is over."""
    clips, accuracy = cued_clips(), {}
    for reset in ("soft", "none"):
        settings = config(
            model={"units": 16, "horizon": 60, "average": 10, "reset": reset, "boundary_units": 8},
            train={"epochs": 10, "batch": 16},
            streams={"steps": 10, "frames": 64, "validation": [2, 6], "together": ["subject"]},
        )
        network = load(fit(settings, tmp_path / reset, clips)).network()
        made = Streams(split(settings, clips).named("test"), STREAM)
        streams = [made.stream("cuts", i, seed=1, actions=20) for i in range(10)]
        accuracy[reset] = evaluate_streams(network, streams).accuracy
        if reset == "soft":
            kept = [(_keep_of(network, stream.frames), stream.labels) for stream in streams]
    changed = [np.flatnonzero(np.diff(labels)) + 1 for _, labels in kept]
    assert accuracy["soft"] > accuracy["none"] + 0.2
    at_change = np.concatenate([keep[at] for (keep, _), at in zip(kept, changed, strict=True)])
    long_after = np.concatenate([keep[at - 3] for (keep, _), at in zip(kept, changed, strict=True)])  # where the action has been going on
    assert len(at_change) > 100
    assert np.median(at_change) < 0.7
    assert np.median(long_after) > 0.9


def _keep_of(network: Network, frames: Frames) -> Frames:
    """The share of its state that a network keeps at each frame, (T,)."""
    with torch.no_grad():
        boundary = network.outputs(torch.from_numpy(frames)[None], torch.tensor([len(frames)]), network.initial_state(1)).boundary
    assert boundary is not None
    return torch.sigmoid(-boundary[0]).numpy()
