"""Run the benchmarks: `python -m bench [NAME …] [--record]`, each in a process of its own.

Processes keep one benchmark's memory, threads and warm caches out of the next one's figures. The exit status is 1 if
one of them failed; the others still run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from bench.report import RECORD_VARIABLE

HERE = Path(__file__).parent
NOT_BENCHMARKS = {"__init__", "__main__", "compare_runs", "comparison_tables", "report"}


def names() -> list[str]:
    """Every benchmark there is, in alphabetical order."""
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem not in NOT_BENCHMARKS)


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Run benchmarks, one JSON line each."
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of: {', '.join(names())} (all of them if none)"
    )
    parser.add_argument("--record", action="store_true", help="append each line to bench/results/NAME.jsonl")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(names()))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are: {', '.join(names())}")
    environment = dict(os.environ)
    if options.record:
        environment[RECORD_VARIABLE] = "1"
    failed = []
    for name in options.names or names():
        done = subprocess.run(
            [sys.executable, "-m", f"bench.{name}"], cwd=HERE.parent, env=environment, check=False
        )
        if done.returncode != 0:
            failed.append(name)
            print(f"bench.{name} ended with status {done.returncode}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
