"""Pictures without two scales: a grown host, the lives of its seeds, and what befell the run in the course of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from esper_simic.curves import ticks, time_ticks
from esper_simic.growing_host.lifelines import Layer, Lifeline, Span
from esper_simic.lifecycle import SeedStage
from supervisor.report.charts import Axes, drawing, padded, path, shortened
from supervisor.report.markup import Content, Markup, duration, element
from supervisor.report.past import LANES, Mark, Stretch

STAGES: Final = tuple(stage for stage in SeedStage if stage is not SeedStage.DORMANT)
"""Those that have a colour, in the order of a life."""


def stage_class(stage: SeedStage) -> str:
    """The class that gives a stage its colour."""
    return stage.name.lower()


def stage_legend(stages: Sequence[SeedStage]) -> Markup:
    """What the colours mean."""
    items = [element("li", element("i", class_=stage_class(stage)), stage.name.lower()) for stage in stages]
    return element("ul", items, class_="legend")


# A grown host


@dataclass(frozen=True, slots=True)
class Planted:
    """One slot and what is in it; `blueprint` is empty where there is no seed."""

    name: str
    layer: int
    stage: SeedStage
    blueprint: str
    alpha: float
    parameters: int | None


_COLUMN: Final = 150.0
_BOX: Final = 112.0
_SLOT_HEIGHT: Final = 52.0


def host_diagram(layers: Sequence[Layer], slots: Sequence[Planted], source: str) -> Markup:
    """The chain of layers from left to right, and under each the slots behind it with their seeds."""
    by_layer = [[slot for slot in slots if slot.layer == index] for index in range(len(layers))]
    deepest = max((len(column) for column in by_layer), default=0)
    left, top = 70.0, 26.0
    width = left + _COLUMN * len(layers) + 8
    height = top + 62 + (_SLOT_HEIGHT + 10) * deepest + 12
    middle = top + 24
    parts: list[Content] = [element("text", shortened(source, 10), x=2, y=middle + 4)]
    for index, (layer, column) in enumerate(zip(layers, by_layer, strict=True)):
        x = left + _COLUMN * index
        parts.append(_arrow(x - (22 if index == 0 else _COLUMN - _BOX), x, middle))
        parts.append(_layer(layer, index, x, top))
        for place, slot in enumerate(column):
            y = top + 66 + place * (_SLOT_HEIGHT + 10)
            spine = x + 7
            hook = f"M{spine:g} {top + 48:g}V{y + _SLOT_HEIGHT / 2:g}H{x + 16:g}"
            parts.append(element("path", d=hook, class_="graft"))
            parts.append(_planted(slot, x + 16, y))
    said = "; ".join(
        f"{slot.name}: {slot.blueprint or 'no seed'} {slot.stage.name.lower()}" for slot in slots
    )
    return drawing(width, height, f"a host of {len(layers)} layers; {said}", parts)


def _arrow(start: float, stop: float, y: float) -> list[Markup]:
    head = f"M{stop:g} {y:g}l-7 -4v8z"
    line = element("line", x1=start, y1=y, x2=stop - 5, y2=y, class_="flow")
    return [line, element("path", d=head, class_="arrow")]


def _layer(layer: Layer, index: int, x: float, y: float) -> Markup:
    name = "classifier" if layer.is_classifier else f"block {index}"
    noun = ("class", "classes") if layer.is_classifier else ("channel", "channels")
    outputs = f"{layer.outputs:,} {noun[layer.outputs != 1]}"
    return element(
        "g",
        element("rect", x=x, y=y, width=_BOX, height=48, rx=5, class_="box"),
        element("text", name, x=x + 8, y=y + 15, class_="strong"),
        element("text", outputs, x=x + 8, y=y + 29),
        element("text", f"{layer.parameters:,} parameters", x=x + 8, y=y + 42, class_="soft"),
    )


def _planted(slot: Planted, x: float, y: float) -> Markup:
    """A slot as a box; its seed fills it from the left as far as it is blended in."""
    width = _BOX + 6
    shape = {"x": x, "y": y, "width": width, "height": _SLOT_HEIGHT, "rx": 5}
    if not slot.blueprint:
        words = [
            element("text", slot.name, x=x + 7, y=y + 16, class_="soft"),
            element("text", _vacancy(slot.stage), x=x + 7, y=y + 31, class_="soft"),
        ]
        return element("g", element("rect", class_="hole", **shape), words)
    parameters = "" if slot.parameters is None else f"{slot.parameters:,} parameters"
    title = f"{slot.name}: {slot.blueprint}, {slot.stage.name.lower()}, alpha {slot.alpha:.2f}, {parameters}"
    meter = {"x": x + 7, "y": y + 40, "height": 6}
    return element(
        "g",
        element("title", title),
        element("rect", class_=stage_class(slot.stage), **shape),
        element(
            "text", f"{slot.name} {shortened(slot.blueprint, 12)}", x=x + 7, y=y + 13, class_="strong on"
        ),
        element("text", f"{slot.stage.name.lower()}, α {slot.alpha:.2f}", x=x + 7, y=y + 25, class_="on"),
        element("text", parameters, x=x + 7, y=y + 36, class_="on"),
        element("rect", class_="track", width=width - 14, **meter),
        element("rect", class_="mark", width=(width - 14) * slot.alpha, **meter),
    )


def _vacancy(stage: SeedStage) -> str:
    return "empty" if stage is SeedStage.DORMANT else stage.name.lower()


# The lives of seeds


def lives_chart(lifeline: Lifeline, names: Sequence[str]) -> Markup:
    """Accuracy over the epochs of an episode, and under it a row for each slot.

    A row is coloured by the stage of what is in the slot; the line in it is alpha, from 0 below to 1 above.
    """
    epochs = len(lifeline.stage)
    row, panel, left = 38.0, 110.0, 64.0
    width, height = 760.0, panel + (row + 8) * len(names) + 38
    y_low, y_high = padded(float(lifeline.accuracy.min()), float(lifeline.accuracy.max()))
    axes = Axes(width, panel, left, 12, 14, 12, 0, epochs, y_low, y_high)
    parts: list[Content] = []
    for value in ticks(y_low, y_high, 3):
        y = axes.y(value)
        parts.append(element("line", x1=left, y1=y, x2=width - 12, y2=y, class_="gridline"))
        parts.append(element("text", f"{value:g}", x=left - 6, y=y + 4, class_="soft end"))
    parts.append(element("text", "accuracy %", x=2, y=10, class_="soft"))
    course = [(axes.x(epoch), axes.y(float(value))) for epoch, value in enumerate(lifeline.accuracy)]
    parts.append(path(course, "smooth"))
    tops = [panel + 6 + (row + 8) * index for index in range(len(names))]
    for name, top in zip(names, tops, strict=True):
        parts.append(element("text", shortened(name, 9), x=left - 6, y=top + row / 2 + 4, class_="end"))
        frame = {"x": left, "y": top, "width": axes.x(epochs) - left, "height": row}
        parts.append(element("rect", class_="track", **frame))
    spans = lifeline.spans()
    parts += [_span(span, names[span.slot], axes, tops[span.slot], row) for span in spans]
    parts += [_seed_name(seed, axes, tops[seed.slot]) for seed in seeds(spans)]
    parts += _alphas(lifeline, axes, tops, row)
    floor = height - 26
    for value in ticks(0, epochs, 8):
        if value == int(value):
            x = axes.x(value)
            parts.append(element("line", x1=x, y1=floor - 4, x2=x, y2=floor, class_="axis"))
            parts.append(element("text", f"{value:g}", x=x, y=floor + 12, class_="soft middle"))
    parts.append(element("text", "epoch", x=width - 12, y=height - 2, class_="soft end"))
    said = f"lives of the seeds in {len(names)} slots over {epochs} epochs"
    return drawing(width, height, said, parts)


def _span(span: Span, slot: str, axes: Axes, top: float, row: float) -> Markup:
    start, stop = axes.x(span.start), axes.x(span.stop)
    stage = span.stage.name.lower()
    words = f"{slot}: {span.blueprint or 'no seed'}, {stage}, epochs {span.start} to {span.stop}"
    class_ = stage_class(span.stage)
    return element(
        "rect", element("title", words), x=start, y=top, width=stop - start, height=row, class_=class_
    )


def seeds(spans: Sequence[Span]) -> list[Span]:
    """The whole life of each seed: spans of one blueprint that follow each other, as the last stage they came to."""
    lives: list[Span] = []
    for span in spans:
        if not span.blueprint:
            continue
        last = lives[-1] if lives else None
        goes_on = (
            last is not None
            and (last.slot, last.blueprint, last.stop) == (span.slot, span.blueprint, span.start)
            and span.stage is not SeedStage.GERMINATED
        )
        if last is not None and goes_on:
            lives[-1] = replace(span, start=last.start)
        else:
            lives.append(span)
    return lives


def _seed_name(seed: Span, axes: Axes, top: float) -> Markup | None:
    """As much of a seed's blueprint as its life has room for."""
    letters = int((axes.x(seed.stop) - axes.x(seed.start) - 6) / 6.2)
    if letters < 3:
        return None
    return element(
        "text", shortened(seed.blueprint, letters), x=axes.x(seed.start) + 4, y=top + 13, class_="on"
    )


def _alphas(lifeline: Lifeline, axes: Axes, tops: Sequence[float], row: float) -> list[Markup]:
    """Alpha as steps: it holds for a whole epoch. Where there is no seed there is no line."""
    lines = []
    for slot, top in enumerate(tops):
        points = []
        for epoch in range(len(lifeline.stage)):
            if not lifeline.blueprint[epoch, slot]:
                points.append((float("nan"), 0.0))
                continue
            y = top + row - 2 - (row - 4) * float(lifeline.alpha[epoch, slot])
            points += [(axes.x(epoch), y), (axes.x(epoch + 1), y)]
        lines.append(path(points, "alpha"))
    return lines


# The run in the course of time


PHASE_CLASSES: Final = {
    "starting": "p-starting",
    "training": "p-training",
    "stopping": "p-stopping",
    "evaluating": "p-evaluating",
    "admission paused": "pause",
}


def timeline(
    start_s: float,
    stop_s: float,
    stretches: Sequence[Stretch],
    pauses: Sequence[Stretch],
    marks: Sequence[Mark],
) -> Markup:
    """Phases as bars, and what happened as marks, a row for each kind; seconds since 1970-01-01 UTC."""
    width, left, row = 760.0, 92.0, 26.0
    lanes = [lane for lane in LANES if any(mark.lane == lane for mark in marks)]
    height = 34 + row * len(lanes) + 34
    axes = Axes(width, height, left, 14, 8, 26, 0, max(stop_s - start_s, 1e-3), 0, 1)
    floor = height - 28
    parts: list[Content] = [element("text", "phase", x=left - 8, y=24, class_="end soft")]
    for value in time_ticks(stop_s - start_s):
        x = axes.x(value)
        parts.append(element("line", x1=x, y1=8, x2=x, y2=floor, class_="gridline"))
        parts.append(element("text", duration(value), x=x, y=floor + 14, class_="soft middle"))
    for stretch, y, tall in [
        *((one, 10.0, 18.0) for one in stretches),
        *((one, 24.0, 5.0) for one in pauses),
    ]:
        begin, end = axes.x(stretch.start_s - start_s), axes.x(stretch.stop_s - start_s)
        title = element("title", f"{stretch.phase}: {duration(stretch.stop_s - stretch.start_s)}")
        shape = {"x": begin, "y": y, "width": max(end - begin, 0.8), "height": tall}
        parts.append(element("rect", title, class_=PHASE_CLASSES.get(stretch.phase, "p-starting"), **shape))
    ordered = sorted(marks, key=lambda mark: mark.is_trouble)  # trouble lies on top
    for index, lane in enumerate(lanes):
        y = 34 + row * (index + 0.5)
        parts.append(element("text", lane, x=left - 8, y=y + 4, class_="end soft"))
        parts.append(element("line", x1=left, y1=y, x2=width - 14, y2=y, class_="gridline"))
        parts += [_mark(mark, axes.x(mark.at_s - start_s), y) for mark in ordered if mark.lane == lane]
    said = f"the run in the course of {duration(stop_s - start_s)}: {len(marks)} events"
    return drawing(width, height, said, parts)


def _mark(mark: Mark, x: float, y: float) -> Markup:
    shape = f"M{x:.1f} {y - 6:g}l4.5 6l-4.5 6l-4.5 -6z"
    class_ = "mark trouble" if mark.is_trouble else "mark"
    return element("path", element("title", mark.text), d=shape, class_=class_)


def phase_legend(phases: Sequence[str]) -> Markup:
    """What the colours of the timeline mean."""
    items = [
        element("li", element("i", class_=class_), phase)
        for phase, class_ in PHASE_CLASSES.items()
        if phase in phases
    ]
    return element("ul", items, class_="legend")
