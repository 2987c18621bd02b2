"""Packed batches of graphs, against a loop over graphs and nodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper_simic.actions import CHOICE_HEADS, HEADS, Op, head_sizes
from esper_simic.errors import ContractError
from esper_simic.graphs import OBSERVATION_KEYS, FlatGrowthSpec, ObservationSpec, pack, to_hetero_data
from esper_simic.specs import Choices, ExperienceSpec, check_shapes
from tests.policies.synthetic import SPEC, observations

HOSTS, SLOTS = 4, 3


def literal_edges(host: list[int], slot: list[int], slot_host: list[int]) -> set[tuple[int, int]]:
    """Edges (source, target) of one graph whose slots are numbered after its host layers."""
    edges = set()
    for layer in range(len(host) - 1):
        if host[layer] and host[layer + 1]:
            edges |= {(layer, layer + 1), (layer + 1, layer)}
    for index, layer in enumerate(slot_host):
        if slot[index] and host[layer]:
            edges |= {(len(host) + index, layer), (layer, len(host) + index)}
    return edges


graphs = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=HOSTS, max_size=HOSTS),
        st.lists(st.integers(0, 1), min_size=SLOTS, max_size=SLOTS),
        st.lists(st.integers(0, HOSTS - 1), min_size=SLOTS, max_size=SLOTS),
    ),
    min_size=1,
    max_size=5,
)


@given(graphs)
def test_edges_equal_those_of_a_loop_over_graphs(drawn: list[tuple[list[int], list[int], list[int]]]) -> None:
    packed = pack(
        {
            "host_mask": torch.tensor([host for host, _, _ in drawn], dtype=torch.int8),
            "slot_mask": torch.tensor([slot for _, slot, _ in drawn], dtype=torch.int8),
            "slot_host": torch.tensor([slot_host for _, _, slot_host in drawn]),
        }
    )
    expected = {
        (index * (HOSTS + SLOTS) + source, index * (HOSTS + SLOTS) + target)
        for index, graph in enumerate(drawn)
        for source, target in literal_edges(*graph)
    }
    found = [(int(source), int(target)) for source, target in packed.edge_index.T]
    assert found == sorted(expected, key=lambda edge: (edge[1], edge[0]))
    assert packed.node_mask.tolist() == [[bool(bit) for bit in host + slot] for host, slot, _ in drawn]


def test_no_edge_touches_padding() -> None:
    seen = observations(np.random.default_rng(0), 50)
    packed = pack(seen)
    assert packed.node_mask.flatten()[packed.edge_index].all()
    assert not packed.node_mask.all()


def test_a_graph_of_one_layer_and_no_slot_has_no_edge() -> None:
    seen = {
        "host_mask": torch.tensor([[1, 0, 0]]),
        "slot_mask": torch.tensor([[0]]),
        "slot_host": torch.tensor([[0]]),
    }
    assert pack(seen).edge_index.shape == (2, 0)


@pytest.mark.parametrize("seed", range(20))
def test_hetero_data_has_the_edges_of_the_packed_graph(seed: int) -> None:
    seen = observations(np.random.default_rng(seed))
    data = to_hetero_data(seen)
    data.validate()
    layers, slots = torch.nonzero(seen["host_mask"]).flatten(), torch.nonzero(seen["slot_mask"]).flatten()

    def numbered(kind: tuple[str, str, str], sources: Tensor, targets: Tensor) -> set[tuple[int, int]]:
        pairs = data[kind].edge_index.T.tolist()
        return {(int(sources[source]), int(targets[target])) for source, target in pairs}

    seeds = slots + SPEC.host_nodes
    feeds = numbered(("host", "feeds", "host"), layers, layers)
    assert feeds == {(layer, layer + 1) for layer in range(len(layers) - 1)}
    found = feeds | {(target, source) for source, target in feeds}
    found |= numbered(("slot", "grafts", "host"), seeds, layers)
    found |= numbered(("host", "carries", "slot"), layers, seeds)
    packed = pack({key: seen[key].unsqueeze(0) for key in OBSERVATION_KEYS})
    assert found == {(int(source), int(target)) for source, target in packed.edge_index.T}
    assert torch.equal(data["host"].x, seen["host_nodes"][layers])
    assert torch.equal(data["slot"].x, seen["slot_nodes"][slots])
    assert torch.equal(data["slot"].blueprint, seen["slot_blueprint"][slots])
    assert torch.equal(data["global_features"], seen["globals"].unsqueeze(0))


def test_shapes_name_every_key_once_in_order() -> None:
    assert tuple(SPEC.shapes()) == OBSERVATION_KEYS
    seen = observations(np.random.default_rng(0), 2)
    for key, (shape, dtype) in SPEC.shapes().items():
        assert (tuple(seen[key].shape), str(seen[key].dtype)) == ((2, *shape), f"torch.{dtype}")


def test_a_slot_behind_a_layer_that_is_not_there_has_no_edge_in_either_view() -> None:
    seen = observations(np.random.default_rng(3))
    seen["host_mask"] = torch.tensor([1, 1, 0, 0, 0], dtype=torch.int8)
    seen["slot_mask"].fill_(1)
    seen["slot_host"] = torch.tensor([4, 1, 2])
    data = to_hetero_data(seen)
    data.validate()
    assert data["slot", "grafts", "host"].edge_index.tolist() == [[1], [1]]
    assert data["host", "carries", "slot"].edge_index.tolist() == [[1], [1]]
    packed = pack({key: seen[key].unsqueeze(0) for key in OBSERVATION_KEYS})
    assert packed.edge_index.T.tolist() == [[1, 0], [0, 1], [6, 1], [1, 6]]


def test_a_host_without_layers_is_a_graph_without_edges() -> None:
    seen = observations(np.random.default_rng(4))
    seen["host_mask"].zero_()
    data = to_hetero_data(seen)
    data.validate()
    assert data["host"].x.shape == (0, SPEC.host_features)
    assert data.num_edges == 0


# -- specs -------------------------------------------------------------------------------------------------------------

FLAT = FlatGrowthSpec(features=116, slots=3)


def flat(seed: int, *lead: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    graph = observations(rng, *lead)
    vector = torch.from_numpy(rng.normal(size=(*lead, FLAT.features)).astype(np.float32))
    return {"vector": vector, "slot_blueprint": graph["slot_blueprint"], "action_mask": graph["action_mask"]}


@pytest.mark.parametrize("spec", [SPEC, FLAT])
def test_the_action_is_the_eight_heads(spec: ObservationSpec | FlatGrowthSpec) -> None:
    assert spec.action == Choices(HEADS, head_sizes(3))
    assert spec.action.chance == len(HEADS)
    assert spec.mask_layout.slots == 3


@pytest.mark.parametrize("spec", [SPEC, FLAT])
def test_bounds_are_just_above_the_largest_index(spec: ExperienceSpec) -> None:
    seen = observations(np.random.default_rng(6), 300) | flat(6, 300)
    bounds = spec.bounds()
    assert set(bounds) == {key for key, (_, dtype) in spec.shapes().items() if dtype != "float32"}
    for key, bound in bounds.items():
        assert int(seen[key].max()) == int(bound) - 1, key


@pytest.mark.parametrize("key", OBSERVATION_KEYS)
def test_observations_of_another_shape_are_refused_by_key(key: str) -> None:
    seen = observations(np.random.default_rng(5), 2, 3)
    check_shapes(SPEC.shapes(), seen, (2, 3))
    with pytest.raises(ValueError, match=rf"^observations\.{key} must be \[2, 3, .*\], it is \[3, 2"):
        check_shapes(SPEC.shapes(), seen | {key: seen[key].transpose(0, 1)}, (2, 3))
    del seen[key]
    with pytest.raises(ValueError, match=f"^observations lack {key}$"):
        check_shapes(SPEC.shapes(), seen, (2, 3))


@pytest.mark.parametrize("spec", [SPEC, FLAT])
def test_masks_that_no_host_makes_are_refused(spec: ObservationSpec | FlatGrowthSpec) -> None:
    seen = observations(np.random.default_rng(7), 4, 5) | flat(7, 4, 5)
    spec.check(seen)
    layout, mask = spec.mask_layout, seen["action_mask"]

    def refused(says: str, change: slice | int, value: int) -> None:
        broken = mask.clone()
        broken[2, 3, change] = value
        with pytest.raises(ContractError, match=says):
            spec.check(seen | {"action_mask": broken})

    mask[2, 3] = 1
    refused("forbids WAIT", layout.op.start + Op.WAIT, 0)
    refused("without a slot for it, or a slot without its operation", layout.op.start + Op.PRUNE, 0)
    prune = layout.op_slot.start + Op.PRUNE * layout.slots
    refused("without a slot for it", slice(prune, prune + layout.slots), 0)
    for head in CHOICE_HEADS:
        refused(f"no legal choice of {head}$", layout.choices(head), 0)
    spec.check(seen)


def test_present_are_existing_layers_and_slots_with_a_seed() -> None:
    seen = observations(np.random.default_rng(8), 60)
    present = SPEC.present(seen)
    assert set(present) == {"host_nodes", "slot_nodes"}
    assert torch.equal(present["host_nodes"], seen["host_mask"].float())
    for row in range(60):
        for slot in range(SPEC.slots):
            there = bool(seen["slot_mask"][row, slot]) and int(seen["slot_blueprint"][row, slot]) < 13
            assert bool(present["slot_nodes"][row, slot]) == there
    assert FLAT.present(flat(8, 3)) == {}
