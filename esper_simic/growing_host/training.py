"""One training epoch of many hosts at once.

Per batch: one forward pass of all hosts and all their seeds, one backward pass of the sum of their losses (lanes share
nothing, so each gets its own gradient), one row-wise step of the optimiser. Seeds read the host's features without
sending gradients back through them. How sound the gradients were is measured on every batch, whoever looks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as torch_functional
from numpy.typing import NDArray
from torch import Tensor

from esper_simic.growing_host.functional import batch_norm_rectify, graft, max_pool, pointwise_convolution
from esper_simic.growing_host.grafts import GraftPlan, SlotSeeds, plan_graft
from esper_simic.growing_host.parameters import ParameterBank, split_host

VANISHING_NORM: Final = 1e-6
"""A gradient norm below this carries no signal."""

EXPLODING_NORM: Final = 100.0
"""A gradient norm above this, or one that is not finite, has exploded."""


@dataclass(frozen=True, slots=True)
class GradientReport:
    """How sound an epoch's gradients were, before clipping.

    | field | shape | meaning |
    |---|---|---|
    | `layer_norm` | `[E, layers]` | mean norm of each host layer |
    | `seed_norm` | `[E, S]` | mean norm of each seed (0 where none computes) |
    | `health` | `[E, S]` | share of the batches whose norm lies in [`VANISHING_NORM`, `EXPLODING_NORM`] |
    | `vanishing` | `[E, S]` | true where the mean norm lies below `VANISHING_NORM` |
    | `exploding` | `[E, S]` | true where a batch's norm exceeded `EXPLODING_NORM` or was not finite |

    Where no seed computes, `health` is 0 and `vanishing` true: readers mask by stage.
    """

    layer_norm: NDArray[np.float64]
    seed_norm: NDArray[np.float64]
    health: NDArray[np.float64]
    vanishing: NDArray[np.bool_]
    exploding: NDArray[np.bool_]


def report_gradients(squares: NDArray[np.float64], layers: int) -> GradientReport:
    """Summarise the squared gradient norms of an epoch.

    Args:
        squares: `[batches, E, layers + S]`.
        layers: Host layers, which come first on the last axis.
    """
    norms = np.sqrt(np.nan_to_num(squares, nan=np.inf, posinf=np.inf))
    seeds = norms[:, :, layers:]
    finite = np.minimum(norms, 10 * EXPLODING_NORM)
    sound = (seeds >= VANISHING_NORM) & (seeds <= EXPLODING_NORM)
    mean = finite.mean(axis=0)
    return GradientReport(
        layer_norm=mean[:, :layers],
        seed_norm=mean[:, layers:],
        health=sound.mean(axis=0),
        vanishing=mean[:, layers:] < VANISHING_NORM,
        exploding=np.asarray((seeds > EXPLODING_NORM).any(axis=0)),
    )


class Trainer:
    """Trains the hosts of a bank on one task.

    Args:
        bank: What is trained.
        images: `[N, channels * height * width]` training samples.
        labels: `[N]` int64.
        slot_of_block: For each block the slot behind it, or None.
    """

    def __init__(
        self, bank: ParameterBank, images: Tensor, labels: Tensor, slot_of_block: tuple[int | None, ...]
    ) -> None:
        self._bank = bank
        self._images = images
        self._labels = labels
        self._slot_of_block = slot_of_block

    def train_epoch(self, samples: NDArray[np.int64], seeds: tuple[SlotSeeds, ...]) -> GradientReport:
        """Train every lane on its own samples.

        Args:
            samples: `[batches, E, B]` indices of training samples.
            seeds: The seeds that compute, slot by slot.
        """
        bank = self._bank
        bank.gradients.zero_()
        lanes = np.arange(bank.parameters.shape[0])
        plans = tuple(plan_graft(slot, lanes, bank.parameters) for slot in seeds)
        chosen = torch.from_numpy(samples).to(self._images.device)
        squares = [self._train_batch(batch, plans) for batch in chosen]
        return report_gradients(torch.stack(squares).double().cpu().numpy(), bank.layers)

    def _train_batch(self, samples: Tensor, plans: tuple[GraftPlan | None, ...]) -> Tensor:
        bank = self._bank
        lanes, count = samples.shape
        first = bank.spec.blocks[0]
        x = self._images[samples].transpose(1, 2).contiguous()
        x = x.view(lanes, first.channels_in, first.side, first.side, count)
        host = bank.parameters[:, : bank.spec.parameter_count].detach().requires_grad_()
        leaves = {slot: _leaves(bank, slot, plan) for slot, plan in enumerate(plans) if plan is not None}
        logits = self._forward(host, x, plans, leaves)
        loss = torch_functional.cross_entropy(logits, self._labels[samples], reduction="sum") / count
        flat = [leaf for group in leaves.values() for leaf in group]
        gradients = torch.autograd.grad(loss, [host, *flat])
        bank.gradients[:, : bank.spec.parameter_count] = gradients[0]
        self._store(plans, gradients[1:])
        return bank.step()

    def _forward(
        self, host: Tensor, x: Tensor, plans: tuple[GraftPlan | None, ...], leaves: dict[int, list[Tensor]]
    ) -> Tensor:
        """Logits `[E, classes, B]`; updates the running statistics."""
        bank = self._bank
        pieces = split_host(bank.spec, host)
        for index, slot in enumerate(self._slot_of_block):
            x = batch_norm_rectify(
                pointwise_convolution(x, pieces.weights[index]),
                pieces.scales[index],
                pieces.shifts[index],
                bank.running_means[index],
                bank.running_variances[index],
            )
            plan = plans[slot] if slot is not None else None
            if slot is not None and plan is not None:
                x = graft(x, seed_features(plan, leaves[slot], x.detach()), plan.rows, plan.alpha, plan.share)
            x = max_pool(x)
        return torch.baddbmm(pieces.classifier_bias.unsqueeze(2), pieces.classifier_weight, x.mean((2, 3)))

    def _store(self, plans: tuple[GraftPlan | None, ...], gradients: tuple[Tensor, ...]) -> None:
        """Write the seeds' gradients into the bank's flat rows."""
        remaining = iter(gradients)
        for slot, plan in enumerate(plans):
            for group in plan.groups if plan is not None else ():
                gradient = next(remaining)
                segment = self._bank.gradients.narrow(1, self._bank.slot_offsets[slot], gradient.shape[1])
                segment.index_copy_(0, group.lanes, gradient)


def _leaves(bank: ParameterBank, slot: int, plan: GraftPlan) -> list[Tensor]:
    """Parameters of each group of a slot, `[n, P]`, as leaves of the gradient's graph."""
    return [
        seed_parameters(bank, slot, group.blueprint.parameter_count(bank.slot_channels[slot]), group.lanes)
        .detach()
        .requires_grad_()
        for group in plan.groups
    ]


def seed_parameters(bank: ParameterBank, slot: int, count: int, lanes: Tensor) -> Tensor:
    """Rows of a slot's seed parameters: `[n, count]`, a copy."""
    return bank.parameters.narrow(1, bank.slot_offsets[slot], count).index_select(0, lanes)


def seed_features(plan: GraftPlan, parameters: list[Tensor], x: Tensor) -> Tensor:
    """Features of all seeds of a slot, in the plan's order: `[R, C, H, W, B]` gives `[n, C, H, W, B]`."""
    features = [
        group.blueprint.forward(rows, x if group.rows is None else x.index_select(0, group.rows))
        for group, rows in zip(plan.groups, parameters, strict=True)
    ]
    return features[0] if len(features) == 1 else torch.cat(features)
