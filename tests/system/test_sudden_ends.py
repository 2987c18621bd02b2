"""A supervisor killed without a word, what comes back damaged, and runs that must not begin."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from esper_simic.events import CheckpointSaved, LearnerRecovered, LearnerStepped
from supervisor.journal import Record, read
from supervisor.vitals import Snapshot
from tests.system.driver import (
    START_DEADLINE_S,
    Said,
    alive_after,
    left_over,
    run_arguments,
    running,
    say,
)

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

ORPHANS_MAX_S = 5.0

COMMAND = {"supervisor__checkpoint_interval_steps": 4}
CHECKPOINTS = 3


class Killed(NamedTuple):
    run_dir: Path
    before: Snapshot
    tree: list[psutil.Process]
    not_gone: list[psutil.Process]
    session_left: list[psutil.Process]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    run_dir = tmp_path_factory.mktemp("killed") / "run"
    with running(run_dir, **COMMAND) as run:
        run.until_it_learns()
        before = run.until(
            lambda shot: shot.learner.metrics.get("checkpoint.step", 0.0) >= 4 * CHECKPOINTS, "checkpoints"
        )
        tree = run.tree()
        run.process.kill()
        not_gone = alive_after(tree, ORPHANS_MAX_S)
        yield Killed(run_dir, before, tree, not_gone, left_over(run.process.pid))


def test_kill_nine_of_the_supervisor_leaves_no_orphan(killed: Killed) -> None:
    assert len(killed.tree) >= 5, "supervisor, learner, actor, fork server, resource tracker"
    assert killed.not_gone == []
    assert killed.session_left == []


def test_what_was_journaled_is_whole(killed: Killed) -> None:
    said = say("log", "verify", killed.run_dir)
    assert said.code == 0, said.out
    assert said.out.count(": sound") == 2, "a torn tail is no damage"
    stepped = [r for r in read(killed.run_dir / "journal" / "learner-0") if r.kind == "LearnerStepped"]
    assert len(stepped) >= 1
    steps = [record.header_as(LearnerStepped).step for record in stepped]
    assert steps == list(range(1, len(steps) + 1))


def test_status_says_that_it_died(killed: Killed) -> None:
    said = say("status", killed.run_dir, "--json")
    assert said.code == 1, said.err
    shown = said.json()
    assert shown["state"] == "died"
    assert shown["environment"]["steps"] >= killed.before.environment.steps - 4 * 10 * 2, (
        "but for what was in flight"
    )
    assert all(view["pid"] == 0 for view in shown["processes"])
    page = say("status", killed.run_dir)
    assert page.code == 1
    assert "died" in page.out
    assert say("is-healthy", killed.run_dir).code == 1


def test_a_run_that_died_is_neither_mixed_up_with_another_nor_overwritten_unasked(killed: Killed) -> None:
    journal = {path: path.stat().st_size for path in (killed.run_dir / "journal").glob("*/*.log")}
    said = say(*run_arguments(killed.run_dir, simic_trainer__seed=8))
    assert said.code == 78
    assert "simic_trainer.seed was 0, now 8" in said.err
    assert "--restart-behavior restart|overwrite" in said.err
    assert len(said.err.splitlines()) == 1
    assert {path: path.stat().st_size for path in (killed.run_dir / "journal").glob("*/*.log")} == journal


# -- what comes back damaged -------------------------------------------------------------------------------------------


@pytest.fixture
def copy(killed: Killed, tmp_path: Path) -> Path:
    """The killed run, moved to another place, for one test to spoil."""
    return Path(shutil.copytree(killed.run_dir, tmp_path / "copy"))


def learner_records(run_dir: Path, kind: str) -> list[Record]:
    return [record for record in read(run_dir / "journal" / "learner-0") if record.kind == kind]


def go_on(run_dir: Path) -> Said:
    """The same command, to its end."""
    with running(run_dir, **COMMAND, supervisor__max_steps=40, evaluation=False) as run:
        code = run.process.wait(START_DEADLINE_S)
        return Said(code, run.output, "")


def test_a_truncated_checkpoint_is_passed_over_for_the_one_before_and_that_is_said(copy: Path) -> None:
    names = [r.header_as(CheckpointSaved).directory for r in learner_records(copy, "CheckpointSaved")]
    newest, before = names[-1], names[-2]
    state = copy / "checkpoints" / newest / "state.safetensors"
    with state.open("r+b") as file:
        file.truncate(state.stat().st_size // 2)
    said = go_on(copy)
    assert said.code == 0, said.out
    (recovered,) = [r.header_as(LearnerRecovered) for r in learner_records(copy, "LearnerRecovered")]
    assert recovered.checkpoint == before
    assert set(recovered.passed_over) == {newest}
    assert "state.safetensors has " in recovered.passed_over[newest]
    assert recovered.is_exact
    assert recovered.steps_redone >= 1
    steps = [r.header_as(LearnerStepped).step for r in learner_records(copy, "LearnerStepped")]
    assert steps == list(range(1, len(steps) + 1))
    assert (copy / "checkpoints" / f"bad-{newest}").is_dir(), "for a person to look at"


def test_a_corrupt_byte_that_is_needed_ends_the_run_with_78_and_names_the_place(copy: Path) -> None:
    record = learner_records(copy, "ExperienceAdmitted")[-3]
    frame = max(record.frames, key=len)
    (segment,) = (copy / "journal" / "learner-0").glob("*.log")
    data = bytearray(segment.read_bytes())
    offset = data.rindex(frame)
    data[offset + len(frame) // 2] ^= 0x20
    segment.write_bytes(data)
    said = go_on(copy)
    assert said.code == 78, said.out
    (reason,) = [line for line in said.out.splitlines() if " failed: learner-0 cannot go on: " in line]
    named = re.search(rf"{segment.name} is damaged at byte (\d+)", reason)
    assert named is not None, reason
    assert 0 < offset - int(named[1]) < len(data) // 2, "where the damaged record begins"
    assert "restore " in reason, "the remedy"
    starts = [r.header for r in read(copy / "journal" / "supervisor") if r.kind == "ChildStarted"]
    assert [h["incarnation"] for h in starts if h["role"] == "learner"] == [1, 2], "not tried again"
    shown = say("status", copy, "--json")
    assert shown.code == 1, shown.err
    assert (shown.json()["state"], segment.name in shown.json()["reason"]) == ("failed", True)
    assert say("log", "verify", copy, "--owner", "learner-0").code == 1


def test_a_lock_that_cannot_be_taken_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "run" / "lock").mkdir(parents=True)
    said = say(*run_arguments(tmp_path / "run"))
    assert said.code == 1
    assert said.err.startswith(f"simic-supervisor: cannot take the run directory {tmp_path / 'run'}: ")
    assert len(said.err.splitlines()) == 1


# -- what must not begin -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("simic_trainer.batchsize=8", ["simic_trainer.batchsize", "did you mean 'batch_size'?"]),
        ("simic_trainer.batch_size=48", ["simic_trainer.batch_size", "power of two", "32 or 64"]),
    ],
)
def test_a_configuration_that_cannot_be_obeyed_starts_nothing(
    tmp_path: Path, assignment: str, words: list[str]
) -> None:
    said = say("run", "--run-dir", tmp_path / "run", "--set", assignment)
    assert said.code == 78
    assert all(word in said.err for word in words), said.err
    assert len(said.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()
