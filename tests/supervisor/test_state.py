"""The fold: determined, total, and checked for contradictions."""

from __future__ import annotations

from typing import Any, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.errors import ContractError, InvariantViolation
from supervisor.events import (
    EVENTS,
    AnyEvent,
    ChildEvent,
    ChildExited,
    ChildId,
    ChildReady,
    ChildScheduled,
    ChildStarted,
    ChildStopRequested,
    EvaluationAssigned,
    ExitReason,
    RunFinished,
    TrainingStarted,
    from_journal,
)
from supervisor.state import NEXT_PHASE, Child, Phase, RunState, Status, apply, check
from tests.supervisor.worlds import LEARNER, World, actor, evaluator

FLOATS = st.floats(allow_nan=False)
SMALL = st.integers(0, 3)


def values_of(hint: object) -> st.SearchStrategy[object]:
    """Any value of a field's type, fit for MessagePack and for comparison."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        # Its own fields likewise: any integer at all is more than MessagePack holds, and nan is not itself.
        return st.fixed_dictionaries(
            {name: values_of(inner) for name, inner in get_type_hints(hint).items()}
        ).map(lambda fields: hint(**fields))
    of_type: dict[object, st.SearchStrategy[object]] = {
        float: FLOATS,
        int: SMALL,
        tuple[float, ...]: st.lists(FLOATS, max_size=3).map(tuple),
        dict[str, float]: st.dictionaries(st.text(max_size=3), FLOATS, max_size=2),
        dict[str, Any]: st.dictionaries(st.text(max_size=3), st.integers(-(2**63), 2**64 - 1), max_size=2),
    }
    return of_type[hint] if hint in of_type else st.from_type(hint)  # type: ignore[arg-type]


def any_of(kind: type[AnyEvent]) -> st.SearchStrategy[AnyEvent]:
    hints = get_type_hints(kind)
    return st.fixed_dictionaries({name: values_of(hint) for name, hint in hints.items()}).map(
        lambda fields: kind(**fields)  # type: ignore[arg-type]
    )


ANY_EVENT = st.one_of([any_of(kind) for kind in EVENTS.values()])


def about(kind: type[ChildEvent], who: ChildId, at_s: float = 0.0, **fields: object) -> ChildEvent:
    return kind(at_s=at_s, role=who.role, index=who.index, incarnation=who.incarnation, **fields)


@given(st.lists(ANY_EVENT, max_size=20))
def test_apply_takes_any_event_in_any_order(events: list[object]) -> None:
    state = RunState()
    for event in events:
        state = apply(state, event)  # type: ignore[arg-type]
    assert isinstance(state, RunState)


@given(st.lists(ANY_EVENT, max_size=20), st.integers(0, 20))
def test_a_fold_can_be_cut_anywhere(events: list[object], cut: int) -> None:
    whole, first = RunState(), RunState()
    for event in events:
        whole = apply(whole, event)  # type: ignore[arg-type]
    for event in events[:cut]:
        first = apply(first, event)  # type: ignore[arg-type]
    for event in events[cut:]:
        first = apply(first, event)  # type: ignore[arg-type]
    assert first == whole


@given(ANY_EVENT)
def test_every_event_comes_back_from_the_journal_as_it_went_in(event: object) -> None:
    header = msgspec.msgpack.decode(msgspec.msgpack.encode(event))
    assert from_journal(type(event).__name__, header) == event


def test_a_record_of_another_program_is_a_contract_error() -> None:
    with pytest.raises(ContractError, match="unknown supervisor event 'Danced'"):
        from_journal("Danced", {})
    with pytest.raises(ContractError, match="does not fit a TrainingStarted"):
        from_journal("TrainingStarted", {"at_s": "soon"})


def test_the_past_is_not_changed_by_going_on() -> None:
    world = World()
    before = world.state
    copy = msgspec.json.encode(sorted(before.children))
    world.spawn()
    assert msgspec.json.encode(sorted(before.children)) == copy
    assert all(child.status is Status.SCHEDULED for child in before.children.values())


def test_a_life_of_a_child_goes_through_its_statuses() -> None:
    state = RunState()
    seen = []
    for event in (
        about(ChildScheduled, actor(0), 1.0, start_at_s=2.0, attempt=0),
        about(ChildStarted, actor(0), 3.0, pid=9),
        about(ChildReady, actor(0), 4.0),
        about(ChildStopRequested, actor(0), 5.0, reason="test", kill_at_s=25.0),
        about(ChildExited, actor(0), 6.0, reason=ExitReason.CLEAN, detail=""),
    ):
        state = apply(state, event)  # type: ignore[arg-type]
        check(state)
        seen.append((str(state.children[actor(0)].status), state.children[actor(0)].since_s))
    assert seen == [("scheduled", 1.0), ("started", 3.0), ("ready", 4.0), ("stopping", 5.0), ("exited", 6.0)]


def test_a_later_stop_can_only_shorten_the_time() -> None:
    state = apply(RunState(), about(ChildStopRequested, actor(0), reason="a", kill_at_s=5.0))  # type: ignore[arg-type]
    for kill_at_s, expected in ((9.0, 5.0), (2.0, 2.0)):
        state = apply(state, about(ChildStopRequested, actor(0), reason="b", kill_at_s=kill_at_s))  # type: ignore[arg-type]
        assert state.children[actor(0)].kill_at_s == expected


def test_only_the_lives_that_ended_are_forgotten() -> None:
    world = World()
    world.train()
    world.gone(actor(0))
    assert actor(0) not in world.state.children
    assert actor(0, 2) in world.state.children
    assert actor(1) in world.state.children


def test_terminal_phases_have_no_way_out() -> None:
    assert not {phase for phase, _ in NEXT_PHASE} & {Phase.FINISHED, Phase.STOPPED, Phase.FAILED}


def child(status: Status, **fields: object) -> Child:
    return Child(status=status, since_s=0.0, **({"pid": 7} | fields))  # type: ignore[arg-type]


FINISHED = RunFinished(at_s=1.0, exit_code=0, outcome="finished", reason="")


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        (RunState(children={LEARNER: child(Status.READY, pid=0)}), "without a process id"),
        (
            RunState(children={actor(0, 1): child(Status.STOPPING), actor(0, 2): child(Status.READY)}),
            "two lives",
        ),
        (
            RunState(children={actor(0, 1): child(Status.READY), actor(0, 2): child(Status.SCHEDULED)}),
            "two lives",
        ),
        (RunState(children={evaluator(0): child(Status.EXITED, policy="learned")}), "still owes"),
        (
            RunState(phase=Phase.FINISHED, finished=FINISHED, children={LEARNER: child(Status.READY)}),
            "have processes",
        ),
        (RunState(phase=Phase.EVALUATING, children={LEARNER: child(Status.STOPPING)}), "evaluation began"),
        (RunState(phase=Phase.FINISHED), "does not agree with RunFinished"),
        (RunState(phase=Phase.TRAINING, finished=FINISHED), "does not agree with RunFinished"),
    ],
)
def test_a_contradiction_is_named(state: RunState, complaint: str) -> None:
    with pytest.raises(InvariantViolation, match=complaint):
        check(state)


def test_a_dead_evaluators_task_is_free_again() -> None:
    state = apply(RunState(), about(ChildStarted, evaluator(0), pid=3))  # type: ignore[arg-type]
    state = apply(state, about(EvaluationAssigned, evaluator(0), policy="learned"))  # type: ignore[arg-type]
    assert state.children[evaluator(0)].policy == "learned"
    state = apply(state, about(ChildExited, evaluator(0), reason=ExitReason.SIGNAL, detail=""))  # type: ignore[arg-type]
    assert state.children[evaluator(0)].policy == ""


def test_training_time_is_kept_in_the_state() -> None:
    state = apply(RunState(phase=Phase.STARTING), TrainingStarted(at_s=4.5))
    assert (state.phase, state.training_started_s) == (Phase.TRAINING, 4.5)
