"""Log-probabilities of actions that a policy itself would have taken, for the Fisher information of what it learned.

One sample is one experience: T decisions, drawn independently given what was observed, so that the products of their
gradients vanish in the mean. Their sum divided by the square root of T has the Fisher information of one decision.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from esper_simic.policies.policy import Policy
from esper_simic.updates.batch import Batch


def sampled_log_probs(policy: Policy, batch: Batch, rng: np.random.Generator) -> Tensor:
    """`[B]`, with gradient: for each lane the sum over its steps of the log-probability of a drawn action, over √T.

    Args:
        policy: What is drawn from; it sees the observations that were made, whatever it draws.
        batch: `[T, B]`; its actions have no part.
        rng: All chance.
    """
    trajectory, length = batch.trajectory, batch.length
    rows = {key: tensor[:length] for key, tensor in trajectory.observations.items()}
    starts, state = trajectory.episode_start[:length], trajectory.initial_state
    drawn = []
    for t in range(length):
        uniforms = torch.from_numpy(rng.random((batch.lanes, policy.chance))).to(batch.rewards.device)
        decision = policy.act({key: tensor[t] for key, tensor in rows.items()}, starts[t], state, uniforms)
        drawn.append(decision.actions)
        state = decision.state
    evaluation = policy.evaluate(rows, starts, trajectory.initial_state, torch.stack(drawn))
    # Where there was no choice the log-probability is 0 whatever the weights are.
    total: Tensor = (evaluation.log_probs * batch.policy_weights).sum(dim=0)
    return total / math.sqrt(length)
