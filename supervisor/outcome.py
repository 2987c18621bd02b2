"""How a run ended, read from its journal: for the supervisor itself, and for whoever looks later.

Reading does not need the supervisor to be alive, and does not disturb it.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from esper_simic.errors import UnavailableError
from supervisor.events import CheckpointReported, Outcome, PolicyEvaluated, from_journal
from supervisor.journal import read
from supervisor.state import RunState, apply


class RunOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended, and what it has to show."""

    run_id: str
    exit_code: int
    outcome: Outcome
    reason: str
    evaluations: dict[str, PolicyEvaluated]
    checkpoint: CheckpointReported | None


def fold_journal(run_dir: Path) -> RunState:
    """Give the state that a run's supervisor journal tells of; the empty one when there is no journal yet.

    Raises:
        ContractError: The journal is damaged or from another program.
    """
    state = RunState()
    directory = run_dir / "journal" / "supervisor"
    if directory.is_dir():
        for record in read(directory):
            state = apply(state, from_journal(record.kind, record.header))
    return state


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
    )
