"""The command line, called in this process: what it prints and the exit status it leaves, through `main()` itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from supervisor import cli


class Said(NamedTuple):
    code: int
    out: str
    err: str


Door = Callable[..., Said]


def open_door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cwd: Path) -> Door:
    """The command line in an empty working directory."""
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: str | Path) -> Said:
        # Whoever tests on this machine at the same time has the same port.
        unserved = ["--set", "supervisor.metrics_port=null"] if arguments[:1] == ("run",) else []
        monkeypatch.setattr(sys, "argv", ["simic-supervisor", *map(str, arguments), *unserved])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        assert "Traceback" not in captured.err
        return Said(ended.value.code, captured.out, captured.err)

    return call
