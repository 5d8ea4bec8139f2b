"""Networks with lived-in weights and their exported graphs, made once: an export takes seconds."""

from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from model.config import ModelConfig
from model.layers import SequenceNorm
from model.network import Network
from model.tokens import TokenFeatures
from training.export import to_onnx

# Every kind of stack, view and gap somewhere: what is exported once is looked at from all sides.
KINDS: dict[str, tuple[dict[str, Any], tuple[int, ...], str | None]] = {
    "channels": ({"kind": "plain", "layers": 2, "norm": "after", "missing": True, "horizon": 20}, (2,), None),
    "body": ({"kind": "residual", "layers": 2, "view": "body", "missing": True, "horizon": 30}, (13, 3), "body-13"),
    "reset": ({"kind": "plain", "layers": 2, "average": 10, "weighted": True, "reset": "soft", "boundary_units": 5, "horizon": 20}, (2,), None),
    "bare": ({"kind": "plain", "layers": 1, "norm": "before", "motion": False, "average": 10}, (2,), None),
}


def lived_in(config: ModelConfig, shape: tuple[int, ...], layout: str | None = None, seed: int = 0, classes: int = 3) -> Network:
    torch.manual_seed(seed)
    network = Network(config, shape, classes, layout)
    for module in network.modules():
        if isinstance(module, SequenceNorm):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.3, 2)
            nn.init.uniform_(module.weight, -1, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    if not isinstance(network.features, TokenFeatures):
        standardise = network.features.standardise
        standardise.fit(torch.randn_like(standardise.mean) * 0.1, torch.rand_like(standardise.mean) + 0.3)
    return network.eval()


@pytest.fixture(scope="session", name="lived_in")
def _lived_in() -> Callable[..., Network]:
    return lived_in


@pytest.fixture(scope="session")
def networks() -> dict[str, Network]:
    return {kind: lived_in(ModelConfig(units=8, **changes), shape, layout) for kind, (changes, shape, layout) in KINDS.items()}


class Exported:
    """Graphs by kind, exported when first asked for. They are shared: change copies."""

    def __init__(self, networks: dict[str, Network]) -> None:
        self.networks, self._models = networks, dict[str, onnx.ModelProto]()

    def __getitem__(self, kind: str) -> onnx.ModelProto:
        if kind not in self._models:
            self._models[kind] = to_onnx(self.networks[kind])
        copy = onnx.ModelProto()
        copy.CopyFrom(self._models[kind])
        return copy


@pytest.fixture(scope="session")
def exported(networks: dict[str, Network]) -> Exported:
    return Exported(networks)
