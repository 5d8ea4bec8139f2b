"""One training run, from top to bottom.

All randomness of an epoch comes from (seed, epoch), so a run that is cut and resumed gives the same bits on a CPU as one that is not.
Batches are made in the background, also those of the next epoch while this one is evaluated.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.layers import Share, take_part
from model.network import Network
from training.augment import Augment
from training.batches import Batch, collate, epoch_batches, training_batches
from training.checkpoint import BEST, LAST, Checkpoint, CheckpointError, Subject, build, load, save
from training.config import Config, TrainConfig
from training.datasets.clips import ClipSet
from training.distributed import Group, choose_device
from training.evaluate import evaluate
from training.loss import class_weights, sequence_loss
from training.memory import BATCHES_AHEAD
from training.prefetch import Prefetch
from training.preflight import check
from training.schedule import Schedule

METRICS = "metrics.jsonl"


@dataclass
class Progress:
    """Where a run stands; handed to `watch` after every batch and every epoch."""

    epoch: int
    epochs: int
    batch: int
    batches: int
    loss: float
    accuracy: float
    row: dict[str, Any] | None = None  # the metrics of an epoch that has just ended


class TrainingDiverged(RuntimeError):
    """The loss or its gradients are no longer finite; the last checkpoint is intact."""


def train(
    config: Config,
    training: ClipSet,
    validation: ClipSet | None,
    folder: Path,
    *,
    resume: bool = False,
    watch: Callable[[Progress], None],
    group: Group | None = None,
) -> Path:
    """Fits a network and returns the checkpoint to use: the best on validation, or the last where there is none.

    `folder` gets a checkpoint after every epoch and a line of metrics in `metrics.jsonl`. With `resume` it goes on after the last one.
    In a `group` every process calls this with the same arguments; the first writes. Raises `DataError` or `ConfigError` before the first
    step, with nothing written, where the run cannot work (`preflight`).
    """
    t, subject = config.train, Subject.of(training)
    group = group or Group(device=choose_device(t))
    check(config, training, validation, group.device, group.size)
    group.agree((config.seed, config.model, config.train, config.augment, subject, *(_outline(clips) for clips in (training, validation) if clips)))
    torch.set_num_threads(t.threads or torch.get_num_threads())
    torch.manual_seed(config.seed)
    network = build(config, subject)
    network.fit_features(_samples(training))
    mean_network = build(config, subject)
    mean_network.load_state_dict(network.state_dict())
    network, mean_network = network.to(group.device), mean_network.to(group.device)
    averaged = list(mean_network.state_dict().values()), list(network.state_dict().values())
    batches_per_epoch = epoch_batches(training, t.batch, t.max_frames)
    optimizer = _optimizer(network, t)
    schedule = Schedule(optimizer, t, batches_per_epoch * t.epochs)
    scaler = torch.amp.GradScaler(group.device.type, enabled=t.precision == "float16")
    half = torch.autocast(group.device.type, getattr(torch, t.precision), enabled=t.precision != "float32")
    augment, weights = Augment(config.augment, subject.layout), class_weights(training.labels, len(training.classes), t)
    share = Share(group.total, group.rows, 0)
    take_part(network, share if group.size > 1 else None)
    best, stale, first_epoch = -1.0, 0, 0
    if resume:
        found = group.from_first(load(folder / LAST) if group.first else None)
        if found is None or found.config != config or found.subject != subject:
            raise CheckpointError(f"{folder}: was trained with another configuration or other data; resume with the same, or choose another --out")
        if not found.schedule:
            raise CheckpointError(f"{folder}: was trained by an earlier version, which kept no schedule; train again with another --out")
        network.load_state_dict(found.training_weights)
        mean_network.load_state_dict(found.weights)
        optimizer.load_state_dict(found.optimizer)
        schedule.load_state_dict(found.schedule)
        scaler.load_state_dict(found.scaler)
        best, stale, first_epoch = found.best, found.stale, found.epoch
        if group.first:
            _drop_rows_after(folder / METRICS, first_epoch)

    def batches() -> Iterator[Batch]:
        for epoch in range(first_epoch, t.epochs):
            yield from training_batches(training, t.batch, augment, t.max_frames, (config.seed, epoch), weights)

    with Prefetch(batches, BATCHES_AHEAD) as ready:
        for epoch in range(first_epoch, t.epochs):
            if t.early_stop and stale >= t.early_stop:
                break
            started, waited = time.perf_counter(), ready.waited
            torch.manual_seed(int(np.random.default_rng((config.seed, epoch)).integers(2**62)))  # dropout
            network.train()
            loss_sum = right = seen = 0.0
            for i, whole in enumerate(itertools.islice(ready, batches_per_epoch)):
                step, rate = epoch * batches_per_epoch + i, optimizer.param_groups[0]["lr"]
                share.batch, batch = len(whole.labels), (whole.take(group.rows) if group.size > 1 else whole).to(group.device)
                with half:
                    loss, last = _forward(network, batch, t)
                    loss = loss + network.penalty() / group.size
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                hits = (last.argmax(-1) == batch.labels).sum()
                value, correct = group.total_gradients(network, torch.stack([loss.detach(), hits])).tolist()
                if not math.isfinite(value):
                    raise TrainingDiverged(f"loss is {value} in epoch {epoch + 1}, batch {i + 1}: lower train.learning_rate or train.clip_gradient")
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(network.parameters(), t.clip_gradient)
                if not scaler.is_enabled() and not math.isfinite(norm):  # the scaler leaves such a step out, and expects a few
                    raise TrainingDiverged(f"gradients are not finite in epoch {epoch + 1}, batch {i + 1}: lower train.learning_rate")
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                network.clamp_recurrent_()
                _average(*averaged, t.ema, step)
                loss_sum += value * share.batch
                right += correct
                seen += share.batch
                watch(Progress(epoch + 1, t.epochs, i + 1, batches_per_epoch, loss_sum / seen, right / seen))

            row: dict[str, Any] = {"epoch": epoch + 1, "loss": loss_sum / seen, "accuracy": right / seen, "learning_rate": rate}
            row["waiting"] = round((ready.waited - waited) / (time.perf_counter() - started), 4)  # share of the time without a batch to compute with
            improved = validation is None
            if validation is not None:
                result = evaluate(mean_network, validation, group)
                row |= {"validation_loss": result.loss, "validation_accuracy": result.accuracy, "validation_frame_accuracy": result.frame_accuracy}
                schedule.end_epoch(result.loss)
                stale = 0 if result.accuracy > best else stale + 1
                improved, best = result.accuracy >= best, max(best, result.accuracy)
            row["seconds"] = round(time.perf_counter() - started, 3)
            state = optimizer.state_dict(), best, stale, schedule.state_dict(), scaler.state_dict()
            checkpoint = Checkpoint(config, subject, epoch + 1, mean_network.state_dict(), network.state_dict(), *state)
            if group.first:
                with (folder / METRICS).open("a") as file:  # first, since a resume drops rows that no checkpoint followed, but cannot make up for lost ones
                    file.write(json.dumps(row) + "\n")
                if improved:
                    save(checkpoint, folder / BEST)
                save(checkpoint, folder / LAST)
            watch(Progress(epoch + 1, t.epochs, batches_per_epoch, batches_per_epoch, loss_sum / seen, right / seen, row))
    return folder / BEST


def _forward(network: Network, batch: Batch, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """The loss, this process's part of it, and logits (B, classes) at each clip's last step."""
    steps, logits, _ = network.outputs(batch.frames, batch.lengths, network.initial_state(len(batch.labels)))
    last = network.config.head == "last"
    loss = sequence_loss(logits, batch, config, last=last)
    if steps is not logits:  # an average is right only where its steps are: both are taught
        loss = (loss + sequence_loss(steps, batch, config, last=last)) / 2
    return loss, logits.detach()[torch.arange(len(batch.labels), device=logits.device), batch.lengths - 1]


def _optimizer(network: Network, config: TrainConfig) -> torch.optim.Optimizer:
    matrices = [p for p in network.parameters() if p.ndim >= 2]
    others = [p for p in network.parameters() if p.ndim < 2]  # u, biases, norms: never decayed
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.learning_rate, fused=True)


@torch.no_grad()
def _average(means: list[Tensor], values: list[Tensor], decay: float, step: int) -> None:
    """Moves the running mean of weights and statistics towards the current ones; without decay it is a copy."""
    share = 1.0 if decay == 0 else max(1 - decay, 1 / (step + 1))  # a true mean at first, while there is little to remember
    if share < 1:
        torch._foreach_lerp_(means, values, share)
    else:
        torch._foreach_copy_(means, values)


def _samples(clips: ClipSet, at_most: int = 512) -> list[tuple[Tensor, Tensor]]:
    """Training clips, evenly drawn, to measure the features on."""
    chosen = np.linspace(0, len(clips) - 1, min(at_most, len(clips))).astype(int)
    batches = [collate([clips.frames[i] for i in chosen[j : j + 64]], [0] * len(chosen[j : j + 64])) for j in range(0, len(chosen), 64)]
    return [(batch.frames, batch.lengths) for batch in batches]


def _outline(clips: ClipSet) -> tuple[list[int], list[int]]:
    """What batches are made by: lengths and labels."""
    return [len(clip) for clip in clips.frames], clips.labels.tolist()


def _drop_rows_after(path: Path, epoch: int) -> None:
    """Rows of an epoch whose checkpoint was not written would be there twice after a resume."""
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("".join(line + "\n" for line in lines if _epoch(line) <= epoch))


def _epoch(line: str) -> float:
    try:
        return float(json.loads(line)["epoch"])
    except ValueError:  # cut short when the run was killed
        return math.inf
