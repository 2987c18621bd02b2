"""The power is cut under the journal's writer: every record that was promised is there afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.powercut import UNSYNCED, Cut

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
CUTS = 20 if os.environ.get("SIMIC_PROVE") == "1" else 3


def lacking() -> str:
    """What this machine lacks for cutting its own power; empty when nothing."""
    if os.geteuid() != 0:
        return "root"
    for tool in ("unshare", "mkfs.ext4", "mount", "umount"):
        if shutil.which(tool) is None:
            return f"the program {tool}"
    if not Path("/dev/loop-control").exists():
        return "loop devices"
    if "ext4" not in Path("/proc/filesystems").read_text("utf-8"):
        return "ext4"
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True, check=False)
    return "mounts of its own (" + probe.stderr.strip() + ")" if probe.returncode else ""


@pytest.fixture(autouse=True)
def able() -> None:
    if lack := lacking():
        pytest.skip(f"POWER CUTS ARE NOT TESTED HERE: this machine lacks {lack}")


def cut_power(scratch: Path, count: int, *options: str) -> list[Cut]:
    command = [sys.executable, "-m", "tests.system.powercut", "cut", str(scratch), str(count), *options]
    done = subprocess.run(["unshare", "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cuts = [Cut(*map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(cuts) == count
    return cuts


def test_what_was_promised_survives_a_power_cut(
    tmp_path: Path, record_proof: Callable[[str, str], None]
) -> None:
    cuts = cut_power(tmp_path, CUTS)
    lost = [cut for cut in cuts if cut.found < cut.promised]
    promised, found = sum(cut.promised for cut in cuts), sum(cut.found for cut in cuts)
    record_proof(
        f"{CUTS} power cuts under the journal's writer",
        f"{CUTS - len(lost)} of {CUTS} without loss; {promised:,} records promised, {found:,} found.",
    )
    assert lost == []
    assert min(cut.promised for cut in cuts) > 0
    assert max(cut.segments for cut in cuts) > 1, "cuts must meet new segments too"


def test_the_cut_takes_what_was_not_synced(tmp_path: Path) -> None:
    """The control: a writer that believes in the page cache breaks its promises."""
    (cut,) = cut_power(tmp_path, 1, UNSYNCED)
    assert cut.found < cut.promised
