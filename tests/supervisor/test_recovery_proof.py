"""The judge of recoveries, judged: it must find every kind of loss, and blame the right death for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from esper_simic.config import parse
from esper_simic.errors import ConfigError, UnavailableError
from esper_simic.events import ExperienceAdmitted, LearnerStepped
from supervisor import faults
from supervisor.events import ChildExited, ExitReason
from supervisor.faults import Fault
from supervisor.journal import Journal
from supervisor.recovery_proof import (
    ROLES,
    Death,
    Heard,
    equal_until,
    examine,
    hear,
    history,
    plan,
    prove,
    table,
    training_after,
)
from supervisor.recovery_proof.campaign import SETTINGS, TROUBLE, settings_of
from supervisor.recovery_proof.evidence import Noted, Promise
from supervisor.recovery_proof.planning import DAILY_PASSAGE, NOT_PASSED
from supervisor.recovery_proof.verdict import Row, rows

S = 10**9


def admitted(at_s: float, actor: int = 0, incarnation: int = 1, sequence: int = 1) -> tuple[float, str, dict]:
    return at_s, "ExperienceAdmitted", {"actor": actor, "incarnation": incarnation, "sequence": sequence}


def refused(at_s: float, actor: int = 0, incarnation: int = 1, sequence: int = 1) -> tuple[float, str, dict]:
    return at_s, "ExperienceRefused", {"actor": actor, "incarnation": incarnation, "sequence": sequence}


def stepped(at_s: float, step: int) -> tuple[float, str, dict]:
    return at_s, "LearnerStepped", {"step": step}


def recovered(at_s: float, step: int, *, is_exact: bool = True) -> tuple[float, str, dict]:
    return at_s, "LearnerRecovered", {"step": step, "is_exact": is_exact}


def journal_of(*lines: tuple[float, str, dict[str, Any]]) -> list[Noted]:
    return [Noted(at, round(at_s * S), kind, header) for at, (at_s, kind, header) in enumerate(lines)]


def heard(*promises: tuple[int, int, int, int], versions: tuple[int, ...] = ()) -> Heard:
    return Heard(frozenset(Promise(*one) for one in promises), frozenset(versions))


def report(**changed: Any) -> dict[str, Any]:
    """A replay of three updates and one recovery in a journal of seven records, in which all is well."""
    good = {
        "outcome": "equal",
        "next_position": 7,
        "steps_by_digest": 3,
        "states_equal": 1,
        "divergence": None,
        "crossings": [],
    }
    return good | changed


SEVEN = journal_of(
    (0, "RunStarted", {}),
    admitted(1, sequence=1),
    stepped(2, 1),
    stepped(3, 2),
    recovered(10, 2),
    admitted(11, sequence=2),
    stepped(12, 3),
)

# -- what is planned ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_every_point_that_a_role_passes_is_planned_once(role: str) -> None:
    passed = {name for name, place in faults.POINTS.items() if role in place.roles}
    planned = [fault.point for fault in plan(role)]
    left_out = {name for name in passed if name.startswith(NOT_PASSED.get(role, ("?",)))}
    assert sorted(planned) == sorted(passed - left_out)
    assert faults.parse(";".join(fault.text for fault in plan(role))) == plan(role), "as it is armed"


def test_at_least_twenty_points_are_proven_in_three_roles() -> None:
    assert len({fault.point for role in ROLES for fault in plan(role)}) > 40
    assert all(plan(role) for role in ROLES)


def test_a_fault_that_cannot_fire_yet_never_holds_up_the_others() -> None:
    points = [fault.point for fault in plan("learner")]
    assert not points[0].startswith("recovery.")
    assert plan("supervisor")[-1].point == "supervisor.noted.before", "only an orderly stop passes it"
    alone = plan("learner", ["recovery.fold.after"])
    assert [fault.point for fault in alone] == ["checkpoint.prune.before", "recovery.fold.after"]


def test_what_lies_beside_the_daily_work_is_proven_in_a_run_with_trouble() -> None:
    for point in ("learner.facts.after", "learner.judge.before", "learner.stage.before"):
        assert settings_of(plan("learner", [point])) == {**SETTINGS, **TROUBLE}
    assert settings_of(plan("learner", ["learner.step.after"])) == SETTINGS
    config = parse("", assignments=[f"{key}={value}" for key, value in {**SETTINGS, **TROUBLE}.items()])
    assert config.simic_trainer.follows_curriculum
    assert config.simic_trainer.vtrace_log_ratio_max == TROUBLE["simic_trainer.vtrace_log_ratio_max"]


def test_points_of_other_roles_are_passed_over_and_unknown_ones_refused() -> None:
    assert plan("actor", ["learner.step.after"]) == []
    assert plan("actor", ["actor.send.after"]) == [Fault("actor", "actor.send.after", DAILY_PASSAGE)]
    with pytest.raises(ConfigError, match=r"actor\.sneeze"):
        plan("actor", ["actor.sneeze"])
    with pytest.raises(ConfigError, match="'editor'"):
        plan("editor")


# -- what was heard ----------------------------------------------------------------------------------------------------


def test_the_notes_of_all_witnesses_are_read_and_half_a_line_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "witness-10.txt").write_text("version 0\nacknowledged 0 1 1 7\nacknowledged 0 1 2 1")
    (tmp_path / "witness-11.txt").write_text("acknowledged 1 1 1 8\nversion 4\nver")
    (tmp_path / "fired-000").touch()
    assert hear(tmp_path) == heard((0, 1, 1, 7), (1, 1, 1, 8), versions=(0, 4))


def test_a_history_is_the_journal_without_its_frames(tmp_path: Path) -> None:
    assert history(tmp_path) == []
    before_ns = time.time_ns()
    with Journal(tmp_path / "journal" / "learner-0", owner="learner-0", run_id="r") as journal:
        journal.append("LearnerStepped", {"step": 1}, [b"x" * 100])
        journal.append("LearnerStepped", {"step": 2})
    first, second = history(tmp_path)
    assert (first.position, first.kind, first.header) == (0, "LearnerStepped", {"step": 1})
    assert second.position == 1
    assert before_ns <= first.time_ns <= second.time_ns <= time.time_ns()


# -- what is wrong -----------------------------------------------------------------------------------------------------


def test_a_promise_is_kept_by_the_very_record_at_its_position() -> None:
    noted = journal_of((0, "RunStarted", {}), admitted(1, 1, 2, 3), refused(2, 1, 2, 4))
    good = examine(noted, heard((1, 2, 3, 1), (1, 2, 4, 2)))
    assert good.is_good
    assert good.lost == frozenset()


@pytest.mark.parametrize(
    "promise",
    [(0, 1, 1, 9), (0, 1, 1, 0), (0, 1, 2, 1), (0, 2, 1, 1), (1, 1, 1, 1)],
    ids=["behind the end", "another record", "another sequence", "another life", "another actor"],
)
def test_a_promise_whose_record_is_not_there_is_lost(promise: tuple[int, int, int, int]) -> None:
    found = examine(journal_of((0, "RunStarted", {}), admitted(1)), heard(promise, (0, 1, 1, 1)))
    assert found.lost == frozenset({Promise(*promise)})
    assert not found.is_good


def test_an_unroll_admitted_twice_is_found_whichever_life_sent_it() -> None:
    noted = journal_of(admitted(1), admitted(2, incarnation=2), admitted(3, actor=1), admitted(4))
    assert examine(noted, Heard()).duplicated == [noted[3]], "each life of an actor counts for itself"
    assert examine(noted, Heard(), lockstep=True).duplicated == [noted[1], noted[3]], "a round counts once"
    assert not examine(noted, Heard()).is_good
    assert examine(journal_of(refused(1), admitted(2)), Heard()).duplicated == []


def test_a_version_must_be_in_the_journal() -> None:
    noted = journal_of(stepped(1, 1), stepped(2, 2))
    assert examine(noted, heard(versions=(0, 1, 2))).is_good
    assert examine(noted, heard(versions=(0, 3))).versions_lost == [3]
    skipped = journal_of(stepped(1, 1), (2, "StepSkipped", {"step": 2}))
    assert examine(skipped, heard(versions=(2,))).is_good
    failed = journal_of(stepped(1, 1), (2, "StepFailed", {"step": 2}), stepped(3, 3))
    assert examine(failed, heard(versions=(2, 3))).is_good
    assert examine(failed, Heard()).steps_broken == []


def test_a_recovery_must_reach_every_version_that_somebody_had_seen() -> None:
    noted = journal_of(stepped(1, 1), recovered(10, 1), stepped(11, 2))
    fine = Death("learner", 5 * S, heard(versions=(0, 1)))
    assert examine(noted, heard(versions=(2,)), [fine]).is_good
    told_too_early = Death("learner", 5 * S, heard(versions=(0, 1, 2)))
    assert examine(noted, heard(versions=(2,)), [told_too_early]).versions_lost == [2], (
        "that version 2 is there in the end, made again, is no excuse"
    )
    later = Death("learner", 20 * S, heard(versions=(0, 1, 2)))
    again = [*noted, Noted(3, 25 * S, *recovered(25, 2)[1:])]
    assert examine(again, heard(versions=(2,)), [later]).is_good, "an earlier recovery knew nothing of it"
    of_an_actor = Death("actor", 5 * S, heard(versions=(2,)))
    assert examine(noted, heard(versions=(2,)), [of_an_actor]).is_good, "the learner made it later"


def test_updates_must_follow_each_other() -> None:
    assert examine(journal_of(stepped(1, 1), stepped(2, 3)), Heard()).steps_broken == [3]
    assert examine(journal_of(stepped(1, 1), stepped(2, 1)), Heard()).steps_broken == [1]


# -- digests -----------------------------------------------------------------------------------------------------------


def test_digests_are_equal_as_far_as_every_one_of_them_was_compared() -> None:
    assert equal_until(report(), SEVEN) == 7
    assert equal_until(report(outcome="divergent", divergence={"position": 6}), SEVEN) == 6
    assert equal_until(report(crossings=[{"position": 4}]), SEVEN) == 4


def test_a_step_that_failed_has_a_digest_like_any_other() -> None:
    failed = [one._replace(kind="StepFailed") if one.position == 3 else one for one in SEVEN]
    assert equal_until(report(), failed) == 7
    assert equal_until(report(steps_by_digest=2), failed) == 0


@pytest.mark.parametrize(
    "changed",
    [{"outcome": "within_tolerance"}, {"next_position": 6}, {"steps_by_digest": 2}, {"states_equal": 0}],
)
def test_what_was_not_compared_is_not_equal(changed: dict[str, Any]) -> None:
    assert equal_until(report(**changed), SEVEN) == 0


# -- training again ----------------------------------------------------------------------------------------------------


def test_training_goes_on_with_the_next_update() -> None:
    for role in ("learner", "supervisor"):
        assert training_after(SEVEN, [], role, 5 * S) == SEVEN[6]
        assert training_after(SEVEN, [], role, 13 * S) is None


def test_an_actor_is_back_with_the_first_unroll_of_its_next_life() -> None:
    gone = ChildExited(at_s=0, role="actor", index=1, incarnation=3, reason=ExitReason.SIGNAL, detail="")
    supervisors = [
        Noted(0, 4 * S, "ChildExited", {"role": "actor", "index": 0, "incarnation": 9}),
        Noted(1, 5 * S + 1, "ChildExited", {"role": "learner", "index": 0, "incarnation": 1}),
        Noted(2, 6 * S, "ChildExited", {"role": gone.role, "index": gone.index, "incarnation": 3}),
    ]
    noted = journal_of(
        admitted(1, 1, 4), admitted(7, 0, 10), admitted(8, 1, 3, 9), admitted(9, 1, 4), admitted(10, 1, 4, 2)
    )
    assert training_after(noted, supervisors, "actor", 5 * S) == noted[3]
    assert training_after(noted[:3], supervisors, "actor", 5 * S) is None
    assert training_after(noted, supervisors[:1], "actor", 5 * S) is None, "nobody knows which one it was"


# -- the verdict -------------------------------------------------------------------------------------------------------

THREE = [Fault("learner", "learner.step.after", 4), Fault("learner", "recovery.begin", 1)]
THREE.append(Fault("learner", "checkpoint.prune.half", 1))


def verdict(noted: list[Noted], deaths: dict[int, Death], told: Heard, equal: int) -> list[Row]:
    return rows(THREE, deaths, told, examine(noted, told, deaths.values()), noted, [], equal)


def test_each_fault_answers_for_what_was_promised_since_the_one_before() -> None:
    first = heard((0, 1, 1, 1), versions=(1, 2))
    whole = heard((0, 1, 1, 1), (0, 1, 2, 5), versions=(1, 2, 3))
    deaths = {0: Death("learner", 4 * S, first), 1: Death("learner", 6 * S, first)}
    made = verdict(SEVEN, deaths, whole, 7)
    assert [(row.fault, row.acknowledged, row.lost, row.duplicated) for row in made] == [
        ("learner.step.after", 1, 0, 0),
        ("recovery.begin", 1, 0, 0),
        ("checkpoint.prune.half", 0, 0, 0),
    ], "the last one to fire answers for all that came after it, too"
    assert [row.seconds_to_training for row in made] == [8.0, 6.0, None]
    assert [row.is_good for row in made] == [True, True, False]
    assert not made[2].fired


def test_a_loss_is_blamed_on_one_death() -> None:
    first = heard((0, 1, 7, 5), versions=(1, 2, 3))
    deaths = {0: Death("learner", 4 * S, first), 1: Death("learner", 6 * S, first)}
    made = verdict(SEVEN, deaths, first, 7)
    assert [row.lost for row in made] == [2, 0, 0], "an unroll, and a version that the recovery did not reach"
    assert not made[0].is_good


def test_a_double_admission_is_blamed_on_the_death_that_ends_its_time() -> None:
    again = admitted(0, sequence=1)[1:]
    noted = [*SEVEN[:3], Noted(3, 3 * S, *again), SEVEN[4], Noted(5, 11 * S, *again), SEVEN[6]]
    deaths = {0: Death("learner", 4 * S, Heard()), 1: Death("learner", 6 * S, Heard())}
    assert [row.duplicated for row in verdict(noted, deaths, Heard(), 7)] == [1, 1, 0]
    only_later = [*SEVEN[:5], Noted(5, 11 * S, *again), SEVEN[6]]
    assert [row.duplicated for row in verdict(only_later, deaths, Heard(), 7)] == [0, 1, 0]


def test_digests_count_from_the_recovery_to_the_training_after_it() -> None:
    deaths = {0: Death("learner", 4 * S, Heard())}
    assert verdict(SEVEN, deaths, Heard(), 7)[0].is_digest_equal
    assert not verdict(SEVEN, deaths, Heard(), 6)[0].is_digest_equal
    inexact = [*SEVEN[:4], Noted(4, 10 * S, *recovered(10, 2, is_exact=False)[1:]), *SEVEN[5:]]
    assert not verdict(inexact, deaths, Heard(), 7)[0].is_digest_equal
    without = [one for one in SEVEN if one.kind != "LearnerRecovered"]
    assert not verdict(without, deaths, Heard(), 7)[0].is_digest_equal, "it never said that it recovered"


def test_the_table_says_what_did_not_fire_and_what_was_not_equal() -> None:
    good = Row(
        fault="a.b",
        role="learner",
        fired=True,
        acknowledged=7,
        is_digest_equal=True,
        seconds_to_training=3.21,
    )
    bad = Row(fault="c.d", role="actor", fired=True, lost=2, duplicated=1)
    lines = table([good, bad, Row(fault="e.f", role="actor", fired=False)]).splitlines()
    assert lines[2] == "| a.b | learner | 7 | 0 | 0 | yes | 3.2 |"
    assert lines[3] == "| c.d | actor | 0 | 2 | 1 | NO | never |"
    assert "did not fire" in lines[4]
    assert lines[-1] == (
        "2 of 3 faults fired: 7 acknowledged, 2 lost, 1 duplicated; digests equal after 1 of 2."
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"fired": False},
        {"lost": 1},
        {"duplicated": 1},
        {"is_digest_equal": False},
        {"seconds_to_training": None},
    ],
)
def test_each_thing_that_is_wrong_is_enough(changed: dict[str, Any]) -> None:
    good = Row(fault="a.b", role="actor", fired=True, is_digest_equal=True, seconds_to_training=1.0)
    assert good.is_good
    assert not msgspec.structs.replace(good, **changed).is_good


def test_the_kinds_that_are_looked_for_exist() -> None:
    assert {"actor", "incarnation", "sequence"} <= set(ExperienceAdmitted.__struct_fields__)
    assert "step" in LearnerStepped.__struct_fields__
    assert {"role", "index", "incarnation"} <= set(ChildExited.__struct_fields__)


# -- the campaign's own failures ---------------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_run_that_ends_otherwise_is_no_proof(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"status 78.*num_actors"):
        prove(plan("actor"), tmp_path / "p", tell=print, settings={"supervisor.num_actors": 0})
    assert not [one for one in psutil.Process().children(recursive=True) if "simic" in one.name()]


def test_a_proof_begins_in_a_directory_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "p" / "notes").mkdir(parents=True)
    told: list[str] = []
    say: Callable[[str], None] = told.append
    with pytest.raises(UnavailableError, match="another directory"):
        prove(plan("actor"), tmp_path / "p", tell=say)
    assert told == []
