"""From a configuration and the shapes of an experience to a policy: the one place where they meet."""

from __future__ import annotations

import numpy as np
from torch import nn

from esper_simic.config_networks import NetworkKeys
from esper_simic.errors import ConfigError
from esper_simic.graphs import FlatGrowthSpec, ObservationSpec
from esper_simic.policies.actor_critic import ActorCritic, Parts
from esper_simic.policies.categorical import CategoricalHeads
from esper_simic.policies.cores import FeedForward, RecurrentCore
from esper_simic.policies.gaussian import GaussianHeads
from esper_simic.policies.graph_policy import GraphPolicy
from esper_simic.policies.heads import FlatGrowthHeads
from esper_simic.policies.initialisation import undrawn
from esper_simic.policies.normaliser import AsTheyAre, RunningNormaliser
from esper_simic.policies.trunk import Head
from esper_simic.policies.vector_encoder import FlatGrowthEncoder, VectorEncoder
from esper_simic.specs import Choices, ExperienceSpec, VectorSpec

KEY = "simic_trainer.network"


def build_policy(spec: ExperienceSpec, keys: NetworkKeys, rng: np.random.Generator) -> ActorCritic:
    """A policy for experiences of these shapes.

    Args:
        spec: Shapes of observations and actions.
        keys: What it is to be made of.
        rng: Initial weights are drawn from it alone.

    Raises:
        ConfigError: `network` does not fit the observations, or there is no policy for such ones.
    """
    if isinstance(spec, ObservationSpec):
        if keys.network not in ("auto", "graph"):
            raise ConfigError(
                f"{keys.network} reads vectors, not graphs; take graph, or flat observations", KEY
            )
        return GraphPolicy(spec, keys, rng, normalise=keys.normalise_observations)
    if keys.network == "graph":
        raise ConfigError("graph reads graph observations, not vectors; take mlp or lstm", KEY)
    if isinstance(spec, VectorSpec | FlatGrowthSpec):
        return _vector_policy(spec, keys, rng)
    raise ConfigError(f"no policy reads observations of {type(spec).__name__}", KEY)


def _vector_policy(
    spec: VectorSpec | FlatGrowthSpec, keys: NetworkKeys, rng: np.random.Generator
) -> ActorCritic:
    hidden, remembers = keys.hidden_size, keys.network == "lstm"
    shares = remembers or keys.shared_trunk
    with undrawn():
        encoder = VectorEncoder(spec, keys) if isinstance(spec, VectorSpec) else FlatGrowthEncoder(spec, keys)
        parts = Parts(
            normaliser=RunningNormaliser(spec) if keys.normalise_observations else AsTheyAre(spec),
            encoder=encoder,
            recurrent=RecurrentCore(hidden, hidden) if remembers else FeedForward(),
            heads=_heads(spec, hidden),
            value=nn.Sequential(nn.Linear(hidden, 1)) if shares else Head(encoder.width, 1, keys),
            value_sees_core=shares,
        )
    return ActorCritic(spec, parts, rng)


def _heads(spec: VectorSpec | FlatGrowthSpec, core: int) -> nn.Module:
    if isinstance(spec, FlatGrowthSpec):
        return FlatGrowthHeads(core, core // 2, spec.mask_layout)
    if isinstance(spec.action, Choices):
        return CategoricalHeads(core, spec.action)
    return GaussianHeads(core, spec.action)
