"""Graph observations: their fixed-size form, and packed batches of them.

One observation is the graph of a growing host: a node per host layer, a node per slot, data-flow edges from each host
layer to the next, attachment edges between a slot and the layer behind which it sits. Gymnasium cannot vectorise
graphs, so an observation travels as a mapping of padded arrays with node masks (`ObservationSpec`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from esper_simic.actions import MaskLayout

OBSERVATION_KEYS: Final = (
    "host_nodes",
    "host_mask",
    "slot_nodes",
    "slot_mask",
    "slot_host",
    "slot_blueprint",
    "globals",
    "action_mask",
)


@dataclass(frozen=True, slots=True)
class ObservationSpec:
    """Shapes of one observation; every array may carry leading dimensions such as `[T, B]`.

    | key | shape | dtype | meaning |
    |---|---|---|---|
    | `host_nodes` | `[host_nodes, host_features]` | float32 | features of host layers |
    | `host_mask` | `[host_nodes]` | int8 | 1 where a layer exists; existing ones come first, in data-flow order |
    | `slot_nodes` | `[slots, slot_features]` | float32 | features of slots; an empty slot is all zero |
    | `slot_mask` | `[slots]` | int8 | 1 where the slot exists |
    | `slot_host` | `[slots]` | int64 | index of the host layer a slot is attached to |
    | `slot_blueprint` | `[slots]` | int64 | index into `actions.BLUEPRINTS`; their number where empty |
    | `globals` | `[global_features]` | float32 | features of the host as a whole |
    | `action_mask` | `[MaskLayout(slots).size]` | int8 | packed mask of legal choices |
    """

    host_nodes: int
    host_features: int
    slots: int
    slot_features: int
    global_features: int

    @property
    def mask_layout(self) -> MaskLayout:
        """Layout of `action_mask`."""
        return MaskLayout(self.slots)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype name of each key, in `OBSERVATION_KEYS` order."""
        return {
            "host_nodes": ((self.host_nodes, self.host_features), "float32"),
            "host_mask": ((self.host_nodes,), "int8"),
            "slot_nodes": ((self.slots, self.slot_features), "float32"),
            "slot_mask": ((self.slots,), "int8"),
            "slot_host": ((self.slots,), "int64"),
            "slot_blueprint": ((self.slots,), "int64"),
            "globals": ((self.global_features,), "float32"),
            "action_mask": ((self.mask_layout.size,), "int8"),
        }


@dataclass(frozen=True, slots=True)
class PackedGraphs:
    """N graphs as one: node `g * (host_nodes + slots) + i` is the i-th node of graph g, host layers before slots.

    Attributes:
        edge_index: `[2, edges]` int64, sources and targets, ordered by target and then by source, so that sums over
            neighbours are made in one fixed order.
        node_mask: `[N, host_nodes + slots]` bool; false for padding, which no edge touches.
    """

    edge_index: Tensor
    node_mask: Tensor


def pack(observations: Mapping[str, Tensor]) -> PackedGraphs:
    """Build the edges of N observations at once.

    Data flow: each existing host layer and the next, both ways. Attachment: each existing slot and the host layer
    behind which it sits, both ways.

    Args:
        observations: `host_mask` `[N, H]`, `slot_mask` `[N, S]`, `slot_host` `[N, S]`.
    """
    host, slot = observations["host_mask"].bool(), observations["slot_mask"].bool()
    attached_to = observations["slot_host"].long()
    graphs, hosts = host.shape
    nodes = hosts + slot.shape[1]
    offset = torch.arange(graphs).unsqueeze(1) * nodes
    upstream = (offset + torch.arange(hosts - 1)).reshape(-1)
    flows = upstream[(host[:, :-1] & host[:, 1:]).reshape(-1)]
    attached = (slot & host.gather(1, attached_to)).reshape(-1)
    seeds = (offset + hosts + torch.arange(slot.shape[1])).reshape(-1)[attached]
    layers = (offset + attached_to).reshape(-1)[attached]
    sources = torch.cat([flows, flows + 1, seeds, layers])
    targets = torch.cat([flows + 1, flows, layers, seeds])
    order = torch.argsort(targets * (graphs * nodes) + sources)
    return PackedGraphs(torch.stack([sources[order], targets[order]]), torch.cat([host, slot], dim=1))


def to_hetero_data(observation: Mapping[str, Tensor]) -> HeteroData:
    """One observation, without its padding, as a `HeteroData` with node types `host` and `slot`.

    Edge types: `(host, feeds, host)` along the data flow, `(slot, grafts, host)` and `(host, carries, slot)`.
    """
    host, slot = observation["host_mask"].bool(), observation["slot_mask"].bool()
    layers = int(host.sum())
    data = HeteroData()
    data["host"].x = observation["host_nodes"][host]
    data["slot"].x = observation["slot_nodes"][slot]
    data["slot"].blueprint = observation["slot_blueprint"][slot]
    data["global_features"] = observation["globals"].unsqueeze(0)
    chain = torch.arange(layers - 1)
    data["host", "feeds", "host"].edge_index = torch.stack([chain, chain + 1])
    grafts = torch.stack([torch.arange(int(slot.sum())), observation["slot_host"][slot].long()])
    data["slot", "grafts", "host"].edge_index = grafts
    data["host", "carries", "slot"].edge_index = grafts.flip(0)
    return data
