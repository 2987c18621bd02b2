"""What differs between what was recorded and what was computed again, and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec
import torch
from torch import Tensor

METRIC_TOLERANCE: Final = 1e-3
"""Under another fingerprint: a metric may differ by this part of itself ..."""

METRIC_FLOOR: Final = 1e-4
"""... or by so much, whatever it is: losses and divergences pass through 0."""

TENSOR_TOLERANCE: Final = 1e-3
"""Under another fingerprint: an element may differ by this part of the largest one of its kind (weights, first moments,
second moments). Not of its own tensor: where a gradient is 0 but for rounding, all of a tensor is rounding."""


class MetricDifference(msgspec.Struct, frozen=True):
    """One metric, recorded and computed; None where one side does not have it."""

    name: str
    recorded: float | None
    computed: float | None
    relative: float
    """Difference over the larger of the two; infinite where one is missing or not finite."""


class TensorDifference(msgspec.Struct, frozen=True):
    """One tensor of a state of which not every bit is equal."""

    name: str
    shape: list[int]
    elements: int
    elements_differing: int
    max_abs: float
    """Largest difference of two elements; infinite where a number stands against none."""
    max_relative: float
    """Largest difference of two elements over the larger of them."""
    of_kind: float
    """`max_abs` over the largest element of all recorded tensors of its kind."""
    reason: str = ""
    """Why they cannot be compared by elements: missing, another shape or type."""


class ValueDifference(msgspec.Struct, frozen=True):
    """One number of a state that is not equal, by its path."""

    path: str
    recorded: Any
    computed: Any


def fingerprint_differences(recorded: Mapping[str, str], here: Mapping[str, str]) -> dict[str, list[str]]:
    """Keys of two fingerprints that are not equal: `[recorded, here]`; empty for a missing one."""
    return {
        key: [recorded.get(key, ""), here.get(key, "")]
        for key in sorted(recorded.keys() | here.keys())
        if recorded.get(key) != here.get(key)
    }


def relative_difference(a: float, b: float) -> float:
    """|a - b| / max(|a|, |b|); 0 for equal ones, not-a-number included, infinite where only one is finite."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def metric_differences(
    recorded: Mapping[str, float], computed: Mapping[str, float], *, is_within_tolerance: bool = False
) -> list[MetricDifference]:
    """The metrics that are not equal.

    Args:
        recorded: As journaled.
        computed: As computed again.
        is_within_tolerance: Whether those that differ by no more than the tolerance count as equal.
    """
    found = []
    for name in sorted(recorded.keys() | computed.keys()):
        a, b = recorded.get(name), computed.get(name)
        relative = math.inf if a is None or b is None else relative_difference(a, b)
        if relative == 0.0:
            continue
        if is_within_tolerance and a is not None and b is not None and _is_near(a, b, relative):
            continue
        found.append(MetricDifference(name, a, b, relative))
    return found


def is_next_to_nothing(difference: MetricDifference) -> bool:
    """Whether two values differ by no more than what is allowed to any, whatever it is of them."""
    a, b = difference.recorded, difference.computed
    return a is not None and b is not None and abs(a - b) <= METRIC_FLOOR


def _is_near(a: float, b: float, relative: float) -> bool:
    return relative <= METRIC_TOLERANCE or abs(a - b) <= METRIC_FLOOR


def tensor_differences(
    recorded: Mapping[str, Tensor], computed: Mapping[str, Tensor]
) -> list[TensorDifference]:
    """The tensors of two states that are not equal to the bit, in the order of their names."""
    found = []
    largest = _largest(recorded)
    for name in sorted(recorded.keys() | computed.keys()):
        if name not in recorded or name not in computed:
            present = recorded.get(name, computed.get(name))
            reason = "only in the checkpoint" if name in recorded else "not in the checkpoint"
            found.append(_incomparable(name, present, reason))
            continue
        a, b = recorded[name], computed[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            reason = f"{tuple(b.shape)} {b.dtype} was computed, {tuple(a.shape)} {a.dtype} recorded"
            found.append(_incomparable(name, a, reason))
        elif not _bits(a).equal(_bits(b)):
            found.append(_difference(name, a, b, largest[_kind(name)]))
    return found


def is_tensor_near(difference: TensorDifference) -> bool:
    """Whether a difference is within the tolerance that another fingerprint is allowed."""
    return not difference.reason and difference.of_kind <= TENSOR_TOLERANCE


def _kind(name: str) -> str:
    """Tensors of one kind have one scale; a statistic of the normaliser is a kind of its own."""
    if name.startswith("optimizer."):
        return name.rpartition(".")[2]
    return name if "normaliser" in name else name.partition(".")[0]


def _largest(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    largest: dict[str, float] = {}
    for name, tensor in tensors.items():
        found = float(tensor.detach().double().abs().max()) if tensor.numel() else 0.0
        largest[_kind(name)] = max(largest.get(_kind(name), 0.0), found)
    return largest


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _incomparable(name: str, tensor: Tensor | None, reason: str) -> TensorDifference:
    shape = [] if tensor is None else list(tensor.shape)
    elements = math.prod(shape)
    return TensorDifference(name, shape, elements, elements, math.inf, math.inf, math.inf, reason)


def _difference(name: str, recorded: Tensor, computed: Tensor, largest: float) -> TensorDifference:
    a, b = recorded.detach().double().reshape(-1), computed.detach().double().reshape(-1)
    differs = (_bits(recorded) != _bits(computed)).reshape(a.numel(), -1).any(dim=1)
    gap = torch.where(a == b, 0.0, (a - b).abs())
    gap = torch.where(gap.isfinite(), gap, math.inf)  # a number against none
    gap = torch.where(a.isnan() & b.isnan(), 0.0, gap)
    larger = torch.maximum(a.abs(), b.abs())
    relative = torch.where(gap == 0.0, 0.0, torch.where(gap.isfinite(), gap / larger, math.inf))
    max_abs = float(gap.max())
    of_kind = 0.0
    if max_abs > 0.0:
        of_kind = max_abs / largest if largest > 0.0 else math.inf
    return TensorDifference(
        name=name,
        shape=list(recorded.shape),
        elements=a.numel(),
        elements_differing=int(differs.sum()),
        max_abs=max_abs,
        max_relative=float(relative.max()),
        of_kind=of_kind,
    )


def is_value_near(difference: ValueDifference) -> bool:
    """Whether a difference is one of rounding: two numbers with a fraction, within the tolerance of metrics."""
    a, b = difference.recorded, difference.computed
    return isinstance(a, float) and isinstance(b, float) and _is_near(a, b, relative_difference(a, b))


def value_differences(recorded: object, computed: object, path: str = "") -> Iterator[ValueDifference]:
    """The numbers of two states that are not equal, by their paths: `learning_rates.policy.step`."""
    if isinstance(recorded, Mapping) and isinstance(computed, Mapping):
        for key in sorted(recorded.keys() | computed.keys()):
            inner = f"{path}.{key}" if path else str(key)
            yield from value_differences(recorded.get(key), computed.get(key), inner)
    elif isinstance(recorded, list) and isinstance(computed, list) and len(recorded) == len(computed):
        for index, (a, b) in enumerate(zip(recorded, computed, strict=True)):
            yield from value_differences(a, b, f"{path}[{index}]")
    elif recorded != computed:
        yield ValueDifference(path, recorded, computed)
