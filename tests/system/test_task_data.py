"""A run whose task is not on this machine: refused at the first look at it, not after a day of restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.journal import read
from tests.system.driver import START_DEADLINE_S, running

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]


def test_a_run_without_its_data_is_refused_at_once_with_the_remedy(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    nowhere = tmp_path / "nowhere"
    with running(run_dir, environment__task=f"cifar10:{nowhere}") as run:
        code = run.process.wait(START_DEADLINE_S)
        assert code == 78, run.output
        (reason,) = [line for line in run.output.splitlines() if " failed: actor-0 cannot go on: " in line]
    assert "environment.task: task 'cifar10'" in reason
    # Which of the two is missing depends on the machine.
    assert (
        "pip install torchvision" in reason
        or f"no intact cifar-10-batches-py in the folder '{nowhere}'" in reason
    )
    events = list(read(run_dir / "journal" / "supervisor"))
    started = [
        (one.header["role"], one.header["incarnation"]) for one in events if one.kind == "ChildStarted"
    ]
    assert sorted(started) == [("actor", 1), ("learner", 1)], "nobody is started again"
    assert not [one for one in events if one.kind == "TrainingStarted"]
