"""A training's safety as one value: breakers, ladder, conservative mode and objectives, folded update by update.

```
   plan(safety, keys, now_s) -> StepMode            what the next update may be
        the update is made, or fails
   observe(safety, keys, outcome, inputs)
        -> Observed(safety, facts, responses)       what follows from it
```

Both are pure. `StepInputs` is what came from outside (the clock, memory, latency of the update before) and stands in
the journal with the step; `StepOutcome` is what the update showed. So whoever folds the record comes to the same modes.
`plan` before an update and `observe` after it are given the same time, `StepInputs.at_s`. All inside is measured by a
clock of steps forward (`breaker.Clock`), so a clock that is set back disturbs nothing.

The order inside `observe`: what was the trouble; what it does to the breakers; what the ladder does about it; the
averages; the objectives; and last conservative mode, which looks at all of them. No mode changes within an update.

| rung or mode | what the next updates are | left again by |
|---|---|---|
| conservative | batch x 0.5, rates x 0.5, time budgets x 1.5 | all triggers quiet for a while (`conservative.py`) |
| clip, batch, rates | harder, smaller, lower | one level at a time, while calm (`ladder.py`) |
| training breaker OPEN | none for its recovery time | the one probe, on TD(0) |
| TD | targets of TD(0) | a probe with V-trace, once the training's breaker is CLOSED |
| HALTED | none | an operator (`resume`) |

`Safety` itself is never rolled back: when the last good weights are restored, what was learned about them stays.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import msgspec

from esper_simic import breaker as breakers
from esper_simic import conservative, ladder, slo, training_health
from esper_simic.breaker import Breaker, CircuitBreakerState, Clock, VtraceVerdict
from esper_simic.config_safety import SafetyKeys
from esper_simic.conservative import Averages, Conservative, Signals
from esper_simic.errors import InvariantViolation
from esper_simic.ladder import Ladder, Response, Trouble
from esper_simic.rungs import BreakerMoves, Rung
from esper_simic.safety_facts import (
    BreakerClosed,
    BreakerOpened,
    FallbackEntered,
    SafetyFact,
)
from esper_simic.safety_step import StepInputs, StepMode, StepOutcome
from esper_simic.slo import Improvement, Sample, SloReport, Window

__all__ = [
    "Observed",
    "Response",
    "Safety",
    "SafetyFact",
    "StepInputs",
    "StepMode",
    "StepOutcome",
    "health",
    "observe",
    "plan",
    "reports",
    "resume",
]

FINITE_MAX: Final = 1e30
"""A loss or norm beyond this counts as infinite: its square is, in single precision."""

EASED: Final = tuple(name for name, objective in slo.OBJECTIVES.items() if objective.eases)
"""Objectives whose violation calls for conservative mode; it would not mend the others, or would make them worse."""


class Safety(msgspec.Struct, frozen=True, kw_only=True):
    """All of a training's safety, of JSON types."""

    clock: Clock = Clock()
    training: Breaker = Breaker(name="training")
    vtrace: Breaker = Breaker(name="vtrace")
    ladder: Ladder = Ladder()
    conservative: Conservative = Conservative()
    averages: Averages = Averages()
    improvement: Improvement = Improvement()
    windows: dict[str, Window] = msgspec.field(
        default_factory=lambda: {name: Window() for name in slo.OBJECTIVES}
    )


class Observed(NamedTuple):
    """The safety after an update, what happened, and what the learner does before its next one."""

    safety: Safety
    facts: list[SafetyFact]
    responses: tuple[Response, ...]


def plan(safety: Safety, keys: SafetyKeys, now_s: float) -> StepMode:
    """What an update at this time may be.

    Args:
        safety: The state.
        keys: The configuration.
        now_s: The update's `StepInputs.at_s`.
    """
    elapsed_s = breakers.advance(safety.clock, now_s).elapsed_s
    is_halted = safety.ladder.standing.rung is Rung.HALTED
    is_training = breakers.allows(breakers.rule("training", keys), safety.training, elapsed_s)
    is_vtrace = breakers.allows(breakers.rule("vtrace", keys), safety.vtrace, elapsed_s)
    is_vtrace &= safety.training.state is CircuitBreakerState.CLOSED
    effects = conservative.effects(keys, safety.conservative.active)
    return StepMode(
        may_step=is_training and not is_halted,
        is_halted=is_halted,
        targets="vtrace" if is_vtrace else "td",
        clip_factor=ladder.clip_factor(keys, safety.ladder),
        lr_factor=effects.lr_factor * ladder.lr_factor(keys, safety.ladder),
        batch_factor=min(effects.batch_factor, ladder.batch_factor(safety.ladder)),
        timeout_factor=effects.timeout_factor,
        is_conservative=safety.conservative.active,
    )


def lockstep_time_s(safety: Safety, keys: SafetyKeys) -> float:
    """A time that is a function of the state: a second an update, and the wait for a breaker at once.

    In lockstep no clock may have a part in what is computed.
    """
    now_s = (safety.clock.reading_s or 0.0) + 1.0
    mode = plan(safety, keys, now_s)
    return now_s if mode.may_step or mode.is_halted else now_s + keys.training_breaker_recovery_timeout_s


def observe(
    safety: Safety,
    keys: SafetyKeys,
    outcome: StepOutcome,
    inputs: StepInputs,
    *,
    buffer_bytes_max: float = slo.BUFFER_BYTES_MAX,
) -> Observed:
    """Fold one update.

    Args:
        safety: The state before it, for which `plan` allowed it.
        keys: The configuration.
        outcome: What it showed.
        inputs: What came with it.
        buffer_bytes_max: Target of the buffer's size.

    Raises:
        InvariantViolation: `plan` does not allow an update at this time.
    """
    mode = plan(safety, keys, inputs.at_s)
    if not mode.may_step:
        rung, state = safety.ladder.standing.rung.name, safety.training.state.name
        raise InvariantViolation(f"an update on {rung} with the training breaker {state}; ask plan first")
    clock = breakers.advance(safety.clock, inputs.at_s)
    trouble = _trouble(keys, outcome)
    is_tampered = inputs.rates_tampered > 0
    after, facts = _fold_breakers(safety, keys, mode, outcome, trouble, is_tampered, clock.elapsed_s)
    after = msgspec.structs.replace(after, clock=clock)
    after, climbed = _fold_ladder(after, keys, outcome, trouble, facts)
    after = _fold_averages(after, keys, outcome, trouble, inputs)
    after = _fold_objectives(safety, after, keys, outcome, inputs, buffer_bytes_max, facts)
    after = _fold_conservative(after, keys, outcome, trouble, inputs, facts)
    return Observed(after, facts, climbed)


def resume(safety: Safety) -> tuple[Safety, list[SafetyFact]]:
    """Fold that an operator lets a halted training go on: on TD(0), every measure of the ladder taken back.

    Raises:
        InvariantViolation: It is not halted.
    """
    resumed, facts = ladder.resumed(safety.ladder)
    return msgspec.structs.replace(safety, ladder=resumed), [*facts]


def reports(
    safety: Safety, keys: SafetyKeys, buffer_bytes_max: float = slo.BUFFER_BYTES_MAX
) -> list[SloReport]:
    """How every objective stands."""
    objectives = slo.objectives(keys, buffer_bytes_max)
    return [slo.report(name, objective, safety.windows[name]) for name, objective in objectives.items()]


def health(
    safety: Safety, keys: SafetyKeys, since_cleanup_s: float | None = None
) -> training_health.HealthReport:
    """How the training is; `since_cleanup_s` is the age of the buffer's last sweep, None where there are none."""
    states = [safety.training.state, safety.vtrace.state]
    return training_health.health(
        training_health.Readings(
            buffer_bytes=safety.windows["buffer_bytes"].latest,
            since_cleanup_s=since_cleanup_s,
            loss_slope=safety.ladder.slope,
            loss_ratio=safety.averages.loss_ratio(keys.max_validation_loss),
            breakers_open=states.count(CircuitBreakerState.OPEN),
            breakers_half_open=states.count(CircuitBreakerState.HALF_OPEN),
            objectives_violated=sum(window.is_violated for window in safety.windows.values()),
            is_halted=safety.ladder.standing.rung is Rung.HALTED,
        )
    )


def _trouble(keys: SafetyKeys, outcome: StepOutcome) -> Trouble:
    figures = (outcome.loss, outcome.value_loss, outcome.policy_loss, outcome.grad_norm)
    finite = outcome.finite and all(abs(value) <= FINITE_MAX for value in figures)
    return ladder.classify(
        keys, out_of_memory=outcome.out_of_memory, finite=finite, grad_norm=outcome.grad_norm
    )


def _loss(outcome: StepOutcome, trouble: Trouble) -> float | None:
    made = trouble not in ladder.FAILURES
    return outcome.value_loss + abs(outcome.policy_loss) if made else None


def _fold_breakers(
    safety: Safety,
    keys: SafetyKeys,
    mode: StepMode,
    outcome: StepOutcome,
    trouble: Trouble,
    is_tampered: bool,
    now_s: float,
) -> tuple[Safety, list[SafetyFact]]:
    """Count failures of both breakers.

    The training's counts updates that were not made, or were made although somebody else had written a rate; V-trace's
    counts unsound ratios and failed probes.
    """
    facts: list[SafetyFact] = []
    made = trouble not in ladder.FAILURES
    training = _fold_breaker(safety.training, keys, made and not is_tampered, now_s, facts)
    vtrace = safety.vtrace
    was_judged = not outcome.out_of_memory and (made or outcome.vtrace is not VtraceVerdict.SOUND)
    if mode.targets == "vtrace" and (was_judged or vtrace.state is not CircuitBreakerState.CLOSED):
        vtrace = _fold_breaker(vtrace, keys, made and outcome.vtrace is VtraceVerdict.SOUND, now_s, facts)
    else:
        vtrace = breakers.observed(breakers.rule("vtrace", keys), vtrace, now_s)
    return msgspec.structs.replace(safety, training=training, vtrace=vtrace), facts


def _fold_breaker(
    breaker: Breaker, keys: SafetyKeys, good: bool, now_s: float, facts: list[SafetyFact]
) -> Breaker:
    rule = breakers.rule(breaker.name, keys)
    breaker, begun = breakers.attempted(rule, breaker, now_s)
    breaker, ended = (
        breakers.succeeded(rule, breaker, now_s) if good else breakers.failed(rule, breaker, now_s)
    )
    facts += [*begun, *ended]
    return breaker


def _fold_ladder(
    safety: Safety, keys: SafetyKeys, outcome: StepOutcome, trouble: Trouble, facts: list[SafetyFact]
) -> tuple[Safety, tuple[Response, ...]]:
    opened = {fact.name for fact in facts if isinstance(fact, BreakerOpened)}
    closed = {fact.name for fact in facts if isinstance(fact, BreakerClosed)}
    moves = BreakerMoves(
        training_opened="training" in opened,
        vtrace_opened="vtrace" in opened,
        vtrace_closed="vtrace" in closed,
    )
    update = ladder.Update(
        trouble=trouble, loss=_loss(outcome, trouble), grad_norm=outcome.grad_norm, breakers=moves
    )
    climbed = ladder.observe(keys, safety.ladder, update)
    facts += climbed.facts
    vtrace = safety.vtrace
    # Its probe may go well in the very update that halts the training. Closed, it would let V-trace in, not TD(0), as
    # soon as an operator resumes it.
    is_late = vtrace.state is CircuitBreakerState.CLOSED and climbed.ladder.standing.rung is Rung.HALTED
    if is_late or any(isinstance(fact, FallbackEntered) for fact in climbed.facts):
        # The way back is the same whoever gave way: a probe after V-trace's recovery time.
        vtrace, tripped = breakers.tripped(breakers.rule("vtrace", keys), vtrace, safety.clock.elapsed_s)
        facts += tripped
    return msgspec.structs.replace(safety, ladder=climbed.ladder, vtrace=vtrace), climbed.responses


def _fold_averages(
    safety: Safety, keys: SafetyKeys, outcome: StepOutcome, trouble: Trouble, inputs: StepInputs
) -> Safety:
    loss = _loss(outcome, trouble)
    errors = inputs.errors_since + (loss is None)
    averages = conservative.with_operations(safety.averages, errors, inputs.operations_since + 1)
    if loss is not None:
        averages = conservative.with_loss(averages, loss, keys.max_validation_loss)
    return msgspec.structs.replace(safety, averages=averages)


def _fold_objectives(
    before: Safety,
    safety: Safety,
    keys: SafetyKeys,
    outcome: StepOutcome,
    inputs: StepInputs,
    buffer_bytes_max: float,
    facts: list[SafetyFact],
) -> Safety:
    """Fold every objective but `conservative_entries`, which waits for what the others do to the mode."""
    now_s = safety.clock.elapsed_s
    improvement, held = safety.improvement, list[bool]()
    for episode_return in outcome.returns:
        improvement, comparison = slo.with_return(keys, improvement, episode_return, now_s)
        held += [] if comparison is None else [comparison]
    timeouts = conservative.effects(keys, before.conservative.active).timeout_factor
    open_s = max(safety.training.open_s - before.training.open_s, safety.vtrace.open_s - before.vtrace.open_s)
    samples = {
        "step_latency": _slow(inputs.previous_step_ms, keys.training_step_budget_ms * timeouts),
        "epoch_boundary": _slow(inputs.previous_boundary_ms, keys.epoch_boundary_budget_ms * timeouts),
        "throughput": _throughput(inputs.experiences_since, now_s - before.clock.elapsed_s),
        "improvement": Sample(sum(held), len(held)) if held else None,
        "buffer_bytes": None if inputs.buffer_bytes is None else Sample(inputs.buffer_bytes),
        "ttl_cleanup": Sample(inputs.removed_since, inputs.expired_since),
        "breaker_open": Sample(open_s),
        "convergence": Sample(improvement.best_s / slo.HOUR_S) if held else None,
    }
    windows = dict(safety.windows)
    objectives = slo.objectives(keys, buffer_bytes_max)
    for name, sample in samples.items():
        windows[name], changes = slo.observe(name, objectives[name], windows[name], sample, now_s)
        facts += changes
    return msgspec.structs.replace(safety, windows=windows, improvement=improvement)


def _throughput(experiences: int | None, seconds: float) -> Sample | None:
    return None if experiences is None else Sample(experiences, seconds)


def _slow(took_ms: float | None, budget_ms: float) -> Sample | None:
    return None if took_ms is None else Sample(float(took_ms > budget_ms), 1.0)


def _fold_conservative(
    safety: Safety,
    keys: SafetyKeys,
    outcome: StepOutcome,
    trouble: Trouble,
    inputs: StepInputs,
    facts: list[SafetyFact],
) -> Safety:
    now_s = safety.clock.elapsed_s
    states = {safety.training.state, safety.vtrace.state}
    windows = safety.windows
    signals = Signals(
        error_rate=safety.averages.error_rate,
        memory_fraction=inputs.memory_fraction,
        out_of_memory=trouble is Trouble.OUT_OF_MEMORY,
        breaker_open=CircuitBreakerState.OPEN in states,
        breakers_closed=states == {CircuitBreakerState.CLOSED},
        slo_violated=any(windows[name].is_violated and not windows[name].is_met for name in EASED),
        loss_ratio=safety.averages.loss_ratio(keys.max_validation_loss),
        # A gradient or loss that is not finite is the worst of instabilities, and no number to compare.
        grad_norm=math.inf if trouble is Trouble.NOT_FINITE else outcome.grad_norm,
        rates_tampered=inputs.rates_tampered > 0,
    )
    mode, changes = conservative.observe(keys, safety.conservative, signals, now_s)
    name = "conservative_entries"
    entered = Sample(float(mode.entries - safety.conservative.entries))
    window, violations = slo.observe(name, slo.OBJECTIVES[name], windows[name], entered, now_s)
    facts += [*changes, *violations]
    return msgspec.structs.replace(safety, conservative=mode, windows=windows | {name: window})
