"""Where an actor's experience comes from: episodes that are played, or unrolls that other runs recorded.

An actor knows a `Source` and nothing else of environments. Its one loop loads the newest weights into the policy, which
the source shares, and asks for the next unroll.

*Playing*: the policy steps its lanes; or a script does, and the policy watches: the recurrent state at the start of an
unroll and the value at the end of a cut episode are its own, so what it learns from fits how it will act.

*Recorded*: actor i of N ships unrolls i, i + N, i + 2N, … of all that the records hold, from the start again after the
last one. How many of an actor's unrolls the learner's journal holds says which one is next, so a new life goes on where
the one before stood. The recurrent state that was recorded belongs to another network. Ours watches the unroll before,
where the records hold it, and begins with what it remembers of that; otherwise with none.

In lockstep a new life of an actor that plays does not begin new episodes but stands where the one before it stood: it
steps its environments with the actions that the learner's journal holds of it, and takes the recurrent state that came
with the last of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from esper_simic import seeding
from esper_simic.config import Config
from esper_simic.config_behaviour import RECORDED
from esper_simic.errors import InvariantViolation
from esper_simic.events import EpisodeFinished, ExperienceAdmitted
from esper_simic.execution import unheard
from esper_simic.policies.policy import Policy
from esper_simic.trajectory import Trajectory, decode
from esper_simic.unroll import UnrollCarry, begin, resimulate, unroll
from esper_simic.worlds.scripts import Script
from esper_simic.worlds.world import Lanes, world_of
from supervisor.journal import read
from supervisor.protocol import Welcome
from supervisor.roles.records import Records


class Made(NamedTuple):
    """An unroll to be sent, and the recurrent state `[E, state]` after its last step."""

    trajectory: Trajectory
    episode_numbers: list[int]
    episodes: list[EpisodeFinished]
    state_after: Tensor
    stage: int


class Source(Protocol):
    """What an actor gets its unrolls from."""

    def catch_up(self, goes_on: Callable[[], bool]) -> bool:
        """In lockstep, once: stand where the life before stood.

        Args:
            goes_on: Called after each piece of work; false when it is to be given up.

        Returns:
            Whether it was not given up.
        """

    def make(self, stage: int) -> Made:
        """The next unroll, in the environment of this stage of the curriculum."""


def source_of(
    config: Config, policy: Policy, actor: int, journal: Path, welcome: Welcome, records: Records | None
) -> Source:
    """The source that a configuration names.

    Args:
        config: The run's configuration.
        policy: Acts or watches; its weights are kept fresh by the actor.
        actor: Which actor.
        journal: The learner's.
        welcome: What the learner knows of this actor.
        records: Where they are learned from.
    """
    if records is not None:
        return Recorded(records, policy, actor, config.supervisor.num_actors, welcome.unrolls)
    return Playing(config, policy, actor, journal, welcome)


def records_of(
    config: Config, policy: Policy, run_dir: Path, surveyed: Callable[[], None] = unheard
) -> Records | None:
    """The records that a configuration names, if it does; `surveyed` is told of each record on the way.

    Raises:
        ConfigError: They cannot be learned from; see `Records`.
    """
    if config.environment.behaviour != RECORDED:
        return None
    directories = [Path(directory) for directory in config.environment.records]
    return Records(directories, config, policy, run_dir, surveyed)


class _Play(NamedTuple):
    """An actor's lanes in the environment of one stage of the curriculum, and where they stand."""

    stage: int
    env: Lanes
    carry: UnrollCarry
    script: Script | None


class _Past(NamedTuple):
    """An unroll of the journal: its stage, and the recurrent state `[E, state]` after its last step."""

    stage: int
    trajectory: Trajectory
    state_after: Tensor


class Playing:
    """Lanes that the policy steps, or a script while the policy watches.

    Args:
        config: The run's configuration.
        policy: Acts or watches.
        actor: Which actor.
        journal: The learner's.
        welcome: What the learner knows of this actor.
    """

    def __init__(self, config: Config, policy: Policy, actor: int, journal: Path, welcome: Welcome) -> None:
        self._config, self._policy, self._actor = config, policy, actor
        self._journal, self._unrolls = journal, welcome.unrolls
        self._environments = config.stage_environments()
        self._play = self._enter(0, welcome.first_episodes)

    def catch_up(self, goes_on: Callable[[], bool]) -> bool:
        """Re-simulate what earlier lives did, stage by stage; see `Source`."""
        for stage, unrolls in itertools.groupby(self._past(), key=lambda past: past.stage):
            self._move(stage)
            play = self._play
            made = ((past.trajectory, past.state_after) for past in unrolls)
            for _ in resimulate(play.env, play.carry, made, play.script):
                if not goes_on():
                    return False
        return True

    def make(self, stage: int) -> Made:
        """Step every lane for the length of an unroll; see `Source`."""
        self._move(stage)
        play, length = self._play, self._config.simic_trainer.unroll_length
        numbers = [int(number) for number in play.carry.episode_numbers]
        trajectory, finished = unroll(self._policy, play.env, play.carry, length, play.script)
        return Made(trajectory, numbers, finished, play.carry.state, stage)

    def _enter(self, stage: int, first_episodes: Sequence[int]) -> _Play:
        """The actor's lanes in the environment of a stage, reset.

        The chance of a lane is named by run, actor and lane, not by incarnation: a new one goes on with the next
        episodes, in lockstep with the very steps.
        """
        trainer, environment = self._config.simic_trainer, self._environments[stage]
        lanes = range(environment.environments_per_actor)
        lane_seeds = [seeding.derive(trainer.seed, "actor", self._actor, lane) for lane in lanes]
        world = world_of(environment, trainer.gamma)
        env = world.lanes(lane_seeds, first_episodes, stagger=environment.stagger)
        observation, _ = env.reset()
        first = np.array(first_episodes, dtype=np.int64)
        script = None if environment.script is None else world.script(environment.script, env)
        return _Play(stage, env, begin(self._policy, observation, lane_seeds, first), script)

    def _move(self, stage: int) -> None:
        """Leave the episodes under way and begin the next ones, if this is another stage."""
        play = self._play
        if stage != play.stage:
            play.env.close()
            self._play = self._enter(stage, [int(number) + 1 for number in play.carry.episode_numbers])

    def _past(self) -> Iterator[_Past]:
        """This actor's unrolls in the learner's journal."""
        policy, wanted = self._policy, self._unrolls
        found = 0
        records = read(self._journal) if wanted > 0 else iter(())
        for record in records:
            if record.kind != ExperienceAdmitted.__name__:
                continue
            event = record.header_as(ExperienceAdmitted)
            if event.actor != self._actor:
                continue
            found += 1
            if event.sequence != found:
                raise InvariantViolation(
                    f"in lockstep the unrolls of an actor are numbered through; number {found} of actor {event.actor} "
                    f"in {self._journal}, at position {record.position}, says it is {event.sequence}"
                )
            *frames, state = record.frames
            after = np.frombuffer(state, dtype="<f4").reshape(event.lanes, policy.state_size).copy()
            trajectory = decode(frames, policy.spec, event.length, event.lanes, policy.state_size)
            yield _Past(event.stage, trajectory, torch.from_numpy(after))
            if found == wanted:
                return
        if found < wanted:
            raise InvariantViolation(
                f"the learner has {wanted} unrolls of actor {self._actor}, {self._journal} holds {found}; without "
                f"them its lanes cannot be brought to where they were"
            )


class Recorded:
    """Every N-th of the unrolls that other runs recorded; see the module.

    Args:
        records: All of them.
        policy: Watches.
        actor: Which actor, i.
        actors: How many there are, N.
        made: Unrolls of this actor that the learner has.
    """

    def __init__(self, records: Records, policy: Policy, actor: int, actors: int, made: int) -> None:
        self._records, self._policy = records, policy
        self._actor, self._actors, self._made = actor, actors, made

    def catch_up(self, goes_on: Callable[[], bool]) -> bool:
        """Nothing has to be done again: the number of unrolls says where it stands."""
        return True

    def make(self, stage: int) -> Made:
        """The next one of this actor's; see `Source`."""
        number = (self._made * self._actors + self._actor) % len(self._records)
        self._made += 1
        taken = self._records.take(number)
        event, policy = taken.event, self._policy
        nothing = policy.initial_state(event.lanes)
        state = nothing
        if policy.state_size and taken.before is not None:
            before = taken.before
            with torch.no_grad():
                state = policy.evaluate(
                    {key: rows[: before.length] for key, rows in before.observations.items()},
                    before.episode_start[: before.length],
                    nothing,
                    before.actions,
                ).state
        trajectory = taken.trajectory.beginning_with(state)
        return Made(trajectory, list(event.episode_numbers), list(event.episodes), nothing, stage)
