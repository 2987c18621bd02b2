"""From the graph of a growing host to one vector per graph and one per slot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch_geometric.nn import SAGEConv

from esper_simic.actions import BLUEPRINTS
from esper_simic.graphs import ObservationSpec, pack
from esper_simic.policies.parts import Encoded

BLUEPRINT_EMBEDDING: Final = 4


class GraphEncoder(nn.Module):
    """Message passing over host layers and slots, then a read-out.

    Host layers and slots get embeddings of their own kind; `layers` times, every node adds to itself what a SAGE
    convolution makes of its neighbours' mean (residual, LayerNorm); a graph is read out as the mean of its host layers,
    the mean of its slots and its global features.

    Args:
        spec: Shapes of one observation.
        node: Width of a node's vector.
        out: Width of a graph's vector.
        layers: Rounds of message passing.

    Source: Hamilton, Ying, Leskovec, Inductive Representation Learning on Large Graphs (2017).
    """

    def __init__(self, spec: ObservationSpec, node: int, out: int, layers: int) -> None:
        super().__init__()
        self._hosts = spec.host_nodes
        self.blueprints = nn.Embedding(len(BLUEPRINTS) + 1, BLUEPRINT_EMBEDDING)
        self.host_in = nn.Linear(spec.host_features, node)
        self.slot_in = nn.Linear(spec.slot_features + BLUEPRINT_EMBEDDING, node)
        self.convolutions = nn.ModuleList(SAGEConv(node, node, aggr="mean") for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(node) for _ in range(layers))
        self.read_out = nn.Sequential(
            nn.Linear(2 * node + spec.global_features, out), nn.LayerNorm(out), nn.ReLU()
        )

    def forward(self, observations: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> Encoded:
        """Encode N observations.

        Args:
            observations: `[N, …]`, for masks, attachments and blueprints.
            features: Normalised `host_nodes`, `slot_nodes`, `globals`, `[N, …]`.
        """
        packed = pack(observations)
        slots = torch.cat([features["slot_nodes"], self.blueprints(observations["slot_blueprint"])], dim=-1)
        nodes = torch.relu(torch.cat([self.host_in(features["host_nodes"]), self.slot_in(slots)], dim=1))
        shape = nodes.shape
        nodes = nodes.reshape(-1, shape[-1])
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            nodes = nodes + torch.relu(norm(convolution(nodes, packed.edge_index)))
        nodes = nodes.reshape(shape)
        mask = packed.node_mask.to(nodes.dtype)
        hosts, seeds = nodes[:, : self._hosts], nodes[:, self._hosts :]
        pooled = [
            _masked_mean(hosts, mask[:, : self._hosts]),
            _masked_mean(seeds, mask[:, self._hosts :]),
            features["globals"],
        ]
        inputs = torch.cat(pooled, dim=-1)
        return Encoded(self.read_out(inputs), seeds, inputs)


def _masked_mean(nodes: Tensor, mask: Tensor) -> Tensor:
    total = (nodes * mask.unsqueeze(-1)).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)
