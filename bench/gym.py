"""Gymnasium through the whole system: when an environment is solved, and how many environment steps a second are made.

Starts `simic-supervisor run --preset gym` as a user would, once a seed, and reads what happened from its journals. An
environment counts as solved with the first update at which the mean return of the newest 100 training episodes has
reached the threshold; the time is counted from the start of the process. At the end the learned policy is measured on
100 held-out episodes. The rate is that of the last half of the training, journal on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

from bench.report import emit
from supervisor.journal import read

SOLVED: Final = {"CartPole-v1": 475.0, "Acrobot-v1": -100.0}


class Seen(NamedTuple):
    """One update: seconds since the process was started, environment steps admitted, mean return or None."""

    at_s: float
    environment_steps: int
    episodic_return: float | None


def main() -> None:
    """Run every seed and print one line each, then one for all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--id", default="CartPole-v1", help="a Gymnasium id")
    parser.add_argument("--seconds", type=float, default=20.0, help="training time of each run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threshold", type=float, help="mean return that counts as solved")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="further settings")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    threshold = SOLVED.get(options.id) if options.threshold is None else options.threshold
    if threshold is None:
        parser.error(f"name a --threshold for {options.id}")
    solved = 0
    for seed in range(options.seeds):
        figures = _run(options.id, seed, options.seconds, threshold, options.set)
        solved += figures["held_out_return_mean"] >= threshold
        emit(
            "gym",
            figures,
            id=options.id,
            seed=seed,
            training_s=options.seconds,
            settings=" ".join(options.set),
        )
    print(
        f"{solved} of {options.seeds} seeds: mean held-out return of at least {threshold:g}", file=sys.stderr
    )


def _run(identity: str, seed: int, seconds: float, threshold: float, settings: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="simic-bench-") as scratch:
        run_dir = Path(scratch) / "run"
        assignments = [f"environment.id={identity}", "supervisor.metrics_port=null", *settings]
        command = [
            *(sys.executable, "-m", "supervisor.cli", "run", "--preset", "gym", "--run-dir", str(run_dir)),
            *("--seed", str(seed), "--max-seconds", str(seconds)),
            *(part for assignment in assignments for part in ("--set", assignment)),
        ]
        began_ns = time.time_ns()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        return _figures(run_dir, began_ns, threshold)


def _figures(run_dir: Path, began_ns: int, threshold: float) -> dict[str, float]:
    seen = [
        Seen(
            (record.time_ns - began_ns) / 1e9,
            int(record.header["environment_steps"]),
            record.header["metrics"].get("episodic_return"),
        )
        for record in read(run_dir / "journal" / "learner-0")
        if record.kind == "LearnerStepped"
    ]
    learned = next(
        record.header["summary"]
        for record in read(run_dir / "journal" / "supervisor")
        if record.kind == "PolicyEvaluated" and record.header["policy"] == "learned"
    )
    half = seen[len(seen) // 2 :]
    rate = (half[-1].environment_steps - half[0].environment_steps) / (half[-1].at_s - half[0].at_s)
    figures = {
        "environment_steps_per_s": round(rate),
        "environment_steps": seen[-1].environment_steps,
        "first_update_s": round(seen[0].at_s, 1),
        "held_out_return_mean": round(learned["return_mean"], 1),
    }
    solved = next((one for one in seen if (one.episodic_return or -1e9) >= threshold), None)
    if solved is not None:
        figures |= {
            "solved_after_s": round(solved.at_s, 1),
            "solved_after_environment_steps": solved.environment_steps,
        }
    return figures


if __name__ == "__main__":
    main()
