"""Whatever happens to a learner, in whichever order: the records alone give the same state, facts and metrics."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
import torch

from esper_simic.config import Config, parse
from esper_simic.curriculum_facts import CoordinationMode, CurriculumRequest
from esper_simic.events import (
    CurriculumJudged,
    ExperienceAdmitted,
    HaltLifted,
    LearnerStepped,
    StepFailed,
    StepSkipped,
)
from esper_simic.learner import Learner
from esper_simic.safety import StepInputs
from esper_simic.updates.batch import Batch
from esper_simic.updates.update import Terms, Updated
from supervisor.roles.step_record import step_fact
from tests.policies.synthetic import SPEC
from tests.test_learner import LANES, SETTINGS, make_event, make_unroll
from tests.test_learner_curriculum import STAGES, episode
from tests.test_learner_safety import EPOCHS, MINIBATCHES, ON_POLICY, is_same, reloaded

RESTLESS = (
    *EPOCHS,
    "simic_trainer.digest_every_steps=1",
    "simic_trainer.ewc_lambda=0.5",
    "simic_trainer.ewc_sample_size=12",
    "simic_trainer.ewc_adjusts_rate=true",
    "simic_trainer.training_breaker_failure_threshold=2",
    "simic_trainer.training_breaker_recovery_timeout_s=5",
    "simic_trainer.circuit_breaker_recovery_timeout_s=3",
    "simic_trainer.halt_after_openings=2",
    "simic_trainer.conservative_quiet_steps=2",
    "simic_trainer.conservative_quiet_s=2",
)
"""Everything that follows from trouble comes soon, and ends soon."""

ALGORITHMS = {
    "IMPALA": (),
    "PPO": (*ON_POLICY, *MINIBATCHES),
    "IQL": ("simic_trainer.algorithm=IQL",),
}
MOVES = 80


def configured(chance: random.Random, *assignments: str) -> Config:
    start = chance.choice([None, 0, 1, 4])
    adapters = (
        () if start is None else (f"simic_trainer.lora_start_step={start}", "simic_trainer.lora_rank=2")
    )
    stages = {"simic_trainer": {"curriculum_stages": list(STAGES)}}
    return parse(SETTINGS, base=stages, assignments=[*RESTLESS, *adapters, *assignments])


class History:
    """A learner to which all sorts of things happen, and their records."""

    def __init__(self, config: Config, chance: random.Random) -> None:
        self.config, self.chance = config, chance
        self.learner = Learner(config, SPEC)
        self.records: list[Any] = []
        self.now_s, self.unrolls, self.orders = 1000.0, 0, 0

    def go_on(self) -> None:
        """One thing happens; time may stand still, or go back."""
        self.now_s += self.chance.choice([0.0, 0.5, 1.0, 6.0, -3.0])
        dice = self.chance.random()
        if dice < 0.4:
            self.admit()
        elif dice < 0.46:
            self.ask()
        elif dice < 0.49:
            self.learner.skip()
            self.note(StepSkipped(step=self.learner.steps_done, reason="it killed"))
        elif dice < 0.53:
            other = reloaded(self.learner)
            assert is_same(other, self.learner)
            self.learner = other
        elif self.learner.is_halted:
            self.lift()
        else:
            self.step()

    def note(self, event: Any) -> None:
        self.records.append(msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=type(event)))

    def admit(self) -> None:
        buffer, chance = self.learner.buffer, self.chance
        if buffer.fresh + LANES > buffer.capacity:
            return  # no credit is left then
        successes = [chance.choice([True, False, None]) for _ in range(chance.randrange(4))]
        ended = [episode(one, number=i, rolled_back=chance.random() < 0.1) for i, one in enumerate(successes)]
        event = msgspec.structs.replace(
            make_event(self.unrolls, episodes=ended),
            stage=chance.choice([self.learner.stage, 0]),
            behaviour=chance.choice(["policy", "policy", "random"]),
        )
        self.learner.admit(10 * self.unrolls, event, make_unroll(self.unrolls))
        self.note(event)
        self.unrolls += 1
        self.judge(self.learner.verdict(self.now_s))

    def judge(self, event: CurriculumJudged | None) -> None:
        if event is not None:
            self.learner.judge(event)
            self.note(event)

    def ask(self) -> None:
        stage: dict[str, Any] = self.chance.choice(STAGES)
        request = CurriculumRequest(
            request_id=str(self.chance.randrange(9)),
            stage=stage["name"],
            difficulty=stage["difficulty"],
            min_success_rate=0.3,
            min_episodes=2,
            max_episodes=5,
            mode=self.chance.choice(list(CoordinationMode)),
            issued_at_s=0.0,
        )
        self.judge(self.learner.stages.asked(request, self.now_s)[1])

    def lift(self) -> None:
        self.orders += 1
        lifted = self.learner.lifted(self.orders)
        assert lifted is not None
        self.learner.lift(lifted)
        self.note(lifted)

    def step(self) -> None:
        """An update where one may be made; half of them fail, before or after everything has moved."""
        mode, chance = self.learner.mode(self.now_s), self.chance
        if not (mode.may_step and self.learner.can_step(mode.batch_size(8))):
            return
        update = self.learner.engine._update
        moves, error = chance.choice(
            [
                (True, None),
                (True, None),
                (False, FloatingPointError("nan")),
                (True, FloatingPointError("nan")),
                (False, torch.OutOfMemoryError("full")),
                (True, torch.OutOfMemoryError("full")),
            ]
        )

        def troubled(batch: Batch, terms: Terms) -> Updated:
            updated = update(batch, terms) if moves else None
            if error is not None or updated is None:
                raise error or AssertionError
            return updated

        inputs = StepInputs(
            at_s=self.now_s,
            previous_step_ms=chance.choice([None, 900.0]),
            memory_fraction=chance.choice([0.1, 0.95]),
            operations_since=3,
            errors_since=chance.choice([0, 2]),
            experiences_since=chance.choice([None, 5]),
            buffer_bytes=3.0,
        )
        self.learner.engine._update = troubled
        report = self.learner.step(inputs)
        self.learner.engine._update = update
        self.note(step_fact(report, inputs))


def folded(config: Config, records: list[Any]) -> Learner:
    """A learner that was told the records alone, and says of each update what they say."""
    learner, unrolls = Learner(config, SPEC), 0
    for event in records:
        match event:
            case ExperienceAdmitted():
                learner.admit(10 * unrolls, event, make_unroll(unrolls))
                unrolls += 1
            case CurriculumJudged():
                learner.judge(event)
            case HaltLifted():
                learner.lift(event)
            case StepSkipped():
                learner.skip()
            case LearnerStepped():
                assert event.inputs is not None
                assert step_fact(learner.step(event.inputs), event.inputs) == event
            case StepFailed():
                assert step_fact(learner.fail(event), event.inputs) == event
    return learner


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_records_of_any_history_give_its_state(algorithm: str, seed: int) -> None:
    chance = random.Random(f"{algorithm} {seed}")
    history = History(configured(chance, *ALGORITHMS[algorithm]), chance)
    for _ in range(MOVES):
        history.go_on()
    kinds = {type(record) for record in history.records}
    assert {ExperienceAdmitted, CurriculumJudged, LearnerStepped, StepFailed} <= kinds, "enough has happened"
    assert is_same(folded(history.config, history.records), history.learner)
