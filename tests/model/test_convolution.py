"""Convolutional input: along the frame, over neighbours alone, in time only through the recurrence."""

from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.convolution import PointConvolution
from model.layers import SequenceNorm

BLOCKS = [(6, 3), (1, 2), (6, 1)]  # six points of three numbers, two numbers of the whole, one more number for each point


def convolution(**changes: Any) -> PointConvolution:
    torch.manual_seed(0)
    return PointConvolution(BLOCKS, ModelConfig(**{"kind": "plain", "filters": 2, "norm": "none"} | changes)).eval()


def run(made: PointConvolution, x: torch.Tensor) -> torch.Tensor:
    y, ends = made(x, [torch.zeros(x.shape[1], 12)], torch.ones(x.shape[:2], dtype=torch.bool))
    assert torch.equal(ends[0], y[-1, :, :12]) or not isinstance(made.after, torch.nn.Identity)
    return y  # type: ignore[no-any-return]


def test_the_definition_point_by_point() -> None:
    made, x = convolution(), torch.randn(1, 1, 26)
    y = run(made, x)
    assert y.shape == (1, 1, made.width) == (1, 1, 14)
    points = torch.cat([x[0, 0, :18].reshape(6, 3), x[0, 0, 20:].reshape(6, 1)], 1)
    weight, bias, padded = made.convolution.weight, made.convolution.bias, torch.cat([torch.zeros(1, 4), points, torch.zeros(1, 4)])
    for filter_ in range(2):
        for point in range(6):
            z = (weight[filter_] * padded[point : point + 3].T).sum() + bias[filter_]
            torch.testing.assert_close(y[0, 0, 6 * filter_ + point], torch.relu(z))


def test_what_belongs_to_no_point_passes_by() -> None:
    x = torch.randn(4, 2, 26)
    assert torch.equal(run(convolution(), x)[..., 12:], x[..., 18:20])


@pytest.mark.parametrize(("kernel", "reached"), [(1, {2}), (3, {1, 2, 3}), (5, {0, 1, 2, 3, 4})])
def test_a_point_reaches_its_neighbours_and_no_earlier_step(kernel: int, reached: set[int]) -> None:
    made, x = convolution(kernel=kernel, activation="identity"), torch.randn(5, 1, 26)
    other = x.clone()
    other[3, 0, 6:9] += 1.0  # the third point, at the fourth step
    changed = (run(made, x) != run(made, other))[:, 0, :12].reshape(5, 2, 6)
    assert not changed[:3].any()
    assert {int(i) for i in changed[3].any(0).nonzero()} == reached
    assert {int(i) for i in changed[4].any(0).nonzero()} == reached  # remembered by each unit alone


@pytest.mark.parametrize("norm", ["before", "after", "none"])
def test_norm_stands_where_the_stack_has_it(norm: str) -> None:
    made = convolution(norm=norm)
    assert [isinstance(module, SequenceNorm) for module in (made.before, made.after)] == [norm == "before", norm == "after"]
    assert made.state_widths == [12]
    assert run(made, torch.randn(3, 2, 26)).shape == (3, 2, 14)
