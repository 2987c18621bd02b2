"""What a run looks like: asked of its supervisor, or read from its files when nobody answers."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

from esper_simic.errors import UnavailableError
from esper_simic.events import LearnerStepped
from supervisor.bus import Client, Received
from supervisor.config_file import config_of
from supervisor.files import exclusive_lock
from supervisor.journal import read_last
from supervisor.protocol import ACCEPTS, Command, CommandReply, Message, StatusReply, StatusRequest
from supervisor.run import fold_journal
from supervisor.state import TERMINAL, Phase, RunState
from supervisor.vitals import EnvironmentView, LearnerView, Snapshot, Vitals

ANSWER_TIMEOUT_MS: Final = 2_000
MESSAGE_BYTES_MAX: Final = 2**24
DIED: Final = "died"


class Health(StrEnum):
    """What a script wants to know about a run."""

    RUNNING = "running"
    DEGRADED = "degraded"
    ENDED = "ended"
    FAILED = "failed"


class Address(msgspec.Struct, frozen=True):
    """Where a living supervisor listens; its file is gone when it ends in order."""

    pid: int
    run_id: str
    endpoint: str


def newest_run(parent: Path) -> Path:
    """The run directory under `parent` that was begun last.

    Raises:
        UnavailableError: There is none.
    """
    runs = [path for path in parent.glob("*") if (path / "journal" / "supervisor").is_dir()] if parent.is_dir() else []
    if not runs:
        raise UnavailableError(f"no run under {parent}/; name a run directory, or start one with `simic-supervisor run`")
    return max(runs, key=lambda path: (path / "journal" / "supervisor").stat().st_ctime_ns)


def observe(run_dir: Path) -> Snapshot:
    """The run at this moment.

    Raises:
        UnavailableError: The directory holds no run.
        ContractError: Its journal is not one of this program.
        JournalDamage: Its journal is damaged.
    """
    answer = ask(run_dir, StatusRequest())
    if isinstance(answer, StatusReply):
        return msgspec.convert(answer.snapshot, Snapshot)
    return from_files(run_dir)


def ask(run_dir: Path, message: Message, timeout_ms: int = ANSWER_TIMEOUT_MS) -> Message | None:
    """Say something to a run's supervisor and give its answer; None when none lives there or it stays silent."""
    try:
        address = msgspec.json.decode((run_dir / "supervisor.json").read_bytes(), type=Address)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    identity = f"operator-{id(message)}-{address.pid}"
    with Client(
        address.endpoint,
        identity,
        run_id=address.run_id,
        accepts=ACCEPTS["operator"],
        frame_bytes_max=MESSAGE_BYTES_MAX,
    ) as client:
        client.send(message)
        received = client.receive(timeout_ms)
    return received.message if isinstance(received, Received) else None


def command(run_dir: Path, name: str, command_id: str) -> CommandReply:
    """Send an operator's command and give the answer.

    Raises:
        UnavailableError: No supervisor answers.
    """
    answer = ask(run_dir, Command(command_id=command_id, name=name))
    if not isinstance(answer, CommandReply):
        raise UnavailableError(f"no supervisor answers in {run_dir}")
    return answer


def from_files(run_dir: Path) -> Snapshot:
    """The run as its journals tell it.

    Raises:
        UnavailableError: The directory holds no run.
        ContractError: Its journal is not one of this program.
        JournalDamage: Its journal is damaged.
    """
    state = fold_journal(run_dir)
    if state.started is None:
        raise UnavailableError(f"{run_dir} holds no run: journal/supervisor has no event")
    ended_s = state.finished.at_s if state.finished else _last_event_s(run_dir)
    snapshot = Vitals().snapshot(
        state,
        now_s=ended_s,
        run_dir=str(run_dir.resolve()),
        config=config_of(state.started.config).supervisor,
        memory_bytes={},
        refused={},
    )
    stepped = _last_step(run_dir)
    if stepped is not None:
        snapshot = msgspec.structs.replace(
            snapshot,
            learner=LearnerView(step=stepped.step, metrics=stepped.metrics),
            environment=EnvironmentView(steps=stepped.environment_steps),
        )
    if state.phase not in TERMINAL and not _is_held(run_dir):
        reason = f"the supervisor is gone without a last word; it was {state.phase}"
        snapshot = msgspec.structs.replace(snapshot, state=DIED, reason=reason)
    return snapshot


def health(snapshot: Snapshot) -> Health:
    """Judge a snapshot."""
    if snapshot.state in (Phase.FAILED, DIED):
        return Health.FAILED
    if snapshot.state in (Phase.FINISHED, Phase.STOPPED):
        return Health.ENDED
    lost = any(process.state in ("exited", "abandoned") for process in snapshot.processes if process.role != "evaluate")
    return Health.DEGRADED if lost and snapshot.state == Phase.TRAINING else Health.RUNNING


def state_of(run_dir: Path) -> RunState:
    """The supervisor's state of a run, from its journal.

    Raises:
        UnavailableError: The directory holds no run.
    """
    state = fold_journal(run_dir)
    if state.started is None:
        raise UnavailableError(f"{run_dir} holds no run: journal/supervisor has no event")
    return state


def _last_event_s(run_dir: Path) -> float:
    records = read_last(run_dir / "journal" / "supervisor")
    return float(records[-1].header["at_s"]) if records else 0.0


def _last_step(run_dir: Path) -> LearnerStepped | None:
    directory = run_dir / "journal" / "learner-0"
    if not directory.is_dir():
        return None
    records = read_last(directory, kinds=("LearnerStepped",))
    return records[-1].header_as(LearnerStepped) if records else None


def _is_held(run_dir: Path) -> bool:
    try:
        exclusive_lock(run_dir / "lock").close()
    except UnavailableError:
        return True
    return False
