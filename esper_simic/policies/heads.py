"""The factored action: operation first, then its slot, then the other choices; masked, and causal.

    pi(a|x) = pi(op|x) · pi(slot|x, op) · prod_h pi(h|x, op, slot)     over the heads h that op makes relevant

An irrelevant head has no part in log-probability or entropy, and still returns a legal choice (the first one).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from esper_simic.actions import CHOICE_HEADS, CHOICES, HEADS, RELEVANT_HEADS, MaskLayout, Op
from esper_simic.errors import InvariantViolation

MASKED_LOGIT: Final = -1e4
OP_EMBEDDING: Final = 16


class HeadEvaluation(NamedTuple):
    """What actions were worth in log-probability, and how open the choice was; `[N]` each.

    Attributes:
        log_probs: Sum over relevant heads.
        entropy: Sum over relevant heads, each divided by the logarithm of its number of legal choices.
        head_log_probs: By head, whether it was relevant or not.
        head_entropies: By head, whether it was relevant or not; 0 where there is one legal choice.
    """

    log_probs: Tensor
    entropy: Tensor
    head_log_probs: dict[str, Tensor]
    head_entropies: dict[str, Tensor]


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

    def sample(
        self, core: Tensor, slots: Tensor, mask: Tensor, uniforms: Tensor
    ) -> tuple[Tensor, HeadEvaluation]:
        """Draw actions by inverting each head's distribution function.

        Args:
            core: `[N, core]`.
            slots: `[N, slots, node]`.
            mask: `[N, mask]`, packed.
            uniforms: `[N, heads]` float64 in [0, 1).

        Returns:
            Actions `[N, heads]` int64 and their evaluation.

        Raises:
            InvariantViolation: A state without any legal operation.
        """
        op_logits = self._op_logits(core, mask)
        op = invert(op_logits, uniforms[:, HEADS.index("op")])
        slot_logits = self._slot_logits(core, slots, mask, op)
        slot = invert(slot_logits, uniforms[:, HEADS.index("slot")])
        chosen = {"op": op, "slot": slot}
        logits = {"op": op_logits, "slot": slot_logits} | self._choice_logits(core, slots, mask, op, slot)
        relevance = self._relevant(op)
        for head in CHOICE_HEADS:
            drawn = invert(logits[head], uniforms[:, HEADS.index(head)])
            chosen[head] = torch.where(relevance[head], drawn, _first_legal(logits[head]))
        chosen["slot"] = torch.where(relevance["slot"], slot, _first_legal(slot_logits))
        actions = torch.stack([chosen[head] for head in HEADS], dim=-1)
        return actions, _evaluate(logits, chosen, relevance)

    def evaluate(self, core: Tensor, slots: Tensor, mask: Tensor, actions: Tensor) -> HeadEvaluation:
        """Log-probabilities and entropies of given actions; arguments as in `sample`, actions `[N, heads]`."""
        chosen = {head: actions[:, index] for index, head in enumerate(HEADS)}
        logits = {
            "op": self._op_logits(core, mask),
            "slot": self._slot_logits(core, slots, mask, chosen["op"]),
        } | self._choice_logits(core, slots, mask, chosen["op"], chosen["slot"])
        return _evaluate(logits, chosen, self._relevant(chosen["op"]))

    def _op_logits(self, core: Tensor, mask: Tensor) -> Tensor:
        legal = mask[:, self._layout.op].bool()
        if not bool(legal.any(dim=-1).all()):
            raise InvariantViolation("a state has no legal operation; WAIT must always be legal")
        return _mask(self.op(core), legal)

    def _slot_logits(self, core: Tensor, slots: Tensor, mask: Tensor, op: Tensor) -> Tensor:
        context = self.slot_from_core(torch.cat([core, self.op_embedding(op)], dim=-1))
        hidden = torch.relu(self.slot_from_node(slots) + context.unsqueeze(1))
        legal = mask[:, self._layout.op_slot].reshape(-1, len(Op), self._layout.slots)
        legal = legal[torch.arange(op.shape[0]), op].bool()
        return _mask(self.slot_out(hidden).squeeze(-1), legal)

    def _choice_logits(
        self, core: Tensor, slots: Tensor, mask: Tensor, op: Tensor, slot: Tensor
    ) -> dict[str, Tensor]:
        seed = slots[torch.arange(slot.shape[0]), slot]
        hidden = torch.relu(self.choice_in(torch.cat([core, seed, self.op_embedding(op)], dim=-1)))
        pieces = self.choice_out(hidden).split([CHOICES[head] for head in CHOICE_HEADS], dim=-1)
        return {
            head: _mask(piece, mask[:, self._layout.choices(head)].bool())
            for head, piece in zip(CHOICE_HEADS, pieces, strict=True)
        }

    def _relevant(self, op: Tensor) -> dict[str, Tensor]:
        rows = self.get_buffer("relevance")[op]
        return {head: rows[:, index] for index, head in enumerate(HEADS)}


def invert(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The choice at which the distribution function of softmax(logits) passes `uniforms`.

    Args:
        logits: `[N, choices]`; masked ones so low that their probability is exactly 0 in float64.
        uniforms: `[N]` float64 in [0, 1).

    Returns:
        `[N]` int64; never a choice of probability 0.
    """
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Rounding may carry u * total up to the total itself, which would point past the last choice.
    target = torch.minimum(uniforms.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return (cumulative <= target).sum(dim=-1)


def _mask(logits: Tensor, legal: Tensor) -> Tensor:
    return torch.where(legal, logits, MASKED_LOGIT)


def _first_legal(logits: Tensor) -> Tensor:
    return (logits > MASKED_LOGIT / 2).int().argmax(dim=-1)


def _evaluate(
    logits: Mapping[str, Tensor], chosen: Mapping[str, Tensor], relevance: Mapping[str, Tensor]
) -> HeadEvaluation:
    head_log_probs, head_entropies = {}, {}
    log_probs, entropy = torch.zeros_like(logits["op"][:, 0]), torch.zeros_like(logits["op"][:, 0])
    for head in HEADS:
        all_log_probs = logits[head].log_softmax(dim=-1)
        legal = (logits[head] > MASKED_LOGIT / 2).sum(dim=-1)
        scale = torch.where(legal > 1, legal, 2).to(all_log_probs.dtype).log()
        taken = all_log_probs.gather(-1, chosen[head].unsqueeze(-1)).squeeze(-1)
        spread = -(all_log_probs.exp() * all_log_probs).sum(dim=-1) / scale
        head_log_probs[head], head_entropies[head] = taken, spread
        # where, not a product: an irrelevant head's choice may be one of probability 0.
        log_probs = log_probs + torch.where(relevance[head], taken, 0.0)
        entropy = entropy + torch.where(relevance[head], spread, 0.0)
    return HeadEvaluation(log_probs, entropy, head_log_probs, head_entropies)
