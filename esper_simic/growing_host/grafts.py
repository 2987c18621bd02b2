"""Which seeds compute now, and how they are computed together.

Lanes differ in what they have grown. For each slot, the rows (hosts, or variants of a host during validation) that
hold a seed are grouped by blueprint; a group is one operation however many rows it has, and the results of all groups
of a slot are blended into the hosts at once. The work of a step therefore depends on the number of distinct
blueprints in a slot, never on a loop over lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_simic.actions import BLUEPRINTS
from esper_simic.growing_host.blueprints import Blueprint, blueprint
from esper_simic.lifecycle import BLENDED, COMPUTING, Floats, Integers, SeedStage

NO_SEED = -1


@dataclass(frozen=True, slots=True)
class SlotSeeds:
    """The seeds of one slot that compute: for each lane the blueprint, or `NO_SEED`, and how it is blended.

    | field | shape | meaning |
    |---|---|---|
    | `kind` | `[E]` int64 | index into `actions.BLUEPRINTS`, or `NO_SEED` |
    | `alpha` | `[E]` | weight of the seed's features |
    | `share` | `[E]` | share of the output's gradient that the seed gets |
    """

    kind: NDArray[np.int64]
    alpha: Floats
    share: Floats


def seeds_in_training(stage: Integers, kind: Integers, alpha: Floats) -> tuple[SlotSeeds, ...]:
    """The seeds that take part in a training pass, slot by slot.

    A seed in TRAINING is isolated: alpha 0, the whole gradient. All inputs are `[E, S]`.
    """
    isolated = stage == SeedStage.TRAINING
    present = np.where(COMPUTING[stage], kind, NO_SEED)
    weight = np.where(isolated, 0.0, alpha)
    share = np.where(isolated, 1.0, alpha)
    return tuple(
        SlotSeeds(present[:, slot].astype(np.int64), weight[:, slot], share[:, slot])
        for slot in range(stage.shape[1])
    )


def seeds_in_validation(stage: Integers, kind: Integers, alpha: Floats) -> tuple[SlotSeeds, ...]:
    """The seeds that change what a host computes, slot by slot; all inputs are `[E, S]`."""
    present = np.where(BLENDED[stage], kind, NO_SEED)
    return tuple(
        SlotSeeds(present[:, slot].astype(np.int64), alpha[:, slot], alpha[:, slot])
        for slot in range(stage.shape[1])
    )


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of one slot whose seeds share a blueprint; `rows` is None when they are all rows in order."""

    blueprint: Blueprint
    rows: Tensor | None
    lanes: Tensor


@dataclass(frozen=True, slots=True)
class GraftPlan:
    """All groups of one slot, and the blending of their concatenated results.

    | field | shape | meaning |
    |---|---|---|
    | `rows` | `[n]` int64 or None | row of each seed, in group order; None for all rows in order |
    | `alpha`, `share` | `[n]` | see `SlotSeeds` |
    """

    groups: tuple[Group, ...]
    rows: Tensor | None
    alpha: Tensor
    share: Tensor


def plan_graft(seeds: SlotSeeds, lane_of_row: NDArray[np.int64], like: Tensor) -> GraftPlan | None:
    """Group the rows of one slot by blueprint.

    Args:
        seeds: The slot's seeds, by lane.
        lane_of_row: `[R]` the lane each row belongs to.
        like: A tensor whose dtype and device the plan takes.

    Returns:
        The plan, or None where no row has a seed in this slot.
    """
    kind = seeds.kind[lane_of_row]
    kinds = np.unique(kind)
    everywhere = len(kinds) == 1
    groups, ordered = [], []
    for index in kinds:
        if index == NO_SEED:
            continue
        rows = np.flatnonzero(kind == index)
        lanes = torch.from_numpy(lane_of_row[rows]).to(like.device)
        chosen = None if everywhere else torch.from_numpy(rows).to(like.device)
        groups.append(Group(blueprint(BLUEPRINTS[index]), chosen, lanes))
        ordered.append(rows)
    if not groups:
        return None
    order = np.concatenate(ordered)
    lanes_in_order = lane_of_row[order]
    return GraftPlan(
        tuple(groups),
        None if everywhere else torch.from_numpy(order).to(like.device),
        torch.as_tensor(seeds.alpha[lanes_in_order], dtype=like.dtype, device=like.device),
        torch.as_tensor(seeds.share[lanes_in_order], dtype=like.dtype, device=like.device),
    )
