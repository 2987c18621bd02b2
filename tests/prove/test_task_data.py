"""A run and its task's data, which another package brings: missing, there, changed, and put back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from supervisor.journal import read
from tests.prove.conftest import WHOLE
from tests.prove.test_every_host import SMALL
from tests.prove.test_lockstep import reach, updates
from tests.system.driver import START_DEADLINE_S, Said, running, say

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

MODULE = """
from __future__ import annotations

import numpy as np

from esper_simic.growing_host.tasks import Task, split_task


def spirals(path: str) -> Task:
    turns, labels = np.load(path), np.arange(200) % 2
    points = np.stack([turns * np.cos(turns + 3 * labels), turns * np.sin(turns + 3 * labels)], axis=1)
    return split_task("spirals", "vector", points[:, :, None, None], labels, axes=0)
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an installed package whose task reads a file."""
    folder = tmp_path / "site"
    facts = folder / "whirl-1.0.dist-info"
    facts.mkdir(parents=True)
    (folder / "whirl_tasks.py").write_text(MODULE)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: whirl\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[esper_simic.tasks]\nspirals = whirl_tasks:spirals\n")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    return folder


def test_a_run_goes_on_with_its_own_data_only(
    site: Path, tmp_path: Path, record_proof: Callable[[str, str], None]
) -> None:
    data, run_dir = site / "turns.npy", tmp_path / "run"
    world = {"environment__task": f"spirals:{data}", "environment__host": "mlp"}
    endless = {**SMALL, **world, "supervisor__max_updates": "null", "supervisor__max_seconds": 300}

    def go_on(until_update: int = 0) -> Said:
        """The same command; asked to stop after so many updates of all its lives."""
        with running(run_dir, evaluation=False, **endless) as run:
            if until_update:
                reach(run, run_dir, until_update)
                run.interrupt()
            return Said(run.process.wait(START_DEADLINE_S), run.output, "")

    if WHOLE:  # a start less in the slice: `tests/system` has a run without its data too
        missing = go_on()
        assert missing.code == 78, missing.out
        assert "actor-0 cannot go on: " in missing.out
        assert "FileNotFoundError" in missing.out
        assert updates(run_dir) == []

    np.save(data, np.linspace(0, 3, 200))
    there = go_on(4)
    assert there.code == 0, there.out
    made = len(updates(run_dir))
    assert made >= 4

    np.save(data, np.linspace(0, 4, 200))
    other = go_on()
    assert other.code == 78, other.out
    assert "the data of environment.task are not those of this run" in other.out
    digests = {
        one.header["data_digest"]
        for one in read(run_dir / "journal" / "supervisor")
        if one.kind == "ChildReady" and one.header["role"] == "actor"
    }
    assert len(digests) == 2

    if WHOLE:
        np.save(data, np.linspace(0, 3, 200))
        back = go_on(made + 2)
        assert back.code == 0, back.out
        # What is replayed are the learner's updates; they are made of experience, for which no data are needed.
        data.unlink()
        said = say("replay", run_dir, "--verify", "--json")
        assert said.code == 0, said.out + said.err
        report = said.json()
        assert report["outcome"] == "equal"
        assert report["steps"] == report["steps_by_digest"] == len(updates(run_dir)) >= made
    record_proof(
        "A run and its data",
        "Without the file of its task a run ended with 78 at its first look; it went on when the file was there, ended "
        "with 78 when the file was another one, and went on when it was put back. Its journal was replayed bit for bit "
        "without any file.",
    )
