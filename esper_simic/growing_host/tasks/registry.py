"""Tasks by name: those of this package, those of other packages, and those that a process registers for itself.

Another package brings a task by an entry point of the group `esper_simic.tasks`, whose name is the task's name and
whose object is a loader; every process of a run finds it. `register_task` is for library use: only the process that
calls it knows the task. How to write one: `docs/tasks.md`.

What stands behind a colon in a name is handed to the loader as its one argument: `synthetic:1x8x8` calls
`synthetic("1x8x8")`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from importlib import metadata
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from esper_simic.config_environment import REGISTERED_TASKS, TASK_GROUP, TASK_NAMES, task_names
from esper_simic.errors import ConfigError, ContractError, UnavailableError
from esper_simic.growing_host.tasks.characters import characters
from esper_simic.growing_host.tasks.checks import check_task
from esper_simic.growing_host.tasks.cifar10 import cifar10
from esper_simic.growing_host.tasks.mnist1d import mnist1d
from esper_simic.growing_host.tasks.synthetic import synthetic
from esper_simic.growing_host.tasks.tables import breast_cancer, digits, digits32, wine
from esper_simic.growing_host.tasks.task import Task

KEY: Final = "environment.task"

Loader = Callable[..., Task]
"""Called without an argument, or with what stands behind the colon of the name."""

BUILT_IN: Final[dict[str, Loader]] = {
    "digits": digits,
    "digits32": digits32,
    "wine": wine,
    "breast_cancer": breast_cancer,
    "mnist1d": mnist1d,
    "characters": characters,
    "synthetic": synthetic,
    "cifar10": cifar10,
}

_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,63}")


def register_task(name: str, loader: Loader) -> None:
    """Make a task known to this process, and to it alone.

    Args:
        name: Lower-case letters, digits, `_` and `-`, at most 64; no other task's name.
        loader: Returns the `Task`, whose name is this one; called once.

    Raises:
        ConfigError: A name of another form, or one that is taken.
    """
    _check_name(name, "register_task")
    if name in task_names():
        raise ConfigError(f"there is a task {name!r} already; choose another name", KEY)
    REGISTERED_TASKS[name] = loader


@functools.cache
def load_task(name: str) -> Task:
    """The task of this name, loaded and checked once a process; its arrays are read-only.

    Raises:
        ConfigError: No task has this name, two have it, its parameters do not fit, what it needs is not on this
            machine, or its loader returned something that is no proper task. None of this mends itself: a process of
            a run that meets it ends the run.
    """
    base, colon, parameters = name.partition(":")
    loader, arguments = _loader(base), (parameters,) if colon else ()
    _check_arguments(name, loader, arguments)
    task = _checked(name, loader, arguments)
    return dataclasses.replace(
        task,
        train_inputs=_kept(task.train_inputs),
        train_labels=_kept(task.train_labels),
        validation_inputs=_kept(task.validation_inputs),
        validation_labels=_kept(task.validation_labels),
    )


def _checked(name: str, loader: Loader, arguments: tuple[str, ...]) -> Task:
    """What the loader returns, if it is a proper task."""
    try:
        return check_task(name.partition(":")[0], loader(*arguments))
    except (ContractError, UnavailableError) as error:
        raise ConfigError(str(error), KEY) from error
    except (ImportError, OSError) as error:  # loaders of other packages need not know of our errors
        raise ConfigError(f"task {name!r} cannot be loaded: {type(error).__name__}: {error}", KEY) from error


def _loader(name: str) -> Loader:
    if name in TASK_NAMES:  # nobody can take the place of these, so installed packages need not be searched
        return BUILT_IN[name]
    if name in REGISTERED_TASKS:
        return REGISTERED_TASKS[name]
    entry = _entry_points().get(name)
    if entry is None:
        raise ConfigError(f"unknown task {name!r}; known: {', '.join(task_names())}", KEY)
    try:
        loader = entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"task {name!r}: {_origin(entry)} cannot be loaded: {error}", KEY) from error
    if not callable(loader):
        raise ConfigError(f"task {name!r}: {_origin(entry)} is a {type(loader).__name__}, not a loader", KEY)
    return cast("Loader", loader)


def _check_arguments(name: str, loader: Loader, arguments: tuple[str, ...]) -> None:
    try:
        signature = inspect.signature(loader)
    except ValueError:  # written in C, it tells nothing of its arguments; the call will
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        wants = "no parameters behind its name" if arguments else "parameters behind its name, after a colon"
        raise ConfigError(f"task {name.partition(':')[0]!r} takes {wants} (given: {name!r})", KEY) from None


def _entry_points() -> dict[str, metadata.EntryPoint]:
    """The tasks of installed packages, by name.

    Raises:
        ConfigError: A name of another form, a built-in task's, or one that two packages claim.
    """
    found: dict[str, metadata.EntryPoint] = {}
    for entry in metadata.entry_points(group=TASK_GROUP):
        _check_name(entry.name, _origin(entry))
        if entry.name in TASK_NAMES:
            raise ConfigError(f"{_origin(entry)} takes the name of the built-in task {entry.name!r}", KEY)
        if entry.name in found:
            raise ConfigError(
                f"two tasks are named {entry.name!r}: {_origin(found[entry.name])} and {_origin(entry)}; "
                f"uninstall one of the packages",
                KEY,
            )
        found[entry.name] = entry
    return found


def _origin(entry: metadata.EntryPoint) -> str:
    package = entry.dist.name if entry.dist is not None else "an unnamed package"
    return f"entry point {entry.name!r} of {package} ({entry.value})"


def _check_name(name: str, whose: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{whose}: {name!r} is no name for a task; take lower-case letters, digits, _ and -, a letter first, "
            f"at most 64",
            KEY,
        )


def _kept(array: NDArray[Any]) -> NDArray[Any]:
    """The array, contiguous and read-only; a copy where somebody could write to it through another one."""
    own = np.ascontiguousarray(array)
    if own.base is not None:
        own = own.copy()
    own.setflags(write=False)
    return own
