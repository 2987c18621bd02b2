"""Packed batches of graphs, against a loop over graphs and nodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper_simic.graphs import OBSERVATION_KEYS, pack, to_hetero_data
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
