"""One benchmark, one JSON line.

A line holds the figures, what they were measured for (`context`), and what they depend on: the machine and the
versions. `--record` (or `SIMIC_BENCH_RECORD=1`) also appends it to `bench/results/<name>.jsonl`, so that the same
benchmark before and after a change can be put side by side.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import psutil

RECORD_VARIABLE: Final = "SIMIC_BENCH_RECORD"
RESULTS: Final = Path(__file__).parent / "results"
DISTRIBUTIONS: Final = ("torch", "torch-geometric", "numpy", "pyzmq", "msgspec")


def emit(name: str, figures: Mapping[str, float | int | str], **context: float | int | str) -> None:
    """Print the line of one benchmark and, if asked to, record it.

    Args:
        name: Stable name of the benchmark, usable as a file name.
        figures: What was measured; the unit is the last word of each key (`steps_per_s`, `append_p99_us`).
        **context: What the figures were measured for, such as `environments=64`.
    """
    text = json.dumps(line(name, figures, context), allow_nan=False)
    print(text, flush=True)
    if is_recording():
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def line(name: str, figures: Mapping[str, float | int | str], context: Mapping[str, Any]) -> dict[str, Any]:
    """The line as a mapping, in the order in which it is printed."""
    return {
        "name": name,
        "figures": dict(figures),
        "context": dict(context),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def is_recording() -> bool:
    """Whether `--record` was given to this process or to the one that started it."""
    return "--record" in sys.argv[1:] or os.environ.get(RECORD_VARIABLE, "") not in {"", "0"}


@cache
def machine() -> dict[str, str | int | float]:
    """Processor, cores this process may use, memory, kernel."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
    }


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the figures depend on, read without importing them."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in DISTRIBUTIONS}


@cache
def commit() -> str:
    """The commit measured, `+` when the tree differs from it; empty outside a clone."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _cpu_model() -> str:
    with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        for text in file:
            key, _, value = text.partition(":")
            if key.strip() in {"model name", "Model"}:
                return value.strip()
    return platform.machine()
