"""One fused validation pass: every host, and every host with one of its seeds switched off.

A *row* is a host or a variant of it. The pass starts with one row per host. Behind the block of slot s, each host
whose seed there is to be ablated gets one more row, which leaves the seed out; rows are computed together from there
on, so the trunk in front of a slot is computed once, and the work grows with the number of live blended seeds only.
Batch normalisation uses the running statistics and is folded into the convolution in front of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as torch_functional
from numpy.typing import NDArray
from torch import Tensor

from esper_simic.growing_host.functional import EPSILON, graft, max_pool
from esper_simic.growing_host.grafts import GraftPlan, SlotSeeds, plan_graft
from esper_simic.growing_host.parameters import HostPieces, ParameterBank, split_host
from esper_simic.growing_host.training import seed_features, seed_parameters
from esper_simic.lifecycle import Bools

CHUNK_SAMPLES: Final = 64
"""Samples computed together, so that the features of a few dozen hosts stay in a core's cache."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a validation pass found.

    | field | shape | meaning |
    |---|---|---|
    | `accuracy` | `[n]` | percent of the samples that were classified rightly |
    | `loss` | `[n]` | mean cross-entropy, in nats |
    | `accuracy_without` | `[n, S]` | accuracy with the seed of a slot switched off; NaN where not ablated |
    """

    accuracy: NDArray[np.float64]
    loss: NDArray[np.float64]
    accuracy_without: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _BlockStep:
    """What one block does to the rows that reach it: an affine map per row, then its slot's seeds.

    `ablated` are the rows that are copied before the seeds are blended in; the copies become the last rows.
    """

    weight: Tensor
    bias: Tensor
    ablated: Tensor | None
    plan: GraftPlan | None
    seed_rows: list[Tensor]


@dataclass(frozen=True, slots=True)
class _Pass:
    """A whole pass: its blocks, the classifier of each final row, and what each variant row leaves out."""

    blocks: list[_BlockStep]
    classifier_weight: Tensor
    classifier_bias: Tensor
    variant_host: NDArray[np.int64]
    variant_slot: NDArray[np.int64]


class Validator:
    """Measures the hosts of a bank on fixed samples.

    Args:
        bank: What is measured.
        images: `[N, channels, height, width]` validation samples.
        labels: `[N]` int64.
        slot_of_block: For each block the slot behind it, or None.
    """

    def __init__(
        self, bank: ParameterBank, images: Tensor, labels: Tensor, slot_of_block: tuple[int | None, ...]
    ) -> None:
        self._bank = bank
        self._slot_of_block = slot_of_block
        self._samples = len(labels)
        chunks = zip(torch.split(images, CHUNK_SAMPLES), torch.split(labels, CHUNK_SAMPLES), strict=True)
        self._chunks = [(part.permute(1, 2, 3, 0).contiguous(), part_labels) for part, part_labels in chunks]

    def measure(
        self, seeds: tuple[SlotSeeds, ...], ablate: Bools, lanes: NDArray[np.int64] | None = None
    ) -> Measurement:
        """Measure hosts, and each of their seeds in `ablate`.

        Args:
            seeds: The seeds that change what hosts compute, slot by slot.
            ablate: `[E, S]` true where the accuracy without that seed is wanted; only where a seed is.
            lanes: `[n]` the hosts to measure; all by default.
        """
        every = np.arange(len(self._bank.parameters)) if lanes is None else lanes
        with torch.no_grad():
            whole = self._plan(seeds, ablate, every)
            device = self._bank.parameters.device
            correct = torch.zeros(len(every) + len(whole.variant_host), dtype=torch.int64, device=device)
            loss = torch.zeros(len(every), dtype=self._bank.parameters.dtype, device=device)
            for images, labels in self._chunks:
                logits = _logits(images, whole)
                # Right where no class scores as high as the label's own; argmax is a dozen times slower here.
                own = logits.gather(1, labels.expand(len(logits), 1, -1))
                correct += ((logits >= own).sum(1) == 1).sum(1)
                own_labels = labels.expand(len(every), -1)
                loss += torch_functional.cross_entropy(
                    logits[: len(every)], own_labels, reduction="none"
                ).sum(1)
        accuracy = correct.cpu().numpy() * (100 / self._samples)
        accuracy_without = np.full((len(every), len(seeds)), np.nan)
        accuracy_without[whole.variant_host, whole.variant_slot] = accuracy[len(every) :]
        return Measurement(
            accuracy[: len(every)], loss.double().cpu().numpy() / self._samples, accuracy_without
        )

    def _plan(self, seeds: tuple[SlotSeeds, ...], ablate: Bools, lanes: NDArray[np.int64]) -> _Pass:
        """Lay out the rows of a pass, block by block."""
        bank = self._bank
        device = bank.parameters.device
        host = split_host(bank.spec, bank.parameters[:, : bank.spec.parameter_count])
        lane_of_row = lanes
        blocks: list[_BlockStep] = []
        variant_host, variant_slot = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for index, slot in enumerate(self._slot_of_block):
            weight, bias = self._fold(host, index)
            chosen = torch.from_numpy(lane_of_row).to(device)
            ablated, plan, seed_rows = None, None, list[Tensor]()
            if slot is not None:
                plan = plan_graft(seeds[slot], lane_of_row, bank.parameters)
                seed_rows = [
                    seed_parameters(
                        bank, slot, group.blueprint.parameter_count(bank.slot_channels[slot]), group.lanes
                    )
                    for group in (plan.groups if plan is not None else ())
                ]
                hosts = np.flatnonzero(ablate[lanes, slot])
                if len(hosts):
                    ablated = torch.from_numpy(hosts).to(device)
                    lane_of_row = np.concatenate((lane_of_row, lanes[hosts]))
                    variant_host.append(hosts)
                    variant_slot.append(np.full(len(hosts), slot))
            blocks.append(_BlockStep(weight[chosen], bias[chosen], ablated, plan, seed_rows))
        chosen = torch.from_numpy(lane_of_row).to(device)
        return _Pass(
            blocks,
            host.classifier_weight[chosen],
            host.classifier_bias[chosen].unsqueeze(2),
            np.concatenate(variant_host),
            np.concatenate(variant_slot),
        )

    def _fold(self, host: HostPieces, index: int) -> tuple[Tensor, Tensor]:
        """Convolution and normalisation of a block as one affine map: `[E, O, I]` and `[E, O, 1]`."""
        bank = self._bank
        slope = host.scales[index] * torch.rsqrt(bank.running_variances[index] + EPSILON)
        bias = host.shifts[index] - bank.running_means[index] * slope
        return host.weights[index] * slope.unsqueeze(2), bias.unsqueeze(2)


def _logits(images: Tensor, whole: _Pass) -> Tensor:
    """Logits of one chunk of samples: `[C, H, W, B]` gives `[rows, classes, B]`."""
    x = images.unsqueeze(0)
    for block in whole.blocks:
        rows, outputs, inputs = block.weight.shape
        side, samples = x.shape[2], x.shape[4]
        if len(x) == rows:
            flat = torch.bmm(block.weight, x.reshape(rows, inputs, -1))
        else:  # the first block: all hosts see the same samples
            flat = (block.weight.reshape(rows * outputs, inputs) @ x.reshape(inputs, -1)).view(
                rows, outputs, -1
            )
        x = torch.relu_(flat.add_(block.bias)).view(rows, outputs, side, side, samples)
        plain = x.index_select(0, block.ablated) if block.ablated is not None else None
        if block.plan is not None:
            features = seed_features(block.plan, block.seed_rows, x)
            x = graft(x, features, block.plan.rows, block.plan.alpha, block.plan.share)
        if plain is not None:
            x = torch.cat((x, plain))
        x = max_pool(x)
    return torch.baddbmm(whole.classifier_bias, whole.classifier_weight, x.mean((2, 3)))
