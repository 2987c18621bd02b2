"""The factored action: operation first, then its slot, then the other choices; masked, and causal.

    pi(a|x) = pi(op|x) · pi(slot|x, op) · prod_h pi(h|x, op, slot)     over the heads h that op makes relevant

An irrelevant head has no part in log-probability or entropy, and still returns a legal choice (the first one).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from esper_simic.actions import CHOICE_HEADS, CHOICES, HEADS, OP, RELEVANT_HEADS, SLOT, MaskLayout, Op
from esper_simic.errors import InvariantViolation
from esper_simic.policies.parts import HeadEvaluation, Latent
from esper_simic.policies.sampling import invert

MASKED_LOGIT: Final = -1e4
OP_EMBEDDING: Final = 16


class MaskedLogits(NamedTuple):
    """Logits `[N, choices]`, `MASKED_LOGIT` where a choice is illegal, and which are legal `[N, choices]` bool."""

    logits: Tensor
    legal: Tensor


class FactoredHeads(nn.Module):
    """Logits of the eight heads.

    Args:
        core: Width of the recurrent core's output.
        node: Width of a slot's vector.
        layout: Layout of the packed mask.
    """

    def __init__(self, core: int, node: int, layout: MaskLayout) -> None:
        super().__init__()
        self._layout = layout
        self.op = nn.Linear(core, len(Op))
        self.op_embedding = nn.Embedding(len(Op), OP_EMBEDDING)
        self.slot_from_core = nn.Linear(core + OP_EMBEDDING, node)
        self.slot_from_node = nn.Linear(node, node, bias=False)
        self.slot_out = nn.Linear(node, 1)
        self.choice_in = nn.Linear(core + node + OP_EMBEDDING, core)
        self.choice_out = nn.Linear(core, sum(CHOICES[head] for head in CHOICE_HEADS))
        relevance = torch.zeros(len(Op), len(HEADS), dtype=torch.bool)
        for op, heads in RELEVANT_HEADS.items():
            relevance[op, [HEADS.index(head) for head in heads]] = True
        self.register_buffer("relevance", relevance, persistent=False)

    @property
    def last_layers(self) -> frozenset[str]:
        """See `parts.Heads`."""
        return frozenset({"op.weight", "slot_out.weight", "choice_out.weight"})

    def sample(self, latent: Latent, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """See `parts.Heads`.

        Args:
            latent: N rows with their slots and masks.
            uniforms: `[N, heads]` float64 in [0, 1).

        Returns:
            Actions `[N, heads]` int64 and log-probabilities `[N]` over relevant heads.

        Raises:
            InvariantViolation: A state without any legal operation.
        """
        masked = {"op": self._op(latent)}
        op = invert(*masked["op"], uniforms[:, OP])
        masked["slot"] = self._slot(latent, op)
        slot = invert(*masked["slot"], uniforms[:, SLOT])
        masked |= self._choices(latent, op, slot)
        chosen = {"op": op}
        relevance = self._relevant(op)
        for head in ("slot", *CHOICE_HEADS):
            drawn = slot if head == "slot" else invert(*masked[head], uniforms[:, HEADS.index(head)])
            chosen[head] = torch.where(relevance[head], drawn, _first(masked[head].legal))
        log_probs = torch.zeros_like(latent.core[:, 0])
        for head in HEADS:
            taken = _taken(masked[head].logits.log_softmax(dim=-1), chosen[head])
            log_probs = log_probs + torch.where(relevance[head], taken, 0.0)
        return torch.stack([chosen[head] for head in HEADS], dim=-1), log_probs

    def evaluate(self, latent: Latent, actions: Tensor) -> HeadEvaluation:
        """See `parts.Heads`; actions `[N, heads]` int64.

        Raises:
            InvariantViolation: A state without any legal operation.
        """
        chosen = {head: actions[:, index] for index, head in enumerate(HEADS)}
        masked = {
            "op": self._op(latent),
            "slot": self._slot(latent, chosen["op"]),
        } | self._choices(latent, chosen["op"], chosen["slot"])
        return _evaluate(masked, chosen, self._relevant(chosen["op"]))

    def free(self, mask: Tensor) -> Tensor:
        """See `parts.Heads`: 1 where another operation than WAIT was legal."""
        return (mask[..., self._layout.op].sum(dim=-1) > 1).float()

    def _op(self, latent: Latent) -> MaskedLogits:
        legal = latent.mask[:, self._layout.op].bool()
        # A compiled graph would break here. What the learner evaluates was checked when it came (`check_growth_masks`).
        if not torch.compiler.is_compiling() and not bool(legal.any(dim=-1).all()):
            raise InvariantViolation("a state has no legal operation; WAIT must always be legal")
        return _mask(self.op(latent.core), legal)

    def _slot(self, latent: Latent, op: Tensor) -> MaskedLogits:
        context = self.slot_from_core(torch.cat([latent.core, self.op_embedding(op)], dim=-1))
        hidden = torch.relu(self.slot_from_node(latent.slots) + context.unsqueeze(1))
        legal = latent.mask[:, self._layout.op_slot].reshape(-1, len(Op), self._layout.slots)
        return _mask(self.slot_out(hidden).squeeze(-1), _rows(legal, op).bool())

    def _choices(self, latent: Latent, op: Tensor, slot: Tensor) -> dict[str, MaskedLogits]:
        seed = _rows(latent.slots, slot)
        hidden = torch.relu(self.choice_in(torch.cat([latent.core, seed, self.op_embedding(op)], dim=-1)))
        pieces = self.choice_out(hidden).split([CHOICES[head] for head in CHOICE_HEADS], dim=-1)
        return {
            head: _mask(piece, latent.mask[:, self._layout.choices(head)].bool())
            for head, piece in zip(CHOICE_HEADS, pieces, strict=True)
        }

    def _relevant(self, op: Tensor) -> dict[str, Tensor]:
        rows = self.get_buffer("relevance")[op]
        return {head: rows[:, index] for index, head in enumerate(HEADS)}


class FlatGrowthHeads(FactoredHeads):
    """`FactoredHeads` for a core that knows no slots of its own: their vectors are made of the core.

    Args:
        core: Width of the core's output.
        node: Width of a slot's vector.
        layout: Layout of the packed mask.
    """

    def __init__(self, core: int, node: int, layout: MaskLayout) -> None:
        super().__init__(core, node, layout)
        self._node = node
        self.slots = nn.Linear(core, layout.slots * node)

    def sample(self, latent: Latent, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """See `FactoredHeads.sample`."""
        return super().sample(self._with_slots(latent), uniforms)

    def evaluate(self, latent: Latent, actions: Tensor) -> HeadEvaluation:
        """See `FactoredHeads.evaluate`."""
        return super().evaluate(self._with_slots(latent), actions)

    def _with_slots(self, latent: Latent) -> Latent:
        slots = torch.relu(self.slots(latent.core)).reshape(-1, self._layout.slots, self._node)
        return latent._replace(slots=slots)


def _mask(logits: Tensor, legal: Tensor) -> MaskedLogits:
    return MaskedLogits(torch.where(legal, logits, MASKED_LOGIT), legal)


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Of each of N matrices `[N, rows, …]` the row that is named."""
    return tensor[torch.arange(len(index), device=index.device), index]


def _first(legal: Tensor) -> Tensor:
    return legal.int().argmax(dim=-1)


def _taken(all_log_probs: Tensor, chosen: Tensor) -> Tensor:
    return all_log_probs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


def _evaluate(
    masked: Mapping[str, MaskedLogits], chosen: Mapping[str, Tensor], relevance: dict[str, Tensor]
) -> HeadEvaluation:
    head_log_probs, head_entropies, available = {}, {}, {}
    nothing = torch.zeros_like(masked["op"].logits[:, 0])
    log_probs, entropy = nothing, nothing
    for head in HEADS:
        all_log_probs = masked[head].logits.log_softmax(dim=-1)
        legal = masked[head].legal.sum(dim=-1)
        several = legal > 1
        # Evaluated after the operation that was taken: where that has no use for the head, nobody acts by it.
        available[head] = relevance[head] & several
        scale = torch.where(several, legal, 2).to(all_log_probs.dtype).log()
        taken = _taken(all_log_probs, chosen[head])
        spread = -(all_log_probs.exp() * all_log_probs).sum(dim=-1) / scale
        head_log_probs[head], head_entropies[head] = taken, spread
        # where, not a product: an irrelevant head's choice may be one of probability 0.
        log_probs = log_probs + torch.where(relevance[head], taken, 0.0)
        entropy = entropy + torch.where(relevance[head], spread, 0.0)
    return HeadEvaluation(log_probs, entropy, head_log_probs, head_entropies, relevance, available)
