"""The curriculum: counts are exact, no stage is skipped or gone back to, and requests do what their mode says."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_simic.breaker import CircuitBreakerState
from esper_simic.config_curriculum import CurriculumKeys, success_rule
from esper_simic.curriculum import (
    ANSWERS_MAX,
    WINDOW_MAX,
    Answered,
    Curriculum,
    CurriculumState,
    success_of,
)
from esper_simic.curriculum_facts import (
    CoordinationMode,
    CurriculumAdvanced,
    CurriculumFact,
    CurriculumHeld,
    CurriculumReply,
    CurriculumRequest,
)
from esper_simic.errors import InvariantViolation
from esper_simic.safety_facts import BreakerClosed, BreakerHalfOpened, BreakerOpened

YES, NO = [True], [False]


def curriculum(*rows: tuple[str, float, float, int, int], **given: Any) -> Curriculum:
    names = ("name", "difficulty", "min_success_rate", "min_episodes", "max_episodes")
    stages = [dict(zip(names, row, strict=True)) for row in rows]
    return Curriculum.of(CurriculumKeys.model_validate({"curriculum_stages": stages} | given))


THREE = curriculum(("walk", 0.2, 0.5, 4, 6), ("run", 0.5, 0.75, 4, 8), ("fly", 1.0, 1.0, 2, 3))


@dataclass
class Script:
    """A curriculum under way, and all that became of it."""

    rules: Curriculum
    state: CurriculumState = field(default_factory=CurriculumState)
    facts: list[CurriculumFact] = field(default_factory=list)

    def plays(self, *successes: bool, now_s: float = 0.0) -> list[CurriculumFact]:
        """Episodes of the stage that is on, then a look."""
        self.state = self.rules.counted(self.state, self.state.stage, successes)
        return self.looks(now_s)

    def looks(self, now_s: float) -> list[CurriculumFact]:
        self.state, facts = self.rules.judged(self.state, now_s)
        self.facts += facts
        return facts

    def asks(
        self, stage: str, mode: CoordinationMode, now_s: float = 0.0, **given: Any
    ) -> tuple[CurriculumReply, list[CurriculumFact]]:
        self.state, reply, facts = self.rules.answer(self.state, asking(stage, mode, **given), now_s)
        self.facts += facts
        return reply, facts

    @property
    def counts(self) -> tuple[str, int, int, int]:
        """Stage, episodes, successes and failed rounds."""
        state = self.state
        return self.rules.stage(state).name, state.episodes, state.successes, state.rounds


def asking(stage: str, mode: CoordinationMode, **given: Any) -> CurriculumRequest:
    difficulty = {"walk": 0.2, "run": 0.5, "fly": 1.0}.get(stage, 0.5)
    fields: dict[str, Any] = {
        "request_id": f"{stage} {mode.value}",
        "stage": stage,
        "difficulty": difficulty,
        "min_success_rate": 0.9,
        "min_episodes": 2,
        "max_episodes": 3,
        "mode": mode,
        "issued_at_s": 1.0,
        "correlation_id": "c-7",
    }
    return CurriculumRequest(**(fields | given))


# -- when a stage is passed --------------------------------------------------------------------------------------------


def test_from_the_first_stage_to_the_last() -> None:
    script = Script(THREE)
    assert (THREE.difficulty(script.state), THREE.is_last(script.state)) == (0.2, False)
    assert script.plays(True, True, True) == []  # the rate is there, the episodes are not
    assert script.counts == ("walk", 3, 3, 0)
    assert script.plays(False) == [
        CurriculumAdvanced(from_stage="walk", to_stage="run", difficulty=0.5, episodes=4, success_rate=0.75)
    ]
    assert script.counts == ("run", 0, 0, 0)
    assert THREE.success_rate(script.state) == 0.0
    assert script.plays(True, True, False, False) == []  # the episodes are there, the rate is not
    # The newest four decide, not all: 3 of 4, of all only 4 of 6.
    assert script.plays(True, True) == []
    assert script.plays(True) == [
        CurriculumAdvanced(from_stage="run", to_stage="fly", difficulty=1.0, episodes=7, success_rate=0.75)
    ]
    assert THREE.is_last(script.state)
    assert script.plays(True, True, True, True, True) == []
    assert script.counts == ("fly", 5, 5, 0)


@pytest.mark.parametrize(
    ("successes", "failures", "passed"),
    [(70, 30, True), (69, 31, False), (70, 29, False), (100, 0, True), (99, 0, False)],
)
def test_the_platforms_first_stage_asks_for_70_of_100(successes: int, failures: int, passed: bool) -> None:
    script = Script(Curriculum.of(CurriculumKeys()))
    script.plays(*[True] * successes, *[False] * failures)
    assert (script.counts[0] == "intermediate") is passed


def test_the_window_is_bounded() -> None:
    long = curriculum(("one", 0.1, 0.5, WINDOW_MAX + 500, 5000), ("two", 0.2, 0.5, 1, 1))
    script = Script(long)
    script.plays(*[True] * 1200, *[False] * 600)
    assert len(script.state.recent) == WINDOW_MAX
    assert long.success_rate(script.state) == 0.4
    assert script.counts == ("one", 1800, 1200, 0)
    assert script.plays(*YES * 499) == []
    assert script.plays(True)[0] == CurriculumAdvanced(
        from_stage="one", to_stage="two", difficulty=0.2, episodes=2300, success_rate=0.5
    )


def test_a_round_that_fails_is_held_and_the_stage_can_still_be_passed() -> None:
    script = Script(THREE)
    assert script.plays(False, False, False, False, True) == []
    assert script.plays(False) == [CurriculumHeld(stage="walk", rounds=1, episodes=6, success_rate=0.25)]
    assert script.counts == ("walk", 0, 0, 1)
    assert script.state.breaker.failures == 1
    assert script.plays(*[True] * 4)[0].__class__ is CurriculumAdvanced
    assert script.counts == ("run", 0, 0, 0)
    assert script.state.breaker.failures == 0


def test_a_round_longer_than_max_episodes_fails_once() -> None:
    script = Script(THREE)
    assert len(script.plays(*[False] * 60)) == 1
    assert script.looks(1.0) == []


def test_the_last_stage_is_held_too_and_stays_while_its_rate_is_reached() -> None:
    script = Script(THREE, CurriculumState(stage=2))
    assert script.plays(True, True, True, True) == []
    assert script.plays(False) == [CurriculumHeld(stage="fly", rounds=1, episodes=5, success_rate=0.5)]
    assert script.counts == ("fly", 0, 0, 1)


def test_a_look_without_news_changes_nothing_but_the_breakers_clock() -> None:
    script = Script(THREE)
    script.plays(True, False)
    before = script.state
    assert script.looks(5.0) == []
    assert msgspec.structs.replace(script.state, breaker=before.breaker) == before


# -- the breaker -------------------------------------------------------------------------------------------------------


def fails(script: Script, rounds: int, now_s: float) -> list[CurriculumFact]:
    return [fact for _ in range(rounds) for fact in script.plays(*[False] * 6, now_s=now_s)]


def test_five_failed_rounds_open_the_breaker_and_nothing_is_judged_for_120_seconds() -> None:
    script = Script(THREE)
    facts = fails(script, 5, 1000.0)
    assert [type(fact) for fact in facts] == [CurriculumHeld] * 5 + [BreakerOpened]
    assert facts[-1] == BreakerOpened(name="curriculum", failures=5)
    # Passed by its rate, and not judged; the counts go on.
    assert script.plays(*[True] * 6, now_s=1000.0) == []
    assert script.looks(1119.5) == []
    assert script.counts == ("walk", 6, 6, 5)
    assert THREE.should_advance(script.state)
    assert script.looks(1120.0) == [
        BreakerHalfOpened(name="curriculum"),
        CurriculumAdvanced(from_stage="walk", to_stage="run", difficulty=0.5, episodes=6, success_rate=1.0),
        BreakerClosed(name="curriculum"),
    ]
    assert script.state.breaker.state is CircuitBreakerState.CLOSED
    assert script.state.breaker.open_s == pytest.approx(120.0)


def test_a_probe_that_fails_opens_the_breaker_again() -> None:
    script = Script(THREE)
    fails(script, 5, 0.0)
    assert script.plays(*[False] * 7, now_s=60.0) == []
    facts = script.looks(120.0)
    assert [type(fact) for fact in facts] == [BreakerHalfOpened, CurriculumHeld, BreakerOpened]
    assert script.counts == ("walk", 0, 0, 6)
    assert script.plays(*[True] * 4, now_s=239.0) == []
    assert isinstance(script.looks(240.0)[1], CurriculumAdvanced)


def test_a_probe_waits_until_there_is_something_to_judge() -> None:
    script = Script(THREE)
    fails(script, 5, 0.0)
    assert script.plays(True, True, True, now_s=500.0) == []
    assert script.state.breaker.state is CircuitBreakerState.OPEN
    assert isinstance(script.plays(True, now_s=501.0)[1], CurriculumAdvanced)


def test_a_clock_that_is_set_back_makes_nobody_wait_longer_than_the_looks_in_between() -> None:
    script = Script(THREE)
    fails(script, 5, 1000.0)
    script.plays(*[True] * 6, now_s=1060.0)
    assert script.looks(500.0) == []
    assert script.looks(559.0) == []
    assert isinstance(script.looks(560.0)[1], CurriculumAdvanced)


def test_the_breakers_numbers_are_the_configurations() -> None:
    strict = curriculum(
        ("one", 0.1, 1.0, 1, 1),
        ("two", 0.2, 1.0, 1, 1),
        curriculum_breaker_failure_threshold=2,
        curriculum_breaker_recovery_timeout_s=7.0,
    )
    script = Script(strict)
    script.plays(*NO)
    assert isinstance(script.plays(*NO)[-1], BreakerOpened)
    assert script.plays(*YES, now_s=6.9) == []
    assert isinstance(script.looks(7.0)[1], CurriculumAdvanced)


# -- laws --------------------------------------------------------------------------------------------------------------

outcomes = st.lists(st.tuples(st.integers(0, 2), st.lists(st.booleans(), max_size=9)), max_size=30)


@given(outcomes)
def test_counts_are_exact_and_outcomes_of_other_stages_change_no_count(
    batches: list[tuple[int, list[bool]]],
) -> None:
    state = CurriculumState(stage=1)
    for stage, successes in batches:
        state = THREE.counted(state, stage, successes)
    own = [success for stage, successes in batches if stage == 1 for success in successes]
    others = sum(len(successes) for stage, successes in batches if stage != 1)
    assert (state.episodes, state.successes, state.strays) == (len(own), sum(own), others)
    newest = own[-4:]
    assert THREE.success_rate(state) == (sum(newest) / len(newest) if newest else 0.0)
    assert (state.stage, state.rounds) == (1, 0)


@given(st.lists(st.lists(st.booleans(), max_size=12), min_size=1, max_size=6), st.randoms())
def test_any_interleaving_of_lanes_gives_the_same_counts(lanes: list[list[bool]], chance: Any) -> None:
    straight = CurriculumState()
    for lane in lanes:
        straight = THREE.counted(straight, 0, lane)
    left = [list(lane) for lane in lanes]
    mixed = CurriculumState()
    while any(left):
        lane = chance.choice([lane for lane in left if lane])
        mixed = THREE.counted(mixed, 0, [lane.pop(0)])
    assert (mixed.episodes, mixed.successes) == (straight.episodes, straight.successes)
    assert sorted(mixed.recent) == sorted(straight.recent)


@given(st.lists(st.booleans(), max_size=40), st.data())
def test_how_outcomes_are_cut_into_batches_changes_nothing(
    successes: list[bool], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(successes)))
    whole = THREE.counted(CurriculumState(), 0, successes)
    parts = THREE.counted(THREE.counted(CurriculumState(), 0, successes[:cut]), 0, successes[cut:])
    assert parts == whole


MODES = st.sampled_from(CoordinationMode)
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("play"), st.integers(0, 2), st.lists(st.booleans(), max_size=9)),
        st.tuples(st.just("look"), st.floats(-50, 200)),
        st.tuples(st.just("ask"), st.sampled_from(["walk", "run", "fly"]), MODES, st.integers(0, 5)),
    ),
    max_size=60,
)


@given(MOVES)
@settings(max_examples=300)
def test_no_stage_is_ever_skipped_or_gone_back_to_whatever_comes(moves: list[Any]) -> None:
    script, now_s = Script(THREE), 100.0
    for move in moves:
        before, told = script.state, len(script.facts)
        kind, *rest = move
        if kind == "play":
            script.state = THREE.counted(before, *rest)
        elif kind == "look":
            now_s += rest[0]
            script.looks(now_s)
        else:
            stage, mode, number = rest
            script.asks(stage, mode, now_s, request_id=str(number), min_episodes=1)
        after, facts = script.state, script.facts[told:]
        advanced = [fact for fact in facts if isinstance(fact, CurriculumAdvanced)]
        held = [fact for fact in facts if isinstance(fact, CurriculumHeld)]
        assert len(advanced) + len(held) <= 1
        assert after.stage == before.stage + len(advanced)
        if advanced or held:
            assert (after.episodes, after.successes, after.recent) == (0, 0, "")
        if advanced:
            names = (THREE.stage(before).name, THREE.stage(after).name)
            assert (advanced[0].from_stage, advanced[0].to_stage) == names
            assert (advanced[0].episodes, after.rounds) == (before.episodes, 0)
        if held:
            assert (held[0].rounds, after.rounds) == (before.rounds + 1, before.rounds + 1)
        assert 0 <= after.successes <= after.episodes
        assert len(after.recent) == min(after.episodes, WINDOW_MAX)
        assert len(after.answers) <= ANSWERS_MAX
    # State is JSON, to the last bit, and what is read back goes on the same way.
    numbers = msgspec.to_builtins(script.state)
    read = THREE.restored(msgspec.json.decode(msgspec.json.encode(numbers)))
    assert read == script.state
    assert repr(msgspec.to_builtins(read)) == repr(numbers)
    assert THREE.judged(read, now_s + 1) == THREE.judged(script.state, now_s + 1)


# -- outcomes ----------------------------------------------------------------------------------------------------------


@dataclass
class Played:
    episode_return: float = 0.0
    accuracy: float | None = None
    success: bool | None = None
    is_whole: bool = True
    rolled_back: bool = False


@pytest.mark.parametrize(
    ("rule", "episode", "verdict"),
    [
        ("success", Played(success=True), True),
        ("success", Played(success=False, accuracy=99.0), False),
        ("success", Played(), None),
        ("accuracy >= 80", Played(accuracy=80.0), True),
        ("accuracy >= 80", Played(accuracy=79.99, success=True), False),
        ("accuracy >= 80", Played(accuracy=float("nan")), False),
        ("return >= 475", Played(episode_return=475.0), True),
        ("return >= 475", Played(episode_return=474.0, accuracy=99.0), False),
    ],
)
def test_what_a_success_is(rule: str, episode: Played, verdict: bool | None) -> None:
    assert success_of(success_rule(rule), episode) is verdict


@pytest.mark.parametrize("rule", ["success", "accuracy >= 80", "return >= 1"])
def test_an_episode_that_was_cut_does_not_count(rule: str) -> None:
    played = Played(episode_return=5.0, accuracy=90.0, success=True)
    assert success_of(success_rule(rule), played) is True
    assert success_of(success_rule(rule), replace(played, is_whole=False)) is None


@pytest.mark.parametrize("rule", ["success", "accuracy >= 80", "return >= 1"])
def test_an_episode_that_the_governor_rolled_back_is_a_failure(rule: str) -> None:
    played = Played(episode_return=5.0, accuracy=90.0, success=True, is_whole=False, rolled_back=True)
    assert success_of(success_rule(rule), played) is False


def test_an_accuracy_that_no_world_gives_is_a_contradiction() -> None:
    with pytest.raises(InvariantViolation, match="return >= x"):
        success_of(success_rule("accuracy >= 80"), Played(success=True))


def test_each_stage_has_its_own_rule_or_the_common_one() -> None:
    stages = [
        {"name": "a", "difficulty": 0.1, "success": "return >= 3"},
        {"name": "b", "difficulty": 0.2},
    ]
    numbers = {"min_success_rate": 0.5, "min_episodes": 1, "max_episodes": 1}
    rules = Curriculum.of(
        CurriculumKeys.model_validate(
            {
                "curriculum_stages": [stage | numbers for stage in stages],
                "curriculum_success": "accuracy >= 80",
            }
        )
    )
    played = [Played(3.0, 10.0), Played(2.0, 90.0), Played(9.0, 90.0, is_whole=False)]
    assert rules.outcomes(0, played) == [True, False]
    assert rules.outcomes(1, played) == [False, True]


# -- requests ----------------------------------------------------------------------------------------------------------


def test_independent_asks_where_the_training_stands() -> None:
    script = Script(THREE, CurriculumState(stage=1))
    script.plays(True, False, True)
    before = script.state
    reply, facts = script.asks("walk", CoordinationMode.INDEPENDENT)
    assert reply == CurriculumReply(
        request_id="walk INDEPENDENT",
        correlation_id="c-7",
        stage="run",
        episodes=3,
        success_rate=2 / 3,
        advanced=False,
    )
    assert facts == []
    assert (script.state.stage, script.state.recent) == (before.stage, before.recent)
    assert script.plays(True)[0].__class__ is CurriculumAdvanced


def test_synchronized_waits_in_the_stage_named_until_another_is() -> None:
    script = Script(THREE)
    script.asks("run", CoordinationMode.SYNCHRONIZED)
    script.plays(*[True] * 4)
    assert script.counts[0] == "run"
    assert script.plays(*[True] * 20) == []  # passed, and it waits
    assert script.plays(*[False] * 8)[0].__class__ is CurriculumHeld  # its rounds fail as ever
    script.plays(*[True] * 4)
    script.asks("fly", CoordinationMode.SYNCHRONIZED)
    assert isinstance(script.looks(1.0)[0], CurriculumAdvanced)


def test_independent_ends_a_wait() -> None:
    script = Script(THREE)
    script.asks("walk", CoordinationMode.SYNCHRONIZED)
    assert script.plays(*[True] * 4) == []
    script.asks("walk", CoordinationMode.INDEPENDENT)
    assert isinstance(script.looks(1.0)[0], CurriculumAdvanced)


def test_task_driven_replaces_the_numbers_of_the_stage_named_alone() -> None:
    script = Script(THREE)
    script.asks("run", CoordinationMode.TASK_DRIVEN, min_success_rate=0.1, min_episodes=1, max_episodes=2)
    assert script.plays(True) == []
    script.plays(*[True] * 3)
    assert script.counts[0] == "run"
    assert script.plays(False, False) == [CurriculumHeld(stage="run", rounds=1, episodes=2, success_rate=0.0)]
    script.plays(True)
    assert script.counts[0] == "fly"
    assert script.plays(False, False) == []
    assert script.plays(False)[0].__class__ is CurriculumHeld


def test_a_task_may_ask_for_a_longer_window_than_the_stage() -> None:
    script = Script(THREE)
    script.asks("walk", CoordinationMode.TASK_DRIVEN, min_success_rate=0.75, min_episodes=8, max_episodes=9)
    assert script.plays(False, False, *[True] * 5) == []
    assert script.plays(True) == [
        CurriculumAdvanced(from_stage="walk", to_stage="run", difficulty=0.5, episodes=8, success_rate=0.75)
    ]


def test_strategy_driven_goes_where_it_is_told_one_stage_at_a_time() -> None:
    script = Script(THREE)
    script.plays(False, True)
    reply, facts = script.asks("run", CoordinationMode.STRATEGY_DRIVEN)
    assert facts == [
        CurriculumAdvanced(from_stage="walk", to_stage="run", difficulty=0.5, episodes=2, success_rate=0.5)
    ]
    assert (reply.advanced, reply.stage, reply.episodes, reply.refusal) == (True, "run", 0, "")
    # Neither successes nor failures move it now.
    assert script.plays(*[True] * 50) == []
    assert script.plays(*[False] * 50) == []
    assert not THREE.should_advance(script.state)
    # Naming the stage that is on keeps it there.
    reply, facts = script.asks("run", CoordinationMode.STRATEGY_DRIVEN, request_id="again")
    assert (reply.advanced, facts) == (False, [])
    script.asks("fly", CoordinationMode.STRATEGY_DRIVEN)
    assert script.counts == ("fly", 0, 0, 0)


def test_a_strategy_is_bound_by_the_breaker_too_and_may_be_its_probe() -> None:
    script = Script(THREE)
    fails(script, 5, 0.0)
    reply, facts = script.asks("run", CoordinationMode.STRATEGY_DRIVEN, 119.0)
    assert (reply.refusal, facts) == ("the breaker of the progression is open", [])
    reply, facts = script.asks("run", CoordinationMode.STRATEGY_DRIVEN, 120.0, request_id="later")
    assert [type(fact) for fact in facts] == [BreakerHalfOpened, CurriculumAdvanced, BreakerClosed]
    assert reply.advanced


@pytest.mark.parametrize(
    ("stage", "mode", "given", "says"),
    [
        ("rum", "INDEPENDENT", {}, "unknown stage 'rum'; did you mean 'run'?; known: walk, run, fly"),
        ("run", "INDEPENDENT", {"difficulty": 0.6}, "stage 'run' has difficulty 0.5 here, not 0.6"),
        ("run", "INDEPENDENT", {"difficulty": float("nan")}, "has difficulty 0.5 here"),
        ("run", "TASK_DRIVEN", {"min_success_rate": 0.0}, "min_success_rate 0 is not in (0, 1]"),
        ("run", "TASK_DRIVEN", {"min_success_rate": 1.5}, "min_success_rate 1.5 is not in (0, 1]"),
        ("run", "TASK_DRIVEN", {"min_episodes": 0}, "do not rise within"),
        ("run", "TASK_DRIVEN", {"min_episodes": 4}, "min_episodes 4 and max_episodes 3 do not rise"),
        ("run", "TASK_DRIVEN", {"max_episodes": 1_000_001}, "do not rise within 1 to 1000000"),
        ("walk", "SYNCHRONIZED", {}, "stage 'walk' is passed, and no stage is gone back to"),
        ("walk", "TASK_DRIVEN", {}, "stage 'walk' is passed"),
        ("walk", "STRATEGY_DRIVEN", {}, "stage 'walk' is passed"),
    ],
)
def test_what_cannot_be_obeyed_is_answered_with_the_reason(
    stage: str, mode: str, given: dict[str, Any], says: str
) -> None:
    script = Script(THREE, CurriculumState(stage=1))
    script.plays(True)
    before = script.state
    reply, facts = script.asks(stage, CoordinationMode(mode), **given)
    assert says in reply.refusal
    assert (reply.stage, reply.episodes, reply.advanced, facts) == ("run", 1, False, [])
    assert msgspec.structs.replace(script.state, answers=before.answers) == before


def test_no_strategy_skips_a_stage() -> None:
    script = Script(THREE)
    reply, _ = script.asks("fly", CoordinationMode.STRATEGY_DRIVEN)
    assert reply.refusal == "no stage is skipped; the next one is 'run'"
    assert script.counts[0] == "walk"


def test_a_difficulty_may_come_in_single_precision() -> None:
    reply, _ = Script(THREE).asks("walk", CoordinationMode.INDEPENDENT, difficulty=0.20000000298023224)
    assert reply.refusal == ""


def test_a_repeated_request_gets_its_first_answer_and_moves_nothing() -> None:
    script = Script(THREE)
    first, _ = script.asks("run", CoordinationMode.STRATEGY_DRIVEN)
    script.plays(True, True)
    before = script.state
    again, facts = script.asks("run", CoordinationMode.STRATEGY_DRIVEN)
    assert (again, facts, script.state) == (first, [], before)


def test_answers_are_forgotten_oldest_first() -> None:
    script = Script(THREE)
    for number in range(ANSWERS_MAX + 1):
        script.asks("walk", CoordinationMode.INDEPENDENT, request_id=str(number))
    assert [reply.request_id for reply in script.state.answers] == [
        str(number) for number in range(1, ANSWERS_MAX + 1)
    ]


def test_the_messages_travel() -> None:
    request = asking("run", CoordinationMode.SYNCHRONIZED)
    wire = msgspec.msgpack.encode(request)
    assert msgspec.msgpack.decode(wire)["mode"] == "SYNCHRONIZED"
    assert msgspec.msgpack.decode(wire, type=CurriculumRequest) == request
    with pytest.raises(msgspec.ValidationError, match="length <= 128"):
        msgspec.convert(
            msgspec.to_builtins(asking("run", request.mode, request_id="r" * 129)), CurriculumRequest
        )
    answered = THREE.answer(CurriculumState(), request, 0.0)
    assert isinstance(answered, Answered)
    assert msgspec.convert(msgspec.to_builtins(answered.reply), CurriculumReply) == answered.reply


# -- state -------------------------------------------------------------------------------------------------------------


def test_a_state_of_a_longer_curriculum_is_refused() -> None:
    two = curriculum(("walk", 0.2, 0.5, 4, 6), ("run", 0.5, 0.75, 4, 8))
    with pytest.raises(ValueError, match="in stage 2.*there are 2"):
        two.restored(msgspec.to_builtins(CurriculumState(stage=2)))
    waiting, _, _ = THREE.answer(CurriculumState(), asking("fly", CoordinationMode.SYNCHRONIZED), 0.0)
    with pytest.raises(ValueError, match="of coordination 2"):
        two.restored(msgspec.to_builtins(waiting))
    with pytest.raises(ValueError, match="Expected `int`"):
        THREE.restored({"stage": "walk"})
