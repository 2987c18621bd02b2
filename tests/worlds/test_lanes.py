"""Lanes of Gymnasium environments against plain ones, lane by lane, episode by episode."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

import esper_simic  # noqa: F401 - registers the known answers
from esper_simic.errors import ContractError
from esper_simic.worlds.cart_poles import CartPoles
from esper_simic.worlds.gymnasium_world import GymnasiumWorld
from esper_simic.worlds.lanes import GymnasiumLanes, episode_seed
from esper_simic.worlds.plain import PlainEnvs
from esper_simic.worlds.spaces import ActionForm, ObservationForm
from tests.worlds.shadow import Shadow, random_actions

SEEDS = [11, 2**63 - 1, 0]
FIRST = [0, 7, 3]
WORLDS: list[tuple[str, dict[str, Any]]] = [
    ("CartPole-v1", {}),
    ("CartPole-v1", {"sutton_barto_reward": True, "max_episode_steps": 20}),
    ("Acrobot-v1", {"max_episode_steps": 60}),
    ("MountainCarContinuous-v0", {"max_episode_steps": 70}),
    ("FrozenLake-v1", {"map_name": "8x8"}),
    ("Pendulum-v1", {"max_episode_steps": 50}),
    ("Taxi-v4", {"max_episode_steps": 40}),
    ("esper_simic/Bandit-v0", {}),
    ("esper_simic/Chain-v0", {}),
    ("esper_simic/GridWorld-v0", {}),
    ("esper_simic/Catch-v0", {}),
    ("esper_simic/Target-v0", {}),
    ("esper_simic/Recall-v0", {}),
]
BOTH_FORMS = [(*world, form) for world in WORLDS for form in (True, False)]


def trace(world, seeds, first, steps, *, stagger=False, chance=0):
    """Everything that lanes give, as bytes, step by step."""
    lanes = world.lanes(seeds, first, stagger=stagger)
    observed, _ = lanes.reset()
    rng = np.random.default_rng(chance)
    told = [observed["vector"].tobytes()]
    for _ in range(steps):
        actions = np.stack([random_actions(world.spec.action, 1, rng)[0] for _ in seeds])
        observed, *rest, infos = lanes.step(actions)
        told.append(b"".join(part.tobytes() for part in (observed["vector"], *rest)))
        if "final_obs" in infos:
            told.append(infos["final_obs"]["vector"].tobytes() + infos["episode"]["r"].tobytes())
    lanes.close()
    return told


@pytest.mark.parametrize(("name", "kwargs", "vectorised"), BOTH_FORMS)
def test_every_episode_is_a_plain_environment_reset_with_its_seed(name, kwargs, vectorised):
    world = GymnasiumWorld(name, kwargs, vectorised=vectorised)
    lanes = world.lanes(SEEDS, FIRST, stagger=False)
    shadows = [Shadow(name, kwargs, *named) for named in zip(SEEDS, FIRST, strict=True)]
    observed, _ = lanes.reset()
    assert observed["vector"].tobytes() == np.stack([shadow.reset() for shadow in shadows]).tobytes()
    rng, ends = np.random.default_rng(3), 0
    for _ in range(150):
        actions = random_actions(world.spec.action, len(SEEDS), rng)
        observed, reward, terminated, truncated, infos = lanes.step(actions)
        over = terminated | truncated
        assert ("final_obs" in infos) == ("episode" in infos) == over.any()
        for lane, shadow in enumerate(shadows):
            truth, paid, *flags = shadow.step(actions[lane])
            assert [terminated[lane], truncated[lane]] == [flags[0], flags[1] and not flags[0]]
            assert reward[lane] == paid
            if over[lane]:
                ends += 1
                assert infos["_final_obs"][lane]
                assert infos["_episode"][lane]
                assert infos["final_obs"]["vector"][lane].tobytes() == truth.tobytes()
                assert infos["episode"]["l"][lane] == shadow.length
                assert infos["episode"]["r"][lane] == pytest.approx(shadow.total, abs=1e-12)
                truth = shadow.reset()
            elif over.any():
                assert not infos["_final_obs"][lane]
            assert observed["vector"][lane].tobytes() == truth.tobytes()
    assert ends >= 3


@pytest.mark.parametrize(("name", "kwargs", "vectorised"), BOTH_FORMS)
def test_lanes_repeat_bit_for_bit_whatever_the_form(name, kwargs, vectorised):
    world = GymnasiumWorld(name, kwargs, vectorised=vectorised)
    once = trace(world, SEEDS, FIRST, 80)
    assert trace(world, SEEDS, FIRST, 80) == once
    assert trace(GymnasiumWorld(name, kwargs, vectorised=not vectorised), SEEDS, FIRST, 80) == once


@pytest.mark.parametrize("name", ["CartPole-v1", "FrozenLake-v1", "esper_simic/GridWorld-v0"])
def test_seeds_and_numbers_tell_episodes_apart(name):
    world = GymnasiumWorld(name)
    once = trace(world, SEEDS, FIRST, 60)
    assert trace(world, [12, *SEEDS[1:]], FIRST, 60) != once
    assert trace(world, SEEDS, [1, *FIRST[1:]], 60) != once


@pytest.mark.parametrize("vectorised", [True, False])
def test_a_lane_knows_nothing_of_its_neighbours(vectorised):
    world = GymnasiumWorld("CartPole-v1", vectorised=vectorised)
    rng = np.random.default_rng(0)
    actions = rng.integers(2, size=(300, 17, 1))
    seeds, first = list(range(17)), [0] * 17
    many = world.lanes(seeds, first, stagger=False)
    rows = [many.reset()[0]["vector"][13]] + [many.step(action)[0]["vector"][13] for action in actions]
    alone = world.lanes([13], [0], stagger=False)
    row = [alone.reset()[0]["vector"][0]] + [alone.step(action[13:14])[0]["vector"][0] for action in actions]
    assert np.stack(rows).tobytes() == np.stack(row).tobytes()


@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1", "esper_simic/Catch-v0"])
def test_a_later_life_begins_with_the_episode_it_is_told(name):
    world = GymnasiumWorld(name, {"max_episode_steps": 30} if "/" not in name else {})
    lanes, rng = world.lanes([5], [0], stagger=False), np.random.default_rng(0)
    starts = [lanes.reset()[0]["vector"]]
    while len(starts) < 4:
        observed, _, terminated, truncated, _ = lanes.step(random_actions(world.spec.action, 1, rng))
        if terminated[0] or truncated[0]:
            starts.append(observed["vector"])
    later = world.lanes([5], [3], stagger=False).reset()[0]["vector"]
    assert later.tobytes() == starts[3].tobytes()
    again = world.lanes([5], [2], stagger=False)
    again.reset()
    assert again.reset()[0]["vector"].tobytes() == starts[3].tobytes(), (
        "a reset goes on with the next episode"
    )


def test_the_seed_of_an_episode_fits_into_31_bits():
    seeds = {episode_seed(lane, number) for lane in (0, 1, 2**63 - 1) for number in range(1000)}
    assert len(seeds) > 2995
    assert min(seeds) >= 0
    assert 2**30 < max(seeds) < 2**31


@pytest.mark.parametrize("vectorised", [True, False])
def test_staggered_lanes_are_cut_once_each_at_another_step_and_go_on_whole(vectorised):
    kwargs = {"max_episode_steps": 40}
    name = "CartPole-v1" if vectorised else "Pendulum-v1"
    world = GymnasiumWorld(name, kwargs, vectorised=vectorised)
    lanes = world.lanes([1, 2, 3, 4], [0] * 4, stagger=True)
    observed, _ = lanes.reset()
    ends: list[list[int]] = [[], [], [], []]
    for step in range(1, 101):
        balancing = observed["vector"][:, 2:3] + observed["vector"][:, -1:] > 0
        actions = balancing.astype(np.int64) if vectorised else np.zeros((4, 1), dtype=np.float32)
        observed, _, terminated, truncated, infos = lanes.step(actions)
        assert not terminated.any()
        for lane in np.flatnonzero(truncated).tolist():
            ends[lane].append(step)
            assert not np.array_equal(infos["final_obs"]["vector"][lane], observed["vector"][lane])
    assert ends == [[10, 50, 90], [20, 60, 100], [30, 70], [40, 80]]


def test_lanes_without_a_known_horizon_are_not_cut():
    assert GymnasiumWorld("CliffWalking-v1").horizon is None
    told = [
        trace(GymnasiumWorld("CliffWalking-v1"), [1, 2], [0, 0], 50, stagger=stagger)
        for stagger in (True, False)
    ]
    assert told[0] == told[1]


def test_an_end_is_never_also_a_cut():
    world = GymnasiumWorld("CartPole-v1", {"max_episode_steps": 9})
    lanes = world.lanes(list(range(64)), [0] * 64, stagger=False)
    lanes.reset()
    for _ in range(8):
        lanes.step(np.ones((64, 1), dtype=np.int64))
    *_, terminated, truncated, infos = lanes.step(np.ones((64, 1), dtype=np.int64))
    # Poles pushed one way fall in step 9 or 10, and step 9 is the last: some do both.
    fell = np.abs(infos["final_obs"]["vector"][:, 2]) > 0.20944
    assert fell.any()
    assert (terminated == fell).all()
    assert not (terminated & truncated).any()


def test_what_was_given_is_never_written_again():
    world = GymnasiumWorld("Acrobot-v1")
    lanes, rng = world.lanes([1, 2], [0, 0], stagger=True), np.random.default_rng(0)
    kept: list[Any] = [lanes.reset()[0]["vector"]]
    told = [kept[0].copy()]
    for _ in range(50):
        observed, reward, *_ = lanes.step(random_actions(world.spec.action, 2, rng))
        kept += [observed["vector"], reward]
        told += [observed["vector"].copy(), reward.copy()]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(kept, told, strict=True))
    assert all(array.flags.writeable and array.flags.c_contiguous for array in kept)


def test_success_is_a_return():
    def successes(bound):
        world = GymnasiumWorld("CartPole-v1", success_return=bound)
        lanes = world.lanes([1, 2, 3, 4], [0] * 4, stagger=False)
        lanes.reset()
        pairs = []
        for _ in range(120):
            *_, infos = lanes.step(np.zeros((4, 1), dtype=np.int64))
            for lane in np.flatnonzero(infos.get("_episode", ())).tolist():
                outcome = world.outcome(infos["episode"], lane)
                pairs.append((outcome.episode_return, outcome.success))
                assert outcome.measures == {}
                assert outcome.length == outcome.episode_return
        return pairs

    pairs = successes(9.0)
    assert {success for _, success in pairs} == {True, False}
    assert all(success == (value >= 9) for value, success in pairs)
    assert not any(success for _, success in successes(None)), "CartPole-v1 counts as solved from 475 on"


@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1"])
def test_lanes_are_reset_before_their_first_step(name):
    with pytest.raises(ContractError, match=f"reset the lanes of {name}"):
        GymnasiumWorld(name).lanes([1], [0], stagger=False).step(np.zeros((1, 1), dtype=np.int64))


def test_every_lane_has_a_seed_and_an_episode():
    world = GymnasiumWorld("CartPole-v1")
    with pytest.raises(ContractError, match="2 lanes of CartPole-v1 got 2 seeds and 1 episodes"):
        world.lanes([1, 2], [0], stagger=False)


class Broken(gymnasium.Env):
    """Counts steps; the third observation or reward is `what`."""

    observation_space = Box(-np.inf, np.inf, (2,), dtype=np.float64)
    action_space = Discrete(2)

    def __init__(self, what: float, in_reward: bool) -> None:
        self.what, self.in_reward, self.count = what, in_reward, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(2), {}

    def step(self, action):
        self.count += 1
        ill = self.what if self.count == 3 else 0.0
        seen = np.array([self.count, 0.0 if self.in_reward else ill])
        return seen, ill if self.in_reward else 0.0, False, False, {}


@pytest.mark.parametrize(
    ("what", "in_reward"),
    [(np.nan, True), (np.inf, True), (np.nan, False), (-np.inf, False), (1e300, False)],
)
def test_numbers_that_are_none_are_refused_where_they_come_from(what, in_reward):
    envs = PlainEnvs(lambda: Broken(what, in_reward), 2)
    lanes = GymnasiumLanes(
        envs,
        "broken",
        (
            ObservationForm(Broken.observation_space, "broken"),
            ActionForm(Broken.action_space, "broken"),
        ),
        lane_seeds=[1, 2],
        first_episodes=[4, 5],
        horizon=None,
        success_return=None,
    )
    lanes.reset()
    actions = np.zeros((2, 1), dtype=np.int64)
    lanes.step(actions)
    lanes.step(actions)
    with pytest.raises(ContractError, match="broken gave a number .* lane 0, episode 4, step 3"):
        lanes.step(actions)


class SameStep(VectorEnv):
    """A third party's class: resets within the step, by a stream of all lanes."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int = 1, as_objects: bool = False) -> None:
        self.num_envs, self.as_objects = num_envs, as_objects
        self.single_observation_space = Box(0, 100, (2,), dtype=np.float32)
        self.single_action_space = Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.np_random.integers(2, 6, size=self.num_envs)
        self.age = np.zeros(self.num_envs)
        return self.seen(), {}

    def seen(self):
        return np.stack([self.left, self.age], axis=1).astype(np.float32)

    def step(self, actions):
        self.left -= 1
        self.age += 1
        over = self.left == 0
        infos: dict[str, Any] = {}
        if over.any():
            final: Any = self.seen()
            if self.as_objects:
                final = np.full(self.num_envs, None, dtype=object)
                for lane in np.flatnonzero(over):
                    final[lane] = self.seen()[lane]
            infos = {"final_obs": final, "_final_obs": over}
            self.left = np.where(over, self.np_random.integers(2, 6, size=self.num_envs), self.left)
            self.age = np.where(over, 0, self.age)
        return self.seen(), actions.astype(np.float64), over, np.zeros_like(over), infos


class NextStep(SameStep):
    """Another one, which swallows an action after each end."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012


@pytest.fixture
def registered(request):
    """Ids of the classes above, for one test."""
    names: list[str] = []

    def register(**entry):
        name = f"tests/Other{len(names)}-v0"
        gymnasium.register(id=name, **entry)
        names.append(name)
        return name

    yield register
    for name in names:
        del gymnasium.registry[name]


@pytest.mark.parametrize("as_objects", [True, False])
def test_a_class_that_resets_within_the_step_is_taken_as_it_is(registered, as_objects):
    name = registered(vector_entry_point=SameStep, kwargs={"as_objects": as_objects})
    world = GymnasiumWorld(name)
    once = trace(world, SEEDS, FIRST, 60)
    assert trace(world, SEEDS, FIRST, 60, stagger=True) == once
    assert trace(world, SEEDS, [*FIRST[:2], 4], 60) != once
    lanes = world.lanes(SEEDS, FIRST, stagger=True)
    observed, _ = lanes.reset()
    planned, ends = observed["vector"][:, 0].copy(), 0
    for _ in range(40):
        observed, _, terminated, _, infos = lanes.step(np.ones((3, 1), dtype=np.int64))
        for lane in np.flatnonzero(terminated).tolist():
            ends += 1
            assert infos["final_obs"]["vector"][lane].tolist() == [0, planned[lane]]
            assert infos["episode"]["l"][lane] == infos["episode"]["r"][lane] == planned[lane]
            assert observed["vector"][lane, 1] == 0
            planned[lane] = observed["vector"][lane, 0]
    assert ends > 15


def test_a_class_that_swallows_actions_is_not_used(registered):
    name = registered(
        entry_point="gymnasium.envs.classic_control.acrobot:AcrobotEnv", vector_entry_point=NextStep
    )
    lanes = GymnasiumWorld(name).lanes([1], [0], stagger=False)
    assert lanes.reset()[0]["vector"].shape == (1, 6)


def test_what_plain_environments_gave_is_never_written_again():
    envs = PlainEnvs(lambda: gymnasium.make("Pendulum-v1"), 2)
    kept: list[Any] = [envs.reset(seed=3)[0]]
    told = [kept[0].tobytes()]
    for _ in range(3):
        for part in envs.step(np.ones((2, 1), dtype=np.float32))[:4]:
            kept.append(part)
            told.append(part.tobytes())
    assert [part.tobytes() for part in kept] == told
    assert len(set(told[1::4])) == 3
    envs.close()


def test_options_reach_plain_environments():
    envs = PlainEnvs(lambda: gymnasium.make("CartPole-v1"), 2)
    observed, _ = envs.reset(seed=3, options={"low": 0.2, "high": 0.3})
    assert observed.min() >= 0.2
    again, _ = envs.reset(options={"reset_mask": np.array([True, False]), "low": -0.3, "high": -0.2})
    assert again[0].max() <= -0.2
    assert np.array_equal(again[1], observed[1])


def test_the_poles_are_one_computation():
    envs = CartPoles(3)
    observed, _ = envs.reset(seed=4)
    plain = gymnasium.make("CartPole-v1")
    assert observed.tobytes() == np.stack([plain.reset(seed=4 + lane)[0] for lane in range(3)]).tobytes()
    assert envs.reset(seed=[4, None, 6])[0][[0, 2]].tobytes() == observed[[0, 2]].tobytes()
    first, again = envs.reset()[0], envs.reset()[0]
    assert not np.array_equal(first, again)
    assert np.abs(again).max() <= 0.05
