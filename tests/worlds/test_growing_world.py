"""The world of growing hosts: the very environment, seen as every world is seen."""

from __future__ import annotations

import numpy as np
import pytest

from esper_simic.actions import HEADS
from esper_simic.config import EnvironmentConfig
from esper_simic.config_trainer import TrainerConfig
from esper_simic.errors import ConfigError
from esper_simic.growing_host.controllers import RandomController
from esper_simic.growing_host.spaces import observation_spec_of
from esper_simic.growing_host.tasks import load_task
from esper_simic.growing_host.vector import GrowingHostVectorEnv
from esper_simic.policies.build import build_policy
from esper_simic.unroll import begin, unroll
from esper_simic.worlds.growing import GrowingWorld
from esper_simic.worlds.gymnasium_world import GymnasiumWorld
from esper_simic.worlds.world import world_of

SMALL = EnvironmentConfig(
    max_epochs=6,
    training_epochs_min=2,
    train_batches=1,
    train_batch_size=8,
    validation_samples=20,
    success_accuracy=10.0,
)


@pytest.mark.parametrize("stagger", [True, False])
def test_lanes_are_the_vector_environment(stagger):
    world = GrowingWorld(SMALL, 0.97)
    lanes = world.lanes([3, 4, 5], [0, 2, 9], stagger=stagger)
    env = GrowingHostVectorEnv(3, SMALL, gamma=0.97, lane_seeds=[3, 4, 5], first_episodes=[0, 2, 9])
    seen, _ = lanes.reset()
    truth, _ = env.reset(options={"stagger": stagger})
    rng, ends = np.random.default_rng(0), []
    for step in range(10):
        assert all(seen[key].tobytes() == truth[key].tobytes() for key in world.spec.shapes())
        actions = RandomController().act(env.view(), rng.random((3, len(HEADS))))
        seen, *rest, infos = lanes.step(actions)
        truth, *others, told = env.step(actions)
        assert all(one.tobytes() == other.tobytes() for one, other in zip(rest, others, strict=True))
        assert ("episode" in infos) == ("episode" in told)
        for lane in np.flatnonzero(infos.get("_episode", ())).tolist():
            outcome = world.outcome(infos["episode"], lane)
            episode = told["episode"]
            ends.append((step, lane))
            assert outcome.episode_return == episode["r"][lane]
            assert outcome.length == episode["l"][lane]
            assert outcome.measures == {
                name: episode[name][lane] for name in ("accuracy", "parameters_added", "fossils")
            }
            assert outcome.success == (episode["accuracy"][lane] >= 10)
            assert not infos["episode"]["rolled_back"][lane]
    lanes.close()
    assert ends[0] == ((1, 0) if stagger else (5, 0))


def test_hosts_may_be_seen_flat():
    config = SMALL.model_copy(update={"observation": "flat"})
    worlds = GrowingWorld(SMALL, 0.97), GrowingWorld(config, 0.97)
    graphs, flats = (world.lanes([3, 4], [0, 2], stagger=True) for world in worlds)
    spec = worlds[1].spec
    assert spec.shapes()["vector"] == ((23 + 31 * 3,), "float32")
    assert spec.action == worlds[0].spec.action
    (graph, _), (flat, _) = graphs.reset(), flats.reset()
    rng = np.random.default_rng(0)
    finals = 0
    for _ in range(7):
        _check_flat(spec, graph, flat)
        actions = RandomController().act(graphs.hosts.view(), rng.random((2, len(HEADS))))
        graph, *rest, infos = graphs.step(actions)
        flat, *others, told = flats.step(actions)
        assert all(np.array_equal(one, other) for one, other in zip(rest, others, strict=True))
        if "final_obs" in told:
            finals += 1
            _check_flat(spec, infos["final_obs"], told["final_obs"])
    assert finals == 2


def _check_flat(spec, graph, flat):
    assert list(flat) == list(spec.shapes())
    for key, (shape, dtype) in spec.shapes().items():
        assert (flat[key].shape, flat[key].dtype) == ((2, *shape), dtype)
    assert np.array_equal(flat["vector"][:, :23], graph["globals"])
    assert np.array_equal(flat["vector"][:, 23:54], graph["slot_nodes"][:, 0])
    assert np.array_equal(flat["action_mask"], graph["action_mask"])


def test_what_the_world_is():
    world = world_of(SMALL, 0.99)
    assert isinstance(world, GrowingWorld)
    assert world.spec == observation_spec_of(SMALL)
    assert world.digest() == load_task("digits").digest


def test_another_id_is_another_world():
    world = world_of(EnvironmentConfig(id="CartPole-v1", kwargs={"max_episode_steps": 5}), 0.99)
    assert isinstance(world, GymnasiumWorld)
    assert world.horizon == 5


def test_a_host_that_cannot_be_grown_here_is_refused():
    with pytest.raises(ConfigError, match="series"):
        GrowingWorld(EnvironmentConfig(host="series"), 0.99).digest()


def test_an_episode_that_the_governor_ended_says_so():
    world = GrowingWorld(SMALL, 0.97)
    lanes = world.lanes([3, 4], [0, 0], stagger=False)
    observed, _ = lanes.reset()
    trainer = TrainerConfig(hidden_size=16, graph_layers=1)
    policy = build_policy(world.spec, trainer, np.random.default_rng(0))
    carry = begin(policy, observed, [3, 4], np.zeros(2, dtype=np.int64))
    lanes.hosts._hosts.bank.parameters[0, 5] = float("nan")
    _, (ended,) = unroll(policy, lanes, carry, 1)
    assert (ended.lane, ended.truncated, ended.cut, ended.rolled_back) == (0, True, True, True)
    _, finished = unroll(policy, lanes, carry, 6)
    assert {one.rolled_back for one in finished} == {False}
