"""What may change when a run goes on, and what becomes of a directory that holds one already."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args

from esper_simic.config import Config
from esper_simic.errors import ConfigError, UnavailableError
from supervisor.files import exclusive_lock, fsync_directory

RestartBehavior = Literal["resume", "restart", "overwrite"]
"""What to do with a directory that holds a run: go on with it, move it aside, or remove it."""

RESTART_BEHAVIORS: Final[tuple[str, ...]] = get_args(RestartBehavior)

LOCK: Final = "lock"

_REMOVED: Final = ".journal.removed"
_OF_A_LEARNER: Final = re.compile(r"learner-\d+\.\w+")

OWN_NAMES: Final = frozenset(
    {
        *(LOCK, _REMOVED, "journal", "checkpoints", "policies", "tensorboard", "logs", "stacks", "tmp"),
        *("supervisor.json", "supervisor.reserve"),
    }
)
"""What a run puts into its directory, beside the files of its learners."""

CHANGEABLE: Final = "supervisor."
"""Keys of this section say how a run is looked after, not what is computed; they may change between two lives."""

FIXED: Final = frozenset({"supervisor.lockstep"})
FIXED_IN_LOCKSTEP: Final = FIXED | {"supervisor.num_actors"}
"""The exceptions: they decide the order of what is computed."""


def check_resumable(recorded: Mapping[str, Any], given: Config) -> None:
    """Refuse to go on with a run under a configuration that would make another run of it.

    Args:
        recorded: The configuration under which the run began, as its journal has it.
        given: The one it shall go on under.

    Raises:
        ConfigError: Naming every key that differs and must not, with both values and the remedy.
    """
    fixed = FIXED_IN_LOCKSTEP if given.supervisor.lockstep else FIXED
    before, now = dict(_leaves(recorded)), dict(_leaves(given.model_dump(mode="json")))
    differing = [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and key in before
        and not (key.startswith(CHANGEABLE) and key not in fixed)
    ]
    if differing:
        raise ConfigError(
            f"the run was made under another configuration: {'; '.join(differing)}. --resume RUN goes on under the "
            f"run's own; --restart-behavior restart|overwrite begins anew; another --run-dir keeps both"
        )


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def prepare(directory: Path, behavior: RestartBehavior) -> Path | None:
    """Make way for a new run, where that is wanted. What a run did not put there is never touched.

    Args:
        directory: Where the run shall be. Where a run shall make way, there must be one.
        behavior: What to do with a run that is there.

    Returns:
        Where the old run lies now, if it was moved aside.

    Raises:
        ConfigError: It holds something, but no run.
        UnavailableError: A living supervisor holds it, or the disk refused.
    """
    if behavior == "resume":
        return None
    try:
        there = {path.name for path in directory.iterdir()} if directory.exists() else set()
        if not there:
            return None
        if not there & {"journal", _REMOVED} and not all(_is_own(name) for name in there):
            raise ConfigError(f"{directory} does not hold a run; it is left alone. Choose another --run-dir")
        with exclusive_lock(directory / LOCK):
            if behavior == "overwrite":
                _remove_run(directory)
                return None
            return directory.rename(_free_name(directory))
    except OSError as error:
        raise UnavailableError(f"cannot make way in {directory}: {error}") from error


def _remove_run(directory: Path) -> None:
    """The journal goes first and at once: what is left of a removal that was cut short is no run any more."""
    journal = directory / "journal"
    removed = directory / _REMOVED
    if removed.exists():
        shutil.rmtree(removed)
    if journal.exists():
        journal.rename(removed)
        fsync_directory(directory)
    for path in sorted(directory.iterdir()):
        if path.name == LOCK or not _is_own(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_own(name: str) -> bool:
    return name in OWN_NAMES or _OF_A_LEARNER.fullmatch(name) is not None


def _free_name(directory: Path) -> Path:
    number = 1
    while (aside := directory.with_name(f"{directory.name}-old-{number}")).exists():
        number += 1
    return aside
