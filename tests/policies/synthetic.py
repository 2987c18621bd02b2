"""Random but valid observations and trajectories of a host that nobody has to train."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from esper_simic.actions import BLUEPRINTS, CHOICE_HEADS, CHOICES, HEADS, MaskLayout, Op, head_sizes
from esper_simic.config import TrainerConfig
from esper_simic.graphs import ObservationSpec
from esper_simic.policies.graph_policy import GraphPolicy
from esper_simic.trajectory import Trajectory

SPEC = ObservationSpec(host_nodes=5, host_features=3, slots=3, slot_features=6, global_features=4)
CONFIG = TrainerConfig(hidden_size=16, graph_layers=2)

Observations = dict[str, Tensor]


def make_policy(seed: int = 0, config: TrainerConfig = CONFIG, *, scale: float = 1.0) -> GraphPolicy:
    """A policy; with `scale` its heads' last layers are enlarged, so that it is far from uniform."""
    policy = GraphPolicy(SPEC, config, np.random.default_rng(seed))
    with torch.no_grad():
        for layer in (policy.heads.op, policy.heads.slot_out, policy.heads.choice_out):
            layer.weight.mul_(scale)
    return policy


def observations(rng: np.random.Generator, *lead: int, spec: ObservationSpec = SPEC) -> Observations:
    """Observations `[*lead, …]`: hosts of any depth, slots of any kind, masks in which WAIT is always legal."""
    count = int(np.prod(lead))
    layers = rng.integers(1, spec.host_nodes + 1, size=count)
    slot_mask = rng.random((count, spec.slots)) < 0.8
    occupied = slot_mask & (rng.random((count, spec.slots)) < 0.7)
    # What stands behind a slot that is not there must not matter, so it is not empty.
    blueprint = np.where(
        occupied | ~slot_mask, rng.integers(0, len(BLUEPRINTS), slot_mask.shape), len(BLUEPRINTS)
    )
    host_mask = np.arange(spec.host_nodes) < layers[:, None]
    host_nodes = rng.normal(size=(count, spec.host_nodes, spec.host_features))
    slot_nodes = rng.normal(size=(count, spec.slots, spec.slot_features))
    arrays: dict[str, np.ndarray] = {
        "host_nodes": (host_nodes * host_mask[..., None]).astype(np.float32),
        "host_mask": host_mask.astype(np.int8),
        "slot_nodes": (slot_nodes * occupied[..., None]).astype(np.float32),
        "slot_mask": slot_mask.astype(np.int8),
        "slot_host": rng.integers(0, layers[:, None], size=(count, spec.slots)),
        "slot_blueprint": blueprint,
        "globals": rng.normal(size=(count, spec.global_features)).astype(np.float32),
        "action_mask": packed_masks(rng, slot_mask, spec.mask_layout),
    }
    return {key: torch.from_numpy(array).reshape(*lead, *array.shape[1:]) for key, array in arrays.items()}


def packed_masks(rng: np.random.Generator, slot_mask: np.ndarray, layout: MaskLayout) -> np.ndarray:
    """`[count, M]` masks: any existing slots for each operation, a choice at least of each other head, WAIT always."""
    count = len(slot_mask)
    masks = np.zeros((count, layout.size), dtype=np.int8)
    op_slot = (rng.random((count, len(Op), layout.slots)) < 0.4) & slot_mask[:, None]
    op_slot[:, Op.WAIT] = True
    masks[:, layout.op] = op_slot.any(axis=2)
    masks[:, layout.op_slot] = op_slot.reshape(count, -1)
    for head in CHOICE_HEADS:
        legal = rng.random((count, CHOICES[head])) < 0.6
        legal[np.arange(count), rng.integers(0, CHOICES[head], count)] = True
        masks[:, layout.choices(head)] = legal
    return masks


def uniforms(rng: np.random.Generator, *lead: int) -> Tensor:
    """Chance `[*lead, heads]` of actions."""
    return torch.from_numpy(rng.random((*lead, len(HEADS))))


def legal_choices(mask: Tensor, op: int, layout: MaskLayout = SPEC.mask_layout) -> dict[str, list[int]]:
    """The legal choices of each head in one state, after this operation."""
    slots = mask[layout.op_slot].reshape(len(Op), layout.slots)[op]
    found = {"op": mask[layout.op], "slot": slots}
    found |= {head: mask[layout.choices(head)] for head in CHOICE_HEADS}
    return {head: torch.nonzero(row).flatten().tolist() for head, row in found.items()}


def trajectory(
    policy: GraphPolicy,
    seed: int,
    length: int,
    lanes: int,
    *,
    ends: float = 0.15,
    spec: ObservationSpec = SPEC,
) -> Trajectory:
    """What `policy` does in random states, with random rewards and episodes; some of them are cut from outside."""
    rng = np.random.default_rng(seed)
    seen = observations(rng, length + 1, lanes, spec=spec)
    ended = torch.from_numpy(rng.random((length, lanes)) < ends)
    cut = ended & torch.from_numpy(rng.random((length, lanes)) < 0.5)
    start = torch.cat([torch.from_numpy(rng.random((1, lanes)) < 0.3), ended])
    initial_state = torch.from_numpy(rng.normal(size=(lanes, policy.state_size)).astype(np.float32))
    actions, log_probs, state = [], [], initial_state
    for t in range(length):
        row = {key: tensor[t] for key, tensor in seen.items()}
        decision = policy.act(row, start[t], state, uniforms(rng, lanes))
        actions.append(decision.actions)
        log_probs.append(decision.log_probs)
        state = decision.state
    return Trajectory(
        observations=seen,
        episode_start=start,
        initial_state=initial_state,
        actions=torch.stack(actions),
        behaviour_log_probs=torch.stack(log_probs),
        rewards=torch.from_numpy(rng.normal(size=(length, lanes)).astype(np.float32)),
        ended=ended,
        truncation_values=cut * torch.from_numpy(rng.normal(size=(length, lanes)).astype(np.float32)),
    )


def is_in_range(actions: Tensor, spec: ObservationSpec = SPEC) -> bool:
    """Whether every choice exists."""
    return bool(((actions >= 0) & (actions < torch.tensor(head_sizes(spec.slots)))).all())
