"""Every measure of the failure ladder in real runs: what sets it off, what it does, how it is taken back.

A small world misbehaves at given steps (`unruly`), so gradients explode, losses overflow or rise in an update that a
seed decides; memory runs out where a fault says so. In lockstep each run is made twice: undisturbed, and killed in the
very update, after it was made and before it was appended, or appended and not durable. Both must be equal, and each
journal must replay to the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper_simic.config_safety import TRIGGER_NAMES
from esper_simic.events import LearnerStepped
from esper_simic.safety import StepMode
from esper_simic.safety_facts import (
    BatchGrown,
    BatchShrunk,
    BreakerHalfOpened,
    ClipRelaxed,
    ClipTightened,
    ConservativeModeEntered,
    ConservativeModeLeft,
    FallbackEntered,
    FallbackLeft,
    GoodStateRestored,
    RateLowered,
    RateRaised,
    TrainingHalted,
)
from supervisor.events import TrainingEnded
from supervisor.journal import read
from supervisor.roles.fold import read_state
from tests.prove.deaths import (
    LOCKSTEP,
    UNRULY,
    WITHIN_S,
    assert_replayed,
    assert_same,
    dying,
    failures,
    folded,
    lives,
    mode_at_the_end,
    modes,
    passages,
    records,
    settings_of,
    steps,
    told,
    whole,
)
from tests.prove.test_lockstep import kill_all, last_state, reach
from tests.system.driver import until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(1500)]

Proof = Callable[[str, str], None]

PLAIN: dict[str, Any] = {
    "network": "mlp",
    "activation": "relu",  # what is huge stays huge
    "normalise_observations": "false",
    "batch_size": 16,
}


def unruly(trainer: dict[str, Any], kwargs: str, **others: Any) -> dict[str, Any]:
    """Settings of a run in the unruly world."""
    world = {"environment__id": UNRULY, "environment__kwargs": kwargs}
    return {**world, **settings_of({"simic_trainer": PLAIN | trainer}), **others}


def conditions(run_dir: Path) -> list[LearnerStepped]:
    """The updates that were made, whose metrics tell under which conditions."""
    return [one for one in steps(run_dir) if isinstance(one, LearnerStepped)]


# ---- memory, gradients, losses that are not finite; conservative mode ------------------------------------------------

SHORT = 25
"""The update for which there is no memory."""

EXPLODES, OVERFLOWS = 420, 620
"""Steps at which a number is seen that makes a gradient of thousands, and one that makes an infinite loss."""

MEASURES = unruly(
    {
        "training_breaker_failure_threshold": 1,
        "training_breaker_recovery_timeout_s": 3,
        "circuit_breaker_recovery_timeout_s": 5,
        "conservative_quiet_steps": 5,
        "conservative_quiet_s": 5,
        "error_rate_max": 0.015,
        "max_validation_loss": 5,
        "batch_recovery_steps": 10,
        "clip_recovery_steps": 10,
    },
    f"{{shocks: {{'{EXPLODES}': 20000.0, '{OVERFLOWS}': 1.0e+25}}}}",
    supervisor__max_updates=220,
    **LOCKSTEP,
)


def test_memory_gradients_and_losses(tmp_path: Path, record_proof: Proof) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    runs_short = f"learner:learner.update.half:{SHORT}:memory"
    whole(straight, [runs_short], **MEASURES)

    short, *overflown = failures(straight)
    assert (short.step, short.out_of_memory) == (SHORT, True)
    # How batches lie across unrolls is for the modes before to say: what one step showed may be in two of them.
    first = overflown[0].step
    assert [one.step for one in overflown] in ([first], [first, first + 1])
    assert all(one.reason.startswith("not finite: ") for one in overflown)
    [(shrunk, _)], [(grown, _)] = told(straight, BatchShrunk), told(straight, BatchGrown)
    assert (shrunk, grown) == (SHORT, SHORT + 10)
    tightened, relaxed = told(straight, ClipTightened), told(straight, ClipRelaxed)
    exploded, norm = tightened[0][0], tightened[0][1].grad_norm
    assert norm > 100
    assert len(relaxed) == len(tightened) <= 2
    assert relaxed[-1][1].factor == 1.0
    restored = [(step, fact.reason) for step, fact in told(straight, GoodStateRestored)]
    assert restored == [(one.step, "not_finite") for one in overflown], (
        "no weight had moved when memory ran short"
    )
    assert not short.moved
    fallen = [(step, fact.reason) for step, fact in told(straight, FallbackEntered)]
    assert fallen == [(SHORT, "training_breaker_opened"), (first, "training_breaker_opened")]
    assert len(told(straight, FallbackLeft)) == 2
    assert_effects(straight, [SHORT, exploded, first])
    poisoned = folded(straight, overflown[-1].step).learner.buffer
    assert len(poisoned.barred) >= 16, "the poisonous experience is never drawn again"
    assert mode_at_the_end(straight) == StepMode(), "every measure was taken back"

    # A want of memory is the machine's, no function of the seed; so it dies of that once it is durable.
    plan = [
        runs_short,
        "learner:learner.announce.before:1",
        f"learner:learner.facts.before:{passages(straight, SHORT, exploded)}",
        f"learner:learner.facts.after:{passages(straight, exploded - 1, first)}",
        "learner:recovery.fold.after:1",
    ]
    whole(killed, plan, **MEASURES)
    assert lives(killed) == 3, "of its fourth life the learner died before it had recovered"
    assert_same(straight, killed)
    reports = [assert_replayed(run_dir) for run_dir in (straight, killed)]
    record_proof(
        "Memory, gradients, losses",
        f"{reports[0].steps} updates: no memory in {SHORT}, a gradient of {norm:.0f} in {exploded}, an infinite loss "
        f"in {first}; killed at each of them and in a recovery: all updates, facts and the state's digest equal; "
        f"{reports[1].states_equal} whole states replayed; every measure taken back.",
    )


def assert_effects(run_dir: Path, entered_at: list[int]) -> None:
    """Conservative mode was entered by these updates and left again; in between the updates were careful."""
    entered, left = told(run_dir, ConservativeModeEntered), told(run_dir, ConservativeModeLeft)
    assert [step for step, _ in entered] == entered_at
    assert [fact.triggers for _, fact in entered] == [
        ("high_error_rate", "memory_pressure", "circuit_breaker_open"),
        ("training_instability",),
        ("high_error_rate", "circuit_breaker_open", "training_instability"),
    ]
    assert {*TRIGGER_NAMES} - {name for _, fact in entered for name in fact.triggers} == {"slo_violation"}
    assert len(left) == len(entered_at)
    spans = [range(first + 1, last + 1) for first, (last, _) in zip(entered_at, left, strict=True)]
    careful = set(itertools.chain(*spans))
    for one in conditions(run_dir):
        share = 0.5 if one.step in careful else 1.0
        assert one.metrics["batch_size"] == 16 * share, one.step
        if one.step > 11:  # the warm-up is over
            assert one.metrics["learning_rate.policy"] == pytest.approx(1e-3 * share), one.step


# ---- a loss that rises, ratios that V-trace cannot use ---------------------------------------------------------------

SWELLS = unruly(
    {
        "circuit_breaker_recovery_timeout_s": 5,
        "conservative_mode_triggers": "[]",
        "divergence_epochs": 3,
        "divergence_epoch_updates": 5,
        "divergence_rise_min": 1.0,
        "rate_recovery_epochs": 2,
        "vtrace_log_ratio_max": 0.3,
        "learning_rate": 0.002,
        "lr_schedule": "cosine",  # in the end nothing moves, and a probe of V-trace is sure to go well
        "lr_horizon_updates": 200,
    },
    "{swell: [150, 300, 12.0]}",
    experience_buffer__replay_ratio=0.5,
    supervisor__max_updates=236,
    **LOCKSTEP,
)
"""What is seen grows twelvefold, and with it the loss and how far two policies are apart."""


def test_a_rising_loss_and_ratios_out_of_range(tmp_path: Path, record_proof: Proof) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    whole(straight, **SWELLS)
    restored, lowered = told(straight, GoodStateRestored), told(straight, RateLowered)
    assert {fact.reason for _, fact in restored} == {"diverging"}
    assert [step for step, _ in restored] == [step for step, _ in lowered]
    assert len(lowered) == len(told(straight, RateRaised)) >= 1
    assert lowered[0][1].factor == 0.5
    fallen, risen = told(straight, FallbackEntered), told(straight, FallbackLeft)
    assert {(fact.targets, fact.reason) for _, fact in fallen} == {("td", "vtrace_breaker_opened")}
    assert len(fallen) == len(risen) >= 1
    # Beyond the probes, of which the last one went well.
    tried = {step for step, fact in told(straight, BreakerHalfOpened) if fact.name == "vtrace"}
    spans = [range(first + 1, last) for (first, _), (last, _) in zip(fallen, risen, strict=True)]
    without = {step for step, mode in modes(straight).items() if mode.targets == "td"}
    assert without == {*itertools.chain(*spans)} - tried
    assert mode_at_the_end(straight) == StepMode()

    first, second = sorted((fallen[0][0], lowered[0][0]))
    plan = [
        f"learner:learner.facts.before:{passages(straight, 0, first)}",
        f"learner:learner.facts.after:{passages(straight, first - 1, second)}",
        "learner:recovery.fold.after:1",
    ]
    whole(killed, plan, **SWELLS)
    assert lives(killed) == 2
    assert_same(straight, killed)
    report = assert_replayed(killed)
    record_proof(
        "A rising loss, and V-trace's ratios",
        f"{report.steps} updates: {len(lowered)} restorations with lower rates, {len(fallen)} fallbacks to TD(0), all "
        f"taken back; killed in the midst of them: equal.",
    )


# ---- the halt --------------------------------------------------------------------------------------------------------

HALTS = unruly(
    {
        "training_breaker_failure_threshold": 1,
        "training_breaker_recovery_timeout_s": 3,
        "halt_after_openings": 2,
        "divergence_epoch_updates": 5,
    },
    "{broken_from: 200, broken_by: 1.0e+25}",
    supervisor__max_updates=1000,
    **LOCKSTEP,
)


def test_a_halt_keeps_the_last_good_policy(tmp_path: Path, record_proof: Proof) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    said = whole(straight, code=1, **HALTS)
    assert "the training halted itself" in said
    assert f"next:\n  simic-supervisor run --resume {straight} --train-on\n" in said
    [(halted, fact)] = told(straight, TrainingHalted)
    assert fact.reason == "training_breaker_opened"
    assert [one.step for one in failures(straight)] == [halted - 1, halted]
    assert steps(straight)[-1].step == halted
    # The last epoch that was good ended with an update of this digest.
    good = steps(straight)[-1].digest
    assert good in {one.digest for one in conditions(straight) if one.step % 5 == 0}
    checkpoint = max((straight / "checkpoints").glob("step-*"))
    assert str(checkpoint) in said.replace("\n", "")
    state = read_state(checkpoint)[1]
    assert state.digest == last_state(straight)["state_digest"]
    assert all(
        bool(tensor.isfinite().all()) for tensor in state.tensors.values() if tensor.is_floating_point()
    )

    plan = [
        f"learner:learner.facts.before:{passages(straight, 0, halted - 1)}",
        "learner:learner.facts.after:2",
        "learner:recovery.recovered.after:1",
        "learner:checkpoint.stage.after:1",
    ]
    halts_again = whole(killed, plan, code=1, **HALTS)
    assert "the training halted itself" in halts_again
    assert_same(straight, killed)
    reports = [assert_replayed(run_dir) for run_dir in (straight, killed)]
    before = lives(killed)
    assert "halted itself" in whole(killed, plan, code=1, **HALTS), "whoever resumes it is told so again"
    assert lives(killed) == before + 1
    assert_same(straight, killed)
    record_proof(
        "Halt",
        f"Halted with update {halted}, exit status 1, the last good policy in the last checkpoint; killed when it gave "
        f"way, in its recovery and at its last checkpoint: equal; {reports[1].steps} updates replayed.",
    )


# ---- what is not in lockstep: the clock, and an environment that gives no numbers ------------------------------------


def test_the_time_of_a_training_ends_with_a_checkpoint(tmp_path: Path, record_proof: Proof) -> None:
    run_dir, hours = tmp_path / "run", 6 / 3600
    timed: dict[str, Any] = {"environment__id": "CartPole-v1", "simic_trainer__training_timeout_hours": hours}
    with dying(run_dir, [], **timed) as run:
        reach(run, run_dir, 20)
        kill_all(run)
    said = whole(run_dir, **timed)
    assert f"next:\n  simic-supervisor run --resume {run_dir} --train-on\n" in said
    ended = [
        one.header for one in read(run_dir / "journal" / "supervisor") if one.kind == TrainingEnded.__name__
    ]
    assert [one["reason"] for one in ended] == ["training_timeout"]
    assert lives(run_dir) == 1
    saved = records(run_dir, "CheckpointSaved")[-1].header
    assert saved["step"] == steps(run_dir)[-1].step, "the last checkpoint is of the last update"
    report = assert_replayed(run_dir)
    record_proof(
        "Training timeout", f"Killed once, ended by its time after {report.steps} updates, checkpoint equal."
    )


PAYS_NAN = 60


def test_a_reward_that_is_no_number_ends_its_actors_life_and_nothing_else(
    tmp_path: Path, record_proof: Proof
) -> None:
    """It stops at the world's door, so no update ever meets it; the next life goes on with the next episodes."""
    run_dir = tmp_path / "run"
    broken: dict[str, Any] = {
        "environment__id": UNRULY,
        "environment__kwargs": f"{{pays: {{'{PAYS_NAN}': nan}}}}",
        **settings_of({"simic_trainer": {"network": "lstm"}}),
    }
    with dying(run_dir, ["learner:learner.step.after:15"], **broken) as run:
        until(
            lambda: later_lives(run_dir) == {0, 1} or run.process.poll() is not None, "later lives", WITHIN_S
        )
        reach(run, run_dir, len(steps(run_dir)) + 5)
        run.interrupt()
        assert run.process.wait(WITHIN_S) == 0, run.output
    assert "reward nan" in (run_dir / "logs" / "actor-0.log").read_text("utf-8")
    assert lives(run_dir) == 1
    assert failures(run_dir) == []
    assert records(run_dir, "ExperienceRefused") == []
    report = assert_replayed(run_dir)
    record_proof("Rewards that are NaN", f"Both actors' lives ended by them, {report.steps} updates: equal.")


def later_lives(run_dir: Path) -> set[int]:
    """Actors of whose second life or a later one something was admitted."""
    headers = [one.header for one in records(run_dir, "ExperienceAdmitted")]
    return {header["actor"] for header in headers if header["incarnation"] > 1}
