"""The policies that were measured: beside each other, against the learned one, and accuracy against parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from supervisor.events import FIXED, LEARNED
from supervisor.report import charts
from supervisor.report.charts import Bar, Spot
from supervisor.report.figures import difference_words, interval_words, sentences
from supervisor.report.gather import Gathered
from supervisor.report.markup import Content, Markup, element, fixed, note, short
from supervisor.standings import FIGURES, Figure, Measured, Row, known_figures


def comparison(gathered: Gathered, rows: Sequence[Row]) -> Content:
    """The section of the comparison: what it says, its intervals as pictures, its figures as tables."""
    if not rows:
        return note(
            "No policy has been measured"
            + (
                " yet."
                if gathered.is_living
                else ": the run ended before its evaluation, or was run without one."
            )
        )
    episodes = max(row.episodes for row in rows)
    charted = [_intervals(figure, rows) for figure in known_figures(rows)]
    paired = _paired_table(rows)
    return [
        element("ul", [element("li", said) for said in sentences(rows)]),
        element("div", charted, class_="grid"),
        element("h3", f"{episodes} held-out episodes each, on the same seeds"),
        element("div", _table(rows), class_="wide"),
        [
            element("h3", f"{LEARNED} minus each other policy, seed by seed"),
            element("div", paired, class_="wide"),
        ]
        if paired
        else None,
        note(
            "Square brackets: 95 % intervals; Student's for means, percentile bootstrap "
            "(seeds drawn with both outcomes for differences) for the others. IQM: interquartile mean, the mean of the "
            "middle half. P(more): probability that an episode of the learned policy gives more than one of the other. "
            "The intervals speak of these policies on other seeds, not of what another training would give."
        ),
    ]


def _intervals(figure: Figure, rows: Sequence[Row]) -> Markup:
    bars = []
    for row in rows:
        measured = row.figures[figure.key]
        if measured.middle is None or measured.mean is None:
            continue
        middle = measured.middle
        words = f"{interval_words(middle.value, middle.low, middle.high, figure.digits)}{figure.unit}"
        bars.append(
            Bar(
                row.name,
                middle.value,
                middle.low,
                middle.high,
                measured.mean.mean,
                row.name == LEARNED,
                words,
            )
        )
    caption = element(
        "figcaption",
        element("b", figure.label),
        element("span", f"{figure.unit} IQM with its interval; ring: mean"),
    )
    if not bars:
        return element("figure", caption, note("fewer than two episodes: no intervals"))
    return element("figure", caption, charts.interval_chart(bars, figure.label, figure.digits))


def _table(rows: Sequence[Row]) -> Markup:
    figures = known_figures(rows)
    has_front = len(figures) == len(FIGURES)
    heads = [[f"{figure.label}{figure.unit}, mean", "IQM"] for figure in figures]
    top = element(
        "tr",
        element("th", "policy", scope="col", class_="left"),
        _heads([*heads, ["on the front"]] if has_front else heads),
    )
    body = [
        element(
            "tr",
            element("th", element("bdi", row.name), scope="row"),
            [_cells(row.figures[figure.key], figure) for figure in figures],
            element("td", _on_front(row)) if has_front else None,
            class_="own" if row.name == LEARNED else None,
        )
        for row in rows
    ]
    return element("table", element("thead", top), element("tbody", body))


def _on_front(row: Row) -> str:
    if row.name == FIXED:
        return "–"
    return "yes" if row.is_on_front else "no"


def _heads(groups: Sequence[Sequence[str]]) -> list[Markup]:
    return [element("th", name, scope="col") for group in groups for name in group]


def _cells(measured: Measured, figure: Figure) -> list[Markup]:
    if measured.mean is None or measured.middle is None:
        centre = measured.centre
        only = fixed(centre, figure.digits) if math.isfinite(centre) else "–"
        return [element("td", only), element("td", "–")]
    mean, middle = measured.mean, measured.middle
    return [
        element("td", interval_words(mean.mean, mean.low, mean.high, figure.digits)),
        element("td", interval_words(middle.value, middle.low, middle.high, figure.digits)),
    ]


def _paired_table(rows: Sequence[Row]) -> Markup | None:
    against = [row for row in rows if row.against]
    if not against:
        return None
    figures = known_figures(rows)
    heads = [[f"{figure.label}, mean", "IQM", "P(more)"] for figure in figures]
    top = element("tr", element("th", "against", scope="col", class_="left"), _heads(heads))
    body = []
    for row in against:
        cells: list[Markup] = []
        for figure in figures:
            found = row.against.get(figure.key)
            if found is None:
                cells += [element("td", "–")] * 3
                continue
            chance = found.probability
            cells += [
                element("td", difference_words(found.mean, figure.digits)),
                element("td", difference_words(found.interquartile_mean, figure.digits)),
                element("td", interval_words(chance.value, chance.low, chance.high, 2)),
            ]
        body.append(element("tr", element("th", element("bdi", row.name), scope="row"), cells))
    return element("table", element("thead", top), element("tbody", body))


# Accuracy against parameters


def front(gathered: Gathered, rows: Sequence[Row]) -> Content:
    """The section of accuracy against parameters: training episodes, policies, and the front."""
    learner = gathered.learner
    last = max(1, learner.environment_steps)
    episodes = [
        (float(one.parameters), one.accuracy, min(4, 5 * one.environment_steps // (last + 1)))
        for one in learner.episodes
        if math.isfinite(one.accuracy)
    ]
    placed = [(_spot_of(row), row.is_on_front) for row in rows]
    placed = [one for one in placed if math.isfinite(one[0].x) and math.isfinite(one[0].y)]
    spots = [spot for spot, _ in placed]
    if not episodes and not spots:
        return note("No whole episode has been finished yet.")
    on_front = [(spot.x, spot.y) for spot, is_on_front in placed if is_on_front]
    label = f"accuracy against parameters added: {len(episodes)} training episodes and {len(spots)} policies"
    fifths = [element("li", element("i", class_=f"t{age}"), name) for age, name in enumerate(_fifths(last))]
    notes = [f"{len(episodes):,} of {learner.episodes.count:,} whole training episodes"]
    if learner.cut_short:
        notes.append(f"{learner.cut_short:,} that were cut short are left out")
    if spots:
        notes.append("policies by the interquartile means of their held-out episodes, with 95 % intervals")
    if len(on_front) > 1:
        notes.append("broken line: the front, what growing can have for so many parameters")
    if any(spot.is_beside for spot in spots):
        notes.append(f"hollow: {FIXED}, what {LEARNED} grew, trained whole from the start")
    return [
        note(f"{'; '.join(notes)}."),
        element(
            "figure", element("div", charts.scatter_chart(episodes, spots, on_front, label), class_="wide")
        ),
        element("ul", fifths, class_="legend") if episodes else None,
    ]


def _fifths(last: int) -> list[str]:
    edges = [round(last * part / 5) for part in range(6)]
    return [f"{short(edges[part])} to {short(edges[part + 1])} steps" for part in range(5)]


def _spot_of(row: Row) -> Spot:
    accuracy, parameters = row.figures["accuracy"], row.figures["parameters"]
    spans = [
        None if measured.middle is None else (measured.middle.low, measured.middle.high)
        for measured in (parameters, accuracy)
    ]
    own, beside = row.name == LEARNED, row.name == FIXED
    return Spot(row.name, parameters.centre, accuracy.centre, spans[0], spans[1], own, beside)
