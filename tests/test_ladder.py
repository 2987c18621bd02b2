"""The ladder of failures: every measure from trouble to recovery, and the rungs below them."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic import ladder as ladders
from esper_simic.config_safety import SafetyKeys
from esper_simic.errors import InvariantViolation
from esper_simic.ladder import (
    FAILURES,
    LEVEL_MAX,
    RESPONSES,
    Climbed,
    Ladder,
    Measure,
    Response,
    Trouble,
    Update,
    classify,
    observe,
)
from esper_simic.rungs import RUNGS, BreakerMoves, Rung, Standing, Step, next_rung
from esper_simic.safety_facts import (
    BatchGrown,
    BatchShrunk,
    ClipRelaxed,
    ClipTightened,
    FallbackEntered,
    FallbackLeft,
    GoodStateRestored,
    LadderFact,
    RateLowered,
    RateRaised,
    TrainingHalted,
    TrainingResumed,
)

KEYS = SafetyKeys(
    clip_recovery_steps=2,
    batch_recovery_steps=3,
    divergence_epochs=3,
    divergence_epoch_updates=2,
    rate_recovery_epochs=2,
    restores_max=4,
)
OPENED = BreakerMoves(training_opened=True)
NO_MOVES = BreakerMoves()
FOOT = Ladder()


def calm(loss: float = 0.1) -> Update:
    return Update(trouble=Trouble.NONE, loss=loss)


def failure(trouble: Trouble, breakers: BreakerMoves = NO_MOVES) -> Update:
    return Update(trouble=trouble, loss=None, breakers=breakers)


def explosion(grad_norm: float = 101.0) -> Update:
    return Update(trouble=Trouble.EXPLODING, loss=0.1, grad_norm=grad_norm)


def climb(*updates: Update, start: Ladder = FOOT, keys: SafetyKeys = KEYS) -> Climbed:
    """Fold them all; facts and responses of all of them."""
    facts: list[LadderFact] = []
    responses: list[Response] = []
    ladder = start
    for update in updates:
        ladder, new, todo = observe(keys, ladder, update)
        facts += new
        responses += todo
    return Climbed(ladder, facts, tuple(responses))


def epochs(*losses: float) -> list[Update]:
    return [calm(loss) for loss in losses for _ in range(2)]


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", Step)
@pytest.mark.parametrize("rung", Rung)
def test_a_step_is_in_the_table_or_illegal(rung, step):
    legal = {
        (Rung.VTRACE, Step.FALL): Rung.TD,
        (Rung.TD, Step.RISE): Rung.VTRACE,
        (Rung.TD, Step.HALT): Rung.HALTED,
        (Rung.HALTED, Step.RESUME): Rung.TD,
    }
    assert legal == RUNGS
    if (rung, step) in legal:
        assert next_rung(rung, step) is legal[rung, step]
    else:
        with pytest.raises(InvariantViolation, match=f"cannot {step.name} from {rung.name}"):
            next_rung(rung, step)


def test_every_trouble_has_its_responses():
    assert {
        Trouble.NONE: (),
        Trouble.OUT_OF_MEMORY: (Response.SHRINK,),
        Trouble.NOT_FINITE: (Response.RESTORE, Response.SKIP),
        Trouble.EXPLODING: (Response.TIGHTEN_CLIP,),
        Trouble.DIVERGING: (Response.RESTORE, Response.LOWER_RATE),
    } == RESPONSES
    assert set(RESPONSES) == set(Trouble)
    assert {Trouble.OUT_OF_MEMORY, Trouble.NOT_FINITE} == FAILURES


@pytest.mark.parametrize(
    ("out_of_memory", "finite", "grad_norm", "trouble"),
    [
        (False, True, 100.0, Trouble.NONE),
        (False, True, 100.1, Trouble.EXPLODING),
        (False, False, 100.1, Trouble.NOT_FINITE),
        (True, False, 100.1, Trouble.OUT_OF_MEMORY),
    ],
)
def test_the_most_severe_trouble_is_the_one(out_of_memory, finite, grad_norm, trouble):
    seen = classify(SafetyKeys(), out_of_memory=out_of_memory, finite=finite, grad_norm=grad_norm)
    assert seen is trouble


# -- measures ----------------------------------------------------------------------------------------------------------


def test_an_explosion_tightens_the_clip_and_calm_relaxes_it():
    ladder, facts, responses = climb(explosion(150.0))
    assert facts == [ClipTightened(factor=0.5, grad_norm=150.0)]
    assert responses == (Response.TIGHTEN_CLIP,)
    assert ladders.clip_factor(KEYS, ladder) == 0.5
    ladder, facts, responses = climb(explosion(), start=ladder)
    assert facts == [ClipTightened(factor=0.25, grad_norm=101.0)]
    assert Response.TIGHTEN_CLIP in responses
    ladder, facts, _ = climb(calm(), calm(), start=ladder)
    assert facts == [ClipRelaxed(factor=0.5)]
    ladder, facts, _ = climb(calm(), start=ladder)
    assert facts == []
    ladder, facts, _ = climb(calm(), calm(), calm(), start=ladder)
    assert facts == [ClipRelaxed(factor=1.0)]
    assert ladder.clip == Measure()


def test_the_clip_has_a_hardest_level_and_failed_updates_do_not_calm_it():
    ladder, facts, _ = climb(*[explosion()] * (LEVEL_MAX + 2))
    assert ladders.clip_factor(KEYS, ladder) == 0.5**LEVEL_MAX
    assert sum(isinstance(fact, ClipTightened) for fact in facts) == LEVEL_MAX
    after, _, _ = climb(failure(Trouble.NOT_FINITE), failure(Trouble.OUT_OF_MEMORY), start=ladder)
    assert after.clip == ladder.clip


def test_out_of_memory_halves_the_batch_and_fitting_grows_it():
    ladder, facts, responses = climb(failure(Trouble.OUT_OF_MEMORY))
    assert facts == [BatchShrunk(factor=0.5)]
    assert responses == (Response.SHRINK,)
    ladder, facts, _ = climb(failure(Trouble.OUT_OF_MEMORY), start=ladder)
    assert facts == [BatchShrunk(factor=0.25)]
    assert ladders.batch_factor(ladder) == 0.25
    ladder, facts, _ = climb(calm(), failure(Trouble.NOT_FINITE), explosion(), start=ladder)
    assert BatchGrown(factor=0.5) in facts
    ladder, facts, _ = climb(*[calm()] * 3, start=ladder)
    assert BatchGrown(factor=1.0) in facts
    assert ladder.batch == Measure()


def test_the_batch_has_a_smallest_level():
    ladder, facts, _ = climb(*[failure(Trouble.OUT_OF_MEMORY)] * (LEVEL_MAX + 2))
    assert ladders.batch_factor(ladder) == 0.5**LEVEL_MAX
    assert len(facts) == LEVEL_MAX


def test_what_is_not_finite_is_restored_and_its_batch_skipped():
    ladder, facts, responses = climb(calm(), failure(Trouble.NOT_FINITE))
    assert facts == [GoodStateRestored(reason="not_finite")]
    assert responses == (Response.RESTORE, Response.SKIP)
    assert ladder.restores == 1
    assert ladder.epoch.updates == 0, "older weights begin the epoch anew"
    ladder, facts, responses = climb(*epochs(0.1), start=ladder)
    assert responses == (Response.KEEP,)
    assert ladder.restores == 0


# -- divergence --------------------------------------------------------------------------------------------------------


def test_a_state_is_kept_at_the_end_of_each_epoch_that_did_not_rise():
    ladder, kept = Ladder(), []
    for loss in (1.0, 1.0, 0.9, 1.2, 1.1):
        ladder, _, first = observe(KEYS, ladder, calm(loss))
        assert first == ()
        ladder, _, second = observe(KEYS, ladder, calm(loss))
        kept.append(Response.KEEP in second)
    assert kept == [True, True, True, False, True]
    assert ladder.slope == pytest.approx((1.1 - 1.2) / 2)


def test_a_rising_loss_restores_and_lowers_the_rate_and_calm_epochs_raise_it():
    ladder, facts, responses = climb(*epochs(1.0, 1.1, 1.2))
    assert facts == []
    ladder, facts, responses = climb(*epochs(1.3), start=ladder)
    assert facts == [GoodStateRestored(reason="diverging"), RateLowered(factor=0.5, epochs=3)]
    assert responses == (Response.RESTORE, Response.LOWER_RATE)
    assert ladders.lr_factor(KEYS, ladder) == 0.5
    ladder, facts, responses = climb(*epochs(1.0), start=ladder)
    assert facts == []
    assert responses == (Response.KEEP,), "there is nothing to compare the first epoch with"
    ladder, facts, _ = climb(*epochs(1.1, 1.2), start=ladder)
    assert facts == [], "an epoch that rises is not calm"
    ladder, facts, _ = climb(*epochs(1.1), start=ladder)
    assert facts == [RateRaised(factor=1.0)]
    assert ladder.rate == Measure()


def test_one_epoch_that_falls_ends_the_rise():
    _, facts, _ = climb(*epochs(1.0, 1.1, 1.2, 1.19, 1.3, 1.4, 1.39))
    assert facts == []


def test_a_rise_of_nothing_is_no_divergence_until_it_is_something():
    ladder, facts, _ = climb(*epochs(1.0, 1.01, 1.02, 1.03, 1.09))
    assert facts == []
    _, facts, _ = climb(*epochs(1.11), start=ladder)
    assert RateLowered(factor=0.5, epochs=5) in facts


def test_the_default_is_ten_epochs_of_a_hundred_updates():
    keys = SafetyKeys()
    rise = [calm(1.0 + 0.05 * n) for n in range(11) for _ in range(100)]
    _, facts, _ = climb(*rise[:-1], keys=keys)
    assert facts == []
    _, facts, _ = climb(*rise, keys=keys)
    assert RateLowered(factor=0.5, epochs=10) in facts


def test_an_update_that_failed_in_an_epoch_is_not_in_its_loss():
    ladder, _, _ = climb(calm(1.0), failure(Trouble.OUT_OF_MEMORY), calm(1.0))
    assert ladder.epoch.before == 1.0


# -- rungs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moves", "reason"),
    [
        (BreakerMoves(vtrace_opened=True), "vtrace_breaker_opened"),
        (BreakerMoves(training_opened=True), "training_breaker_opened"),
        (BreakerMoves(training_opened=True, vtrace_opened=True), "training_breaker_opened"),
    ],
)
def test_a_breaker_that_opens_takes_v_trace_away_and_its_probe_brings_it_back(moves, reason):
    ladder, facts, responses = climb(failure(Trouble.NOT_FINITE, moves))
    assert facts[-1] == FallbackEntered(targets="td", reason=reason)
    assert Response.HALT not in responses
    ladder, facts, _ = climb(calm(), start=ladder)
    assert facts == []
    assert ladder.standing.rung is Rung.TD
    back = Update(trouble=Trouble.NONE, loss=0.1, breakers=BreakerMoves(vtrace_closed=True))
    ladder, facts, _ = climb(back, start=ladder)
    assert facts == [FallbackLeft()]
    assert ladder.standing == Standing()


def test_openings_in_a_row_halt_and_an_operator_resumes():
    ladder, _, _ = climb(failure(Trouble.NOT_FINITE, OPENED), failure(Trouble.NOT_FINITE, OPENED))
    assert ladder.standing == Standing(rung=Rung.TD, openings=2)
    ladder, facts, responses = climb(failure(Trouble.NOT_FINITE, OPENED), start=ladder)
    assert facts[-1] == TrainingHalted(reason="training_breaker_opened")
    assert responses == (Response.RESTORE, Response.SKIP, Response.HALT)
    with pytest.raises(InvariantViolation, match="halted"):
        observe(KEYS, ladder, calm())
    ladder, facts = ladders.resumed(ladder)
    assert facts == [TrainingResumed()]
    assert ladder == Ladder(standing=Standing(rung=Rung.TD))
    with pytest.raises(InvariantViolation, match="cannot RESUME from TD"):
        ladders.resumed(ladder)


def test_an_update_that_is_made_forgives_the_openings():
    ladder, _, _ = climb(failure(Trouble.OUT_OF_MEMORY, OPENED), failure(Trouble.OUT_OF_MEMORY, OPENED))
    ladder, _, _ = climb(calm(), start=ladder)
    assert ladder.standing == Standing(rung=Rung.TD, openings=0)


def test_divergences_one_after_the_other_end_in_td_then_in_a_halt():
    rise = epochs(1.0, 1.1, 1.2, 1.3)
    ladder, facts, _ = climb(*rise * LEVEL_MAX)
    assert [fact.factor for fact in facts if isinstance(fact, RateLowered)] == [0.5, 0.25, 0.125]
    assert ladder.standing.rung is Rung.VTRACE
    ladder, facts, responses = climb(*rise, start=ladder)
    assert facts == [
        GoodStateRestored(reason="diverging"),
        FallbackEntered(targets="td", reason="measures_exhausted"),
    ]
    ladder, facts, responses = climb(*rise, start=ladder)
    assert facts[-1] == TrainingHalted(reason="measures_exhausted")
    assert responses[-3:] == (Response.RESTORE, Response.LOWER_RATE, Response.HALT)


def test_restorations_without_a_good_epoch_between_them_end_in_td_then_in_a_halt():
    storm = [calm(), failure(Trouble.NOT_FINITE)]
    ladder, facts, _ = climb(*storm * 4)
    assert facts[-1] == FallbackEntered(targets="td", reason="measures_exhausted")
    assert ladder.restores == 0
    ladder, facts, responses = climb(*storm * 4, start=ladder)
    assert facts[-1] == TrainingHalted(reason="measures_exhausted")
    assert responses[-1] is Response.HALT


def test_restorations_with_good_epochs_between_them_go_on():
    storm = [*epochs(0.1), failure(Trouble.NOT_FINITE)]
    ladder, _, _ = climb(*storm * 20)
    assert ladder.standing.rung is Rung.VTRACE


UPDATES = st.one_of(
    st.floats(0, 10).map(calm),
    st.just(explosion()),
    st.builds(
        failure,
        st.sampled_from(sorted(FAILURES)),
        st.builds(BreakerMoves, training_opened=st.booleans(), vtrace_opened=st.booleans()),
    ),
    st.builds(
        lambda loss, moves: Update(trouble=Trouble.NONE, loss=loss, breakers=moves),
        st.floats(0, 10),
        st.builds(BreakerMoves, vtrace_opened=st.booleans(), vtrace_closed=st.booleans()),
    ),
)


@given(st.lists(UPDATES, max_size=80))
def test_whatever_comes_levels_stay_in_range_and_rungs_move_by_the_table(updates):
    ladder = Ladder()
    for update in updates:
        before = ladder
        ladder, facts, responses = observe(KEYS, before, update)
        assert observe(KEYS, before, update) == (ladder, facts, responses)
        for measure in (ladder.clip, ladder.batch, ladder.rate):
            assert 0 <= measure.level <= LEVEL_MAX
            assert measure.calm == 0 or measure.level > 0
        rung, old = ladder.standing.rung, before.standing.rung
        assert rung is old or rung in {to for (of, _), to in RUNGS.items() if of is old}
        assert (Response.HALT in responses) == (rung is Rung.HALTED)
        assert (Response.RESTORE in responses) == any(isinstance(f, GoodStateRestored) for f in facts)
        assert not {Response.KEEP, Response.RESTORE} <= set(responses)
        again = msgspec.convert(msgspec.json.decode(msgspec.json.encode(ladder)), Ladder)
        assert repr(again) == repr(ladder)
        if rung is Rung.HALTED:
            ladder, _ = ladders.resumed(ladder)


@given(st.lists(UPDATES, max_size=40))
def test_every_measure_is_taken_back_in_the_end(updates):
    ladder = Ladder()
    for update in updates:
        ladder, _, _ = observe(KEYS, ladder, update)
        if ladder.standing.rung is Rung.HALTED:
            ladder, _ = ladders.resumed(ladder)
    ladder, _, _ = climb(*[calm()] * 40, start=ladder)
    assert (ladder.clip, ladder.batch, ladder.rate) == (Measure(), Measure(), Measure())
    assert ladder.restores == 0
