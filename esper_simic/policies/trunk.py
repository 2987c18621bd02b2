"""A multilayer perceptron without its last layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch import nn

from esper_simic.config_networks import NetworkKeys

ACTIVATIONS: Final[dict[str, type[nn.Module]]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class Trunk(nn.Sequential):
    """Hidden layers: linear, LayerNorm where asked for, activation.

    Args:
        features: Width of its input.
        keys: Width and number of the layers, activation, LayerNorm.

    Source: Ba, Kiros, Hinton, Layer Normalization (2016).
    """

    def __init__(self, features: int, keys: NetworkKeys) -> None:
        super().__init__(*_layers(features, keys))
        self.width = keys.hidden_size


class Head(nn.Sequential):
    """A trunk and one linear layer on it.

    Args:
        features: Width of its input.
        outputs: Width of its output.
        keys: Of the trunk.
    """

    def __init__(self, features: int, outputs: int, keys: NetworkKeys) -> None:
        super().__init__(*_layers(features, keys), nn.Linear(keys.hidden_size, outputs))

    @property
    def last_layer(self) -> str:
        """Name of the weight of its last layer."""
        return f"{len(self) - 1}.weight"


def _layers(features: int, keys: NetworkKeys) -> Iterator[nn.Module]:
    width = features
    for _ in range(keys.hidden_layers):
        yield nn.Linear(width, keys.hidden_size)
        if keys.layer_norm:
            yield nn.LayerNorm(keys.hidden_size)
        yield ACTIVATIONS[keys.activation]()
        width = keys.hidden_size
