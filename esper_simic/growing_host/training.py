"""One training epoch of many hosts at once.

Per batch: one forward pass of all hosts and all their seeds, one backward pass of the sum of their losses (lanes share
nothing, so each gets its own gradient), one row-wise step of the optimiser. How sound the gradients were is measured
on every batch, whoever looks.

**Isolation.** A seed reads the host's features without sending gradients back through them: always while it is in
TRAINING, and in every stage on hosts of convolutions; on transformers a blended seed and its host adapt to each other.
A frozen seed computes but does not learn: its parameters and momentum do not move. What lies in a slot whose seed does
not compute is not touched.

**Tiles.** Lanes are trained a tile at a time, each tile through the whole epoch: as many as keep the features of a
batch in a core's cache. A tile's parameters are copied out of the bank once an epoch, trained in place and written
back, so that nothing is gathered or scattered batch by batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as torch_functional
from numpy.typing import NDArray
from torch import Tensor

from esper_simic.config import EnvironmentConfig
from esper_simic.growing_host.grafts import GraftPlan, Group, SlotSeeds, plan_graft
from esper_simic.growing_host.hosts import HostPieces, Statistics
from esper_simic.growing_host.optimiser import Trained, descend
from esper_simic.growing_host.parameters import ParameterBank, layer_squares
from esper_simic.growing_host.trunk import tiles, walk

VANISHING_NORM: Final = 1e-6
"""A gradient norm below this carries no signal."""

EXPLODING_NORM: Final = 100.0
"""A gradient norm above this, or one that is not finite, has exploded."""

TILE_ELEMENTS: Final = 2**20
"""Numbers that the widest features of a batch may have, over all lanes of a tile."""

GATHERED_WHOLE_MAX: Final = 512
"""Numbers in a sample up to which the samples of all lanes are gathered at once; larger ones lane by lane."""


@dataclass(frozen=True, slots=True)
class GradientReport:
    """How sound an epoch's gradients were, before clipping.

    | field | shape | meaning |
    |---|---|---|
    | `layer_norm` | `[E, layers]` | mean norm of each host layer |
    | `seed_norm` | `[E, S]` | mean norm of each seed (0 where none learns) |
    | `health` | `[E, S]` | share of the batches whose norm lies in [`VANISHING_NORM`, `EXPLODING_NORM`] |
    | `vanishing` | `[E, S]` | true where the mean norm lies below `VANISHING_NORM` |
    | `exploding` | `[E, S]` | true where a batch's norm exceeded `EXPLODING_NORM` or was not finite |

    Where no seed learns, `health` is 0 and `vanishing` true: readers mask by stage.
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
        inputs: `[N, ...]` training samples, of the bank's dtype, or int64 tokens `[N, L]`.
        labels: `[N]` int64, or `[N, L]` for tokens.
        config: Learning rates, momentum, clipping.
    """

    def __init__(
        self, bank: ParameterBank, inputs: Tensor, labels: Tensor, config: EnvironmentConfig
    ) -> None:
        self._bank = bank
        self._inputs = inputs.flatten(1)
        self._labels = labels
        self._config = config

    def train_epoch(self, samples: NDArray[np.int64], seeds: tuple[SlotSeeds, ...]) -> GradientReport:
        """Train every lane on its own samples.

        Args:
            samples: `[batches, E, B]` indices of training samples.
            seeds: The seeds that compute, slot by slot.
        """
        bank = self._bank
        batches, lanes, count = samples.shape
        chosen = torch.from_numpy(samples).to(self._inputs.device)
        squares = np.zeros((batches, lanes, bank.layers + len(seeds)))
        for start, end in tiles(lanes, bank.spec.features_max * count, TILE_ELEMENTS):
            tile = _Tile(bank, seeds, start, end, self._config)
            measured = [tile.train_batch(*self._gathered(batch)) for batch in chosen[:, start:end].unbind(0)]
            tile.write_back()
            squares[:, start:end] = torch.stack(measured).double().cpu().numpy()
        return report_gradients(squares, bank.layers)

    def _gathered(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs `[E, F, B]` and labels `[E, n]` of samples `[E, B]`."""
        if self._inputs.shape[1] <= GATHERED_WHOLE_MAX:
            inputs = self._inputs[samples].transpose(1, 2).contiguous()
        else:
            # A plain transposition of each lane's samples is several times faster than that of all of them.
            shape = (len(samples), self._inputs.shape[1], samples.shape[1])
            inputs = torch.empty(shape, dtype=self._inputs.dtype, device=self._inputs.device)
            for lane, own in enumerate(samples):
                inputs[lane].copy_(self._inputs.index_select(0, own).t())
        labels = self._labels[samples]
        if labels.dim() == 3:  # every position of every sample has one: positions first, like the logits
            labels = labels.transpose(1, 2).flatten(1)
        return inputs, labels


class _Tile:
    """Neighbouring lanes during one epoch, with copies of all that is trained in them."""

    def __init__(
        self,
        bank: ParameterBank,
        seeds: tuple[SlotSeeds, ...],
        start: int,
        end: int,
        config: EnvironmentConfig,
    ) -> None:
        self._bank = bank
        self._config = config
        self._lanes = slice(start, end)
        self._first = start
        count = bank.spec.parameter_count
        self._host = Trained(
            bank.parameters[start:end, :count].clone(),
            bank.momentum[start:end, :count].clone(),
            config.host_lr,
        )
        self._statistics = tuple(
            Statistics(each.mean[start:end], each.variance[start:end]) for each in bank.statistics
        )
        lanes = np.arange(start, end)
        self._plans = tuple(
            plan_graft(slot, slot_seeds, lanes, bank.spec, bank.parameters)
            for slot, slot_seeds in enumerate(seeds)
        )
        self._seeds = {
            plan.slot: [self._seed_rows(plan, index) for index in range(len(plan.groups))]
            for plan in self._plans
            if plan is not None
        }

    def _seed_rows(self, plan: GraftPlan, index: int) -> Trained:
        group = plan.groups[index]
        start = self._bank.slot_offsets[plan.slot]
        count = group.parameter_count(self._bank.slot_channels[plan.slot])
        return Trained(
            self._bank.parameters.narrow(1, start, count).index_select(0, group.lanes),
            self._bank.momentum.narrow(1, start, count).index_select(0, group.lanes),
            self._config.seed_lr,
        )

    def train_batch(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """One step; the squared gradient norms `[tile, layers + S]` before clipping."""
        spec = self._bank.spec
        host = self._host.leaf()
        leaves = {
            slot: [
                rows.parameters if group.frozen else rows.leaf()
                for rows, group in zip(trained, self._groups(slot), strict=True)
            ]
            for slot, trained in self._seeds.items()
        }
        pieces = spec.split(host)
        x = self._trunk(pieces, inputs, leaves)
        logits = spec.head.forward(pieces.head, pieces.stem, x)
        loss = torch_functional.cross_entropy(logits, labels, reduction="sum") / labels.shape[1]
        learning = [leaf for group in leaves.values() for leaf in group if leaf.requires_grad]
        gradients = torch.autograd.grad(loss, [host, *learning])
        return self._step(gradients)

    def _trunk(self, pieces: HostPieces, inputs: Tensor, leaves: dict[int, list[Tensor]]) -> Tensor:
        def block(index: int, x: Tensor) -> Tensor:
            layer = self._bank.spec.blocks[index]
            return layer.forward_train(pieces.blocks[index], x, self._statistics[index])

        def slot(index: int, x: Tensor) -> Tensor:
            plan = self._plans[index]
            return x if plan is None else plan.graft(leaves[index], x)

        spec = self._bank.spec
        return walk(spec.blocks, self._bank.places, spec.stem.forward(pieces.stem, inputs), block, slot)

    def _step(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """Move the host and all learning seeds."""
        layers = self._bank.layers
        host_squares = layer_squares(self._bank.spec, gradients[0])
        squares = torch.zeros(
            len(host_squares), layers + len(self._plans), dtype=host_squares.dtype, device=host_squares.device
        )
        squares[:, :layers] = host_squares
        self._descend(self._host, gradients[0], host_squares.sum(1))
        remaining = iter(gradients[1:])
        for slot, trained in self._seeds.items():
            for rows, group in zip(trained, self._groups(slot), strict=True):
                if group.frozen:
                    continue
                gradient = next(remaining)
                square = torch.linalg.vecdot(gradient, gradient)
                squares[group.lanes - self._first, layers + slot] = square
                self._descend(rows, gradient, square)
        return squares

    def _descend(self, rows: Trained, gradient: Tensor, square: Tensor) -> None:
        descend(rows, gradient, square, decay=self._config.momentum, limit=self._config.max_grad_norm)

    def write_back(self) -> None:
        """Put what has been trained into the bank."""
        count = self._bank.spec.parameter_count
        self._bank.parameters[self._lanes, :count] = self._host.parameters
        self._bank.momentum[self._lanes, :count] = self._host.momentum
        for slot, trained in self._seeds.items():
            start = self._bank.slot_offsets[slot]
            for rows, group in zip(trained, self._groups(slot), strict=True):
                size = rows.parameters.shape[1]
                self._bank.parameters.narrow(1, start, size).index_copy_(0, group.lanes, rows.parameters)
                self._bank.momentum.narrow(1, start, size).index_copy_(0, group.lanes, rows.momentum)

    def _groups(self, slot: int) -> tuple[Group, ...]:
        plan = self._plans[slot]
        return () if plan is None else plan.groups
