"""One update as it was tried, and what the learner reports of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from esper_simic.events import StepFact
from esper_simic.updates.update import Updated

ALLOCATION_FAILED: Final = ("can't allocate memory", "not enough memory")
"""What torch says of the CPU's memory, as a plain RuntimeError (its words depend on the system); of a GPU's it has an
error of its own."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of an update: `updated`, or why there is none."""

    updated: Updated | None
    failure: str = ""
    out_of_memory: bool = False


def attempt(update: Callable[[], Updated]) -> Attempt:
    """Try an update. What is not finite, or does not fit into memory, is told; any other error is the caller's."""
    try:
        return Attempt(update())
    except FloatingPointError as error:
        return Attempt(None, f"not finite: {error}")
    except torch.OutOfMemoryError as error:
        return Attempt(None, f"out of memory: {error}", out_of_memory=True)
    except RuntimeError as error:
        if not any(words in str(error) for words in ALLOCATION_FAILED):
            raise
        return Attempt(None, f"out of memory: {error}", out_of_memory=True)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one update did: the number of the step, its metrics, the digests, and the weights it made.

    `failure` is why there are no new weights; empty where there are. `facts` is what happened beside.
    """

    step: int
    environment_steps: int
    metrics: dict[str, float]
    digest: str
    state_digest: str | None
    unrolls_consumed: tuple[int, ...]
    failure: str = ""
    out_of_memory: bool = False
    facts: tuple[StepFact, ...] = ()
