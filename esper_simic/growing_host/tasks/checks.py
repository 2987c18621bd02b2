"""What a loader may hand over. A wrong array would train hosts for hours on nonsense, so all of it is looked at."""

from __future__ import annotations

from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from esper_simic.config_environment import KINDS, Kind
from esper_simic.errors import ContractError
from esper_simic.growing_host.tasks.task import ARRAYS, Task

ONES: Final[dict[Kind, tuple[int, ...]]] = {"image": (), "series": (2,), "vector": (2, 3), "tokens": ()}
"""Axes of the inputs that must be 1 long."""


def check_task(name: str, task: object) -> Task:
    """The task itself, if it keeps the contract of `Task`.

    Args:
        name: The name that was asked for, without parameters.
        task: What its loader returned.

    Raises:
        ContractError: It does not; names the task, the field, what it is and what it must be.
    """
    if not isinstance(task, Task):
        raise ContractError(f"task {name!r}: its loader returned a {type(task).__name__}, not a Task")
    _check_facts(name, task)
    for part in ("train", "validation"):
        _check_samples(name, task, part)
    if task.train_inputs.shape[1:] != task.validation_inputs.shape[1:]:
        raise _broken(
            name,
            "validation_inputs",
            f"has samples of shape {task.validation_inputs.shape[1:]}, train_inputs of {task.train_inputs.shape[1:]}",
        )
    return task


def _check_facts(name: str, task: Task) -> None:
    # Whoever wrote the loader may not have had a type checker, so nothing is taken for granted here.
    bears, classes, kind = (cast("object", fact) for fact in (task.name, task.classes, task.kind))
    if not isinstance(bears, str) or bears.partition(":")[0] != name:
        raise _broken(name, "name", f"is {bears!r}; a task bears the name it is loaded by")
    if not isinstance(classes, int) or classes < 2:
        raise _broken(name, "classes", f"is {classes!r}; it must be an int of at least 2")
    if kind not in KINDS:
        raise _broken(name, "kind", f"is {kind!r}; it must be one of {', '.join(KINDS)}")
    for field in ARRAYS:
        if not isinstance(getattr(task, field), np.ndarray):
            raise _broken(name, field, f"is a {type(getattr(task, field)).__name__}, not a NumPy array")


def _check_samples(name: str, task: Task, part: str) -> None:
    inputs: NDArray[Any] = getattr(task, f"{part}_inputs")
    labels: NDArray[Any] = getattr(task, f"{part}_labels")
    tokens = task.kind == "tokens"
    _check_dtype(name, f"{part}_inputs", inputs, np.dtype(np.int64 if tokens else np.float32))
    _check_dtype(name, f"{part}_labels", labels, np.dtype(np.int64))
    _check_shape(name, f"{part}_inputs", inputs, task.kind)
    wanted = inputs.shape if tokens else inputs.shape[:1]
    if labels.shape != wanted:
        raise _broken(name, f"{part}_labels", f"has shape {labels.shape}; its inputs ask for {wanted}")
    _check_range(name, f"{part}_labels", labels, task.classes)
    if tokens:
        _check_range(name, f"{part}_inputs", inputs, task.classes)
    # A sum is not finite where a number is not; it needs no array of its own.
    elif not np.isfinite(inputs.sum(dtype=np.float64)):
        raise _broken(name, f"{part}_inputs", "has numbers that are not finite")


def _check_dtype(name: str, field: str, array: NDArray[Any], wanted: np.dtype[Any]) -> None:
    if array.dtype != wanted:
        raise _broken(name, field, f"is {array.dtype}; it must be {wanted}")


def _check_shape(name: str, field: str, inputs: NDArray[Any], kind: Kind) -> None:
    wanted = {"tokens": "[N, L]", "series": "[N, C, 1, W]", "vector": "[N, C, 1, 1]"}.get(
        kind, "[N, C, H, W]"
    )
    fits = inputs.ndim == (2 if kind == "tokens" else 4) and all(
        inputs.shape[axis] == 1 for axis in ONES[kind]
    )
    if not fits or 0 in inputs.shape[1:]:
        raise _broken(name, field, f"has shape {inputs.shape}; for kind {kind!r} it must be {wanted}")
    if not len(inputs):
        raise _broken(name, field, "holds no sample")


def _check_range(name: str, field: str, array: NDArray[Any], classes: int) -> None:
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= classes:
        raise _broken(
            name, field, f"reaches from {low} to {high}; with {classes} classes it must lie in [0, {classes})"
        )


def _broken(name: str, field: str, problem: str) -> ContractError:
    return ContractError(f"task {name!r}: {field} {problem}")
