"""The learner: a fold over its journal, and the sole owner of weights, optimisers and everything that changes a step.

Moves that change its state, each a fact in the journal:

* `admit`: an unroll arrived (`ExperienceAdmitted`); it goes into the buffer and the reward scale follows its rewards.
* `begin_with`: before anything else, weights were brought from elsewhere (`PolicyImported`).
* `refuse`: one was not taken (`ExperienceRefused`).
* `step`: one update was made, or was tried in vain (`LearnerStepped`, `StepFailed`); which experiences it takes, and in
  which order, depends on the state and on the stream `(seed, "learner", rank, step)` alone.
* `judge`: a stage of the curriculum was passed, a round of it failed, or a request about it was answered
  (`CurriculumJudged`).
* `fail`: the same as a step that was tried in vain, from its record: what did not fit into memory once may fit now.
* `lift`: an operator lets a training that has halted itself go on (`HaltLifted`).
* `skip`: an update that cannot be made was given up (`StepSkipped`); it consumes its batch.

So the same journal gives the same weights, bit for bit, under the same fingerprint. Time enters as `StepInputs`, which
stand in the record of the step. `state` is all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import msgspec
import safetensors.torch
from torch import Tensor

from esper_simic import learner_figures as figures
from esper_simic import safety as safety_rules
from esper_simic import seeding
from esper_simic.config import Config, fresh_per_batch
from esper_simic.config_behaviour import POLICY
from esper_simic.curriculum import CurriculumState
from esper_simic.errors import ContractError, InvariantViolation
from esper_simic.events import (
    CurriculumJudged,
    ExperienceAdmitted,
    ExperienceRefused,
    HaltLifted,
    StepFact,
    StepFailed,
)
from esper_simic.execution import CPU, IN_FLIGHT_MAX, Execution
from esper_simic.ladder import Response
from esper_simic.learner_stages import Stages
from esper_simic.learner_state import LearnerState, digest
from esper_simic.learning_rates import UnifiedLRController
from esper_simic.ledger import Ledger, Unconsumed
from esper_simic.loss_scale import LossScale
from esper_simic.policies.adapter_state import AdapterState
from esper_simic.policies.policy import Policy
from esper_simic.replay import GraphExperienceBuffer, Held, ReplaySample, Serials
from esper_simic.reward_scale import RewardScale
from esper_simic.rungs import Rung
from esper_simic.safety import Safety, StepInputs, StepMode
from esper_simic.safety_facts import GoodStateRestored
from esper_simic.specs import ExperienceSpec
from esper_simic.step_report import Attempt, StepReport, attempt, outcome_of
from esper_simic.telemetry import Phase, StepObserver
from esper_simic.trajectory import Trajectory
from esper_simic.updates.batch import Batch, prepare
from esper_simic.updates.engine import Engine
from esper_simic.updates.optimisers import UNWATCHED
from esper_simic.updates.update import Updated

FISHER_LANES: Final = 8


class Learner:
    """Weights, optimisers, learning rates, buffer and normalisers of one learner process.

    Args:
        config: The run's configuration.
        spec: Shapes of one experience.
        rank: Which learner of the run.
        execution: How updates are carried out.
    """

    def __init__(
        self, config: Config, spec: ExperienceSpec, rank: int = 0, execution: Execution = CPU
    ) -> None:
        self._config, self._rank, self._execution = config, rank, execution
        trainer = config.simic_trainer
        self.engine = Engine(trainer, spec, execution)
        self.buffer = GraphExperienceBuffer(
            config.experience_buffer.capacity, spec, trainer.unroll_length, self.policy.state_size
        )
        self.reward_scale = RewardScale(trainer.gamma)
        self.ledger = Ledger(config.environment.environments_per_actor)
        self.safety = Safety()
        self.stages = Stages(trainer, self._samples_to_hold)
        self.steps_done = 0
        self._lifts = 0
        self._returns_since: list[float] = []
        if trainer.lora_enabled and trainer.lora_start_step == 0:
            self.engine.begin_adapters()

    @property
    def policy(self) -> Policy:
        """The network."""
        return self.engine.policy

    @property
    def learning_rates(self) -> UnifiedLRController:
        """The only thing that changes a learning rate."""
        return self.engine.optimisers.rates

    @property
    def environment_steps(self) -> int:
        """Steps of environments that were made, whether their unrolls were taken or not."""
        return self.ledger.environment_steps

    # -- folding ---------------------------------------------------------------------------------------------------

    def lag(self, policy_version: int) -> int:
        """Updates made since the policy of this version."""
        return self.steps_done - policy_version

    def refuse(self, event: ExperienceRefused) -> None:
        """Fold an `ExperienceRefused`: its environment steps were made, its contents are gone."""
        self.ledger.refused(event)

    def admit(self, position: int, event: ExperienceAdmitted, trajectory: Trajectory) -> tuple[int, ...]:
        """Fold an `ExperienceAdmitted`.

        Until `min_experiences` were admitted they only fill the buffer and count as consumed at once.

        Args:
            position: Journal position of the event.
            event: The event.
            trajectory: Its frames, decoded.

        Returns:
            Positions of the unrolls that are now wholly consumed.
        """
        if trajectory.length != self._config.simic_trainer.unroll_length:
            raise InvariantViolation(
                f"an admitted unroll has {trajectory.length} steps; decoding must refuse it"
            )
        serials = self.buffer.insert(trajectory, event.policy_version, position)
        self.ledger.waits(Unconsumed(position, event.actor, serials.stop))
        begins = trajectory.episode_start[0]
        self.reward_scale.update(event.actor, begins, trajectory.rewards, trajectory.ended)
        seen = {key: tensor[:-1] for key, tensor in trajectory.observations.items()}
        self.policy.normaliser.update(self._execution.to_device(seen))
        self.ledger.admitted(event)
        if event.behaviour == POLICY:
            self.stages.counted(event)
        whole = [episode for episode in event.episodes if episode.is_whole]
        if event.behaviour != POLICY:
            # What another achieves is no result of this training: no score, no objective, no success comes of it.
            self.ledger.others_episodes.extend(whole)
            whole = []
        self.ledger.episodes.extend(whole)
        # Journals of before there was `cut` know no safety either, and their digests no such number.
        self._returns_since.extend(episode.episode_return for episode in whole if episode.cut is not None)
        if self.buffer.inserted <= self._config.experience_buffer.min_experiences:
            self.buffer.consume_all()
        return self.ledger.take_consumed(self.buffer.consumed)

    def lose(self, event: ExperienceAdmitted) -> None:
        """Fold an `ExperienceAdmitted` that cannot be taken: it counts as made and answered, its contents are gone."""
        self.ledger.admitted(event)

    def begin_with(self, weights: bytes, *adapters: bytes) -> str:
        """Fold a `PolicyImported`, whose frames these are, before anything else; the parameters' digest."""
        self.engine.begin_with(safetensors.torch.load(weights), *map(AdapterState.from_bytes, adapters))
        return digest(dict(self.policy.named_parameters()))

    # -- curriculum ------------------------------------------------------------------------------------------------

    @property
    def stage(self) -> int:
        """Index of the stage of the curriculum in whose environment actors are to play; 0 where there is none."""
        return self.curriculum.stage

    @property
    def curriculum(self) -> CurriculumState:
        """Where the training stands in it."""
        return self.stages.state

    def verdict(self, now_s: float) -> CurriculumJudged | None:
        """What a look at the curriculum at this time would come to; None for nothing. Changes nothing: see `judge`."""
        return self.stages.verdict(now_s)

    def curriculum_figures(self) -> dict[str, float]:
        """Where the curriculum stands, for whoever watches; nothing where there is none."""
        rules = self.stages.rules
        return {} if rules is None else figures.of_curriculum(rules, self.curriculum)

    def _samples_to_hold(self) -> int:
        trainer = self._config.simic_trainer
        held = len(self.buffer) - len(self.buffer.barred)
        return min(trainer.ewc_sample_size, held) if trainer.ewc_lambda > 0 else 0

    def judge(self, event: CurriculumJudged) -> None:
        """Fold a `CurriculumJudged`; where fewer experiences are there than it names, these say what is held."""
        self.stages.judge(event)
        samples = min(event.consolidated, self._samples_to_hold())
        if samples:
            rng = seeding.generator(
                self._config.simic_trainer.seed, "fisher", self._rank, self.steps_done, event.stage
            )
            serials = self.buffer.draw(samples, rng=rng)
            self.engine.consolidate(self._few_at_a_time(serials), rng)

    def _few_at_a_time(self, serials: Serials) -> Iterator[Batch]:
        """Batches of few lanes: per-sample gradients walk through the whole of one. The next one is on its way."""
        feed = self._execution.feed()
        for start in range(0, len(serials), FISHER_LANES):
            feed.put(self.buffer.gather(serials[start : start + FISHER_LANES]).tensors())
            if len(feed) == IN_FLIGHT_MAX:
                yield self._prepared(feed.take())
        while len(feed):
            yield self._prepared(feed.take())

    def _prepared(self, there: Mapping[str, Tensor]) -> Batch:
        """A batch of a trajectory's tensors, which are on the device."""
        trajectory = Trajectory.from_tensors(there)
        return prepare(trajectory, self.policy, self.reward_scale, self._config.simic_trainer)

    @property
    def score(self) -> float | None:
        """Mean return of the recent training episodes; None before the first."""
        return figures.of_episodes(self.ledger.episodes).get("episodic_return")

    # -- steps -----------------------------------------------------------------------------------------------------

    def mode(self, now_s: float) -> StepMode:
        """What an update at this time may be."""
        return safety_rules.plan(self.safety, self._config.simic_trainer, now_s)

    def safety_figures(self) -> dict[str, float]:
        """How breakers (1 closed, 2 open, 3 half open) and error budgets (share left) stand, for whoever watches."""
        return figures.of_safety(self.safety, self._config.simic_trainer)

    @property
    def is_halted(self) -> bool:
        """Whether no update is made any more: every measure against its troubles was taken in vain."""
        return self.safety.ladder.standing.rung is Rung.HALTED

    def lifted(self, order: int) -> HaltLifted | None:
        """What it comes to that an operator lets a halted training go on; None for nothing. `lift` folds it.

        Args:
            order: The operator's, counted over the whole run; one that was obeyed already lifts nothing more.
        """
        if not self.is_halted or order <= self._lifts:
            return None
        return HaltLifted(order=order, facts=safety_rules.resume(self.safety)[1])

    def lift(self, event: HaltLifted) -> None:
        """Fold a `HaltLifted`; a fold that is not exact may not have come to the halt."""
        self._lifts = event.order
        if self.is_halted:
            self.safety = safety_rules.resume(self.safety)[0]

    def lockstep_time_s(self) -> float:
        """The time of the next update in lockstep: a function of the state."""
        return safety_rules.lockstep_time_s(self.safety, self._config.simic_trainer)

    def can_step(self, batch_size: int | None = None) -> bool:
        """Whether enough experience is there for an update, of this batch size or of the configured one."""
        enough = self.buffer.inserted >= self._config.experience_buffer.min_experiences
        return enough and self.buffer.fresh >= fresh_per_batch(self._config, batch_size)

    def next_batch(self, batch_size: int | None = None) -> ReplaySample:
        """The batch that the next update takes; nothing is consumed.

        Raises:
            InvariantViolation: Not enough experience (`can_step` is false).
        """
        if not self.can_step(batch_size):
            raise InvariantViolation("step without enough experience; ask can_step first")
        trainer = self._config.simic_trainer
        rng = seeding.generator(trainer.seed, "learner", self._rank, self.steps_done)
        size = trainer.batch_size if batch_size is None else batch_size
        fresh = fresh_per_batch(self._config, batch_size)
        return self.buffer.read(self.buffer.choose(size, fresh, rng=rng), fresh)

    def step(self, inputs: StepInputs | None = None, observer: StepObserver = UNWATCHED) -> StepReport:
        """Make one update.

        Args:
            inputs: What came from outside with it. None for journals of before there was such a thing: then nothing
                is adjusted and an update that fails is an error.
            observer: Told how the update goes on; it decides nothing.

        Raises:
            InvariantViolation: Not enough experience (`can_step` is false), the safety of the training does not allow
                an update now, or, without inputs, a loss or gradient is not finite.
        """
        trainer = self._config.simic_trainer
        mode = StepMode() if inputs is None else self.mode(inputs.at_s)
        batch_size = mode.batch_size(trainer.batch_size)
        observer.begun(step=self.steps_done + 1, batch_size=batch_size)
        sample = self.next_batch(batch_size)
        observer.passed(Phase.SAMPLING)
        rates, loss_scale = self.learning_rates.state_dict(), self.engine.optimisers.loss_scale
        tried = attempt(lambda: self._update(sample, mode, observer), lambda: self.engine.optimisers.moves)
        if tried.updated is not None:
            observer.done(
                loss=tried.updated.loss,
                grad_norm=tried.updated.grad_norm,
                conservative_mode=mode.is_conservative,
            )
        else:
            observer.failed(tried.failure, tried.error)
        if inputs is None and tried.failure:
            raise InvariantViolation(f"step {self.steps_done + 1}: {tried.failure}")
        if tried.failure:
            # Some of its optimisers, or of its minibatches, had their step; `fail` knows of none.
            self.engine.optimisers.loss_scale = loss_scale
            if self.learning_rates.state_dict() != rates:
                self.learning_rates.load_state_dict(rates)
        return self._fold_step(sample, inputs, tried)

    def fail(self, event: StepFailed) -> StepReport:
        """Fold a `StepFailed` as it was when it was recorded: nothing is computed again.

        Raises:
            InvariantViolation: There is not the experience that was there then.
        """
        mode = self.mode(event.inputs.at_s)
        sample = self.next_batch(mode.batch_size(self._config.simic_trainer.batch_size))
        tried = Attempt(None, event.reason, event.out_of_memory, event.moved)
        return self._fold_step(sample, event.inputs, tried)

    def skip(self) -> tuple[int, ...]:
        """Fold a `StepSkipped`: the step is counted and its batch consumed, as far as there is one; nothing is learned.

        Returns:
            Positions of the unrolls that are now wholly consumed.
        """
        self.buffer.consume(min(fresh_per_batch(self._config), self.buffer.fresh))
        self.steps_done += 1
        return self.ledger.take_consumed(self.buffer.consumed)

    def _update(self, sample: ReplaySample, mode: StepMode, observer: StepObserver) -> Updated:
        trainer = self._config.simic_trainer
        # Not a feed: which batch is the next one depends on this update and on what comes until then.
        return self.engine.update(
            self._prepared(self._execution.to_device(sample.trajectory.tensors())),
            mode,
            entropy_coefficient=self._entropy_coefficient(),
            progress=self._progress(),
            rng=seeding.generator(trainer.seed, "update", self._rank, self.steps_done),
            observer=observer,
        )

    def _fold_step(self, sample: ReplaySample, inputs: StepInputs | None, tried: Attempt) -> StepReport:
        """What follows from an update, made or not."""
        updated, out_of_memory = tried.updated, tried.out_of_memory
        facts: list[StepFact] = []
        responses: tuple[Response, ...] = ()
        if inputs is not None:
            trainer = self._config.simic_trainer
            outcome = outcome_of(tried, tuple(self._returns_since), trainer)
            observed = safety_rules.observe(self.safety, trainer, outcome, inputs)
            self.safety, responses = observed.safety, observed.responses
            facts += observed.facts
            self._returns_since.clear()
        changed, tampered = self.engine.take_news()
        # Of an update that was not made the rates were not changed, either; what somebody else wrote, was.
        facts += tampered if updated is None else [*changed, *tampered]
        if not out_of_memory:
            self.buffer.consume(sample.fresh)
        elif tried.moved:
            # Where the optimiser itself ran short, some weights have moved and others not.
            responses = (Response.RESTORE, *responses)
            facts.append(GoodStateRestored(reason="out_of_memory"))
        self._respond(responses, sample)
        self.steps_done += 1
        # Rates are told as this update had them: adapters begin with others.
        metrics = {} if updated is None else self._metrics(updated, sample)
        facts += self.engine.adapters_at(self.steps_done)
        whole = self.steps_done % self._config.simic_trainer.digest_every_steps == 0
        return StepReport(
            step=self.steps_done,
            environment_steps=self.environment_steps,
            metrics=metrics,
            digest=digest(dict(self.policy.named_parameters())),
            state_digest=self.state().digest if whole else None,
            unrolls_consumed=self.ledger.take_consumed(self.buffer.consumed),
            failure=tried.failure,
            out_of_memory=out_of_memory,
            moved=tried.moved,
            facts=tuple(facts),
        )

    def _respond(self, responses: tuple[Response, ...], sample: ReplaySample) -> None:
        """What the learner itself does about trouble; the rest is in the next update's `StepMode`."""
        if Response.RESTORE in responses or Response.HALT in responses:
            self.engine.restore_good()
        if Response.SKIP in responses:
            self.buffer.bar(sample.serials.tolist())
        if Response.KEEP in responses:
            self.engine.keep_good()

    def _entropy_coefficient(self) -> float:
        trainer = self._config.simic_trainer
        return trainer.entropy_coefficient + self._progress() * (
            trainer.entropy_coefficient_final - trainer.entropy_coefficient
        )

    def _progress(self) -> float:
        return min(1.0, self.environment_steps / self._config.simic_trainer.entropy_anneal_steps)

    def _metrics(self, updated: Updated, sample: ReplaySample) -> dict[str, float]:
        rates = self.learning_rates.rates()
        metrics = updated.metrics | {f"learning_rate.{name}": rate for name, rate in rates.items()}
        metrics |= figures.of_batch(sample, self.steps_done - 1)
        metrics |= {
            "grad_norm": updated.grad_norm,
            "entropy_coefficient": self._entropy_coefficient(),
            "reward_deviation": self.reward_scale.deviation,
            "buffer_size": float(len(self.buffer)),
            "conservative_mode": float(self.safety.conservative.active),
            "conservative_entries": float(self.safety.conservative.entries),
        }
        metrics |= self.curriculum_figures() | figures.of_convergence(self.safety)
        metrics |= figures.of_others(self.ledger.others_episodes)
        return metrics | figures.of_episodes(self.ledger.episodes)

    # -- bytes -----------------------------------------------------------------------------------------------------

    def weights(self) -> bytes:
        """The policy as it was after the last step, as safetensors bytes, for actors."""
        named = self.engine.acting_weights()
        return safetensors.torch.save({name: tensor.contiguous() for name, tensor in named.items()})

    def state(self) -> LearnerState:
        """All of the state at this moment. Its tensors are the learner's own: `copy` it before the next move."""
        return LearnerState(self.engine.tensors(), self._numbers(), self._addresses())

    def load_state(self, state: LearnerState, held: Iterable[Held]) -> None:
        """Become what another learner of the same configuration was. For a learner that has folded nothing yet.

        Args:
            state: As `state` gave it.
            held: The unrolls at the buffer's addresses, oldest first; read one after the other.

        Raises:
            ContractError: The state does not fit this configuration.
        """
        numbers, addresses = state.numbers, state.addresses
        try:
            self.engine.load_tensors(state.tensors)
            self._load_rates(numbers["learning_rates"])
            self.steps_done = numbers["steps_done"]
            self.reward_scale.load_state_dict(numbers["reward_scale"])
            self.ledger.load(numbers, addresses)
            self.safety = msgspec.convert(numbers.get("safety", {}), Safety)
            self.stages.load(numbers)
            if self._execution.has_loss_scale and "loss_scale" in numbers:
                self.engine.optimisers.loss_scale = msgspec.convert(numbers["loss_scale"], LossScale)
            self._returns_since = list(numbers.get("returns_since", []))
            self._lifts = numbers.get("lifts", 0)
            buffer, first_serial = numbers["buffer"], addresses["buffer"]["first_serial"]
            barred = buffer.get("barred", [])
            self.buffer.restore(first_serial, buffer["inserted"], buffer["consumed"], held, barred)
        except (KeyError, TypeError, ValueError, RuntimeError, msgspec.ValidationError) as error:
            raise ContractError(f"this state is not one of a learner so configured: {error!r}") from error

    def _load_rates(self, rates: dict[str, Any]) -> None:
        try:
            self.learning_rates.load_state_dict(rates)
        except InvariantViolation as error:
            raise ValueError(str(error)) from error

    def _numbers(self) -> dict[str, Any]:
        """What was never used is left out, so that digests of older journals hold."""
        buffer: dict[str, Any] = {"inserted": self.buffer.inserted, "consumed": self.buffer.consumed}
        if self.buffer.barred:
            buffer["barred"] = self.buffer.barred
        books = self.ledger.numbers()
        numbers: dict[str, Any] = {
            "steps_done": self.steps_done,
            "environment_steps": books.pop("environment_steps"),
            "learning_rates": self.learning_rates.state_dict(),
            "reward_scale": self.reward_scale.state_dict(),
            **books,
            "buffer": buffer,
        }
        if self.safety.clock.reading_s is not None:
            numbers["safety"] = msgspec.json.decode(msgspec.json.encode(self.safety))
        numbers |= self.stages.numbers()
        if self.engine.optimisers.loss_scale is not None:
            numbers["loss_scale"] = msgspec.to_builtins(self.engine.optimisers.loss_scale)
        if self._returns_since:
            numbers["returns_since"] = list(self._returns_since)
        if self._lifts:
            numbers["lifts"] = self._lifts
        return numbers

    def _addresses(self) -> dict[str, Any]:
        return {"buffer": self.buffer.addresses(), **self.ledger.addresses()}
