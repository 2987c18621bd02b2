"""Karn's world: choosing a blueprint for a described host."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import gymnasium
import msgspec
import numpy as np
import pytest
from gymnasium.spaces import Dict
from gymnasium.utils.env_checker import check_env

from esper_simic.actions import BLUEPRINTS
from esper_simic.blueprint_outcomes import FEATURES, encode
from esper_simic.config import EnvironmentConfig
from esper_simic.errors import ConfigError
from esper_simic.specs import Choices, VectorSpec
from esper_simic.worlds.blueprint_choice import (
    REFUSAL,
    BlueprintChoiceEnv,
    BlueprintChoiceVectorEnv,
    evaluation_kwargs,
    held_out_of,
    load_cases,
)
from esper_simic.worlds.blueprint_table import HELD_OUT_HOSTS, NOOP, read_table
from esper_simic.worlds.gymnasium_world import GymnasiumWorld
from esper_simic.worlds.plain import PlainEnvs
from esper_simic.worlds.play import play
from esper_simic.worlds.rivals import BEST_POSSIBLE, BEST_SINGLE, rivals
from esper_simic.worlds.world import held_out_world_of, world_of
from tests.test_blueprint_outcomes import HEAD
from tests.worlds.test_blueprint_table import MLP, NORM, TABLE

ID = "esper_simic/BlueprintChoice-v0"


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = tmp_path / "table.jsonl"
    path.write_bytes(encode(HEAD, TABLE.outcomes))
    return str(path)


def test_it_is_a_gymnasium_environment(table: str, recwarn: pytest.WarningsRecorder) -> None:
    env = gymnasium.make(ID, table=table)
    check_env(env.unwrapped, skip_render_check=True)
    assert [str(warned.message) for warned in recwarn] == []
    assert isinstance(env.unwrapped, BlueprintChoiceEnv)
    assert isinstance(env.observation_space, Dict)
    assert env.observation_space["observation"].shape == (len(FEATURES),)


def test_an_episode_is_one_choice_and_earns_what_it_came_to(table: str) -> None:
    envs = BlueprintChoiceVectorEnv(64, table=table)
    cases = envs.cases
    rng = np.random.default_rng(0)
    for seed in range(5):
        observed, _ = envs.reset(seed=seed)
        case = [cases.features.tolist().index(row) for row in observed["observation"].tolist()]
        assert np.array_equal(observed["action_mask"], cases.mask[case])
        actions = rng.integers(len(BLUEPRINTS), size=64)
        _, reward, terminated, truncated, infos = envs.step(actions)
        expected = np.where(cases.mask[case, actions] > 0, cases.reward[case, actions], -REFUSAL)
        assert np.array_equal(reward, expected)
        assert {-REFUSAL} < set(reward.tolist())
        assert terminated.all()
        assert not truncated.any()
        assert np.array_equal(infos["final_obs"]["observation"], observed["observation"])


def test_hosts_come_alike_often(table: str) -> None:
    envs = BlueprintChoiceVectorEnv(8_000, table=table)
    observed, _ = envs.reset(seed=3)
    places = envs.cases.place[
        [envs.cases.features.tolist().index(row) for row in observed["observation"].tolist()]
    ]
    shares = np.bincount(places, minlength=3) / len(places)
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.03)


@pytest.mark.parametrize("vectorised", ["auto", "never"])
def test_as_a_world_it_has_masks(table: str, vectorised: Literal["auto", "never"]) -> None:
    config = EnvironmentConfig(id=ID, kwargs={"table": table}, vectorised=vectorised)
    world = world_of(config, 0.99)
    assert world.spec == VectorSpec(len(FEATURES), Choices(("action",), (len(BLUEPRINTS),)), masked=True)
    lanes = world.lanes([3, 4, 5], [0, 0, 7], stagger=False)
    observed, _ = lanes.reset()
    cases = BlueprintChoiceVectorEnv(table=table).cases
    for _ in range(20):
        case = [cases.features.tolist().index(row) for row in observed["vector"].tolist()]
        assert observed["action_mask"].dtype == np.int8
        assert np.array_equal(observed["action_mask"], cases.mask[case])
        before = {key: rows.copy() for key, rows in observed.items()}
        following, reward, terminated, truncated, infos = lanes.step(np.full((3, 1), NORM))
        assert np.array_equal(reward, cases.reward[case, NORM])
        assert terminated.all()
        assert not truncated.any()
        assert infos["episode"]["r"].tolist() == reward.tolist()
        for key, rows in before.items():
            assert np.array_equal(infos["final_obs"][key], rows)
            assert np.array_equal(observed[key], rows), "no later step writes into them"
        observed = following


def test_both_forms_make_the_same_episodes(table: str) -> None:
    def returns(vectorised: Literal["auto", "never"]) -> list[float]:
        config = EnvironmentConfig(id=ID, kwargs={"table": table}, vectorised=vectorised)
        world = world_of(config, 0.99)
        make = rivals(config, world.spec.action)["random"]
        return [e.episode_return for e in play(world, range(50), lambda lanes: make(), lanes_max=16)]

    assert returns("auto") == returns("never")
    assert len(set(returns("auto"))) >= 5


@pytest.mark.parametrize("native", [True, False])
def test_its_identity_is_that_of_its_records_too(table: str, native: bool) -> None:
    """The same keywords, and other bytes behind them."""

    def digest() -> str:
        read_table.cache_clear()
        load_cases.cache_clear()
        return GymnasiumWorld(ID, {"table": table}, vectorised=native).digest()

    before = digest()
    assert digest() == before
    other = msgspec.structs.replace(HEAD, command="another")
    Path(table).write_bytes(encode(other, TABLE.outcomes))
    assert digest() != before


def test_observations_of_single_environments_are_memory_of_their_own(table: str) -> None:
    envs = PlainEnvs(lambda: BlueprintChoiceEnv(table=table), 3)
    first: Any = envs.reset(seed=1)[0]
    kept = {key: rows.copy() for key, rows in first.items()}
    envs.step(np.zeros(3, dtype=np.int64))
    envs.reset(seed=77)
    for key, rows in kept.items():
        assert np.array_equal(first[key], rows)


def test_whoever_is_measured_meets_what_was_not_trained_on(table: str) -> None:
    assert held_out_of("", None) == HELD_OUT_HOSTS
    assert held_out_of("", ["a/b"]) == ("a/b",)
    assert held_out_of(table, None) == ()
    assert evaluation_kwargs({"rent_weight": 1.0}) == {"rent_weight": 1.0, "part": "unseen-hosts"}
    assert evaluation_kwargs({"table": table})["part"] == "unseen-trials"
    assert evaluation_kwargs({"held_out_hosts": []})["part"] == "unseen-trials"
    for kwargs, names in (
        ({"table": table}, {"digits/rescue", "digits/mlp"}),
        ({"table": table, "held_out_hosts": ["digits/mlp"]}, {"digits/mlp"}),
    ):
        config = EnvironmentConfig(id=ID, kwargs={**kwargs, "held_out_trials": 1})
        lanes = held_out_world_of(config, 0.99).lanes(range(40), [0] * 40, stagger=False)
        unseen = BlueprintChoiceVectorEnv(**evaluation_kwargs(config.kwargs)).cases
        assert set(unseen.names) == names
        seen = {tuple(row) for row in lanes.reset()[0]["vector"].tolist()}
        assert seen <= {tuple(row) for row in unseen.features.tolist()}
        trained = BlueprintChoiceVectorEnv(**config.kwargs).cases
        assert not seen & {tuple(row) for row in trained.features.tolist()}
    other = EnvironmentConfig(id="CartPole-v1")
    assert held_out_world_of(other, 0.99).spec == world_of(other, 0.99).spec


def earned(kwargs: dict[str, Any], name: str, episodes: int = 400) -> float:
    config = EnvironmentConfig(id=ID, kwargs=kwargs)
    world = held_out_world_of(config, 0.99)
    make = rivals(config, world.spec.action)[name]
    played = play(world, range(episodes), lambda lanes: make(), lanes_max=64)
    return float(np.mean([episode.episode_return for episode in played]))


def test_what_rivals_earn(table: str) -> None:
    """By hand, of the last trial of each place, hosts alike: rescue has norm 0.9 or 0.4, mlp 0 or mlp's 0.1."""
    kwargs = {"table": table, "held_out_trials": 1, "rent_weight": 0.0}
    assert earned(kwargs, BEST_POSSIBLE) == pytest.approx(((0.9 + 0.4) / 2 + 0.1) / 2, abs=0.03)
    # In training norm earned most in the mean over hosts.
    assert earned(kwargs, BEST_SINGLE) == pytest.approx(((0.9 + 0.4) / 2 + 0.0) / 2, abs=0.03)
    assert earned(kwargs, "random") == pytest.approx(
        (((0.9 + 0.0 + 0.0) / 3 + 0.4 / 2) / 2 + 0.1 / 3) / 2, abs=0.03
    )


def test_where_the_single_best_may_not_be_chosen_it_is_the_next_best() -> None:
    acting = rivals(EnvironmentConfig(id=ID), Choices(("action",), (13,)))[BEST_SINGLE]()
    ranking = BlueprintChoiceVectorEnv().cases.ranking()
    best = int(ranking.argmax())
    mask = np.ones((3, 13), dtype=np.int8)
    mask[1, best] = 0
    mask[2] = 0
    mask[2, [NOOP, MLP]] = 1
    chosen = acting.act({"action_mask": mask}, np.ones(3, dtype=bool), np.zeros((3, 1)))
    expected = [best, int(np.argsort(ranking)[-2]), max(NOOP, MLP, key=lambda choice: float(ranking[choice]))]
    assert chosen.tolist() == [[choice] for choice in expected]


def test_other_worlds_know_no_rival_but_chance() -> None:
    assert set(rivals(EnvironmentConfig(id="CartPole-v1"), Choices(("action",), (2,)))) == {"random"}


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"part": "yesterday"}, "part is one of training, unseen-trials, unseen-hosts, not 'yesterday'"),
        ({"table": "/nowhere"}, "the table of outcomes /nowhere cannot be read"),
        ({"held_out_trials": 99}, "no case is left for training"),
        ({"held_out_hosts": ["a/b"]}, "no outcome of 'a/b' is recorded"),
        ({"colour": "red"}, "unexpected keyword"),
    ],
)
def test_what_it_cannot_be_made_with_is_a_mistake_of_the_configuration(kwargs: Any, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        world_of(EnvironmentConfig(id=ID, kwargs=kwargs), 0.99)
