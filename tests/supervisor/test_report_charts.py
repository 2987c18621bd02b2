"""Pictures: what is drawn lies where its value says."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.curves import Curve, Points
from esper_simic.growing_host.lifelines import Layer, Lifeline, Span
from esper_simic.lifecycle import SeedStage
from supervisor.report.charts import (
    Axes,
    Bar,
    Spot,
    curve_chart,
    interval_chart,
    padded,
    path,
    scatter_chart,
    shortened,
)
from supervisor.report.diagrams import Planted, host_diagram, lives_chart, seeds, timeline
from supervisor.report.past import LANES, Mark, Stretch

S = SeedStage


def coordinates(markup: str, class_: str) -> list[list[tuple[float, float]]]:
    """The points of every path of a class."""
    found = re.findall(rf'<path d="([^"]*)" class="{class_}"', markup)
    pair = re.compile(r"[ML](-?[\d.]+) (-?[\d.]+)")
    return [[(float(x), float(y)) for x, y in pair.findall(d)] for d in found]


def shapes(markup: str, tag: str, class_: str) -> list[dict[str, float]]:
    """Numbers of every shape of a class."""
    found = re.findall(rf"<{tag} ([^>]*)>", markup)
    attributes = [dict(re.findall(r'([\w-]+)="([^"]*)"', one)) for one in found]
    return [
        {key: float(value) for key, value in one.items() if key != "class"}
        for one in attributes
        if one.get("class") == class_
    ]


AXES = Axes(100, 60, 10, 10, 5, 15, 2, 10, -1, 3)


def test_the_edges_of_the_field_are_the_ends_of_the_ranges() -> None:
    assert (AXES.x(2), AXES.x(10), AXES.x(6)) == (10, 90, 50)
    assert (AXES.y(-1), AXES.y(3), AXES.y(1)) == (45, 5, 25)
    flat = Axes(100, 60, 10, 10, 5, 15, 2, 2, 3, 3)
    assert (flat.x(2), flat.y(3)) == (50, 25)


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_padding_gives_room_on_both_sides(low: float, width: float) -> None:
    below, above = padded(low, low + width)
    assert below < low <= low + width < above


def test_a_line_is_broken_where_there_is_no_value() -> None:
    assert (
        path([(0, 1), (1, float("nan")), (2, 3), (3, 4)], "x")
        == '<path d="M0.0 1.0M2.0 3.0L3.0 4.0" class="x"/>'
    )


def points_of(values: list[float], buckets_max: int = 256) -> Points:
    curve = Curve(buckets_max)
    for x, y in enumerate(values):
        curve.add(float(x), y)
    return curve.points()


def test_a_rising_curve_rises_from_edge_to_edge() -> None:
    drawn = curve_chart(points_of([float(x) for x in range(50)]), "loss")
    (raw,), (smooth,) = coordinates(drawn, "raw"), coordinates(drawn, "smooth")
    assert len(raw) == len(smooth) == 50
    assert [x for x, _ in raw] == sorted(x for x, _ in raw)
    assert [y for _, y in raw] == sorted((y for _, y in raw), reverse=True), "up is towards 0"
    assert (raw[0][0], raw[-1][0]) == (46.0, 364.0)
    assert 'aria-label="loss"' in drawn
    assert coordinates(drawn, "band") == [], "every bucket holds one point"


def test_where_points_were_joined_their_span_is_shaded() -> None:
    drawn = curve_chart(points_of([(-1.0) ** x for x in range(64)], 8), "x", breaks=[20.0, 500.0])
    ((*band,),) = coordinates(drawn, "band")
    assert len(band) == 16
    assert len(shapes(drawn, "line", "cut")) == 1, "only breaks within the chart"


def test_intervals_lie_on_one_scale() -> None:
    bars = [Bar("a", 2.0, 1.0, 3.0, 2.5, True, "2"), Bar("b", 6.0, 5.0, 7.0, None, False, "6")]
    drawn = interval_chart(bars, "return", 1)
    (own,), (other,) = shapes(drawn, "line", "whisker own"), shapes(drawn, "line", "whisker")
    assert own["x2"] - own["x1"] == pytest.approx(other["x2"] - other["x1"], abs=0.02)
    assert own["x2"] < other["x1"]
    assert own["y1"] < other["y1"]
    (dot,) = shapes(drawn, "circle", "dot own")
    assert dot["cx"] == pytest.approx((own["x1"] + own["x2"]) / 2, abs=0.02)
    assert "return: a 2.0; b 6.0" in drawn


def test_policies_lie_above_episodes_and_their_names_apart() -> None:
    spots = [Spot(name, 10.0, 50.0 + n / 100, (5.0, 15.0), None, n == 0) for n, name in enumerate("abcd")]
    drawn = scatter_chart([(0.0, 10.0, 4), (20.0, 60.0, 0)], spots, [(0.0, 10.0), (10.0, 50.0)], "x")
    assert drawn.index("episode t0") < drawn.index("episode t4") < drawn.index("dot own"), "oldest first"
    names = re.findall(r'<text x="[\d.]+" y="([\d.]+)" class="halo[^"]*">[abcd]</text>', drawn)
    heights = sorted(map(float, names))
    assert len(heights) == 4
    assert all(after - before >= 12.9 for before, after in itertools.pairwise(heights))
    ((start, corner, stop),) = coordinates(drawn, "front")
    assert start[1] == corner[1]
    assert corner[0] == stop[0]
    assert stop[1] < start[1], "up at the dearer one"


def test_many_names_at_the_top_stay_in_the_picture_and_apart() -> None:
    spots = [Spot(f"policy {n}", 10.0, 60.0, None, None, False) for n in range(9)]
    drawn = scatter_chart([(0.0, 10.0, 0)], spots, [], "x")
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)" class="halo', drawn))
    assert len(heights) == 9
    assert heights[0] >= 12
    assert all(after - before >= 12.9 for before, after in itertools.pairwise(heights))


def lifeline() -> Lifeline:
    stage = [S.DORMANT, S.GERMINATED, S.TRAINING, S.BLENDING, S.PRUNED]
    return Lifeline(
        layers=(Layer(4, 12, False), Layer(10, 50, True)),
        slot_layer=(0,),
        stage=np.array(stage, dtype=np.int8)[:, None],
        blueprint=np.array(["", "norm", "norm", "norm", ""])[:, None],
        alpha=np.array([0.0, 0.0, 0.0, 0.5, 0.0])[:, None],
        composition=np.zeros(1, dtype=np.int64),
        accuracy=np.array([10.0, 20.0, 30.0, 25.0, 20.0]),
    )


def test_the_life_of_a_seed_is_drawn_epoch_by_epoch() -> None:
    drawn = lives_chart(lifeline(), ["r0c0"])
    width = (760 - 64 - 12) / 5
    for class_, start in (("germinated", 1), ("training", 2), ("blending", 3), ("pruned", 4)):
        (rectangle,) = shapes(drawn, "rect", class_)
        assert rectangle["x"] == pytest.approx(64 + start * width, abs=0.01)
        assert rectangle["width"] == pytest.approx(width, abs=0.01)
    ((*alpha,),) = coordinates(drawn, "alpha")
    heights = [y for _, y in alpha]
    assert heights[0] == max(heights), "alpha 0 lies at the bottom"
    assert heights[-1] == pytest.approx(max(heights) - (38 - 4) / 2, abs=0.1), "and one half in the middle"
    assert drawn.count(">norm<") == 1, "a seed is named once"


def test_a_seed_lives_through_its_stages_and_the_next_is_another() -> None:
    spans = [
        Span(0, S.GERMINATED, "norm", 0, 1),
        Span(0, S.TRAINING, "norm", 1, 4),
        Span(0, S.PRUNED, "", 4, 5),
        Span(0, S.GERMINATED, "norm", 5, 6),
        Span(1, S.GERMINATED, "norm", 6, 7),
    ]
    assert [(seed.slot, seed.start, seed.stop) for seed in seeds(spans)] == [(0, 0, 4), (0, 5, 6), (1, 6, 7)]


def test_a_host_is_drawn_with_what_is_in_its_slots() -> None:
    slots = [
        Planted("r0c0", 0, S.BLENDING, "conv_light", 0.25, 1234),
        Planted("r1c0", 0, S.EMBARGOED, "", 0.0, 0),
        Planted("r0c1", 1, S.DORMANT, "", 0.0, 0),
    ]
    drawn = host_diagram([Layer(4, 12, False), Layer(10, 50, True)], slots, "digits")
    for words in (
        "block 0",
        "classifier",
        "r0c0 conv_light",
        "blending, α 0.25",
        "1,234 parameters",
        "embargoed",
        "empty",
    ):
        assert f">{words}<" in drawn
    (track,), (filled,) = shapes(drawn, "rect", "track"), shapes(drawn, "rect", "mark")
    assert filled["width"] == pytest.approx(track["width"] / 4)
    assert len(shapes(drawn, "rect", "box")) == len(shapes(drawn, "rect", "hole")) == 2


def test_a_time_line_has_its_phases_and_marks_where_they_were() -> None:
    marks = [Mark(110.0, "run", "it began", False), Mark(150.0, "processes", "gone", True)]
    drawn = timeline(
        100.0, 200.0, [Stretch(100.0, 150.0, "training")], [Stretch(150.0, 160.0, "admission paused")], marks
    )
    (phase,) = shapes(drawn, "rect", "p-training")
    assert [phase["x"], phase["width"]] == pytest.approx([92, (760 - 92 - 14) / 2])
    assert "<title>training: 50 s</title>" in drawn
    assert len(shapes(drawn, "rect", "pause")) == 1
    assert re.findall(r'd="M([\d.]+) [^"]*" class="mark( trouble)?"', drawn) == [
        ("157.4", ""),
        ("419.0", " trouble"),
    ]
    assert [lane for lane in LANES if f">{lane}<" in drawn] == ["run", "processes"]


def test_a_long_name_is_shortened_and_marked() -> None:
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 6) == "abcde…"
