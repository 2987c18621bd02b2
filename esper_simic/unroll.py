"""One unroll: T steps of a policy in a vector of environments, as one trajectory.

Pure but for the environment it steps: the policy's weights, the state carried from the unroll before, and chance come
in; the trajectory, the state to carry on and the outcomes of finished episodes go out. The chance of lane i in its
episode n is the stream `(lane_seed, n, "action")`, so it depends on nothing but where the lane is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper_simic import seeding
from esper_simic.actions import HEADS
from esper_simic.errors import InvariantViolation
from esper_simic.events import EpisodeFinished
from esper_simic.graphs import OBSERVATION_KEYS
from esper_simic.policies.graph_policy import GraphPolicy, observations_from_numpy
from esper_simic.trajectory import Trajectory

Array = npt.NDArray[Any]


class Lanes(Protocol):
    """What an unroll needs of a vector environment (see `GrowingHostVectorEnv`)."""

    @property
    def num_envs(self) -> int:
        """Number of lanes."""

    def step(self, actions: Array) -> tuple[Mapping[str, Array], Array, Array, Array, Mapping[str, Any]]:
        """Step every lane; ended lanes return the first observation of their next episode."""


class ActionChance:
    """Uniform numbers for the choices of each lane, by lane seed and episode number."""

    def __init__(self, lane_seeds: Sequence[int], episode_numbers: Sequence[int]) -> None:
        self._lane_seeds = tuple(lane_seeds)
        self._streams = [self._stream(lane, number) for lane, number in enumerate(episode_numbers)]

    def _stream(self, lane: int, episode: int) -> np.random.Generator:
        return seeding.generator(self._lane_seeds[lane], episode, "action")

    def begin(self, lane: int, episode: int) -> None:
        """Start the stream of a lane's next episode."""
        self._streams[lane] = self._stream(lane, episode)

    def draw(self) -> Array:
        """`[lanes, heads]` float64 in [0, 1)."""
        return np.stack([stream.random(len(HEADS)) for stream in self._streams])


@dataclass(slots=True)
class UnrollCarry:
    """What one unroll hands to the next.

    Attributes:
        observation: The observation to act on, each `[E, …]`.
        episode_start: `[E]` bool; the observation begins an episode.
        state: `[E, state]` float32, recurrent state before the observation.
        chance: Uniform numbers for choices.
        episode_numbers: `[E]` int64, the episode each lane is in.
    """

    observation: Mapping[str, Array]
    episode_start: Array
    state: Tensor
    chance: ActionChance
    episode_numbers: Array


def begin(
    policy: GraphPolicy, observation: Mapping[str, Array], lane_seeds: Sequence[int], first: Array
) -> UnrollCarry:
    """The carry of lanes that were just reset into the episodes numbered `first`."""
    lanes = len(lane_seeds)
    return UnrollCarry(
        observation=observation,
        episode_start=np.ones(lanes, dtype=bool),
        state=policy.initial_state(lanes),
        chance=ActionChance(lane_seeds, [int(number) for number in first]),
        episode_numbers=np.array(first, dtype=np.int64),
    )


def unroll(
    policy: GraphPolicy, lanes: Lanes, carry: UnrollCarry, length: int
) -> tuple[Trajectory, list[EpisodeFinished]]:
    """Step every lane `length` times; `carry` is moved on in place.

    Args:
        policy: The acting policy; not changed.
        lanes: The environments, standing at `carry`.
        carry: Where the last unroll ended.
        length: T.

    Returns:
        The trajectory `[T, E]` and the episodes that ended in it, in order of time.
    """
    initial_state = carry.state.clone()
    observations: list[Mapping[str, Array]] = []
    starts, actions, log_probs, rewards, ended, truncation_values = [], [], [], [], [], []
    finished: list[EpisodeFinished] = []
    for _ in range(length):
        observations.append({key: carry.observation[key].copy() for key in OBSERVATION_KEYS})
        starts.append(carry.episode_start)
        decision = policy.act(
            observations_from_numpy(carry.observation),
            torch.from_numpy(carry.episode_start),
            carry.state,
            torch.from_numpy(carry.chance.draw()),
        )
        observation, reward, terminated, truncated, infos = lanes.step(decision.actions.numpy())
        actions.append(decision.actions)
        log_probs.append(decision.log_probs)
        rewards.append(torch.from_numpy(np.asarray(reward, dtype=np.float32)))
        done = np.logical_or(terminated, truncated)
        ended.append(torch.from_numpy(done.copy()))
        truncation_values.append(_cut_values(policy, decision.state, truncated, infos))
        carry.observation, carry.state, carry.episode_start = observation, decision.state, done
        if done.any():
            finished.extend(_outcomes(carry, np.flatnonzero(done), truncated, infos))
    observations.append({key: carry.observation[key].copy() for key in OBSERVATION_KEYS})
    starts.append(carry.episode_start)
    trajectory = Trajectory(
        observations={
            key: torch.from_numpy(np.stack([observation[key] for observation in observations]))
            for key in OBSERVATION_KEYS
        },
        episode_start=torch.from_numpy(np.stack(starts)),
        initial_state=initial_state,
        actions=torch.stack(actions),
        behaviour_log_probs=torch.stack(log_probs),
        rewards=torch.stack(rewards),
        ended=torch.stack(ended),
        truncation_values=torch.stack(truncation_values),
    )
    return trajectory, finished


def resimulate(
    lanes: Lanes, carry: UnrollCarry, unrolls: Iterable[tuple[Trajectory, Tensor]]
) -> Iterator[int]:
    """Bring lanes that were just reset to where others stood after these unrolls, without any policy.

    Every lane is stepped with the recorded actions; chance is drawn as it was drawn then. Whatever the environments
    give is compared with what is recorded, so in the end `carry`, moved on in place, equals the other's bit for bit.

    Args:
        lanes: The environments, standing at `carry`.
        carry: Of lanes that were just reset as the others were.
        unrolls: The trajectories in order, each with the recurrent state `[E, state]` after its last step.

    Yields:
        The number of each unroll that was done, from 1: progress can be told.

    Raises:
        InvariantViolation: Something else came than is recorded; names unroll, step and key.
    """
    for number, (recorded, state_after) in enumerate(unrolls, start=1):
        _check_same("initial_state", carry.state.numpy(), recorded.initial_state, number, 0)
        for t in range(recorded.length):
            _check_carry(carry, recorded, number, t)
            carry.chance.draw()
            observation, reward, terminated, truncated, infos = lanes.step(recorded.actions[t].numpy())
            done = np.logical_or(terminated, truncated)
            _check_same("rewards", np.asarray(reward, dtype=np.float32), recorded.rewards[t], number, t)
            _check_same("ended", done, recorded.ended[t], number, t)
            carry.observation, carry.episode_start = observation, done
            if done.any():
                _outcomes(carry, np.flatnonzero(done), truncated, infos)
        _check_carry(carry, recorded, number, recorded.length)
        carry.state = state_after.clone()
        yield number


def _check_carry(carry: UnrollCarry, recorded: Trajectory, number: int, t: int) -> None:
    for key in OBSERVATION_KEYS:
        _check_same(f"observations.{key}", carry.observation[key], recorded.observations[key][t], number, t)
    _check_same("episode_start", carry.episode_start, recorded.episode_start[t], number, t)


def _check_same(key: str, found: Array, recorded: Tensor, number: int, t: int) -> None:
    expected = recorded.numpy()
    # Bytes, not values: 0.0 and -0.0 are equal and act differently later.
    if (
        found.dtype != expected.dtype
        or found.shape != expected.shape
        or found.tobytes() != expected.tobytes()
    ):
        raise InvariantViolation(
            f"re-simulated unroll {number}, step {t}: {key} is another than recorded; the environments are not the "
            f"same (another version, machine or configuration), or this unroll does not follow the one before it"
        )


def _cut_values(policy: GraphPolicy, state: Tensor, truncated: Array, infos: Mapping[str, Any]) -> Tensor:
    """Value `[E]` of the last observation of episodes cut from outside, 0 elsewhere."""
    values = torch.zeros(len(truncated))
    if not truncated.any():
        return values
    decision = policy.act(
        observations_from_numpy(infos["final_obs"]),
        torch.zeros(len(truncated), dtype=torch.bool),
        state,
        torch.full((len(truncated), len(HEADS)), 0.5, dtype=torch.float64),
    )
    return torch.where(torch.from_numpy(truncated.copy()), decision.values, values)


def _outcomes(
    carry: UnrollCarry, lanes: Array, truncated: Array, infos: Mapping[str, Any]
) -> list[EpisodeFinished]:
    """Outcomes of the episodes that just ended; moves those lanes' chance on to their next episode."""
    episode = infos["episode"]
    finished = []
    for lane in lanes.tolist():
        finished.append(
            EpisodeFinished(
                lane=lane,
                number=int(carry.episode_numbers[lane]),
                episode_return=float(episode["r"][lane]),
                length=int(episode["l"][lane]),
                accuracy=float(episode["accuracy"][lane]),
                parameters_added=int(episode["parameters_added"][lane]),
                fossils=int(episode["fossils"][lane]),
                truncated=bool(truncated[lane]),
            )
        )
        carry.episode_numbers[lane] += 1
        carry.chance.begin(lane, int(carry.episode_numbers[lane]))
    return finished
