"""Which proofs run: all of them under `make prove`, otherwise one, chosen by the commit, so that all come in turn."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WHOLE = os.environ.get("SIMIC_PROVE") == "1"
HERE = Path(__file__).parent


def turn() -> int:
    """A number that changes with every commit; without git with every day."""
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return int(found, 16) if found else int(time.time() // 86_400)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one proof of this directory, unless all are wanted or the directory was named on the command line."""
    asked = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    named = any(path == HERE or HERE in path.parents for path in asked)
    mine = [item for item in items if HERE in item.path.parents]
    if WHOLE or named or not mine:
        return
    kept = mine[turn() % len(mine)]
    dropped = [item for item in mine if item is not kept]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]
