"""The learner in trouble: what it does about an update that fails, and that a record of it does the same again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from esper_simic.algorithms.impala import impala_loss
from esper_simic.algorithms.ppo import ppo_loss
from esper_simic.errors import ContractError, InvariantViolation
from esper_simic.events import EpisodeFinished, StepFailed
from esper_simic.ladder import Response
from esper_simic.learner import Learner
from esper_simic.learner_state import LearnerState, digest
from esper_simic.rate_facts import RateChanged, Tampered
from esper_simic.replay import GraphExperienceBuffer, Held
from esper_simic.rungs import Rung
from esper_simic.safety import StepInputs, StepMode
from esper_simic.safety_facts import (
    BatchShrunk,
    BreakerOpened,
    ClipTightened,
    ConservativeModeEntered,
    FallbackEntered,
    GoodStateRestored,
    RateLowered,
    TrainingHalted,
)
from esper_simic.step_report import StepReport
from esper_simic.telemetry import StepObserver
from esper_simic.updates import impala as impala_module
from esper_simic.updates import ppo as ppo_module
from esper_simic.updates.batch import Batch
from esper_simic.updates.optimisers import UNWATCHED
from esper_simic.updates.update import Terms, Updated
from tests.policies import vectors
from tests.policies.synthetic import SPEC
from tests.test_learner import LANES, make_config, make_event, make_unroll
from tests.updates import ground

WIDE = (
    "simic_trainer.batch_size=16",
    "experience_buffer.capacity=64",
    "experience_buffer.min_experiences=16",
)
"""A batch that can be halved; half of the replayed ones of a large share are fresh ones whose turn is to come."""

IMITATION = ("simic_trainer.algorithm=BC", "environment.behaviour=heuristic")
ON_POLICY = ("simic_trainer.algorithm=PPO", "experience_buffer.replay_ratio=0")
MINIBATCHES = ("simic_trainer.ppo_minibatches=2", "simic_trainer.ppo_target_kl=null")

EPOCHS = (
    "simic_trainer.divergence_epoch_updates=1",
    "simic_trainer.divergence_epochs=2",
    "simic_trainer.divergence_rise_min=0",
)
"""Every update is an epoch of the divergence check."""


class Script:
    """A learner whose updates fail as told, and all that moved it."""

    def __init__(self, *assignments: str, unrolls: int = 0) -> None:
        self.config = make_config(*assignments)
        self.learner = Learner(self.config, SPEC)
        self.now_s = 1000.0
        self.admitted = 0
        self.reports: list[StepReport] = []
        self.admit(unrolls)

    def admit(self, unrolls: int = 1, episodes: tuple[EpisodeFinished, ...] = ()) -> None:
        for number in range(self.admitted, self.admitted + unrolls):
            self.learner.admit(10 * number, make_event(number, episodes=episodes), make_unroll(number))
        self.admitted += unrolls

    def inputs(self, passed_s: float = 1.0) -> StepInputs:
        self.now_s += passed_s
        return StepInputs(at_s=self.now_s)

    def mode(self, after_s: float = 1.0) -> StepMode:
        return self.learner.mode(self.now_s + after_s)

    def step(self, passed_s: float = 1.0) -> StepReport:
        """One update, admitting what it lacks."""
        inputs = self.inputs(passed_s)
        while not self.learner.can_step():
            self.admit()
        report = self.learner.step(inputs)
        self.reports.append(report)
        return report

    def failing(self, error: Callable[[], Any], *, made: bool = False) -> StepReport:
        """One update that ends in an error, before or after everything has moved."""
        update = self.learner.engine._update

        def broken(batch: Batch, terms: Terms) -> Updated:
            if made:
                update(batch, terms)
            error()
            raise AssertionError("the error did not come")

        self.learner.engine._update = broken
        try:
            return self.step()
        finally:
            self.learner.engine._update = update

    def shown(self, passed_s: float = 1.0, *, value_loss: float) -> StepReport:
        """One update that is made, and says this of itself."""
        update = self.learner.engine._update

        def other(batch: Batch, terms: Terms) -> Updated:
            return dataclasses.replace(update(batch, terms), value_loss=value_loss)

        self.learner.engine._update = other
        try:
            return self.step(passed_s)
        finally:
            self.learner.engine._update = update


def raising(error: Exception) -> Callable[[], Any]:
    def throw() -> Any:
        raise error

    return throw


NOT_FINITE = raising(FloatingPointError("loss inf, gradient norm nan"))
GPU_IS_FULL = raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))


def allocate_too_much() -> Any:
    """What the machine's own allocator says, in its own words."""
    return torch.empty(10**16)


def bits(state: LearnerState) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in state.tensors.items()}


def living(state: LearnerState) -> dict[str, bytes]:
    """Of what an update moves: all but the copies of the good state, and the normaliser, which admissions move."""
    return {name: held for name, held in bits(state).items() if not name.startswith("good.")}


def is_same(one: Learner, two: Learner) -> bool:
    a, b = one.state(), two.state()
    assert a.numbers == b.numbers
    assert bits(a) == bits(b)
    assert a.addresses == b.addresses
    return a.digest == b.digest


def recorded(report: StepReport, inputs: StepInputs) -> StepFailed:
    """The record of a failed update, through its bytes."""
    event = StepFailed(
        step=report.step,
        environment_steps=report.environment_steps,
        digest=report.digest,
        state_digest=report.state_digest,
        reason=report.failure,
        out_of_memory=report.out_of_memory,
        inputs=inputs,
        moved=report.moved,
        facts=list(report.facts),
    )
    return msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=StepFailed)


def reloaded(learner: Learner) -> Learner:
    """A learner of the same configuration that got the state through bytes."""
    state = learner.state().copy()
    numbers, addresses = json.loads(json.dumps(state.numbers)), json.loads(json.dumps(state.addresses))
    other = Learner(learner._config, SPEC)
    held = [Held(make_unroll(position // 10), 0, position) for position in addresses["buffer"]["positions"]]
    other.load_state(LearnerState(state.tensors, numbers, addresses), held)
    return other


# -- what is not finite ------------------------------------------------------------------------------------------------


def test_an_infinite_loss_takes_back_the_weights_and_bars_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(unrolls=4)
    beginning = bits(Learner(script.config, SPEC).state())
    batch = script.learner.next_batch()

    def infinite(**arguments: Any) -> Any:
        loss = impala_loss(**arguments)
        return dataclasses.replace(loss, total=loss.total * torch.inf)

    with monkeypatch.context() as patch:
        patch.setattr(impala_module, "impala_loss", infinite)
        report = script.step()
    assert report.failure.startswith("not finite: loss ")
    assert (report.step, report.out_of_memory, report.metrics) == (1, False, {})
    assert GoodStateRestored(reason="not_finite") in report.facts
    assert ConservativeModeEntered(triggers=("training_instability",), entries=1) in report.facts
    assert living(script.learner.state()) == beginning, "it was the first update: nothing better is known"
    assert script.learner.buffer.barred == sorted(set(batch.serials.tolist()))
    assert script.learner.buffer.consumed >= 8 + batch.fresh, "the batch is consumed"
    assert script.learner.steps_done == 1
    assert script.step().failure == ""


def test_the_good_state_comes_back_bit_for_bit() -> None:
    script = Script(*EPOCHS, unrolls=4)
    script.shown(value_loss=3.0)  # the first epoch is compared with nothing: it is good
    kept = living(script.learner.state())
    good = {name.removeprefix("good."): held for name, held in bits(script.learner.state()).items()}
    assert kept.items() <= good.items()
    script.shown(value_loss=4.0)  # rises: not kept
    assert living(script.learner.state()) != kept
    report = script.failing(NOT_FINITE, made=True)
    assert report.failure
    assert living(script.learner.state()) == kept
    assert report.digest == digest(dict(script.learner.policy.named_parameters()))


def test_a_barred_batch_is_never_drawn_again() -> None:
    script = Script("experience_buffer.replay_ratio=0.75", unrolls=8)
    batch = script.learner.next_batch()
    assert (batch.serials >= script.learner.buffer.consumed + batch.fresh).any(), (
        "some had their turn to come"
    )
    script.failing(NOT_FINITE)
    barred = set(batch.serials.tolist())
    seen: set[int] = set()
    for _ in range(40):
        while not script.learner.can_step():
            script.admit()
        mode = script.mode()
        seen |= set(script.learner.next_batch(mode.batch_size(8)).serials.tolist())
        assert not script.step().failure
        assert not seen & barred
    assert script.learner.buffer.barred == [], "they left the buffer, and the list with it"


def test_weights_that_are_not_finite_after_an_update_are_a_failure() -> None:
    script = Script(unrolls=4)
    update = script.learner.engine._update

    def spoiling(batch: Batch, terms: Terms) -> Updated:
        updated = update(batch, terms)
        with torch.no_grad():
            next(iter(terms.policy.parameters())).view(-1)[0] = torch.nan
        return updated

    script.learner.engine._update = spoiling
    report = script.step()
    assert "not finite after the update" in report.failure
    assert all(bool(tensor.isfinite().all()) for tensor in script.learner.state().tensors.values())


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        GPU_IS_FULL,
        allocate_too_much,
        raising(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.")),
        raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
        raising(RuntimeError("CUDA error: out of memory")),
    ],
    ids=["gpu", "this machine", "other systems", "a gpu's library", "a gpu's driver"],
)
def test_an_update_that_does_not_fit_is_tried_smaller(error: Callable[[], Any]) -> None:
    script = Script(*WIDE, unrolls=8)
    consumed = script.learner.buffer.consumed
    report = script.failing(error)
    assert report.failure.startswith("out of memory: ")
    assert report.out_of_memory
    assert {type(fact) for fact in report.facts} == {BatchShrunk, ConservativeModeEntered}
    assert BatchShrunk(factor=0.5) in report.facts
    assert (script.learner.buffer.consumed, script.learner.buffer.barred) == (consumed, [])
    assert script.mode().batch_size(16) == 8
    assert script.step().metrics["batch_size"] == 8


def test_an_optimiser_that_runs_short_leaves_no_half_of_an_update() -> None:
    """The policy had its step, the values had not."""
    script = Script(*EPOCHS, unrolls=8)
    script.shown(value_loss=3.0)
    script.shown(value_loss=4.0)
    kept = {
        name.removeprefix("good."): held
        for name, held in bits(script.learner.state()).items()
        if name.startswith("good.")
    }
    rates, step = script.learner.learning_rates.state_dict(), script.learner.learning_rates.step

    def short(name: str, **arguments: Any) -> Any:
        if name == "value":
            GPU_IS_FULL()
        return step(name, **arguments)

    script.learner.learning_rates.step = short  # type: ignore[method-assign]
    report = script.step()
    assert report.out_of_memory
    assert living(script.learner.state()) == kept
    assert script.learner.learning_rates.state_dict() == rates, "it counts for no schedule"


def test_another_error_is_nobodys_to_handle() -> None:
    script = Script(unrolls=4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        script.failing(raising(RuntimeError("size mismatch")))


def test_without_inputs_a_failure_is_an_error() -> None:
    script = Script(unrolls=4)
    script.learner.engine._update = lambda batch, terms: GPU_IS_FULL()
    with pytest.raises(InvariantViolation, match="step 1: out of memory: CUDA"):
        script.learner.step()


# -- what is too large, or grows ---------------------------------------------------------------------------------------


def test_an_exploding_gradient_tightens_the_clip() -> None:
    script = Script("simic_trainer.value_coefficient=10000", unrolls=4)
    assert script.mode().clip_factor == 1.0
    report = script.step()
    norm = report.metrics["grad_norm"]
    assert norm > 100
    assert not report.failure
    assert ClipTightened(factor=0.5, grad_norm=norm) in report.facts
    assert script.mode().clip_factor == 0.5
    norms: list[float] = []
    minimise = script.learner.engine.optimisers.minimise

    def listening(loss: torch.Tensor, *, max_norm: float, observer: StepObserver = UNWATCHED) -> float:
        norms.append(max_norm)
        return minimise(loss, max_norm=max_norm, observer=observer)

    script.learner.engine.optimisers.minimise = listening  # type: ignore[method-assign]
    script.step()
    assert norms == [0.25], "half of max_grad_norm"


def test_a_loss_that_keeps_rising_takes_the_training_back_and_slows_it() -> None:
    script = Script(*EPOCHS, "simic_trainer.conservative_mode_triggers=[]", unrolls=4)
    first = script.shown(value_loss=1.0)
    kept = living(script.learner.state())
    assert script.learner.safety.ladder.epoch.before == pytest.approx(1.0 + abs(first.metrics["policy_loss"]))
    script.shown(value_loss=5.0)
    report = script.shown(value_loss=9.0)
    assert not report.failure, "the update was made"
    assert report.facts == (GoodStateRestored(reason="diverging"), RateLowered(factor=0.5, epochs=2))
    assert living(script.learner.state()) == kept
    assert script.mode().lr_factor == 0.5
    report = script.shown(value_loss=1.0)
    changed = [fact for fact in report.facts if isinstance(fact, RateChanged)]
    assert [(fact.name, fact.causes) for fact in changed] == [("policy", ["factor"]), ("value", ["factor"])]
    assert report.metrics["learning_rate.policy"] == changed[0].after == pytest.approx(3e-4 / 2)


def test_a_rate_that_somebody_else_wrote_is_told() -> None:
    script = Script(unrolls=8)
    script.learner.engine.optimisers._by_name["policy"].param_groups[0]["lr"] = 7.0
    report = script.step()
    (fact,) = [fact for fact in report.facts if isinstance(fact, Tampered)]
    assert (fact.name, fact.found) == ("policy", 7.0)


def test_an_update_that_was_not_made_has_changed_no_rate() -> None:
    script = Script(*WIDE, unrolls=8)
    script.failing(GPU_IS_FULL)
    assert script.mode().lr_factor == 0.5
    report = script.failing(NOT_FINITE, made=True)
    assert not any(isinstance(fact, RateChanged) for fact in report.facts)
    report = script.step()
    assert sum(isinstance(fact, RateChanged) for fact in report.facts) == 2, "now it was"


# -- giving way --------------------------------------------------------------------------------------------------------

FRAIL = ("simic_trainer.training_breaker_failure_threshold=1", "simic_trainer.halt_after_openings=2")


def test_a_training_that_always_fails_waits_gives_way_and_halts() -> None:
    script = Script(*FRAIL, unrolls=4)
    report = script.failing(NOT_FINITE)
    assert BreakerOpened(name="training", failures=1) in report.facts
    assert FallbackEntered(targets="td", reason="training_breaker_opened") in report.facts
    assert not script.mode(59.0).may_step
    with pytest.raises(InvariantViolation, match="training breaker OPEN; ask plan first"):
        script.step()
    assert script.mode(60.0).may_step
    script.now_s += 60.0
    report = script.failing(NOT_FINITE)
    assert TrainingHalted(reason="training_breaker_opened") in report.facts
    mode = script.mode(1e9)
    assert (mode.may_step, mode.is_halted) == (False, True)
    assert script.learner.safety.ladder.standing.rung is Rung.HALTED
    assert living(script.learner.state()) == bits(Learner(script.config, SPEC).state()), (
        "the last good policy"
    )
    script.admit(2)
    other = reloaded(script.learner)
    assert other.can_step()
    assert other.mode(1e9 + script.now_s) == mode, "nor after a restart"
    with pytest.raises(InvariantViolation, match="HALTED"):
        other.step(StepInputs(at_s=1e12))


def test_what_the_next_updates_terms_say_moves_nothing_now() -> None:
    """The learner itself restores, bars and keeps; the rest of the ladder is in the `StepMode` that follows."""
    planned = (Response.SHRINK, Response.TIGHTEN_CLIP, Response.LOWER_RATE)
    handled = {Response.RESTORE, Response.SKIP, Response.KEEP, Response.HALT}
    assert handled | set(planned) == set(Response)
    script = Script(unrolls=4)
    script.step()
    before = script.learner.state().digest
    script.learner._respond(planned, script.learner.buffer.read(torch.arange(8).numpy(), 0))
    assert script.learner.state().digest == before


@pytest.mark.parametrize("response", [Response.RESTORE, Response.HALT])
def test_a_halt_leaves_the_last_good_policy(response: Response) -> None:
    script = Script(*EPOCHS, unrolls=4)
    script.shown(value_loss=1.0)
    kept = living(script.learner.state())
    script.shown(value_loss=2.0)
    assert living(script.learner.state()) != kept
    script.learner._respond((response,), script.learner.buffer.read(torch.arange(8).numpy(), 0))
    assert living(script.learner.state()) == kept


def test_on_td_the_targets_are_one_step_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[str] = []

    def listening(**arguments: Any) -> Any:
        targets.append(arguments["targets"])
        return impala_loss(**arguments)

    monkeypatch.setattr(impala_module, "impala_loss", listening)
    script = Script(*FRAIL, unrolls=8)
    script.step()
    script.failing(NOT_FINITE)
    script.step(passed_s=61.0)
    assert targets == ["vtrace", "td"]


# -- the record of a failure is the failure ----------------------------------------------------------------------------


class Trouble:
    """A way to fail, by an algorithm, and what has moved by then."""

    def __init__(self, name: str, error: Callable[[], Any], *assignments: str, made: bool = False) -> None:
        self.name, self.error, self.assignments, self.made = name, error, assignments, made


TROUBLES = [
    Trouble("not finite", NOT_FINITE),
    Trouble("not finite after it was made", NOT_FINITE, made=True),
    Trouble("no memory", GPU_IS_FULL, *WIDE),
    Trouble("no memory after it was made", GPU_IS_FULL, *WIDE, made=True),
    Trouble("PPO", NOT_FINITE, *ON_POLICY, *MINIBATCHES, made=True),
    Trouble(
        "BC",
        NOT_FINITE,
        *IMITATION,
        made=True,
    ),
    Trouble("IQL", NOT_FINITE, "simic_trainer.algorithm=IQL", made=True),
    Trouble("halting", NOT_FINITE, *FRAIL),
]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.name)
@pytest.mark.parametrize("steps", [0, 2])
def test_the_record_gives_the_very_state_that_the_failure_gave(trouble: Trouble, steps: int) -> None:
    scripts = [Script(*trouble.assignments, unrolls=8) for _ in range(2)]
    live, folded = scripts
    for script in scripts:
        for _ in range(steps):
            assert not script.step().failure
        while not script.learner.can_step():
            script.admit()
    report = live.failing(trouble.error, made=trouble.made)
    event = recorded(report, StepInputs(at_s=live.now_s))
    folded.now_s = live.now_s
    assert folded.learner.fail(event) == report
    assert is_same(folded.learner, live.learner)
    assert event.digest == digest(dict(folded.learner.policy.named_parameters()))
    if live.mode().may_step:
        for script in scripts:
            script.step()
        assert is_same(folded.learner, live.learner)


def test_a_minibatch_that_fails_after_others_were_made_is_folded_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = (*ON_POLICY, *MINIBATCHES, "simic_trainer.ppo_epochs=2")
    live, folded = Script(*settings, unrolls=8), Script(*settings, unrolls=8)
    live.step()
    folded.step()
    calls: list[int] = []

    def third_is_infinite(**arguments: Any) -> Any:
        calls.append(1)
        loss = ppo_loss(**arguments)
        return dataclasses.replace(loss, total=loss.total * torch.inf) if len(calls) == 3 else loss

    with monkeypatch.context() as patch:
        patch.setattr(ppo_module, "ppo_loss", third_is_infinite)
        report = live.step()
    assert (len(calls), report.failure[:10]) == (3, "not finite")
    while not folded.learner.can_step():
        folded.admit()
    assert folded.learner.fail(recorded(report, StepInputs(at_s=live.now_s))) == report
    assert is_same(folded.learner, live.learner)


def test_a_record_of_a_failure_without_its_experience_breaks_an_invariant() -> None:
    script = Script(unrolls=4)
    report = script.failing(NOT_FINITE)
    event = recorded(report, StepInputs(at_s=script.now_s))
    with pytest.raises(InvariantViolation, match="step without enough experience"):
        Learner(script.config, SPEC).fail(event)


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["IMPALA", "PPO", "APPO", "BC", "IQL"])
def test_a_state_in_trouble_survives_its_bytes(algorithm: str) -> None:
    settings = [*WIDE, *EPOCHS, f"simic_trainer.algorithm={algorithm}"]
    if algorithm == "PPO":
        settings += ["experience_buffer.replay_ratio=0", "supervisor.unrolls_in_flight=4"]
    if algorithm == "BC":
        settings += IMITATION
    script = Script(*settings, unrolls=12)
    script.shown(value_loss=2.0)
    script.shown(value_loss=3.0)
    script.failing(NOT_FINITE, made=True)
    script.failing(GPU_IS_FULL)
    script.admit(1, (ended(2.5), ended(9.0, cut=True), ended(7.0, cut=None)))
    numbers = script.learner.state().numbers
    assert numbers["buffer"]["barred"]
    assert numbers["safety"]["ladder"]["batch"]["level"] == 1
    assert numbers["returns_since"] == [2.5], "of whole ones; whoever wrote no `cut` knew no safety"
    assert [episode.episode_return for episode in script.learner.ledger.episodes] == [2.5, 7.0]
    other = reloaded(script.learner)
    assert is_same(other, script.learner)
    assert other.safety == script.learner.safety
    one, two = script.learner.step(script.inputs()), other.step(StepInputs(at_s=script.now_s))
    assert one == two
    assert is_same(other, script.learner)
    assert "returns_since" not in other.state().numbers


def ended(episode_return: float, *, cut: bool | None = False) -> EpisodeFinished:
    return EpisodeFinished(
        lane=0,
        number=0,
        episode_return=episode_return,
        length=60,
        truncated=False,
        success=True,
        cut=cut,
    )


def test_the_good_state_is_part_of_the_digest() -> None:
    script = Script(*EPOCHS, unrolls=4)
    script.step()
    before = script.learner.state().digest
    held = script.learner.state().tensors["good.policy.normaliser.globals_count"]
    held += 1
    assert script.learner.state().digest != before
    held -= 1
    assert script.learner.state().digest == before


def test_what_is_barred_is_part_of_the_digest() -> None:
    script = Script(unrolls=4)
    before = script.learner.state()
    assert "barred" not in before.numbers["buffer"], "of older journals no digest changes"
    script.learner.buffer.bar([3])
    assert script.learner.state().digest != before.digest


@pytest.mark.parametrize(
    "damage",
    [
        {"safety": {"clock": {"reading_s": "late"}}},
        {"learning_rates": {"policy": 1}},
        {"learning_rates": {"policy": -1, "value": 1}},
    ],
    ids=["safety", "other optimisers", "steps"],
)
def test_numbers_that_are_none_of_a_learner_are_refused(damage: dict[str, Any]) -> None:
    script = Script(unrolls=4)
    state = script.learner.state().copy()
    broken = LearnerState(state.tensors, state.numbers | damage, state.addresses)
    with pytest.raises(ContractError, match="not one of a learner so configured"):
        Learner(script.config, SPEC).load_state(broken, [])


def test_a_state_of_another_algorithm_is_refused() -> None:
    state = Script("simic_trainer.algorithm=IQL").learner.state().copy()
    with pytest.raises(ContractError, match="not one of a learner so configured"):
        Script().learner.load_state(state, [])


# -- in lockstep -------------------------------------------------------------------------------------------------------


def test_lockstep_time_is_a_second_an_update_whatever_the_clocks_say() -> None:
    script = Script(unrolls=8)
    assert script.learner.lockstep_time_s() == 1.0
    for expected in (1.0, 2.0):
        report = script.learner.step(StepInputs(at_s=script.learner.lockstep_time_s()))
        assert not report.failure
        assert script.learner.safety.clock.reading_s == expected
    assert reloaded(script.learner).lockstep_time_s() == 3.0


def test_lockstep_time_passes_over_the_wait_for_a_breaker_and_over_no_halt() -> None:
    script = Script(*FRAIL, unrolls=8)
    script.learner.engine._update = lambda batch, terms: NOT_FINITE()
    assert script.learner.step(StepInputs(at_s=script.learner.lockstep_time_s())).failure
    assert not script.learner.mode(2.0).may_step
    assert script.learner.lockstep_time_s() == 62.0
    assert script.learner.mode(62.0).may_step
    script.admit(2)
    assert script.learner.step(StepInputs(at_s=62.0)).failure
    assert script.learner.lockstep_time_s() == 63.0
    assert script.learner.mode(63.0).is_halted


def test_a_smaller_batch_takes_less_fresh_experience() -> None:
    script = Script(*WIDE, unrolls=6)
    assert (script.learner.buffer.fresh, script.learner.can_step(), script.learner.can_step(8)) == (
        8,
        False,
        True,
    )
    with pytest.raises(InvariantViolation, match="ask can_step first"):
        script.learner.next_batch()
    assert script.learner.next_batch(8).fresh == 6
    script.learner.safety = msgspec.structs.replace(
        script.learner.safety,
        ladder=msgspec.structs.replace(
            script.learner.safety.ladder,
            batch=msgspec.structs.replace(script.learner.safety.ladder.batch, level=1),
        ),
    )
    report = script.learner.step(script.inputs())
    assert (report.metrics["batch_size"], report.unrolls_consumed) == (8.0, (40,))
    assert script.learner.buffer.fresh == 2 == 6 * LANES - 16 - 6


# -- what is barred ----------------------------------------------------------------------------------------------------


def full(capacity: int = 16, lanes: int = 16, consumed: int = 0) -> GraphExperienceBuffer:
    buffer = GraphExperienceBuffer(capacity, vectors.ONE, 3, 0)
    policy = vectors.make(vectors.ONE, hidden_size=8)
    for position in range(0, lanes, 4):
        buffer.insert(ground.unroll(policy, position, 3, 4), 7, 100 + position)
    buffer.consume(consumed)
    return buffer


def draw(buffer: GraphExperienceBuffer, size: int, fresh: int, seed: int = 0) -> list[int]:
    return [int(serial) for serial in buffer.choose(size, fresh, rng=np.random.default_rng(seed))]


def test_barred_ones_are_not_drawn_and_the_others_are_drawn_without_repeats() -> None:
    buffer = full(consumed=8)
    buffer.bar([0, 3, 9, 12])
    for seed in range(50):
        drawn = draw(buffer, 8, 3, seed)
        assert drawn[:2] == [8, 10], "of the three oldest fresh ones, one is barred"
        assert not set(drawn) & {0, 3, 9, 12}
        assert len(set(drawn)) == 8
    assert {serial for seed in range(50) for serial in draw(buffer, 8, 3, seed)} == set(range(16)) - {
        0,
        3,
        9,
        12,
    }


def test_where_too_few_are_sound_they_are_drawn_again() -> None:
    buffer = full(consumed=8)
    buffer.bar([*range(8), 12, 13, 14, 15])
    drawn = draw(buffer, 8, 2)
    assert drawn[:2] == [8, 9]
    assert set(drawn) <= {8, 9, 10, 11}
    assert len(drawn) == 8


def test_the_oldest_fresh_one_is_never_a_barred_one() -> None:
    buffer = full(consumed=8)
    buffer.bar([8, 9, 11])
    assert (buffer.consumed, buffer.fresh) == (10, 6), "at the head they count as consumed at once"
    buffer.consume(1)
    assert buffer.consumed == 12
    buffer.bar(range(16))
    assert (buffer.consumed, buffer.fresh) == (16, 0)
    buffer.insert(ground.unroll(vectors.make(vectors.ONE, hidden_size=8), 9, 3, 4), 8, 116)
    assert buffer.barred == list(range(4, 16)), "what was overwritten is forgotten"
    assert draw(buffer, 8, 4)[:4] == [16, 17, 18, 19]
    assert set(draw(buffer, 8, 4)) == {16, 17, 18, 19}


def test_what_is_held_no_more_is_not_barred() -> None:
    buffer = full(consumed=16)
    buffer.insert(ground.unroll(vectors.make(vectors.ONE, hidden_size=8), 9, 3, 4), 8, 116)
    buffer.bar([1, 2, 3, 4])
    assert buffer.barred == [4]


def test_where_nothing_is_sound_there_is_no_batch() -> None:
    buffer = full(consumed=16)
    buffer.bar(range(16))
    with pytest.raises(InvariantViolation, match="all 16 experiences are barred"):
        buffer.choose(8, 0, rng=np.random.default_rng(0))


def test_a_restored_buffer_bars_the_same() -> None:
    policy = vectors.make(vectors.ONE, hidden_size=8)
    buffer = full(consumed=9)
    buffer.bar([2, 11, 15])
    other = GraphExperienceBuffer(16, vectors.ONE, 3, 0)
    held = [Held(ground.unroll(policy, position, 3, 4), 7, 100 + position) for position in range(0, 16, 4)]
    other.restore(0, buffer.inserted, buffer.consumed, held, json.loads(json.dumps(buffer.barred)))
    assert (other.barred, other.consumed, other.fresh) == (buffer.barred, 9, 7)
    for seed in range(10):
        assert draw(other, 8, 4, seed) == draw(buffer, 8, 4, seed)


def test_without_bars_batches_are_drawn_as_ever() -> None:
    """Kept journals are replayed for ever: another draw would be another training."""
    buffer, twin = full(consumed=8), full(consumed=8)
    twin.bar([])
    assert draw(buffer, 8, 2) == draw(twin, 8, 2)


class Barring(RuleBasedStateMachine):
    """A buffer that is filled, learned from, and now and then comes to grief."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = GraphExperienceBuffer(16, vectors.ONE, 1, 0)
        self.unroll = ground.unroll(vectors.make(vectors.ONE, hidden_size=8), 0, 1, 4)
        self.ever_barred: set[int] = set()

    @rule()
    def insert(self) -> None:
        if self.buffer.fresh + 4 <= self.buffer.capacity:
            self.buffer.insert(self.unroll, 0, self.buffer.inserted)

    @rule(fresh=st.integers(1, 6), more=st.integers(0, 6), seed=st.integers(0, 99), sound=st.booleans())
    def learn(self, fresh: int, more: int, seed: int, sound: bool) -> None:
        if self.buffer.fresh < fresh:
            return
        serials = self.buffer.choose(fresh + more, fresh, rng=np.random.default_rng(seed))
        assert len(serials) == fresh + more
        assert not set(serials.tolist()) & self.ever_barred
        assert serials[0] == self.buffer.consumed
        before = self.buffer.consumed
        self.buffer.consume(fresh)
        assert self.buffer.consumed >= before + fresh
        if not sound:
            self.buffer.bar(serials.tolist())
            self.ever_barred |= set(serials.tolist())

    @invariant()
    def the_head_is_sound(self) -> None:
        buffer = self.buffer
        oldest = buffer.inserted - len(buffer)
        assert buffer.barred == sorted(serial for serial in self.ever_barred if serial >= oldest)
        assert oldest <= buffer.consumed <= buffer.inserted
        assert buffer.fresh == 0 or buffer.consumed not in buffer.barred


TestBarring = Barring.TestCase
TestBarring.settings = settings(max_examples=30, stateful_step_count=30)
