"""A batch as every algorithm wants it: rewards scaled, ends as discounts, weights of what counts.

An episode that was cut from outside goes on there: the value of its last observation is folded into the reward and the
discount is 0, so that no algorithm knows of truncation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from esper_simic.actions import OP, Op
from esper_simic.algorithms.weighted import weighted_mean
from esper_simic.config import TrainerConfig
from esper_simic.graphs import ObservationSpec
from esper_simic.policies.policy import Evaluation, Policy
from esper_simic.reward_scale import RewardScale
from esper_simic.trajectory import Trajectory

FORCED_VALUE_WEIGHT: Final = 0.2
"""Weight in the value loss of a step without any choice; in policy loss and entropy such a step has none."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Unrolls `[T, B]` ready for a loss.

    Attributes:
        trajectory: As it was sent.
        rewards: `[T, B]`, in units of the reward's scale, cut episodes' last values folded in.
        discounts: `[T, B]`, gamma, or 0 where an episode ends.
        policy_weights: `[T, B]`, 1 where there was a choice, else 0.
        value_weights: `[T, B]`, 1 where there was a choice, else `FORCED_VALUE_WEIGHT`.
    """

    trajectory: Trajectory
    rewards: Tensor
    discounts: Tensor
    policy_weights: Tensor
    value_weights: Tensor

    @property
    def length(self) -> int:
        """T."""
        return self.trajectory.length

    @property
    def lanes(self) -> int:
        """B."""
        return self.trajectory.lanes

    def of_lanes(self, lanes: Tensor) -> Batch:
        """The same of some lanes, in that order, with all their steps."""
        return Batch(
            self.trajectory.of_lanes(lanes),
            *(
                part[:, lanes]
                for part in (self.rewards, self.discounts, self.policy_weights, self.value_weights)
            ),
        )

    def head_entropies(self, evaluation: Evaluation) -> dict[str, float]:
        """Mean entropy of each head over the steps at which it was relevant, as `head_entropy.<head>`."""
        heads, length = evaluation.heads, self.length
        return {
            f"head_entropy.{head}": float(
                weighted_mean(entropy[:length].detach(), self.policy_weights * heads.relevance[head][:length])
            )
            for head, entropy in heads.head_entropies.items()
        }

    def evaluate(
        self,
        policy: Policy,
        evaluate: Callable[..., Evaluation] = lambda policy, *args: policy.evaluate(*args),
    ) -> Evaluation:
        """The policy's view of the batch, T + 1 rows; the actions of row T stand for none and are not to be used.

        Args:
            policy: Whose view.
            evaluate: Called with it and what its method of that name takes.
        """
        trajectory = self.trajectory
        stand_in = torch.zeros_like(trajectory.actions[:1])
        if isinstance(policy.spec, ObservationSpec):
            stand_in[..., OP] = Op.WAIT  # the one action that is always legal
        return evaluate(
            policy,
            trajectory.observations,
            trajectory.episode_start,
            trajectory.initial_state,
            torch.cat([trajectory.actions, stand_in]),
        )


def prepare(trajectory: Trajectory, policy: Policy, scale: RewardScale, trainer: TrainerConfig) -> Batch:
    """Make a batch of a trajectory."""
    free = policy.free(trajectory.observations)[: trajectory.length]
    rewards = scale.scale(trajectory.rewards, trainer.reward_clip)
    return Batch(
        trajectory=trajectory,
        rewards=rewards + trainer.gamma * trajectory.truncation_values,
        discounts=trainer.gamma * (~trajectory.ended).float(),
        policy_weights=free,
        value_weights=torch.where(free > 0, 1.0, FORCED_VALUE_WEIGHT),
    )
