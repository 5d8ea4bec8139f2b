"""The learning rate over a run: warm-up, then a cosine, one cycle, a fall at each plateau, or nothing."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from training.config import TrainConfig


class Schedule:
    """Sets the learning rate of `optimizer`, whose own is the peak, over a run of `steps` steps.

    Call `step` after every step of the optimiser and `end_epoch` after every epoch. Its state goes into the checkpoint.
    """

    def __init__(self, optimizer: Optimizer, config: TrainConfig, steps: int) -> None:
        self.by_step: LambdaLR | OneCycleLR
        if config.schedule == "one-cycle":
            # One step more than is made, and two of them uphill: torch divides by the length of each phase.
            up = max(config.warm_up, 2 / (steps + 1))
            self.by_step = OneCycleLR(optimizer, config.learning_rate, total_steps=steps + 1, pct_start=up)
        else:
            self.by_step = LambdaLR(optimizer, lambda step: factor(config, step, steps))
        self.at_plateau = ReduceLROnPlateau(optimizer, factor=config.plateau_factor, patience=config.plateau_patience)
        self.warm_steps = warm_steps(config, steps)
        self.watches_plateau = config.schedule == "plateau"
        self.made = 0

    def step(self) -> None:
        self.made += 1
        if not self.watches_plateau or self.made < self.warm_steps:  # from then on the plateau alone decides
            self.by_step.step()

    def end_epoch(self, validation_loss: float) -> None:
        if self.watches_plateau and self.made >= self.warm_steps:
            self.at_plateau.step(validation_loss)

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made, "by_step": self.by_step.state_dict(), "at_plateau": self.at_plateau.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made = state["made"]
        self.by_step.load_state_dict(state["by_step"])
        self.at_plateau.load_state_dict(state["at_plateau"])


def factor(config: TrainConfig, step: int, steps: int) -> float:
    """What the peak is multiplied with at this step: a linear warm-up, then one; for the cosine half of one, down to a hundredth."""
    warm = warm_steps(config, steps)
    if step < warm:
        return (step + 1) / warm
    if config.schedule != "cosine":
        return 1.0
    share = (step - warm) / max(1, steps - warm)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share))


def warm_steps(config: TrainConfig, steps: int) -> int:
    """Steps before the learning rate is at its peak, at least one."""
    return max(1, round(config.warm_up * steps))
