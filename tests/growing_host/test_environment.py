"""The Gymnasium environments: their contract, determinism, independence of lanes, episodes."""

from __future__ import annotations

from typing import Any
from unittest import mock

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import esper_simic  # noqa: F401 - registers the environment
from esper_simic.actions import HEADS, OP, SLOT, Op
from esper_simic.config import EnvironmentConfig, GovernorConfig
from esper_simic.errors import ConfigError, ContractError, InvariantViolation
from esper_simic.graphs import OBSERVATION_KEYS
from esper_simic.growing_host.controllers import PatientController, RandomController
from esper_simic.growing_host.environment import GrowingHostEnv
from esper_simic.growing_host.vector import GrowingHostVectorEnv, staggered_cuts

SMALL = EnvironmentConfig(
    max_epochs=12,
    training_epochs_min=2,
    train_batches=2,
    train_batch_size=8,
    validation_samples=50,
    prune_age_min=2,
)
UNSTAGGERED = {"stagger": False}


def play(env, steps, *, seed=0, options=None, controller=None, chance=0):
    """What a run gives, step by step."""
    controller = controller or RandomController()
    rng = np.random.default_rng(chance)
    observed, infos = env.reset(seed=seed, options=options)
    trace: list[Any] = [(observed, None, None, None, infos)]
    for _ in range(steps):
        actions = controller.act(env.view(), rng.random((env.num_envs, len(HEADS))))
        trace.append(env.step(actions))
    return trace


def test_check_env_has_nothing_to_say():
    env = gymnasium.make("esper_simic/GrowingHost-v0", task="digits", host="rescue", slots=("r0c0", "r0c2"))
    check_env(env.unwrapped, skip_render_check=True)
    assert isinstance(env.unwrapped, GrowingHostEnv)
    assert env.unwrapped.spec_observation.slots == 2


SHORT: dict[str, Any] = {
    "max_epochs": 6,
    "training_epochs_min": 2,
    "train_batches": 1,
    "train_batch_size": 8,
    "validation_samples": 20,
}
OF_EACH_KIND = {"digits": "rescue", "mnist1d": "series", "wine": "mlp", "characters": "transformer"}


@pytest.mark.parametrize(("task", "host"), OF_EACH_KIND.items())
@pytest.mark.parametrize("alpha_control", ["plain", "full"])
def test_gymnasium_makes_and_checks_an_environment_of_each_kind(task, host, alpha_control):
    env = gymnasium.make(
        "esper_simic/GrowingHost-v0",
        task=task,
        host=host,
        alpha_control=alpha_control,
        render_mode="rgb_array",
        **SHORT,
    )
    check_env(env.unwrapped)
    observed, info = env.reset(seed=1)
    env.action_space.seed(1)
    steps, terminated = 0, False
    while not terminated:
        assert observed in env.observation_space
        observed, reward, terminated, truncated, info = env.step(
            env.action_space.sample(mask=info["action_mask"])
        )
        steps += 1
        assert np.isfinite(float(reward))
        assert not truncated
    assert steps == SHORT["max_epochs"]
    picture: Any = env.render()
    assert (picture.dtype, picture.ndim, picture.shape[-1]) == (np.uint8, 3, 3)


@pytest.mark.parametrize(("task", "host"), OF_EACH_KIND.items())
def test_gymnasium_makes_the_one_computation_unless_it_is_told_otherwise(task, host):
    """`sync` would step scalar environments one after another; it works, in Gymnasium's own autoreset mode."""
    settings = {"num_envs": 2, "task": task, "host": host, "stagger": False, **SHORT}
    lanes = gymnasium.make_vec("esper_simic/GrowingHost-v0", **settings)
    assert isinstance(lanes, GrowingHostVectorEnv)
    assert lanes.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    one_by_one = gymnasium.make_vec("esper_simic/GrowingHost-v0", vectorization_mode="sync", **settings)
    assert one_by_one.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    wait = np.zeros((2, len(HEADS)), dtype=np.int64)
    first: dict[str, Any] = lanes.reset(seed=3)[0]
    alone: dict[str, Any] = one_by_one.reset(seed=3)[0]
    terminated, infos = np.zeros(2, dtype=np.bool_), dict[str, Any]()
    for _ in range(SHORT["max_epochs"]):
        for key in OBSERVATION_KEYS:
            np.testing.assert_allclose(first[key], alone[key], atol=1e-5, err_msg=key)
        first, _, terminated, _, infos = lanes.step(wait)
        alone, _, terminated_alone, _, _ = one_by_one.step(wait)
        assert terminated.tolist() == terminated_alone.tolist()
    assert terminated.all()
    # Where one has begun the next episode already, the other still shows the end of this one.
    for key in OBSERVATION_KEYS:
        np.testing.assert_allclose(infos["final_obs"][key], alone[key], atol=1e-5, err_msg=key)
    assert infos["episode_number"].tolist() == [0, 0]
    assert first["globals"][:, 0].tolist() == [0.0, 0.0]
    lanes.close()
    one_by_one.close()


def test_vector_environment_keeps_the_contract():
    env = gymnasium.make_vec(
        "esper_simic/GrowingHost-v0",
        num_envs=3,
        vectorization_mode="vector_entry_point",
        **{name: getattr(SMALL, name) for name in SMALL.model_fields_set},
    )
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    observed, infos = env.reset(seed=5)
    env.action_space.seed(5)
    for _ in range(15):
        assert observed in env.observation_space
        assert set(observed) == set(OBSERVATION_KEYS)
        actions = env.action_space.sample(mask=infos["action_mask"])
        assert actions in env.action_space
        observed, rewards, terminated, truncated, infos = env.step(actions)
        assert rewards.shape == terminated.shape == truncated.shape == (3,)
        assert rewards.dtype == np.float64
        np.testing.assert_allclose(sum(infos["reward_parts"].values()), rewards, atol=1e-12)
    env.close()


def test_scalar_masks_sample_the_action_space():
    env = GrowingHostEnv(SMALL)
    observed, info = env.reset(seed=1)
    env.action_space.seed(1)
    total, parts, done = 0.0, 0.0, False
    while not done:
        observed, reward, done, truncated, info = env.step(env.action_space.sample(mask=info["action_mask"]))
        assert observed in env.observation_space
        assert not truncated
        total += reward
        parts += sum(info["reward_parts"].values())
    assert total == pytest.approx(parts)
    with pytest.raises(ContractError, match="reset the environment"):
        env.step(env.action_space.sample())


def test_the_scalar_environment_is_one_lane_of_the_vector_environment():
    scalar, vector = GrowingHostEnv(SMALL), GrowingHostVectorEnv(1, SMALL)
    controller, rng = PatientController(1), np.random.default_rng(0)
    one: dict[str, Any] = scalar.reset(seed=9)[0]
    many: dict[str, Any] = vector.reset(seed=9)[0]
    for _ in range(SMALL.max_epochs - 1):
        actions = controller.act(vector.view(), rng.random((1, 8)))
        for key in OBSERVATION_KEYS:
            np.testing.assert_array_equal(one[key], many[key][0])
        one, reward, *_ = scalar.step(actions[0])
        many, rewards, *_ = vector.step(actions)
        assert reward == rewards[0]


def same_trace(a, b, lane_a=slice(None), lane_b=slice(None), **tolerance):
    for (observed_a, reward_a, *ends_a, _), (observed_b, reward_b, *ends_b, _) in zip(a, b, strict=True):
        for key in OBSERVATION_KEYS:
            np.testing.assert_allclose(
                observed_a[key][lane_a], observed_b[key][lane_b], err_msg=key, **tolerance
            )
        if reward_a is not None:
            np.testing.assert_allclose(reward_a[lane_a], reward_b[lane_b], **tolerance)
            for end_a, end_b in zip(ends_a, ends_b, strict=True):
                np.testing.assert_array_equal(end_a[lane_a], end_b[lane_b])


def test_the_same_seed_gives_the_same_bits_through_autoresets():
    runs = [play(GrowingHostVectorEnv(3, SMALL), 30, seed=4) for _ in range(2)]
    same_trace(*runs, atol=0, rtol=0)


def test_another_seed_gives_another_run():
    a, b = (play(GrowingHostVectorEnv(2, SMALL), 2, seed=seed) for seed in (0, 100))
    assert not np.array_equal(a[-1][0]["host_nodes"], b[-1][0]["host_nodes"])


def test_no_global_generator_is_touched():
    torch.manual_seed(0)
    torch_state = torch.get_rng_state()
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 - the thing under test
    play(GrowingHostVectorEnv(2, SMALL), 14)
    after: Any = np.random.get_state()  # noqa: NPY002
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state[1] == after[1]).all()
    assert numpy_state[2] == after[2]


class Scripted:
    """Lane k of any width does what lane k of five would: uniforms and memory are per lane."""

    def __init__(self, lanes):
        self.lanes, self.step = lanes, 0

    def act(self, view, uniforms):
        rng = np.random.default_rng(self.step)
        self.step += 1
        return RandomController().act(view, rng.random((5, len(HEADS)))[self.lanes])


@pytest.mark.parametrize("lane", [0, 3, 4])
def test_a_lane_does_the_same_beside_any_other_lanes(lane):
    """Random growth in five lanes against one lane alone: equal up to rounding, epoch after epoch."""
    five = play(
        GrowingHostVectorEnv(5, SMALL), 20, seed=20, options=UNSTAGGERED, controller=Scripted(range(5))
    )
    one = play(
        GrowingHostVectorEnv(1, SMALL), 20, seed=20 + lane, options=UNSTAGGERED, controller=Scripted([lane])
    )
    same_trace(five, one, slice(lane, lane + 1), atol=1e-5, rtol=1e-5)


def test_work_of_a_step_does_not_depend_on_the_number_of_lanes():
    """The trap: a shared loader whose batches are split among lanes."""
    for lanes in (1, 4):
        env = GrowingHostVectorEnv(lanes, SMALL)
        env.reset(seed=0)
        with mock.patch.object(
            env._hosts._trainer, "train_epoch", wraps=env._hosts._trainer.train_epoch
        ) as train:
            env.step(PatientController().act(env.view(), np.zeros((lanes, 8))))
        (samples, _), _ = train.call_args
        assert samples.shape == (SMALL.train_batches, lanes, SMALL.train_batch_size)


def test_episodes_end_at_the_horizon_as_terminated_and_restart_in_the_same_step():
    env = GrowingHostVectorEnv(2, SMALL)
    trace = play(env, 13, options=UNSTAGGERED)
    for step, (_, _, terminated, truncated, infos) in enumerate(trace[1:], start=1):
        assert not truncated.any()
        assert terminated.all() == (step == 12)
        assert ("final_obs" in infos) == ("episode" in infos) == (step == 12)
    observed, _, _, _, infos = trace[12]
    assert infos["_episode"].all()
    assert infos["_final_obs"].all()
    assert infos["episode"]["l"].tolist() == [12, 12]
    total = sum(rewards for _, rewards, *_ in trace[1:13])
    np.testing.assert_allclose(infos["episode"]["r"], total)
    assert infos["final_obs"]["globals"][:, 0] == pytest.approx([1.0, 1.0])
    assert observed["globals"][:, 0].tolist() == [0.0, 0.0]
    assert not observed["slot_nodes"].any()
    np.testing.assert_allclose(
        infos["episode"]["accuracy"], infos["final_obs"]["globals"][:, 2] * 100, rtol=1e-6
    )
    assert [infos["episode_number"].tolist() for *_, infos in trace[11:14]] == [[0, 0], [0, 0], [1, 1]]


def test_first_episodes_are_staggered_and_cut_as_truncated():
    assert staggered_cuts(4, 40).tolist() == [10, 20, 30, 40]
    assert staggered_cuts(32, 4)[0] == 1
    env = GrowingHostVectorEnv(4, SMALL)
    trace = play(env, 24)
    lengths: dict[int, list[tuple[int, str]]] = {lane: [] for lane in range(4)}
    for _, _, terminated, truncated, infos in trace[1:]:
        for lane in np.flatnonzero(terminated | truncated).tolist():
            kind = "terminated" if terminated[lane] else "truncated"
            lengths[lane].append((int(infos["episode"]["l"][lane]), kind))
    assert lengths[0][:2] == [(3, "truncated"), (12, "terminated")]
    assert lengths[1][:2] == [(6, "truncated"), (12, "terminated")]
    assert lengths[3] == [(12, "terminated"), (12, "terminated")]


def test_a_cut_episode_gets_no_terminal_parts():
    trace = play(GrowingHostVectorEnv(4, SMALL), 3, controller=PatientController())
    _, _, _, truncated, infos = trace[3]
    assert truncated.tolist() == [True, False, False, False]
    assert infos["reward_parts"]["terminal_accuracy"].tolist() == [0.0] * 4
    assert infos["reward_parts"]["shaping"][0] > 0


def test_lanes_take_seeds_and_episode_numbers_that_are_given():
    given = GrowingHostVectorEnv(2, SMALL, lane_seeds=[70, 80], first_episodes=[3, 5])
    first, infos = given.reset(options=UNSTAGGERED)
    assert infos["episode_number"].tolist() == [3, 5]
    plain = GrowingHostVectorEnv(1, SMALL, first_episodes=[5])
    other, _ = plain.reset(seed=80)
    np.testing.assert_allclose(first["host_nodes"][1], other["host_nodes"][0], rtol=1e-6)
    _, infos = given.reset()
    assert infos["episode_number"].tolist() == [4, 6]
    seeded, infos = given.reset(seed=[70, 80], options=UNSTAGGERED)
    assert infos["episode_number"].tolist() == [3, 5]
    np.testing.assert_array_equal(seeded["host_nodes"], first["host_nodes"])
    with pytest.raises(ContractError, match="one a lane"):
        given.reset(seed=[1])


def test_unseeded_resets_draw_new_lanes():
    a, b = (GrowingHostVectorEnv(1, SMALL).reset()[0]["host_nodes"] for _ in range(2))
    assert not np.array_equal(a, b)
    env = GrowingHostEnv(SMALL)
    first, second = env.reset(), env.reset()
    assert (first[1]["episode_number"], second[1]["episode_number"]) == (0, 1)
    assert not np.array_equal(first[0]["host_nodes"], second[0]["host_nodes"])


def test_reset_measures_a_host_that_is_not_yet_trained():
    env = GrowingHostVectorEnv(2, SMALL)
    observed, infos = env.reset(seed=0)
    view = env.view()
    assert view.epoch.tolist() == [0, 0]
    assert np.isfinite(view.accuracy[:, -1]).all()
    assert np.isnan(view.accuracy[:, :-1]).all()
    np.testing.assert_allclose(infos["accuracy"], view.accuracy[:, -1])
    assert observed["globals"][0, 3:7].tolist() == [-1.0] * 4
    assert observed["globals"][0, 7] > 0
    with pytest.raises(ValueError, match="read-only"):
        view.epoch[0] = 1


@pytest.mark.parametrize(
    ("actions", "complaint"),
    [
        (np.zeros((2, 8)), "integers"),
        (np.zeros((3, 8), dtype=np.int64), r"\[2, 8\]"),
        (np.full((2, 8), 6), "outside"),
        (np.full((2, 8), -1), "outside"),
    ],
)
def test_actions_outside_the_space_are_refused_loudly(actions, complaint):
    env = GrowingHostVectorEnv(2, SMALL)
    env.reset(seed=0)
    with pytest.raises(ContractError, match=complaint):
        env.step(actions)


def test_a_step_before_reset_is_refused():
    with pytest.raises(ContractError, match="reset"):
        GrowingHostVectorEnv(1, SMALL).step(np.zeros((1, 8), dtype=np.int64))


def test_bad_settings_are_configuration_errors():
    with pytest.raises(ConfigError, match="not both"):
        GrowingHostEnv(SMALL, max_epochs=9)
    with pytest.raises(ConfigError, match=r"environment\.max_epoch"):
        GrowingHostEnv(max_epoch=9)
    with pytest.raises(ConfigError, match=r"holds out 450 samples, not 451"):
        GrowingHostVectorEnv(1, validation_samples=451)


def test_what_is_not_a_number_is_never_shown():
    unwatched = SMALL.model_copy(update={"governor": GovernorConfig(enabled=False)})
    env = GrowingHostVectorEnv(2, unwatched)
    env.reset(seed=0)
    env._hosts.bank.parameters[1, 5] = float("nan")
    with pytest.raises(InvariantViolation, match="lane 1 is not finite"):
        env.step(PatientController().act(env.view(), np.zeros((2, 8))))


def test_the_task_is_learnable_by_the_host_at_all():
    """Really trained: a digits host with three conv_light seeds leaves chance far behind."""
    config = EnvironmentConfig(max_epochs=40, training_epochs_min=4, validation_samples=256)
    env = GrowingHostVectorEnv(6, config)
    trace = play(env, 40, options=UNSTAGGERED, controller=PatientController())
    episode = trace[-1][4]["episode"]
    start = trace[0][4]["accuracy"]
    assert episode["accuracy"].mean() > start.mean() + 15
    assert episode["fossils"].max() == 3
    assert episode["parameters_added"].max() == 203


def test_actions_name_the_heads_the_environment_reads():
    assert (HEADS[OP], HEADS[SLOT], len(Op)) == ("op", "slot", 6)
