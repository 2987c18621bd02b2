"""Graph observations: their fixed-size form, and packed batches of them.

One observation is the graph of a growing host: a node per host layer, a node per slot, data-flow edges from each host
layer to the next, attachment edges between a slot and the layer behind which it sits. Gymnasium cannot vectorise
graphs, so an observation travels as a mapping of padded arrays with node masks (`ObservationSpec`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

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
    | `host_mask` | `[host_nodes]` | int8 | 1 where a host layer exists; existing layers come first, in data-flow order |
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
