"""The baseline that growing must be measured against: the grown network, trained from the start.

What an episode grew is a network of a certain size. Was it worth growing, or would the same network, whole from its
first epoch, have become as good or better? Here it is built at once, with the seeds that the finished host had
blended in or fossilised, and trained for as many epochs: every seed present from the start with alpha 1, and host and
seeds trained jointly, as one ordinary network. Nothing is isolated: gradients pass through a seed to the layers in
front of it, on every kind of host. Learning rates, momentum, clipping and batches are the environment's.

The comparison is paired. Lane by lane the host starts with the same weights, meets the same samples in the same order,
and is measured on the same held-out ones as the episode `(lane seed, episode)` that grew it; a lane that grew nothing
becomes what a controller that never grows would have made of it. Seeds start with numbers of their own.

A fixed network is told what to become, and spends no epoch on finding out: it is a reference, not a competitor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from esper_simic import seeding
from esper_simic.actions import BLUEPRINTS
from esper_simic.config import EnvironmentConfig
from esper_simic.errors import ContractError
from esper_simic.growing_host.alpha import Composition
from esper_simic.growing_host.blueprints import blueprint
from esper_simic.growing_host.compositions import initial_seed
from esper_simic.growing_host.counterfactual import Variants
from esper_simic.growing_host.grafts import NO_SEED, seeds_in_training, seeds_in_validation
from esper_simic.growing_host.hosts import HostSpec, build_host
from esper_simic.growing_host.parameters import ParameterBank
from esper_simic.growing_host.samples import SampleOrders
from esper_simic.growing_host.tasks import load_task
from esper_simic.growing_host.workers import make_workers
from esper_simic.lifecycle import BLENDED, Integers, SeedStage


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in the slots of E finished networks.

    | field | shape | meaning |
    |---|---|---|
    | `blueprint` | `[E, S]` int64 | index into `actions.BLUEPRINTS`, or `NO_SEED` |
    | `composition` | `[E, S]` int64 | `alpha.Composition` of each seed |
    """

    blueprint: NDArray[np.int64]
    composition: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FixedOutcome:
    """What became of E fixed networks.

    | field | shape | meaning |
    |---|---|---|
    | `accuracy` | `[E]` | validation accuracy after the last epoch, percent |
    | `loss` | `[E]` | validation loss after the last epoch, nats |
    | `parameters_added` | `[E]` int64 | parameters of the seeds |
    """

    accuracy: NDArray[np.float64]
    loss: NDArray[np.float64]
    parameters_added: NDArray[np.int64]


def final_contents(stage: Integers, blueprint: Integers, composition: Integers) -> Contents:
    """The seeds that are part of what finished hosts compute: blended or fossilised; all inputs are `[E, S]`."""
    present = BLENDED[stage]
    return Contents(
        np.where(present, blueprint, NO_SEED).astype(np.int64),
        np.where(present, composition, 0).astype(np.int64),
    )


def train_fixed_networks(
    contents: Contents,
    config: EnvironmentConfig,
    lane_seeds: Sequence[int],
    episodes: Sequence[int],
    *,
    epochs: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    observer: Callable[[], None] | None = None,
) -> FixedOutcome:
    """Build the networks that were grown, and train each from the start.

    Lanes are trained `config.environments_per_actor` at a time.

    Args:
        contents: What is in their slots, those of `config.slots`.
        config: Task, host, slots, rates: the environment's own.
        lane_seeds: `[E]` seed of the lane that grew each.
        episodes: `[E]` number of the episode that grew each.
        epochs: Host epochs; `config.max_epochs` by default.
        dtype: Precision of everything that is trained.
        device: Where it is trained.
        observer: Told after every epoch of a chunk of lanes that there was progress.

    Raises:
        ContractError: Contents, seeds and episodes are not of the same networks, or not of the slots of the config.
        ConfigError: A blueprint does not fit the host, or the host not the task.
    """
    networks, slots = contents.blueprint.shape
    if contents.composition.shape != (networks, slots) or slots != len(config.slots):
        raise ContractError(
            f"contents of {slots} slots (compositions: {list(contents.composition.shape)}) for the "
            f"{len(config.slots)} slots of the configuration"
        )
    if not networks == len(lane_seeds) == len(episodes):
        raise ContractError(f"{networks} networks with {len(lane_seeds)} seeds and {len(episodes)} episodes")
    accuracy, loss = np.zeros(networks), np.zeros(networks)
    parameters = np.zeros(networks, dtype=np.int64)
    width = config.environments_per_actor
    for start in range(0, networks, width):
        chunk = slice(start, min(start + width, networks))
        mine = Contents(contents.blueprint[chunk], contents.composition[chunk])
        hosts = _FixedHosts(mine, config, lane_seeds[chunk], episodes[chunk], dtype, device)
        for _ in range(config.max_epochs if epochs is None else epochs):
            hosts.train_epoch()
            if observer is not None:
                observer()
        accuracy[chunk], loss[chunk] = hosts.measure()
        parameters[chunk] = hosts.parameters_added
    return FixedOutcome(accuracy, loss, parameters)


class _JointHost(HostSpec):
    """A host whose seeds send gradients back to it, whatever its kind."""

    @property
    def seeds_adapt_host(self) -> bool:
        """Always."""
        return True


class _FixedHosts:
    """Some lanes of fixed networks on their way."""

    def __init__(
        self,
        contents: Contents,
        config: EnvironmentConfig,
        lane_seeds: Sequence[int],
        episodes: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        task = load_task(config.task)
        spec = build_host(config.host, task)
        joint = _JointHost(**{field.name: getattr(spec, field.name) for field in fields(spec)})
        lanes = len(contents.blueprint)
        self._bank = ParameterBank(lanes, joint, config.slots, config, dtype, device)
        self._chance = [
            seeding.generator(seed, episode) for seed, episode in zip(lane_seeds, episodes, strict=True)
        ]
        for lane, chance in enumerate(self._chance):
            self._bank.reset_lane(lane, joint.initial_parameters(chance))
        seed_chance = [
            seeding.generator(seed, episode, "seeds")
            for seed, episode in zip(lane_seeds, episodes, strict=True)
        ]
        self.parameters_added = self._plant(contents, seed_chance)
        present = contents.blueprint != NO_SEED
        stage = np.where(present, SeedStage.FOSSILIZED, SeedStage.DORMANT)
        alpha = present.astype(np.float64)
        frozen = np.zeros_like(present)
        self._training = seeds_in_training(stage, contents.blueprint, alpha, contents.composition, frozen)
        self._blended = seeds_in_validation(stage, contents.blueprint, alpha, contents.composition)
        self._orders = SampleOrders(
            lanes, len(task.train_labels), config.train_batches, config.train_batch_size
        )
        self._trainer, self._validator = make_workers(self._bank, task, config)

    def _plant(self, contents: Contents, chance: list[np.random.Generator]) -> NDArray[np.int64]:
        """Put a fresh seed into each slot that has one; the parameters of all seeds of each lane, `[E]`."""
        added = np.zeros(len(contents.blueprint), dtype=np.int64)
        for lane, slot in zip(*np.nonzero(contents.blueprint != NO_SEED), strict=True):
            row = initial_seed(
                blueprint(BLUEPRINTS[contents.blueprint[lane, slot]]),
                Composition(int(contents.composition[lane, slot])),
                self._bank.slot_channels[slot],
                chance[lane],
                self._bank.spec.kind,
            )
            self._bank.create_seed(int(lane), int(slot), row)
            added[lane] += len(row)
        return added

    def train_epoch(self) -> None:
        """One epoch of every lane."""
        self._trainer.train_epoch(self._orders.next_epoch(self._chance), self._training)

    def measure(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Accuracy in percent and loss in nats, `[E]` each."""
        slots = len(self._bank.places)
        none = Variants(np.zeros(0, dtype=np.int64), np.zeros((0, slots), dtype=np.bool_))
        measured = self._validator.measure(self._blended, none)
        return measured.accuracy, measured.loss
