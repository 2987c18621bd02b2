"""What goes into the safety of one update, what comes out of the update, and what the next one may be."""

from __future__ import annotations

from typing import Literal

import msgspec

from esper_simic import conservative
from esper_simic.breaker import VtraceVerdict

Targets = Literal["vtrace", "td"]


class StepInputs(msgspec.Struct, frozen=True, kw_only=True):
    """What comes from outside with one update; the journal has it.

    Attributes:
        at_s: Time before the update, by any clock; a wall clock lets windows go on over a restart.
        previous_step_ms: How long the update before took; None for a life's first.
        previous_boundary_ms: How long the learner was busy between the two updates; None where unknown.
        memory_fraction: Share of the memory limit in use, in [0, 1].
        operations_since: Operations since the update before (unrolls received, checkpoints, ...), failed ones too.
        errors_since: How many of them failed.
        experiences_since: Experiences taken in since then; None where no clock measures them (lockstep).
        buffer_bytes: Bytes that the buffer holds; None where unknown.
        expired_since: Experiences that reached the end of their time since then. A buffer whose experiences have no
            end leaves it at 0, and with it the objective `ttl_cleanup` without a figure.
        removed_since: How many of them a sweep removed in time.
        rates_tampered: Learning rates that somebody else has written since then (L3).
    """

    at_s: float
    previous_step_ms: float | None = None
    previous_boundary_ms: float | None = None
    memory_fraction: float = 0.0
    operations_since: int = 0
    errors_since: int = 0
    experiences_since: int | None = 0
    buffer_bytes: float | None = None
    expired_since: int = 0
    removed_since: int = 0
    rates_tampered: int = 0


class StepOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one update showed, made or not.

    Attributes:
        loss: The total.
        value_loss: Its value part, before its coefficient.
        policy_loss: Its policy part.
        grad_norm: Before clipping.
        finite: Whether losses, gradients and the weights after it all are; if not, the above may be anything.
        out_of_memory: Whether it did not fit; then nothing else of it is looked at.
        vtrace: Judgement of V-trace's result, where V-trace made the targets (`breaker.judge_vtrace`).
        returns: Returns of the training episodes that were admitted since the update before; finite.
    """

    loss: float = 0.0
    value_loss: float = 0.0
    policy_loss: float = 0.0
    grad_norm: float = 0.0
    finite: bool = True
    out_of_memory: bool = False
    vtrace: VtraceVerdict = VtraceVerdict.SOUND
    returns: tuple[float, ...] = ()


class StepMode(msgspec.Struct, frozen=True, kw_only=True):
    """What the next update may be; factors apply to what is configured or scheduled.

    Attributes:
        may_step: Whether it may be made now.
        is_halted: Whether none will be made again.
        targets: Whose targets it takes.
        clip_factor: On the gradient norm that it is clipped to.
        lr_factor: On the scheduled learning rates.
        batch_factor: On the configured batch size (`batch_size`).
        timeout_factor: On time budgets.
        is_conservative: Whether conservative mode is on.
    """

    may_step: bool = True
    is_halted: bool = False
    targets: Targets = "vtrace"
    clip_factor: float = 1.0
    lr_factor: float = 1.0
    batch_factor: float = 1.0
    timeout_factor: float = 1.0
    is_conservative: bool = False

    def batch_size(self, configured: int) -> int:
        """Experiences of the update: a power of two in [8, 256], from the configured one."""
        return conservative.batch_size(configured, self.batch_factor)
