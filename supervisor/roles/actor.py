"""An actor: pulls weights, makes one unroll of all its lanes, sends it, waits for room, again.

It owns nothing that must survive: its environments are seeds and actions, both in the learner's journal. An unroll is
only begun while the actor holds a credit, so a slow learner stops it here. It waits for a learner as long as there is a
supervisor that wants it to: whether the learner lives is not for an actor to judge.

In lockstep a new life does not begin new episodes but stands where the one before it stood: it steps its environments
with the actions that the learner's journal holds of it, and takes the recurrent state that came with the last of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from esper_simic import seeding
from esper_simic.config import Config, parse
from esper_simic.errors import InvariantViolation
from esper_simic.events import ExperienceAdmitted
from esper_simic.policies.build import build_policy
from esper_simic.trajectory import Trajectory, decode, encode
from esper_simic.unroll import UnrollCarry, begin, resimulate, unroll
from esper_simic.worlds.world import Lanes, world_of
from supervisor import faults
from supervisor.bus import Poller
from supervisor.child import ChildSpec
from supervisor.clock import SystemClock
from supervisor.journal import read
from supervisor.protocol import Stopped, Unroll, Welcome
from supervisor.roles.channel import ControlChannel
from supervisor.roles.data import examined_data
from supervisor.roles.learner_line import LearnerLine

WAIT_MS: Final = 200.0
"""Longest wait for the learner before the control line is looked at again."""


def main(spec: ChildSpec) -> None:
    """Be actor `spec.who.index` until told to stop.

    Raises:
        ConfigError: No host of this configuration can be grown here; see `examined_data`.
    """
    torch.set_num_threads(1)
    config = parse(spec.config_text)
    data_digest = examined_data(config)
    line = LearnerLine(spec, config, SystemClock())
    try:
        with ControlChannel(spec, config.supervisor.frame_bytes_max) as control:
            control.ready(data_digest=data_digest)
            welcome = _await_welcome(control, line)
            if welcome is not None:
                _Acting(spec, config, control, line, welcome).run()
            control.tell(Stopped(role=spec.who.role, index=spec.who.index, incarnation=spec.who.incarnation))
    finally:
        line.close()


def _await_welcome(control: ControlChannel, line: LearnerLine) -> Welcome | None:
    """Wait until the learner says where the lanes begin; None when told to stop instead."""
    poller = _poller(control, line)
    while line.welcome is None:
        if control.stop_requested() is not None:
            return None
        control.report(waiting_for=line.waiting_for)
        poller.wait(WAIT_MS)
        line.take()
    return line.welcome


def _poller(control: ControlChannel, line: LearnerLine) -> Poller:
    poller = Poller()
    poller.add(control.client)
    poller.add(line.client)
    return poller


class _Play(NamedTuple):
    """An actor's lanes in the environment of one stage of the curriculum, and where they stand."""

    stage: int
    env: Lanes
    carry: UnrollCarry


class _Recorded(NamedTuple):
    """An unroll of the journal: its stage, and the recurrent state `[E, state]` after its last step."""

    stage: int
    trajectory: Trajectory
    state_after: Tensor


class _Acting:
    """One life of an actor, from its welcome on."""

    def __init__(
        self, spec: ChildSpec, config: Config, control: ControlChannel, line: LearnerLine, welcome: Welcome
    ) -> None:
        self._who, self._config, self._welcome = spec.who, config, welcome
        self._journal = Path(spec.run_dir) / "journal" / "learner-0"
        self._control, self._line = control, line
        self._poller = _poller(control, line)
        self._lockstep = config.supervisor.lockstep
        self._sequence = welcome.unrolls if self._lockstep else 0
        self._steps_each = config.simic_trainer.unroll_length * config.environment.environments_per_actor
        self._steps = 0
        self._environments = config.stage_environments()
        trainer = config.simic_trainer
        world = world_of(config.environment, trainer.gamma)
        # Still without weights; they come with the first turn.
        self._policy = build_policy(world.spec, trainer, seeding.generator(trainer.seed, "policy"))

    def run(self) -> None:
        """Act until told to stop."""
        play = self._enter(0, self._welcome.first_episodes)
        if self._lockstep:
            caught_up = self._catch_up(play)
            if caught_up is None:
                return
            play = caught_up
        while self._await_turn():
            self._load()
            if self._line.stage != play.stage:
                play = self._move(play, self._line.stage)
            self._act(play)
            self._control.worked()
            self._report()
        self._report(now=True)

    def _enter(self, stage: int, first_episodes: Sequence[int]) -> _Play:
        """The actor's lanes in the environment of a stage, reset.

        The chance of a lane is named by run, actor and lane, not by incarnation: a new one goes on with the next
        episodes, in lockstep with the very steps.
        """
        trainer, environment = self._config.simic_trainer, self._environments[stage]
        lanes = range(environment.environments_per_actor)
        lane_seeds = [seeding.derive(trainer.seed, "actor", self._who.index, lane) for lane in lanes]
        world = world_of(environment, trainer.gamma)
        env = world.lanes(lane_seeds, first_episodes, stagger=environment.stagger)
        observation, _ = env.reset()
        first = np.array(first_episodes, dtype=np.int64)
        return _Play(stage, env, begin(self._policy, observation, lane_seeds, first))

    def _move(self, play: _Play, stage: int) -> _Play:
        """Leave the episodes under way and begin the next ones in another stage's environment."""
        play.env.close()
        return self._enter(stage, [int(number) + 1 for number in play.carry.episode_numbers])

    def _catch_up(self, play: _Play) -> _Play | None:
        """In lockstep: re-simulate what earlier lives did, stage by stage; None when told to stop instead."""
        for stage, unrolls in itertools.groupby(self._recorded(), key=lambda recorded: recorded.stage):
            if stage != play.stage:
                play = self._move(play, stage)
            made = ((recorded.trajectory, recorded.state_after) for recorded in unrolls)
            for _ in resimulate(play.env, play.carry, made):
                if self._control.stop_requested() is not None:
                    return None
                self._control.worked()
                self._control.report(phase="re-simulating")
                self._line.take()
        return play

    def _recorded(self) -> Iterator[_Recorded]:
        """This actor's unrolls in the learner's journal."""
        policy = self._policy
        found, wanted = 0, self._welcome.unrolls
        records = read(self._journal) if wanted > 0 else iter(())
        for record in records:
            if record.kind != ExperienceAdmitted.__name__:
                continue
            event = record.header_as(ExperienceAdmitted)
            if event.actor != self._who.index:
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
            yield _Recorded(event.stage, trajectory, torch.from_numpy(after))
            if found == wanted:
                return
        if found < wanted:
            raise InvariantViolation(
                f"the learner has {wanted} unrolls of actor {self._who.index}, {self._journal} holds {found}; without "
                f"them its lanes cannot be brought to where they were"
            )

    def _await_turn(self) -> bool:
        """Wait until an unroll may begin; false when told to stop instead."""
        while self._control.stop_requested() is None:
            if self._line.seek_turn():
                return True
            self._report(waiting_for=self._line.waiting_for)
            self._poller.wait(WAIT_MS)
        return False

    def _load(self) -> None:
        weights = self._line.take_weights()
        if weights is None:
            return
        self._policy.load_state_dict(safetensors.torch.load(weights))
        faults.witness(f"version {self._line.version}")
        faults.point("actor.weights.after")

    def _act(self, play: _Play) -> None:
        """Make one unroll and send it."""
        carry = play.carry
        episode_numbers = [int(number) for number in carry.episode_numbers]
        trajectory, finished = unroll(self._policy, play.env, carry, self._config.simic_trainer.unroll_length)
        faults.point("actor.unroll.after")
        self._sequence += 1
        self._steps += self._steps_each
        message = Unroll(
            actor=self._who.index,
            incarnation=self._who.incarnation,
            sequence=self._sequence,
            policy_version=self._line.version,
            lanes=play.env.num_envs,
            steps=trajectory.length,
            episode_numbers=episode_numbers,
            episodes=finished,
            stage=play.stage,
        )
        frames = encode(trajectory)
        if self._lockstep:
            frames.append(carry.state.numpy().astype("<f4").tobytes())
        self._line.send(message, frames)

    def _report(self, *, waiting_for: str = "", now: bool = False) -> None:
        line = self._line
        self._control.report(
            environment_steps=self._steps,
            waiting_for=waiting_for,
            metrics={
                "policy_version": float(line.version),
                "unacknowledged": float(len(line.unanswered)),
                "refused": float(line.refused),
            },
            now=now,
        )
