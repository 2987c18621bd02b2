"""What the learner gives an algorithm for one update, and what it gets back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from esper_simic.algorithms.vtrace import LOG_RHO_MAX
from esper_simic.algorithms.weighted import weighted_mean
from esper_simic.breaker import VtraceRatios, VtraceVerdict, judge_vtrace
from esper_simic.config import TrainerConfig
from esper_simic.policies.policy import Evaluation, Policy
from esper_simic.safety_step import StepMode, Targets
from esper_simic.telemetry import StepObserver
from esper_simic.updates.batch import Batch
from esper_simic.updates.computation import Computation
from esper_simic.updates.optimisers import UNWATCHED, Optimisers

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Terms:
    """Under what terms one update is made.

    Attributes:
        trainer: The configuration.
        policy: Whose weights are moved.
        optimisers: By which they are moved.
        mode: What the safety of the training allows now.
        entropy_coefficient: Weight of the entropy bonus now.
        progress: Share of its annealing that is done, in [0, 1].
        rng: All chance of the update.
        penalty: A further loss of the weights, with its own weight in it; None for none.
        observer: Told of the phases.
        computation: How it is computed.
    """

    trainer: TrainerConfig
    policy: Policy
    optimisers: Optimisers
    mode: StepMode
    entropy_coefficient: float
    progress: float
    rng: np.random.Generator
    penalty: Callable[[], Tensor] | None = None
    observer: StepObserver = UNWATCHED
    computation: Computation = field(default_factory=Computation)

    @property
    def max_norm(self) -> float:
        """Norm to which gradients are clipped."""
        return self.trainer.max_grad_norm * self.mode.clip_factor

    def targets(self, ratios: VtraceRatios) -> Targets:
        """V-trace's targets, unless it is switched off, given up for now, or of no use on this very batch."""
        is_sound = judge_vtrace(ratios, self.trainer) is VtraceVerdict.SOUND
        return self.mode.targets if self.trainer.vtrace_enabled and is_sound else "td"

    def evaluate(self, batch: Batch) -> Evaluation:
        """The policy's view of a batch, see `Batch.evaluate`."""
        return self.computation.evaluate(batch, self.policy)

    def loss(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What a pure function of tensors gives."""
        return self.computation.loss(function, *args, **kwargs)

    def minimise(self, loss: Tensor) -> float:
        """One step down the gradient of a loss and the penalty: the gradient's norm before it was clipped."""
        total = loss if self.penalty is None else loss + self.penalty()
        return self.optimisers.minimise(total, max_norm=self.max_norm, observer=self.observer)


@dataclass(frozen=True, slots=True)
class Updated:
    """What an update was like.

    Attributes:
        loss: Total; the mean over its steps where it made several.
        policy_loss: Its policy part, likewise; where that is a negative log-likelihood, `judged_likelihood` of it.
        value_loss: Its value part before its coefficient, likewise.
        grad_norm: The largest of its steps, before clipping.
        ratios: Importance weights of the batch; None where the algorithm has none.
        metrics: What else to watch, by name.
    """

    loss: float
    policy_loss: float
    value_loss: float
    grad_norm: float
    ratios: VtraceRatios | None
    metrics: dict[str, float]


def judged_likelihood(policy_loss: float) -> float:
    """What the safety of the training is to see of a negative log-likelihood: itself, but no less than 0.

    It judges a policy's loss by its size, because one that weighs advantages has either sign and is at its best near
    0. That of a density has no bottom: below 0 its size grows with every success.
    """
    return max(policy_loss, 0.0)


class Update(Protocol):
    """One algorithm.

    Raises:
        FloatingPointError: A loss or gradient is not finite. Steps before it were made.
    """

    def __call__(self, batch: Batch, terms: Terms) -> Updated:
        """Make one update of `terms.policy` from a batch."""


@torch.no_grad()
def ratios_of(log_probs: Tensor, behaviour: Tensor, weights: Tensor) -> VtraceRatios:
    """Importance weights pi/mu `[T, B]` where they count; where nothing does, they are 1."""
    log_ratios = torch.where(weights > 0, log_probs - behaviour, 0.0)
    bounded = log_ratios.clamp(-LOG_RHO_MAX, LOG_RHO_MAX)
    mean = weighted_mean(bounded.exp(), weights) if bool(weights.any()) else torch.ones(())
    return VtraceRatios(
        finite=bool(log_ratios.isfinite().all()),
        log_ratio_max=float(log_ratios.max()),
        mean_ratio=float(mean),
    )
