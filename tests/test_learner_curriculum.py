"""The curriculum in the learner's fold: what counts, what a verdict changes, what is held of a stage passed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import yaml

from esper_simic import seeding
from esper_simic.algorithms.ewc import Consolidation, estimate_fisher
from esper_simic.config import Config, parse
from esper_simic.curriculum_facts import (
    CoordinationMode,
    CurriculumAdvanced,
    CurriculumHeld,
    CurriculumRequest,
)
from esper_simic.errors import ConfigError, ContractError
from esper_simic.events import CurriculumJudged, EpisodeFinished
from esper_simic.learner import FISHER_LANES, Learner
from esper_simic.replay import Held
from esper_simic.safety import StepInputs
from esper_simic.updates.batch import prepare
from esper_simic.updates.fisher import sampled_log_probs
from tests.known_answers.two_tasks import remember
from tests.policies.synthetic import SPEC
from tests.test_learner import LANES, SETTINGS, make_event, make_unroll

STAGE = {"min_success_rate": 0.5, "min_episodes": 4, "max_episodes": 8}
STAGES = [
    STAGE | {"name": "easy", "difficulty": 0.4, "environment": {"max_epochs": 30}},
    STAGE | {"name": "middling", "difficulty": 0.6, "environment": {"max_epochs": 40}},
    STAGE | {"name": "hard", "difficulty": 1.0, "environment": {"max_epochs": 60}},
]


def configured(*assignments: str, stages: Sequence[dict[str, Any]] = STAGES) -> Config:
    return parse(
        SETTINGS,
        base={"simic_trainer": {"curriculum_stages": list(stages), "ewc_lambda": 0.0}},
        assignments=assignments,
    )


def episode(
    success: bool | None, *, cut: bool = False, rolled_back: bool = False, number: int = 0
) -> EpisodeFinished:
    return EpisodeFinished(
        lane=0,
        number=number,
        episode_return=1.0 if success else -1.0,
        length=3,
        accuracy=50.0,
        truncated=cut or rolled_back,
        success=success,
        cut=cut or rolled_back,
        rolled_back=rolled_back,
    )


class Run:
    """A learner, and what was admitted and judged, so that another one can be told the same."""

    def __init__(self, config: Config) -> None:
        self.learner = Learner(config, SPEC)
        self.number = 0

    def admits(self, *successes: bool | None, stage: int = 0, **ends: bool) -> None:
        """An unroll in which these episodes ended."""
        ended = [episode(success, number=i, **ends) for i, success in enumerate(successes)]
        event = msgspec.structs.replace(make_event(self.number, episodes=ended), stage=stage)
        self.learner.admit(10 * self.number, event, make_unroll(self.number))
        self.number += 1

    def judges(self, now_s: float = 0.0) -> CurriculumJudged | None:
        verdict = self.learner.verdict(now_s)
        if verdict is not None:
            self.learner.judge(verdict)
        return verdict

    def steps(self) -> None:
        while self.learner.can_step():
            self.learner.step(StepInputs(at_s=float(self.learner.steps_done)))

    def held(self) -> list[Held]:
        """What the buffer of another learner is to be filled with."""
        positions = self.learner.buffer.addresses()["positions"]
        return [Held(make_unroll(position // 10), 0, position) for position in positions]


def test_only_whole_episodes_of_the_stage_that_is_on_count() -> None:
    run = Run(configured())
    run.admits(True, False)
    run.admits(True, True, cut=True)
    run.admits(None, None)
    run.admits(True, True, True, stage=1)
    state = run.learner.curriculum
    assert (state.episodes, state.successes, state.recent, state.strays) == (2, 1, "10", 3)
    run.admits(True, rolled_back=True)
    state = run.learner.curriculum
    assert (state.episodes, state.successes, state.recent) == (3, 1, "100"), "it is the policy that failed"
    assert len(run.learner.ledger.episodes) == 7, "the returns of what was cut say little"
    assert run.judges() is None, "four are wanted"
    assert run.learner.stage == 0


def test_a_verdict_changes_nothing_and_judging_it_does() -> None:
    run = Run(configured())
    run.admits(True, False, True, True)
    before = run.learner.state().digest
    verdict = run.learner.verdict(7.0)
    assert verdict == run.learner.verdict(7.0)
    assert run.learner.state().digest == before
    assert verdict is not None
    (fact,) = verdict.facts
    assert fact == CurriculumAdvanced(
        from_stage="easy", to_stage="middling", difficulty=0.6, episodes=4, success_rate=0.75
    )
    assert (verdict.at_s, verdict.stage, verdict.consolidated) == (7.0, 1, 0)
    run.learner.judge(verdict)
    assert run.learner.stage == 1
    assert run.learner.state().digest != before
    assert run.learner.verdict(8.0) is None, "once"
    run.admits(True, True, True, True, stage=0)
    assert run.learner.verdict(9.0) is None, "episodes of the stage before are strays"
    assert run.learner.curriculum.strays == 4


def test_a_round_that_fails_is_told_and_the_breaker_waits() -> None:
    run = Run(configured("simic_trainer.curriculum_breaker_failure_threshold=1"))
    run.admits(*[False] * 8)
    held = run.judges(100.0)
    assert held is not None
    assert next(type(fact) for fact in held.facts) is CurriculumHeld
    assert (held.stage, held.consolidated, run.learner.stage) == (0, 0, 0)
    run.admits(*[True] * 4)
    assert run.judges(219.0) is None, "the breaker is open"
    passed = run.judges(221.0)
    assert passed is not None
    assert passed.stage == 1


def test_the_last_stage_stays_on() -> None:
    run = Run(configured())
    for stage in (0, 1, 2, 2):
        run.admits(*[True] * 4, stage=stage)
        run.judges()
    assert run.learner.stage == 2


def test_without_a_stage_of_its_own_nothing_is_counted_and_nothing_is_in_the_state() -> None:
    run = Run(parse(SETTINGS))
    run.admits(*[True] * 8)
    assert run.judges() is None
    assert run.learner.stage == 0
    assert "curriculum" not in run.learner.state().numbers


def followed(*assignments: str) -> Run:
    """A run that has passed a stage and learned in the next."""
    run = Run(configured(*assignments))
    for _ in range(4):
        run.admits(True)
    run.steps()
    assert run.judges(1.0) is not None
    run.admits(True, False, stage=1)
    run.admits(True, stage=0)
    run.steps()
    return run


@pytest.mark.parametrize("ewc", ["0", "0.5"])
def test_the_state_holds_the_curriculum_and_what_it_consolidated(ewc: str) -> None:
    assignment = f"simic_trainer.ewc_lambda={ewc}"
    run, other = followed(assignment), Run(configured(assignment))
    state = run.learner.state().copy()
    assert any(name.startswith("ewc.") for name in state.tensors) == (ewc != "0")
    other.learner.load_state(state, run.held())
    other.number = run.number
    assert other.learner.curriculum == run.learner.curriculum
    assert other.learner.state().digest == run.learner.state().digest == state.digest
    for one in (run, other):
        one.admits(True, True, stage=1)
        one.admits(True, stage=1)
        one.steps()
        assert one.judges(9.0) is not None
    assert run.learner.stage == other.learner.stage == 2
    assert run.learner.steps_done > 1
    assert other.learner.state().digest == run.learner.state().digest


def test_the_same_moves_give_the_same_digest_and_another_verdict_another() -> None:
    digests = {followed("simic_trainer.ewc_lambda=0.5").learner.state().digest for _ in range(2)}
    assert len(digests) == 1
    assert followed().learner.state().digest not in digests


def test_a_state_of_another_curriculum_is_refused() -> None:
    state = followed().learner.state().copy()
    with pytest.raises(ContractError, match="not one of a learner so configured"):
        Run(configured(stages=STAGES[:1])).learner.load_state(state, [])
    plain = Run(parse(SETTINGS)).learner.state().copy()
    with pytest.raises(ContractError, match="curriculum"):
        Run(configured()).learner.load_state(plain, [])


def held_by(learner: Learner) -> Consolidation | None:
    return learner.engine.consolidation


# -- what is held of a stage that was passed ---------------------------------------------------------------------------


def test_what_is_held_is_a_literal_estimate_from_the_experience_that_is_there() -> None:
    config = configured("simic_trainer.ewc_lambda=0.5", "simic_trainer.ewc_sample_size=10")
    run, trainer = Run(config), config.simic_trainer
    for _ in range(4):
        run.admits(True)
    run.steps()
    run.learner.buffer.bar([0, 1, 2])
    verdict = run.learner.verdict(1.0)
    assert verdict is not None
    assert verdict.consolidated == 10
    assert held_by(run.learner) is None
    weights = {name: weight.clone() for name, weight in run.learner.policy.state_dict().items()}
    buffer, policy = run.learner.buffer, run.learner.policy
    rng = seeding.generator(trainer.seed, "fisher", 0, run.learner.steps_done, 1)
    serials = buffer.draw(10, rng=rng)
    assert len(set(serials.tolist())) == 10
    assert not set(serials.tolist()) & {0, 1, 2}
    pieces = (serials[:FISHER_LANES], serials[FISHER_LANES:])
    batches = [prepare(buffer.gather(s), policy, run.learner.reward_scale, trainer) for s in pieces]
    expected = estimate_fisher(
        lambda batch: sampled_log_probs(policy, batch, rng), batches, dict(policy.named_parameters())
    )
    run.learner.judge(verdict)
    held = held_by(run.learner)
    assert held is not None
    assert expected.samples == 10
    assert any(float(fisher.max()) > 0 for fisher in held.fisher.values())
    for name, fisher in held.fisher.items():
        assert torch.equal(fisher, expected.diagonal[name]), name
        assert torch.equal(held.anchors[name], weights[name]), name
    run.admits(True, stage=1)
    run.admits(True, stage=1)
    assert run.learner.can_step()
    report = run.learner.step(StepInputs(at_s=2.0))
    assert report.metrics["ewc_penalty"] > 0
    assert report.metrics["curriculum_stage"] == 1


def test_no_more_is_taken_than_is_there() -> None:
    run = Run(configured("simic_trainer.ewc_lambda=0.5"))
    run.admits(*[True] * 4)
    run.learner.buffer.bar([1])
    verdict = run.judges()
    assert verdict is not None
    assert verdict.consolidated == LANES - 1
    assert run.learner.engine.consolidation is not None


def test_a_failed_round_holds_nothing_and_neither_does_lambda_0() -> None:
    failing = Run(configured("simic_trainer.ewc_lambda=0.5"))
    failing.admits(*[False] * 8)
    failed = failing.judges()
    passing = Run(configured("simic_trainer.ewc_lambda=0"))
    passing.admits(*[True] * 8)
    passed = passing.judges()
    for run, verdict in ((failing, failed), (passing, passed)):
        assert verdict is not None
        assert verdict.consolidated == 0
        assert run.learner.engine.consolidation is None
        assert not any(name.startswith("ewc.") for name in run.learner.state().tensors)


def test_old_tasks_are_forgotten_less_where_they_are_held() -> None:
    """One seed and few updates; `tests/prove` has more."""
    free, held = (remember(0, 120, ewc_lambda) for ewc_lambda in (0.0, 1000.0))
    assert free.learned == held.learned > 0.85, "the same first task"
    assert free.forgotten > 0.1
    assert held.forgotten < free.forgotten / 2


# -- configurations ----------------------------------------------------------------------------------------------------


def refused(base: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(yaml.safe_dump(base))
    return str(caught.value)


def test_a_stage_of_another_shape_is_refused_with_its_name_and_the_reason() -> None:
    stages = [STAGES[0], STAGES[1] | {"name": "wide", "environment": {"slots": ["r0c0"]}}]
    said = refused({"simic_trainer": {"curriculum_stages": stages}})
    assert "stage 'wide' would need another policy" in said
    assert "slots" in said


def test_a_stage_whose_environment_is_none_is_refused_with_its_name_and_key() -> None:
    stages = [STAGES[0] | {"environment": {"max_epochs": -1}}]
    assert "stage 'easy', environment.max_epochs" in refused({"simic_trainer": {"curriculum_stages": stages}})
    cart = {"id": "CartPole-v1", "environments_per_actor": 4, "stagger": False}
    said = refused({"environment": cart, "simic_trainer": {"curriculum_stages": [STAGES[0]]}})
    assert "stage 'easy'" in said
    assert "max_epochs is for growing hosts" in said


def test_no_stage_waits_for_an_accuracy_that_its_world_never_tells() -> None:
    cart = {"id": "CartPole-v1", "environments_per_actor": 32, "stagger": False}
    stage = STAGE | {"name": "short", "difficulty": 0.5, "environment": {"kwargs": {"max_episode_steps": 50}}}
    for stages, said in (
        ([stage | {"success": "accuracy >= 80"}], None),
        ([stage], "accuracy >= 80"),
    ):
        trainer = {"curriculum_stages": stages} | ({} if said is None else {"curriculum_success": said})
        message = refused({"environment": cart, "simic_trainer": trainer})
        assert "stage 'short' is passed by 'accuracy >= 80'" in message
    good = parse(
        yaml.safe_dump(
            {
                "environment": cart,
                "simic_trainer": {"curriculum_stages": [stage | {"success": "return >= 40"}]},
            }
        )
    )
    assert good.stage_environments()[0].kwargs == {"max_episode_steps": 50}


def test_draws_are_of_what_is_held_and_sound() -> None:
    run = Run(configured())
    for _ in range(12):
        run.admits()
        run.steps()
    buffer = run.learner.buffer
    buffer.bar([buffer.inserted - 1])
    drawn = buffer.draw(len(buffer) - 1, rng=np.random.default_rng(0))
    assert sorted(drawn.tolist()) == list(range(buffer.inserted - len(buffer), buffer.inserted - 1))


def test_a_run_without_a_curriculum_refuses_requests_and_takes_no_verdict() -> None:
    run = Run(configured("simic_trainer.curriculum_enabled=false"))
    asked = CurriculumRequest(
        request_id="r",
        stage="easy",
        difficulty=0.3,
        min_success_rate=0.5,
        min_episodes=1,
        max_episodes=2,
        mode=CoordinationMode.STRATEGY_DRIVEN,
        issued_at_s=0.0,
        correlation_id="c",
    )
    reply, judged = run.learner.stages.asked(asked, 0.0)
    assert (reply.request_id, reply.correlation_id, reply.stage, judged) == ("r", "c", "", None)
    assert "follows no curriculum" in reply.refusal
    before = run.learner.state().digest
    run.learner.judge(CurriculumJudged(at_s=1.0, stage=1, facts=[]))
    assert (run.learner.stage, run.learner.state().digest) == (0, before)
