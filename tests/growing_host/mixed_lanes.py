"""Lanes in all sorts of stages on any host, batched and literal, from the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from esper_simic.actions import BLUEPRINTS
from esper_simic.config import EnvironmentConfig
from esper_simic.growing_host.alpha import Composition
from esper_simic.growing_host.blueprints import Kind, blueprint
from esper_simic.growing_host.compositions import initial_seed
from esper_simic.growing_host.counterfactual import Variants
from esper_simic.growing_host.grafts import NO_SEED, seeds_in_training, seeds_in_validation
from esper_simic.growing_host.hosts import build_host
from esper_simic.growing_host.parameters import ParameterBank
from esper_simic.growing_host.training import Trainer
from esper_simic.growing_host.validation import Validator
from esper_simic.lifecycle import BLENDED, SeedStage
from tests.growing_host.literal_hosts import LiteralHost, LiteralSeed

N, T, B, H, F = (
    SeedStage.DORMANT,
    SeedStage.TRAINING,
    SeedStage.BLENDING,
    SeedStage.HOLDING,
    SeedStage.FOSSILIZED,
)


@dataclass(frozen=True)
class TaskOfKind:
    """A task's shape, without its data."""

    kind: Kind
    channels: int = 1
    height: int = 8
    width: int = 8
    classes: int = 10
    name: str = "invented"


@dataclass(frozen=True)
class Planted:
    """What is in one slot of one lane."""

    stage: SeedStage
    blueprint: str = "conv_light"
    alpha: float = 0.4
    composition: Composition = Composition.ADD
    frozen: bool = False


Lane = dict[str, Planted]


class MixedLanes:
    """Lanes with given seeds, on random samples that any host takes."""

    def __init__(
        self,
        host: str,
        task: TaskOfKind,
        lanes: Sequence[Lane],
        *,
        slots: tuple[str, ...],
        dtype: torch.dtype = torch.float64,
        samples: int = 60,
        seed: int = 5,
        train_batches: int = 4,
        train_batch_size: int = 8,
    ) -> None:
        names = {planted.blueprint for lane in lanes for planted in lane.values()} or {"conv_light"}
        self.config = EnvironmentConfig(
            train_batch_size=train_batch_size, train_batches=train_batches, host_lr=0.03, seed_lr=0.05
        ).model_copy(update={"blueprints": tuple(sorted(names))})
        self.rng = np.random.default_rng(seed)
        self.spec = build_host(host, task)
        self.slots = slots
        self.bank = ParameterBank(len(lanes), self.spec, slots, self.config, dtype)
        shape = (len(lanes), len(slots))
        self.stage = np.full(shape, N, dtype=np.int8)
        self.kind, self.composition = np.full(shape, NO_SEED), np.zeros(shape, dtype=np.int64)
        self.alpha, self.frozen = np.zeros(shape), np.zeros(shape, dtype=np.bool_)
        self.literal = [self._plant(lane, seeds) for lane, seeds in enumerate(lanes)]
        self.train_inputs, self.train_labels = self._samples(task, samples, dtype)
        self.inputs, self.labels = self._samples(task, samples + 11, dtype)
        self.trainer = Trainer(self.bank, self.train_inputs, self.train_labels, self.config)
        self.validator = Validator(self.bank, self.inputs, self.labels)

    def _plant(self, lane: int, seeds: Lane) -> LiteralHost:
        row = self.spec.initial_parameters(self.rng)
        # Nothing starts at its special value, so that a forgotten shift or scale shows.
        row = row + 0.05 * self.rng.standard_normal(len(row))
        self.bank.reset_lane(lane, row)
        host = LiteralHost(
            self.spec,
            row,
            lr=self.config.host_lr,
            seed_lr=self.config.seed_lr,
            momentum=self.config.momentum,
            clip=self.config.max_grad_norm,
        )
        for name, planted in seeds.items():
            slot = self.slots.index(name)
            found = blueprint(planted.blueprint)
            channels = self.bank.slot_channels[slot]
            values = initial_seed(found, planted.composition, channels, self.rng, self.spec.kind)
            values = values + 0.05 * self.rng.standard_normal(len(values))
            self.bank.create_seed(lane, slot, values)
            alpha = {T: 0.0, F: 1.0}.get(planted.stage, planted.alpha)
            self.stage[lane, slot], self.alpha[lane, slot] = planted.stage, alpha
            self.kind[lane, slot] = BLUEPRINTS.index(planted.blueprint)
            self.composition[lane, slot], self.frozen[lane, slot] = planted.composition, planted.frozen
            row_of_seed = torch.tensor(values, dtype=torch.float64)
            host.seeds[name] = LiteralSeed(
                found,
                row_of_seed,
                planted.stage,
                alpha,
                planted.composition,
                planted.frozen,
                torch.zeros_like(row_of_seed),
            )
        return host

    def _samples(self, task: TaskOfKind, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        if task.kind == "tokens":
            text = self.rng.integers(0, task.classes, (count, task.width + 1))
            return torch.tensor(text[:, :-1]), torch.tensor(text[:, 1:])
        shape = (count, task.channels, task.height, task.width)
        labels = torch.tensor(self.rng.integers(0, task.classes, count))
        return torch.tensor(self.rng.standard_normal(shape), dtype=dtype), labels

    def batches(self) -> np.ndarray:
        shape = (self.config.train_batches, len(self.stage), self.config.train_batch_size)
        return self.rng.integers(0, len(self.train_labels), shape)

    def train(self, samples: np.ndarray):
        seeds = seeds_in_training(self.stage, self.kind, self.alpha, self.composition, self.frozen)
        return self.trainer.train_epoch(samples, seeds)

    def train_literally(self, samples: np.ndarray) -> None:
        for lane, host in enumerate(self.literal):
            for seed in host.seeds.values():
                seed.norms.clear()
            for batch in samples[:, lane]:
                host.train_batch(self.train_inputs[batch].to(self._exact()), self.train_labels[batch])

    def _exact(self) -> torch.dtype:
        return torch.int64 if self.spec.kind == "tokens" else torch.float64

    def measure(self, variants: Variants, lanes: np.ndarray | None = None):
        seeds = seeds_in_validation(self.stage, self.kind, self.alpha, self.composition)
        return self.validator.measure(seeds, variants, lanes)

    def measure_literally(self, lane: int, keep: np.ndarray | None = None) -> tuple[float, float]:
        """Accuracy and loss with the blended seeds in `keep`, `[S]`."""
        blended = BLENDED[self.stage[lane]] & (True if keep is None else keep)
        kept = {name for name, on in zip(self.slots, blended, strict=True) if on}
        return self.literal[lane].measure(self.inputs.to(self._exact()), self.labels, kept)

    def seed_row(self, lane: int, name: str) -> np.ndarray:
        slot = self.slots.index(name)
        start, size = self.bank.slot_offsets[slot], len(self.literal[lane].seeds[name].row)
        return self.bank.parameters[lane, start : start + size].numpy()

    def every_variant(self) -> Variants:
        """Every other set of blended seeds of every lane."""
        lanes, keeps = [], []
        for lane, stages in enumerate(self.stage):
            blended = np.flatnonzero(BLENDED[stages])
            for bits in range(2 ** len(blended) - 1):
                keep = np.ones(len(self.slots), dtype=np.bool_)
                keep[blended] = [bool(bits >> position & 1) for position in range(len(blended))]
                lanes.append(lane)
                keeps.append(keep)
        shape = (len(keeps), len(self.slots))
        return Variants(np.array(lanes, dtype=np.int64), np.array(keeps, dtype=np.bool_).reshape(shape))
