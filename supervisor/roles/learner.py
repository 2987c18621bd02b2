"""A learner: journals every experience before it acknowledges it, makes steps, announces weights once they are durable.

One loop. What came from the world goes into the journal and into `Learner` in the same order, so the journal alone
gives the same weights. Three debts wait for the disk and are paid when the journal's durable position has passed what
they rest on: acknowledgements, credits, and the announcement of a version.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import safetensors.torch
import torch

from esper_simic.config import Config, parse
from esper_simic.errors import BudgetExceeded, ContractError, UnavailableError
from esper_simic.events import (
    CheckpointSaved,
    ExperienceAdmitted,
    ExperienceRefused,
    LearnerStepped,
    RunStarted,
)
from esper_simic.fingerprint import fingerprint
from esper_simic.growing_host.spaces import observation_spec_of
from esper_simic.learner import Learner, StepReport
from esper_simic.trajectory import Trajectory, decode
from supervisor import checkpoints
from supervisor.bus import Poller, Received, Server
from supervisor.child import ChildSpec
from supervisor.journal import Journal
from supervisor.protocol import (
    ACCEPTS,
    Acknowledged,
    Checkpoint,
    Credit,
    Hello,
    Message,
    PullWeights,
    Refused,
    Stopped,
    Unroll,
    Weights,
    Welcome,
)
from supervisor.roles.channel import ControlChannel
from supervisor.roles.senders import REPEATED, Answer, Senders

WAIT_MS: Final = 50.0
STATE_FILE: Final = "state.safetensors"
NUMBERS_FILE: Final = "numbers.json"

EPISODE_NUMBER_MAX: Final = 2**53
"""No lane gets that far; a larger number is nonsense from the wire."""


class LearnerLoop:
    """The learner's shell: journal, socket, and the debts between them."""

    def __init__(self, spec: ChildSpec, config: Config, journal: Journal, server: Server) -> None:
        self._spec, self._config = spec, config
        self._journal, self._server = journal, server
        self._learner = Learner(config, observation_spec_of(config.environment), rank=spec.who.index)
        self._owed: deque[tuple[int, Callable[[], None]]] = deque()
        self._published: tuple[int, bytes] = (0, self._learner.weights())
        limits = config.supervisor
        self._senders = Senders(limits.num_actors, limits.unrolls_in_flight)
        self._refused: Counter[str] = Counter()
        self.metrics: dict[str, float] = {}

    @property
    def learner(self) -> Learner:
        """The state this loop folds."""
        return self._learner

    # -- what comes in ---------------------------------------------------------------------------------------------

    def take_messages(self) -> None:
        """Handle every message that is there."""
        while (received := self._server.receive()) is not None:
            if not isinstance(received, Received):
                continue
            match received.message:
                case Hello():
                    self._greet(received.peer, received.message)
                case PullWeights(have_version=have):
                    version, weights = self._published
                    frames = [weights] if version > have else []
                    self._send(received.peer, Weights(version=version), frames)
                case Unroll():
                    self._take_unroll(received.peer, received.message, received.frames)
                case _:
                    pass

    def _greet(self, peer: str, hello: Hello) -> None:
        """A new incarnation gets the credits that its predecessor does not still hold."""
        if not self._senders.greet(peer, hello.actor, hello.incarnation):
            self._count("greeting")
            return
        self._send(peer, Welcome(first_episodes=self._learner.next_episodes(hello.actor)))
        self._give_credit(hello.actor, self._config.supervisor.unrolls_in_flight)

    def _take_unroll(self, peer: str, message: Unroll, frames: tuple[bytes, ...]) -> None:
        actor, sequence = message.actor, message.sequence
        if not self._senders.is_living(peer, actor, message.incarnation):
            self._refuse(peer, message, "not_the_living_incarnation", is_credit_back=False)
            return
        answer = self._senders.answered(actor, sequence)
        if answer is not None:
            self._count(REPEATED)
            self._owe_answer(peer, sequence, answer)
            return
        if not self._senders.has_room(actor):
            self._refuse(peer, message, "no_credit", is_credit_back=False)
            return
        try:
            self._check(message)
            if self._learner.lag(message.policy_version) >= self._config.simic_trainer.max_policy_lag:
                self._refuse(peer, message, "too_old")
                return
            policy = self._learner.policy
            trajectory = decode(frames, policy.spec, message.steps, message.lanes, policy.state_size)
        except ContractError as error:
            self._refuse(peer, message, "malformed", str(error))
            return
        self._admit(peer, message, frames, trajectory)

    def _admit(self, peer: str, message: Unroll, frames: tuple[bytes, ...], trajectory: Trajectory) -> None:
        event = ExperienceAdmitted(
            actor=message.actor,
            incarnation=message.incarnation,
            sequence=message.sequence,
            policy_version=message.policy_version,
            length=message.steps,
            lanes=message.lanes,
            episode_numbers=message.episode_numbers,
            episodes=message.episodes,
        )
        position = self._append(event, frames)
        self._senders.admitted(message.actor, message.sequence, position)
        self._owe_answer(peer, message.sequence, Answer(position, ""))
        self._return_credits(position, self._learner.admit(position, event, trajectory))

    def _check(self, message: Unroll) -> None:
        """Check what an unroll says of itself, before anything is made of its frames.

        Raises:
            ContractError: It is of another shape than this run's, or speaks of what cannot be.
        """
        shape = (message.steps, message.lanes)
        if shape != self._shape:
            raise ContractError(f"an unroll of this run has (steps, lanes) {self._shape}, not {shape}")
        if not 0 <= message.policy_version <= self._published[0]:
            raise ContractError(
                f"policy version {message.policy_version} was never announced; the newest is {self._published[0]}"
            )
        if len(message.episode_numbers) != message.lanes:
            raise ContractError(f"{len(message.episode_numbers)} episode numbers for {message.lanes} lanes")
        numbers = [*message.episode_numbers, *(episode.number for episode in message.episodes)]
        if not all(0 <= number < EPISODE_NUMBER_MAX for number in numbers):
            raise ContractError(f"an episode number is not in [0, {EPISODE_NUMBER_MAX})")
        for episode in message.episodes:
            if not 0 <= episode.lane < message.lanes:
                raise ContractError(f"an episode of lane {episode.lane}; there are {message.lanes}")
            if not (math.isfinite(episode.episode_return) and math.isfinite(episode.accuracy)):
                raise ContractError(f"the outcome of an episode of lane {episode.lane} is not finite")

    @property
    def _shape(self) -> tuple[int, int]:
        """Steps and lanes of every unroll of this run."""
        return self._config.simic_trainer.unroll_length, self._config.environment.environments_per_actor

    def _refuse(
        self, peer: str, message: Unroll, reason: str, detail: str = "", *, is_credit_back: bool = True
    ) -> None:
        """Refuse an unroll; one of another shape is not believed to be any steps at all."""
        steps = math.prod(self._shape) if (message.steps, message.lanes) == self._shape else 0
        event = ExperienceRefused(
            actor=message.actor,
            incarnation=message.incarnation,
            sequence=message.sequence,
            policy_version=message.policy_version,
            steps=steps,
            reason=f"{reason}: {detail}" if detail else reason,
        )
        self._count(reason)
        position = self._append(event)
        self._learner.count_refused(event.steps)
        self._owe_answer(peer, message.sequence, Answer(position, reason))
        actor = message.actor
        if self._senders.is_living(peer, actor, message.incarnation):
            self._senders.refused(actor, message.sequence, position, reason, is_credit_back=is_credit_back)
        if is_credit_back:
            self._owe(position, lambda: self._give_credit(actor, 1))

    # -- steps -----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Make one update, journal it, and announce its weights once that is durable."""
        report = self._learner.step()
        position = self._append(
            LearnerStepped(
                step=report.step,
                environment_steps=report.environment_steps,
                digest=report.digest,
                state_digest=report.state_digest,
                metrics=report.metrics,
            )
        )
        self.metrics = report.metrics
        self._announce_when_durable(position, report)
        self._return_credits(position, report.unrolls_consumed)

    def _announce_when_durable(self, position: int, report: StepReport) -> None:
        weights = self._learner.weights()

        def announce() -> None:
            self._published = (report.step, weights)

        self._owe(position, announce)

    # -- debts -----------------------------------------------------------------------------------------------------

    def pay(self) -> None:
        """Pay every debt whose ground is durable."""
        durable = self._journal.poll_durable()
        while self._owed and self._owed[0][0] < durable:
            self._owed.popleft()[1]()

    def _owe(self, position: int, debt: Callable[[], None]) -> None:
        self._owed.append((position, debt))

    def _return_credits(self, position: int, consumed: tuple[int, ...]) -> None:
        for unroll in consumed:
            actor = self._senders.consumed(unroll)
            self._owe(position, lambda actor=actor: self._give_credit(actor, 1))  # type: ignore[misc]

    def _give_credit(self, actor: int, count: int) -> None:
        """Give credits to the actor's present life, never more than `unrolls_in_flight` in all."""
        granted = self._senders.grant(actor, count)
        if granted > 0:
            self._send(self._senders.peer_of(actor), Credit(count=granted, policy_version=self._published[0]))

    def _owe_answer(self, peer: str, sequence: int, answer: Answer) -> None:
        """Say what became of an unroll once that is durable; a repeated one is told the first answer."""
        said = (
            Refused(sequence=sequence, reason=answer.refusal)
            if answer.refusal
            else Acknowledged(sequence=sequence, position=answer.position)
        )
        self._owe(answer.position, lambda: self._send(peer, said))

    def _send(self, peer: str, message: Message, frames: list[bytes] | None = None) -> None:
        # A dead actor takes nothing more; its next incarnation says Hello.
        try:
            self._server.send(peer, message, frames or [])
        except (UnavailableError, BudgetExceeded):
            self._count("undeliverable")

    def _count(self, cause: str) -> None:
        self._refused[cause] += 1

    def _append(self, event: msgspec.Struct, frames: tuple[bytes, ...] = ()) -> int:
        return self._journal.append(type(event).__name__, event, frames)

    def counters(self) -> dict[str, float]:
        """Refusals by cause, of unrolls and of frames."""
        counts = {f"refused.{cause}": float(count) for cause, count in self._refused.items()}
        return counts | {
            f"refused.frame.{cause}": float(count) for cause, count in self._server.refused.items()
        }

    # -- the end ---------------------------------------------------------------------------------------------------

    def save(self, checkpoints_directory: Path) -> Checkpoint:
        """Write, verify and journal a checkpoint of the present state."""
        learner = self._learner
        position = self._journal.sync()
        digest = learner.state_digest()
        files = {
            STATE_FILE: safetensors.torch.save(
                {n: t.contiguous() for n, t in learner.state_tensors().items()}
            ),
            NUMBERS_FILE: msgspec.json.format(msgspec.json.encode(learner.state_numbers()), indent=2),
        }
        directory = checkpoints.save(
            checkpoints_directory,
            files,
            {
                "run_id": self._spec.run_id,
                "step": learner.steps_done,
                "environment_steps": learner.environment_steps,
                "journal_position": position,
                "state_digest": digest,
                "fingerprint": fingerprint(),
            },
        )
        manifest = checkpoints.read_manifest(directory)
        self._append(
            CheckpointSaved(
                step=learner.steps_done,
                environment_steps=learner.environment_steps,
                directory=directory.name,
                state_digest=digest,
                files={name: file.sha256 for name, file in manifest.files.items()},
            )
        )
        self._journal.sync()
        return Checkpoint(
            path=str(directory),
            learner_step=learner.steps_done,
            environment_steps=learner.environment_steps,
            digest=digest,
        )


def main(spec: ChildSpec) -> None:
    """Be learner `spec.who.index` until told to stop; leave a checkpoint."""
    config = parse(spec.config_text)
    torch.set_num_threads(config.supervisor.learner_threads)
    limits = config.supervisor
    run_dir = Path(spec.run_dir)
    journal = Journal(
        run_dir / "journal" / spec.who.name,
        owner=spec.who.name,
        run_id=spec.run_id,
        segment_bytes_max=limits.journal_segment_bytes_max,
        commit_interval_ms=limits.journal_commit_interval_ms,
        commit_records_max=limits.journal_commit_records_max,
        commit_bytes_max=limits.journal_commit_bytes_max,
    )
    with (
        journal,
        Server(
            spec.endpoints["experience"],
            run_id=spec.run_id,
            accepts=ACCEPTS["learner"],
            frame_bytes_max=limits.frame_bytes_max,
        ) as server,
        ControlChannel(spec, limits.frame_bytes_max) as control,
    ):
        started = RunStarted(
            run_id=spec.run_id, config=config.model_dump(mode="json"), fingerprint=fingerprint()
        )
        journal.append("RunStarted", started)
        journal.sync()
        loop = LearnerLoop(spec, config, journal, server)
        control.ready()
        _learn(loop, journal, server, control)
        checkpoint = loop.save(run_dir / "checkpoints")
        role, index, incarnation = spec.who
        control.tell(Stopped(role=role, index=index, incarnation=incarnation, checkpoint=checkpoint))


def _learn(loop: LearnerLoop, journal: Journal, server: Server, control: ControlChannel) -> None:
    poller = Poller()
    for source in (server, control.client, journal.durable_fd):
        poller.add(source)
    while control.stop_requested() is None:
        can_step = loop.learner.can_step()
        poller.wait(0 if can_step else WAIT_MS)
        loop.take_messages()
        loop.pay()
        if loop.learner.can_step():
            loop.step()
            control.worked()
        _report(loop, control, waiting_for="" if can_step else "experience")
    # The last update is shown too, however short ago the report before it was.
    _report(loop, control, now=True)


def _report(loop: LearnerLoop, control: ControlChannel, *, waiting_for: str = "", now: bool = False) -> None:
    control.report(
        learner_step=loop.learner.steps_done,
        environment_steps=loop.learner.environment_steps,
        waiting_for=waiting_for,
        metrics=loop.metrics | loop.counters(),
        now=now,
    )
