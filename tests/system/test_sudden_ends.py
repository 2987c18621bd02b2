"""A supervisor killed without a word, and runs that must not begin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from esper_simic.events import LearnerStepped
from supervisor.journal import read
from supervisor.vitals import Snapshot
from tests.system.driver import alive_after, left_over, run_arguments, running, say

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

ORPHANS_MAX_S = 5.0


class Killed(NamedTuple):
    run_dir: Path
    before: Snapshot
    tree: list[psutil.Process]
    not_gone: list[psutil.Process]
    session_left: list[psutil.Process]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    run_dir = tmp_path_factory.mktemp("killed") / "run"
    with running(run_dir) as run:
        before = run.until_it_learns()
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


def test_the_directory_of_a_run_that_died_is_not_overwritten(killed: Killed) -> None:
    journal = {path: path.stat().st_size for path in (killed.run_dir / "journal").glob("*/*.log")}
    said = say(*run_arguments(killed.run_dir))
    assert said.code == 78
    assert "did not finish" in said.err
    assert {path: path.stat().st_size for path in (killed.run_dir / "journal").glob("*/*.log")} == journal


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
