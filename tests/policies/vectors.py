"""Random observations without a graph, and policies that read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper_simic.config_networks import NetworkKeys
from esper_simic.graphs import FlatGrowthSpec
from esper_simic.policies.actor_critic import ActorCritic
from esper_simic.policies.build import build_policy
from esper_simic.specs import Choices, Continuous, ExperienceSpec, VectorSpec
from tests.policies import synthetic

ONE = VectorSpec(5, Choices(("action",), (3,)))
MANY = VectorSpec(5, Choices(("a", "b", "c"), (3, 1, 4)))
MASKED = VectorSpec(5, Choices(("a", "b", "c"), (3, 1, 4)), masked=True)
NUMBERS = VectorSpec(5, Continuous((-1.0, -2.0), (1.0, 2.0)))
FLAT = FlatGrowthSpec(features=9, slots=3)

SPECS: dict[str, ExperienceSpec] = {
    "one": ONE,
    "many": MANY,
    "masked": MASKED,
    "numbers": NUMBERS,
    "flat": FLAT,
}

Observations = dict[str, Tensor]


def keys(**settings: Any) -> NetworkKeys:
    """Small networks."""
    return NetworkKeys(**({"hidden_size": 16} | settings))


def make(spec: ExperienceSpec, seed: int = 0, *, scale: float = 1.0, **settings: Any) -> ActorCritic:
    """A policy; with `scale` the last layers of its heads are enlarged, so that it is far from uniform."""
    policy = build_policy(spec, keys(**settings), np.random.default_rng(seed))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.removeprefix("heads.") in policy.heads.last_layers:
                parameter.mul_(scale)
    return policy


def masks(rng: np.random.Generator, sizes: tuple[int, ...], count: int) -> np.ndarray:
    """`[count, sum(sizes)]`, with a legal choice in each head."""
    pieces = []
    for size in sizes:
        legal = rng.random((count, size)) < 0.5
        legal[np.arange(count), rng.integers(0, size, count)] = True
        pieces.append(legal)
    return np.concatenate(pieces, axis=1).astype(np.int8)


def observations(spec: ExperienceSpec, rng: np.random.Generator, *lead: int) -> Observations:
    """Observations `[*lead, …]` of any of `SPECS`."""
    count = int(np.prod(lead))
    found: Observations = {}
    if isinstance(spec, FlatGrowthSpec):
        graph = synthetic.observations(rng, *lead)
        found = {key: graph[key] for key in ("slot_blueprint", "action_mask")}
    elif isinstance(spec, VectorSpec) and spec.masked and isinstance(spec.action, Choices):
        made = torch.from_numpy(masks(rng, spec.action.sizes, count))
        found = {"action_mask": made.reshape(*lead, -1)}
    (features,), _ = spec.shapes()["vector"]
    vector = torch.from_numpy(rng.normal(size=(*lead, features)).astype(np.float32))
    return {"vector": vector} | found


def chance(spec: ExperienceSpec, rng: np.random.Generator, *lead: int) -> Tensor:
    """Uniform numbers `[*lead, chance]`."""
    return torch.from_numpy(rng.random((*lead, spec.action.chance)))
