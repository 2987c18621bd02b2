"""The unit files: accepted by the service manager without a word."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = sorted((Path(__file__).parents[2] / "systemd").glob("*.service"))


def verify(unit: Path) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed: the unit files were NOT verified")
    command = [tool, "verify", str(unit)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def as_if_installed(unit: Path, directory: Path, change: tuple[str, str] = ("", "")) -> Path:
    """A copy whose program exists on this machine: `verify` asks for that, and for nothing else of it."""
    text = unit.read_text(encoding="utf-8").replace("/opt/simic/bin/simic-supervisor", "/bin/true")
    copy = directory / unit.name
    copy.write_text(text.replace(*change) if change[0] else text, encoding="utf-8")
    return copy


def test_there_is_a_unit_for_the_supervisor() -> None:
    assert [unit.name for unit in UNITS] == ["simic-supervisor.service"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_service_manager_accepts_the_unit_without_a_word(unit: Path, tmp_path: Path) -> None:
    result = verify(as_if_installed(unit, tmp_path))
    # An unknown key alone only prints a line and still exits 0, so any word counts.
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    "change",
    [("WatchdogSec=", "WatchDogSecs="), ("KillMode=mixed", "KillMode=gentle"), ("Type=notify", "Type=x")],
)
def test_a_mistake_in_the_unit_would_be_noticed(change: tuple[str, str], tmp_path: Path) -> None:
    assert verify(as_if_installed(UNITS[0], tmp_path, change)).stderr != ""


def test_the_unit_waits_for_readiness_watches_and_never_restarts_a_bad_configuration() -> None:
    lines = set(UNITS[0].read_text(encoding="utf-8").splitlines())
    expected = {"Type=notify", "NotifyAccess=main", "KillMode=mixed", "RestartPreventExitStatus=78"}
    assert expected <= lines
    assert any(line.startswith("WatchdogSec=") for line in lines)
    assert not any(line.startswith("MemoryDenyWriteExecute=") for line in lines), "torch needs it"
