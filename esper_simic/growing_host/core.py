"""Many growing hosts as one computation: the step that both Gymnasium environments share.

One step, for all E lanes at once:

1. **Action.** What the masks' own table accepts happens; anything else changes nothing and is reported as refused.
   A seed's parameters and optimiser state are written in the same transaction as its move (`nursery.py`).
2. **Tick.** Every slot lets one epoch pass.
3. **Training** of one epoch (`training.py`), the same number of batches for every lane, however many lanes there are.
4. **Validation**, fused with the counterfactuals of live blended seeds (`validation.py`, `counterfactual.py`).
5. **Governor.** A host that has broken down is rolled back, and its episode ends (`governor.py`).
6. **Reward**, from what really happened (`rewards/`).

All chance of a lane comes from two streams: `(lane seed, episode)` for the host's start and sample orders, and
`(lane seed, episode, "seeds")` for the starts of seeds. So two controllers on the same lane meet the same host and the
same samples, whatever they grow. Lanes share no number: what a lane does is the same beside any other lanes, up to the
rounding of the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from esper_simic import seeding
from esper_simic.actions import BLUEPRINTS, OP, SLOT, head_sizes
from esper_simic.config import EnvironmentConfig
from esper_simic.errors import ContractError, InvariantViolation
from esper_simic.growing_host import masks, observation
from esper_simic.growing_host.counterfactual import Attribution, AttributionTable, attribute, plan_variants
from esper_simic.growing_host.governor import Governor, Veto, preflight, settle
from esper_simic.growing_host.grafts import seeds_in_training, seeds_in_validation
from esper_simic.growing_host.hosts import build_host
from esper_simic.growing_host.nursery import Nursery
from esper_simic.growing_host.parameters import ParameterBank
from esper_simic.growing_host.picture import HostPicture, SlotPicture
from esper_simic.growing_host.rollback import LaneKeeper
from esper_simic.growing_host.samples import SampleOrders
from esper_simic.growing_host.slots import SlotTable
from esper_simic.growing_host.tasks import load_task
from esper_simic.growing_host.training import GradientReport
from esper_simic.growing_host.validation import Measurement
from esper_simic.growing_host.view import HISTORY_EPOCHS, HostView
from esper_simic.growing_host.workers import make_workers
from esper_simic.lifecycle import BLENDED, LIVE, OCCUPIED, Bools, Floats, SeedStage
from esper_simic.rewards import MODES_THAT_ABLATE_FOSSILS, Outcome, Rewards, total


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave, `[E]` each; `reward_parts` sum to `reward`. A host that was `rolled_back` has ended too."""

    reward: NDArray[np.float64]
    reward_parts: dict[str, NDArray[np.float64]]
    terminated: Bools
    rolled_back: Bools
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
        ConfigError: Unknown task or host, a host that does not take the task's samples, a slot that it lacks, no
            blueprint that fits, or fewer validation samples than asked for.
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
        self.spec = observation.observation_spec(len(self.host_spec.blocks), len(config.slots))
        self._gamma = gamma
        self.bank = ParameterBank(lanes, self.host_spec, config.slots, config, dtype, device)
        self._slot_block = np.array([place.block for place in self.bank.places])
        self._trainer, self._validator = make_workers(self.bank, task, config)
        self._orders = SampleOrders(
            lanes, len(task.train_labels), config.train_batches, config.train_batch_size
        )
        self.slots = SlotTable(lanes, len(config.slots))
        self._nursery = Nursery(self.slots, self.bank)
        self._takes = self._nursery.takes()
        self.attributions = AttributionTable(lanes, len(config.slots))
        self._governor = Governor(lanes, task.classes, config.governor, tokens=task.kind == "tokens")
        self._keeper = LaneKeeper(self.bank)
        self._rewards = Rewards(lanes, len(config.slots), config.reward, gamma)
        self._loss_scale = math.log(task.classes)
        self._sample_chance = [seeding.generator(0, 0)] * lanes
        self._seed_chance = [seeding.generator(0, 0)] * lanes
        self.epoch = np.zeros(lanes, dtype=np.int64)
        self._paid = np.zeros(lanes)
        self._accuracy = np.full((lanes, HISTORY_EPOCHS), np.nan)
        self._loss = np.full((lanes, HISTORY_EPOCHS), np.nan)
        self._layer_gradient_norms = np.zeros((lanes, len(self.host_spec.blocks) + 1))
        self._last_op = np.full(lanes, -1)
        self._last_succeeded = np.zeros(lanes, dtype=np.bool_)
        self._legal = masks.legality(self.slots, config, self._takes)

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
        self.attributions.reset(lanes)
        self._governor.reset(lanes)
        self._rewards.reset(lanes)
        self.epoch[lanes] = 0
        self._paid[lanes] = 0
        self._accuracy[lanes] = np.nan
        self._loss[lanes] = np.nan
        self._layer_gradient_norms[lanes] = 0
        self._last_op[lanes] = -1
        self._last_succeeded[lanes] = False
        self._measure_again(lanes)
        self._keeper.keep(lanes)
        self._legal = masks.legality(self.slots, self.config, self._takes)

    def step(self, actions: NDArray[np.int64]) -> StepResult:
        """Act, train, measure, watch and reward: one epoch of every host.

        Args:
            actions: `[E, 8]` integers in the order of `actions.HEADS`.

        Raises:
            ContractError: Wrong shape, or a choice outside its head's range.
        """
        actions = self._checked(actions)
        before = self._before()
        succeeded = self._accepted(actions)
        self._nursery.act(actions, succeeded, epoch=self.epoch, chance=self._seed_chance)
        fossilized = (self.slots.stage == SeedStage.FOSSILIZED) & (
            before["stage_before"] != SeedStage.FOSSILIZED
        )
        self._nursery.tick(self.config)
        gradients = self._train()
        self.slots.record_gradients(
            gradients, host_parameters=self.host_spec.parameter_count, ema=self.config.gradient_ema
        )
        self._layer_gradient_norms[:] = gradients.layer_norm
        self.epoch += 1
        measured, attribution = self._measure(None)
        self._remember(measured, attribution)
        verdict = self._governor.watch(measured.loss, measured.accuracy)
        auto_pruned = self._roll_back(verdict.panic)
        kept = self._governor.is_snapshot_due(self.epoch, verdict.healthy, fossilized.any(axis=1))
        self._keeper.keep(np.flatnonzero(kept & ~verdict.panic))
        self._last_op[:] = actions[:, OP]
        self._last_succeeded[:] = succeeded
        self._legal = masks.legality(self.slots, self.config, self._takes)
        at_horizon = self.epoch >= self.config.max_epochs
        outcome = self._outcome(before, actions, succeeded, fossilized, auto_pruned, measured, at_horizon)
        parts = settle(self._rewards.parts(outcome), verdict.panic, self._paid, self.config.governor)
        reward = total(parts)
        self._paid += reward
        return StepResult(reward, parts, at_horizon & ~verdict.panic, verdict.panic, succeeded)

    def observe(self) -> dict[str, NDArray[np.generic]]:
        """The observation of every lane, `[E, ...]` per key of `graphs.OBSERVATION_KEYS`; fresh arrays.

        Raises:
            InvariantViolation: A feature is not finite.
        """
        layers = self.bank.layers
        weight_norms = self.bank.weight_norms()
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
            "accuracy_at_stage": self.slots.accuracy_at_stage,
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

    def _accepted(self, actions: NDArray[np.int64]) -> Bools:
        """What the masks accept and the last check before it happens approves."""
        approved = preflight(
            actions,
            loss=self._loss[:, -1],
            accuracy=self._accuracy[:, -1],
            stage=self.slots.stage,
            seeds_max=self.config.max_seeds or len(self.config.slots),
        )
        return np.asarray(masks.accepted(self._legal, actions) & (approved == Veto.APPROVED))

    def _train(self) -> GradientReport:
        slots = self.slots
        seeds = seeds_in_training(slots.stage, slots.blueprint, slots.alpha, slots.composition, slots.frozen)
        return self._trainer.train_epoch(self._orders.next_epoch(self._sample_chance), seeds)

    def _measure(self, lanes: NDArray[np.int64] | None) -> tuple[Measurement, Attribution]:
        """Measure some hosts, or all, and what their seeds are worth."""
        slots = self.slots
        seeds = seeds_in_validation(slots.stage, slots.blueprint, slots.alpha, slots.composition)
        permanent = None
        if self.config.reward.mode in MODES_THAT_ABLATE_FOSSILS:
            permanent = np.asarray(slots.stage == SeedStage.FOSSILIZED)
        ablatable = BLENDED[slots.stage] & (LIVE[slots.stage] if permanent is None else True)
        if lanes is not None:
            ablatable = ablatable & np.isin(np.arange(self.lanes), lanes)[:, None]
        final = self.epoch >= self.config.max_epochs
        variants = plan_variants(ablatable, final, rng=self._seed_chance, permanent=permanent)
        measured = self._validator.measure(seeds, variants, lanes)
        accuracy = np.full(self.lanes, np.nan)
        accuracy[slice(None) if lanes is None else lanes] = measured.accuracy
        worth = attribute(ablatable, accuracy, variants, measured.variant_accuracy, permanent=permanent)
        return measured, worth

    def _measure_again(self, lanes: NDArray[np.int64]) -> None:
        """Measure hosts that were not trained since: fresh ones, and those that were put back."""
        measured, _ = self._measure(lanes)
        self._accuracy[lanes, -1] = measured.accuracy
        self._loss[lanes, -1] = measured.loss
        self.slots.record_accuracy(lanes, measured.accuracy)

    def _remember(self, measured: Measurement, attribution: Attribution) -> None:
        self._accuracy[:, :-1] = self._accuracy[:, 1:]
        self._accuracy[:, -1] = measured.accuracy
        self._loss[:, :-1] = self._loss[:, 1:]
        self._loss[:, -1] = measured.loss
        self.slots.record_validation(
            measured.accuracy,
            attribution.contribution,
            attribution.solo,
            attribution.interaction,
            velocity_ema=self.config.contribution_velocity_ema,
        )
        self.attributions.record(attribution)

    def _roll_back(self, panic: Bools) -> Bools:
        """Put broken hosts back as they were last kept, without live seeds; `[E, S]` true where one was."""
        lanes = np.flatnonzero(panic)
        if not len(lanes):
            return np.zeros(self.slots.stage.shape, dtype=np.bool_)
        self._keeper.put_back(lanes)
        removed = self._nursery.clear(lanes)
        self._layer_gradient_norms[lanes] = 0
        self._measure_again(lanes)
        return removed

    # -- rewards -----------------------------------------------------------------------------------------------------

    def _before(self) -> dict[str, NDArray[Any]]:
        """What rewards must know of the state in which the action is taken."""
        slots = self.slots
        return {
            "stage_before": slots.stage.copy(),
            "epochs_before": slots.epochs_in_stage.copy(),
            "alpha_before": slots.alpha.copy(),
            "parameters_before": slots.parameters.copy(),
            "age_before": slots.age.copy(),
            "contribution_before": slots.contribution.copy(),
            "progress_before": slots.progress.copy(),
            "loss_before": self._loss[:, -1].copy(),
            "improvement_before": self.attributions.total_improvement.copy(),
        }

    def _outcome(
        self,
        before: Mapping[str, NDArray[Any]],
        actions: NDArray[np.int64],
        succeeded: Bools,
        fossilized: Bools,
        auto_pruned: Bools,
        measured: Measurement,
        terminated: Bools,
    ) -> Outcome:
        slots = self.slots
        return Outcome(
            **before,
            stage=slots.stage,
            epochs_in_stage=slots.epochs_in_stage,
            alpha=slots.alpha,
            seed_parameters=slots.parameters,
            host_parameters=self.host_spec.parameter_count,
            age=slots.age,
            fossilized=fossilized,
            auto_pruned=auto_pruned,
            contribution=slots.contribution,
            progress=slots.progress,
            stage_improvement=slots.vitals().improvement,
            interaction=slots.interaction,
            op=actions[:, OP],
            target=actions[:, SLOT],
            succeeded=succeeded,
            epoch=self.epoch,
            horizon=np.asarray(self.config.max_epochs),
            accuracy=measured.accuracy,
            loss=measured.loss,
            loss_scale=np.asarray(self._loss_scale),
            improvement=self.attributions.total_improvement,
            committed_accuracy=self.attributions.committed_accuracy,
            terminated=terminated,
        )

    # -- pictures and bytes ------------------------------------------------------------------------------------------

    def picture(self, lane: int, accuracy: Floats) -> HostPicture:
        """One host, to be drawn.

        Args:
            lane: Which.
            accuracy: `[n]` its validation accuracy over the episode so far, percent.
        """
        spec, slots = self.host_spec, self.slots
        layers = ["block{} {}x{}x{}".format(index, *block.output) for index, block in enumerate(spec.blocks)]
        shown = tuple(
            SlotPicture(
                place.name,
                place.block,
                SeedStage(int(slots.stage[lane, slot])),
                BLUEPRINTS[slots.blueprint[lane, slot]] if OCCUPIED[slots.stage[lane, slot]] else "",
                float(slots.alpha[lane, slot]),
                int(slots.parameters[lane, slot]),
            )
            for slot, place in enumerate(self.bank.places)
        )
        return HostPicture(
            f"{self.config.task}, {self.config.host}",
            (*layers, f"head {spec.classes}"),
            shown,
            spec.parameter_count,
            int(self.epoch[lane]),
            self.config.max_epochs,
            accuracy,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on, copied: nested dictionaries of arrays and generator states."""
        return {
            "slots": self.slots.state(),
            "bank": self._keeper.state_of_bank(),
            "kept": self._keeper.state_dict(),
            "orders": self._orders.state_dict(),
            "governor": self._governor.state_dict(),
            "rewards": self._rewards.state_dict(),
            "attributions": self.attributions.state_dict(),
            "sample_chance": [chance.bit_generator.state for chance in self._sample_chance],
            "seed_chance": [chance.bit_generator.state for chance in self._seed_chance],
            **{name: getattr(self, name).copy() for name in self._ARRAYS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what another `GrowingHosts` of the same lanes and configuration was; bit for bit from then on.

        Raises:
            ContractError: It is of other lanes, slots or hosts.
        """
        try:
            for name in self._ARRAYS:
                np.copyto(getattr(self, name), state[name])
            self.slots.load_state(state["slots"])
            self._keeper.load_bank(state["bank"])
            self._keeper.load_state_dict(state["kept"])
            self._orders.load_state_dict(state["orders"])
            self._governor.load_state_dict(state["governor"])
            self._rewards.load_state_dict(state["rewards"])
            self.attributions.load_state_dict(state["attributions"])
            self._sample_chance = [seeding.restored(kept) for kept in state["sample_chance"]]
            self._seed_chance = [seeding.restored(kept) for kept in state["seed_chance"]]
        except (KeyError, ValueError, TypeError, InvariantViolation) as error:
            raise ContractError(f"this state is not one of {self.lanes} such hosts: {error!r}") from error
        self._legal = masks.legality(self.slots, self.config, self._takes)

    _ARRAYS = (
        "epoch",
        "_paid",
        "_accuracy",
        "_loss",
        "_layer_gradient_norms",
        "_last_op",
        "_last_succeeded",
    )
