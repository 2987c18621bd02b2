"""The curriculum: in which stage a training is, and when it goes on to the next.

Its state is a fold of real outcomes. `counted` takes what episodes came to, in any order; `judged` looks whether the
stage is passed, at a time that its caller has written down; `answer` takes a request of whoever coordinates several
trainings. All three are pure, and none of them ever skips a stage or goes back.

A stage goes in rounds. Its success rate is that of the newest `min_episodes` episodes of the round (at most
`WINDOW_MAX`): what the policy can do now, not what it could when the stage was new to it.

```
   the round has min_episodes or more, and the rate is reached --> the next stage, its first round
   the round has max_episodes or more, and the rate is not     --> the same stage, another round; one failure of the
                                                                    progression's breaker
```

While the breaker is open nothing is judged; episodes go on counting. The last stage has no next one: where its rate is
reached it stays as it is, and where it is not, its rounds fail like any other's.

Outcomes carry the stage in which their episode was played. Those of another stage, which were under way when it ended,
count for nothing but themselves (`strays`): they were easier.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from esper_simic.breaker import (
    Breaker,
    BreakerRule,
    allows,
    attempted,
    failed,
    observed,
    succeeded,
)
from esper_simic.config_curriculum import CurriculumKeys, CurriculumStage, SuccessRule, success_rule
from esper_simic.config_section import did_you_mean
from esper_simic.curriculum_facts import (
    CoordinationMode,
    CurriculumAdvanced,
    CurriculumFact,
    CurriculumHeld,
    CurriculumReply,
    CurriculumRequest,
)
from esper_simic.errors import InvariantViolation
from esper_simic.safety_facts import BreakerFact

WINDOW_MAX: Final = 1000

ANSWERS_MAX: Final = 16
"""Answers that are remembered, so that a request which is repeated gets the one that it got before."""

DIFFICULTY_TOLERANCE: Final = 1e-6
"""A difficulty may have travelled in single precision."""

EPISODES_MAX: Final = 1_000_000


class Episode(Protocol):
    """What the curriculum reads of an episode's outcome; `events.EpisodeFinished` is such."""

    @property
    def episode_return(self) -> float:
        """Sum of its rewards."""

    @property
    def accuracy(self) -> float | None:
        """At its end, in percent; None in a world without."""

    @property
    def success(self) -> bool | None:
        """The world's own word; None where it has none."""

    @property
    def is_whole(self) -> bool:
        """Whether it was played to where it ends by its world's own rules."""

    @property
    def rolled_back(self) -> bool:
        """Whether the governor ended it, undoing what the policy had done."""


class Criteria(msgspec.Struct, frozen=True):
    """When a stage is passed."""

    min_success_rate: float
    min_episodes: int
    max_episodes: int


class Coordination(msgspec.Struct, frozen=True):
    """What the last request asked for: its mode, the stage it named, and its numbers where they are in force."""

    mode: CoordinationMode = CoordinationMode.INDEPENDENT
    stage: int = 0
    criteria: Criteria | None = None


class CurriculumState(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides what comes; JSON types.

    Attributes:
        stage: Index of the stage.
        episodes: Counted in its present round.
        successes: Of these.
        recent: The newest of these, oldest first, a letter each: 1 for a success, 0 for none.
        rounds: Rounds of this stage that have failed.
        strays: Episodes of other stages than the one that was on when they were counted.
        breaker: The progression's.
        coordination: What the last request asked for.
        answers: The newest replies, oldest first.
    """

    stage: int = 0
    episodes: int = 0
    successes: int = 0
    recent: str = ""
    rounds: int = 0
    strays: int = 0
    breaker: Breaker = Breaker(name="curriculum")
    coordination: Coordination = Coordination()
    answers: list[CurriculumReply] = []


class Judged(NamedTuple):
    """The state after a look at it, and what became of it."""

    state: CurriculumState
    facts: list[CurriculumFact]


class Answered(NamedTuple):
    """The state after a request, the reply, and what became of it."""

    state: CurriculumState
    reply: CurriculumReply
    facts: list[CurriculumFact]


def success_of(rule: SuccessRule, episode: Episode) -> bool | None:
    """Whether an episode counts as a success; None where it does not count.

    One that the governor rolled back is a failure: the policy had driven its host into the ground. One that was cut for
    any other reason, such as staggering, does not count.

    Args:
        rule: What is a success.
        episode: The outcome.

    Raises:
        InvariantViolation: The rule asks for an accuracy, and the world has none.
    """
    if episode.rolled_back:
        return False
    if not episode.is_whole:
        return None
    if rule.measure == "success":
        return episode.success
    if rule.measure == "return":
        return episode.episode_return >= rule.least
    if episode.accuracy is None:
        raise InvariantViolation(
            "curriculum_success asks for an accuracy, and this world's episodes have none; use 'return >= x'"
        )
    return episode.accuracy >= rule.least


def window_of(min_episodes: int) -> int:
    """Episodes over which a success rate is taken."""
    return min(min_episodes, WINDOW_MAX)


@dataclass(frozen=True, slots=True)
class Curriculum:
    """The rules by which a curriculum's state moves.

    Attributes:
        stages: In order, at least one.
        breaker: When progress is no longer judged, and for how long.
        successes: The rule of success of each stage.
    """

    stages: tuple[CurriculumStage, ...]
    breaker: BreakerRule
    successes: tuple[SuccessRule, ...]

    @classmethod
    def of(cls, keys: CurriculumKeys) -> Curriculum:
        """The rules that a configuration asks for."""
        return cls(
            keys.curriculum_stages,
            BreakerRule(
                keys.curriculum_breaker_failure_threshold, keys.curriculum_breaker_recovery_timeout_s
            ),
            tuple(success_rule(stage.success or keys.curriculum_success) for stage in keys.curriculum_stages),
        )

    def stage(self, state: CurriculumState) -> CurriculumStage:
        """The stage that is on."""
        return self.stages[state.stage]

    def difficulty(self, state: CurriculumState) -> float:
        """Of the stage that is on, in [0, 1]."""
        return self.stage(state).difficulty

    def is_last(self, state: CurriculumState) -> bool:
        """Whether no stage follows."""
        return state.stage == len(self.stages) - 1

    def criteria(self, state: CurriculumState) -> Criteria:
        """When the stage that is on is passed."""
        asked = state.coordination
        if asked.criteria is not None and asked.stage == state.stage:
            return asked.criteria
        stage = self.stage(state)
        return Criteria(stage.min_success_rate, stage.min_episodes, stage.max_episodes)

    def success_rate(self, state: CurriculumState) -> float:
        """Share of successes among the newest episodes of the round; 0 before the first."""
        newest = state.recent[-window_of(self.criteria(state).min_episodes) :]
        return newest.count("1") / len(newest) if newest else 0.0

    def should_advance(self, state: CurriculumState) -> bool:
        """Whether the stage is passed and another follows; the breaker is not asked."""
        return self._is_passed(state) and self._may_go_on(state)

    def restored(self, numbers: dict[str, Any]) -> CurriculumState:
        """The state that `msgspec.to_builtins` made these numbers of.

        Raises:
            ValueError: They are not such (`msgspec.ValidationError` is one), or of another curriculum.
        """
        state = msgspec.convert(numbers, CurriculumState)
        if max(state.stage, state.coordination.stage) >= len(self.stages):
            raise ValueError(
                f"the curriculum was in stage {state.stage}, of coordination {state.coordination.stage}; "
                f"there are {len(self.stages)}"
            )
        return state

    # -- folding ---------------------------------------------------------------------------------------------------

    def standing(self, state: CurriculumState, stage: int) -> CurriculumState:
        """The state in this stage: as it is, or at the beginning of a round if it was another."""
        if stage == state.stage:
            return state
        return msgspec.structs.replace(state, stage=stage, episodes=0, successes=0, recent="", rounds=0)

    def outcomes(self, stage: int, episodes: Iterable[Episode]) -> list[bool]:
        """Which of the episodes that count, all of one stage, were successes; see `success_of`."""
        judged = (success_of(self.successes[stage], one) for one in episodes)
        return [success for success in judged if success is not None]

    def counted(self, state: CurriculumState, stage: int, successes: Iterable[bool]) -> CurriculumState:
        """Fold outcomes of episodes.

        Args:
            state: Before.
            stage: The index of the stage in which they were played.
            successes: In order of time.
        """
        letters = "".join("1" if success else "0" for success in successes)
        if stage != state.stage:
            return msgspec.structs.replace(state, strays=state.strays + len(letters))
        return msgspec.structs.replace(
            state,
            episodes=state.episodes + len(letters),
            successes=state.successes + letters.count("1"),
            recent=(state.recent + letters)[-WINDOW_MAX:],
        )

    def judged(self, state: CurriculumState, now_s: float) -> Judged:
        """Look whether the stage is passed, or its round has failed, and go on accordingly.

        Args:
            state: Before.
            now_s: The time, from a clock whose readings are kept with what happened.

        Returns:
            The state, and at most one of `CurriculumAdvanced` and `CurriculumHeld`, with the breaker's own facts.
        """
        state = msgspec.structs.replace(state, breaker=observed(self.breaker, state.breaker, now_s))
        advances = self.should_advance(state)
        if not (advances or self._has_failed(state)) or not allows(self.breaker, state.breaker, now_s):
            return Judged(state, [])
        breaker, tried = attempted(self.breaker, state.breaker, now_s)
        state = msgspec.structs.replace(state, breaker=breaker)
        if advances:
            return self._advanced(state, now_s, tried)
        breaker, opened = failed(self.breaker, breaker, now_s)
        held = CurriculumHeld(
            stage=self.stage(state).name,
            rounds=state.rounds + 1,
            episodes=state.episodes,
            success_rate=self.success_rate(state),
        )
        state = msgspec.structs.replace(
            state, episodes=0, successes=0, recent="", rounds=state.rounds + 1, breaker=breaker
        )
        return Judged(state, [*tried, held, *opened])

    def answer(self, state: CurriculumState, request: CurriculumRequest, now_s: float) -> Answered:
        """Obey a request, or refuse it and say why; see `CoordinationMode`.

        A request that is repeated changes nothing and gets its first answer, as long as that is remembered.

        Args:
            state: Before.
            request: As it came.
            now_s: As in `judged`.
        """
        for reply in state.answers:
            if reply.request_id == request.request_id:
                return Answered(state, reply, [])
        facts: list[CurriculumFact] = []
        index = self._index(request.stage)
        refusal = self._refusal(state, request, index, now_s)
        if index is not None and not refusal:
            state, facts = self._obeyed(state, request, index, now_s)
        reply = CurriculumReply(
            request_id=request.request_id,
            correlation_id=request.correlation_id,
            stage=self.stage(state).name,
            episodes=state.episodes,
            success_rate=self.success_rate(state),
            advanced=any(isinstance(fact, CurriculumAdvanced) for fact in facts),
            refusal=refusal,
        )
        remembered = [*state.answers, reply][-ANSWERS_MAX:]
        return Answered(msgspec.structs.replace(state, answers=remembered), reply, facts)

    # -- parts -----------------------------------------------------------------------------------------------------

    def _is_passed(self, state: CurriculumState) -> bool:
        criteria = self.criteria(state)
        enough = state.episodes >= criteria.min_episodes
        return enough and self.success_rate(state) >= criteria.min_success_rate

    def _may_go_on(self, state: CurriculumState) -> bool:
        asked = state.coordination
        if self.is_last(state) or asked.mode is CoordinationMode.STRATEGY_DRIVEN:
            return False
        return asked.mode is not CoordinationMode.SYNCHRONIZED or state.stage < asked.stage

    def _has_failed(self, state: CurriculumState) -> bool:
        if state.coordination.mode is CoordinationMode.STRATEGY_DRIVEN:
            return False
        return state.episodes >= self.criteria(state).max_episodes and not self._is_passed(state)

    def _advanced(self, state: CurriculumState, now_s: float, tried: list[BreakerFact]) -> Judged:
        """The next stage; the breaker has noted the attempt."""
        after = self.stages[state.stage + 1]
        advanced = CurriculumAdvanced(
            from_stage=self.stage(state).name,
            to_stage=after.name,
            difficulty=after.difficulty,
            episodes=state.episodes,
            success_rate=self.success_rate(state),
        )
        breaker, closed = succeeded(self.breaker, state.breaker, now_s)
        state = msgspec.structs.replace(
            state,
            stage=state.stage + 1,
            episodes=0,
            successes=0,
            recent="",
            rounds=0,
            breaker=breaker,
        )
        return Judged(state, [*tried, advanced, *closed])

    def _index(self, name: str) -> int | None:
        return next((index for index, stage in enumerate(self.stages) if stage.name == name), None)

    def _refusal(
        self, state: CurriculumState, request: CurriculumRequest, index: int | None, now_s: float
    ) -> str:
        """Why a request about the stage of this index cannot be obeyed; empty where it can."""
        if index is None:
            names = [stage.name for stage in self.stages]
            hint = did_you_mean(request.stage, names)
            return f"unknown stage {request.stage!r}{hint}; known: {', '.join(names)}"
        refusal = _refusal_of_numbers(request, self.stages[index].difficulty)
        if refusal or request.mode is CoordinationMode.INDEPENDENT:
            return refusal
        return self._refusal_of_move(state, request.mode, index, now_s)

    def _refusal_of_move(
        self, state: CurriculumState, mode: CoordinationMode, index: int, now_s: float
    ) -> str:
        if index < state.stage:
            return f"stage {self.stages[index].name!r} is passed, and no stage is gone back to"
        if mode is not CoordinationMode.STRATEGY_DRIVEN or index == state.stage:
            return ""
        if index > state.stage + 1:
            return f"no stage is skipped; the next one is {self.stages[state.stage + 1].name!r}"
        if not allows(self.breaker, state.breaker, now_s):
            return "the breaker of the progression is open"
        return ""

    def _obeyed(self, state: CurriculumState, request: CurriculumRequest, index: int, now_s: float) -> Judged:
        criteria = None
        if request.mode is CoordinationMode.TASK_DRIVEN:
            criteria = Criteria(request.min_success_rate, request.min_episodes, request.max_episodes)
        state = msgspec.structs.replace(state, coordination=Coordination(request.mode, index, criteria))
        if request.mode is not CoordinationMode.STRATEGY_DRIVEN or index == state.stage:
            return Judged(state, [])
        breaker, tried = attempted(self.breaker, state.breaker, now_s)
        return self._advanced(msgspec.structs.replace(state, breaker=breaker), now_s, tried)


def _refusal_of_numbers(request: CurriculumRequest, difficulty: float) -> str:
    if not abs(request.difficulty - difficulty) <= DIFFICULTY_TOLERANCE:
        return f"stage {request.stage!r} has difficulty {difficulty:g} here, not {request.difficulty:g}"
    if not 0 < request.min_success_rate <= 1:
        return f"min_success_rate {request.min_success_rate:g} is not in (0, 1]"
    if not 1 <= request.min_episodes <= request.max_episodes <= EPISODES_MAX:
        return (
            f"min_episodes {request.min_episodes} and max_episodes {request.max_episodes} do not rise within 1 to "
            f"{EPISODES_MAX}"
        )
    return ""
