"""From one vector of numbers to what a policy chooses by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from esper_simic.actions import BLUEPRINTS
from esper_simic.config_networks import NetworkKeys
from esper_simic.graphs import FlatGrowthSpec
from esper_simic.policies.encoder import BLUEPRINT_EMBEDDING
from esper_simic.policies.parts import Encoded
from esper_simic.policies.trunk import Trunk
from esper_simic.specs import VectorSpec


class VectorEncoder(nn.Module):
    """A trunk over the vector.

    Args:
        spec: Shapes of one observation.
        keys: Of the trunk.
    """

    def __init__(self, spec: VectorSpec, keys: NetworkKeys) -> None:
        super().__init__()
        self.width = spec.features
        self.trunk = Trunk(self.width, keys)

    def forward(self, observations: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> Encoded:
        """Encode N observations; see `parts.Encoder`."""
        inputs = features["vector"]
        return Encoded(self.trunk(inputs), inputs[:, :0], inputs)


class FlatGrowthEncoder(nn.Module):
    """A trunk over the vector of a growing host and the embedded blueprints of its slots.

    Args:
        spec: Shapes of one observation.
        keys: Of the trunk.
    """

    def __init__(self, spec: FlatGrowthSpec, keys: NetworkKeys) -> None:
        super().__init__()
        self.blueprints = nn.Embedding(len(BLUEPRINTS) + 1, BLUEPRINT_EMBEDDING)
        self.width = spec.features + spec.slots * BLUEPRINT_EMBEDDING
        self.trunk = Trunk(self.width, keys)

    def forward(self, observations: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> Encoded:
        """Encode N observations; see `parts.Encoder`."""
        blueprints = self.blueprints(observations["slot_blueprint"]).flatten(1)
        inputs = torch.cat([features["vector"], blueprints], dim=-1)
        return Encoded(self.trunk(inputs), inputs[:, :0], inputs)
