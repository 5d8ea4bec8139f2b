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
from training.batches import Batch
from training.checkpoint import BEST, LAST, Checkpoint, CheckpointError, build, load, save
from training.config import Config, TrainConfig
from training.distributed import Group, choose_device
from training.feed import Feed, feed
from training.loss import boundary_loss, sequence_loss
from training.memory import BATCHES_AHEAD
from training.prefetch import Prefetch
from training.preflight import check
from training.schedule import Schedule
from training.splits import Data

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
    training: Data,
    validation: Data | None,
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
    group = group or Group(device=choose_device(config.train))
    check(config, training, validation, group.device, group.size)
    source = feed(config, training, validation)
    group.agree((config.seed, config.model, config.train, config.augment, config.streams, source.subject, source.outline))
    torch.set_num_threads(config.train.threads or torch.get_num_threads())
    run = _Run(config, source, group)
    if resume:
        run.restore(group.from_first(load(folder / LAST) if group.first else None), folder)

    def batches() -> Iterator[Batch]:
        for epoch in range(first_epoch, config.train.epochs):
            yield from source.epoch(epoch)

    first_epoch = run.epoch
    with Prefetch(batches, BATCHES_AHEAD) as ready:
        while not run.done:
            started, waited = time.perf_counter(), ready.waited
            row = run.fit(ready, watch)
            row["waiting"] = round((ready.waited - waited) / (time.perf_counter() - started), 4)  # share of the time without a batch to compute with
            improved = run.judge(row)
            row["seconds"] = round(time.perf_counter() - started, 3)
            if group.first:
                _keep(run.checkpoint(), row, folder, improved)
            watch(Progress(run.epoch, config.train.epochs, source.per_epoch, source.per_epoch, row["loss"], row["accuracy"], row))
    return folder / BEST


class _Run:
    """What changes while a network is fitted: weights and their running mean, optimiser, schedule, and what was best so far."""

    def __init__(self, config: Config, source: Feed, group: Group) -> None:
        self.config, self.feed, self.group = config, source, group
        t, subject, device = config.train, source.subject, group.device
        torch.manual_seed(config.seed)
        network = build(config, subject)
        network.fit_features(source.samples())
        mean_network = build(config, subject)
        mean_network.load_state_dict(network.state_dict())
        self.network, self.mean_network = network.to(device), mean_network.to(device)
        self.averaged = list(self.mean_network.state_dict().values()), list(self.network.state_dict().values())
        self.optimizer = _optimizer(self.network, t)
        self.schedule = Schedule(self.optimizer, t, source.per_epoch * t.epochs)
        self.scaler = torch.amp.GradScaler(device.type, enabled=t.precision == "float16")
        self.half = torch.autocast(device.type, getattr(torch, t.precision), enabled=t.precision != "float32")
        self.share = Share(group.total, group.rows, 0)
        take_part(self.network, self.share if group.size > 1 else None)
        self.epoch, self.best, self.stale = 0, -1.0, 0

    @property
    def done(self) -> bool:
        t = self.config.train
        return self.epoch >= t.epochs or bool(t.early_stop and self.stale >= t.early_stop)

    def restore(self, found: Checkpoint | None, folder: Path) -> None:
        """Goes on where this checkpoint was written; raises `CheckpointError` where it is that of another run."""
        if found is None or found.config != self.config or found.subject != self.feed.subject:
            raise CheckpointError(f"{folder}: was trained with another configuration or other data; resume with the same, or choose another --out")
        if not found.schedule:
            raise CheckpointError(f"{folder}: was trained by an earlier version, which kept no schedule; train again with another --out")
        self.network.load_state_dict(found.training_weights)
        self.mean_network.load_state_dict(found.weights)
        self.optimizer.load_state_dict(found.optimizer)
        self.schedule.load_state_dict(found.schedule)
        self.scaler.load_state_dict(found.scaler)
        self.epoch, self.best, self.stale = found.epoch, found.best, found.stale
        if self.group.first:
            _drop_rows_after(folder / METRICS, self.epoch)

    def checkpoint(self) -> Checkpoint:
        state = self.optimizer.state_dict(), self.best, self.stale, self.schedule.state_dict(), self.scaler.state_dict()
        return Checkpoint(self.config, self.feed.subject, self.epoch, self.mean_network.state_dict(), self.network.state_dict(), *state)

    def fit(self, ready: Iterator[Batch], watch: Callable[[Progress], None]) -> dict[str, Any]:
        """One epoch; its row of metrics so far."""
        t, batches = self.config.train, self.feed.per_epoch
        torch.manual_seed(int(np.random.default_rng((self.config.seed, self.epoch)).integers(2**62)))  # dropout
        self.network.train()
        loss_sum = right = seen = 0.0
        state: Tensor | None = None
        for i, whole in enumerate(itertools.islice(ready, batches)):
            self.share.batch, rate = len(whole.lengths), self.optimizer.param_groups[0]["lr"]
            batch = (whole.take(self.group.rows) if self.group.size > 1 else whole).to(self.group.device)
            if state is None or not self.feed.carries:
                state = self.network.initial_state(len(batch.lengths))
            value, correct, state = self.step(batch, state, f"epoch {self.epoch + 1}, batch {i + 1}")
            _average(*self.averaged, t.ema, self.epoch * batches + i)
            judged = int(whole.judged.sum())
            loss_sum += value * judged
            right += correct
            seen += judged
            watch(Progress(self.epoch + 1, t.epochs, i + 1, batches, loss_sum / max(1, seen), right / max(1, seen)))
        self.epoch += 1
        return {"epoch": self.epoch, "loss": loss_sum / max(1, seen), "accuracy": right / max(1, seen), "learning_rate": rate}

    def step(self, batch: Batch, state: Tensor, where: str) -> tuple[float, float, Tensor]:
        """One step of the optimiser: loss and judged steps that are right, of the whole batch, and the state to go on with."""
        config, network, optimizer, scaler = self.config.train, self.network, self.optimizer, self.scaler
        with self.half:
            loss, logits, state = _forward(network, batch, state, config, self.share.batch)
            loss = loss + network.penalty() / self.group.size
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        hits = ((logits.argmax(-1) == batch.labels) & batch.judged).sum()
        value, correct = self.group.total_gradients(network, torch.stack([loss.detach(), hits])).tolist()
        if not math.isfinite(value):
            raise TrainingDiverged(f"loss is {value} in {where}: lower train.learning_rate or train.clip_gradient")
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(network.parameters(), config.clip_gradient)
        if not scaler.is_enabled() and not math.isfinite(norm):  # the scaler leaves such a step out, and expects a few
            raise TrainingDiverged(f"gradients are not finite in {where}: lower train.learning_rate")
        scaler.step(optimizer)
        scaler.update()
        self.schedule.step()
        network.clamp_recurrent_()
        return value, correct, state

    def judge(self, row: dict[str, Any]) -> bool:
        """Adds what the epoch comes to on the validation part; whether it is the best so far, which without such a part every epoch is."""
        figures = self.feed.validate(self.mean_network, self.group)
        if figures is None:
            return True
        row |= figures
        accuracy = figures["validation_accuracy"]
        self.schedule.end_epoch(figures["validation_loss"])
        self.stale = 0 if accuracy > self.best else self.stale + 1
        improved, self.best = accuracy >= self.best, max(self.best, accuracy)
        return improved


def _forward(network: Network, batch: Batch, state: Tensor, config: TrainConfig, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, this process's part of it, logits (B, T, classes), and the state to go on with, through which no gradient goes back.

    `rows` are those of the whole batch.
    """
    steps, logits, state, boundary = network.outputs(batch.frames, batch.lengths, state)
    loss = sequence_loss(logits, batch, config)
    if steps is not logits:  # an average is right only where its steps are: both are taught
        loss = (loss + sequence_loss(steps, batch, config)) / 2
    if boundary is not None:
        loss = loss + config.boundary * boundary_loss(boundary, batch, rows)
    return loss, logits.detach(), state.detach().float()


def _keep(checkpoint: Checkpoint, row: dict[str, Any], folder: Path, improved: bool) -> None:
    with (folder / METRICS).open("a") as file:  # first, since a resume drops rows that no checkpoint followed, but cannot make up for lost ones
        file.write(json.dumps(row) + "\n")
    if improved:
        save(checkpoint, folder / BEST)
    save(checkpoint, folder / LAST)


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


def _drop_rows_after(path: Path, epoch: int) -> None:
    """Rows of an epoch whose checkpoint was not written would be there twice after a resume."""
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("".join(line + "\n" for line in lines if _epoch(line) <= epoch))


def _epoch(line: str) -> float:
    try:
        return float(json.loads(line)["epoch"])
    except ValueError:  # cut short when the run was killed
        return math.inf
