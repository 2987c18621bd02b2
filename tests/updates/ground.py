"""What updates are made on in tests: small policies of any kind, what they did in random states, and a full engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper_simic.actions import Op
from esper_simic.config import TrainerConfig
from esper_simic.graphs import FlatGrowthSpec, ObservationSpec
from esper_simic.policies.policy import Policy
from esper_simic.reward_scale import RewardScale
from esper_simic.safety import StepMode
from esper_simic.specs import Choices, ExperienceSpec
from esper_simic.trajectory import Trajectory
from esper_simic.updates.batch import Batch, prepare
from esper_simic.updates.engine import Engine
from esper_simic.updates.update import Terms, Updated
from tests.policies import synthetic, vectors

T, LANES = 4, 6

SPECS: dict[str, ExperienceSpec] = {
    "graph": synthetic.SPEC,
    "flat": vectors.FLAT,
    "one": vectors.ONE,
    "many": vectors.MANY,
    "masked": vectors.MASKED,
    "numbers": vectors.NUMBERS,
}


def trainer(algorithm: str = "IMPALA", **settings: Any) -> TrainerConfig:
    """Small networks that learn at their full rate at once."""
    keys: dict[str, Any] = {
        "algorithm": algorithm,
        "hidden_size": 16,
        "warmup_epochs": 0,
        "learning_rate": 1e-3,
    }
    return TrainerConfig(**keys | settings)


def unroll(
    policy: Policy, seed: int = 0, length: int = T, lanes: int = LANES, *, ends: float = 0.2
) -> Trajectory:
    """What a policy does in random states, with random rewards and ends; half of these are cut from outside."""
    rng, spec = np.random.default_rng(seed), policy.spec
    random_states = synthetic.observations if isinstance(spec, ObservationSpec) else None
    seen = (
        random_states(rng, length + 1, lanes)
        if random_states is not None
        else vectors.observations(spec, rng, length + 1, lanes)
    )
    ended = torch.from_numpy(rng.random((length, lanes)) < ends)
    cut = ended & torch.from_numpy(rng.random((length, lanes)) < 0.5)
    start = torch.cat([torch.from_numpy(rng.random((1, lanes)) < 0.3), ended])
    initial = torch.from_numpy(rng.normal(size=(lanes, policy.state_size)).astype(np.float32))
    actions, log_probs, state = [], [], initial
    for t in range(length):
        row = {key: tensor[t] for key, tensor in seen.items()}
        decision = policy.act(row, start[t], state, vectors.chance(spec, rng, lanes))
        actions.append(decision.actions)
        log_probs.append(decision.log_probs)
        state = decision.state
    return Trajectory(
        observations=seen,
        episode_start=start,
        initial_state=initial,
        actions=torch.stack(actions),
        behaviour_log_probs=torch.stack(log_probs),
        rewards=torch.from_numpy(rng.normal(size=(length, lanes)).astype(np.float32)),
        ended=ended,
        truncation_values=cut * torch.from_numpy(rng.normal(size=(length, lanes)).astype(np.float32)),
    )


class Ground:
    """An engine and a batch for it."""

    def __init__(self, algorithm: str = "IMPALA", spec: str = "one", seed: int = 0, **settings: Any) -> None:
        self.trainer = trainer(algorithm, **settings)
        self.engine = Engine(self.trainer, SPECS[spec])
        self.trajectory = unroll(self.engine.policy, seed)

    def force(self, t: int, lane: int) -> None:
        """Leave nothing to choose at a step, where there are masks: it was done because nothing else was legal."""
        spec, actions = self.engine.policy.spec, self.trajectory.actions
        if "action_mask" not in self.trajectory.observations:
            return
        mask = self.trajectory.observations["action_mask"][t, lane]
        if isinstance(spec, ObservationSpec | FlatGrowthSpec):
            mask[spec.mask_layout.op] = torch.eye(len(Op), dtype=mask.dtype)[Op.WAIT]
            actions[t, lane] = 0
        elif isinstance(spec.action, Choices):
            mask.zero_()
            starts = np.cumsum((0, *spec.action.sizes[:-1]))
            mask[torch.from_numpy(starts) + actions[t, lane]] = 1
        self.trajectory.behaviour_log_probs[t, lane] = 0.0

    @property
    def policy(self) -> Policy:
        return self.engine.policy

    @property
    def batch(self) -> Batch:
        return prepare(self.trajectory, self.policy, RewardScale(self.trainer.gamma), self.trainer)

    def update(self, mode: StepMode | None = None, *, progress: float = 0.0, chance: int = 0) -> Updated:
        """One update on the batch."""
        return self.engine.update(
            self.batch,
            StepMode() if mode is None else mode,
            entropy_coefficient=0.01,
            progress=progress,
            rng=np.random.default_rng(chance),
        )

    def terms(self, mode: StepMode | None = None) -> Terms:
        return Terms(
            trainer=self.trainer,
            policy=self.policy,
            optimisers=self.engine.optimisers,
            mode=StepMode() if mode is None else mode,
            entropy_coefficient=0.01,
            progress=0.0,
            rng=np.random.default_rng(0),
        )


def copied(named: dict[str, Tensor]) -> dict[str, bytes]:
    """The bits of tensors, as they are now."""
    return {name: tensor.detach().numpy().tobytes() for name, tensor in named.items()}


def weights(engine: Engine) -> dict[str, Tensor]:
    """Copies of the policy's weights."""
    return {name: weight.detach().clone() for name, weight in engine.policy.named_parameters()}
