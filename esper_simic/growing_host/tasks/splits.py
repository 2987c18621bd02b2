"""How samples are split and scaled: by fixed streams, stratified, every prefix of the held-out samples balanced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from esper_simic import seeding
from esper_simic.config_environment import Kind
from esper_simic.growing_host.tasks.task import Task

VALIDATION_SHARE: Final = 0.25
"""Share of each class that is held out."""


def stratified_split(
    labels: NDArray[np.int64], share: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split sample indices so that each class keeps its share.

    Args:
        labels: `[N]` int64.
        share: Share of each class that is held out, in (0, 1).
        rng: Source of the shuffle.

    Returns:
        Indices of the training samples, ascending, and of the held-out samples, classes taken in turn.
    """
    held_out = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held_out.append(members[: round(share * len(members))])
    picked = in_turns(held_out)
    return np.setdiff1d(np.arange(len(labels)), picked), picked


def in_turns(groups: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The members of all groups: the first of each, then the second of each, and so on while there are any.

    So in any prefix two groups differ by at most one member until the smallest is used up.
    """
    ranks = np.concatenate([np.arange(len(group)) for group in groups])
    return np.concatenate(groups)[np.argsort(ranks, kind="stable")]


def split_task(
    name: str,
    kind: Kind,
    inputs: NDArray[np.float64],
    labels: NDArray[np.integer[Any]],
    *,
    axes: int | tuple[int, ...] | None = None,
    stream: str | None = None,
) -> Task:
    """A task of these samples: split, and standardised by the training samples.

    Args:
        name: Its name.
        kind: `image`, `series` or `vector`.
        inputs: `[N, C, H, W]` float64; what is computed in float64 and rounded once is the same on any machine.
        labels: `[N]` in [0, classes), each class at least once.
        axes: Axes over which one mean and one deviation are taken; all by default. (0, 2, 3) scales each channel alone.
        stream: Name of the stream that splits; the task's own by default. Tasks that share it share their split.
    """
    targets: NDArray[np.int64] = labels.astype(np.int64)
    rng = seeding.generator("task", stream or name, "split")
    train, validation = stratified_split(targets, VALIDATION_SHARE, rng)
    mean = inputs[train].mean(axis=axes, keepdims=True)
    deviation = inputs[train].std(axis=axes, keepdims=True)
    scaled = ((inputs - mean) / deviation).astype(np.float32)
    classes = int(targets.max()) + 1
    return Task(name, classes, kind, scaled[train], targets[train], scaled[validation], targets[validation])
