"""The learner: a fold over its journal, and the sole owner of weights, optimisers and everything that changes a step.

Four moves change its state, each a fact in the journal:

* `admit`: an unroll arrived (`ExperienceAdmitted`); it goes into the buffer and the reward scale follows its rewards.
* `refuse`: one was not taken (`ExperienceRefused`).
* `step`: one update (`LearnerStepped`); which experiences it takes, and in which order, depends on the state and on
  the stream `(seed, "learner", rank, step)` alone.
* `skip`: an update that cannot be made was given up (`StepSkipped`); it consumes its batch.

So the same journal gives the same weights, bit for bit, under the same fingerprint. Time never enters. `state` is all
of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from esper_simic import seeding
from esper_simic.actions import OP, Op
from esper_simic.algorithms.impala import ImpalaLoss, impala_loss
from esper_simic.config import Config, fresh_per_batch
from esper_simic.errors import ContractError, InvariantViolation
from esper_simic.events import EpisodeFinished, ExperienceAdmitted, ExperienceRefused
from esper_simic.graphs import ObservationSpec
from esper_simic.learner_state import LearnerState, digest
from esper_simic.learning_rates import GroupConfig, LRPolicy, UnifiedLRController
from esper_simic.policies.graph_policy import Evaluation, GraphPolicy
from esper_simic.replay import GraphExperienceBuffer, Held, ReplaySample
from esper_simic.reward_scale import RewardScale
from esper_simic.trajectory import Trajectory

FORCED_VALUE_WEIGHT: Final = 0.2
"""Weight in the value loss of a step on which only WAIT was legal; in policy loss and entropy such a step has none."""

EPISODE_WINDOW: Final = 100

NOT_LIVING: Final = "not_the_living_incarnation"
"""Why an unroll is refused that was not sent by the life that it names: it settles nothing of that life."""

ADAM_EPSILON: Final = 1e-5
"""Larger than Adam's own 1e-8: steps of parameters whose gradients are nearly always 0 stay small."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one update did: the number of the step, its metrics, the digests, and the weights it made."""

    step: int
    environment_steps: int
    metrics: dict[str, float]
    digest: str
    state_digest: str | None
    unrolls_consumed: tuple[int, ...]


class Unconsumed(NamedTuple):
    """An admitted unroll of which something is still to be consumed; its experiences end below `stop_serial`."""

    position: int
    actor: int
    stop_serial: int


class Learner:
    """Weights, optimisers, learning rates, buffer and normalisers of one learner process.

    Args:
        config: The run's configuration.
        spec: Shapes of one observation.
        rank: Which learner of the run.
    """

    def __init__(self, config: Config, spec: ObservationSpec, rank: int = 0) -> None:
        self._config, self._rank = config, rank
        trainer = config.simic_trainer
        self.policy = GraphPolicy(spec, trainer, seeding.generator(trainer.seed, "policy"))
        self.buffer = GraphExperienceBuffer(
            config.experience_buffer.capacity, spec, trainer.unroll_length, self.policy.state_size
        )
        self._optimizers = {
            name: torch.optim.Adam(parameters, lr=rate, eps=ADAM_EPSILON, fused=True)
            for name, parameters, rate in (
                ("policy", self.policy.policy_parameters(), trainer.effective_policy_lr),
                ("value", self.policy.value_parameters(), trainer.effective_value_lr),
            )
        }
        self.learning_rates = UnifiedLRController()
        for name, optimizer, policy, base in (
            ("policy", self._optimizers["policy"], LRPolicy.POLICY_NETWORK, trainer.effective_policy_lr),
            ("value", self._optimizers["value"], LRPolicy.VALUE_NETWORK, trainer.effective_value_lr),
        ):
            group = GroupConfig(policy, base, trainer.warmup_epochs, trainer.min_lr)
            self.learning_rates.register_optimizer(name, optimizer, group)
        self.reward_scale = RewardScale(trainer.gamma)
        self._fresh_per_batch = fresh_per_batch(config)
        self._acting_normaliser = self._normaliser_now()
        self.steps_done = 0
        self.environment_steps = 0
        self._next_episodes: dict[int, list[int]] = {}
        self._unrolls: dict[int, int] = {}
        self._answered: dict[int, tuple[int, int]] = {}
        self._unconsumed: deque[Unconsumed] = deque()
        self._episodes: deque[EpisodeFinished] = deque(maxlen=EPISODE_WINDOW)

    # -- folding ---------------------------------------------------------------------------------------------------

    def lag(self, policy_version: int) -> int:
        """Updates made since the policy of this version."""
        return self.steps_done - policy_version

    def refuse(self, event: ExperienceRefused) -> None:
        """Fold an `ExperienceRefused`: its environment steps were made, its contents are gone."""
        self.environment_steps += event.steps
        if event.reason != NOT_LIVING:
            self._follow_answers(event)

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
        self._unconsumed.append(Unconsumed(position, event.actor, serials.stop))
        begins = trajectory.episode_start[0]
        self.reward_scale.update(event.actor, begins, trajectory.rewards, trajectory.ended)
        self.policy.normaliser.update(
            {key: tensor[:-1] for key, tensor in trajectory.observations.items()},
        )
        self._follow(event)
        self._episodes.extend(episode for episode in event.episodes if not episode.truncated)
        if self.buffer.inserted <= self._config.experience_buffer.min_experiences:
            self.buffer.consume_all()
        return self._take_consumed()

    def lose(self, event: ExperienceAdmitted) -> None:
        """Fold an `ExperienceAdmitted` that cannot be taken: it counts as made and answered, its contents are gone."""
        self._follow(event)

    def next_episodes(self, actor: int) -> list[int]:
        """Numbers of the episodes with which a new incarnation of an actor begins its lanes.

        They follow the highest number that any admitted unroll of the actor has reached, so that no episode's chance
        is used twice; what its predecessor did not finish is lost.
        """
        lanes = self._config.environment.environments_per_actor
        return list(self._next_episodes.get(actor, [0] * lanes))

    def _follow(self, event: ExperienceAdmitted) -> None:
        self.environment_steps += event.length * event.lanes
        self._unrolls[event.actor] = self.unrolls(event.actor) + 1
        self._follow_answers(event)
        reached = list(event.episode_numbers)
        for episode in event.episodes:
            reached[episode.lane] = max(reached[episode.lane], episode.number + 1)
        self._next_episodes[event.actor] = [number + 1 for number in reached]

    def _follow_answers(self, event: ExperienceAdmitted | ExperienceRefused) -> None:
        life, sequence = self._answered.get(event.actor, (0, 0))
        if event.incarnation > life:
            self._answered[event.actor] = (event.incarnation, event.sequence)
        elif event.incarnation == life:
            self._answered[event.actor] = (life, max(sequence, event.sequence))

    def settled(self, actor: int, incarnation: int) -> int:
        """The newest sequence of this life of an actor that was admitted or refused; 0 for none."""
        life, sequence = self._answered.get(actor, (0, 0))
        return sequence if life == incarnation else 0

    def unrolls(self, actor: int) -> int:
        """Unrolls of an actor that were admitted, over all its lives."""
        return self._unrolls.get(actor, 0)

    def unconsumed(self) -> tuple[Unconsumed, ...]:
        """Admitted unrolls of which something is still to be consumed, oldest first."""
        return tuple(self._unconsumed)

    @property
    def score(self) -> float | None:
        """Mean return of the recent training episodes; None before the first."""
        if not self._episodes:
            return None
        return float(np.mean([episode.episode_return for episode in self._episodes]))

    def can_step(self) -> bool:
        """Whether enough experience is there for an update."""
        enough = self.buffer.inserted >= self._config.experience_buffer.min_experiences
        return enough and self.buffer.fresh >= self._fresh_per_batch

    def next_batch(self) -> ReplaySample:
        """The batch that the next update takes; nothing is consumed.

        Raises:
            InvariantViolation: Not enough experience (`can_step` is false).
        """
        if not self.can_step():
            raise InvariantViolation("step without enough experience; ask can_step first")
        trainer = self._config.simic_trainer
        rng = seeding.generator(trainer.seed, "learner", self._rank, self.steps_done)
        serials = self.buffer.choose(trainer.batch_size, self._fresh_per_batch, rng=rng)
        return self.buffer.read(serials, self._fresh_per_batch)

    def step(self) -> StepReport:
        """Make one update.

        Raises:
            InvariantViolation: Not enough experience (`can_step` is false), or a loss or gradient is not finite.
        """
        trainer = self._config.simic_trainer
        sample = self.next_batch()
        self.buffer.consume(sample.fresh)
        loss = self._loss(sample.trajectory)
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.total.backward()  # type: ignore[no-untyped-call]
        grad_norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), trainer.max_grad_norm)
        if not torch.isfinite(grad_norm) or not torch.isfinite(loss.total):
            raise InvariantViolation(
                f"step {self.steps_done + 1}: loss {loss.total}, gradient norm {grad_norm}"
            )
        for name in self._optimizers:
            self.learning_rates.step(name)
        self.steps_done += 1
        self._acting_normaliser = self._normaliser_now()
        whole = self.steps_done % trainer.digest_every_steps == 0
        return StepReport(
            step=self.steps_done,
            environment_steps=self.environment_steps,
            metrics=self._metrics(loss, float(grad_norm), sample),
            digest=digest(dict(self.policy.named_parameters())),
            state_digest=self.state().digest if whole else None,
            unrolls_consumed=self._take_consumed(),
        )

    def skip(self) -> tuple[int, ...]:
        """Fold a `StepSkipped`: the step is counted and its batch consumed, as far as there is one; nothing is learned.

        Returns:
            Positions of the unrolls that are now wholly consumed.
        """
        self.buffer.consume(min(self._fresh_per_batch, self.buffer.fresh))
        self.steps_done += 1
        return self._take_consumed()

    def _take_consumed(self) -> tuple[int, ...]:
        taken = []
        while self._unconsumed and self._unconsumed[0].stop_serial <= self.buffer.consumed:
            taken.append(self._unconsumed.popleft().position)
        return tuple(taken)

    # -- one update ------------------------------------------------------------------------------------------------

    def _loss(self, trajectory: Trajectory) -> ImpalaLoss:
        trainer = self._config.simic_trainer
        length = trajectory.length
        evaluation = self._evaluate(trajectory)
        ended = trajectory.ended
        discounts = trainer.gamma * (~ended).float()
        # A cut episode goes on outside: its last observation's value is folded into the reward, the discount is 0.
        rewards = self.reward_scale.scale(trajectory.rewards, trainer.reward_clip)
        rewards = rewards + trainer.gamma * trajectory.truncation_values
        free = self._free(trajectory)
        return impala_loss(
            log_probs=evaluation.log_probs[:length],
            behaviour_log_probs=trajectory.behaviour_log_probs,
            values=evaluation.values[:length],
            bootstrap_value=evaluation.values[length].detach(),
            rewards=rewards,
            discounts=discounts,
            entropies=evaluation.entropy[:length],
            policy_weights=free,
            value_weights=torch.where(free > 0, 1.0, FORCED_VALUE_WEIGHT),
            clip_rho=trainer.rho_bar,
            clip_c=trainer.c_bar,
            lambda_=trainer.vtrace_lambda,
            value_coefficient=trainer.value_coefficient,
            entropy_coefficient=self._entropy_coefficient(),
        )

    def _evaluate(self, trajectory: Trajectory) -> Evaluation:
        # Row T has no action; WAIT, always legal, stands in for it and its log-probability is not used.
        stand_in = torch.full_like(trajectory.actions[:1], 0)
        stand_in[..., OP] = Op.WAIT
        return self.policy.evaluate(
            trajectory.observations,
            trajectory.episode_start,
            trajectory.initial_state,
            torch.cat([trajectory.actions, stand_in]),
        )

    def _free(self, trajectory: Trajectory) -> Tensor:
        """`[T, B]`: 1 where the policy had a choice of operation, 0 where only WAIT was legal."""
        layout = self.policy.spec.mask_layout
        operations = trajectory.observations["action_mask"][:-1, :, layout.op]
        return (operations.sum(dim=-1) > 1).float()

    def _entropy_coefficient(self) -> float:
        trainer = self._config.simic_trainer
        done = min(1.0, self.environment_steps / trainer.entropy_anneal_steps)
        return trainer.entropy_coefficient + done * (
            trainer.entropy_coefficient_final - trainer.entropy_coefficient
        )

    def _metrics(self, loss: ImpalaLoss, grad_norm: float, sample: ReplaySample) -> dict[str, float]:
        metrics = {name: float(value) for name, value in loss.statistics().items()}
        metrics |= {f"learning_rate.{name}": rate for name, rate in self.learning_rates.rates().items()}
        lags = self.steps_done - 1 - sample.versions
        metrics |= {
            "grad_norm": grad_norm,
            "entropy_coefficient": self._entropy_coefficient(),
            "reward_deviation": self.reward_scale.deviation,
            "policy_lag": float(lags[: sample.fresh].mean()),
            "policy_lag_max": float(lags[: sample.fresh].max()),
            "replay_age": float(lags.mean()),
            "buffer_size": float(len(self.buffer)),
        }
        if self._episodes:
            metrics |= {
                "episodic_return": float(np.mean([episode.episode_return for episode in self._episodes])),
                "episodic_length": float(np.mean([episode.length for episode in self._episodes])),
                "episodic_accuracy": float(np.mean([episode.accuracy for episode in self._episodes])),
                "episodic_parameters": float(
                    np.mean([episode.parameters_added for episode in self._episodes])
                ),
            }
        return metrics

    # -- bytes -----------------------------------------------------------------------------------------------------

    def weights(self) -> bytes:
        """The policy as it was after the last step, as safetensors bytes, for actors.

        The normaliser goes on with every admission; a version does not, whenever its bytes are made.
        """
        named = self.policy.state_dict() | self._acting_normaliser
        return safetensors.torch.save({name: tensor.contiguous() for name, tensor in named.items()})

    def _normaliser_now(self) -> dict[str, Tensor]:
        return {
            f"normaliser.{name}": tensor.clone()
            for name, tensor in self.policy.normaliser.state_dict().items()
        }

    def state(self) -> LearnerState:
        """All of the state at this moment. Its tensors are the learner's own: `copy` it before the next move."""
        return LearnerState(self._tensors(), self._numbers(), self._addresses())

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
            self._load_tensors(state.tensors)
            self._load_rates(numbers["learning_rates"])
            self.steps_done = numbers["steps_done"]
            self.environment_steps = numbers["environment_steps"]
            self.reward_scale.load_state_dict(numbers["reward_scale"])
            self._next_episodes = {int(actor): list(n) for actor, n in numbers["next_episodes"].items()}
            self._unrolls = {int(actor): count for actor, count in numbers["unrolls"].items()}
            self._episodes.extend(msgspec.convert(numbers["episodes"], list[EpisodeFinished]))
            self._answered = {int(a): (life, newest) for a, (life, newest) in addresses["answered"].items()}
            self._unconsumed.extend(Unconsumed(*entry) for entry in addresses["unconsumed"])
            buffer, first_serial = numbers["buffer"], addresses["buffer"]["first_serial"]
            self.buffer.restore(first_serial, buffer["inserted"], buffer["consumed"], held)
        except (KeyError, TypeError, ValueError, RuntimeError, msgspec.ValidationError) as error:
            raise ContractError(f"this state is not one of a learner so configured: {error!r}") from error

    def _tensors(self) -> dict[str, Tensor]:
        named = {f"policy.{name}": tensor.detach() for name, tensor in self.policy.state_dict().items()}
        named |= {f"acting.{name}": tensor for name, tensor in self._acting_normaliser.items()}
        for name, optimizer in self._optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                named |= {
                    f"optimizer.{name}.{index}.{field}": value for field, value in sorted(state.items())
                }
        return named

    def _load_tensors(self, tensors: dict[str, Tensor]) -> None:
        policy = "policy."
        self.policy.load_state_dict(
            {name.removeprefix(policy): t for name, t in tensors.items() if name.startswith(policy)}
        )
        acting = "acting."
        self._acting_normaliser = {
            name.removeprefix(acting): t.clone() for name, t in tensors.items() if name.startswith(acting)
        }
        for name, optimizer in self._optimizers.items():
            prefix = f"optimizer.{name}."
            state: dict[int, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                if key.startswith(prefix):
                    index, field = key.removeprefix(prefix).split(".")
                    # The optimiser takes them as its own and changes them in place.
                    state.setdefault(int(index), {})[field] = tensor.clone()
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _load_rates(self, steps: dict[str, int]) -> None:
        if set(steps) != set(self._optimizers):
            raise ValueError(
                f"learning rates of {sorted(steps)}, the optimisers are {sorted(self._optimizers)}"
            )
        self.learning_rates.load_state_dict(steps)

    def _numbers(self) -> dict[str, Any]:
        return {
            "steps_done": self.steps_done,
            "environment_steps": self.environment_steps,
            "learning_rates": self.learning_rates.state_dict(),
            "reward_scale": self.reward_scale.state_dict(),
            "next_episodes": {str(actor): list(n) for actor, n in sorted(self._next_episodes.items())},
            "unrolls": {str(actor): count for actor, count in sorted(self._unrolls.items())},
            "episodes": [msgspec.to_builtins(episode) for episode in self._episodes],
            "buffer": {"inserted": self.buffer.inserted, "consumed": self.buffer.consumed},
        }

    def _addresses(self) -> dict[str, Any]:
        return {
            "buffer": self.buffer.addresses(),
            "unconsumed": [list(entry) for entry in self._unconsumed],
            "answered": {str(actor): list(newest) for actor, newest in sorted(self._answered.items())},
        }
