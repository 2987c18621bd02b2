"""Who acts, and where weights come from: what can be said of it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper_simic.config import Config, parse
from esper_simic.config_behaviour import GROWTH_SCRIPTS, POLICY
from esper_simic.errors import ConfigError
from esper_simic.evaluation import baseline_names
from esper_simic.growing_host.controllers import CONTROLLERS
from supervisor import config_file

RECORDED = ("environment.behaviour=recorded", "environment.records=[runs/a]")
GYM = "environment.id=CartPole-v1"
STAGE = (
    "name: a, difficulty: 0.5, min_success_rate: 0.5, min_episodes: 2, max_episodes: 9, "
    "environment: {max_epochs: 50}"
)
CURRICULUM = f"simic_trainer.curriculum_stages=[{{{STAGE}}}]"


def obeyed(*assignments: str) -> Config:
    return parse("", assignments=assignments)


def refusal(*assignments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        obeyed(*assignments)
    return str(caught.value)


def test_the_policy_acts_where_nothing_else_is_said() -> None:
    environment = obeyed().environment
    assert (environment.behaviour, environment.records, environment.script) == (POLICY, (), None)


def test_the_names_of_the_scripts_are_those_that_evaluation_knows() -> None:
    assert baseline_names() == GROWTH_SCRIPTS == tuple(CONTROLLERS)


@pytest.mark.parametrize("name", GROWTH_SCRIPTS)
def test_each_script_can_act_in_growing_hosts(name: str) -> None:
    assert obeyed(f"environment.behaviour={name}").environment.script == name


def test_elsewhere_chance_alone_can() -> None:
    assert obeyed(GYM, "environment.behaviour=random").environment.script == "random"
    words = refusal(GYM, "environment.behaviour=patient")
    assert "'patient'" in words
    assert "CartPole-v1" in words
    assert "recorded, random" in words


def test_a_misspelt_one_is_answered_with_the_nearest() -> None:
    assert "heuristic" in refusal("environment.behaviour=heuristics")


def test_records_are_no_script() -> None:
    environment = obeyed(GYM, *RECORDED).environment
    assert environment.script is None
    assert environment.records == ("runs/a",)


def test_records_and_their_behaviour_need_each_other() -> None:
    assert "needs records" in refusal("environment.behaviour=recorded")
    assert "behaviour is 'policy'" in refusal("environment.records=[runs/a]")
    assert "behaviour is 'patient'" in refusal(
        "environment.records=[runs/a]", "environment.behaviour=patient"
    )


def test_imitation_has_somebody_else_to_imitate() -> None:
    for world in (*((GYM,),), ()):
        words = refusal("simic_trainer.algorithm=BC", *world)
        assert "BC imitates who acts, and environment.behaviour is 'policy'" in words
        assert "take behaviour recorded with records" in words
        assert words.endswith("random" if world else "never-grow")
    assert obeyed("simic_trainer.algorithm=IQL"), "which finds the best of what was done, also by itself"


@pytest.mark.parametrize("algorithm", ["IMPALA", "APPO", "IQL", "BC"])
@pytest.mark.parametrize(
    "behaviour", [RECORDED, ("environment.behaviour=random",)], ids=["recorded", "script"]
)
def test_whoever_corrects_or_imitates_learns_from_others(algorithm: str, behaviour: tuple[str, ...]) -> None:
    assert obeyed(f"simic_trainer.algorithm={algorithm}", *behaviour)


@pytest.mark.parametrize(
    "behaviour", [RECORDED, ("environment.behaviour=random",)], ids=["recorded", "script"]
)
def test_ppo_learns_from_itself_alone(behaviour: tuple[str, ...]) -> None:
    on_policy = ("simic_trainer.algorithm=PPO", "experience_buffer.replay_ratio=0")
    assert obeyed(*on_policy)
    words = refusal(*on_policy, *behaviour)
    assert "PPO" in words
    assert "take BC or IQL, or IMPALA or APPO" in words


def test_others_pass_no_curriculum() -> None:
    assert obeyed(CURRICULUM)
    assert "simic_trainer.curriculum_enabled: false" in refusal(CURRICULUM, "environment.behaviour=patient")
    stage = CURRICULUM.replace("max_epochs: 50", "behaviour: patient")
    assert "environment.behaviour is patient" in refusal(stage)
    assert obeyed(CURRICULUM, "environment.behaviour=patient", "simic_trainer.curriculum_enabled=false")


ADAPTED = ("simic_trainer.initial_adapters=d", "simic_trainer.lora_start_step=0")


def test_paths_of_a_run_hold_wherever_it_is_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_file.load(
        "gym",
        None,
        [
            "environment.behaviour=recorded",
            "environment.records=[a, /b]",
            "simic_trainer.initial_policy=c",
            *ADAPTED,
        ],
    )
    assert config.environment.records == (str(tmp_path / "a"), "/b")
    assert config.simic_trainer.initial_policy == str(tmp_path / "c")
    assert config.simic_trainer.initial_adapters == str(tmp_path / "d")
    assert config_file.load("gym").simic_trainer.initial_policy is None
