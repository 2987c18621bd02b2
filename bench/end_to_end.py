"""The main job as a whole: seconds to the first learner update, environment steps/s, memory.

Starts `simic-supervisor run` on the `digits` preset as a user would, without the evaluation, and reads the figures
from the run's journals: what happened is there, with its times. The rate leaves out the first seconds of training.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import psutil

from bench.report import emit
from supervisor.journal import read

WARM_UP_S: Final = 10.0


def main() -> None:
    """Run once and print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="training time")
    parser.add_argument("--record", action="store_true")
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory(prefix="simic-bench-") as scratch:
        run_dir = Path(scratch) / "run"
        command = [
            str(Path(sys.executable).parent / "simic-supervisor"),
            *("run", "--preset", "digits", "--run-dir", str(run_dir)),
            *("--max-seconds", str(seconds), "--no-evaluation", "--set", "supervisor.metrics_port=null"),
        ]
        began_ns = time.time_ns()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        peak_bytes = _watch(process)
        if process.returncode != 0:
            raise SystemExit(f"the run ended with status {process.returncode}")
        emit(
            "end_to_end", _figures(run_dir, began_ns) | {"peak_memory_bytes": peak_bytes}, training_s=seconds
        )


def _watch(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end; the largest proportional memory of the whole process tree seen on the way, in bytes."""
    peak = 0
    tree = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            members = [tree, *tree.children(recursive=True)]
            peak = max(peak, sum(member.memory_full_info().pss for member in members))
        except psutil.NoSuchProcess:
            pass
        time.sleep(1.0)
    return peak


def _figures(run_dir: Path, began_ns: int) -> dict[str, float]:
    steps = [
        (record.time_ns, int(record.header["environment_steps"]))
        for record in read(run_dir / "journal" / "learner-0")
        if record.kind == "LearnerStepped"
    ]
    first_ns = steps[0][0]
    warm = [(at_ns, count) for at_ns, count in steps if at_ns >= first_ns + WARM_UP_S * 1e9]
    (from_ns, from_count), (to_ns, to_count) = warm[0], warm[-1]
    journal_bytes = sum(path.stat().st_size for path in (run_dir / "journal" / "learner-0").glob("*.log"))
    return {
        "first_update_s": round((first_ns - began_ns) / 1e9, 2),
        "environment_steps_per_s": round((to_count - from_count) / ((to_ns - from_ns) / 1e9), 1),
        "updates_per_s": round((len(warm) - 1) / ((to_ns - from_ns) / 1e9), 2),
        "journal_bytes_per_environment_step": round(journal_bytes / steps[-1][1], 1),
    }


if __name__ == "__main__":
    main()
