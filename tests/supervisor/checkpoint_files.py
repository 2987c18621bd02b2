"""Checkpoints for tests, and a disk that fails at a chosen call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SMALL = {"state.safetensors": b"new"}


def facts(step: int = 7) -> dict[str, Any]:
    return {
        "run_id": "run-1",
        "step": step,
        "environment_steps": 70,
        "journal_position": 12,
        "state_digest": "abc",
        "fingerprint": {"cpu": "x"},
    }


def flip_a_byte(directory: Path) -> None:
    path = directory / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


class Killed(BaseException):
    """Stands for the end of the process: nothing of the product runs any more."""


TOUCHES_THE_DISK = ("mkdir", "open", "fsync", "replace", "rename")


@contextmanager
def fault(at: int, error: Callable[[], BaseException]) -> Iterator[list[str]]:
    """Let the `at`-th call that changes or syncs something fail instead; yields the calls made."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in TOUCHES_THE_DISK:
            real = getattr(os, name)

            def faulty(*arguments: Any, _real: Any = real, _name: str = name, **keywords: Any) -> Any:
                calls.append(_name)
                if len(calls) - 1 == at:
                    raise error()
                return _real(*arguments, **keywords)

            patch.setattr(os, name, faulty)
        yield calls
