"""Any Gymnasium id as a world: finding it, making it, what it is, what is said when it is not there."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import gymnasium
import numpy as np
import pytest

import esper_simic  # noqa: F401 - registers the known answers
from esper_simic.errors import ConfigError
from esper_simic.specs import Choices, Continuous, VectorSpec
from esper_simic.worlds.gymnasium_world import GymnasiumWorld, find_spec


@pytest.mark.parametrize(
    ("name", "spec", "horizon", "threshold"),
    [
        ("CartPole-v1", VectorSpec(4, Choices(("action",), (2,))), 500, 475),
        ("Acrobot-v1", VectorSpec(6, Choices(("action",), (3,))), 500, -100),
        ("MountainCarContinuous-v0", VectorSpec(2, Continuous((-1.0,), (1.0,))), 999, 90),
        ("FrozenLake-v1", VectorSpec(16, Choices(("action",), (4,))), 100, 0.7),
        ("Pendulum-v1", VectorSpec(3, Continuous((-2.0,), (2.0,))), 200, None),
        ("CliffWalking-v1", VectorSpec(48, Choices(("action",), (4,))), None, None),
        ("esper_simic/Recall-v0", VectorSpec(3, Choices(("action",), (2,))), None, None),
        ("esper_simic/GridWorld-v0", VectorSpec(16, Choices(("action",), (4,))), 50, None),
    ],
)
def test_what_a_world_is(name, spec, horizon, threshold):
    world = GymnasiumWorld(name)
    assert (world.spec, world.horizon, world.reward_threshold) == (spec, horizon, threshold)


def test_kwargs_reach_the_environment_in_both_forms():
    assert GymnasiumWorld("FrozenLake-v1", {"map_name": "8x8"}).spec.features == 64
    for vectorised in (True, False):
        world = GymnasiumWorld("CartPole-v1", {"max_episode_steps": 3}, vectorised=vectorised)
        assert world.horizon == 3
    assert GymnasiumWorld("CartPole-v1", {"max_episode_steps": -1}).horizon is None


@pytest.mark.parametrize("vectorised", [True, False])
def test_a_time_limit_can_be_taken_away(vectorised):
    world = GymnasiumWorld("esper_simic/Chain-v0", {"max_episode_steps": -1}, vectorised=vectorised)
    lanes = world.lanes([1], [0], stagger=True)
    lanes.reset()
    for step in range(300):
        _, _, terminated, truncated, _ = lanes.step(np.array([[step % 2]]))
        assert not terminated[0]
        assert not truncated[0]


def test_identity_is_what_the_environments_are_and_not_how_they_are_stepped():
    once = GymnasiumWorld("CartPole-v1").digest()
    assert len(once) == 64
    assert int(once, 16) >= 0
    assert GymnasiumWorld("CartPole-v1", vectorised=False).digest() == once
    assert GymnasiumWorld("gymnasium:CartPole-v1").digest() == once
    others = [
        GymnasiumWorld("Acrobot-v1").digest(),
        GymnasiumWorld("CartPole-v1", {"sutton_barto_reward": True}).digest(),
        GymnasiumWorld("CartPole-v1", {"max_episode_steps": 200}).digest(),
        GymnasiumWorld("esper_simic/Bandit-v0").digest(),
    ]
    assert len({once, *others}) == 5


def test_identity_is_the_same_in_every_process():
    script = (
        "import esper_simic\n"
        "from esper_simic.worlds.gymnasium_world import GymnasiumWorld\n"
        "print(GymnasiumWorld('FrozenLake-v1', {'map_name': '8x8', 'is_slippery': False}).digest())\n"
    )
    done = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    here = GymnasiumWorld("FrozenLake-v1", {"is_slippery": False, "map_name": "8x8"}).digest()
    assert done == [here + "\n"] * 2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("CartPol-v1", "CartPole"),
        ("CartPole-v7", "v1"),
        ("esper_simics/Bandit-v0", "esper_simic"),
        ("Breakout-v5", "package.module:Breakout-v5"),
        ("no_such_package:Thing-v0", "no_such_package.*cannot be imported"),
    ],
)
def test_an_id_that_is_not_there_is_refused_with_the_nearest(name, says):
    with pytest.raises(ConfigError, match=says) as refused:
        find_spec(name)
    assert refused.value.key == "environment.id"


@pytest.mark.parametrize(
    ("name", "kwargs", "says"),
    [
        ("CartPole-v1", {"gravty": 3}, "CartPole-v1 cannot be made with .*gravty"),
        ("Acrobot-v1", {"gravty": 3}, "Acrobot-v1 cannot be made with .*gravty"),
        ("FrozenLake-v1", {"map_name": "9x9"}, "FrozenLake-v1 cannot be made with .*9x9"),
        ("phys2d/CartPole-v1", {}, "phys2d/CartPole-v1 cannot be made: .*jax"),
        ("Blackjack-v1", {}, "Blackjack-v1 is observed as Tuple.*FlattenObservation"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_reason(name, kwargs, says):
    with pytest.raises(ConfigError, match=says):
        GymnasiumWorld(name, kwargs)


def test_an_id_of_another_package_is_registered_by_importing_it(tmp_path, monkeypatch):
    (tmp_path / "some_worlds_of_a_test.py").write_text(
        textwrap.dedent(
            """
            import gymnasium
            gymnasium.register(
                "theirs/Lake-v3",
                entry_point="gymnasium.envs.toy_text.frozen_lake:FrozenLakeEnv",
                kwargs={"map_name": "4x4"},
                max_episode_steps=9,
                additional_wrappers=(),
            )
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = "some_worlds_of_a_test:theirs/Lake-v3"
    try:
        world = GymnasiumWorld(name)
        assert (world.spec.features, world.horizon) == (16, 9)
        assert len(world.digest()) == 64
    finally:
        gymnasium.registry.pop("theirs/Lake-v3", None)
        sys.modules.pop("some_worlds_of_a_test", None)


def test_wrappers_of_a_registration_are_kept():
    spec = gymnasium.wrappers.TimeAwareObservation(gymnasium.make("CartPole-v1")).spec
    assert spec is not None
    spec.id = "tests/Aware-v0"
    gymnasium.registry[spec.id] = spec
    try:
        assert GymnasiumWorld(spec.id).spec.features == 5
    finally:
        del gymnasium.registry[spec.id]


class Stubborn(gymnasium.Env):
    """Can be made, and never be reset."""

    def __init__(self, **kwargs: Any) -> None:
        """As it is registered."""

    observation_space = gymnasium.spaces.Discrete(2)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        raise ValueError("its data is not here")


def test_what_cannot_be_reset_says_so_before_a_run_begins():
    gymnasium.register("tests/Stubborn-v0", entry_point=Stubborn)
    try:
        world = GymnasiumWorld("tests/Stubborn-v0")
        with pytest.raises(ConfigError, match="tests/Stubborn-v0 cannot be reset: its data is not here"):
            world.digest()
    finally:
        del gymnasium.registry["tests/Stubborn-v0"]


class Masked(gymnasium.Env):
    """Two of three choices are legal; the next one is shown by its number."""

    def __init__(self, choices: int = 3, **kwargs: Any) -> None:
        self.action_space = gymnasium.spaces.Discrete(choices)
        self.observation_space = gymnasium.spaces.Dict(
            {"observation": gymnasium.spaces.Discrete(3), "action_mask": gymnasium.spaces.MultiBinary(3)}
        )
        self._illegal = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._illegal = int(self.np_random.integers(3))
        return self._seen(), {}

    def step(self, action):
        reward = float(action != self._illegal)
        self._illegal = (self._illegal + 1) % 3
        return self._seen(), reward, False, self._illegal == 0, {}

    def _seen(self):
        mask = np.ones(3, dtype=np.int8)
        mask[self._illegal] = 0
        return {"observation": self._illegal, "action_mask": mask}


class MaskedVector(gymnasium.vector.SyncVectorEnv):
    """Resets ended lanes itself."""

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}  # noqa: RUF012 - as Gymnasium has it

    def __init__(self, num_envs: int = 1, **kwargs: Any) -> None:
        mode = gymnasium.vector.AutoresetMode.SAME_STEP
        super().__init__([Masked] * num_envs, autoreset_mode=mode)


@pytest.fixture
def masked():
    gymnasium.register("tests/Masked-v0", entry_point=Masked, vector_entry_point=MaskedVector)
    yield "tests/Masked-v0"
    del gymnasium.registry["tests/Masked-v0"]


def test_masks_of_any_environment_reach_whoever_acts(masked):
    """Also where its own vector form resets ended lanes itself: that one is not used then."""
    world = GymnasiumWorld(masked)
    assert world.spec == VectorSpec(3, Choices(("action",), (3,)), masked=True)
    lanes = world.lanes([1, 2], [0, 0], stagger=False)
    observed, _ = lanes.reset()
    ended = 0
    for _ in range(8):
        assert np.array_equal(observed["action_mask"], 1 - observed["vector"])
        before, action = observed, observed["action_mask"].argmax(axis=1)[:, None]
        observed, reward, _, truncated, infos = lanes.step(action)
        assert reward.tolist() == [1.0, 1.0]
        for lane in np.flatnonzero(truncated):
            ended += 1
            assert infos["final_obs"]["action_mask"][lane].tolist() == [0, 1, 1]
            assert before["action_mask"][lane].tolist() == [1, 1, 0]
    assert ended > 2


def test_a_mask_has_one_entry_for_each_choice(masked):
    with pytest.raises(
        ConfigError, match="an action mask of 3 entries, and its actions are .*one entry for each c"
    ):
        GymnasiumWorld(masked, {"choices": 4}, vectorised=False)


def test_gymnasium_worlds_load_no_torch():
    script = (
        "import sys, esper_simic\n"
        "from esper_simic.worlds.gymnasium_world import GymnasiumWorld\n"
        "GymnasiumWorld('esper_simic/Catch-v0').lanes([1], [0], stagger=True).reset()\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
