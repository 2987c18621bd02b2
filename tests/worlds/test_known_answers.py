"""The problems: their answers by enumeration, their chance, their contract with Gymnasium."""

from __future__ import annotations

import copy
from fractions import Fraction
from itertools import product
from math import factorial
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from hypothesis import given
from hypothesis import strategies as st

import esper_simic  # noqa: F401 - registers the known answers
from esper_simic.errors import ContractError
from esper_simic.worlds import known_answers
from esper_simic.worlds.known_answer import stream, successors, uniforms
from esper_simic.worlds.known_answers import (
    BanditVectorEnv,
    CatchVectorEnv,
    ChainVectorEnv,
    GridWorldVectorEnv,
    RecallVectorEnv,
    TargetVectorEnv,
)

NAMES = ["Bandit", "Chain", "GridWorld", "Catch", "Target", "Recall"]
DISABLED: dict[str, Any] = {"autoreset_mode": AutoresetMode.DISABLED}


def problem(name, lanes=1, **settings):
    """A problem as it is registered."""
    limit = gymnasium.spec(f"esper_simic/{name}-v0").max_episode_steps
    return getattr(known_answers, f"{name}VectorEnv")(lanes, max_episode_steps=limit, **settings)


def started(kind, chance, **settings):
    """A lane at the start of the episode with this chance."""
    env = kind(1, **DISABLED, **settings)
    env.reset(seed=0)
    env.elapsed[:] = 0
    env.begin(np.array([0]), np.array([chance]))
    return env


def situation(env):
    """All that later steps depend on."""
    kept = {name: value for name, value in vars(env).items() if isinstance(value, np.ndarray)}
    return tuple(kept[name].tobytes() for name in sorted(kept) if name != "_seeds")


def twin(env):
    """Another environment in the same situation."""
    other = copy.copy(env)
    vars(other).update(
        {name: value.copy() for name, value in vars(env).items() if isinstance(value, np.ndarray)}
    )
    return other


def values(env, actions, known=None):
    """Best and random expected return from here on, by trying every action everywhere."""
    known = {} if known is None else known
    key = situation(env)
    if key not in known:
        best, mean = [], []
        for action in range(actions):
            after = twin(env)
            _, reward, terminated, truncated, _ = after.step(np.array([action]))
            over = terminated[0] or truncated[0]
            later = (0.0, 0.0) if over else values(after, actions, known)
            best.append(reward[0] + later[0])
            mean.append(reward[0] + later[1])
        known[key] = (max(best), float(np.mean(mean)))
    return known[key]


def shares(count):
    """One number from the middle of each of `count` equal parts of [0, 1)."""
    return (np.arange(count) + 0.5) / count


def test_bandit_by_trying_every_arm():
    means = [
        np.mean([started(BanditVectorEnv, [luck]).step(np.array([arm]))[1][0] for luck in shares(20)])
        for arm in range(4)
    ]
    assert means == pytest.approx(BanditVectorEnv.PAYS)
    assert max(means) == pytest.approx(BanditVectorEnv.OPTIMAL_RETURN)
    assert np.mean(means) == pytest.approx(BanditVectorEnv.RANDOM_RETURN)


def test_chain_by_dynamic_programming():
    best, mean = values(started(ChainVectorEnv, [], max_episode_steps=100), 2)
    assert best == ChainVectorEnv.OPTIMAL_RETURN
    assert mean == pytest.approx(ChainVectorEnv.RANDOM_RETURN, abs=1e-6)
    assert mean == pytest.approx(0.4, abs=3e-4), "the gambler's ruin"


def test_gridworld_by_dynamic_programming():
    known: dict = {}
    found = [
        values(started(GridWorldVectorEnv, [share], max_episode_steps=50), 4, known) for share in shares(14)
    ]
    assert np.mean(found, axis=0) == pytest.approx(
        [GridWorldVectorEnv.OPTIMAL_RETURN, GridWorldVectorEnv.RANDOM_RETURN], abs=1e-6
    )


def test_catch_by_dynamic_programming():
    found = [values(started(CatchVectorEnv, [share]), 3) for share in shares(5)]
    assert np.mean(found, axis=0) == pytest.approx([1.0, CatchVectorEnv.RANDOM_RETURN], abs=1e-9)
    assert CatchVectorEnv.OPTIMAL_RETURN == 1


def test_recall_rewards_memory_alone():
    found = [values(started(RecallVectorEnv, [share]), 2) for share in shares(2)]
    assert found == [(RecallVectorEnv.OPTIMAL_RETURN, RecallVectorEnv.RANDOM_RETURN)] * 2
    seen = [(1, 0, 0), (0, 1, 0), (0, 0, 0), (0, 0, 1)]
    for answers in product((0, 1), repeat=len(seen)):
        policy = dict(zip(seen, answers, strict=True))
        returns = []
        for share in shares(2):
            env, total, shown, over = started(RecallVectorEnv, [share]), 0.0, [], False
            while not over:
                shown.append(tuple(env.observe()[0].tolist()))
                _, reward, terminated, _, _ = env.step(np.array([policy[shown[-1]]]))
                total, over = total + reward[0], terminated[0]
            assert shown == [seen[int(share > 0.5)], *[seen[2]] * 4, seen[3]]
            returns.append(total)
        assert np.mean(returns) == 0, "without memory no policy is better than chance"


@given(st.lists(st.floats(-0.9999, 0.9999), min_size=2, max_size=2), st.integers(0, 2**32))
def test_target_is_never_reached_faster_than_straight(start, seed):
    rng = np.random.default_rng(seed)
    bound = -sum(max(abs(x) - 0.5 * k, 0) for x in start for k in range(1, 6))
    straight = wandering = 0.0
    chance = [(x + 1) / 2 for x in start]
    env, other = started(TargetVectorEnv, chance), started(TargetVectorEnv, chance)
    for _ in range(5):
        straight += env.step(np.clip(-env.observe()[:, :2], -0.5, 0.5))[1][0]
        wandering += other.step(rng.uniform(-0.5, 0.5, size=(1, 2)))[1][0]
    assert straight == pytest.approx(bound, abs=1e-5)
    assert wandering <= bound + 1e-9


def test_target_pays_the_straight_way_in_the_mean_what_it_says():
    side = 40
    grid = np.stack([axis.reshape(-1) for axis in np.meshgrid(shares(side), shares(side))], axis=1)
    env = TargetVectorEnv(side * side, **DISABLED)
    env.reset(seed=0)
    env.begin(np.arange(side * side), grid)
    returns = sum(env.step(np.clip(-env.observe()[:, :2], -0.5, 0.5))[1] for _ in range(5))
    assert np.mean(returns) == pytest.approx(TargetVectorEnv.OPTIMAL_RETURN, abs=1e-6)


def mean_distance(halves):
    """E|U_1 + … + U_n|, exactly, of U_i uniform in [-h_i, h_i].

    |x| integrated n times is sgn(x) x**(n + 1) / (n + 1)!; the mean is its n-fold difference over the box's edges.
    """
    order, total = len(halves) + 1, Fraction(0)
    for signs in product((1, -1), repeat=len(halves)):
        x = sum(sign * half for sign, half in zip(signs, halves, strict=True))
        total += int(np.prod(signs)) * (x**order if x > 0 else -(x**order))
    return total / factorial(order) / np.prod([2 * half for half in halves])


def test_target_costs_random_walks_what_it_says():
    exact = -2 * sum(mean_distance([Fraction(1)] + [Fraction(1, 2)] * steps) for steps in range(1, 6))
    assert float(exact) == TargetVectorEnv.RANDOM_RETURN
    env, rng = TargetVectorEnv(20_000, **DISABLED), np.random.default_rng(1)
    env.reset(seed=5)
    returns = sum(env.step(rng.uniform(-0.5, 0.5, size=(20_000, 2)))[1] for _ in range(5))
    error = np.std(returns) / np.sqrt(20_000)
    assert np.mean(returns) == pytest.approx(TargetVectorEnv.RANDOM_RETURN, abs=4 * error)


@pytest.mark.parametrize("name", ["Chain", "GridWorld", "Catch", "Recall", "Bandit"])
def test_random_play_agrees_with_what_is_enumerated(name):
    env, rng = problem(name, 4000, **DISABLED), np.random.default_rng(2)
    env.reset(seed=9)
    total, live = np.zeros(4000), np.ones(4000, dtype=bool)
    while live.any():
        actions = rng.integers(env.single_action_space.n, size=4000)
        _, reward, terminated, truncated, _ = env.step(actions)
        total += np.where(live, reward, 0)
        live &= ~(terminated | truncated)
        if not live.all():
            env.reset(options={"reset_mask": ~live})
    error = np.std(total) / np.sqrt(4000)
    assert np.mean(total) == pytest.approx(env.RANDOM_RETURN, abs=4 * error)


@pytest.mark.parametrize("name", NAMES)
def test_gymnasiums_checker_has_nothing_to_say(name):
    env = gymnasium.make(f"esper_simic/{name}-v0")
    check_env(env.unwrapped, skip_render_check=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_vectorised_form_keeps_gymnasiums_contract(name):
    envs = gymnasium.make_vec(f"esper_simic/{name}-v0", num_envs=5, vectorization_mode="vector_entry_point")
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    envs.action_space.seed(1)
    observed, infos = envs.reset(seed=3)
    assert observed in envs.observation_space
    assert infos == {}
    ends = 0
    for _ in range(120):
        before = observed
        observed, reward, terminated, truncated, infos = envs.step(envs.action_space.sample())
        assert observed in envs.observation_space
        assert all(part.shape == (5,) for part in (reward, terminated, truncated))
        assert (reward.dtype, terminated.dtype, truncated.dtype) == (np.float64, bool, bool)
        over = terminated | truncated
        ends += over.sum()
        assert ("final_obs" in infos) == over.any()
        if over.any():
            assert infos["_final_obs"].tolist() == over.tolist()
            assert infos["final_obs"] in envs.observation_space
        assert observed is not before
    assert ends >= 5
    envs.close()


@pytest.mark.parametrize("name", NAMES)
def test_one_of_many_is_the_plain_one(name):
    """Also beyond the first episode: a seed has one successor, in both forms."""
    many, plain = problem(name, 3), gymnasium.make(f"esper_simic/{name}-v0")
    plain.action_space.seed(4)
    observed, _ = many.reset(seed=[7, 8, 9])
    single, _ = plain.reset(seed=8)
    for _ in range(150):
        assert np.array_equal(observed[1], single)
        action = plain.action_space.sample()
        observed, reward, terminated, truncated, infos = many.step(np.stack([np.asarray(action)] * 3))
        single, paid, *flags, _ = plain.step(action)
        assert [reward[1], terminated[1], truncated[1]] == [paid, *flags]
        if any(flags):
            assert np.array_equal(infos["final_obs"][1], single)
            single, _ = plain.reset()


def test_the_random_numbers_are_splitmix64():
    # Published for the seed 1234567.
    assert stream(np.array([1234567], dtype=np.uint64), 0, 5).tolist() == [
        [
            6457827717110365317,
            3203168211198807973,
            9817491932198370423,
            4593380528125082431,
            16408922859458223821,
        ]
    ]


def test_chance_is_uniform_and_of_each_seed_alone():
    seeds = np.arange(20_000, dtype=np.uint64)
    drawn = uniforms(seeds, 3)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert np.abs(np.histogram(drawn, bins=20, range=(0, 1))[0] / 3000 - 1).max() < 0.1
    assert np.abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 0.03
    assert np.array_equal(uniforms(seeds[100:105], 3), drawn[100:105])
    following = successors(seeds)
    assert len(np.unique(np.concatenate((seeds, following)))) == 40_000


@pytest.mark.parametrize("name", NAMES)
def test_problems_must_be_reset_and_know_two_ways_to_begin_anew(name):
    with pytest.raises(ContractError, match="reset the environments"):
        problem(name).step(np.zeros(1, dtype=np.int64))
    with pytest.raises(ValueError, match="SAME_STEP or DISABLED"):
        problem(name, autoreset_mode=AutoresetMode.NEXT_STEP)


def test_unseeded_problems_differ():
    first, second = (GridWorldVectorEnv(50).reset()[0] for _ in range(2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", ["beyond", "below", "not a number", "too many"])
def test_an_action_outside_the_space_is_refused(name, wrong):
    envs = problem(name, lanes=2)
    envs.reset(seed=0)
    right = np.asarray(envs.action_space.sample())
    if isinstance(envs.single_actions, gymnasium.spaces.Box):
        actions = {
            "beyond": np.full_like(right, 0.75),
            "below": np.full_like(right, -0.75),
            "not a number": np.full_like(right, np.nan),
            "too many": np.concatenate((right, right)),
        }[wrong]
    else:
        actions = {
            "beyond": np.full_like(right, envs.single_actions.n),
            "below": np.full_like(right, -1),
            "not a number": right.astype(np.float64),
            "too many": np.concatenate((right, right)),
        }[wrong]
    with pytest.raises(ContractError, match="actions are a batch of 2 of"):
        envs.step(actions)
    assert envs.elapsed.tolist() == [0, 0], "nothing was done"
    envs.step(right)


def test_an_episode_that_is_over_must_be_begun_anew():
    env = gymnasium.make("esper_simic/Bandit-v0").unwrapped
    env.reset(seed=0)
    assert env.step(0)[2]
    with pytest.raises(ContractError, match="its episode is over"):
        env.step(0)
    env.reset()
    assert env.step(0)[2]
