"""Actions of real numbers: a diagonal Gaussian whose deviations do not depend on the state.

    a = mu(x) + sigma · Phi^-1(u)
    log pi(a|x) = - sum_d [ ((a_d - mu_d) / sigma_d)^2 / 2 + log sigma_d + log(2 pi) / 2 ]

Legend: mu mean, sigma = exp(log_deviation), Phi the standard normal distribution function, u a uniform number.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor, nn

from esper_simic.policies.parts import HeadEvaluation, Latent
from esper_simic.policies.sampling import normal_quantiles
from esper_simic.specs import Continuous

HEAD: Final = "action"
LOG_DEVIATION_MIN: Final = -5.0
LOG_DEVIATION_MAX: Final = 2.0


class GaussianHeads(nn.Module):
    """Means from one linear layer; logarithms of deviations are parameters, 0 at first, kept in [-5, 2].

    Args:
        core: Width of the core's output.
        action: The action's dimensions.
    """

    def __init__(self, core: int, action: Continuous) -> None:
        super().__init__()
        dimensions = len(action.low)
        self.mean = nn.Linear(core, dimensions)
        self.log_deviation = nn.Parameter(torch.zeros(dimensions))

    @property
    def last_layers(self) -> frozenset[str]:
        """See `parts.Heads`."""
        return frozenset({"mean.weight"})

    def sample(self, latent: Latent, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """See `parts.Heads`; actions `[N, dimensions]`, in the dtype of the weights."""
        mean, log_deviation = self._moments(latent)
        actions = mean + log_deviation.exp() * normal_quantiles(uniforms).to(mean.dtype)
        return actions, _log_probs(actions, mean, log_deviation)

    def evaluate(self, latent: Latent, actions: Tensor) -> HeadEvaluation:
        """See `parts.Heads`; actions `[N, dimensions]`."""
        mean, log_deviation = self._moments(latent)
        log_probs = _log_probs(actions, mean, log_deviation)
        entropy = (log_deviation + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(len(actions))
        always = torch.ones_like(log_probs, dtype=torch.bool)
        return HeadEvaluation(
            log_probs, entropy, {HEAD: log_probs}, {HEAD: entropy}, {HEAD: always}, {HEAD: always}
        )

    def free(self, mask: Tensor) -> Tensor:
        """See `parts.Heads`: there always is a choice."""
        return torch.ones(mask.shape[:-1], device=mask.device)

    def _moments(self, latent: Latent) -> tuple[Tensor, Tensor]:
        return self.mean(latent.core), _Kept.apply(self.log_deviation)


def _log_probs(actions: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    standard = (actions - mean) * torch.exp(-log_deviation)
    constant = log_deviation + 0.5 * math.log(2 * math.pi)
    return -(0.5 * standard.square() + constant).sum(dim=-1)


class _Kept(torch.autograd.Function):
    """`clamp(x, LOG_DEVIATION_MIN, LOG_DEVIATION_MAX)` that lets a gradient through where descent leads back inside.

    A plain clamp has none outside, so a parameter that was once carried out (by momentum) would stay there for ever.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(LOG_DEVIATION_MIN, LOG_DEVIATION_MAX)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        (x,) = ctx.saved_tensors
        leads_further = ((x <= LOG_DEVIATION_MIN) & (gradient > 0)) | (
            (x >= LOG_DEVIATION_MAX) & (gradient < 0)
        )
        return gradient.masked_fill(leads_further, 0.0)
