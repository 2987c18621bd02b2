"""An actor: pulls weights, makes one unroll of all its lanes, sends it, waits for room, again.

It owns nothing that must survive: its environments are seeds and actions, both in the learner's journal. An unroll is
only begun while the actor holds a credit, so a slow learner stops it here. It waits for a learner as long as there is a
supervisor that wants it to: whether the learner lives is not for an actor to judge.

In lockstep a new life does not begin new episodes but stands where the one before it stood: it steps its environments
with the actions that the learner's journal holds of it, and takes the recurrent state that came with the last of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from esper_simic import seeding
from esper_simic.config import Config, parse
from esper_simic.errors import InvariantViolation
from esper_simic.events import ExperienceAdmitted
from esper_simic.growing_host.vector import GrowingHostVectorEnv
from esper_simic.policies.graph_policy import GraphPolicy
from esper_simic.trajectory import Trajectory, decode, encode
from esper_simic.unroll import UnrollCarry, begin, resimulate, unroll
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

    def run(self) -> None:
        """Act until told to stop."""
        env, policy, carry = self._begin()
        if self._lockstep and not self._catch_up(env, policy, carry):
            return
        while self._await_turn():
            self._load(policy)
            self._act(env, policy, carry)
            self._control.worked()
            self._report()
        self._report(now=True)

    def _begin(self) -> tuple[GrowingHostVectorEnv, GraphPolicy, UnrollCarry]:
        """The actor's lanes, reset, and its policy, still without weights.

        The chance of a lane is named by run, actor and lane, not by incarnation: a new one goes on with the next
        episodes, in lockstep with the very steps.
        """
        trainer, environment = self._config.simic_trainer, self._config.environment
        first_episodes = self._welcome.first_episodes
        lanes = environment.environments_per_actor
        lane_seeds = [seeding.derive(trainer.seed, "actor", self._who.index, lane) for lane in range(lanes)]
        env = GrowingHostVectorEnv(
            lanes, environment, gamma=trainer.gamma, lane_seeds=lane_seeds, first_episodes=first_episodes
        )
        observation, _ = env.reset()
        policy = GraphPolicy(env.spec_observation, trainer, seeding.generator(trainer.seed, "policy"))
        return env, policy, begin(policy, observation, lane_seeds, np.array(first_episodes, dtype=np.int64))

    def _catch_up(self, env: GrowingHostVectorEnv, policy: GraphPolicy, carry: UnrollCarry) -> bool:
        """In lockstep: re-simulate what earlier lives did; false when told to stop instead."""
        for _ in resimulate(env, carry, self._recorded(policy)):
            if self._control.stop_requested() is not None:
                return False
            self._control.worked()
            self._control.report(phase="re-simulating")
            self._line.take()
        return True

    def _recorded(self, policy: GraphPolicy) -> Iterator[tuple[Trajectory, Tensor]]:
        """This actor's unrolls in the learner's journal, with the recurrent state after each."""
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
            yield trajectory, torch.from_numpy(after)
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

    def _load(self, policy: GraphPolicy) -> None:
        weights = self._line.take_weights()
        if weights is None:
            return
        policy.load_state_dict(safetensors.torch.load(weights))
        faults.witness(f"version {self._line.version}")
        faults.point("actor.weights.after")

    def _act(self, env: GrowingHostVectorEnv, policy: GraphPolicy, carry: UnrollCarry) -> None:
        """Make one unroll and send it."""
        episode_numbers = [int(number) for number in carry.episode_numbers]
        trajectory, finished = unroll(policy, env, carry, self._config.simic_trainer.unroll_length)
        faults.point("actor.unroll.after")
        self._sequence += 1
        self._steps += self._steps_each
        message = Unroll(
            actor=self._who.index,
            incarnation=self._who.incarnation,
            sequence=self._sequence,
            policy_version=self._line.version,
            lanes=env.num_envs,
            steps=trajectory.length,
            episode_numbers=episode_numbers,
            episodes=finished,
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
