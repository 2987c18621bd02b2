"""What an unroll says of itself, before anything is made of its frames."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from esper_simic.config import Config
from esper_simic.errors import ContractError
from esper_simic.growing_host.spaces import observation_spec_of
from esper_simic.policies.graph_policy import GraphPolicy
from esper_simic.trajectory import encode
from supervisor.protocol import Unroll
from supervisor.roles.admission import EPISODE_NUMBER_MAX, admitted, check, decode_unroll, shape_of_run
from tests.policies.synthetic import trajectory
from tests.roles.bench import LANES, T, episode, make_config


@pytest.fixture(scope="module")
def config() -> Config:
    return make_config()


@pytest.fixture(scope="module")
def policy(config: Config) -> GraphPolicy:
    spec = observation_spec_of(config.environment)
    return GraphPolicy(spec, config.simic_trainer, np.random.default_rng(0))


def message(**changed: Any) -> Unroll:
    fields: dict[str, Any] = {
        "actor": 1,
        "incarnation": 2,
        "sequence": 3,
        "policy_version": 4,
        "lanes": LANES,
        "steps": T,
        "episode_numbers": [5, 6, 7, 8],
        "episodes": [episode(lane=3)],
    }
    return Unroll(**fields | changed)


def test_the_shape_of_a_run_is_configured_once(config: Config) -> None:
    assert shape_of_run(config) == (T, LANES)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"policy_version": 0},
        {"policy_version": 9},
        {"episodes": []},
        {"episode_numbers": [0, 0, 0, EPISODE_NUMBER_MAX - 1]},
    ],
)
def test_what_can_be_is_let_through(config: Config, changed: dict[str, Any]) -> None:
    check(message(**changed), config, 9)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"steps": T + 1}, r"\(3, 4\), not \(4, 4\)"),
        ({"lanes": LANES - 1}, r"\(3, 4\), not \(3, 3\)"),
        ({"policy_version": 10}, "10 was never announced; the newest is 9"),
        ({"policy_version": -1}, "-1 was never announced"),
        ({"episode_numbers": [1, 2, 3]}, "3 episode numbers for 4 lanes"),
        ({"episode_numbers": [1, 2, 3, EPISODE_NUMBER_MAX]}, "an episode number is not in"),
        ({"episode_numbers": [1, 2, 3, -1]}, "an episode number is not in"),
        ({"episodes": [episode(number=-1)]}, "an episode number is not in"),
        ({"episodes": [episode(), episode(lane=LANES)]}, "an episode of lane 4; there are 4"),
        ({"episodes": [episode(lane=-1)]}, "an episode of lane -1"),
        ({"episodes": [episode(lane=2, episode_return=math.inf)]}, "of lane 2 is not finite"),
        ({"episodes": [episode(accuracy=math.nan)]}, "of lane 0 is not finite"),
    ],
)
def test_what_cannot_be_is_named(config: Config, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ContractError, match=said):
        check(message(**changed), config, 9)


def test_the_fact_says_what_the_message_said() -> None:
    said = msgspec.structs.asdict(message())
    fact = msgspec.structs.asdict(admitted(message(), "0badcafe"))
    assert fact.pop("length") == said.pop("steps")
    assert fact.pop("hardware") == "0badcafe"
    assert fact == said


def unroll_of(policy: GraphPolicy) -> list[bytes]:
    return encode(trajectory(policy, 1, T, LANES, spec=policy.spec))


def test_frames_become_the_unroll(policy: GraphPolicy) -> None:
    frames = unroll_of(policy)
    assert encode(decode_unroll(frames, message(), policy, lockstep=False)) == frames


def test_in_lockstep_the_actors_state_stands_behind_the_frames_and_is_no_part_of_the_unroll(
    policy: GraphPolicy,
) -> None:
    frames = unroll_of(policy)
    carried = np.ones((LANES, policy.state_size), dtype="<f4")
    decoded = decode_unroll([*frames, carried.tobytes()], message(), policy, lockstep=True)
    assert encode(decoded) == frames
    carried[2, 3] = math.nan
    with pytest.raises(ContractError, match="recurrent state of an actor .* not finite"):
        decode_unroll([*frames, carried.tobytes()], message(), policy, lockstep=True)


@pytest.mark.parametrize("is_cut", [True, False])
def test_in_lockstep_an_unroll_without_the_actors_state_is_refused(
    policy: GraphPolicy, *, is_cut: bool
) -> None:
    frames = unroll_of(policy)
    carried = np.ones((LANES, policy.state_size), dtype="<f4").tobytes()
    given = [*frames, carried[:-4]] if is_cut else frames
    with pytest.raises(ContractError, match=f"has {len(carried)} bytes"):
        decode_unroll(given, message(), policy, lockstep=True)
    with pytest.raises(ContractError, match=f"has {len(carried)} bytes"):
        decode_unroll([], message(), policy, lockstep=True)


def test_out_of_lockstep_it_has_no_place(policy: GraphPolicy) -> None:
    carried = np.ones((LANES, policy.state_size), dtype="<f4").tobytes()
    with pytest.raises(ContractError, match="frames"):
        decode_unroll([*unroll_of(policy), carried], message(), policy, lockstep=False)


def test_who_acted_is_who_acts_in_this_run(config: Config) -> None:
    assert admitted(message()).behaviour == "policy"
    assert admitted(message(behaviour="patient")).behaviour == "patient"
    with pytest.raises(ContractError, match="'patient' acted; in this run it is 'policy'"):
        check(message(behaviour="patient"), config, 9)
    imitating = make_config("environment.behaviour=patient")
    check(message(behaviour="patient"), imitating, 9)
    with pytest.raises(ContractError, match="'policy' acted; in this run it is 'patient'"):
        check(message(), imitating, 9)
