"""An evaluator: measures the policies it is given on the run's held-out episodes, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import safetensors.torch
import torch

from esper_simic import seeding
from esper_simic.comparison import Estimate, Interval, bootstrap_interval, mean_interval
from esper_simic.config import Config, parse
from esper_simic.config_gym import GROWING_HOST
from esper_simic.errors import ContractError
from esper_simic.evaluation import (
    FIXED,
    LEARNED,
    EpisodeOutcome,
    PolicyActing,
    PolicyOutcome,
    chance_of,
    evaluate,
    held_out_seeds,
)
from esper_simic.policies.build import build_policy
from esper_simic.policies.lora import merged_weights
from esper_simic.policies.policy import Policy
from esper_simic.worlds.play import Acting, play
from esper_simic.worlds.rivals import rivals
from esper_simic.worlds.world import held_out_world_of, world_of
from supervisor import checkpoints
from supervisor.child import ChildSpec
from supervisor.protocol import Evaluate, Evaluated, Stopped
from supervisor.roles.channel import ControlChannel
from supervisor.roles.data import examined_data
from supervisor.roles.fold import STATE_FILE

WAIT_MS: Final = 200

POLICY_PREFIX: Final = "policy."


def main(spec: ChildSpec) -> None:
    """Be evaluator `spec.who.index` until told to stop.

    Raises:
        ConfigError: No host of this configuration can be grown here; see `examined_data`.
    """
    torch.set_num_threads(1)
    config = parse(spec.config_text, is_recorded=True)
    role, index, incarnation = spec.who
    data_digest = examined_data(config)
    with ControlChannel(spec, config.supervisor.frame_bytes_max) as control:
        control.ready(data_digest=data_digest)
        while control.stop_requested() is None:
            task = control.next_task(WAIT_MS)
            if task is None:
                control.report(waiting_for="task")
                continue
            measured = measure(config, task, control)
            control.tell(
                Evaluated(
                    role=role,
                    index=index,
                    incarnation=incarnation,
                    policy=task.policy,
                    returns=measured.returns,
                    accuracies=measured.accuracies,
                    parameters=measured.parameters,
                    summary=measured.summary,
                )
            )
        control.tell(Stopped(role=role, index=index, incarnation=incarnation))


class Measured(NamedTuple):
    """One entry an episode of each figure, as far as the world has it, and the summary."""

    returns: tuple[float, ...]
    accuracies: tuple[float, ...]
    parameters: tuple[float, ...]
    summary: dict[str, float]


def measure(config: Config, task: Evaluate, control: ControlChannel) -> Measured:
    """Run a task's episodes, reporting progress on the way.

    Raises:
        ContractError: The checkpoint of the learned policy is damaged.
    """

    def progressed() -> None:
        control.worked()
        control.report()

    if config.environment.id == GROWING_HOST:
        return _measure_growth(config, task, progressed)
    return _measure_play(config, task, progressed)


def _measure_growth(config: Config, task: Evaluate, progressed: Callable[[], None]) -> Measured:
    """For fixed networks, first the episodes that grow them."""
    trainer, environment = config.simic_trainer, config.environment
    needs_policy = task.policy in (LEARNED, FIXED)
    policy = load_policy(config, Path(task.checkpoint)) if needs_policy else None
    seeds = held_out_seeds(trainer.seed, task.episodes)

    def outcome_of(name: str, reference: list[EpisodeOutcome] | None = None) -> PolicyOutcome:
        return evaluate(
            name,
            environment,
            seeds,
            gamma=trainer.gamma,
            policy=policy,
            reference=reference,
            observer=progressed,
        )

    # What the policy grows is a function of its checkpoint and the seeds: growing it again costs seconds, and no
    # evaluator depends on what another one remembers.
    outcome = outcome_of(task.policy, outcome_of(LEARNED).episodes if task.policy == FIXED else None)
    return Measured(
        returns=tuple(e.episode_return for e in outcome.episodes if e.episode_return is not None),
        accuracies=tuple(episode.accuracy for episode in outcome.episodes),
        parameters=tuple(float(episode.parameters_added) for episode in outcome.episodes),
        summary=_summary(
            {
                "return": (outcome.episode_return, outcome.episode_return_middle),
                "accuracy": (outcome.accuracy, outcome.accuracy_middle),
                "parameters": (outcome.parameters_added, outcome.parameters_added_middle),
            }
        ),
    )


def _measure_play(config: Config, task: Evaluate, progressed: Callable[[], None]) -> Measured:
    trainer, environment = config.simic_trainer, config.environment
    world = held_out_world_of(environment, trainer.gamma)
    policy = load_policy(config, Path(task.checkpoint)) if task.policy == LEARNED else None
    others = rivals(environment, world.spec.action)

    def acting(lanes: int) -> Acting:
        if policy is not None:
            return PolicyActing(policy, lanes)
        if task.policy not in others:
            raise ContractError(f"policy {task.policy!r} cannot be measured in {environment.id}")
        return others[task.policy]()

    episodes = play(
        world,
        held_out_seeds(trainer.seed, task.episodes),
        acting,
        lanes_max=environment.environments_per_actor,
        observer=progressed,
    )
    returns = tuple(episode.episode_return for episode in episodes)
    middle = bootstrap_interval([returns], rng=chance_of(episodes[0].seed))
    return Measured(returns, (), (), _summary({"return": (mean_interval(returns), middle)}))


def load_policy(config: Config, checkpoint: Path) -> Policy:
    """The policy of a checkpoint, every file of it checked first.

    Raises:
        ContractError: The checkpoint is damaged, or its network is not the one of this configuration.
    """
    _, files = checkpoints.load(checkpoint)
    if STATE_FILE not in files:
        raise ContractError(f"{checkpoint} is no checkpoint of a learner: it has no {STATE_FILE}")
    trainer = config.simic_trainer
    spec = world_of(config.environment, trainer.gamma).spec
    policy = build_policy(spec, trainer, seeding.generator(trainer.seed, "policy"))
    expected = policy.state_dict()
    tensors = safetensors.torch.load(files[STATE_FILE])
    found = {
        name.removeprefix(POLICY_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(POLICY_PREFIX)
    }
    found = merged_weights(found, rank=max(1, trainer.lora_rank), alpha=trainer.lora_alpha)
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


def _summary(figures: Mapping[str, tuple[Interval | None, Estimate | None]]) -> dict[str, float]:
    """Of each figure the mean, its interval, the interquartile mean and its interval: what there is of them."""
    summary: dict[str, float] = {}
    for name, (mean, middle) in figures.items():
        if mean is not None:
            summary |= {f"{name}_mean": mean.mean, f"{name}_low": mean.low, f"{name}_high": mean.high}
        if middle is not None:
            summary |= {
                f"{name}_iqm": middle.value,
                f"{name}_iqm_low": middle.low,
                f"{name}_iqm_high": middle.high,
            }
    return summary
