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

from model.layers import step_mask
from model.network import Network
from training.augment import Augment
from training.batches import Batch, collate, epoch_batches, training_batches
from training.checkpoint import BEST, LAST, Checkpoint, CheckpointError, Subject, build, load, save
from training.config import Config, ConfigError, TrainConfig
from training.datasets.clips import ClipSet
from training.evaluate import evaluate
from training.prefetch import Prefetch

METRICS = "metrics.jsonl"
AHEAD = 16  # batches: two runs of those that are made together


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
    """The loss is no longer finite; the last checkpoint is intact."""


def train(config: Config, training: ClipSet, validation: ClipSet | None, folder: Path, *, resume: bool = False, watch: Callable[[Progress], None]) -> Path:
    """Fits a network and returns the checkpoint to use: the best on validation, or the last where there is none.

    `folder` gets a checkpoint after every epoch and a line of metrics in `metrics.jsonl`. With `resume` it goes on after the last one.
    """
    subject = Subject.of(training)
    if training.missing and not config.model.missing:
        raise ConfigError(f"{subject.source.name}: values are missing in training clips: set model.missing = true")
    torch.set_num_threads(config.train.threads or torch.get_num_threads())
    torch.manual_seed(config.seed)
    network = build(config, subject)
    network.fit_features(_samples(training))
    mean_network = build(config, subject)
    mean_network.load_state_dict(network.state_dict())
    optimizer = _optimizer(network, config.train)
    augment = Augment(config.augment, subject.layout)
    batches_per_epoch = epoch_batches(training, config.train.batch, config.train.max_frames)
    averaged = list(mean_network.state_dict().values()), list(network.state_dict().values())
    best, first_epoch = -1.0, 0
    if resume:
        found = load(folder / LAST)
        if found.config != config or found.subject != subject:
            raise CheckpointError(f"{folder}: was trained with another configuration or other data; resume with the same, or choose another --out")
        network.load_state_dict(found.training_weights)
        mean_network.load_state_dict(found.weights)
        optimizer.load_state_dict(found.optimizer)
        best, first_epoch = found.best, found.epoch
        _drop_rows_after(folder / METRICS, first_epoch)

    def batches() -> Iterator[Batch]:
        for epoch in range(first_epoch, config.train.epochs):
            yield from training_batches(training, config.train.batch, augment, config.train.max_frames, (config.seed, epoch))

    with Prefetch(batches, AHEAD) as ready:
        for epoch in range(first_epoch, config.train.epochs):
            started, waited = time.perf_counter(), ready.waited
            torch.manual_seed(int(np.random.default_rng((config.seed, epoch)).integers(2**62)))  # dropout
            network.train()
            loss_sum = right = seen = 0.0
            for i, batch in enumerate(itertools.islice(ready, batches_per_epoch)):
                step = epoch * batches_per_epoch + i
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config.train, step, batches_per_epoch * config.train.epochs)
                steps, logits, _ = network.outputs(batch.frames, batch.lengths, network.initial_state(len(batch.labels)))
                loss = sequence_loss(logits, batch, config.train)
                if steps is not logits:  # an average is right only where its steps are: both are taught
                    loss = (loss + sequence_loss(steps, batch, config.train)) / 2
                if not torch.isfinite(loss):
                    raise TrainingDiverged(f"loss is {loss.item()} in epoch {epoch + 1}, batch {i + 1}: lower train.learning_rate or train.clip_gradient")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(network.parameters(), config.train.clip_gradient)
                optimizer.step()
                network.clamp_recurrent_()
                _average(*averaged, config.train.ema, step)
                last = logits.detach()[torch.arange(len(batch.labels)), batch.lengths - 1]
                loss_sum += loss.item() * len(batch.labels)
                right += (last.argmax(-1) == batch.labels).sum().item()
                seen += len(batch.labels)
                watch(Progress(epoch + 1, config.train.epochs, i + 1, batches_per_epoch, loss_sum / seen, right / seen))

            row: dict[str, Any] = {"epoch": epoch + 1, "loss": loss_sum / seen, "accuracy": right / seen, "learning_rate": optimizer.param_groups[0]["lr"]}
            row["waiting"] = round((ready.waited - waited) / (time.perf_counter() - started), 4)  # share of the time without a batch to compute with
            improved = validation is None
            if validation is not None:
                result = evaluate(mean_network, validation)
                row |= {"validation_loss": result.loss, "validation_accuracy": result.accuracy, "validation_frame_accuracy": result.frame_accuracy}
                improved, best = result.accuracy >= best, max(best, result.accuracy)
            row["seconds"] = round(time.perf_counter() - started, 3)
            checkpoint = Checkpoint(config, subject, epoch + 1, mean_network.state_dict(), network.state_dict(), optimizer.state_dict(), best)
            with (folder / METRICS).open("a") as file:  # first, since a resume drops rows that no checkpoint followed, but cannot make up for lost ones
                file.write(json.dumps(row) + "\n")
            if improved:
                save(checkpoint, folder / BEST)
            save(checkpoint, folder / LAST)
            watch(Progress(epoch + 1, config.train.epochs, batches_per_epoch, batches_per_epoch, loss_sum / seen, right / seen, row))
    return folder / BEST


def sequence_loss(logits: Tensor, batch: Batch, config: TrainConfig) -> Tensor:
    """Cross-entropy at every real step, weighted from `early` at a clip's first step to 1 at its last; each clip counts the same."""
    steps = logits.shape[1]
    real = step_mask(batch.lengths, steps).T.to(logits.dtype)
    place = torch.arange(steps)[None, :] / (batch.lengths[:, None] - 1)
    place = torch.where(batch.lengths[:, None] > 1, place, 1.0)  # the only step of a clip is its last
    weight = real * (config.early + (1 - config.early) * place)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-9)
    labels = batch.labels[:, None].expand(-1, steps)
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", label_smoothing=config.label_smoothing)
    return (losses * weight).sum() / len(batch.labels)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up to the peak, then half a cosine down to a hundredth of it."""
    warm = max(1, round(config.warm_up * steps))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    share = (step - warm) / max(1, steps - warm)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def _optimizer(network: Network, config: TrainConfig) -> torch.optim.AdamW:
    matrices = [p for p in network.parameters() if p.ndim >= 2]
    others = [p for p in network.parameters() if p.ndim < 2]  # u, biases, norms: never decayed
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


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


def _drop_rows_after(path: Path, epoch: int) -> None:
    """Rows of an epoch whose checkpoint was not written would be there twice after a resume."""
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("".join(line + "\n" for line in lines if _epoch(line) <= epoch))


def _epoch(line: str) -> float:
    try:
        return float(json.loads(line)["epoch"])
    except ValueError:  # cut short when the run was killed
        return math.inf
