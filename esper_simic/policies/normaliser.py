"""Running normalisation of observations; a part of the policy, so it travels with the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from esper_simic.specs import ExperienceSpec

CLIP: Final = 10.0
VARIANCE_MIN: Final = 1e-2
"""Floor of the variance: a flag that is nearly always 0 must not become a shock of 10 when it first is 1."""


class RunningNormaliser(nn.Module):
    """Mean and variance of every feature over all that was seen; `clamp((x - mean) / deviation, ±10)`.

    Rows that stand for nothing (padding, empty slots; `ExperienceSpec.present`) neither count nor come out as anything
    but zero. Statistics are kept in float64 and merged batch by batch, so any split of the data gives the same result
    up to rounding.

    Args:
        spec: Shapes of one observation; its arrays of float32 are normalised, feature by feature of the last axis.

    Source: Chan, Golub, LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (1979).
    """

    def __init__(self, spec: ExperienceSpec) -> None:
        super().__init__()
        self._spec = spec
        self.keys = number_keys(spec)
        for key in self.keys:
            size = spec.shapes()[key][0][-1]
            self.register_buffer(f"{key}_mean", torch.zeros(size, dtype=torch.float64))
            self.register_buffer(f"{key}_variance", torch.ones(size, dtype=torch.float64))
            self.register_buffer(f"{key}_count", torch.zeros((), dtype=torch.float64))

    def forward(self, observations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Normalised features under `keys`, shapes unchanged."""
        present = self._spec.present(observations)
        normalised = {}
        for key in self.keys:
            values = observations[key]
            mean = self._buffer(key, "mean").to(values.dtype)
            deviation = self._buffer(key, "variance").clamp(min=VARIANCE_MIN).sqrt().to(values.dtype)
            scaled = ((values - mean) / deviation).clamp(-CLIP, CLIP)
            normalised[key] = scaled * present[key].unsqueeze(-1) if key in present else scaled
        return normalised

    @torch.no_grad()
    def update(self, observations: Mapping[str, Tensor]) -> None:
        """Merge the rows of these observations, which may have any leading dimensions."""
        present = self._spec.present(observations)
        for key in self.keys:
            values = observations[key].to(torch.float64)
            rows = values[present[key].bool()] if key in present else values.reshape(-1, values.shape[-1])
            if rows.shape[0]:
                self._merge(key, rows)

    def _merge(self, key: str, rows: Tensor) -> None:
        mean, variance, count = (self._buffer(key, name) for name in ("mean", "variance", "count"))
        added = rows.shape[0]
        total = count + added
        delta = rows.mean(dim=0) - mean
        squares = (
            variance * count + rows.var(dim=0, correction=0) * added + delta.square() * count * added / total
        )
        mean.add_(delta * added / total)
        variance.copy_(squares / total)
        count.copy_(total)

    def _buffer(self, key: str, name: str) -> Tensor:
        return self.get_buffer(f"{key}_{name}")


class AsTheyAre(nn.Module):
    """No normalisation: numbers pass as the environment gave them, and there is nothing to learn.

    Args:
        spec: Shapes of one observation.
    """

    def __init__(self, spec: ExperienceSpec) -> None:
        super().__init__()
        self.keys = number_keys(spec)

    def forward(self, observations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The arrays of numbers."""
        return {key: observations[key] for key in self.keys}

    def update(self, observations: Mapping[str, Tensor]) -> None:
        """See `parts.Normaliser`."""


def number_keys(spec: ExperienceSpec) -> tuple[str, ...]:
    """Keys of a spec's arrays of numbers, in its order."""
    return tuple(key for key, (_, dtype) in spec.shapes().items() if dtype == "float32")
