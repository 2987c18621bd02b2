"""Many growing hosts as one computation: the step that both Gymnasium environments share.

One step, for all E lanes at once:

1. **Action.** What the masks' own table accepts happens; anything else changes nothing and is reported as refused.
   A germinating or pruned seed's parameters and optimiser state are written in the same transaction as its move.
2. **Tick.** Every slot lets one epoch pass.
3. **Training** of one epoch (`training.py`), the same number of batches for every lane, however many lanes there are.
4. **Validation**, fused with the counterfactuals of live blended seeds (`validation.py`).
5. **Reward**, from what really happened (`rewards.py`).

All chance of a lane comes from two streams: `(lane seed, episode)` for the host's start and sample orders, and
`(lane seed, episode, "seeds")` for the starts of seeds. So two controllers on the same lane meet the same host and the
same samples, whatever they grow. Lanes share no number: what a lane does is the same beside any other lanes, up to the
rounding of the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from esper_simic import rewards, seeding
from esper_simic.actions import BLUEPRINT, BLUEPRINTS, OP, SLOT, STYLE, TEMPO, Op, head_sizes
from esper_simic.config import EnvironmentConfig
from esper_simic.errors import ConfigError, ContractError
from esper_simic.growing_host import masks, observation
from esper_simic.growing_host.blueprints import blueprint
from esper_simic.growing_host.grafts import seeds_in_training, seeds_in_validation
from esper_simic.growing_host.hosts import build_host
from esper_simic.growing_host.parameters import ParameterBank
from esper_simic.growing_host.samples import SampleOrders
from esper_simic.growing_host.slots import SlotTable
from esper_simic.growing_host.tasks import Task, load_task
from esper_simic.growing_host.training import GradientReport, Trainer
from esper_simic.growing_host.validation import Measurement, Validator
from esper_simic.growing_host.view import HISTORY_EPOCHS, HostView
from esper_simic.lifecycle import BLENDED, LIVE, Bools, Event, SeedStage


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave, `[E]` each; `reward_parts` sum to `reward`."""

    reward: NDArray[np.float64]
    reward_parts: dict[str, NDArray[np.float64]]
    terminated: Bools
    succeeded: Bools


class GrowingHosts:
    """E growing hosts on one task.

    Args:
        lanes: Number of hosts, E.
        config: Task, host and rules.
        gamma: The learner's discount; the reward's shaping uses the same one.
        dtype: Precision in which hosts are trained.
        device: Where they are trained.

    Raises:
        ConfigError: Unknown task or host, or fewer validation samples than asked for.
    """

    def __init__(
        self,
        lanes: int,
        config: EnvironmentConfig,
        *,
        gamma: float,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        task = load_task(config.task)
        self.config = config
        self.lanes = lanes
        self.host_spec = build_host(config.host, task)
        self.spec = observation.observation_spec(self.host_spec, len(config.slots))
        self._gamma = gamma
        blocks = tuple(int(name.removeprefix("r0c")) for name in config.slots)
        self._slot_block = np.array(blocks)
        self.bank = ParameterBank(lanes, self.host_spec, blocks, config, dtype, device)
        self._trainer, self._validator = _workers(self.bank, task, config, blocks)
        self._orders = SampleOrders(
            lanes, len(task.train_labels), config.train_batches, config.train_batch_size
        )
        self.slots = SlotTable(lanes, len(config.slots))
        self._sample_chance = [seeding.generator(0, 0)] * lanes
        self._seed_chance = [seeding.generator(0, 0)] * lanes
        self.epoch = np.zeros(lanes, dtype=np.int64)
        self._accuracy = np.full((lanes, HISTORY_EPOCHS), np.nan)
        self._loss = np.full((lanes, HISTORY_EPOCHS), np.nan)
        self._layer_gradient_norms = np.zeros((lanes, self.bank.layers))
        self._last_op = np.full(lanes, -1)
        self._last_succeeded = np.zeros(lanes, dtype=np.bool_)
        self._legal = masks.legality(self.slots, config)

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """`[E]` validation accuracy now, in percent."""
        return self._accuracy[:, -1].copy()

    @property
    def parameters_added(self) -> NDArray[np.int64]:
        """`[E]` parameters of the seeds that are part of what the hosts compute (blended or fossilised)."""
        return np.asarray(np.where(BLENDED[self.slots.stage], self.slots.parameters, 0).sum(axis=1))

    @property
    def fossils(self) -> NDArray[np.int64]:
        """`[E]` fossilised seeds."""
        return np.asarray((self.slots.stage == SeedStage.FOSSILIZED).sum(axis=1))

    def start(self, lanes: NDArray[np.int64], lane_seeds: list[int], episodes: list[int]) -> None:
        """Begin an episode in some lanes with a fresh host, measured but not yet trained.

        Args:
            lanes: `[n]` lanes, each at most once.
            lane_seeds: Seed of each of them.
            episodes: Episode number of each of them.
        """
        for lane, lane_seed, episode in zip(lanes.tolist(), lane_seeds, episodes, strict=True):
            chance = seeding.generator(lane_seed, episode)
            self._sample_chance[lane] = chance
            self._seed_chance[lane] = seeding.generator(lane_seed, episode, "seeds")
            self.bank.reset_lane(lane, self.host_spec.initial_parameters(chance))
            self._orders.restart(lane)
        self.slots.reset(lanes)
        self.epoch[lanes] = 0
        self._accuracy[lanes] = np.nan
        self._loss[lanes] = np.nan
        self._layer_gradient_norms[lanes] = 0
        self._last_op[lanes] = -1
        self._last_succeeded[lanes] = False
        measured = self._measure(lanes)
        self._accuracy[lanes, -1] = measured.accuracy
        self._loss[lanes, -1] = measured.loss
        self._legal = masks.legality(self.slots, self.config)

    def step(self, actions: NDArray[np.int64]) -> StepResult:
        """Act, train, measure and reward: one epoch of every host.

        Args:
            actions: `[E, 8]` integers in the order of `actions.HEADS`.

        Raises:
            ContractError: Wrong shape, or a choice outside its head's range.
        """
        actions = self._checked(actions)
        stage_before, epochs_before = self.slots.stage.copy(), self.slots.epochs_in_stage.copy()
        succeeded = masks.accepted(self._legal, actions)
        self._act(actions, succeeded)
        fossilized = (self.slots.stage == SeedStage.FOSSILIZED) & (stage_before != SeedStage.FOSSILIZED)
        self.slots.tick(self.config.embargo_epochs)
        gradients = self._train()
        self.slots.record_gradients(gradients)
        self._layer_gradient_norms[:] = gradients.layer_norm
        self.epoch += 1
        measured = self._measure(None)
        self._remember(measured)
        self._last_op[:] = actions[:, OP]
        self._last_succeeded[:] = succeeded
        self._legal = masks.legality(self.slots, self.config)
        terminated = self.epoch >= self.config.max_epochs
        outcome = rewards.Outcome(
            stage_before=stage_before,
            epochs_before=epochs_before,
            stage=self.slots.stage,
            epochs_in_stage=self.slots.epochs_in_stage,
            alpha=self.slots.alpha,
            seed_parameters=self.slots.parameters,
            host_parameters=self.host_spec.parameter_count,
            fossilized=fossilized,
            contribution=self.slots.contribution,
            progress=self.slots.progress,
            accuracy=measured.accuracy,
            terminated=terminated,
        )
        parts = rewards.basic(outcome, self.config.reward, gamma=self._gamma)
        total = np.sum(list(parts.values()), axis=0)
        return StepResult(total, parts, terminated, succeeded)

    def observe(self) -> dict[str, NDArray[np.generic]]:
        """The observation of every lane, `[E, ...]` per key of `graphs.OBSERVATION_KEYS`; fresh arrays.

        Raises:
            InvariantViolation: A feature is not finite.
        """
        layers = self.bank.layers
        weight_norms = self.bank.squared_norms(self.bank.parameters)[:, :layers].double().sqrt().cpu().numpy()
        observed: dict[str, NDArray[np.generic]] = {
            "host_nodes": observation.host_features(self.host_spec, weight_norms, self._layer_gradient_norms),
            "host_mask": np.ones((self.lanes, layers), dtype=np.int8),
            "slot_nodes": observation.slot_features(
                self.slots, horizon=self.config.max_epochs, gamma=self._gamma
            ),
            "slot_mask": np.ones(self.slots.stage.shape, dtype=np.int8),
            "slot_host": np.tile(self._slot_block, (self.lanes, 1)),
            "slot_blueprint": self.slots.blueprint.copy(),
            "globals": observation.global_features(
                self.slots,
                epoch=self.epoch,
                horizon=self.config.max_epochs,
                loss=self._loss,
                accuracy=self._accuracy,
                last_op=self._last_op,
                last_succeeded=self._last_succeeded,
            ),
            "action_mask": masks.pack(self._legal),
        }
        observation.check_finite(observed)
        return observed

    def view(self) -> HostView:
        """A frozen copy of what scripted controllers may look at."""
        arrays: dict[str, Any] = {
            "stage": self.slots.stage,
            "epochs_in_stage": self.slots.epochs_in_stage,
            "age": self.slots.age,
            "alpha": self.slots.alpha,
            "contribution": self.slots.contribution,
            "blueprint": self.slots.blueprint,
            "accuracy_at_germination": self.slots.accuracy_at_germination,
            "accuracy": self._accuracy,
            "loss": self._loss,
            "epoch": self.epoch,
            "mask": masks.pack(self._legal),
        }
        copies = {name: array.copy() for name, array in arrays.items()}
        for array in copies.values():
            array.setflags(write=False)
        return HostView(**copies)

    def _checked(self, actions: NDArray[np.int64]) -> NDArray[np.int64]:
        sizes = np.array(head_sizes(len(self.config.slots)))
        actions = np.asarray(actions)
        if actions.shape != (self.lanes, len(sizes)) or not np.issubdtype(actions.dtype, np.integer):
            raise ContractError(
                f"actions are integers [{self.lanes}, {len(sizes)}], not {actions.dtype} {list(actions.shape)}"
            )
        outside = (actions < 0) | (actions >= sizes)
        if outside.any():
            lane, head = np.argwhere(outside)[0].tolist()
            raise ContractError(
                f"choice {actions[lane, head]} of head {head} in lane {lane} is outside [0, {sizes[head]})"
            )
        return actions.astype(np.int64)

    def _act(self, actions: NDArray[np.int64], succeeded: Bools) -> None:
        """Carry out the accepted actions; lifecycle, parameters and optimiser state change together."""
        op = actions[:, OP]

        def targets(wanted: Op) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            lanes = np.flatnonzero(succeeded & (op == wanted))
            return lanes, actions[lanes, SLOT]

        germinating = targets(Op.GERMINATE)
        if len(germinating[0]):
            self._germinate(germinating, actions)
        pruned = targets(Op.PRUNE)
        self.slots.prune(pruned)
        for lane, slot in zip(*pruned, strict=True):
            self.bank.remove_seed(lane, slot)
        self.slots.advance(targets(Op.ADVANCE))
        self.slots.move(targets(Op.FOSSILIZE), Event.FOSSILIZE)

    def _germinate(self, at: tuple[NDArray[np.int64], NDArray[np.int64]], actions: NDArray[np.int64]) -> None:
        lanes, slots = at
        counts = np.zeros(len(lanes), dtype=np.int64)
        for position, (lane, slot) in enumerate(zip(lanes.tolist(), slots.tolist(), strict=True)):
            chosen = blueprint(BLUEPRINTS[actions[lane, BLUEPRINT]])
            channels = self.bank.slot_channels[slot]
            self.bank.create_seed(lane, slot, chosen.initial_parameters(channels, self._seed_chance[lane]))
            counts[position] = chosen.parameter_count(channels)
        self.slots.germinate(
            at, actions[lanes, BLUEPRINT], counts, actions[lanes, STYLE], actions[lanes, TEMPO]
        )
        self.slots.accuracy_at_germination[at] = self._accuracy[lanes, -1]

    def _train(self) -> GradientReport:
        seeds = seeds_in_training(self.slots.stage, self.slots.blueprint, self.slots.alpha)
        return self._trainer.train_epoch(self._orders.next_epoch(self._sample_chance), seeds)

    def _measure(self, lanes: NDArray[np.int64] | None) -> Measurement:
        seeds = seeds_in_validation(self.slots.stage, self.slots.blueprint, self.slots.alpha)
        ablate = BLENDED[self.slots.stage] & LIVE[self.slots.stage]
        return self._validator.measure(seeds, ablate, lanes)

    def _remember(self, measured: Measurement) -> None:
        self._accuracy[:, :-1] = self._accuracy[:, 1:]
        self._accuracy[:, -1] = measured.accuracy
        self._loss[:, :-1] = self._loss[:, 1:]
        self._loss[:, -1] = measured.loss
        self.slots.record_contributions(measured.accuracy, measured.accuracy_without)


def _workers(
    bank: ParameterBank, task: Task, config: EnvironmentConfig, blocks: tuple[int, ...]
) -> tuple[Trainer, Validator]:
    """Trainer and validator of a bank, with the task's samples in the bank's precision and place."""
    if config.validation_samples > len(task.validation_labels):
        raise ConfigError(
            f"task {task.name!r} holds out {len(task.validation_labels)} samples, not {config.validation_samples}",
            "environment.validation_samples",
        )
    like = bank.parameters
    slot_of_block = tuple(
        blocks.index(block) if block in blocks else None for block in range(len(bank.spec.blocks))
    )
    samples = slice(0, config.validation_samples)
    trainer = Trainer(
        bank,
        torch.tensor(task.train_images, dtype=like.dtype, device=like.device).flatten(1),
        torch.tensor(task.train_labels, device=like.device),
        slot_of_block,
    )
    validator = Validator(
        bank,
        torch.tensor(task.validation_images[samples], dtype=like.dtype, device=like.device),
        torch.tensor(task.validation_labels[samples], device=like.device),
        slot_of_block,
    )
    return trainer, validator
