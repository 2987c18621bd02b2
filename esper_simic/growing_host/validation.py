"""One fused validation pass: every host, and variants of it that leave some of its seeds out.

A *row* is a host or a variant of it. The pass starts with one row per host. At each slot, the rows whose variants
disagree about the seed there are copied, and the copies leave the seed out; so variants part at the first slot at which
they differ, the trunk in front of it is computed once, and the work grows only with what is really different. Running
statistics are folded into the weights once a pass, and rows pick theirs.

Samples go through in chunks and lanes in tiles, so that features stay in a core's cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as torch_functional
from numpy.typing import NDArray
from torch import Tensor

from esper_simic.errors import InvariantViolation
from esper_simic.growing_host.counterfactual import Variants
from esper_simic.growing_host.grafts import NO_SEED, GraftPlan, SlotSeeds, plan_graft
from esper_simic.growing_host.hosts.layers import Pieces
from esper_simic.growing_host.parameters import ParameterBank
from esper_simic.growing_host.trunk import flow_order, tiles, walk
from esper_simic.lifecycle import Bools

CHUNK_ELEMENTS: Final = 2**12
CHUNK_SAMPLES_MIN: Final = 64
"""A chunk has so many samples, and more where all of them together have no more than `CHUNK_ELEMENTS` numbers."""

TILE_ELEMENTS: Final = 2**20
"""Numbers that the widest features of a chunk may have, over all lanes of a tile."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a validation pass found, of n hosts and V variants of them.

    | field | shape | meaning |
    |---|---|---|
    | `accuracy` | `[n]` | percent of the labels that were given rightly (of tokens: of all positions) |
    | `loss` | `[n]` | mean cross-entropy of a label, in nats |
    | `variant_accuracy`, `variant_loss` | `[V]` | the same of the variants |
    """

    accuracy: NDArray[np.float64]
    loss: NDArray[np.float64]
    variant_accuracy: NDArray[np.float64]
    variant_loss: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _SlotStep:
    """What happens at a slot: rows `copied` are repeated behind the last one, then seeds are blended in."""

    copied: Tensor | None
    plan: GraftPlan | None
    seed_rows: list[Tensor]

    def apply(self, x: Tensor) -> Tensor:
        """`[R, ...]` to `[R + copies, ...]`."""
        grown = x if self.plan is None else self.plan.graft(self.seed_rows, x)
        # The copies are taken in front of the seeds, which none of them has.
        return grown if self.copied is None else torch.cat((grown, x.index_select(0, self.copied)))


@dataclass(frozen=True, slots=True)
class _Pass:
    """A whole pass over one tile: prepared pieces of each layer's rows, and the final row of each host and variant."""

    stem: Pieces
    blocks: tuple[Pieces, ...]
    head: Pieces
    final_stem: Pieces
    steps: tuple[_SlotStep, ...]
    row: NDArray[np.int64]


class Validator:
    """Measures the hosts of a bank on fixed samples.

    Args:
        bank: What is measured.
        inputs: `[N, ...]` validation samples, of the bank's dtype, or int64 tokens `[N, L]`.
        labels: `[N]` int64, or `[N, L]` for tokens.
    """

    def __init__(self, bank: ParameterBank, inputs: Tensor, labels: Tensor) -> None:
        self._bank = bank
        self._labels = labels.numel()
        self._chunk = max(CHUNK_SAMPLES_MIN, CHUNK_ELEMENTS // bank.spec.features_max)
        chunks = zip(torch.split(inputs, self._chunk), torch.split(labels, self._chunk), strict=True)
        # Positions first and samples innermost, like the logits.
        self._chunks = [
            (part.flatten(1).t().contiguous().unsqueeze(0), part_labels.t().reshape(1, -1))
            for part, part_labels in chunks
        ]

    def measure(
        self, seeds: tuple[SlotSeeds, ...], variants: Variants, lanes: NDArray[np.int64] | None = None
    ) -> Measurement:
        """Measure hosts, and variants of them.

        Args:
            seeds: The seeds that change what hosts compute, slot by slot.
            variants: Which variants of the hosts are measured, too; of measured lanes only.
            lanes: `[n]` the hosts to measure, each at most once; all by default.

        Raises:
            InvariantViolation: A variant of a lane that is not measured.
        """
        every = np.arange(self._bank.lanes) if lanes is None else np.asarray(lanes)
        position = np.full(self._bank.lanes, -1)
        position[every] = np.arange(len(every))
        host = position[variants.lane]
        if (host < 0).any():
            raise InvariantViolation(f"variants of lanes {np.unique(variants.lane[host < 0])} not measured")
        accuracy, loss = np.zeros((2, len(every))), np.zeros((2, len(host)))
        with torch.no_grad():
            width = self._bank.spec.features_max * self._chunk
            for start, end in tiles(len(every), width, TILE_ELEMENTS):
                own = np.flatnonzero((host >= start) & (host < end))
                right, nats = self._measure_tile(
                    seeds, every[start:end], host[own] - start, variants.keep[own]
                )
                hosts = end - start
                accuracy[0, start:end], accuracy[1, start:end] = right[:hosts], nats[:hosts]
                loss[0, own], loss[1, own] = right[hosts:], nats[hosts:]
        return Measurement(accuracy[0], accuracy[1], loss[0], loss[1])

    def _measure_tile(
        self, seeds: tuple[SlotSeeds, ...], lanes: NDArray[np.int64], host: NDArray[np.int64], keep: Bools
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Accuracy and loss of each host of a tile, then of its variants."""
        whole = self._plan(seeds, lanes, host, keep)
        right: Tensor | int = 0
        nats: Tensor | float = 0.0
        for inputs, labels in self._chunks:
            logits = self._logits(inputs, whole)
            # Right where no class scores as high as the label's own; argmax is a dozen times slower here.
            own = logits.gather(1, labels.expand(len(logits), 1, -1))
            right = right + ((logits >= own).sum(1) == 1).sum(1)
            spread = torch_functional.cross_entropy(logits, labels.expand(len(logits), -1), reduction="none")
            nats = nats + spread.sum(1)
        both = torch.stack((torch.as_tensor(right).double() * 100, torch.as_tensor(nats).double()))
        by_row = both.cpu().numpy()[:, whole.row] / self._labels
        return by_row[0], by_row[1]

    def _plan(
        self, seeds: tuple[SlotSeeds, ...], lanes: NDArray[np.int64], host: NDArray[np.int64], keep: Bools
    ) -> _Pass:
        """Lay out the rows of a pass over some lanes, slot by slot."""
        bank = self._bank
        pieces = bank.spec.split(bank.parameters[:, : bank.spec.parameter_count])
        rows = _Rows(lanes, host, keep)
        stem = rows.picked(pieces.stem)
        blocks: list[Pieces] = []
        steps: dict[int, _SlotStep] = {}
        remaining = flow_order(bank.places)
        for index, block in enumerate(bank.spec.blocks):
            blocks.append(rows.picked(block.prepare(pieces.blocks[index], bank.statistics[index])))
            while remaining and bank.places[remaining[0]].block == index:
                slot = remaining.pop(0)
                steps[slot] = self._step(slot, seeds[slot], rows)
        by_slot = tuple(steps[slot] for slot in range(len(bank.places)))
        return _Pass(
            stem, tuple(blocks), rows.picked(pieces.head), rows.picked(pieces.stem), by_slot, rows.row
        )

    def _step(self, slot: int, seeds: SlotSeeds, rows: _Rows) -> _SlotStep:
        bank = self._bank
        lane_of_row = rows.lane
        on, copied = rows.part(slot, seeds)
        plan = plan_graft(slot, seeds, lane_of_row, bank.spec, bank.parameters, where=on)
        seed_rows = []
        for group in plan.groups if plan is not None else ():
            count = group.parameter_count(bank.slot_channels[slot])
            segment = bank.parameters.narrow(1, bank.slot_offsets[slot], count)
            seed_rows.append(segment.index_select(0, group.lanes))
        chosen = torch.from_numpy(copied).to(bank.parameters.device) if len(copied) else None
        return _SlotStep(chosen, plan, seed_rows)

    def _logits(self, inputs: Tensor, whole: _Pass) -> Tensor:
        """Logits of one chunk of samples: `[1, F, B]` gives `[rows, classes, n]`."""
        spec = self._bank.spec

        def block(index: int, x: Tensor) -> Tensor:
            return spec.blocks[index].forward_measure(whole.blocks[index], x)

        def slot(index: int, x: Tensor) -> Tensor:
            return whole.steps[index].apply(x)

        x = walk(spec.blocks, self._bank.places, spec.stem.forward(whole.stem, inputs), block, slot)
        return spec.head.forward(whole.head, whole.final_stem, x)


class _Rows:
    """The rows of a pass while it is laid out.

    | field | shape | meaning |
    |---|---|---|
    | `lane` | `[R]` | the lane of each row so far |
    | `row` | `[n + V]` | the row so far of each host, then of each variant |
    """

    def __init__(self, lanes: NDArray[np.int64], host: NDArray[np.int64], keep: Bools) -> None:
        self.lane = lanes
        self.row = np.concatenate((np.arange(len(lanes)), host))
        self._kept = np.concatenate((np.ones((len(lanes), keep.shape[1]), dtype=np.bool_), keep))

    def part(self, slot: int, seeds: SlotSeeds) -> tuple[Bools, NDArray[np.int64]]:
        """Part hosts and variants that disagree about a slot's seed.

        Returns:
            `[R]` true for the rows that have the seed, and the rows that are copied to leave it out; where the lane
            has no seed there, nobody disagrees.
        """
        count = len(self.lane)
        here = self._kept[:, slot] | (seeds.kind[self.lane[self.row]] == NO_SEED)
        on, off = np.zeros((2, count), dtype=np.bool_)
        on[self.row[here]] = True
        off[self.row[~here]] = True
        copied = np.flatnonzero(on & off)
        copy_of = np.arange(count)
        copy_of[copied] = count + np.arange(len(copied))
        self.row = np.where(here, self.row, copy_of[self.row])
        self.lane = np.concatenate((self.lane, self.lane[copied]))
        return on, copied

    def picked(self, pieces: Pieces) -> Pieces:
        """Each row's pieces, from those of all lanes."""
        if not pieces:
            return ()
        chosen = torch.from_numpy(self.lane).to(pieces[0].device)
        return tuple(piece.index_select(0, chosen) for piece in pieces)
