"""A long asynchronous run with four actors, made again from its journal."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.prove.conftest import WHOLE
from tests.system.driver import COMMAND, say

pytestmark = [pytest.mark.processes, pytest.mark.timeout(1800)]

SECONDS = 300 if WHOLE else 30


def test_an_asynchronous_run_with_four_actors_is_replayed_exactly(
    tmp_path: Path, record_proof: Callable[[str, str], None]
) -> None:
    run_dir = tmp_path / "run"
    limits = [
        "--max-seconds",
        str(SECONDS),
        "--set=supervisor.num_actors=4",
        "--set=supervisor.metrics_port=null",
    ]
    made = subprocess.run(
        [COMMAND, "run", "--run-dir", run_dir, "--no-evaluation", *limits],
        capture_output=True,
        text=True,
        timeout=SECONDS + 200,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    said = say("replay", run_dir, "--json", within_s=900)
    assert said.code == 0, said.err
    report = said.json()
    assert report["outcome"] == "equal"
    assert report["steps"] == report["steps_by_digest"] > 20
    record_proof(
        f"Replay of an asynchronous run of {SECONDS} s with four actors on the digits preset",
        f"{report['steps']:,} updates and {report['states_equal']} whole states equal; {report['seconds']:.1f} s, "
        f"{report['times_as_fast']:.1f} times as fast as the run.",
    )
