"""A world without processes: what the pure core is told and what it answers, step by step."""

from __future__ import annotations

from esper_simic.config import SupervisorConfig
from supervisor.decide import decide, plan
from supervisor.events import (
    AnyEffect,
    AnyEvent,
    AnyInput,
    ChildGone,
    ChildId,
    ChildSaidReady,
    ChildSpawned,
    EvaluationHeard,
    ExitReason,
    LearnerReported,
    RunBegun,
    StartChild,
    Tick,
)
from supervisor.state import RunState, apply, check

POLICIES = ("learned", "random", "never-grow")
LEARNER = ChildId("learner", 0, 1)


def actor(index: int, incarnation: int = 1) -> ChildId:
    return ChildId("actor", index, incarnation)


def evaluator(index: int, incarnation: int = 1) -> ChildId:
    return ChildId("evaluate", index, incarnation)


def begun(policies: tuple[str, ...] = POLICIES) -> RunBegun:
    return RunBegun(
        run_id="run-1",
        preset="digits",
        config_text="",
        config={},
        fingerprint={},
        versions={},
        started_unix_s=0.0,
        evaluation_policies=policies,
    )


class World:
    """Holds the state and the time; every input is decided, folded and checked."""

    def __init__(self, policies: tuple[str, ...] = POLICIES, **config: float | None) -> None:
        self.config = SupervisorConfig.model_validate({"num_actors": 2, **config})
        self.state = RunState()
        self.now_s = 0.0
        self.events: list[AnyEvent] = []
        self.tell(begun(policies))

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
        self.now_s += seconds
        by_name = {who: progressed_at_s[who.role] for who in self.state.live if who.role in progressed_at_s}
        return self.tell(Tick(progressed_at_s=by_name))

    def spawn(self) -> None:
        """Settle every owed start."""
        for effect in self.owed():
            if isinstance(effect, StartChild):
                self.tell(ChildSpawned(child=effect.child, pid=pid_of(effect.child)))

    def ready(self, *children: ChildId) -> list[str]:
        names: list[str] = []
        for who in children:
            names += self.tell(ChildSaidReady(child=who, pid=pid_of(who)))
        return names

    def gone(self, who: ChildId, reason: ExitReason = ExitReason.CLEAN, detail: str = "") -> list[str]:
        return self.tell(ChildGone(child=who, reason=reason, detail=detail))

    def report_checkpoint(self, who: ChildId = LEARNER) -> list[str]:
        return self.tell(
            LearnerReported(child=who, path="checkpoints/7", learner_step=7, environment_steps=70, digest="d")
        )

    def evaluated(self, who: ChildId, policy: str) -> list[str]:
        return self.tell(
            EvaluationHeard(
                child=who, policy=policy, returns=(1.0,), accuracies=(2.0,), parameters=(3.0,), summary={}
            )
        )

    def train(self) -> None:
        """Everybody up, training begun."""
        self.spawn()
        self.ready(LEARNER, actor(0), actor(1))

    def end_training(self) -> None:
        """Actors and learner leave in order, with a checkpoint."""
        for who in sorted(self.state.of_role("actor")):
            self.gone(who)
        self.report_checkpoint()
        self.gone(LEARNER)


def pid_of(who: ChildId) -> int:
    return 1000 * ("learner", "actor", "evaluate").index(who.role) + 100 * who.index + who.incarnation + 10
