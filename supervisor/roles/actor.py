"""An actor: pulls weights, makes one unroll of all its lanes, sends it, waits for room, again.

It owns nothing that must survive: its environments are seeds and actions, both in the learner's journal. An unroll is
only begun while the actor holds a credit, so a slow learner stops it here. It waits for a learner as long as there is a
supervisor that wants it to: whether the learner lives is not for an actor to judge. Where an unroll comes from is the
affair of its source (`sources`): the policy plays, a script does, or somebody's records are read.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final

import safetensors.torch
import torch

from esper_simic import seeding
from esper_simic.config import Config, parse
from esper_simic.policies.build import build_policy
from esper_simic.policies.policy import Policy
from esper_simic.trajectory import encode
from esper_simic.worlds.world import world_of
from supervisor import faults
from supervisor.bus import Poller
from supervisor.child import ChildSpec
from supervisor.clock import SystemClock
from supervisor.hardware import hardware_here
from supervisor.protocol import Stopped, Unroll, Welcome
from supervisor.roles.channel import ControlChannel
from supervisor.roles.data import examined_data
from supervisor.roles.learner_line import LearnerLine
from supervisor.roles.sources import Source, records_of, source_of

WAIT_MS: Final = 200.0
"""Longest wait for the learner before the control line is looked at again."""

SURVEYING: Final = "surveying"
"""Phase of an actor that looks through other runs' records, before it is READY: an archive may take minutes."""


def main(spec: ChildSpec) -> None:
    """Be actor `spec.who.index` until told to stop.

    Raises:
        ConfigError: No host of this configuration can be grown here (see `examined_data`), or the records that it names
            cannot be learned from (`Records`).
    """
    torch.set_num_threads(1)
    config, run_dir = parse(spec.config_text, is_recorded=True), Path(spec.run_dir)
    data_digest = examined_data(config)
    trainer = config.simic_trainer
    world = world_of(config.environment, trainer.gamma)
    # Still without weights; they come with the first turn.
    policy = build_policy(world.spec, trainer, seeding.generator(trainer.seed, "policy"))
    with ControlChannel(spec, config.supervisor.frame_bytes_max) as control:
        records = records_of(config, policy, run_dir, partial(_report_survey, control))
        line = LearnerLine(spec, config, SystemClock(), hardware_here(torch.get_num_threads()))
        try:
            control.ready(data_digest=data_digest)
            welcome = _await_welcome(control, line)
            if welcome is not None:
                journal = run_dir / "journal" / "learner-0"
                source = source_of(config, policy, spec.who.index, journal, welcome, records)
                _Acting(spec, config, control, line, welcome, policy, source).run()
            control.tell(Stopped(role=spec.who.role, index=spec.who.index, incarnation=spec.who.incarnation))
        finally:
            line.close()


def _report_survey(control: ControlChannel) -> None:
    control.worked()
    control.report(phase=SURVEYING)


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
        self,
        spec: ChildSpec,
        config: Config,
        control: ControlChannel,
        line: LearnerLine,
        welcome: Welcome,
        policy: Policy,
        source: Source,
    ) -> None:
        self._who, self._behaviour = spec.who, config.environment.behaviour
        self._control, self._line = control, line
        self._policy, self._source = policy, source
        self._poller = _poller(control, line)
        self._lockstep = config.supervisor.lockstep
        self._sequence = welcome.unrolls if self._lockstep else 0
        self._steps = 0

    def run(self) -> None:
        """Act until told to stop."""
        if self._lockstep and not self._source.catch_up(self._goes_on):
            return
        while self._await_turn():
            self._load()
            self._act()
            self._control.worked()
            self._report()
        self._report(now=True)

    def _goes_on(self) -> bool:
        """One piece of the work of earlier lives was done again; false when told to stop."""
        if self._control.stop_requested() is not None:
            return False
        self._control.worked()
        self._control.report(phase="re-simulating")
        self._line.take()
        return True

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

    def _act(self) -> None:
        """Make one unroll and send it."""
        made = self._source.make(self._line.stage)
        faults.point("actor.unroll.after")
        self._sequence += 1
        self._steps += made.trajectory.length * made.trajectory.lanes
        message = Unroll(
            actor=self._who.index,
            incarnation=self._who.incarnation,
            sequence=self._sequence,
            policy_version=self._line.version,
            lanes=made.trajectory.lanes,
            steps=made.trajectory.length,
            episode_numbers=made.episode_numbers,
            episodes=made.episodes,
            stage=made.stage,
            behaviour=self._behaviour,
        )
        frames = encode(made.trajectory)
        if self._lockstep:
            frames.append(made.state_after.numpy().astype("<f4").tobytes())
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
