"""The growth controller over graphs: graph encoder, recurrent core, factored heads, value head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from esper_simic.graphs import OBSERVATION_KEYS, ObservationSpec
from esper_simic.policies.actor_critic import ActorCritic, Parts, tensors_of
from esper_simic.policies.cores import RecurrentCore
from esper_simic.policies.encoder import GraphEncoder
from esper_simic.policies.heads import FactoredHeads
from esper_simic.policies.initialisation import undrawn
from esper_simic.policies.normaliser import AsTheyAre, RunningNormaliser
from esper_simic.policies.policy import Decision, Evaluation

__all__ = ["Decision", "Evaluation", "GraphPolicy", "observations_from_numpy"]


class GraphWidths(Protocol):
    """What a graph policy reads of a configuration; `TrainerConfig` and `NetworkKeys` have it."""

    @property
    def hidden_size(self) -> int:
        """Width of the recurrent core and the heads; a node's is half of it."""

    @property
    def graph_layers(self) -> int:
        """Rounds of message passing."""


def observations_from_numpy(observation: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
    """The arrays of a graph observation as tensors that share their memory."""
    return tensors_of(dict.fromkeys(OBSERVATION_KEYS), observation)


class GraphPolicy(ActorCritic):
    """Actor and critic over graph observations.

    Args:
        spec: Shapes of one observation.
        config: Widths and depth.
        rng: Initial weights are drawn from it alone.
        normalise: Whether numbers of observations are normalised.
    """

    spec: ObservationSpec
    normaliser: RunningNormaliser | AsTheyAre
    encoder: GraphEncoder
    recurrent: RecurrentCore
    heads: FactoredHeads

    def __init__(
        self,
        spec: ObservationSpec,
        config: GraphWidths,
        rng: np.random.Generator,
        *,
        normalise: bool = True,
    ) -> None:
        hidden, node = config.hidden_size, config.hidden_size // 2
        with undrawn():
            parts = Parts(
                normaliser=RunningNormaliser(spec) if normalise else AsTheyAre(spec),
                encoder=GraphEncoder(spec, node, hidden, config.graph_layers),
                recurrent=RecurrentCore(hidden, hidden),
                heads=FactoredHeads(hidden, node, spec.mask_layout),
                value=nn.Sequential(
                    nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, 1)
                ),
                value_sees_core=True,
            )
        super().__init__(spec, parts, rng)
