"""Q(s, a) and V(s) for learning from recorded transitions; they remember nothing.

Of an action with several heads, Q is the sum of one term a head (over the heads that the action made relevant), so that
it has as many outputs as there are choices and not as there are actions:

    Q(s, a) = sum_h q_h(s, a_h)

Source: Tang, Makar, Sjoding, Doshi-Velez, Wiens, Leveraging Factored Action Spaces for Efficient Offline Reinforcement
Learning in Healthcare (2022), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from esper_simic.actions import HEADS, OP, RELEVANT_HEADS, Op
from esper_simic.config_networks import NetworkKeys
from esper_simic.errors import ConfigError
from esper_simic.graphs import FlatGrowthSpec, ObservationSpec
from esper_simic.policies.encoder import GraphEncoder
from esper_simic.policies.initialisation import initialise, undrawn
from esper_simic.policies.trunk import Head
from esper_simic.policies.vector_encoder import FlatGrowthEncoder, VectorEncoder
from esper_simic.specs import Choices, Continuous, ExperienceSpec, VectorSpec


class VNetwork(nn.Module):
    """V(s).

    Args:
        spec: Shapes of observations and actions.
        keys: Widths and depth.
        rng: Initial weights are drawn from it alone.
    """

    def __init__(self, spec: ExperienceSpec, keys: NetworkKeys, rng: np.random.Generator) -> None:
        super().__init__()
        with undrawn():
            self.encoder, width = _encoder(spec, keys)
            self.out = nn.Linear(width, 1)
        initialise(self, rng, unit={"out.weight"})

    def forward(self, observations: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> Tensor:
        """Values `[N]`.

        Args:
            observations: `[N, …]` as they came.
            features: `[N, …]` as the policy's normaliser makes them.
        """
        values: Tensor = self.out(self.encoder(observations, features).whole)
        return values.squeeze(-1)


class ChoiceQ(nn.Module):
    """Q(s, .) for `Choices`: one number for each choice of each head.

    Args:
        spec: Shapes of observations and actions.
        keys: Widths and depth.
        rng: Initial weights are drawn from it alone.
    """

    def __init__(self, spec: ExperienceSpec, keys: NetworkKeys, rng: np.random.Generator) -> None:
        super().__init__()
        self._sizes = list(_choices(spec).sizes)
        with undrawn():
            self.encoder, width = _encoder(spec, keys)
            self.out = nn.Linear(width, sum(self._sizes))
        initialise(self, rng, unit={"out.weight"})
        self._is_causal = isinstance(spec, ObservationSpec | FlatGrowthSpec)
        relevance = torch.zeros(len(Op), len(HEADS), dtype=torch.bool)
        for op, heads in RELEVANT_HEADS.items():
            relevance[op, [HEADS.index(head) for head in heads]] = True
        self.register_buffer("relevance", relevance, persistent=False)

    def every(self, observations: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Of each head the terms of all its choices, `[N, size]`; of a single head that is Q(s, .)."""
        values: Tensor = self.out(self.encoder(observations, features).whole)
        return torch.split(values, self._sizes, dim=-1)

    def forward(
        self, observations: Mapping[str, Tensor], features: Mapping[str, Tensor], actions: Tensor
    ) -> Tensor:
        """Q(s, a), `[N]`, of actions `[N, heads]` int64; other arguments as in `VNetwork`."""
        terms = [
            values.gather(-1, actions[:, index : index + 1])
            for index, values in enumerate(self.every(observations, features))
        ]
        taken = torch.cat(terms, dim=-1)
        if self._is_causal:
            taken = torch.where(self.get_buffer("relevance")[actions[:, OP]], taken, 0.0)
        return taken.sum(dim=-1)


class ActionQ(nn.Module):
    """Q(s, a) for `Continuous`: the action stands beside the vector.

    Args:
        spec: Shapes of observations and actions.
        keys: Widths and depth.
        rng: Initial weights are drawn from it alone.
    """

    def __init__(self, spec: VectorSpec, keys: NetworkKeys, rng: np.random.Generator) -> None:
        super().__init__()
        with undrawn():
            self.head = Head(spec.features + spec.action.shape[0], 1, keys)
        initialise(self, rng, unit={f"head.{self.head.last_layer}"})

    def forward(
        self, observations: Mapping[str, Tensor], features: Mapping[str, Tensor], actions: Tensor
    ) -> Tensor:
        """Q(s, a), `[N]`, of actions `[N, dimensions]`; other arguments as in `VNetwork`."""
        values: Tensor = self.head(torch.cat([features["vector"], actions], dim=-1))
        return values.squeeze(-1)


class TwinQ(nn.Module):
    """Two Q networks that differ in their initial weights alone; their minimum is less prone to be too large.

    Args:
        spec: Shapes of observations and actions.
        keys: Widths and depth.
        rng: Initial weights are drawn from it alone.

    Source: Fujimoto, van Hoof, Meger, Addressing Function Approximation Error in Actor-Critic Methods (2018).
    """

    def __init__(self, spec: ExperienceSpec, keys: NetworkKeys, rng: np.random.Generator) -> None:
        super().__init__()
        self.first, self.second = q_network(spec, keys, rng), q_network(spec, keys, rng)

    def forward(
        self, observations: Mapping[str, Tensor], features: Mapping[str, Tensor], actions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Q(s, a) of both, `[N]` each; arguments as in `ChoiceQ` or `ActionQ`."""
        return self.first(observations, features, actions), self.second(observations, features, actions)

    def lower(
        self, observations: Mapping[str, Tensor], features: Mapping[str, Tensor], actions: Tensor
    ) -> Tensor:
        """The smaller of both, `[N]`."""
        return torch.minimum(*self(observations, features, actions))


def q_network(spec: ExperienceSpec, keys: NetworkKeys, rng: np.random.Generator) -> ChoiceQ | ActionQ:
    """The Q network for the actions of a spec.

    Raises:
        ConfigError: There is none for such observations and actions.
    """
    if isinstance(spec.action, Choices):
        return ChoiceQ(spec, keys, rng)
    if isinstance(spec, VectorSpec):
        return ActionQ(spec, keys, rng)
    raise ConfigError(f"no Q network reads {type(spec).__name__} and actions of real numbers")


def _choices(spec: ExperienceSpec) -> Choices:
    if isinstance(spec.action, Continuous):
        raise ConfigError("Q(s, .) has one number a choice; actions of real numbers take ActionQ")
    return spec.action


def _encoder(spec: ExperienceSpec, keys: NetworkKeys) -> tuple[nn.Module, int]:
    """An encoder and the width of what it gives."""
    hidden = keys.hidden_size
    if isinstance(spec, ObservationSpec):
        return GraphEncoder(spec, hidden // 2, hidden, keys.graph_layers), hidden
    if isinstance(spec, VectorSpec):
        return VectorEncoder(spec, keys), hidden
    if isinstance(spec, FlatGrowthSpec):
        return FlatGrowthEncoder(spec, keys), hidden
    raise ConfigError(f"no value network reads observations of {type(spec).__name__}")
