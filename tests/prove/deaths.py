"""Runs that die at named points and go on, held against a run of the same seed that nobody disturbed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from esper_simic.events import LearnerStepped, StepFailed
from esper_simic.safety import StepMode
from supervisor import faults, recovery_proof
from supervisor.clock import SystemClock
from supervisor.journal import Record, read
from supervisor.playback import ReplayReport, Request, replay
from supervisor.recovery_proof import Heard
from supervisor.roles.fold import LearnerFold, config_of_journal
from tests.prove.test_lockstep import last_state
from tests.system.driver import Running, running

ROOT = Path(__file__).parents[2]
UNRULY = "tests.prove.unruly:Unruly-v0"
WITHIN_S = 600

STEPS = ("LearnerStepped", "StepFailed")

SETTINGS: dict[str, Any] = {
    "preset": "gym",
    "environment__max_epochs": None,  # the driver's small settings are of growing hosts
    "environment__train_batches": None,
    "environment__environments_per_actor": 8,
    "simic_trainer__batch_size": 8,
    "simic_trainer__unroll_length": 6,
    "simic_trainer__hidden_size": 16,
    "simic_trainer__digest_every_steps": 5,
    "experience_buffer__capacity": 512,
    "experience_buffer__min_experiences": 8,
    "supervisor__num_actors": 2,
    "supervisor__max_seconds": "null",
    "supervisor__restart_backoff_s": 0.1,
    "supervisor__max_restarts": 100,
    "supervisor__recovery_attempts_max": 100,
    "supervisor__checkpoint_interval_steps": 11,
}
"""Of every run here: updates of a few milliseconds, and deaths that nobody counts."""

LOCKSTEP: dict[str, Any] = {"supervisor__lockstep": "true"}


@contextmanager
def dying(
    run_dir: Path, plan: Sequence[str], base: Mapping[str, Any] = SETTINGS, **settings: Any
) -> Iterator[Running]:
    """A run whose processes meet these faults, in their order; it finds the worlds of the tests."""
    notes = run_dir.with_name(f"{run_dir.name}.notes")
    notes.mkdir(exist_ok=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv(faults.FAULTS_VARIABLE, ";".join(plan))
        patch.setenv(faults.DIRECTORY_VARIABLE, str(notes))
        with running(run_dir, evaluation=False, **{**base, **settings}) as run:
            yield run


def fired(run_dir: Path) -> int:
    """How many of a run's faults have fired."""
    return len(list(run_dir.with_name(f"{run_dir.name}.notes").glob("fired-*")))


def whole(
    run_dir: Path,
    plan: Sequence[str] = (),
    *,
    code: int = 0,
    base: Mapping[str, Any] = SETTINGS,
    **settings: Any,
) -> str:
    """A run from its start, or from where it was, to its end; what it said. Each of its faults must have fired."""
    with dying(run_dir, plan, base, **settings) as run:
        assert run.process.wait(WITHIN_S) == code, run.output
        assert fired(run_dir) == len(plan), f"{fired(run_dir)} of {plan} fired"
        return run.output


def records(run_dir: Path, *kinds: str) -> list[Record]:
    """Of the learner's journal, of these kinds or all of them; empty where there is none yet."""
    journal = run_dir / "journal" / "learner-0"
    found = read(journal) if journal.is_dir() else ()
    return [record for record in found if not kinds or record.kind in kinds]


def steps(run_dir: Path) -> list[LearnerStepped | StepFailed]:
    """Every update, made or not."""
    kinds: dict[str, type[LearnerStepped] | type[StepFailed]] = {
        "LearnerStepped": LearnerStepped,
        "StepFailed": StepFailed,
    }
    return [record.header_as(kinds[record.kind]) for record in records(run_dir, *kinds)]


def facts(run_dir: Path) -> list[tuple[int, Any]]:
    """What happened beside updates, each with the number of its update."""
    return [(one.step, fact) for one in steps(run_dir) for fact in one.facts]


def told(run_dir: Path, kind: type) -> list[tuple[int, Any]]:
    """The facts of one kind."""
    return [(step, fact) for step, fact in facts(run_dir) if isinstance(fact, kind)]


def passages(run_dir: Path, after: int, upto: int) -> int:
    """Updates with facts in `(after, upto]`: passages of `learner.facts.…` in a life that makes them."""
    return len({step for step, _ in facts(run_dir) if after < step <= upto})


def failures(run_dir: Path) -> list[StepFailed]:
    """Updates that gave no new weights."""
    return [one for one in steps(run_dir) if isinstance(one, StepFailed)]


def lives(run_dir: Path) -> int:
    """Recoveries of the learner, each exact."""
    found = records(run_dir, "LearnerRecovered")
    assert all(one.header["is_exact"] for one in found)
    return len(found)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def assert_same(straight: Path, killed: Path) -> None:
    """Every update, every verdict on the curriculum, and the state at the end."""
    first, second = ([msgspec.to_builtins(one) for one in steps(run_dir)] for run_dir in (straight, killed))
    assert second == first
    verdicts = [[one.header for one in records(each, "CurriculumJudged")] for each in (straight, killed)]
    assert verdicts[0] == verdicts[1]
    assert last_state(killed) == last_state(straight)
    admissions = recovery_proof.examine(recovery_proof.history(killed), Heard(), lockstep=True)
    assert (admissions.duplicated, admissions.steps_broken) == ([], [])


def assert_replayed(run_dir: Path) -> ReplayReport:
    """What `replay --verify` finds: each update, state and checkpoint is equal."""
    report = replay(Request(run_dir, verify=True), SystemClock())
    assert report.outcome == "equal", report
    assert report.steps == report.steps_by_digest == len(steps(run_dir))
    assert report.steps_failed == len(failures(run_dir))
    assert report.states_equal > 0
    assert report.checkpoints
    assert all(one.is_equal for one in report.checkpoints), report.checkpoints
    assert report.crossings == []
    return report


def folded(run_dir: Path, upto: int | None = None) -> LearnerFold:
    """The learner at the end of its journal, or after one update, folded from the first record."""
    fold = _fold(run_dir)
    for record in records(run_dir):
        fold.take(record)
        if fold.learner.steps_done == upto:
            break
    return fold


def modes(run_dir: Path) -> dict[int, StepMode]:
    """What each update was allowed to be, by its number."""
    fold, found = _fold(run_dir), {}
    for record in records(run_dir):
        if record.kind in STEPS:
            found[record.header["step"]] = fold.learner.mode(record.header["inputs"]["at_s"])
        fold.take(record)
    return found


def _fold(run_dir: Path) -> LearnerFold:
    journal = run_dir / "journal" / "learner-0"
    return LearnerFold(config_of_journal(journal), journal, run_dir / "checkpoints")


def mode_at_the_end(run_dir: Path) -> StepMode:
    """What the next update would be."""
    learner = folded(run_dir).learner
    return learner.mode(learner.lockstep_time_s())


def settings_of(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Settings by section, as the driver takes them."""
    return {f"{section}__{key}": value for section, keys in values.items() for key, value in keys.items()}
