"""A world without processes: what the pure core is told and what it answers, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from esper_simic.config import SupervisorConfig
from supervisor.decide import decide, plan
from supervisor.events import (
    AnyEffect,
    AnyEvent,
    AnyInput,
    AskStop,
    ChildGone,
    ChildId,
    ChildSaidReady,
    ChildSpawned,
    CommandReceived,
    DumpStacks,
    EvaluationHeard,
    ExitReason,
    KillChild,
    LearnerReported,
    ProgressHeard,
    RunBegun,
    SendEvaluationTask,
    SignalReceived,
    StartChild,
    Tick,
)
from supervisor.state import LIVE, Phase, RunState, Status, apply, check

POLICIES = ("learned", "random", "never-grow")
LEARNER = ChildId("learner", 0, 1)


def actor(index: int, incarnation: int = 1) -> ChildId:
    return ChildId("actor", index, incarnation)


def evaluator(index: int, incarnation: int = 1) -> ChildId:
    return ChildId("evaluate", index, incarnation)


def learner(incarnation: int) -> ChildId:
    return ChildId("learner", 0, incarnation)


def begun(
    policies: tuple[str, ...] = POLICIES,
    config: SupervisorConfig | None = None,
    started_unix_s: float = 0.0,
    *,
    is_extended: bool = False,
    trains_on: bool = False,
) -> RunBegun:
    return RunBegun(
        run_id="run-1",
        preset="digits",
        config_text="",
        config={}
        if config is None
        else {
            "supervisor": config.model_dump(mode="json"),
            "simic_trainer": {"training_timeout_hours": 24.0},
        },
        fingerprint={},
        versions={},
        started_unix_s=started_unix_s,
        evaluation_policies=policies,
        is_extended=is_extended,
        trains_on=trains_on,
    )


class World:
    """Holds the state and the time; every input is decided, folded and checked."""

    def __init__(self, policies: tuple[str, ...] = POLICIES, **config: Any) -> None:
        self.policies = policies
        self.config = SupervisorConfig.model_validate({"num_actors": 2, **config})
        self.state = RunState()
        self.now_s = 0.0
        self.events: list[AnyEvent] = []
        self.tell(begun(policies, self.config))

    def resume(
        self, is_extended: bool = False, trains_on: bool = False, /, **changed: float | None
    ) -> list[str]:
        """Another supervisor takes over, whatever became of the one before; its clock begins at 0."""
        self.config = SupervisorConfig.model_validate(self.config.model_dump() | changed)
        self.now_s = 0.0
        return self.tell(
            begun(
                self.policies,
                self.config,
                started_unix_s=1000.0,
                is_extended=is_extended,
                trains_on=trains_on,
            )
        )

    def tell(self, observed: AnyInput) -> list[str]:
        """Decide and fold; the names of the events that followed."""
        events = decide(self.state, observed, self.now_s, self.config)
        for event in events:
            self.state = apply(self.state, event)
            check(self.state)
        self.events.extend(events)
        return [type(event).__name__ for event in events]

    def owed(self) -> tuple[AnyEffect, ...]:
        return plan(self.state, self.now_s, self.config)

    def wait(self, seconds: float, **progressed_at_s: float) -> list[str]:
        """Time passes; when the children of a role worked last, for all of them."""
        live = self.state.live
        return self.wait_for({w: progressed_at_s[w.role] for w in live if w.role in progressed_at_s}, seconds)

    def wait_for(self, progressed_at_s: Mapping[ChildId, float], seconds: float) -> list[str]:
        """Time passes; when each child worked last."""
        self.now_s += seconds
        return self.tell(Tick(progressed_at_s=dict(progressed_at_s)))

    def spawn(self) -> None:
        """Settle every owed start."""
        for effect in self.owed():
            if isinstance(effect, StartChild):
                self.tell(ChildSpawned(child=effect.child, pid=pid_of(effect.child)))

    def ready(self, *children: ChildId, learner_step: int = 0, environment_steps: int = 0) -> list[str]:
        names: list[str] = []
        for who in children:
            step, steps = (learner_step, environment_steps) if who.role == "learner" else (0, 0)
            said = ChildSaidReady(child=who, pid=pid_of(who), learner_step=step, environment_steps=steps)
            names += self.tell(said)
        return names

    def gone(self, who: ChildId, reason: ExitReason = ExitReason.CLEAN, detail: str = "") -> list[str]:
        return self.tell(ChildGone(child=who, reason=reason, detail=detail))

    def report_checkpoint(self, who: ChildId = LEARNER, learner_step: int = 7) -> list[str]:
        return self.tell(
            LearnerReported(
                child=who,
                path=f"checkpoints/{learner_step}",
                learner_step=learner_step,
                environment_steps=10 * learner_step,
                digest="d",
            )
        )

    def evaluated(self, who: ChildId, policy: str) -> list[str]:
        return self.tell(
            EvaluationHeard(
                child=who, policy=policy, returns=(1.0,), accuracies=(2.0,), parameters=(3.0,), summary={}
            )
        )

    def train(self, *, learner_step: int = 0, environment_steps: int = 0) -> None:
        """Everybody up, training begun."""
        self.spawn()
        waiting = sorted(self.state.of_role("learner", Status.STARTED))
        waiting += sorted(self.state.of_role("actor", Status.STARTED))
        self.ready(*waiting, learner_step=learner_step, environment_steps=environment_steps)

    def end_training(self, learner_step: int = 7) -> None:
        """Actors and learner leave in order, with a checkpoint."""
        for who in sorted(self.state.of_role("actor")):
            self.gone(who)
        for who in sorted(self.state.of_role("learner", *LIVE)):
            self.report_checkpoint(who, learner_step)
            self.gone(who)

    def evaluate(self) -> None:
        """Every policy measured, and everybody gone."""
        while self.state.phase is Phase.EVALUATING:
            self.spawn()
            self.ready(*self.state.of_role("evaluate", Status.STARTED))
            for effect in self.owed():
                if isinstance(effect, SendEvaluationTask):
                    self.evaluated(effect.child, effect.policy)
        for who in sorted(self.state.live):
            self.gone(who)

    def obey(self, effect: AnyEffect) -> None:
        """Do what is owed, at once and well."""
        who = effect.child
        match effect:
            case StartChild():
                self.tell(ChildSpawned(child=who, pid=pid_of(who)))
            case AskStop() | DumpStacks() | KillChild():
                if who.role == "learner" and isinstance(effect, AskStop):
                    self.report_checkpoint(who)
                self.gone(who, ExitReason.CLEAN if isinstance(effect, AskStop) else ExitReason.SIGNAL)
            case SendEvaluationTask():
                self.evaluated(who, effect.policy)

    def time_is_up(self) -> None:
        """Training ends by its limit of time; the children go on working until then."""
        assert self.config.max_seconds is not None
        until_s = self.now_s + self.config.max_seconds
        self.wait(self.config.max_seconds, learner=until_s, actor=until_s)


def pid_of(who: ChildId) -> int:
    return 1000 * ("learner", "actor", "evaluate").index(who.role) + 100 * who.index + who.incarnation + 10


# Whatever may be observed

CHILDREN = st.builds(
    ChildId,
    st.sampled_from(["learner", "actor", "evaluate"]),
    st.integers(0, 2),
    st.integers(1, 3),
)


INPUTS: st.SearchStrategy[AnyInput] = st.one_of(
    CHILDREN.map(lambda who: ChildSpawned(child=who, pid=pid_of(who))),
    CHILDREN.map(lambda who: ChildSaidReady(child=who, pid=pid_of(who))),
    st.builds(ChildGone, child=CHILDREN, reason=st.sampled_from(list(ExitReason)), detail=st.just("")),
    st.builds(
        ProgressHeard, child=CHILDREN, learner_step=st.integers(0, 9), environment_steps=st.integers(0, 2000)
    ),
    CHILDREN.map(
        lambda who: LearnerReported(child=who, path="p", learner_step=1, environment_steps=1, digest="d")
    ),
    st.builds(
        EvaluationHeard,
        child=CHILDREN,
        policy=st.sampled_from([*POLICIES, "stranger"]),
        returns=st.just(()),
        accuracies=st.just(()),
        parameters=st.just(()),
        summary=st.just({}),
    ),
    st.just(SignalReceived(name="SIGINT")),
    st.builds(CommandReceived, command_id=st.sampled_from(["a", "b"]), name=st.sampled_from(["stop", "x"])),
    st.just(Tick(progressed_at_s={})),
    st.just(begun()),
)

STEPS = st.lists(st.tuples(INPUTS, st.floats(0, 50, allow_nan=False)), max_size=60)


# What may befall a run that otherwise goes its way

HAPPENINGS = ("obey", "ready", "ready", "wait", "time is up", "work", "die", "signal", "resume")

STORIES = st.lists(
    st.tuples(st.sampled_from(HAPPENINGS), st.integers(0, 9), st.sampled_from(list(ExitReason))), max_size=80
)


def happen(world: World, what: str, number: int, reason: ExitReason) -> None:
    """One thing that may happen in a world, to the `number`-th of those it can happen to; if to nobody, nothing."""
    live = sorted(world.state.live)
    one = live[number % len(live)] if live else None
    owed = world.owed()
    match what:
        case "obey" if owed:
            world.obey(owed[number % len(owed)])
        case "ready" if one is not None and world.state.children[one].status is Status.STARTED:
            world.ready(one, learner_step=number, environment_steps=10 * number)
        case "wait":
            world.wait_for(dict.fromkeys(live, world.now_s + number), number)
        case "time is up":
            world.wait_for(dict.fromkeys(live, world.now_s + 300.0), 300.0)
        case "work" if one is not None:
            world.tell(ProgressHeard(child=one, learner_step=number, environment_steps=200 * number))
        case "die" if one is not None:
            world.gone(one, reason)
        case "signal" if number == 0:
            world.tell(SignalReceived(name="SIGTERM"))
        case "resume" if number <= 2:
            world.resume()
        case _:
            pass
