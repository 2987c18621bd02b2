"""Spaces to vectors and back: every kind, every refusal."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from esper_simic.errors import ConfigError
from esper_simic.specs import Choices, Continuous
from esper_simic.worlds.spaces import ActionForm, ObservationForm

OBSERVATIONS = [
    (spaces.Box(-1, 1, (3,), dtype=np.float32), 3),
    (spaces.Box(-np.inf, np.inf, (2, 3), dtype=np.float64), 6),
    (spaces.Box(0, 255, (4, 4, 3), dtype=np.uint8), 48),
    (spaces.Box(0, 1, (), dtype=np.float32), 1),
    (spaces.Discrete(5), 5),
    (spaces.Discrete(4, start=-2), 4),
    (spaces.MultiDiscrete([2, 5, 3]), 10),
    (spaces.MultiDiscrete([2, 5], start=[10, -3]), 7),
    (spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])), 14),
    (spaces.MultiBinary(6), 6),
    (spaces.MultiBinary([2, 3]), 6),
]


@pytest.mark.parametrize(("space", "features"), OBSERVATIONS, ids=lambda value: str(value)[:40])
def test_vectors_are_what_gymnasium_flattens(space, features):
    form = ObservationForm(space, "it")
    space.seed(3)
    drawn = [space.sample() for _ in range(20)]
    vectors = form.vectors(np.stack([np.asarray(one) for one in drawn]))
    expected = np.stack([_flat(space, one) for one in drawn])
    assert form.features == features
    assert vectors.dtype == np.float32
    assert vectors.tobytes() == expected.astype(np.float32).tobytes()


def _flat(space, one):
    """Gymnasium flattens no `MultiDiscrete` of two dimensions."""
    if isinstance(space, spaces.MultiDiscrete):
        parts = [
            np.eye(size)[value - start]
            for size, value, start in zip(
                space.nvec.flat, np.asarray(one).flat, np.asarray(space.start).flat, strict=True
            )
        ]
        return np.concatenate(parts)
    return np.asarray(spaces.flatten(space, one))


def test_vectors_are_memory_of_their_own():
    observations = np.zeros((2, 3), dtype=np.float32)
    vectors = ObservationForm(spaces.Box(-1, 1, (3,)), "it").vectors(observations)
    vectors[:] = 1
    assert not observations.any()


@pytest.mark.parametrize(
    ("space", "says"),
    [
        (spaces.Dict({"a": spaces.Discrete(2)}), "Dict.*FlattenObservation"),
        (spaces.Tuple((spaces.Discrete(2), spaces.Discrete(3))), "Tuple.*FlattenObservation"),
        (spaces.Text(5), "Text.*FlattenObservation"),
        (spaces.Graph(spaces.Box(-1, 1, (3,)), None), "Graph.*FlattenObservation"),
        (spaces.Sequence(spaces.Discrete(2)), "Sequence.*FlattenObservation"),
        (spaces.Discrete(65_537), "65537 features.*wrapper"),
        (spaces.Box(0, 1, (300, 300, 3)), "270000 features"),
        (spaces.Box(0, 1, (0,)), "0 features"),
    ],
)
def test_observations_of_which_no_vector_is_made(space, says):
    with pytest.raises(ConfigError, match=says) as refused:
        ObservationForm(space, "some/Thing-v3")
    assert "some/Thing-v3" in str(refused.value)
    assert refused.value.key == "environment.id"


ACTIONS = [
    (spaces.Discrete(3), Choices(("action",), (3,))),
    (spaces.Discrete(3, start=-1), Choices(("action",), (3,))),
    (spaces.MultiDiscrete([2, 5]), Choices(("action_0", "action_1"), (2, 5))),
    (spaces.MultiDiscrete([2, 5], start=[1, -4]), Choices(("action_0", "action_1"), (2, 5))),
    (
        spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])),
        Choices(tuple(f"action_{i}" for i in range(4)), (2, 3, 4, 5)),
    ),
    (spaces.MultiBinary(3), Choices(tuple(f"action_{i}" for i in range(3)), (2, 2, 2))),
    (spaces.MultiBinary([2, 1]), Choices(("action_0", "action_1"), (2, 2))),
]


@pytest.mark.parametrize(("space", "spec"), ACTIONS, ids=lambda value: str(value)[:40])
def test_choices_reach_every_action_once(space, spec):
    form = ActionForm(space, "it")
    assert form.spec == spec
    grid = np.stack([axis.reshape(-1) for axis in np.indices(spec.sizes)], axis=1)
    native = form.native(grid)
    assert native.dtype == space.dtype
    assert all(space.contains(int(one) if isinstance(space, spaces.Discrete) else one) for one in native)
    assert len({one.tobytes() for one in native}) == np.prod(spec.sizes)
    assert np.array_equal(np.asarray(native[0]), np.broadcast_to(getattr(space, "start", 0), native[0].shape))


def test_numbers_are_mapped_onto_the_box():
    form = ActionForm(spaces.Box(np.array([-2, 0]), np.array([2, 10]), dtype=np.float32), "it")
    assert form.spec == Continuous((-2.0, 0.0), (2.0, 10.0))
    given_ = np.array([[0, 0], [-1, 1], [1, -1], [-7, 7], [0.5, -0.5]], dtype=np.float32)
    expected = [[0, 5], [-2, 10], [2, 0], [-2, 10], [1, 2.5]]
    assert form.native(given_).tolist() == expected


def test_numbers_without_ends_are_used_as_they_are():
    ends = np.array([[-np.inf, np.inf], [0, np.inf], [-3.4028235e38, 3.4028235e38], [-np.inf, 1], [-1, 1]])
    low, high = ends.astype(np.float32).T
    form = ActionForm(spaces.Box(low, high, dtype=np.float32), "it")
    native = form.native(np.array([[7, -7, 7, 7, 7], [-7, 7, -7, -7, -7]], dtype=np.float32))
    assert native.tolist() == [[7, 0, 7, 1, 1], [-7, 7, -7, -7, -1]]


@given(
    arrays(np.float32, (4, 6), elements=st.floats(width=32, allow_nan=False)),
    arrays(np.float64, (2, 3), elements=st.floats(-1e30, 1e30)),
    arrays(np.float64, (2, 3), elements=st.floats(0, 1e30)),
    st.sampled_from([np.float32, np.float64]),
)
def test_whatever_the_policy_says_the_box_takes_it(actions, low, width, dtype):
    space = spaces.Box(low.astype(dtype), (low + width).astype(dtype), dtype=dtype)
    form = ActionForm(space, "it")
    native = form.native(actions)
    assert native.shape == (4, 2, 3)
    assert all(space.contains(one) for one in native)


@pytest.mark.parametrize(
    ("space", "says"),
    [
        (spaces.Box(0, 255, (3,), dtype=np.uint8), "TransformAction"),
        (spaces.Box(0, 1, (0,)), "TransformAction"),
        (spaces.Tuple((spaces.Discrete(2),)), "Tuple.*TransformAction"),
        (spaces.Dict({"a": spaces.Discrete(2)}), "Dict.*TransformAction"),
        (spaces.Discrete(65_537), "65537 choices"),
    ],
)
def test_actions_that_no_policy_makes(space, says):
    with pytest.raises(ConfigError, match=says) as refused:
        ActionForm(space, "some/Thing-v3")
    assert refused.value.key == "environment.id"


def test_a_mask_stands_beside_the_vector():
    space = spaces.Dict(
        {
            "observation": spaces.MultiDiscrete([2, 3]),
            "action_mask": spaces.Box(0, 1, (2, 2), dtype=np.uint8),
        }
    )
    form = ObservationForm(space, "it")
    assert (form.features, form.mask_size) == (5, 4)
    observed = {
        "observation": np.array([[1, 2], [0, 0]]),
        "action_mask": np.array([[[1, 0], [1, 1]], [[0, 1], [0, 1]]], dtype=np.uint8),
    }
    vectors = form.vectors(observed)
    assert vectors.shape == (2, 9)
    named = form.named(vectors)
    assert named["vector"].tolist() == [[0, 1, 0, 0, 1], [1, 0, 1, 0, 0]]
    assert named["action_mask"].tolist() == [[1, 0, 1, 1], [0, 1, 0, 1]]
    assert named["action_mask"].dtype == np.int8
    plain = ObservationForm(spaces.Discrete(2), "it")
    assert plain.mask_size == 0
    assert set(plain.named(np.zeros((1, 2), dtype=np.float32))) == {"vector"}


def test_other_dictionaries_are_no_vectors():
    for keys in (["observation"], ["observation", "action_mask", "more"]):
        with pytest.raises(ConfigError, match="of which no vector is made"):
            ObservationForm(spaces.Dict({key: spaces.Discrete(2) for key in keys}), "it")
