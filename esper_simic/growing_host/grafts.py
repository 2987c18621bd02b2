"""Which seeds compute now, and how they are computed together.

Lanes differ in what they have grown. For each slot, the rows (hosts, or variants of a host during validation) that
hold a seed are grouped by blueprint, composition and whether the seed is frozen; a group is one operation however many
rows it has, and all groups of a slot join their hosts at once. The work of a step therefore depends on the number of
distinct groups in a slot, never on a loop over lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_simic.actions import BLUEPRINTS
from esper_simic.growing_host.alpha import Composition
from esper_simic.growing_host.blueprints import Blueprint, Kind, blueprint
from esper_simic.growing_host.compositions import Grown, Join, Joins, compose, grow, seed_parameter_count
from esper_simic.growing_host.hosts import HostSpec
from esper_simic.lifecycle import BLENDED, COMPUTING, Bools, Floats, Integers, SeedStage

NO_SEED = -1


@dataclass(frozen=True, slots=True)
class SlotSeeds:
    """The seeds of one slot that compute: for each lane the blueprint, or `NO_SEED`, and how it is blended.

    | field | shape | meaning |
    |---|---|---|
    | `kind` | `[E]` int64 | index into `actions.BLUEPRINTS`, or `NO_SEED` |
    | `alpha` | `[E]` | weight of the seed's features |
    | `composition` | `[E]` int64 | `alpha.Composition` |
    | `frozen` | `[E]` | true where the seed computes but does not learn |
    | `isolated` | `[E]` | true where nothing of the seed's gradient may reach the host: it is in TRAINING |
    """

    kind: NDArray[np.int64]
    alpha: Floats
    composition: NDArray[np.int64]
    frozen: Bools
    isolated: Bools


def seeds_in_training(
    stage: Integers, kind: Integers, alpha: Floats, composition: Integers, frozen: Bools
) -> tuple[SlotSeeds, ...]:
    """The seeds that take part in a training pass, slot by slot.

    A seed in TRAINING is isolated: the host does not feel it, and it learns from the whole gradient. All inputs are
    `[E, S]`.
    """
    isolated = stage == SeedStage.TRAINING
    present = np.where(COMPUTING[stage], kind, NO_SEED).astype(np.int64)
    return _by_slot(present, alpha, composition, frozen, isolated)


def seeds_in_validation(
    stage: Integers, kind: Integers, alpha: Floats, composition: Integers
) -> tuple[SlotSeeds, ...]:
    """The seeds that change what a host computes, slot by slot; all inputs are `[E, S]`."""
    present = np.where(BLENDED[stage], kind, NO_SEED).astype(np.int64)
    nowhere = np.zeros(stage.shape, dtype=np.bool_)
    return _by_slot(present, alpha, composition, nowhere, nowhere)


def _by_slot(
    kind: NDArray[np.int64],
    alpha: Floats,
    composition: Integers,
    frozen: Bools,
    isolated: Bools,
) -> tuple[SlotSeeds, ...]:
    return tuple(
        SlotSeeds(
            kind[:, slot],
            alpha[:, slot],
            composition[:, slot].astype(np.int64),
            frozen[:, slot],
            isolated[:, slot],
        )
        for slot in range(kind.shape[1])
    )


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of one slot whose seeds are computed as one.

    | field | meaning |
    |---|---|
    | `blueprint`, `frozen` | what they share; the composition is the join's |
    | `join` | their rows, and how they join their hosts |
    | `lanes` | `[n]` int64, the lane of each |
    | `attached` | whether a seed's input sends gradients back: for all, for none, or `[n]` bool |
    | `kind` | what the host's features are |
    """

    blueprint: Blueprint
    frozen: bool
    join: Join
    lanes: Tensor
    attached: Tensor | bool
    kind: Kind

    def parameter_count(self, channels: int) -> int:
        """Parameters of one of its seeds behind so many channels."""
        return seed_parameter_count(self.blueprint, self.join.composition, channels, self.kind)

    def grown(self, parameters: Tensor, x: Tensor) -> Grown:
        """What its seeds, with parameters `[n, P]`, compute from the features `[R, ...]` of all rows."""
        return grow(
            self.blueprint,
            self.join.composition,
            parameters,
            self._inputs(x),
            self.kind,
            isolated=self.join.isolated is True,
        )

    def _inputs(self, x: Tensor) -> Tensor:
        """The features its seeds meet, `[n, ...]`, cut off from the gradient where need be."""
        if self.attached is False:
            x = x.detach()
        picked = x if self.join.rows is None else x.index_select(0, self.join.rows)
        if isinstance(self.attached, bool):
            return picked
        return torch.where(self.attached.view(-1, *([1] * (x.dim() - 1))), picked, picked.detach())


@dataclass(frozen=True, slots=True)
class GraftPlan:
    """All groups of one slot, and how they join their hosts: prepared once for all batches of a pass."""

    slot: int
    groups: tuple[Group, ...]
    joins: Joins

    def graft(self, parameters: list[Tensor], x: Tensor) -> Tensor:
        """Let the seeds join the features of their rows.

        Args:
            parameters: Flat rows `[n, P]` of each group's seeds.
            x: `[R, C, H, W, B]`.

        Returns:
            `[R, C, H, W, B]`; rows without a seed are untouched.
        """
        grown = [group.grown(rows, x) for group, rows in zip(self.groups, parameters, strict=True)]
        return compose(x, self.joins, grown)


def plan_graft(
    slot: int,
    seeds: SlotSeeds,
    lane_of_row: NDArray[np.int64],
    spec: HostSpec,
    like: Tensor,
    *,
    where: Bools | None = None,
) -> GraftPlan | None:
    """Group the rows of one slot by blueprint, composition and whether the seed is frozen.

    Args:
        slot: The slot.
        seeds: Its seeds, by lane.
        lane_of_row: `[R]` the lane each row belongs to.
        spec: The host; on some kinds blended seeds send gradients back through their inputs.
        like: A tensor whose dtype and device the plan takes.
        where: `[R]` which rows have their lane's seed; all by default.

    Returns:
        The plan, or None where no row has a seed in this slot.
    """
    kind = seeds.kind[lane_of_row]
    present = np.flatnonzero(kind != NO_SEED if where is None else (kind != NO_SEED) & where)
    if not len(present):
        return None
    keys = np.stack((seeds.composition[lane_of_row], kind, seeds.frozen[lane_of_row]))[:, present]
    distinct, group_of = np.unique(keys, axis=1, return_inverse=True)
    everywhere = len(present) == len(kind) and distinct.shape[1] == 1
    groups = []
    for index, (composition, name, frozen) in enumerate(distinct.T.tolist()):
        rows = present[group_of == index]
        lanes = lane_of_row[rows]
        isolated = seeds.isolated[lanes]
        join = Join(
            Composition(composition),
            None if everywhere else _tensor(rows, like),
            torch.as_tensor(seeds.alpha[lanes], dtype=like.dtype, device=like.device),
            _one_or_each(isolated, like),
        )
        attached = _one_or_each(~isolated & spec.seeds_adapt_host, like)
        found = blueprint(BLUEPRINTS[name])
        groups.append(Group(found, bool(frozen), join, _tensor(lanes, like), attached, spec.kind))
    return GraftPlan(slot, tuple(groups), Joins.of([group.join for group in groups]))


def _one_or_each(values: Bools, like: Tensor) -> Tensor | bool:
    """One answer where all agree, otherwise all answers."""
    return bool(values[0]) if (values == values[0]).all() else _tensor(values, like)


def _tensor(values: NDArray[np.int64] | Bools, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device)
