"""The ladder of failures: what is done about an update that went wrong, and how it is taken back.

| trouble | seen by | measure | taken back |
|---|---|---|---|
| OUT_OF_MEMORY | the update did not fit | batch halved, once more each time | one: `batch_recovery_steps` that fit |
| EXPLODING | norm > `exploding_grad_norm` | clip times `clip_tighten_factor` | one: `clip_recovery_steps` without |
| NOT_FINITE | NaN, infinity in loss or weights | last good state; batch never used again | at once |
| DIVERGING | loss rose for `divergence_epochs` | last good state; lower rates | one: `rate_recovery_epochs` that fell |

Halvings, tightenings and lowerings go to the third level and apply to what is configured; no batch is below 8.

An *epoch* is `divergence_epoch_updates` updates that gave a loss since the last restoration; its loss is the mean of
their `value_loss + |policy_loss|` (see `conservative.py`). It is rising if it is above that of the epoch before, and
diverging if so many in a row rose by `divergence_rise_min` in all. The state is *good*, and kept, at the end of an
epoch that did not rise: what a divergence goes back to is from before it began. In seven recorded trainings that went
well the loss rose for at most 4 epochs of 100 updates in a row.

When the same trouble comes again and again, targets and training themselves give way (`rungs.py`). Measures are
exhausted where a divergence finds the rates at their lowest, or the last good state was restored `restores_max` times
without a good epoch in between.

A broken invariant is never part of this: it stops the process.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple

import msgspec

from esper_simic import rungs
from esper_simic.config_safety import LadderKeys
from esper_simic.rungs import BreakerMoves, Rung, Standing
from esper_simic.safety_facts import (
    BatchGrown,
    BatchShrunk,
    ClipRelaxed,
    ClipTightened,
    GoodStateRestored,
    LadderFact,
    RateLowered,
    RateRaised,
)

LEVEL_MAX: Final = 3
"""Measures that come in levels go no further than the third."""

BATCH_FACTOR: Final = 0.5


class Trouble(StrEnum):
    """What was wrong with an update, the most severe first."""

    NONE = "none"
    OUT_OF_MEMORY = "out_of_memory"
    NOT_FINITE = "not_finite"
    EXPLODING = "exploding"
    DIVERGING = "diverging"


class Response(StrEnum):
    """What the learner does before its next update.

    | response | meaning |
    |---|---|
    | RESTORE | weights, optimisers and normalisers become those of the last good state |
    | SKIP | the batch of this update is consumed and never drawn again |
    | SHRINK | nothing was learned; the next update is smaller |
    | TIGHTEN_CLIP | the next updates are clipped harder |
    | LOWER_RATE | the next updates are slower |
    | KEEP | the state of now becomes the last good one |
    | HALT | no more updates; alert, and keep the last good policy |
    """

    RESTORE = "restore"
    SKIP = "skip"
    SHRINK = "shrink"
    TIGHTEN_CLIP = "tighten_clip"
    LOWER_RATE = "lower_rate"
    KEEP = "keep"
    HALT = "halt"


RESPONSES: Final[dict[Trouble, tuple[Response, ...]]] = {
    Trouble.NONE: (),
    Trouble.OUT_OF_MEMORY: (Response.SHRINK,),
    Trouble.NOT_FINITE: (Response.RESTORE, Response.SKIP),
    Trouble.EXPLODING: (Response.TIGHTEN_CLIP,),
    Trouble.DIVERGING: (Response.RESTORE, Response.LOWER_RATE),
}
"""What each trouble asks for."""

FAILURES: Final = frozenset({Trouble.OUT_OF_MEMORY, Trouble.NOT_FINITE})
"""Troubles in which the update was not made: they count for the training's breaker."""


class Measure(msgspec.Struct, frozen=True):
    """A measure that is taken in levels and taken back one by one.

    Attributes:
        level: Times it is in force, in [0, `LEVEL_MAX`].
        calm: Updates without its trouble (for the rates: epochs whose loss did not rise) since it last changed.
    """

    level: int = 0
    calm: int = 0


def taken(measure: Measure) -> Measure:
    """One level more, as far as there is one, and the wait begins anew."""
    return Measure(min(measure.level + 1, LEVEL_MAX))


def calmed(measure: Measure, calm_min: int) -> Measure:
    """After one more calm update or epoch: one level less when there were `calm_min` of them."""
    if measure.level == 0:
        return measure
    calm = measure.calm + 1
    return Measure(measure.level - 1) if calm >= calm_min else Measure(measure.level, calm)


class Epoch(msgspec.Struct, frozen=True, kw_only=True):
    """What the divergence check knows.

    Attributes:
        updates: Updates of the epoch that is under way.
        loss_sum: Sum of their losses.
        before: Loss of the epoch before; None where there is none to compare with.
        rising: Epochs in a row whose loss rose.
        rise_from: Loss of the epoch before the first of these.
    """

    updates: int = 0
    loss_sum: float = 0.0
    before: float | None = None
    rising: int = 0
    rise_from: float = 0.0


class Ladder(msgspec.Struct, frozen=True, kw_only=True):
    """Where a training stands on the ladder, of JSON types.

    Attributes:
        standing: How much of the algorithm is trusted.
        clip: Tightenings of the gradient clip.
        batch: Halvings of the batch.
        rate: Lowerings of the learning rates.
        epoch: The divergence check.
        slope: Last epoch's loss less that of the epoch before, per update.
        restores: Restorations since the state was last kept as good, or targets gave way.
    """

    standing: Standing = Standing()
    clip: Measure = Measure()
    batch: Measure = Measure()
    rate: Measure = Measure()
    epoch: Epoch = Epoch()
    slope: float = 0.0
    restores: int = 0


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """What one update showed.

    Attributes:
        trouble: As `classify` found it.
        loss: `value_loss + |policy_loss|`; None where the update was not made.
        grad_norm: Before clipping; 0 where there was none.
        breakers: What happened to the breakers at it.
    """

    trouble: Trouble
    loss: float | None
    grad_norm: float = 0.0
    breakers: BreakerMoves = BreakerMoves()


class Climbed(NamedTuple):
    """The ladder after an update, what happened on it, and what the learner does now."""

    ladder: Ladder
    facts: list[LadderFact]
    responses: tuple[Response, ...]


def classify(keys: LadderKeys, *, out_of_memory: bool, finite: bool, grad_norm: float) -> Trouble:
    """The trouble of one update as far as it shows alone; DIVERGING takes epochs."""
    if out_of_memory:
        return Trouble.OUT_OF_MEMORY
    if not finite:
        return Trouble.NOT_FINITE
    return Trouble.EXPLODING if grad_norm > keys.exploding_grad_norm else Trouble.NONE


def observe(keys: LadderKeys, ladder: Ladder, update: Update) -> Climbed:
    """Fold one update.

    Raises:
        InvariantViolation: The training is halted; nobody makes an update then.
    """
    facts: list[LadderFact] = []
    ladder = _fold_batch(keys, _fold_clip(keys, ladder, update, facts), update, facts)
    responses = RESPONSES[update.trouble]
    was_lowest = ladder.rate.level == LEVEL_MAX
    trouble = Trouble.NONE
    if update.trouble is Trouble.NOT_FINITE:
        ladder = _restored(ladder, update.trouble, facts)
    elif update.loss is not None:
        ladder, trouble, is_good = _fold_loss(keys, ladder, update.loss, facts)
        responses += RESPONSES[trouble] + ((Response.KEEP,) if is_good else ())
    is_exhausted = was_lowest and trouble is Trouble.DIVERGING
    is_exhausted |= ladder.restores >= keys.restores_max
    made = update.trouble not in FAILURES
    standing = rungs.observe(keys, ladder.standing, update.breakers, made, is_exhausted, facts)
    restores = 0 if standing.rung is not ladder.standing.rung else ladder.restores
    ladder = msgspec.structs.replace(ladder, standing=standing, restores=restores)
    responses += (Response.HALT,) if standing.rung is Rung.HALTED else ()
    return Climbed(ladder, facts, responses)


def resumed(ladder: Ladder) -> tuple[Ladder, list[LadderFact]]:
    """Fold that an operator lets a halted training go on: on TD, every measure taken back.

    Raises:
        InvariantViolation: It is not halted.
    """
    standing, facts = rungs.resumed(ladder.standing)
    return Ladder(standing=standing), facts


def clip_factor(keys: LadderKeys, ladder: Ladder) -> float:
    """Factor on the configured norm that updates are clipped to."""
    return keys.clip_tighten_factor**ladder.clip.level


def lr_factor(keys: LadderKeys, ladder: Ladder) -> float:
    """Factor on the scheduled learning rates."""
    return keys.divergence_lr_factor**ladder.rate.level


def batch_factor(ladder: Ladder) -> float:
    """Factor on the configured batch size."""
    return BATCH_FACTOR**ladder.batch.level


def _fold_clip(keys: LadderKeys, ladder: Ladder, update: Update, facts: list[LadderFact]) -> Ladder:
    before = ladder.clip.level
    if update.trouble is Trouble.EXPLODING:
        ladder = msgspec.structs.replace(ladder, clip=taken(ladder.clip))
        if ladder.clip.level > before:
            facts.append(ClipTightened(factor=clip_factor(keys, ladder), grad_norm=update.grad_norm))
    elif update.trouble is Trouble.NONE:
        ladder = msgspec.structs.replace(ladder, clip=calmed(ladder.clip, keys.clip_recovery_steps))
        if ladder.clip.level < before:
            facts.append(ClipRelaxed(factor=clip_factor(keys, ladder)))
    return ladder


def _fold_batch(keys: LadderKeys, ladder: Ladder, update: Update, facts: list[LadderFact]) -> Ladder:
    before = ladder.batch.level
    if update.trouble is Trouble.OUT_OF_MEMORY:
        ladder = msgspec.structs.replace(ladder, batch=taken(ladder.batch))
        if ladder.batch.level > before:
            facts.append(BatchShrunk(factor=batch_factor(ladder)))
    else:
        ladder = msgspec.structs.replace(ladder, batch=calmed(ladder.batch, keys.batch_recovery_steps))
        if ladder.batch.level < before:
            facts.append(BatchGrown(factor=batch_factor(ladder)))
    return ladder


def _restored(ladder: Ladder, trouble: Trouble, facts: list[LadderFact]) -> Ladder:
    """The weights are older ones now: the epoch begins anew, and after a divergence so does the comparison."""
    facts.append(GoodStateRestored(reason=trouble.value))
    goes_on = msgspec.structs.replace(ladder.epoch, updates=0, loss_sum=0.0)
    epoch = Epoch() if trouble is Trouble.DIVERGING else goes_on
    return msgspec.structs.replace(ladder, epoch=epoch, restores=ladder.restores + 1)


def _fold_loss(
    keys: LadderKeys, ladder: Ladder, loss: float, facts: list[LadderFact]
) -> tuple[Ladder, Trouble, bool]:
    """Fold the loss of an update that was made; also whether it shows a divergence, or ends a good epoch."""
    old = ladder.epoch
    updates, loss_sum = old.updates + 1, old.loss_sum + loss
    if updates < keys.divergence_epoch_updates:
        epoch = msgspec.structs.replace(old, updates=updates, loss_sum=loss_sum)
        return msgspec.structs.replace(ladder, epoch=epoch), Trouble.NONE, False
    mean = loss_sum / updates
    slope = 0.0 if old.before is None else (mean - old.before) / updates
    if old.before is None or mean <= old.before:
        epoch = Epoch(before=mean)
        ladder = msgspec.structs.replace(ladder, epoch=epoch, slope=slope, restores=0)
        return _calmed_rate(keys, ladder, facts), Trouble.NONE, True
    epoch = Epoch(before=mean, rising=old.rising + 1, rise_from=old.rise_from if old.rising else old.before)
    ladder = msgspec.structs.replace(ladder, epoch=epoch, slope=slope)
    has_risen = mean >= epoch.rise_from * (1.0 + keys.divergence_rise_min)
    if epoch.rising < keys.divergence_epochs or not has_risen:
        return ladder, Trouble.NONE, False
    ladder = _restored(ladder, Trouble.DIVERGING, facts)
    before = ladder.rate.level
    ladder = msgspec.structs.replace(ladder, rate=taken(ladder.rate))
    if ladder.rate.level > before:
        facts.append(RateLowered(factor=lr_factor(keys, ladder), epochs=epoch.rising))
    return ladder, Trouble.DIVERGING, False


def _calmed_rate(keys: LadderKeys, ladder: Ladder, facts: list[LadderFact]) -> Ladder:
    before = ladder.rate.level
    ladder = msgspec.structs.replace(ladder, rate=calmed(ladder.rate, keys.rate_recovery_epochs))
    if ladder.rate.level < before:
        facts.append(RateRaised(factor=lr_factor(keys, ladder)))
    return ladder
