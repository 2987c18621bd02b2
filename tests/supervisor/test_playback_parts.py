"""The parts of a replay that need no journal: conditions, differences in numbers, and one line for each event."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper_simic.events import LEARNER_EVENTS, HardwareNoted
from esper_simic.hardware import HardwareContext
from supervisor.playback import RequestError, parse_break
from supervisor.playback.breaks import OPERATORS
from supervisor.playback.compare import (
    METRIC_FLOOR,
    METRIC_TOLERANCE,
    TENSOR_TOLERANCE,
    is_tensor_near,
    is_value_near,
    metric_differences,
    relative_difference,
    tensor_differences,
    value_differences,
)
from supervisor.playback.summaries import summary

# -- conditions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "metrics", "expected"),
    [
        ("loss > 10", {"loss": 10.5}, True),
        ("loss > 10", {"loss": 10.0}, False),
        ("loss>=10", {"loss": 10.0}, True),
        ("loss < -1e-3", {"loss": -0.01}, True),
        ("loss != 0", {"loss": 0.0}, False),
        ("learning_rate.policy == 3e-4", {"learning_rate.policy": 0.0003}, True),
        ("loss > 10", {}, False),
        ("nan", {"loss": math.nan}, True),
        ("NaN", {"loss": math.inf}, True),
        ("nan", {"loss": 1.0}, False),
        ("nan", {}, False),
    ],
)
def test_conditions_on_metrics(text: str, metrics: dict[str, float], expected: bool) -> None:
    assert parse_break(text).matches(3, metrics) is expected


def test_a_number_is_a_step() -> None:
    condition = parse_break(" 17 ")
    assert [step for step in range(30) if condition.matches(step, {})] == [17]


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "loss", "> 3", "loss > much", "loss => 3", "1.5", "loss > 1 > 2", "nans"]
)
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="no place to stop at"):
        parse_break(text)


@given(
    st.from_regex(r"[a-z_.]{1,20}", fullmatch=True),
    st.sampled_from(sorted(OPERATORS)),
    st.floats(allow_nan=False),
    st.floats(allow_nan=False),
)
def test_a_comparison_means_what_it_says(name: str, comparison: str, number: float, value: float) -> None:
    meaning = {
        ">": value > number,
        "<": value < number,
        ">=": value >= number,
        "<=": value <= number,
        "==": value == number,
        "!=": value != number,
    }
    assert parse_break(f"{name} {comparison} {number!r}").matches(1, {name: value}) is meaning[comparison]


# -- differences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (1.0, 1.0, 0.0),
        (0.0, -0.0, 0.0),
        (math.nan, math.nan, 0.0),
        (math.inf, math.inf, 0.0),
        (1.0, math.nan, math.inf),
        (1.0, math.inf, math.inf),
        (2.0, 1.0, 0.5),
        (-1.0, 1.0, 2.0),
        (0.0, 1e-30, 1.0),
    ],
)
def test_relative_difference(a: float, b: float, expected: float) -> None:
    assert relative_difference(a, b) == relative_difference(b, a) == expected


def test_metrics_of_one_side_only_differ() -> None:
    (first, second) = metric_differences({"a": 1.0, "b": 1.0}, {"b": 1.0, "c": 2.0})
    assert (first.name, first.recorded, first.computed, first.relative) == ("a", 1.0, None, math.inf)
    assert (second.name, second.recorded, second.computed) == ("c", None, 2.0)


def test_the_last_bit_of_a_metric_counts() -> None:
    (found,) = metric_differences({"a": 1.0, "b": 0.5}, {"a": math.nextafter(1.0, 2.0), "b": 0.5})
    assert found.name == "a"
    assert 0 < found.relative < 1e-15


@pytest.mark.parametrize(
    ("recorded", "computed", "is_near"),
    [
        (1.0, 1.0 + 0.9 * METRIC_TOLERANCE, True),
        (1.0, 1.0 + 1.2 * METRIC_TOLERANCE, False),
        (0.0, 0.9 * METRIC_FLOOR, True),
        (0.0, 1.1 * METRIC_FLOOR, False),
        (math.nan, math.nan, True),
        (1.0, math.nan, False),
        (1e9, 1e9 * (1 + 1e-4), True),
    ],
)
def test_the_tolerance_of_metrics(recorded: float, computed: float, is_near: bool) -> None:
    found = metric_differences({"a": recorded}, {"a": computed}, is_within_tolerance=True)
    assert (found == []) is is_near


def one(recorded: Any, computed: Any) -> Any:
    def tensor(value: Any) -> Tensor:
        return value if isinstance(value, Tensor) else torch.tensor(value)

    found = tensor_differences({"w": tensor(recorded)}, {"w": tensor(computed)})
    return found[0] if found else None


def test_equal_bits_are_no_difference() -> None:
    assert one([1.0, math.nan, -0.0], [1.0, math.nan, -0.0]) is None
    assert one(3.0, 3.0) is None
    assert one([], []) is None
    assert one([1, 2], [1, 2]) is None
    assert one(torch.ones(2, 3).t(), torch.ones(3, 2)) is None


def test_a_difference_in_numbers() -> None:
    found = one([[1.0, 2.0], [4.0, -8.0]], [[1.0, 2.5], [4.0, -7.0]])
    assert (found.shape, found.elements, found.elements_differing) == ([2, 2], 4, 2)
    assert found.max_abs == 1.0
    assert found.max_relative == pytest.approx(0.5 / 2.5)
    assert found.of_kind == pytest.approx(1.0 / 8.0)


def test_bits_count_where_numbers_are_equal() -> None:
    """Minus zero is another zero: the digest knows, so the comparison must."""
    found = one([0.0, 1.0], [-0.0, 1.0])
    assert (found.elements_differing, found.max_abs, found.max_relative) == (1, 0.0, 0.0)
    assert is_tensor_near(found)


@pytest.mark.parametrize(("recorded", "computed"), [([1.0], [math.nan]), ([math.inf], [1.0])])
def test_a_number_against_none_is_infinitely_far(recorded: list[float], computed: list[float]) -> None:
    found = one(recorded, computed)
    assert (found.max_abs, found.max_relative) == (math.inf, math.inf)
    assert not is_tensor_near(found)


def test_integers_are_compared_as_numbers() -> None:
    assert one([7, 9], [7, 12]).max_abs == 3.0


@pytest.mark.parametrize(
    ("recorded", "computed", "reason"),
    [
        ({"w": torch.ones(2)}, {}, "only in the checkpoint"),
        ({}, {"w": torch.ones(2)}, "not in the checkpoint"),
        (
            {"w": torch.ones(2)},
            {"w": torch.ones(3)},
            "(3,) torch.float32 was computed, (2,) torch.float32 recorded",
        ),
        ({"w": torch.ones(2)}, {"w": torch.ones(2, dtype=torch.float64)}, "torch.float64 was computed"),
    ],
)
def test_what_cannot_be_compared_says_why(
    recorded: dict[str, Tensor], computed: dict[str, Tensor], reason: str
) -> None:
    (found,) = tensor_differences(recorded, computed)
    assert reason in found.reason
    assert not is_tensor_near(found)


@pytest.mark.parametrize(
    ("name", "other", "is_near"),
    [
        ("policy.encoder.bias", "policy.heads.weight", True),
        ("optimizer.policy.3.exp_avg", "optimizer.value.1.exp_avg", True),
        ("optimizer.policy.3.exp_avg", "optimizer.policy.3.exp_avg_sq", False),
        ("policy.normaliser.mean", "policy.heads.weight", False),
        ("optimizer.policy.3.exp_avg", "policy.heads.weight", False),
    ],
)
def test_the_tolerance_of_tensors_is_a_part_of_the_largest_element_of_their_kind(
    name: str, other: str, is_near: bool
) -> None:
    """A tensor that is nothing but rounding is measured by others of its scale."""
    largest = torch.tensor([100.0, 1.0])
    for part, is_inside in ((0.9, is_near), (1.1, False)):
        off = part * TENSOR_TOLERANCE * 100
        (found,) = tensor_differences(
            {name: torch.tensor([1e-9]), other: largest}, {name: torch.tensor([1e-9 + off]), other: largest}
        )
        assert is_tensor_near(found) is is_inside


def test_where_all_is_zero_nothing_else_is_near() -> None:
    assert not is_tensor_near(one([0.0], [1e-9]))


def test_numbers_differ_by_their_paths() -> None:
    recorded = {"a": {"b": [1, 2.0]}, "c": 1, "d": "x"}
    computed = {"a": {"b": [1, 2.0001]}, "c": 2, "e": None}
    found = list(value_differences(recorded, computed))
    assert [(one.path, one.recorded, one.computed) for one in found] == [
        ("a.b[1]", 2.0, 2.0001),
        ("c", 1, 2),
        ("d", "x", None),
    ]
    assert [is_value_near(one) for one in found] == [True, False, False]
    assert next(value_differences([1], [1, 2])).path == ""


# -- summaries ---------------------------------------------------------------------------------------------------------


def example(kind: type[Any]) -> Any:
    """An event of a kind, every field filled with something of its type."""
    examples = {"int": 7, "str": "words", "float": 1.5, "bool": True, "list[int]": [1], "str | None": None}
    filled = {
        field.name: examples.get(str(kind.__annotations__[field.name]), {})
        for field in msgspec.structs.fields(kind)
    }
    filled |= {name: [] for name in ("episodes",) if name in filled}
    if "hardware" in filled and kind is HardwareNoted:
        filled["hardware"] = HardwareContext(device_type="cpu", device_id="words", total_memory_gb=1.5)
    return kind(**filled)


@pytest.mark.parametrize("kind", LEARNER_EVENTS.values(), ids=LEARNER_EVENTS)
def test_every_event_has_its_line(kind: type[Any]) -> None:
    line = summary(example(kind))
    assert line
    assert "\n" not in line
