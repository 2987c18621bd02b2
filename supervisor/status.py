"""What a run looks like: asked of its supervisor, or read from its files when nobody answers.

Whether a supervisor lives is read from the lock of the run directory, which the kernel gives back however a process
ends, and never from a process id that somebody else may have by now. Three cases:

* it lives and answers: its own picture;
* it lives and is silent: what the journals tell, as state `silent`;
* it is gone: what the journals tell; if they do not tell of an end, as state `died`.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

from esper_simic.curriculum_facts import CurriculumRequest
from esper_simic.errors import ContractError, UnavailableError
from esper_simic.events import (
    CheckpointSaved,
    ExperienceAdmitted,
    ExperienceRefused,
    LearnerStepped,
    StepFailed,
)
from supervisor import checkpoints
from supervisor.bus import Client, Received
from supervisor.config_file import config_of
from supervisor.journal import JournalDamage, Record, read, read_last
from supervisor.journal.writer import LOCK_NAME
from supervisor.outcome import fold_journal
from supervisor.protocol import ACCEPTS, Command, CommandReply, Message, StatusReply, StatusRequest
from supervisor.state import LIVE, TERMINAL, Phase, RunState, Status
from supervisor.vitals import EnvironmentView, LearnerView, ProcessView, Snapshot, Vitals

ANSWER_TIMEOUT_MS: Final = 5_000
"""A living supervisor looks at its messages several times a second, also while it starts."""

MESSAGE_BYTES_MAX: Final = 2**24

DIED: Final = "died"
SILENT: Final = "silent"
"""States of a snapshot beside the phases of a run: no supervisor lives, or it does not answer."""

LOST: Final = "lost"
"""State of a process that the journal last saw alive and whose supervisor died: nobody knows."""


class Health(StrEnum):
    """What a script wants to know about a run."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    DEGRADED = "degraded"
    ENDED = "ended"
    FAILED = "failed"


class Address(msgspec.Struct, frozen=True):
    """Where a living supervisor listens; its file is gone when it ends in order."""

    pid: int
    run_id: str
    endpoint: str


def newest_run(parent: Path) -> Path:
    """The run directory under `parent` whose supervisor was started last.

    Raises:
        UnavailableError: There is none.
    """
    # A supervisor touches its journal's lock file when it opens the journal, and nobody else ever does.
    started = {
        path.parents[2]: path.stat().st_mtime_ns for path in parent.glob(f"*/journal/supervisor/{LOCK_NAME}")
    }
    if not started:
        raise UnavailableError(
            f"no run under {parent}/: name a run directory, or start one with `simic-supervisor run`"
        )
    return max(started, key=lambda path: (started[path], path))


def observe(run_dir: Path, timeout_ms: int = ANSWER_TIMEOUT_MS) -> Snapshot:
    """The run at this moment.

    Raises:
        UnavailableError: The directory holds no run.
        ContractError: Its supervisor or its journal is of another version.
        ConfigError: Its configuration is of another version.
        JournalDamage: Its journal is damaged.
    """
    answer = ask(run_dir, StatusRequest(), timeout_ms)
    if not isinstance(answer, StatusReply):
        return from_files(run_dir)
    try:
        return msgspec.convert(answer.snapshot, Snapshot)
    except msgspec.ValidationError as error:
        raise ContractError(f"the supervisor of {run_dir} is of another version: {error}") from None


def ask(run_dir: Path, message: Message, timeout_ms: int = ANSWER_TIMEOUT_MS) -> Message | None:
    """Say something to a run's supervisor and give its answer; None when none lives there or it stays silent."""
    if not is_supervised(run_dir):
        return None
    try:
        address = msgspec.json.decode((run_dir / "supervisor.json").read_bytes(), type=Address)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    with Client(
        address.endpoint,
        f"operator-{uuid.uuid4().hex}",
        run_id=address.run_id,
        accepts=ACCEPTS["operator"],
        frame_bytes_max=MESSAGE_BYTES_MAX,
    ) as client:
        client.send(message)
        received = client.receive(timeout_ms)
    return received.message if isinstance(received, Received) else None


def command(
    run_dir: Path,
    name: str,
    command_id: str,
    request: CurriculumRequest | None = None,
    timeout_ms: int = ANSWER_TIMEOUT_MS,
) -> CommandReply:
    """Send an operator's command and give the answer.

    Raises:
        UnavailableError: No supervisor answers in that time.
    """
    answer = ask(run_dir, Command(command_id=command_id, name=name, request=request), timeout_ms)
    if not isinstance(answer, CommandReply):
        raise UnavailableError(f"no supervisor answers in {run_dir}")
    return answer


def is_supervised(run_dir: Path) -> bool:
    """Whether a supervisor lives in the run directory.

    The lock is tried in shared mode for an instant and the file is left alone, so two who look at the same time do not
    see each other, and a directory that may only be read can be looked at.

    Raises:
        UnavailableError: The lock file may not be read.
    """
    try:
        descriptor = os.open(run_dir / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UnavailableError(f"cannot look into {run_dir}: {error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def state_of(run_dir: Path) -> RunState:
    """The supervisor's state of a run, from its journal.

    Raises:
        UnavailableError: The directory holds no run.
        ContractError: Its journal is not one of this program.
        JournalDamage: Its journal is damaged.
    """
    state = fold_journal(run_dir)
    if state.started is None:
        raise UnavailableError(f"{run_dir} holds no run: its supervisor's journal is missing or empty")
    return state


def from_files(run_dir: Path) -> Snapshot:
    """The run as its journals tell it.

    Damage to the learner's journal is a trouble of the run, not of whoever looks at it.

    Raises:
        UnavailableError: The directory holds no run.
        ContractError: Its journal is not one of this program.
        ConfigError: Its configuration is of another version.
        JournalDamage: Its supervisor's journal is damaged.
    """
    # Before the journal: whoever ends between the two has written the end that is then read.
    supervised = is_supervised(run_dir)
    state = state_of(run_dir)
    troubles = []
    try:
        learner, environment, learned_until_s = _learner(run_dir, state)
    except JournalDamage as damage:
        learner, environment, learned_until_s = LearnerView(), EnvironmentView(), 0.0
        troubles.append(str(damage))
    snapshot = Vitals().snapshot(
        state,
        now_s=state.finished.at_s if state.finished else max(_last_event_s(run_dir), learned_until_s),
        run_dir=str(run_dir.resolve()),
        config=config_of(state.started.config if state.started else {}).supervisor,
        memory_bytes={},
        refused={},
    )
    snapshot = msgspec.structs.replace(snapshot, learner=learner, environment=environment, troubles=troubles)
    if state.phase in TERMINAL:
        return snapshot
    if supervised:
        return msgspec.structs.replace(
            snapshot,
            state=SILENT,
            reason=f"the supervisor lives but does not answer; by its journal the run is {state.phase}",
        )
    return msgspec.structs.replace(
        snapshot,
        state=DIED,
        reason=f"the supervisor is gone without a last word; by its journal the run was {state.phase}",
        processes=[_lost(process) for process in snapshot.processes],
    )


def _learner(run_dir: Path, state: RunState) -> tuple[LearnerView, EnvironmentView, float]:
    """What the learner's journal tells, and until when: seconds since the supervisor started, by the wall clock.

    Its newest update counts the environment steps until then; what was admitted or refused since is added.
    """
    directory = run_dir / "journal" / "learner-0"
    if state.started is None or not directory.is_dir():
        return LearnerView(), EnvironmentView(), 0.0
    stepped = read_last(directory, kinds=("LearnerStepped", "StepFailed"))
    last = _update(stepped[-1]) if stepped else None
    steps = last.environment_steps if last else 0
    until_ns = stepped[-1].time_ns if stepped else 0
    for record in read(directory, stepped[-1].position + 1 if stepped else 0):
        until_ns = record.time_ns
        if record.kind == "ExperienceAdmitted":
            admitted = record.header_as(ExperienceAdmitted)
            steps += admitted.length * admitted.lanes
        elif record.kind == "ExperienceRefused":
            steps += record.header_as(ExperienceRefused).steps
    metrics = _metrics(directory, last) | _last_checkpoint(run_dir, until_ns)
    step, before = last.step if last else 0, state.updates_before or 0
    learner = LearnerView(step=step, before=before, metrics=metrics)
    environment = EnvironmentView(steps=steps, before=state.steps_before or 0)
    return learner, environment, until_ns / 1e9 - state.started.started_unix_s


def _update(record: Record) -> LearnerStepped | StepFailed:
    if record.kind == StepFailed.__name__:
        return record.header_as(StepFailed)
    return record.header_as(LearnerStepped)


def _metrics(directory: Path, last: LearnerStepped | StepFailed | None) -> dict[str, float]:
    """Those of the newest update that was made."""
    if isinstance(last, LearnerStepped):
        return last.metrics
    made = read_last(directory, kinds=("LearnerStepped",)) if last else []
    return made[-1].header_as(LearnerStepped).metrics if made else {}


def _last_checkpoint(run_dir: Path, until_ns: int) -> dict[str, float]:
    """What a learner would report of its newest checkpoint that counts, its age when the journal ends; else nothing."""
    directory = run_dir / "journal" / "learner-0"
    for listed in reversed(checkpoints.list_checkpoints(run_dir / "checkpoints")):
        if isinstance(listed, checkpoints.BadCheckpoint):
            continue
        for record in read(directory, listed.manifest.journal_position):
            if record.kind != CheckpointSaved.__name__:
                continue
            saved = record.header_as(CheckpointSaved)
            if saved.directory == listed.path.name:
                age_s = (until_ns - record.time_ns) / 1e9
                return {"checkpoint.step": float(saved.step), "checkpoint.age_s": age_s}
    return {}


def _last_event_s(run_dir: Path) -> float:
    records = read_last(run_dir / "journal" / "supervisor")
    return float(records[-1].header["at_s"]) if records else 0.0


def _lost(process: ProcessView) -> ProcessView:
    """Children die with their supervisor, but nobody was there to see it."""
    if process.state not in LIVE:
        return process
    return msgspec.structs.replace(process, state=LOST, pid=0)


_HEALTH: Final[dict[str, Health]] = {
    Phase.STARTING: Health.STARTING,
    Phase.TRAINING: Health.RUNNING,
    Phase.STOPPING: Health.STOPPING,
    Phase.EVALUATING: Health.RUNNING,
    Phase.FINISHED: Health.ENDED,
    Phase.STOPPED: Health.ENDED,
    Phase.FAILED: Health.FAILED,
    DIED: Health.FAILED,
    SILENT: Health.DEGRADED,
}

_AT_WORK: Final[dict[str, tuple[str, ...]]] = {
    Phase.TRAINING: ("learner", "actor"),
    Phase.EVALUATING: ("evaluate",),
}
"""Roles without which a phase gets nowhere."""


def health(snapshot: Snapshot) -> Health:
    """Judge a snapshot: the worst that is true of it.

    Raises:
        ContractError: Its state is none that this version knows.
    """
    if snapshot.state not in _HEALTH:
        raise ContractError(f"the run is in the state {snapshot.state!r}, which this version does not know")
    # A run that is not over gives a reason only when it is failing.
    if snapshot.reason and snapshot.state in set(Phase) - TERMINAL:
        return Health.FAILED
    if snapshot.state in _AT_WORK and worries(snapshot):
        return Health.DEGRADED
    return _HEALTH[snapshot.state]


def worries(snapshot: Snapshot) -> list[str]:
    """What makes a run that is at work less than healthy."""
    missing = [
        f"{process.role}-{process.index} is {process.state} again"
        if process.restarts > 0
        else f"{process.role}-{process.index} is {process.state}"
        for process in snapshot.processes
        if _is_missing(process, snapshot.state)
    ]
    return [*snapshot.troubles, *missing]


def _is_missing(process: ProcessView, state: str) -> bool:
    """Whether the phase needs this process and it is gone or being restarted."""
    if process.role not in _AT_WORK.get(state, ()):
        return False
    if process.state in (Status.SCHEDULED, Status.STARTED):
        return process.restarts > 0
    return process.state in (Status.EXITED, Status.ABANDONED)
