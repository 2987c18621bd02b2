"""Where a replay is to stop: before a step, where a metric says so, or where the numbers ended.

`17` is a step, `nan` a step with a metric that is not finite, one that failed, or one that the run died of, and
`loss > 10` compares a recorded metric.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

from esper_simic.errors import ContractError

Metrics = Mapping[str, float]

OPERATORS: Final[dict[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_COMPARISON: Final = re.compile(r"\s*([^\s<>=!]+)\s*(>=|<=|==|!=|>|<)\s*(\S+)\s*")
_NUMBER: Final = re.compile(r"\s*\d+\s*")


class RequestError(ContractError):
    """What was asked for is not there, or says nothing: the step, the checkpoint, the metric, the condition."""


@dataclass(frozen=True, slots=True)
class AtStep:
    """Before this step."""

    step: int

    def matches(self, step: int, metrics: Metrics) -> bool:
        """Whether to stop before this step, which has left these metrics; none where it was never finished."""
        return step == self.step


@dataclass(frozen=True, slots=True)
class NotFinite:
    """Before a step with a metric that is not finite, and before one that failed or that the run died of."""

    def matches(self, step: int, metrics: Metrics) -> bool:
        """Whether to stop before this step, which has left these metrics; none where it was never finished."""
        return not all(map(math.isfinite, metrics.values()))


@dataclass(frozen=True, slots=True)
class MetricBreak:
    """Before every step whose recorded metric compares so."""

    metric: str
    comparison: str
    number: float

    def matches(self, step: int, metrics: Metrics) -> bool:
        """Whether to stop before this step, which has left these metrics; none where it was never finished."""
        value = metrics.get(self.metric)
        return value is not None and OPERATORS[self.comparison](value, self.number)


BreakCondition = AtStep | NotFinite | MetricBreak


def parse_break(text: str) -> BreakCondition:
    """The condition in words.

    Raises:
        RequestError: It is none.
    """
    if _NUMBER.fullmatch(text) and int(text) > 0:
        return AtStep(int(text))
    if text.strip().lower() == "nan":
        return NotFinite()
    match = _COMPARISON.fullmatch(text)
    try:
        if match is not None:
            return MetricBreak(match[1], match[2], float(match[3]))
    except ValueError:
        pass
    raise RequestError(
        f"{text!r} is no place to stop at: it takes a step, nan, or a comparison such as 'loss > 10'"
    )


def check_metric(condition: BreakCondition, known: Collection[str]) -> None:
    """Refuse a comparison of a metric that nothing in the journal has.

    Raises:
        RequestError: Naming metrics of similar names.
    """
    if not isinstance(condition, MetricBreak) or condition.metric in known:
        return
    wanted = condition.metric
    near = [name for name in sorted(known) if wanted in name]
    near += [name for name in difflib.get_close_matches(wanted, sorted(known)) if name not in near]
    meant = f"did you mean {', '.join(near)}" if near else f"it has {', '.join(sorted(known)) or 'none'}"
    raise RequestError(f"no step of this journal has a metric {wanted!r}: {meant}")
