"""Scripted policies that act in training: what they do, and how likely they were to do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from esper_simic.specs import ActionSpec, Choices

Array = npt.NDArray[Any]


class Chosen(NamedTuple):
    """Actions `[E, …]` as the world's spec says, and their log-probabilities `[E]`: 0 where no chance is in it."""

    actions: Array
    log_probs: Array


class Script(Protocol):
    """A scripted policy in E lanes; it may remember."""

    def choose(self, observation: Mapping[str, Array], episode_start: Array, uniforms: Array) -> Chosen:
        """What it does next.

        Args:
            observation: Each `[E, …]`.
            episode_start: `[E]` bool; the observation begins an episode.
            uniforms: `[E, chance]` float64 in [0, 1), as many as one action takes.
        """


class RandomScript:
    """Every legal choice with equal chance; numbers uniform between finite ends, else standard normal.

    Args:
        action: What an action is.
    """

    def __init__(self, action: ActionSpec) -> None:
        self._action = action
        if not isinstance(action, Choices):
            ends = np.array([action.low, action.high], dtype=np.float64)
            self._bounded = np.isfinite(ends).all(axis=0)

    def choose(self, observation: Mapping[str, Array], episode_start: Array, uniforms: Array) -> Chosen:
        """See `Script`."""
        if isinstance(self._action, Choices):
            return _legal_choices(observation.get("action_mask"), self._action.sizes, uniforms)
        # A world maps [-1, 1] onto what it takes; and 0 is the one uniform number that no normal one belongs to.
        normal = ndtri(np.maximum(uniforms, np.finfo(np.float64).tiny))
        actions = np.where(self._bounded, 2 * uniforms - 1, normal)
        densities = np.where(self._bounded, -np.log(2), -0.5 * (actions**2 + np.log(2 * np.pi)))
        return Chosen(actions.astype(np.float32), densities.sum(axis=1))


def _legal_choices(mask: Array | None, sizes: Sequence[int], uniforms: Array) -> Chosen:
    """Of each head's legal choices the one with the rank that its uniform number says; without a mask all are legal."""
    legal = np.ones((len(uniforms), sum(sizes)), dtype=bool) if mask is None else mask > 0
    chosen, log_probs = np.zeros((len(uniforms), len(sizes)), dtype=np.int64), np.zeros(len(uniforms))
    start = 0
    for head, size in enumerate(sizes):
        counted = np.cumsum(legal[:, start : start + size], axis=1)
        rank = (uniforms[:, head] * counted[:, -1]).astype(np.int64)
        chosen[:, head] = (counted > rank[:, None]).argmax(axis=1)
        log_probs -= np.log(counted[:, -1])
        start += size
    return Chosen(chosen, log_probs)
