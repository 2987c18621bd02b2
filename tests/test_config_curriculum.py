"""The curriculum's keys: which stages are refused, and what environment each of them is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from esper_simic.config_curriculum import (
    CurriculumKeys,
    CurriculumStage,
    SuccessRule,
    environment_of,
    stage_environments,
    success_rule,
)
from esper_simic.config_environment import EnvironmentConfig
from esper_simic.config_rates import RateKeys

CONFIGURED = EnvironmentConfig()


def stage(name: str = "one", difficulty: float = 0.5, **given: Any) -> dict[str, Any]:
    numbers = {"min_success_rate": 0.5, "min_episodes": 10, "max_episodes": 20}
    return {"name": name, "difficulty": difficulty} | numbers | given


def keys(*stages: dict[str, Any], **given: Any) -> CurriculumKeys:
    return CurriculumKeys.model_validate({"curriculum_stages": list(stages)} | given)


# -- defaults ----------------------------------------------------------------------------------------------------------


def test_the_default_stages_are_the_platforms() -> None:
    table = [
        (one.name, one.difficulty, one.min_success_rate, one.min_episodes, one.max_episodes)
        for one in CurriculumKeys().curriculum_stages
    ]
    assert table == [
        ("basic", 0.25, 0.7, 100, 500),
        ("intermediate", 0.5, 0.6, 200, 1000),
        ("advanced", 0.75, 0.5, 300, 1500),
        ("expert", 1.0, 0.4, 500, 2000),
    ]


def test_by_default_it_is_enabled_and_there_is_nothing_to_follow() -> None:
    default = CurriculumKeys()
    assert default.curriculum_enabled
    assert not default.follows_curriculum
    assert stage_environments(default, CONFIGURED) == (CONFIGURED,)
    assert default.curriculum_breaker_failure_threshold == 5
    assert default.curriculum_breaker_recovery_timeout_s == 120.0


@pytest.mark.parametrize(
    ("given", "follows"),
    [
        ({"curriculum_stages": [stage(environment={"max_epochs": 30})]}, True),
        ({"curriculum_stages": [stage()]}, False),
        ({"curriculum_stages": [stage()], "curriculum_difficulty": "budget"}, True),
        ({"curriculum_stages": [stage(difficulty=1.0)], "curriculum_difficulty": "budget"}, False),
        ({"curriculum_stages": [stage(success="return >= 1")]}, False),
        (
            {"curriculum_stages": [stage(environment={"max_epochs": 30})], "curriculum_enabled": False},
            False,
        ),
    ],
)
def test_there_is_a_curriculum_where_a_stage_has_an_environment_of_its_own(
    given: dict[str, Any], follows: bool
) -> None:
    parsed = CurriculumKeys.model_validate(given)
    assert parsed.follows_curriculum is follows
    changed = any(one != CONFIGURED for one in stage_environments(parsed, CONFIGURED))
    assert changed is follows


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "there must be a stage; curriculum_enabled: false trains without"),
        ([stage("a", 0.5), stage("b", 0.5)], "'b' has 0.5, 'a' before it 0.5"),
        ([stage("a", 0.5), stage("b", 0.25)], "difficulties must rise"),
        ([stage("a", 0.5), stage("a", 0.6)], "names of their own, not a, a"),
        ([stage(difficulty=1.1)], "less than or equal to 1"),
        ([stage(difficulty=-0.1)], "greater than or equal to 0"),
        ([stage(min_success_rate=0)], "greater than 0"),
        ([stage(min_success_rate=1.01)], "less than or equal to 1"),
        ([stage(min_episodes=21)], "'one' can never be passed: min_episodes 21 exceeds max_episodes 20"),
        ([stage(min_episodes=0)], "greater than or equal to 1"),
        ([stage(name="")], "at least 1 character"),
        ([stage(success="accuracy > 80")], "'accuracy >= x'"),
        ([stage(environment={"max_epoch": 30})], "environment.max_epoch; did you mean 'max_epochs'"),
        ([stage(environment={"environments_per_actor": 4})], "credits are made for as many lanes"),
        ([stage(environment={"id": "CartPole-v1"})], "one kind of world"),
        ([stage(patience=3)], "Extra inputs are not permitted"),
    ],
)
def test_stages_that_cannot_be_are_refused_with_the_reason(given: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        keys(*given)
    assert says in str(caught.value)


def test_bounds_belong_to_the_range() -> None:
    keys(stage("a", 0.0, min_success_rate=1.0, min_episodes=20), stage("b", 1.0))


@pytest.mark.parametrize(
    "wrong", ["", "often", "accuracy", "accuracy >= 101", "return >= nan", "return >= x"]
)
def test_a_success_that_cannot_be_read_is_refused(wrong: str) -> None:
    with pytest.raises(ValidationError, match="a success is"):
        CurriculumKeys(curriculum_success=wrong)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("success", SuccessRule("success")),
        (" accuracy>=80 ", SuccessRule("accuracy", 80.0)),
        ("accuracy >= 0", SuccessRule("accuracy", 0.0)),
        ("accuracy >= 100", SuccessRule("accuracy", 100.0)),
        ("return >= -12.5", SuccessRule("return", -12.5)),
    ],
)
def test_successes_are_read(text: str, rule: SuccessRule) -> None:
    assert success_rule(text) == rule
    assert CurriculumKeys(curriculum_success=text).curriculum_success == text


# -- environments ------------------------------------------------------------------------------------------------------


def test_a_stage_lays_its_keys_over_the_configured_environment() -> None:
    configured = EnvironmentConfig.model_validate(
        {
            "max_epochs": 40,
            "training_epochs_min": 4,
            "reward": {"mode": "basic"},
            "governor": {"penalty": 3.0},
        }
    )
    easier = CurriculumStage.model_validate(
        stage(environment={"host": "augment", "max_epochs": 30, "governor": {"forfeit": False}})
    )
    made = environment_of(configured, easier)
    assert (made.host, made.max_epochs, made.training_epochs_min) == ("augment", 30, 4)
    assert (made.governor.penalty, made.governor.forfeit) == (3.0, False)
    assert made.reward == configured.reward
    # Nothing else moved, and the configured one is as it was.
    assert made.model_copy(update={"host": "rescue", "max_epochs": 40, "governor": configured.governor}) == (
        configured
    )
    assert configured.max_epochs == 40


def test_a_stage_that_names_nothing_is_the_configured_environment_itself() -> None:
    assert environment_of(CONFIGURED, CurriculumStage.model_validate(stage())) is CONFIGURED


@pytest.mark.parametrize(
    ("difficulty", "batches"), [(0.0, 16), (0.25, 14), (0.5, 12), (0.75, 10), (0.9, 9), (1.0, 8)]
)
def test_under_budget_an_easy_stage_trains_hosts_longer(difficulty: float, batches: int) -> None:
    one = CurriculumStage.model_validate(stage(difficulty=difficulty))
    assert CONFIGURED.train_batches == 8
    assert environment_of(CONFIGURED, one, "budget").train_batches == batches


def test_a_budget_that_a_stage_names_stands() -> None:
    one = CurriculumStage.model_validate(stage(environment={"train_batches": 3}))
    assert environment_of(CONFIGURED, one, "budget").train_batches == 3


def test_a_budget_is_a_whole_number_though_floating_point_says_a_little_more() -> None:
    one = CurriculumStage.model_validate(stage(difficulty=0.9))
    assert 100 * (2 - one.difficulty) > 110
    assert environment_of(EnvironmentConfig(train_batches=100), one, "budget").train_batches == 110


@given(st.integers(1, 5000), st.lists(st.integers(0, 100), min_size=2, unique=True))
def test_under_budget_a_harder_stage_never_has_more(batches: int, percents: list[int]) -> None:
    configured = EnvironmentConfig(train_batches=batches)
    made = [
        environment_of(configured, CurriculumStage.model_validate(stage(difficulty=percent / 100)), "budget")
        for percent in sorted(percents)
    ]
    budgets = [one.train_batches for one in made]
    assert budgets == sorted(budgets, reverse=True)
    # Whole percents allow exact arithmetic beside the floating one.
    assert budgets == [-(-batches * (200 - percent) // 100) for percent in sorted(percents)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_epochs": 8}, "stage 'one', environment: no seed can finish"),
        ({"max_epochs": 1}, "stage 'one', environment.max_epochs: Input should be"),
        ({"governor": {"penalti": 1}}, "stage 'one', environment.governor.penalti: Extra inputs"),
        ({"governor": 3}, "stage 'one', environment.governor: "),
        ({"host": "rescu"}, "did you mean 'rescue'"),
        ({"host": "scale"}, r"\(3, 3\) (blocks of the host, slots) in environment and from (5, 3)"),
        ({"slots": ["r0c0"]}, r"and from (3, 1) in this stage"),
    ],
)
def test_an_environment_that_the_policy_could_not_live_in_is_refused(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError) as caught:
        stage_environments(keys(stage(environment=changes)), CONFIGURED)
    assert says.replace("\\", "") in str(caught.value)


def test_a_gymnasium_world_is_eased_by_its_own_keys_and_has_no_budget() -> None:
    poles = EnvironmentConfig.model_validate({"id": "CartPole-v1", "kwargs": {"sutton_barto_reward": True}})
    short = keys(stage(environment={"kwargs": {"max_episode_steps": 50}, "success_return": 45.0}))
    made = stage_environments(short, poles)[0]
    assert made.kwargs == {"sutton_barto_reward": True, "max_episode_steps": 50}
    assert (made.id, made.success_return) == ("CartPole-v1", 45.0)
    with pytest.raises(ValueError, match="stage 'one', environment: train_batches is for growing hosts"):
        stage_environments(keys(stage(), curriculum_difficulty="budget"), poles)


def test_what_shapes_follow_from_can_be_told_by_another() -> None:
    three = keys(stage(environment={"max_epochs": 30}))
    assert stage_environments(three, CONFIGURED, lambda one: one.host)[0].max_epochs == 30
    with pytest.raises(ValueError, match="follow from 60 .* and from 30"):
        stage_environments(three, CONFIGURED, lambda one: one.max_epochs)


def test_every_stage_has_its_environment() -> None:
    made = stage_environments(
        keys(stage("a", 0.1, environment={"max_epochs": 20}), stage("b", 0.2), stage("c", 0.3)), CONFIGURED
    )
    assert [one.max_epochs for one in made] == [20, 60, 60]


# -- rates -------------------------------------------------------------------------------------------------------------


def test_rates_are_constant_unless_said_otherwise() -> None:
    default = RateKeys()
    assert (default.lr_schedule, default.effective_horizon_updates) == ("constant", None)
    assert (default.effective_policy_lr, default.effective_value_lr) == (3e-4, 3e-4)
    apart = RateKeys(policy_lr=1e-4, value_lr=1e-3)
    assert (apart.effective_policy_lr, apart.effective_value_lr) == (1e-4, 1e-3)


def test_a_cosine_needs_a_horizon_behind_the_warm_up() -> None:
    with pytest.raises(ValidationError, match="needs lr_horizon_updates"):
        RateKeys(lr_schedule="cosine")
    with pytest.raises(ValidationError, match="10 must exceed warmup_epochs 10"):
        RateKeys(lr_schedule="cosine", lr_horizon_updates=10)
    assert RateKeys(lr_schedule="cosine", lr_horizon_updates=11).effective_horizon_updates == 11
    assert RateKeys(lr_horizon_updates=11).effective_horizon_updates is None


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"min_lr": 4e-4}, "learning_rate 0.0003"),
        ({"min_lr": 2e-4, "policy_lr": 1e-4}, "policy_lr 0.0001"),
        ({"min_lr": 2e-4, "value_lr": 1e-4}, "value_lr 0.0001"),
        ({"min_lr": 4e-4, "policy_lr": 1e-3}, "learning_rate 0.0003"),
    ],
)
def test_no_rate_is_silently_raised_to_the_least_one(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RateKeys(**given)
    words = str(caught.value)
    assert f"min_lr {given['min_lr']:g} is above {named}" in words
    assert f"lower min_lr, or raise {named.split(maxsplit=1)[0]}" in words


def test_a_rate_may_be_the_least_one_and_one_that_nobody_has_may_be_any() -> None:
    assert RateKeys(min_lr=3e-4).min_lr == 3e-4
    assert RateKeys(min_lr=4e-4, policy_lr=1e-3, value_lr=4e-4).learning_rate == 3e-4
