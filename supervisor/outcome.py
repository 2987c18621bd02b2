"""How a run ended, read from its journal: for the supervisor itself, and for whoever looks later.

Reading does not need the supervisor to be alive, and does not disturb it.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from esper_simic.errors import ConfigError, ContractError, UnavailableError
from supervisor.events import RELENTED, CheckpointReported, Outcome, PolicyEvaluated, from_journal
from supervisor.journal import JournalDamage, read
from supervisor.journal.format import SegmentCursor, segment_paths
from supervisor.state import Phase, RunState, apply


class RunOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended, and what it has to show.

    `needs_order`: it goes on only where an operator orders it (`run --resume RUN --train-on`).
    """

    run_id: str
    exit_code: int
    outcome: Outcome
    reason: str
    evaluations: dict[str, PolicyEvaluated]
    checkpoint: CheckpointReported | None
    needs_order: bool = False


def fold_journal(run_dir: Path) -> RunState:
    """Give the state that a run's supervisor journal tells of; the empty one when there is no journal yet.

    Raises:
        ContractError: The journal is from another program.
        JournalDamage: It is damaged.
    """
    state = RunState()
    directory = run_dir / "journal" / "supervisor"
    if directory.is_dir():
        for record in read(directory):
            state = apply(state, from_journal(record.kind, record.header))
    return state


def past_of(run_dir: Path) -> RunState:
    """The state in which a run was left, for a supervisor that goes on with it.

    Raises:
        ConfigError: Its journal is damaged or from another program: only a person can decide what to do.
    """
    try:
        return fold_journal(run_dir)
    except (ContractError, JournalDamage) as error:
        raise ConfigError(
            f"{error}. The run cannot go on: restore {run_dir / 'journal' / 'supervisor'} from a copy, use the version "
            f"that wrote it, or begin anew in another --run-dir"
        ) from error


def run_id_of(run_dir: Path) -> str | None:
    """The run whose journal a directory holds, even if its supervisor died before the first event; None without one.

    Raises:
        JournalDamage: The journal's first bytes are not what was written.
    """
    directory = run_dir / "journal" / "supervisor"
    paths = segment_paths(directory) if directory.is_dir() else []
    if not paths:
        return None
    with SegmentCursor(paths[0]) as cursor:
        return cursor.header.run_id


def outcome_of(state: RunState) -> RunOutcome:
    """Give the outcome of a state whose run is over.

    Raises:
        UnavailableError: It is not over.
    """
    if state.finished is None:
        raise UnavailableError(f"the run is not over: {state.phase}")
    return RunOutcome(
        run_id=state.started.run_id if state.started else "",
        exit_code=state.finished.exit_code,
        outcome=state.finished.outcome,
        reason=state.finished.reason,
        evaluations=state.evaluations,
        checkpoint=state.checkpoint,
        needs_order=needs_order(state),
    )


def needs_order(state: RunState) -> bool:
    """Whether going on with a run would lead nowhere unless an operator orders its training to go on.

    That is so of a training that halted itself, and of a finished run whose training met its timeout: one that was not
    measured to its end goes on with that.
    """
    ended = state.training_ended.reason if state.training_ended is not None else None
    return ended in RELENTED and (ended == "halted" or state.phase is Phase.FINISHED)
