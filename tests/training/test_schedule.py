"""Learning rates over a run: warm-up, fall, cycle, plateau; and after a resume as if there had been none."""

import pytest
import torch

from training.config import TrainConfig
from training.schedule import Schedule, factor


def made(steps: int = 100, **options: object) -> tuple[torch.optim.Optimizer, Schedule]:
    config = TrainConfig(learning_rate=0.1, **options)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=config.learning_rate)
    return optimizer, Schedule(optimizer, config, steps)


def rates(steps: int = 100, losses: list[float] | None = None, **options: object) -> list[float]:
    """The learning rate of every step; with `losses`, an epoch of ten steps ends in each."""
    optimizer, schedule = made(steps, **options)
    found = []
    for step in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        if losses and step % 10 == 9:
            schedule.end_epoch(losses[step // 10])
    return found


def test_cosine_warms_up_and_falls_to_a_hundredth() -> None:
    found = rates(warm_up=0.2)
    assert found[0] == pytest.approx(0.1 / 20)
    assert max(found) == found[19] == pytest.approx(0.1)
    assert found[19:] == sorted(found[19:], reverse=True)
    assert found[-1] == pytest.approx(0.001, rel=0.2)
    assert factor(TrainConfig(warm_up=0.0), 0, 1) == 1.0


def test_constant_stays_after_its_warm_up() -> None:
    found = rates(schedule="constant", warm_up=0.1)
    assert found[0] == pytest.approx(0.01)
    assert found[9:] == pytest.approx([0.1] * 91)


@pytest.mark.parametrize("steps", [1, 2, 3, 100])
@pytest.mark.parametrize("warm_up", [0.0, 0.3])
def test_one_cycle_rises_falls_and_ends_far_below_its_start(steps: int, warm_up: float) -> None:
    found = rates(steps, schedule="one-cycle", warm_up=warm_up)
    assert len(found) == steps
    if steps == 100:
        top = found.index(max(found))
        assert found[top] == pytest.approx(0.1, rel=0.05)
        assert top == pytest.approx(100 * max(warm_up, 0.01), abs=2)
        assert found[0] == pytest.approx(0.1 / 25)
        assert found[-1] < found[0] / 50


def test_plateau_falls_when_the_validation_loss_has_not_for_long_enough() -> None:
    falling = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    stuck = [1.0, 0.9, 0.9, 0.9, 0.9, 0.8, 0.8, 0.8, 0.8, 0.8]
    options = {"schedule": "plateau", "plateau_patience": 2, "plateau_factor": 0.5, "warm_up": 0.1}
    assert rates(losses=falling, **options)[10:] == pytest.approx([0.1] * 90)
    found = rates(losses=stuck, **options)[::10]
    assert found == pytest.approx([0.01, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.025])


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle", "plateau", "constant"])
@pytest.mark.parametrize("stop", [1, 10, 55])
def test_goes_on_from_its_state_as_if_there_had_been_no_stop(schedule: str, stop: int) -> None:
    whole = rates(schedule=schedule, losses=[1.0] * 10, plateau_patience=1)
    found, kept = [], None
    for part in (range(stop), range(stop, 100)):
        optimizer, ours = made(schedule=schedule, plateau_patience=1)
        if kept:
            optimizer.load_state_dict(kept[0])
            ours.load_state_dict(kept[1])
        for step in part:
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            ours.step()
            if step % 10 == 9:
                ours.end_epoch(1.0)
        kept = optimizer.state_dict(), ours.state_dict()
    assert found == whole
