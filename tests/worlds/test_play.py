"""Whole episodes of anything that acts."""

from __future__ import annotations

import numpy as np
import pytest

import esper_simic  # noqa: F401 - registers the known answers
from esper_simic.errors import BudgetExceeded
from esper_simic.specs import Choices, Continuous
from esper_simic.worlds.gymnasium_world import GymnasiumWorld
from esper_simic.worlds.play import PlayedEpisode, RandomActing, play
from tests.worlds.shadow import Shadow


class Always:
    """One and the same choice; keeps what it was told."""

    def __init__(self, choice: int) -> None:
        self.choice = choice
        self.starts: list[np.ndarray] = []
        self.chance: list[np.ndarray] = []

    def act(self, observation, episode_start, uniforms):
        self.starts.append(episode_start.copy())
        self.chance.append(uniforms)
        return np.full((len(episode_start), 1), self.choice)


@pytest.mark.parametrize("lanes_max", [1, 3, 100])
def test_each_seed_gives_its_first_episode_whatever_the_lanes(lanes_max):
    seeds = [5, 2**62, 77, 4]
    played = play(GymnasiumWorld("CartPole-v1"), seeds, lambda lanes: Always(1), lanes_max=lanes_max)
    expected = []
    for seed in seeds:
        shadow = Shadow("CartPole-v1", {}, seed, 0)
        shadow.reset()
        while not shadow.step(np.array([1]))[2]:
            pass
        expected.append(
            PlayedEpisode(
                seed=seed,
                episode_return=shadow.total,
                length=shadow.length,
                truncated=False,
                success=False,
                measures={},
            )
        )
    assert played == expected


def test_no_later_episode_stands_for_the_first():
    def returns(lanes_max):
        world = GymnasiumWorld("CartPole-v1")
        return play(
            world, list(range(30)), lambda lanes: RandomActing(world.spec.action), lanes_max=lanes_max
        )

    alone = returns(1)
    assert max(episode.length for episode in alone) > 2 * min(episode.length for episode in alone)
    assert returns(30) == alone


def test_lanes_that_are_done_begin_again_and_are_not_counted():
    made = []

    def acting(lanes):
        made.append(Always(0))
        return made[-1]

    ticks = []
    played = play(
        GymnasiumWorld("CartPole-v1"),
        list(range(8)),
        acting,
        lanes_max=8,
        observer=lambda: ticks.append(1),
    )
    starts = np.stack(made[0].starts)
    assert starts[0].all()
    assert len(ticks) == len(starts) == max(episode.length for episode in played)
    shortest = min(played, key=lambda episode: episode.length)
    assert starts[shortest.length, shortest.seed], "the lane's next episode begins"
    assert [episode.seed for episode in played] == list(range(8))


def test_chance_of_the_actions_is_each_seeds_own():
    def first(seeds):
        acting = Always(0)
        play(GymnasiumWorld("CartPole-v1"), seeds, lambda lanes: acting, lanes_max=8)
        return acting.chance

    together, alone = first([1, 2]), first([2])
    assert together[0].shape == (2, 1)
    assert np.array_equal(together[3][1], alone[3][0])
    assert not np.array_equal(together[3][0], together[3][1])


def test_a_cut_and_a_success_are_told():
    (episode,) = play(GymnasiumWorld("esper_simic/Chain-v0"), [3], lambda lanes: Always(1), lanes_max=1)
    assert (episode.episode_return, episode.length, episode.truncated, episode.success) == (
        1,
        6,
        False,
        False,
    )
    world = GymnasiumWorld("Pendulum-v1", {"max_episode_steps": 7}, success_return=-1e9)
    (episode,) = play(world, [3], lambda lanes: RandomActing(world.spec.action), lanes_max=1)
    assert (episode.length, episode.truncated, episode.success) == (7, True, True)


def test_an_episode_that_never_ends_is_not_waited_for():
    world = GymnasiumWorld("CliffWalking-v1")
    with pytest.raises(BudgetExceeded, match=r"2 of 2 episodes .* 50 steps.*max_episode_steps"):
        play(world, [1, 2], lambda lanes: Always(0), lanes_max=2, steps_max=50)


@pytest.mark.parametrize("name", ["Bandit", "Chain", "GridWorld", "Catch", "Target", "Recall"])
def test_the_random_baseline_is_what_the_problems_say(name):
    from esper_simic.worlds import known_answers

    world = GymnasiumWorld(f"esper_simic/{name}-v0")
    played = play(world, list(range(3000)), lambda lanes: RandomActing(world.spec.action), lanes_max=3000)
    returns = [episode.episode_return for episode in played]
    expected = getattr(known_answers, f"{name}VectorEnv").RANDOM_RETURN
    assert np.mean(returns) == pytest.approx(expected, abs=4 * np.std(returns) / np.sqrt(3000))


def test_random_numbers_without_ends_are_normal():
    acting = RandomActing(Continuous((-np.inf, 0.0), (np.inf, 1.0)))
    uniforms = np.random.default_rng(0).random((20_000, 2))
    uniforms[0] = 0
    actions = acting.act({}, np.zeros(20_000, dtype=bool), uniforms)
    assert np.isfinite(actions).all()
    assert actions.dtype == np.float32
    assert abs(actions[1:, 0].std() - 1) < 0.03
    assert actions[:, 1].min() >= -1
    assert actions[:, 1].max() <= 1


def test_random_choices_are_legal_at_the_ends():
    acting = RandomActing(Choices(("a", "b"), (2, 5)))
    ends = np.array([[0.0, 0.0], [np.nextafter(1, 0)] * 2])
    assert acting.act({}, np.zeros(2, dtype=bool), ends).tolist() == [[0, 0], [1, 4]]


def test_random_choices_are_legal_under_a_mask_and_alike_often():
    acting = RandomActing(Choices(("a", "b"), (3, 2)))
    mask = np.tile(np.array([1, 0, 1, 0, 1], dtype=np.int8), (9_000, 1))
    uniforms = np.random.default_rng(0).random((9_000, 2))
    uniforms[:2] = [[0.0, 0.0], [np.nextafter(1, 0)] * 2]
    actions = acting.act({"action_mask": mask}, np.zeros(9_000, dtype=bool), uniforms)
    assert actions[:2].tolist() == [[0, 1], [2, 1]]
    assert np.bincount(actions[:, 0], minlength=3) / 9_000 == pytest.approx([0.5, 0, 0.5], abs=0.02)
    assert set(actions[:, 1].tolist()) == {1}
