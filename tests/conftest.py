"""What every test relies on: one thread, unhurried laws, and no process left behind.

The test process is made a *subreaper*: a process whose parent died is handed to it instead of to init. So the check
after a test marked `processes` sees children, grandchildren and orphans alike.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported anywhere: results are compared bit for bit, and tests run beside each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# What is compared bit for bit is the CPU's. What only a GPU can show is asked for: SIMIC_TEST_GPU=1 pytest -k gpu.
if not os.environ.get("SIMIC_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Cores are shared here, so a law has no deadline; a failure prints the blob that repeats it anywhere.
settings.register_profile(
    "default", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

LEFTOVER_DEADLINE_S = 10.0
PR_SET_CHILD_SUBREAPER = 36


def pytest_configure() -> None:
    """Become the subreaper of whatever the tests start."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@pytest.fixture(autouse=True)
def no_process_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test marked `processes` that leaves any process behind; end what it left."""
    if request.node.get_closest_marker("processes") is None:
        yield
        return
    before = set(_descendants())
    yield
    helpers = _own_helpers()
    started = [process for process in _descendants() if process not in before and process.pid not in helpers]
    _, left = psutil.wait_procs(started, timeout=LEFTOVER_DEADLINE_S)
    lines = [_describe(process) for process in left]
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=LEFTOVER_DEADLINE_S)
    if lines:
        pytest.fail(f"processes left {LEFTOVER_DEADLINE_S:g} s after the test:\n" + "\n".join(lines))


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _own_helpers() -> set[int | None]:
    """This very process's fork server and resource tracker, which Python keeps and ends with it.

    By identity, not by command line: an orphaned helper of some other process is a process left behind.
    """
    server = getattr(forkserver, "_forkserver", None)
    tracker = getattr(resource_tracker, "_resource_tracker", None)
    return {getattr(server, "_forkserver_pid", None), getattr(tracker, "_pid", None)}


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} ({process.status()}): {' '.join(process.cmdline())}"
    except psutil.NoSuchProcess:
        return f"{process.pid} (gone meanwhile)"


@pytest.fixture
def record_proof() -> Callable[[str, str], None]:
    """Write a section of the proofs' report (`make prove`); nothing in other runs."""

    def write(title: str, text: str) -> None:
        out = os.environ.get("SIMIC_PROVE_OUT")
        if out:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            with Path(out).open("a", encoding="utf-8") as file:
                file.write(f"### {title}\n\n{text}\n\n")

    return write
