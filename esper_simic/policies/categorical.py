"""Independent choices: one categorical distribution a head, `pi(a|x) = prod_h pi_h(a_h|x)`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from esper_simic.policies.parts import HeadEvaluation, Latent
from esper_simic.policies.sampling import invert_probabilities
from esper_simic.specs import Choices


class CategoricalHeads(nn.Module):
    """Logits of every head from one linear layer.

    Where the latent rows carry a mask (`[N, sum(sizes)]`, head after head), an illegal choice has probability 0,
    log-probability minus infinity and no gradient.

    Args:
        core: Width of the core's output.
        action: Heads and their sizes.
    """

    def __init__(self, core: int, action: Choices) -> None:
        super().__init__()
        self._names, self._sizes = action.heads, list(action.sizes)
        self.logits = nn.Linear(core, sum(action.sizes))

    @property
    def last_layers(self) -> frozenset[str]:
        """See `parts.Heads`."""
        return frozenset({"logits.weight"})

    def sample(self, latent: Latent, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """See `parts.Heads`; actions `[N, heads]` int64."""
        logits = self._logits(latent)
        if len(self._sizes) == 1:
            return _draw(logits, uniforms[:, 0])
        drawn = [
            _draw(piece, uniforms[:, index])
            for index, piece in enumerate(torch.split(logits, self._sizes, dim=-1))
        ]
        actions = torch.cat([action for action, _ in drawn], dim=-1)
        return actions, torch.stack([log_probs for _, log_probs in drawn]).sum(dim=0)

    def evaluate(self, latent: Latent, actions: Tensor) -> HeadEvaluation:
        """See `parts.Heads`; actions `[N, heads]` int64."""
        pieces = torch.split(self._logits(latent), self._sizes, dim=-1)
        head_log_probs, head_entropies, available = {}, {}, {}
        legal = self._legal(latent.mask)
        for index, (head, piece) in enumerate(zip(self._names, pieces, strict=True)):
            all_log_probs = piece.log_softmax(dim=-1)
            head_log_probs[head] = all_log_probs.gather(-1, actions[:, index : index + 1]).squeeze(-1)
            if legal is None:
                available[head] = piece.new_full((len(piece),), self._sizes[index] > 1, dtype=torch.bool)
                spread = -(all_log_probs.exp() * all_log_probs).sum(dim=-1)
                head_entropies[head] = spread / math.log(max(self._sizes[index], 2))
            else:
                count = legal[index].sum(dim=-1)
                available[head] = count > 1
                # 0 · -inf would be NaN, in the gradient too.
                finite = all_log_probs.masked_fill(~legal[index], 0.0)
                spread = -(all_log_probs.exp() * finite).sum(dim=-1)
                head_entropies[head] = spread / count.clamp(min=2).to(spread.dtype).log()
        always = torch.ones_like(next(iter(available.values())))
        return HeadEvaluation(
            _sum(head_log_probs),
            _sum(head_entropies),
            head_log_probs,
            head_entropies,
            dict.fromkeys(self._names, always),
            available,
        )

    def free(self, mask: Tensor) -> Tensor:
        """See `parts.Heads`: 1 where any head had more than one legal choice."""
        legal = self._legal(mask)
        if legal is None:
            return torch.full(mask.shape[:-1], float(max(self._sizes) > 1), device=mask.device)
        return torch.stack([piece.sum(dim=-1) > 1 for piece in legal]).any(dim=0).float()

    def _legal(self, mask: Tensor) -> tuple[Tensor, ...] | None:
        """Of each head `[…, choices]` bool; None where there is no mask."""
        return torch.split(mask.bool(), self._sizes, dim=-1) if mask.shape[-1] else None

    def _logits(self, latent: Latent) -> Tensor:
        logits: Tensor = self.logits(latent.core)
        return logits.masked_fill(~latent.mask.bool(), -math.inf) if latent.mask.shape[-1] else logits


def _draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """A choice `[N, 1]` and its log-probability `[N]`."""
    all_log_probs = logits.log_softmax(dim=-1)
    chosen = invert_probabilities(all_log_probs.exp(), uniforms).unsqueeze(-1)
    return chosen, all_log_probs.gather(-1, chosen).squeeze(-1)


def _sum(by_head: dict[str, Tensor]) -> Tensor:
    parts = tuple(by_head.values())
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)
