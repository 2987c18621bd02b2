"""One unroll: T steps of a policy in a vector of environments, as one trajectory.

Pure but for the environment it steps: the policy's weights, the state carried from the unroll before, and chance come
in; the trajectory, the state to carry on and the outcomes of finished episodes go out. The chance of lane i in its
episode n is the stream `(lane_seed, n, "action")`, so it depends on nothing but where the lane is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper_simic import seeding
from esper_simic.errors import InvariantViolation
from esper_simic.events import EpisodeFinished
from esper_simic.policies.policy import Policy
from esper_simic.trajectory import Trajectory, frame_layout
from esper_simic.worlds.scripts import Script

Array = npt.NDArray[Any]

CHANCE_BLOCK: Final = 64
"""Steps of a lane for which uniform numbers are drawn at once; any other number gives the same numbers."""


class Lanes(Protocol):
    """What an unroll needs of a vector environment (see `worlds.world.Lanes`)."""

    @property
    def num_envs(self) -> int:
        """Number of lanes."""

    def step(self, actions: Array) -> tuple[Mapping[str, Array], Array, Array, Array, Mapping[str, Any]]:
        """Step every lane; ended lanes return the first observation of their next episode."""


class ActionChance:
    """Uniform numbers for the choices of each lane, by lane seed and episode number.

    Args:
        lane_seeds: One a lane.
        episode_numbers: The episode each lane is in, at its start.
        width: Numbers that one action takes.
    """

    def __init__(self, lane_seeds: Sequence[int], episode_numbers: Sequence[int], width: int) -> None:
        self._lane_seeds = tuple(lane_seeds)
        self._streams = [self._stream(lane, number) for lane, number in enumerate(episode_numbers)]
        self._lanes = np.arange(len(self._lane_seeds))
        self._block = np.empty((len(self._lane_seeds), CHANCE_BLOCK, width))
        self._used = np.full(len(self._lane_seeds), CHANCE_BLOCK)

    def _stream(self, lane: int, episode: int) -> np.random.Generator:
        return seeding.generator(self._lane_seeds[lane], episode, "action")

    def begin(self, lane: int, episode: int) -> None:
        """Start the stream of a lane's next episode."""
        self._streams[lane] = self._stream(lane, episode)
        self._used[lane] = CHANCE_BLOCK

    def draw(self) -> Array:
        """`[lanes, width]` float64 in [0, 1)."""
        for lane in np.flatnonzero(self._used == CHANCE_BLOCK).tolist():
            self._streams[lane].random(out=self._block[lane])
            self._used[lane] = 0
        drawn: Array = self._block[self._lanes, self._used]
        self._used += 1
        return drawn


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
    policy: Policy, observation: Mapping[str, Array], lane_seeds: Sequence[int], first: Array
) -> UnrollCarry:
    """The carry of lanes that were just reset into the episodes numbered `first`."""
    lanes = len(lane_seeds)
    return UnrollCarry(
        observation=observation,
        episode_start=np.ones(lanes, dtype=bool),
        state=policy.initial_state(lanes),
        chance=ActionChance(lane_seeds, [int(number) for number in first], policy.spec.action.chance),
        episode_numbers=np.array(first, dtype=np.int64),
    )


def unroll(
    policy: Policy, lanes: Lanes, carry: UnrollCarry, length: int, script: Script | None = None
) -> tuple[Trajectory, list[EpisodeFinished]]:
    """Step every lane `length` times; `carry` is moved on in place.

    Args:
        policy: The acting policy; not changed.
        lanes: The environments, standing at `carry`.
        carry: Where the last unroll ended.
        length: T.
        script: Acts instead of the policy, which watches then: recurrent state and last values are its own.

    Returns:
        The trajectory `[T, E]` and the episodes that ended in it, in order of time.
    """
    record = _Record(policy, lanes.num_envs, length)
    record.initial_state[:] = carry.state.numpy()
    finished: list[EpisodeFinished] = []
    for t in range(length):
        record.observe(t, carry)
        uniforms = carry.chance.draw()
        decision = policy.act(
            _tensors(carry.observation, record.keys),
            torch.from_numpy(carry.episode_start),
            carry.state,
            torch.from_numpy(uniforms),
        )
        actions, log_probs = decision.actions.numpy(), decision.log_probs.numpy()
        if script is not None:
            actions, log_probs = script.choose(carry.observation, carry.episode_start, uniforms)
        observation, reward, terminated, truncated, infos = lanes.step(actions)
        done = np.logical_or(terminated, truncated)
        record.actions[t] = actions
        record.behaviour_log_probs[t] = log_probs
        record.rewards[t] = reward
        record.ended[t] = done
        if truncated.any():
            record.truncation_values[t] = _cut_values(policy, decision.state, truncated, infos, record.keys)
        carry.observation, carry.state, carry.episode_start = observation, decision.state, done
        if done.any():
            finished.extend(_outcomes(carry, np.flatnonzero(done), truncated, infos))
    record.observe(length, carry)
    return record.trajectory(), finished


class _Record:
    """The arrays of one unroll, filled row by row; they become the trajectory's without another copy."""

    def __init__(self, policy: Policy, lanes: int, length: int) -> None:
        self.keys = tuple(policy.spec.shapes())
        self._arrays: dict[str, Array] = {
            frame.name: np.zeros(frame.shape, dtype=frame.dtype.newbyteorder("="))
            for frame in frame_layout(policy.spec, length, lanes, policy.state_size)
        }
        self._observations = [self._arrays[f"observations.{key}"] for key in self.keys]
        self._starts = self._arrays["episode_start"]
        self.initial_state = self._arrays["initial_state"]
        self.actions = self._arrays["actions"]
        self.behaviour_log_probs = self._arrays["behaviour_log_probs"]
        self.rewards = self._arrays["rewards"]
        self.ended = self._arrays["ended"]
        self.truncation_values = self._arrays["truncation_values"]

    def observe(self, t: int, carry: UnrollCarry) -> None:
        """Write row t of what is seen before acting."""
        for rows, key in zip(self._observations, self.keys, strict=True):
            rows[t] = carry.observation[key]
        self._starts[t] = carry.episode_start

    def trajectory(self) -> Trajectory:
        return Trajectory.from_tensors({name: torch.from_numpy(rows) for name, rows in self._arrays.items()})


def resimulate(
    lanes: Lanes,
    carry: UnrollCarry,
    unrolls: Iterable[tuple[Trajectory, Tensor]],
    script: Script | None = None,
) -> Iterator[int]:
    """Bring lanes that were just reset to where others stood after these unrolls, without any policy.

    Every lane is stepped with the recorded actions; chance is drawn as it was drawn then. Whatever the environments
    give is compared with what is recorded, so in the end `carry`, moved on in place, equals the other's bit for bit.

    Args:
        lanes: The environments, standing at `carry`.
        carry: Of lanes that were just reset as the others were.
        unrolls: The trajectories in order, each with the recurrent state `[E, state]` after its last step.
        script: What acted then, if it was no policy: it sees all of it again, for what it remembers.

    Yields:
        The number of each unroll that was done, from 1: progress can be told.

    Raises:
        InvariantViolation: Something else came than is recorded; names unroll, step and key.
    """
    for number, (recorded, state_after) in enumerate(unrolls, start=1):
        _check_same("initial_state", carry.state.numpy(), recorded.initial_state, number, 0)
        for t in range(recorded.length):
            _check_carry(carry, recorded, number, t)
            uniforms = carry.chance.draw()
            if script is not None:
                again = script.choose(carry.observation, carry.episode_start, uniforms)
                _check_same("actions", again.actions, recorded.actions[t], number, t)
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
    for key, rows in recorded.observations.items():
        _check_same(f"observations.{key}", carry.observation[key], rows[t], number, t)
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


def _tensors(observation: Mapping[str, Array], keys: Sequence[str]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(np.ascontiguousarray(observation[key])) for key in keys}


def _cut_values(
    policy: Policy, state: Tensor, truncated: Array, infos: Mapping[str, Any], keys: Sequence[str]
) -> Array:
    """Value `[E]` of the last observation of episodes cut from outside, 0 elsewhere."""
    cut = np.flatnonzero(truncated)
    decision = policy.act(
        _tensors({key: infos["final_obs"][key][cut] for key in keys}, keys),
        torch.zeros(len(cut), dtype=torch.bool),
        state[torch.from_numpy(cut)],
        torch.full((len(cut), policy.spec.action.chance), 0.5, dtype=torch.float64),
    )
    values = np.zeros(len(truncated), dtype=np.float32)
    values[cut] = decision.values.numpy()
    return values


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
                truncated=bool(truncated[lane]),
                **{name: kind(episode[name][lane]) for name, kind in _MEASURES.items() if name in episode},
            )
        )
        carry.episode_numbers[lane] += 1
        carry.chance.begin(lane, int(carry.episode_numbers[lane]))
    return finished


_MEASURES: Final[dict[str, type]] = {
    "accuracy": float,
    "parameters_added": int,
    "fossils": int,
    "success": bool,
    "cut": bool,
    "rolled_back": bool,
}
"""What an episode may tell of itself beside its return and length, as far as its world knows such things."""
