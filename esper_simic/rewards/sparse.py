"""SPARSE, MINIMAL and SIMPLIFIED: little more than what was reached in the end.

None of them pays for never fossilising: SPARSE and MINIMAL count the accuracy of the *committed* network, the host with
its fossils alone, and SIMPLIFIED pays for fossils.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_simic.actions import Op
from esper_simic.config_rewards import RewardConfig
from esper_simic.errors import ContractError
from esper_simic.rewards.basic import terminal_accuracy
from esper_simic.rewards.outcome import Outcome
from esper_simic.rewards.potential import shaping

SPARSE_PARTS: Final = ("terminal_accuracy", "terminal_parameters")
"""Names of the parts of the SPARSE reward; they sum to it."""

MINIMAL_PARTS: Final = (*SPARSE_PARTS, "early_prune")
"""Names of the parts of the MINIMAL reward."""

SIMPLIFIED_PARTS: Final = ("shaping", "action", "terminal_accuracy", "terminal_fossils")
"""Names of the parts of the SIMPLIFIED reward."""


def sparse(outcome: Outcome, weights: RewardConfig) -> dict[str, NDArray[np.float64]]:
    """The SPARSE reward: `clip(committed / 100 - 0.1 fossil parameters / budget, -1, 1)` at the horizon, else 0.

    The bound takes its share from `terminal_parameters`, so that the parts sum to the reward.

    Returns:
        Name to `[E]` float64, in the order of `SPARSE_PARTS`.

    Raises:
        ContractError: The committed accuracy of a lane at its horizon is unknown.
    """
    unknown = outcome.terminated & np.isnan(outcome.committed_accuracy)
    if unknown.any():
        raise ContractError(
            f"the committed accuracy of lane {np.flatnonzero(unknown)[0]} is unknown at its horizon: the outcome must "
            "give the accuracy with the fossils alone there"
        )
    rules = weights.sparse
    budget = outcome.host_parameters if rules.parameter_budget is None else rules.parameter_budget
    reached = outcome.committed_accuracy / 100.0
    cost = rules.parameter_weight * outcome.fossil_parameters / budget
    total = np.clip(reached - cost, -1.0, 1.0)
    return {
        "terminal_accuracy": np.where(outcome.terminated, reached, 0.0),
        "terminal_parameters": np.where(outcome.terminated, total - reached, 0.0),
    }


def minimal(outcome: Outcome, weights: RewardConfig) -> dict[str, NDArray[np.float64]]:
    """The MINIMAL reward: SPARSE, and -0.1 for pruning a seed before its fifth epoch.

    Returns:
        Name to `[E]` float64, in the order of `MINIMAL_PARTS`.

    Raises:
        ContractError: As `sparse`.
    """
    rules = weights.sparse
    early = outcome.happened(Op.PRUNE) & (outcome.age_before < rules.prune_young_age)
    return sparse(outcome, weights) | {"early_prune": -rules.prune_young_cost * early.sum(axis=-1)}


def simplified(outcome: Outcome, weights: RewardConfig, *, gamma: float) -> dict[str, NDArray[np.float64]]:
    """The SIMPLIFIED reward: shaping, -0.01 for acting at all, `3 accuracy / 100 + 2 fossils` at the horizon.

    Only fossils that contribute are counted. There is no rent: it says nothing about which blueprint is worth its size.

    Returns:
        Name to `[E]` float64, in the order of `SIMPLIFIED_PARTS`.
    """
    rules = weights.simplified
    fossils = outcome.contributing_fossils(rules.contribution_min)
    return {
        "shaping": shaping(outcome, weights, weights.potential_weight, gamma),
        "action": np.where(outcome.op == Op.WAIT, 0.0, -rules.action_cost),
        "terminal_accuracy": terminal_accuracy(outcome, rules.terminal_accuracy_weight / 100.0),
        "terminal_fossils": np.where(outcome.terminated, rules.terminal_fossil_weight * fossils, 0.0),
    }
