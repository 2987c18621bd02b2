"""The learner: a fold over its journal, and the sole owner of weights, optimisers and everything that changes a step.

Two moves change its state, each a fact in the journal first:

* `admit`: an unroll arrives (`ExperienceAdmitted`); it goes into the buffer and the reward scale follows its rewards.
* `step`: one update (`LearnerStepped`); which experiences it takes, and in which order, depends on the state and on
  the stream `(seed, "learner", rank, step)` alone.

So the same journal gives the same weights, bit for bit, under the same fingerprint. Time never enters.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from esper_simic import seeding
from esper_simic.actions import OP, Op
from esper_simic.algorithms.impala import ImpalaLoss, impala_loss
from esper_simic.config import Config, fresh_per_batch
from esper_simic.errors import InvariantViolation
from esper_simic.events import EpisodeFinished, ExperienceAdmitted
from esper_simic.graphs import ObservationSpec
from esper_simic.learning_rates import GroupConfig, LRPolicy, UnifiedLRController
from esper_simic.policies.graph_policy import Evaluation, GraphPolicy
from esper_simic.replay import GraphExperienceBuffer, ReplaySample
from esper_simic.reward_scale import RewardScale
from esper_simic.trajectory import Trajectory

FORCED_VALUE_WEIGHT: Final = 0.2
"""Weight in the value loss of a step on which only WAIT was legal; in policy loss and entropy such a step has none."""

EPISODE_WINDOW: Final = 100

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
        self.steps_done = 0
        self.environment_steps = 0
        self._next_episodes: dict[int, list[int]] = {}
        self._unconsumed: deque[tuple[int, int]] = deque()
        self._episodes: deque[EpisodeFinished] = deque(maxlen=EPISODE_WINDOW)

    # -- folding ---------------------------------------------------------------------------------------------------

    def lag(self, policy_version: int) -> int:
        """Updates made since the policy of this version."""
        return self.steps_done - policy_version

    def count_refused(self, steps: int) -> None:
        """Fold an `ExperienceRefused`: its environment steps were made, its contents are gone."""
        self.environment_steps += steps

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
        self._unconsumed.append((position, serials.stop))
        self.reward_scale.update(event.actor, event.incarnation, trajectory.rewards, trajectory.ended)
        self.policy.normaliser.update(
            {key: tensor[:-1] for key, tensor in trajectory.observations.items()},
        )
        self.environment_steps += trajectory.length * trajectory.lanes
        self._follow_episodes(event)
        self._episodes.extend(episode for episode in event.episodes if not episode.truncated)
        if self.buffer.inserted <= self._config.experience_buffer.min_experiences:
            self.buffer.consume_all()
        return self._take_consumed()

    def next_episodes(self, actor: int) -> list[int]:
        """Numbers of the episodes with which a new incarnation of an actor begins its lanes.

        They follow the highest number that any admitted unroll of the actor has reached, so that no episode's chance
        is used twice; what its predecessor did not finish is lost.
        """
        lanes = self._config.environment.environments_per_actor
        return list(self._next_episodes.get(actor, [0] * lanes))

    def _follow_episodes(self, event: ExperienceAdmitted) -> None:
        reached = list(event.episode_numbers)
        for episode in event.episodes:
            reached[episode.lane] = max(reached[episode.lane], episode.number + 1)
        self._next_episodes[event.actor] = [number + 1 for number in reached]

    def can_step(self) -> bool:
        """Whether enough experience is there for an update."""
        enough = self.buffer.inserted >= self._config.experience_buffer.min_experiences
        return enough and self.buffer.fresh >= self._fresh_per_batch

    def step(self) -> StepReport:
        """Make one update.

        Raises:
            InvariantViolation: Not enough experience (`can_step` is false), or a loss or gradient is not finite.
        """
        if not self.can_step():
            raise InvariantViolation("step without enough experience; ask can_step first")
        trainer = self._config.simic_trainer
        rng = seeding.generator(trainer.seed, "learner", self._rank, self.steps_done)
        sample = self.buffer.sample(trainer.batch_size, self._fresh_per_batch, rng=rng)
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
        whole = self.steps_done % trainer.digest_every_steps == 0
        return StepReport(
            step=self.steps_done,
            environment_steps=self.environment_steps,
            metrics=self._metrics(loss, float(grad_norm), sample),
            digest=digest(dict(self.policy.named_parameters())),
            state_digest=self.state_digest() if whole else None,
            unrolls_consumed=self._take_consumed(),
        )

    def _take_consumed(self) -> tuple[int, ...]:
        taken = []
        while self._unconsumed and self._unconsumed[0][1] <= self.buffer.consumed:
            taken.append(self._unconsumed.popleft()[0])
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
        """The policy (parameters and normaliser) as safetensors bytes, for actors."""
        return safetensors.torch.save(
            {name: tensor.contiguous() for name, tensor in self.policy.state_dict().items()}
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, by name: `policy.…` and `optimizer.<name>.<index>.…`."""
        named = {f"policy.{name}": tensor.detach() for name, tensor in self.policy.state_dict().items()}
        for name, optimizer in self._optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                named |= {
                    f"optimizer.{name}.{index}.{field}": value for field, value in sorted(state.items())
                }
        return named

    def state_numbers(self) -> dict[str, Any]:
        """Everything else of the state; JSON types only. The buffer stands as journal positions, not as contents."""
        return {
            "steps_done": self.steps_done,
            "environment_steps": self.environment_steps,
            "learning_rates": self.learning_rates.state_dict(),
            "reward_scale": self.reward_scale.state_dict(),
            "next_episodes": {str(actor): numbers for actor, numbers in sorted(self._next_episodes.items())},
            "buffer": {
                "inserted": self.buffer.inserted,
                "consumed": self.buffer.consumed,
                "positions": sorted({int(position) for position in self.buffer.positions()}),
            },
        }

    def state_digest(self) -> str:
        """XXH3-64 of the whole state."""
        return digest(self.state_tensors(), repr(self.state_numbers()).encode())


def digest(named: dict[str, Tensor], more: bytes = b"") -> str:
    """XXH3-64, as 16 hexadecimal digits, of tensors in the order of their names, then of more bytes."""
    hasher = xxhash.xxh3_64()
    for name in sorted(named):
        hasher.update(np.ascontiguousarray(named[name].detach().numpy()).reshape(-1).view(np.uint8).data)
    hasher.update(more)
    return hasher.hexdigest()
