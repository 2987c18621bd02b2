"""Initial weights, drawn from a generator that is handed in."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import nn


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Make layers in it: torch draws their weights from its global generator, which is put back at the end."""
    with torch.random.fork_rng(devices=[]):
        yield


@torch.no_grad()
def initialise(
    module: nn.Module, rng: np.random.Generator, *, small: Collection[str] = (), unit: Collection[str] = ()
) -> None:
    """Orthogonal matrices, vectors of zeros; LayerNorm stays as it is.

    Args:
        module: Its matrices are drawn one after the other in the order of `named_parameters`.
        rng: All of the chance.
        small: Names of parameters with gain 0.01: last layers of a policy.
        unit: Names of parameters with gain 1: last layers of a value. All others have √2.

    Source: Andrychowicz et al., What Matters for On-Policy Deep Actor-Critic Methods? (2021).
    """
    for name, parameter in module.named_parameters():
        if "norm" in name or isinstance(module.get_submodule(name.rpartition(".")[0]), nn.LayerNorm):
            continue
        if parameter.dim() < 2:
            parameter.zero_()
        else:
            gains = dict.fromkeys(unit, 1.0) | dict.fromkeys(small, 0.01)
            gain = gains.get(name, math.sqrt(2))
            parameter.copy_(torch.from_numpy(orthogonal(parameter.shape, gain, rng)))


def orthogonal(shape: torch.Size, gain: float, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """A matrix with orthonormal rows or columns, times gain.

    Source: Saxe, McClelland, Ganguli, Exact solutions to the nonlinear dynamics of learning (2014).
    """
    rows, columns = shape[0], math.prod(shape[1:])
    drawn = rng.normal(size=(max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(drawn)
    q = q * np.sign(np.diag(r))
    matrix = q if rows >= columns else q.T
    return (gain * matrix).reshape(shape).astype(np.float32)
