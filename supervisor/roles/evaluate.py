"""An evaluator: measures the policies it is given on the run's held-out episodes, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import safetensors.torch
import torch

from esper_simic import seeding
from esper_simic.config import Config, parse
from esper_simic.errors import ContractError
from esper_simic.evaluation import LEARNED, PolicyOutcome, evaluate, held_out_seeds
from esper_simic.growing_host.spaces import observation_spec_of
from esper_simic.policies.graph_policy import GraphPolicy
from supervisor import checkpoints
from supervisor.child import ChildSpec
from supervisor.protocol import Evaluate, Evaluated, Stopped
from supervisor.roles.channel import ControlChannel
from supervisor.roles.fold import STATE_FILE

WAIT_MS: Final = 200

POLICY_PREFIX: Final = "policy."


def main(spec: ChildSpec) -> None:
    """Be evaluator `spec.who.index` until told to stop."""
    torch.set_num_threads(1)
    config = parse(spec.config_text)
    role, index, incarnation = spec.who
    with ControlChannel(spec, config.supervisor.frame_bytes_max) as control:
        control.ready()
        while control.stop_requested() is None:
            task = control.next_task(WAIT_MS)
            if task is None:
                control.report(waiting_for="task")
                continue
            outcome = measure(config, task, control)
            control.tell(
                Evaluated(
                    role=role,
                    index=index,
                    incarnation=incarnation,
                    policy=task.policy,
                    returns=tuple(episode.episode_return for episode in outcome.episodes),
                    accuracies=tuple(episode.accuracy for episode in outcome.episodes),
                    parameters=tuple(float(episode.parameters_added) for episode in outcome.episodes),
                    summary=_summary(outcome),
                )
            )
        control.tell(Stopped(role=role, index=index, incarnation=incarnation))


def measure(config: Config, task: Evaluate, control: ControlChannel) -> PolicyOutcome:
    """Run a task's episodes, reporting progress on the way.

    Raises:
        ContractError: The checkpoint of the learned policy is damaged.
    """
    policy = load_policy(config, Path(task.checkpoint)) if task.policy == LEARNED else None
    seeds = held_out_seeds(config.simic_trainer.seed, task.episodes)

    def progressed() -> None:
        control.worked()
        control.report()

    gamma = config.simic_trainer.gamma
    return evaluate(task.policy, config.environment, seeds, gamma=gamma, policy=policy, observer=progressed)


def load_policy(config: Config, checkpoint: Path) -> GraphPolicy:
    """The policy of a checkpoint, every file of it checked first.

    Raises:
        ContractError: The checkpoint is damaged, or its network is not the one of this configuration.
    """
    _, files = checkpoints.load(checkpoint)
    if STATE_FILE not in files:
        raise ContractError(f"{checkpoint} is no checkpoint of a learner: it has no {STATE_FILE}")
    spec, trainer = observation_spec_of(config.environment), config.simic_trainer
    policy = GraphPolicy(spec, trainer, seeding.generator(trainer.seed, "policy"))
    expected = policy.state_dict()
    tensors = safetensors.torch.load(files[STATE_FILE])
    found = {
        name.removeprefix(POLICY_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(POLICY_PREFIX)
    }
    unlike = [
        name
        for name in sorted(expected.keys() | found.keys())
        if name not in expected or name not in found or expected[name].shape != found[name].shape
    ]
    if unlike:
        raise ContractError(
            f"{checkpoint} holds another network than this configuration makes: {unlike[0]} differs, and "
            f"{len(unlike) - 1} more tensors; use the configuration of its run"
        )
    policy.load_state_dict(found)
    return policy


def _summary(outcome: PolicyOutcome) -> dict[str, float]:
    intervals = {
        "return": outcome.episode_return,
        "accuracy": outcome.accuracy,
        "parameters": outcome.parameters_added,
    }
    return {
        f"{name}_{field}": value
        for name, interval in intervals.items()
        for field, value in (("mean", interval.mean), ("low", interval.low), ("high", interval.high))
    }
