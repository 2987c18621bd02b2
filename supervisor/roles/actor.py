"""An actor: pulls weights, makes one unroll of all its lanes, sends it, waits for room, again.

It owns nothing that must survive: its environments are seeds and actions, both in the learner's journal. An unroll is
only sent while the actor holds a credit, so a slow learner stops it here.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import safetensors.torch
import torch

from esper_simic import seeding
from esper_simic.config import Config, parse
from esper_simic.errors import UnavailableError
from esper_simic.growing_host.vector import GrowingHostVectorEnv
from esper_simic.policies.graph_policy import GraphPolicy
from esper_simic.trajectory import encode
from esper_simic.unroll import UnrollCarry, begin, unroll
from supervisor.bus import Client, Poller, Received
from supervisor.child import ChildSpec
from supervisor.protocol import (
    ACCEPTS,
    Acknowledged,
    Credit,
    Hello,
    PullWeights,
    Refused,
    Stopped,
    Unroll,
    Weights,
    Welcome,
)
from supervisor.roles.channel import ControlChannel

WAIT_MS: Final = 200.0
"""Longest wait for the learner before the control line is looked at again."""

ANSWER_TIMEOUT_POLLS: Final = 300
"""Waits of `WAIT_MS` without weights from the learner after which the actor gives up: one minute."""


class LearnerLine:
    """An actor's line to the learner: weights, credits, acknowledgements."""

    def __init__(self, spec: ChildSpec, config: Config) -> None:
        self._client = Client(
            spec.endpoints["experience"],
            spec.identity,
            run_id=spec.run_id,
            accepts=ACCEPTS["actor"],
            frame_bytes_max=config.supervisor.frame_bytes_max,
        )
        self.credits = 0
        self.version = -1
        self.newest_version = -1
        self.first_episodes: list[int] | None = None
        self.unacknowledged: set[int] = set()
        self.refused = 0
        self._client.send(Hello(actor=spec.who.index, incarnation=spec.who.incarnation))

    @property
    def client(self) -> Client:
        """To be watched by a poller."""
        return self._client

    def ask_weights(self) -> None:
        """Ask for weights newer than those held."""
        self._client.send(PullWeights(have_version=self.version))

    def send(self, message: Unroll, frames: list[bytes]) -> None:
        """Send an unroll on one credit."""
        self.credits -= 1
        self.unacknowledged.add(message.sequence)
        self._client.send(message, frames)

    def take(self, policy: GraphPolicy | None = None) -> bool:
        """Handle all that came; whether an answer about weights was among it.

        Args:
            policy: Gets new weights; none are asked for before there is one.
        """
        answered = False
        while (received := self._client.receive()) is not None:
            if not isinstance(received, Received):
                continue
            match received.message:
                case Welcome(first_episodes=first_episodes):
                    self.first_episodes = first_episodes
                case Credit(count=count, policy_version=version):
                    self.credits += count
                    self.newest_version = max(self.newest_version, version)
                case Acknowledged(sequence=sequence):
                    self.unacknowledged.discard(sequence)
                case Refused(sequence=sequence):
                    self.unacknowledged.discard(sequence)
                    self.refused += 1
                case Weights(version=version):
                    answered = True
                    if received.frames and policy is not None:
                        policy.load_state_dict(safetensors.torch.load(received.frames[0]))
                        self.version = version
                case _:
                    pass
        return answered

    def close(self) -> None:
        """End the socket."""
        self._client.close()


def main(spec: ChildSpec) -> None:
    """Be actor `spec.who.index` until told to stop."""
    torch.set_num_threads(1)
    config = parse(spec.config_text)
    line = LearnerLine(spec, config)
    try:
        with ControlChannel(spec, config.supervisor.frame_bytes_max) as control:
            control.ready()
            if _await_welcome(control, line):
                _act(spec, config, control, line)
            control.tell(Stopped(role=spec.who.role, index=spec.who.index, incarnation=spec.who.incarnation))
    finally:
        line.close()


def _await_welcome(control: ControlChannel, line: LearnerLine) -> bool:
    """Wait until the learner says where the lanes begin; false when told to stop instead."""
    poller = _poller(control, line)
    while line.first_episodes is None:
        if control.stop_requested() is not None:
            return False
        control.report(waiting_for="learner")
        poller.wait(WAIT_MS)
        line.take()
    return True


def _poller(control: ControlChannel, line: LearnerLine) -> Poller:
    poller = Poller()
    poller.add(control.client)
    poller.add(line.client)
    return poller


def _begin(
    spec: ChildSpec, config: Config, first_episodes: list[int]
) -> tuple[GrowingHostVectorEnv, GraphPolicy, UnrollCarry]:
    """The actor's lanes, reset, and its policy, still without weights.

    The chance of a lane is named by run, actor and lane, not by incarnation: a new one goes on with the next episodes.
    """
    trainer = config.simic_trainer
    lanes = config.environment.environments_per_actor
    lane_seeds = [seeding.derive(trainer.seed, "actor", spec.who.index, lane) for lane in range(lanes)]
    env = GrowingHostVectorEnv(
        lanes, config.environment, gamma=trainer.gamma, lane_seeds=lane_seeds, first_episodes=first_episodes
    )
    observation, _ = env.reset()
    policy = GraphPolicy(env.spec_observation, trainer, seeding.generator(trainer.seed, "policy"))
    return env, policy, begin(policy, observation, lane_seeds, np.array(first_episodes, dtype=np.int64))


def _act(spec: ChildSpec, config: Config, control: ControlChannel, line: LearnerLine) -> None:
    poller = _poller(control, line)
    env, policy, carry = _begin(spec, config, line.first_episodes or [])
    length = config.simic_trainer.unroll_length
    steps_each = length * env.num_envs
    sequence = 0
    while _await_turn(control, line, poller, policy, sequence * steps_each):
        episode_numbers = [int(number) for number in carry.episode_numbers]
        trajectory, finished = unroll(policy, env, carry, length)
        sequence += 1
        message = Unroll(
            actor=spec.who.index,
            incarnation=spec.who.incarnation,
            sequence=sequence,
            policy_version=line.version,
            lanes=env.num_envs,
            steps=length,
            episode_numbers=episode_numbers,
            episodes=finished,
        )
        line.send(message, encode(trajectory))
        control.worked()
        control.report(environment_steps=sequence * steps_each, metrics=_metrics(line))
    control.report(environment_steps=sequence * steps_each, metrics=_metrics(line), now=True)


def _await_turn(
    control: ControlChannel, line: LearnerLine, poller: Poller, policy: GraphPolicy, environment_steps: int
) -> bool:
    """Wait for a credit, then for the newest weights; false when told to stop instead.

    In this order, because a credit may be long in coming: weights fetched before it would be old by then.
    """
    is_asked = False
    silent_polls = 0
    while True:
        if control.stop_requested() is not None:
            return False
        if line.take(policy) and is_asked:
            return True
        if line.credits > 0 and not is_asked:
            line.ask_weights()
            is_asked = True
        waiting_for = "weights" if is_asked else "credit"
        control.report(environment_steps=environment_steps, waiting_for=waiting_for, metrics=_metrics(line))
        quiet = not poller.wait(WAIT_MS)
        silent_polls += quiet and is_asked
        if silent_polls > ANSWER_TIMEOUT_POLLS:
            raise UnavailableError(
                f"the learner gave no weights in {ANSWER_TIMEOUT_POLLS * WAIT_MS / 1000:g} s"
            )


def _metrics(line: LearnerLine) -> dict[str, float]:
    return {
        "policy_version": float(line.version),
        "unacknowledged": float(len(line.unacknowledged)),
        "refused": float(line.refused),
    }
