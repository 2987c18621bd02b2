"""Running normalisation, against NumPy's mean and variance of everything at once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_simic.actions import BLUEPRINTS
from esper_simic.policies.normaliser import CLIP, VARIANCE_MIN, RunningNormaliser
from tests.policies import vectors
from tests.policies.synthetic import SPEC, Observations, make_policy, observations

NODE_KEYS = ("host_nodes", "slot_nodes", "globals")


def rows(seen: Observations, key: str) -> np.ndarray:
    """The rows that stand for something, gathered one by one."""
    values = seen[key].double().numpy()
    if key == "globals":
        return values.reshape(-1, values.shape[-1])
    mask = seen["host_mask" if key == "host_nodes" else "slot_mask"].numpy() > 0
    if key == "slot_nodes":
        mask = mask & (seen["slot_blueprint"].numpy() != len(BLUEPRINTS))
    return np.array([values[index] for index in np.ndindex(mask.shape) if mask[index]]).reshape(
        -1, values.shape[-1]
    )


def part(seen: Observations, which: slice) -> Observations:
    return {key: tensor[which] for key, tensor in seen.items()}


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 30), max_size=6))
def test_any_split_gives_the_moments_of_all_rows(seed: int, cuts: list[int]) -> None:
    seen = observations(np.random.default_rng(seed), 30)
    for key in NODE_KEYS:
        seen[key] = seen[key] * 3 + 5
    normaliser = RunningNormaliser(SPEC)
    bounds = [0, *sorted(cuts), 30]
    for start, stop in itertools.pairwise(bounds):
        if start < stop:
            normaliser.update(part(seen, slice(start, stop)))
    state = normaliser.state_dict()
    for key in NODE_KEYS:
        expected = rows(seen, key)
        assert state[f"{key}_count"] == len(expected)
        assert state[f"{key}_mean"].numpy() == pytest.approx(expected.mean(axis=0), abs=1e-12)
        assert state[f"{key}_variance"].numpy() == pytest.approx(expected.var(axis=0), abs=1e-12)


def test_leading_dimensions_do_not_matter() -> None:
    seen = observations(np.random.default_rng(1), 4, 5)
    one, two = RunningNormaliser(SPEC), RunningNormaliser(SPEC)
    one.update(seen)
    two.update({key: tensor.flatten(0, 1) for key, tensor in seen.items()})
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def test_a_small_spread_on_a_large_mean_survives_many_merges() -> None:
    rng = np.random.default_rng(2)
    normaliser, seen = RunningNormaliser(SPEC), []
    for _ in range(200):
        one = observations(rng, 3)
        one["globals"] = one["globals"] * 0.5 + 1e4
        normaliser.update(one)
        seen.append(rows(one, "globals"))
    variance = normaliser.get_buffer("globals_variance").numpy()
    assert variance == pytest.approx(np.concatenate(seen).var(axis=0), rel=1e-6)


def test_absent_rows_come_out_as_zero_and_present_ones_normalised() -> None:
    seen = observations(np.random.default_rng(3), 40)
    # An environment leaves padding at zero; whatever stands there must not matter.
    seen["host_nodes"] = torch.where(seen["host_mask"].bool().unsqueeze(-1), seen["host_nodes"], 9.0)
    normaliser = RunningNormaliser(SPEC)
    normaliser.update(seen)
    found = normaliser(seen)
    present = {
        "host_nodes": seen["host_mask"].bool(),
        "slot_nodes": seen["slot_mask"].bool() & (seen["slot_blueprint"] != len(BLUEPRINTS)),
    }
    for key, mask in present.items():
        assert not found[key][~mask].any(), key
        expected = rows(seen, key)
        expected = (expected - expected.mean(axis=0)) / np.sqrt(
            np.maximum(expected.var(axis=0), VARIANCE_MIN)
        )
        assert found[key][mask].numpy() == pytest.approx(expected, abs=1e-5), key


def test_before_anything_was_seen_features_pass_through() -> None:
    seen = observations(np.random.default_rng(4), 3)
    found = RunningNormaliser(SPEC)(seen)
    assert torch.equal(found["globals"], seen["globals"])


def test_a_batch_in_which_every_slot_is_empty_changes_nothing_of_slots() -> None:
    seen = observations(np.random.default_rng(5), 6)
    seen["slot_blueprint"].fill_(len(BLUEPRINTS))
    normaliser = RunningNormaliser(SPEC)
    normaliser.update(seen)
    assert normaliser.get_buffer("slot_nodes_count") == 0
    assert torch.equal(normaliser.get_buffer("slot_nodes_variance"), torch.ones(6, dtype=torch.float64))
    assert normaliser.get_buffer("globals_count") == 6


def test_outliers_are_clipped_and_constant_features_do_not_explode() -> None:
    seen = observations(np.random.default_rng(6), 30)
    seen["globals"][:, 0] = 0.5
    normaliser = RunningNormaliser(SPEC)
    normaliser.update(seen)
    seen["globals"][0] = torch.tensor([0.6, 1e6, -1e6, 0.0])
    found = normaliser(seen)["globals"][0]
    assert found[0] == pytest.approx(0.1 / VARIANCE_MIN**0.5, rel=1e-4)
    assert (found[1], found[2]) == (CLIP, -CLIP)


def test_statistics_travel_with_the_weights() -> None:
    policy, other = make_policy(0), make_policy(1)
    seen = observations(np.random.default_rng(7), 8)
    policy.normaliser.update(seen)
    other.load_state_dict(policy.state_dict())
    for key, value in policy.normaliser(seen).items():
        assert torch.equal(other.normaliser(seen)[key], value), key
    assert other.normaliser.get_buffer("globals_count") == 8


def test_vectors_are_normalised_feature_by_feature_and_their_masks_are_not() -> None:
    for spec in (vectors.MASKED, vectors.FLAT):
        seen = vectors.observations(spec, np.random.default_rng(8), 6, 7)
        seen["vector"] = seen["vector"] * 3 + 5
        normaliser = RunningNormaliser(spec)
        normaliser.update(seen)
        assert set(normaliser.state_dict()) == {"vector_mean", "vector_variance", "vector_count"}
        assert normaliser.get_buffer("vector_count") == 42
        values = seen["vector"].double().numpy().reshape(42, -1)
        expected = (values - values.mean(axis=0)) / values.std(axis=0)
        found = normaliser(seen)
        assert set(found) == {"vector"}
        assert found["vector"].numpy().reshape(42, -1) == pytest.approx(expected, abs=1e-5)
