"""What happened to a training's safety, as facts of the journal: breakers, conservative mode, the ladder, objectives.

Past tense, of JSON types, and they never change meaning. A fact tells; it decides nothing: the folds of `safety.py`
give the same facts again wherever the same record is folded.
"""

from __future__ import annotations

import msgspec


class BreakerOpened(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """So many failures in a row opened a breaker; below its threshold where another's failures did (`tripped`)."""

    name: str
    failures: int


class BreakerHalfOpened(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The recovery time of an open breaker had passed, and its operation was tried."""

    name: str


class BreakerClosed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The probe succeeded."""

    name: str


BreakerFact = BreakerOpened | BreakerHalfOpened | BreakerClosed


class SloViolated(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The error budget of an objective is used up, and it is not met."""

    objective: str
    value: float
    target: float


class SloRestored(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An objective that was violated is inside its error budget again."""

    objective: str


SloFact = SloViolated | SloRestored


class ConservativeModeEntered(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The training became cautious, for these reasons; it is the `entries`-th time."""

    triggers: tuple[str, ...]
    entries: int


class ConservativeTriggersAdded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """More reasons came while the mode was on."""

    triggers: tuple[str, ...]


class ConservativeModeLeft(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Everything had been quiet for long enough; `triggers` is all that was raised meanwhile."""

    triggers: tuple[str, ...]
    seconds: float
    steps: int


ConservativeFact = ConservativeModeEntered | ConservativeTriggersAdded | ConservativeModeLeft


class ClipTightened(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A gradient of this norm exploded: updates are now clipped to `factor` times the configured norm."""

    factor: float
    grad_norm: float


class ClipRelaxed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Gradients stayed calm: updates are clipped to `factor` times the configured norm."""

    factor: float


class RateLowered(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The loss rose for so many epochs: learning rates are `factor` times the scheduled ones."""

    factor: float
    epochs: int


class RateRaised(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """No divergence for long enough: learning rates are `factor` times the scheduled ones."""

    factor: float


class BatchShrunk(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An update did not fit in memory: batches are at most `factor` times the configured one."""

    factor: float


class BatchGrown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Updates fitted for long enough: batches are at most `factor` times the configured one."""

    factor: float


class GoodStateRestored(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Weights, optimisers and normalisers went back to the last good state."""

    reason: str


class FallbackEntered(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Targets are these from now on."""

    targets: str
    reason: str


class FallbackLeft(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """V-trace is trusted again."""


class TrainingHalted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """No more updates are made; the last good policy stays."""

    reason: str


class TrainingResumed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An operator let a halted training go on, with TD(0) targets first."""


LadderFact = (
    ClipTightened
    | ClipRelaxed
    | RateLowered
    | RateRaised
    | BatchShrunk
    | BatchGrown
    | GoodStateRestored
    | FallbackEntered
    | FallbackLeft
    | TrainingHalted
    | TrainingResumed
)


SafetyFact = BreakerFact | SloFact | ConservativeFact | LadderFact
