"""What an unroll says of itself, checked before anything is made of its frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from esper_simic.config import Config
from esper_simic.errors import ContractError
from esper_simic.events import ExperienceAdmitted
from esper_simic.policies.policy import Policy
from esper_simic.trajectory import Trajectory, decode
from supervisor.protocol import Unroll

EPISODE_NUMBER_MAX: Final = 2**53
"""No lane gets that far; a larger number is nonsense from the wire."""


def shape_of_run(config: Config) -> tuple[int, int]:
    """Steps and lanes of every unroll of this run."""
    return config.simic_trainer.unroll_length, config.environment.environments_per_actor


def check(message: Unroll, config: Config, newest_version: int) -> None:
    """Refuse an unroll that is of another shape than this run's, or speaks of what cannot be.

    Raises:
        ContractError: Naming it.
    """
    shape, expected = (message.steps, message.lanes), shape_of_run(config)
    if shape != expected:
        raise ContractError(f"an unroll of this run has (steps, lanes) {expected}, not {shape}")
    if not 0 <= message.policy_version <= newest_version:
        raise ContractError(
            f"policy version {message.policy_version} was never announced; the newest is {newest_version}"
        )
    if message.behaviour != config.environment.behaviour:
        raise ContractError(
            f"{message.behaviour!r} acted; in this run it is {config.environment.behaviour!r}"
        )
    stages = len(config.stage_environments())
    if not 0 <= message.stage < stages:
        raise ContractError(f"stage {message.stage} of the curriculum; there are {stages}")
    if len(message.episode_numbers) != message.lanes:
        raise ContractError(f"{len(message.episode_numbers)} episode numbers for {message.lanes} lanes")
    numbers = [*message.episode_numbers, *(episode.number for episode in message.episodes)]
    if not all(0 <= number < EPISODE_NUMBER_MAX for number in numbers):
        raise ContractError(f"an episode number is not in [0, {EPISODE_NUMBER_MAX})")
    for episode in message.episodes:
        if not 0 <= episode.lane < message.lanes:
            raise ContractError(f"an episode of lane {episode.lane}; there are {message.lanes}")
        if not (math.isfinite(episode.episode_return) and math.isfinite(episode.accuracy or 0.0)):
            raise ContractError(f"the outcome of an episode of lane {episode.lane} is not finite")


def decode_unroll(frames: Sequence[bytes], message: Unroll, policy: Policy, *, lockstep: bool) -> Trajectory:
    """The trajectory in an unroll's frames. In lockstep the last frame, the actor's recurrent state, is checked only.

    Raises:
        ContractError: The frames are not what they have to be.
    """
    if lockstep:
        carried_bytes = 4 * message.lanes * policy.state_size
        if not frames or len(frames[-1]) != carried_bytes:
            raise ContractError(f"in lockstep the last frame of an unroll has {carried_bytes} bytes")
        if not np.isfinite(np.frombuffer(frames[-1], dtype="<f4")).all():
            raise ContractError("the recurrent state of an actor contains a number that is not finite")
        frames = frames[:-1]
    return decode(frames, policy.spec, message.steps, message.lanes, policy.state_size)


def admitted(message: Unroll, hardware: str = "") -> ExperienceAdmitted:
    """The fact that an unroll was taken in that was made on the hardware of this id."""
    return ExperienceAdmitted(
        actor=message.actor,
        incarnation=message.incarnation,
        sequence=message.sequence,
        policy_version=message.policy_version,
        length=message.steps,
        lanes=message.lanes,
        episode_numbers=message.episode_numbers,
        episodes=message.episodes,
        stage=message.stage,
        hardware=hardware,
        behaviour=message.behaviour,
    )
