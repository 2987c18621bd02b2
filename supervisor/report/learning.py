"""The learning curves of a run, over environment steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from esper_simic.curves import Points, rates
from supervisor.report import charts
from supervisor.report.gather import Gathered
from supervisor.report.markup import Content, Markup, element, fixed, note


class Shown(NamedTuple):
    """A metric of the learner that has a chart of its own."""

    metric: str
    label: str
    unit: str
    digits: int


CURVES: Final = (
    Shown("episodic_return", "return", "of an episode, mean of the last 100", 2),
    Shown("episodic_accuracy", "host accuracy", "% at the end of an episode, mean of the last 100", 1),
    Shown("episodic_parameters", "parameters added", "in an episode, mean of the last 100", 0),
    Shown("total", "loss", "all parts together", 4),
    Shown("policy_loss", "policy loss", "", 4),
    Shown("value_loss", "value loss", "", 4),
    Shown("entropy", "entropy", "nats, over the heads that mattered", 3),
    Shown("approx_kl", "approximate KL", "nats, acting policy to learner's", 4),
    Shown("policy_lag", "policy lag", "updates, of fresh experience", 1),
    Shown("grad_norm", "gradient norm", "before clipping", 2),
    Shown("explained_variance", "explained variance", "of the value targets", 2),
)
RATE_BINS: Final = 48


def learning(gathered: Gathered) -> Content:
    """The section of the learning curves."""
    learner = gathered.learner
    if not learner.curves:
        return note("The learner has made no update yet: there are no curves.")
    breaks = [float(place) for place in learner.recovered_at]
    known = [
        _curve(shown, learner.curves[shown.metric].points(), breaks)
        for shown in CURVES
        if shown.metric in learner.curves
    ]
    known += _made_curves(gathered, breaks)
    others = [
        _curve(Shown(name, name, "", 4), curve.points(), breaks)
        for name, curve in sorted(learner.curves.items())
        if name not in {shown.metric for shown in CURVES}
    ]
    notes = ["The thin line is what was measured, the thick one its smoothed course"]
    stride = max(curve.stride for curve in learner.curves.values())
    if stride > 1:
        notes.append(f"a point of the thin line is the mean of up to {stride} updates, whose span is shaded")
    if breaks:
        notes.append("a dotted line is where a learner came back")
    skipped = sum(curve.skipped for curve in learner.curves.values()) + learner.metrics_left_out
    if skipped:
        notes.append(f"{skipped:,} values were not finite or too many and are left out")
    more = element(
        "details",
        element("summary", f"{len(others)} more metrics of the learner"),
        element("div", others, class_="grid"),
    )
    return [note(f"{'; '.join(notes)}."), element("div", known, class_="grid"), more if others else None]


def _made_curves(gathered: Gathered, breaks: Sequence[float]) -> list[Markup]:
    """Curves that no metric of the learner holds: fossils of episodes, and how fast the run was."""
    found = []
    fossils = gathered.learner.fossils.points()
    if len(fossils):
        # Their span is nearly always the whole range: it would hide the curve and tell nothing.
        means = Points(fossils.x, fossils.y, fossils.y, fossils.y, fossils.count)
        found.append(_curve(Shown("", "fossilised seeds", "in an episode", 2), means, breaks))
    working = gathered.learner.working.points()
    bins = min(RATE_BINS, len(working) // 4)
    if bins:
        steps, rate = rates(working.x, working.y, bins)
        if len(rate):
            points = Points(steps, rate, rate, rate, rate * 0 + 1)
            shown = Shown("", "environment steps/s", "while a learner lived", 0)
            found.append(_curve(shown, points, breaks))
    return found


def _curve(shown: Shown, points: Points, breaks: Sequence[float]) -> Markup:
    unit = f" {shown.unit}" if shown.unit else ""
    if not len(points):
        return element("figure", element("figcaption", element("b", shown.label)), note("no finite value"))
    last = fixed(float(points.y[-1]), shown.digits)
    label = f"{shown.label} over environment steps: {fixed(float(points.y[0]), shown.digits)} at first, {last} at last"
    caption = element(
        "figcaption", element("b", shown.label), element("span", f"{unit}; last "), element("b", last)
    )
    return element("figure", caption, charts.curve_chart(points, label, breaks))
