"""Observations of growing hosts: graphs in their fixed-size form, packed batches of them, and flat vectors.

One observation is the graph of a growing host: a node per host layer, a node per slot, data-flow edges from each host
layer to the next, attachment edges between a slot and the layer behind which it sits. Gymnasium cannot vectorise
graphs, so an observation travels as a mapping of padded arrays with node masks (`ObservationSpec`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from esper_simic.actions import BLUEPRINTS, CHOICE_HEADS, HEADS, MaskLayout, Op, head_sizes
from esper_simic.errors import ContractError
from esper_simic.specs import Array, Choices

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
    def action(self) -> Choices:
        """The eight heads of growth control."""
        return growth_action(self.slots)

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

    def bounds(self) -> dict[str, Array]:
        """Exclusive upper bounds of arrays of indices and flags by key."""
        return {
            "host_mask": np.array(2),
            "slot_mask": np.array(2),
            "action_mask": np.array(2),
            "slot_host": np.array(self.host_nodes),
            "slot_blueprint": np.array(len(BLUEPRINTS) + 1),
        }

    def present(self, observations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Existing host layers `[…, host_nodes]` and slots that hold a seed `[…, slots]`: 1 there, else 0."""
        occupied = observations["slot_blueprint"] < len(BLUEPRINTS)
        return {
            "host_nodes": observations["host_mask"].to(observations["host_nodes"].dtype),
            "slot_nodes": (occupied & observations["slot_mask"].bool()).to(observations["slot_nodes"].dtype),
        }

    def check(self, observations: Mapping[str, Tensor]) -> None:
        """Refuse a packed mask that no environment makes: it would stop the learner in the middle of a step.

        Raises:
            ContractError: WAIT is illegal, an operation is legal without a slot for it (or the other way round), or a
                head has no legal choice.
        """
        check_growth_masks(observations["action_mask"], self.slots)


@dataclass(frozen=True, slots=True)
class FlatGrowthSpec:
    """Shapes of one flat observation of a growing host.

    | key | shape | dtype | meaning |
    |---|---|---|---|
    | `vector` | `[features]` | float32 | features of the host as a whole, then of each slot |
    | `slot_blueprint` | `[slots]` | int64 | index into `actions.BLUEPRINTS`; their number where empty |
    | `action_mask` | `[MaskLayout(slots).size]` | int8 | packed mask of legal choices |
    """

    features: int
    slots: int

    @property
    def action(self) -> Choices:
        """The eight heads of growth control."""
        return growth_action(self.slots)

    @property
    def mask_layout(self) -> MaskLayout:
        """Layout of `action_mask`."""
        return MaskLayout(self.slots)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype name of each key."""
        return {
            "vector": ((self.features,), "float32"),
            "slot_blueprint": ((self.slots,), "int64"),
            "action_mask": ((self.mask_layout.size,), "int8"),
        }

    def bounds(self) -> dict[str, Array]:
        """Exclusive upper bounds of arrays of indices and flags by key."""
        return {"slot_blueprint": np.array(len(BLUEPRINTS) + 1), "action_mask": np.array(2)}

    def present(self, observations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """There is no padding: an empty slot's features are zeros like any others."""
        return {}

    def check(self, observations: Mapping[str, Tensor]) -> None:
        """See `ObservationSpec.check`."""
        check_growth_masks(observations["action_mask"], self.slots)


def growth_action(slots: int) -> Choices:
    """The action of growth control for a host of so many slots."""
    return Choices(HEADS, head_sizes(slots))


def check_growth_masks(masks: Tensor, slots: int) -> None:
    """Refuse packed masks `[…, MaskLayout(slots).size]` that no growing host makes.

    Raises:
        ContractError: WAIT is illegal, an operation is legal without a slot for it (or the other way round), or a head
            has no legal choice.
    """
    layout = MaskLayout(slots)
    operations = masks[..., layout.op].bool()
    targets = masks[..., layout.op_slot].reshape(*masks.shape[:-1], len(Op), slots).bool()
    if not bool(operations[..., Op.WAIT].all()):
        raise ContractError("an action mask forbids WAIT, which is always legal")
    if not torch.equal(operations, targets.any(dim=-1)):
        raise ContractError(
            "an action mask allows an operation without a slot for it, or a slot without its operation"
        )
    for head in CHOICE_HEADS:
        if not bool(masks[..., layout.choices(head)].bool().any(dim=-1).all()):
            raise ContractError(f"an action mask leaves no legal choice of {head}")


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
    device = host.device
    offset = torch.arange(graphs, device=device).unsqueeze(1) * nodes
    upstream = (offset + torch.arange(hosts - 1, device=device)).reshape(-1)
    flows = upstream[(host[:, :-1] & host[:, 1:]).reshape(-1)]
    attached = (slot & host.gather(1, attached_to)).reshape(-1)
    seeds = (offset + hosts + torch.arange(slot.shape[1], device=device)).reshape(-1)[attached]
    layers = (offset + attached_to).reshape(-1)[attached]
    sources = torch.cat([flows, flows + 1, seeds, layers])
    targets = torch.cat([flows + 1, flows, layers, seeds])
    order = torch.argsort(targets * (graphs * nodes) + sources)
    return PackedGraphs(torch.stack([sources[order], targets[order]]), torch.cat([host, slot], dim=1))


def to_hetero_data(observation: Mapping[str, Tensor]) -> HeteroData:
    """One observation, without its padding, as a `HeteroData` with node types `host` and `slot`.

    Edge types: `(host, feeds, host)` along the data flow, `(slot, grafts, host)` and `(host, carries, slot)`; as in
    `pack`, a slot behind a layer that does not exist has no edge.

    Args:
        observation: Arrays of one observation, without leading dimensions.
    """
    host, slot = observation["host_mask"].bool(), observation["slot_mask"].bool()
    layers = int(host.sum())
    data = HeteroData()
    data["host"].x = observation["host_nodes"][host]
    data["slot"].x = observation["slot_nodes"][slot]
    data["slot"].blueprint = observation["slot_blueprint"][slot]
    data["global_features"] = observation["globals"].unsqueeze(0)
    chain = torch.arange(max(layers - 1, 0))
    data["host", "feeds", "host"].edge_index = torch.stack([chain, chain + 1])
    attached_to = observation["slot_host"][slot].long()
    grafts = torch.stack([torch.arange(len(attached_to)), attached_to])[:, host[attached_to]]
    data["slot", "grafts", "host"].edge_index = grafts
    data["host", "carries", "slot"].edge_index = grafts.flip(0)
    return data
