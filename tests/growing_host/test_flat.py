"""The flat observation holds the graph observation's numbers, place for place."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

import esper_simic  # noqa: F401 - registers the environments
from esper_simic.errors import ContractError
from esper_simic.growing_host.flat import (
    BLUEPRINT_EMBEDDING_SIZE,
    BLUEPRINT_ROWS,
    FlatObservation,
    FlatVectorObservation,
    flat_size,
    flat_space,
    flatten,
)

QUICK: dict[str, Any] = {"max_epochs": 12, "train_batches": 1, "validation_samples": 32}
NAME = "esper_simic/GrowingHost-v0"


def test_three_slots_make_116_numbers_and_12_embedded_ones() -> None:
    assert flat_size(3) == 116
    assert flat_size(3) + 3 * BLUEPRINT_EMBEDDING_SIZE == 128
    assert BLUEPRINT_ROWS == 14


def test_every_number_is_where_the_graph_observation_has_it() -> None:
    observation = {
        "globals": np.arange(23, dtype=np.float32),
        "slot_nodes": 100 + np.arange(62, dtype=np.float32).reshape(2, 31),
        "slot_blueprint": np.array([3, 13]),
        "action_mask": np.ones(5, dtype=np.int8),
    }
    flat = flatten(observation)
    assert flat["features"].tolist() == [*range(23), *range(100, 162)]
    assert flat["features"].dtype == np.float32
    assert flat["slot_blueprint"] is observation["slot_blueprint"]


def test_the_scalar_environments_observations_lie_in_its_space() -> None:
    env = FlatObservation(gymnasium.make(NAME, **QUICK))
    assert flat_space(env.env.observation_space)["features"].shape == (116,)
    seen, info = env.reset(seed=1)
    assert env.observation_space.contains(seen)
    seen, *_ = env.step(env.action_space.sample(info["action_mask"]))
    assert env.observation_space.contains(seen)


def test_the_vector_environment_is_flat_to_its_final_observations() -> None:
    env = FlatVectorObservation(gymnasium.make_vec(NAME, num_envs=3, stagger=False, **QUICK))
    plain = gymnasium.make_vec(NAME, num_envs=3, stagger=False, **QUICK)
    seen, _ = env.reset(seed=4)
    graph, _ = plain.reset(seed=4)
    wait = np.zeros((3, 8), dtype=np.int64)
    infos: dict[str, Any] = {}
    plain_infos: dict[str, Any] = {}
    for _ in range(12):
        assert env.observation_space.contains(seen)
        np.testing.assert_array_equal(seen["features"], flatten(graph)["features"])
        seen, _, _, _, infos = env.step(wait)
        graph, _, _, _, plain_infos = plain.step(wait)
    np.testing.assert_array_equal(
        infos["final_obs"]["features"], flatten(plain_infos["final_obs"])["features"]
    )


def test_another_environments_space_is_refused() -> None:
    with pytest.raises(ContractError, match="not of Box"):
        FlatObservation(gymnasium.make("CartPole-v1"))
