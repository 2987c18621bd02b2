"""Trajectories on the wire, and the buffer against a list model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_simic.actions import head_sizes
from esper_simic.errors import BudgetExceeded, ContractError, InvariantViolation
from esper_simic.graphs import OBSERVATION_KEYS, ObservationSpec
from esper_simic.replay import GraphExperienceBuffer
from esper_simic.trajectory import Trajectory, decode, encode, frame_layout

SPEC = ObservationSpec(host_nodes=4, host_features=3, slots=3, slot_features=5, global_features=7)
T, STATE = 4, 6


def make(lanes: int, seed: int, mark: float = 0.0) -> Trajectory:
    """A random trajectory; `mark` + lane stands in every reward."""
    rng = np.random.default_rng(seed)
    named: dict[str, torch.Tensor] = {}
    for frame in frame_layout(SPEC, T, lanes, STATE):
        if frame.dtype.kind == "f":
            array = rng.normal(size=frame.shape).astype(frame.dtype)
        else:
            array = rng.integers(0, 2, size=frame.shape).astype(frame.dtype)
        named[frame.name] = torch.from_numpy(array)
    named["observations.action_mask"][:] = 1
    named["rewards"] = (mark + torch.arange(lanes, dtype=torch.float32)).expand(T, lanes).contiguous()
    return Trajectory.from_tensors(named)


def test_bytes_come_back_as_they_were() -> None:
    trajectory = make(5, seed=0)
    frames = encode(trajectory)
    back = decode([memoryview(frame) for frame in frames], SPEC, T, 5, STATE)
    assert encode(back) == frames
    for name, tensor in trajectory.tensors().items():
        assert torch.equal(back.tensors()[name], tensor), name
    assert (back.length, back.lanes) == (T, 5)


def test_decoded_tensors_own_their_memory() -> None:
    frames = [bytearray(frame) for frame in encode(make(2, seed=0))]
    back = decode(frames, SPEC, T, 2, STATE)
    before = back.rewards.clone()
    for frame in frames:
        frame[:] = bytes(len(frame))
    assert torch.equal(back.rewards, before)


def broken(name: str, value: float, dtype: str) -> list[bytes]:
    trajectory = make(2, seed=0)
    frames = encode(trajectory)
    index = list(trajectory.tensors()).index(name)
    array = np.frombuffer(frames[index], dtype=dtype).copy()
    array[-1] = value
    frames[index] = array.tobytes()
    return frames


@pytest.mark.parametrize(
    ("name", "value", "dtype", "says"),
    [
        ("rewards", np.nan, "<f4", "not finite"),
        ("observations.globals", np.inf, "<f4", "not finite"),
        ("ended", 7, "u1", "neither 0 nor 1"),
        ("observations.action_mask", 2, "i1", "outside"),
        ("observations.slot_host", 4, "<i8", "outside"),
        ("observations.slot_blueprint", 14, "<i8", "outside"),
        ("actions", 6, "<i8", "outside"),
        ("actions", -1, "<i8", "outside"),
    ],
)
def test_values_that_would_hurt_later_are_refused(name: str, value: float, dtype: str, says: str) -> None:
    with pytest.raises(ContractError, match=f"frame {name} .*{says}"):
        decode(broken(name, value, dtype), SPEC, T, 2, STATE)


@pytest.mark.parametrize(
    ("hidden", "says"),
    [
        (slice(0, 1), "forbids WAIT"),
        (slice(6 + 3, 6 + 6), "without a slot"),
        (slice(1, 2), "without its operation"),
        (SPEC.mask_layout.choices("blueprint"), "no legal choice of blueprint"),
    ],
)
def test_masks_that_would_stop_the_learner_are_refused(hidden: slice, says: str) -> None:
    trajectory = make(2, seed=0)
    trajectory.observations["action_mask"][1, 1, hidden] = 0
    with pytest.raises(ContractError, match=says):
        decode(encode(trajectory), SPEC, T, 2, STATE)


def test_the_last_choice_of_every_head_is_legal() -> None:
    trajectory = make(2, seed=0)
    trajectory.actions[:] = torch.tensor(head_sizes(3)) - 1
    assert torch.equal(decode(encode(trajectory), SPEC, T, 2, STATE).actions, trajectory.actions)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 14), st.integers(1, 9))
def test_truncated_frames_and_missing_frames_are_refused(index: int, cut: int) -> None:
    frames = encode(make(2, seed=0))
    with pytest.raises(ContractError, match="frames, this one has"):
        decode(frames[:index], SPEC, T, 2, STATE)
    frames[index] = frames[index][:-cut]
    with pytest.raises(ContractError, match="must have .* bytes"):
        decode(frames, SPEC, T, 2, STATE)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_buffer_holds_the_newest_and_gives_back_what_went_in(data: st.DataObject) -> None:
    capacity = data.draw(st.integers(4, 12))
    buffer = GraphExperienceBuffer(capacity, SPEC, T, STATE)
    model: list[tuple[float, int, int]] = []
    for position in range(data.draw(st.integers(1, 8))):
        lanes = data.draw(st.integers(1, 4))
        buffer.consume_all()
        given = buffer.insert(make(lanes, seed=position, mark=100.0 * position), position + 5, position * 3)
        assert given == range(len(model), len(model) + lanes)
        model += [(100.0 * position + lane, position + 5, position * 3) for lane in range(lanes)]
    held = model[-capacity:]
    assert len(buffer) == len(held)
    positions = list(dict.fromkeys(position for _, _, position in held))
    first = next(serial for serial, (_, _, position) in enumerate(model) if position == positions[0])
    assert buffer.addresses() == {"first_serial": first, "positions": positions}
    serials = np.arange(len(model) - len(held), len(model))
    gathered = buffer.gather(serials)
    assert gathered.rewards[0].tolist() == [mark for mark, _, _ in held]


def test_gathered_lane_equals_the_lane_that_was_inserted() -> None:
    buffer = GraphExperienceBuffer(8, SPEC, T, STATE)
    one, two = make(3, seed=1), make(3, seed=2)
    buffer.insert(one, 0, 0)
    buffer.insert(two, 0, 1)
    batch = buffer.gather(np.array([4, 0]))
    for key in OBSERVATION_KEYS:
        assert torch.equal(batch.observations[key][:, 0], two.observations[key][:, 1])
        assert torch.equal(batch.observations[key][:, 1], one.observations[key][:, 0])
    assert torch.equal(batch.initial_state, torch.stack([two.initial_state[1], one.initial_state[0]]))
    assert torch.equal(batch.episode_start[:, 0], two.episode_start[:, 1])


def test_sampling_takes_the_oldest_fresh_first_and_draws_others_without_repeats() -> None:
    buffer = GraphExperienceBuffer(16, SPEC, T, STATE)
    buffer.insert(make(8, seed=0), 3, 0)
    buffer.consume_all()
    buffer.insert(make(8, seed=1), 4, 1)
    sample = buffer.sample(8, 2, rng=np.random.default_rng(0))
    assert sample.serials[:2].tolist() == [8, 9]
    assert len(set(sample.serials.tolist())) == 8
    assert (buffer.consumed, buffer.fresh) == (10, 6)
    assert sample.versions.tolist() == [3 if serial < 8 else 4 for serial in sample.serials]


def test_every_other_experience_is_drawn_equally_often() -> None:
    counts = np.zeros(12)
    for seed in range(600):
        buffer = GraphExperienceBuffer(12, SPEC, T, STATE)
        buffer.insert(make(12, seed=0), 0, 0)
        buffer.sample(4, 4, rng=np.random.default_rng(0))
        counts += np.bincount(buffer.sample(8, 4, rng=np.random.default_rng(seed)).serials, minlength=12)
    assert (counts[4:8] == 600).all()
    others = np.delete(counts, slice(4, 8))
    assert others == pytest.approx(np.full(8, 300), rel=0.2)


def test_a_buffer_with_too_little_draws_with_repeats() -> None:
    buffer = GraphExperienceBuffer(16, SPEC, T, STATE)
    buffer.insert(make(3, seed=0), 0, 0)
    sample = buffer.sample(8, 2, rng=np.random.default_rng(0))
    assert len(sample.serials) == 8
    assert set(sample.serials.tolist()) <= {0, 1, 2}


def test_fresh_experience_is_never_overwritten() -> None:
    buffer = GraphExperienceBuffer(4, SPEC, T, STATE)
    buffer.insert(make(3, seed=0), 0, 0)
    with pytest.raises(BudgetExceeded, match=r"experience_buffer\.capacity"):
        buffer.insert(make(2, seed=1), 0, 1)
    assert buffer.inserted == 3


def test_asking_for_more_fresh_than_there_is_breaks_an_invariant() -> None:
    buffer = GraphExperienceBuffer(4, SPEC, T, STATE)
    buffer.insert(make(1, seed=0), 0, 0)
    with pytest.raises(InvariantViolation, match="only 1 are fresh"):
        buffer.sample(8, 2, rng=np.random.default_rng(0))


def test_memory_is_known_before_the_first_experience() -> None:
    buffer = GraphExperienceBuffer(10, SPEC, T, STATE)
    assert buffer.bytes == 10 * sum(frame.bytes for frame in frame_layout(SPEC, T, 1, STATE))
