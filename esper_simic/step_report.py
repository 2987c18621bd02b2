"""One update as it was tried, and what the learner reports of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from esper_simic.breaker import VtraceVerdict, judge_vtrace
from esper_simic.config_safety import BreakerKeys
from esper_simic.events import StepFact
from esper_simic.safety_step import StepOutcome
from esper_simic.telemetry import ErrorText
from esper_simic.updates.update import Updated

ALLOCATION_FAILED: Final = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""What torch says of the CPU's memory, as a plain RuntimeError (its words depend on the system); of a GPU's it has an
error of its own, but where a library of the driver's ran short."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of an update: `updated`, or why there is none; and whether weights or optimisers had moved by then.

    `error` is for whoever watches and goes into no record: where a failure happened in the code is no function of the
    state. An attempt that is read from its record has none.
    """

    updated: Updated | None
    failure: str = ""
    out_of_memory: bool = False
    moved: bool = True
    error: ErrorText | None = None


def attempt(update: Callable[[], Updated], moves: Callable[[], int]) -> Attempt:
    """Try an update. What is not finite, or does not fit into memory, is told; any other error is the caller's.

    Args:
        update: Makes it.
        moves: How often weights were moved, or begun to be, up to now.
    """
    before = moves()
    try:
        return Attempt(update())
    except FloatingPointError as error:
        return Attempt(None, f"not finite: {error}", moved=moves() > before, error=ErrorText.of(error))
    except torch.OutOfMemoryError as error:
        told = ErrorText.of(error)
    except RuntimeError as error:
        if not any(words in str(error) for words in ALLOCATION_FAILED):
            raise
        told = ErrorText.of(error)
    reason = f"out of memory: {told.message}"
    return Attempt(None, reason, out_of_memory=True, moved=moves() > before, error=told)


def outcome_of(tried: Attempt, returns: tuple[float, ...], keys: BreakerKeys) -> StepOutcome:
    """What the safety of the training is to see of it.

    Args:
        tried: The update.
        returns: Of the training episodes that were admitted since the update before.
        keys: By which importance weights are judged.
    """
    updated = tried.updated
    if updated is None:
        return StepOutcome(finite=tried.out_of_memory, out_of_memory=tried.out_of_memory, returns=returns)
    return StepOutcome(
        loss=updated.loss,
        value_loss=updated.value_loss,
        policy_loss=updated.policy_loss,
        grad_norm=updated.grad_norm,
        vtrace=VtraceVerdict.SOUND if updated.ratios is None else judge_vtrace(updated.ratios, keys),
        returns=returns,
    )


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one update did: the number of the step, its metrics, the digests, and the weights it made.

    `failure` is why there are no new weights; empty where there are. `moved` is whether weights or optimisers had moved
    before it came to that. `facts` is what happened beside.
    """

    step: int
    environment_steps: int
    metrics: dict[str, float]
    digest: str
    state_digest: str | None
    unrolls_consumed: tuple[int, ...]
    failure: str = ""
    out_of_memory: bool = False
    moved: bool = True
    facts: tuple[StepFact, ...] = ()
