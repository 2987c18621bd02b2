"""What happened beside an update, and to the curriculum, in words."""

from __future__ import annotations

from esper_simic import curriculum_facts as curriculum
from esper_simic import safety_facts as safety
from esper_simic.events import AdaptersBegun, StepFact
from esper_simic.rate_facts import Tampered

_NAMES = {"vtrace": "V-trace"}

AnyFact = StepFact | curriculum.CurriculumFact


def fact_words(fact: AnyFact) -> tuple[str, bool] | None:
    """Words, and whether it is trouble; None for what goes without saying, such as a rate on its schedule."""
    if isinstance(fact, Tampered):
        return f"somebody else wrote a learning rate of {fact.name}: {fact.found}, not {fact.written:g}", True
    if isinstance(fact, AdaptersBegun):
        return (
            f"the weights are frozen: adapters of rank {fact.rank} on {fact.matrices} matrices learn",
            False,
        )
    return (
        _of_breakers_and_objectives(fact)
        or _of_the_mode(fact)
        or _of_measures(fact)
        or _of_the_curriculum(fact)
    )


def _of_breakers_and_objectives(fact: AnyFact) -> tuple[str, bool] | None:
    match fact:
        case safety.BreakerOpened():
            return f"the breaker of {_named(fact.name)} opened after {fact.failures} failures in a row", True
        case safety.BreakerHalfOpened():
            return f"the breaker of {_named(fact.name)} let one through to see", False
        case safety.BreakerClosed():
            return f"the breaker of {_named(fact.name)} closed", False
        case safety.SloViolated():
            text = f"objective {fact.objective} used up its error budget: {fact.value:.4g}, wanted {fact.target:g}"
            return text, True
        case safety.SloRestored():
            return f"objective {fact.objective} is within its error budget again", False
        case _:
            return None


def _of_the_mode(fact: AnyFact) -> tuple[str, bool] | None:
    match fact:
        case safety.ConservativeModeEntered():
            return f"conservative mode began: {', '.join(fact.triggers)}", True
        case safety.ConservativeTriggersAdded():
            return f"conservative mode has more reasons: {', '.join(fact.triggers)}", True
        case safety.ConservativeModeLeft():
            return f"conservative mode ended after {fact.steps} updates and {fact.seconds:.0f} s", False
        case _:
            return None


def _of_measures(fact: AnyFact) -> tuple[str, bool] | None:  # noqa: PLR0911 (a table)
    match fact:
        case safety.ClipTightened():
            return (
                f"a gradient of norm {fact.grad_norm:.4g} exploded: clipped at {fact.factor:g} of the norm",
                True,
            )
        case safety.ClipRelaxed():
            return f"gradients stayed calm: clipped at {fact.factor:g} of the norm", False
        case safety.RateLowered():
            return (
                f"the loss rose for {fact.epochs} epochs: rates are {fact.factor:g} of their schedule",
                True,
            )
        case safety.RateRaised():
            return f"no divergence any more: rates are {fact.factor:g} of their schedule", False
        case safety.BatchShrunk():
            return (
                f"an update did not fit into memory: batches are {fact.factor:g} of what is configured",
                True,
            )
        case safety.BatchGrown():
            return f"updates fit into memory: batches are {fact.factor:g} of what is configured", False
        case safety.GoodStateRestored():
            return f"the last good weights came back: {fact.reason}", True
        case safety.FallbackEntered():
            return f"targets are {fact.targets}: {fact.reason}", True
        case safety.FallbackLeft():
            return "V-trace is trusted again", False
        case safety.TrainingHalted():
            return f"the training halted: {fact.reason}", True
        case safety.TrainingResumed():
            return "the halted training went on", False
        case _:
            return None


def _of_the_curriculum(fact: AnyFact) -> tuple[str, bool] | None:
    match fact:
        case curriculum.CurriculumAdvanced():
            left = f"stage {fact.from_stage!r} was left for {fact.to_stage!r}"
            return f"{left} after {fact.episodes} episodes, success rate {fact.success_rate:.2f}", False
        case curriculum.CurriculumHeld():
            held = f"stage {fact.stage!r} is held: round {fact.rounds} ended after {fact.episodes} episodes"
            return f"{held} with success rate {fact.success_rate:.2f}", True
        case curriculum.CurriculumAnswered():
            asked = f"somebody asked for stage {fact.request.stage!r}, {fact.request.mode.value}"
            refusal = fact.reply.refusal
            return f"{asked}: {'refused, ' + refusal if refusal else 'granted'}", False
        case _:
            return None


def _named(breaker: str) -> str:
    return _NAMES.get(breaker, f"the {breaker}")
