"""What a run's policies came to, on a console: one table, and a sentence on each rival.

Whoever imports this brings numpy and scipy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper_simic.worlds.rivals import BEST_POSSIBLE
from supervisor.events import LEARNED, PolicyEvaluated
from supervisor.standings import FIGURES, Figure, Row, compare, known_figures
from supervisor.view import show, tell

NOTHING: Final = "-"

AHEAD: Final = "learned minus it"

HEADS: Final = {"accuracy": "host accuracy %"}
"""Heads of columns that are not the figure's label."""

SHORT: Final = {"accuracy": "accuracy", "parameters": "parameters"}
"""Figures by a single word, for the title."""

RELATION: Final = {1: "higher", -1: "lower", 0: "no clear difference"}


def show_results(
    console: Console, evaluations: Mapping[str, PolicyEvaluated], run_seed: int, order: Sequence[str] = ()
) -> None:
    """Print the table, policies in the given order and others after them by their returns, and the verdict under it.

    Args:
        console: Where.
        evaluations: What was measured, by policy.
        run_seed: Of the run; names the chance of the intervals.
        order: Of the rows.
    """
    rows = {row.name: row for row in compare(evaluations, run_seed)}
    ordered = [rows[name] for name in dict.fromkeys((*order, *rows)) if name in rows]
    show(console, result_table(ordered, box.HEAVY_HEAD if console.is_terminal else box.ASCII))
    for sentence in verdict(ordered):
        tell(console, f"  {sentence}")


def result_table(rows: Sequence[Row], border: box.Box = box.HEAVY_HEAD) -> Table:
    """Return, host accuracy and added parameters of every policy, always the three together, with 95 % intervals.

    Of returns, which are skewed, the interquartile mean with its bootstrap interval, and what the learned policy has
    more, seed by seed; of the others the mean with Student's interval. Below 110 columns. Where nothing grows, the
    return is all there is.
    """
    episodes = max((row.episodes for row in rows), default=0)
    earned, *others = known_figures(rows)
    means = f"; {', '.join(SHORT[figure.key] for figure in others)}: mean" if others else ""
    title = Text(
        f"{episodes} held-out episodes each, same seeds; [95 % interval]\n"
        f"return: interquartile mean ({AHEAD}: seed by seed){means}"
    )
    table = Table(title=title, title_justify="left", box=border)
    table.add_column("policy", overflow="fold")
    for head in (earned.label, AHEAD, *(HEADS.get(figure.key, figure.label) for figure in others)):
        table.add_column(head, justify="right", overflow="fold")
    for row in rows:
        cells = [_middle(row, earned), _ahead(row, earned), *(_mean(row, figure) for figure in others)]
        table.add_row(Text(row.name), *map(Text, cells), style="bold" if row.name == LEARNED else None)
    return table


def verdict(rows: Sequence[Row]) -> list[str]:
    """A sentence on each rival: in which figures the learned policy has clearly more or less, seed by seed."""
    sentences = []
    for row in rows:
        if not row.against:
            continue
        found: dict[str, list[str]] = {}
        for figure in FIGURES:
            if figure.key in row.against:
                relation = RELATION[row.against[figure.key].interquartile_mean.sign()]
                found.setdefault(relation, []).append(figure.label)
        words = [f"{relation} in {', '.join(labels)}" for relation, labels in found.items()]
        sentences.append(f"{LEARNED} against {row.name}: {'; '.join(words)}")
    return [*sentences, *regrets(rows)]


def regrets(rows: Sequence[Row]) -> list[str]:
    """Where the best that is possible is known: mean return and, seed by seed, mean regret of every policy."""
    intervals = {row.name: row.figures["return"].mean for row in rows}
    means = {name: interval.mean for name, interval in intervals.items() if interval is not None}
    if BEST_POSSIBLE not in means:
        return []
    return [
        f"{name}: mean return {number(mean, 3, '+')}, mean regret {number(means[BEST_POSSIBLE] - mean, 3)}"
        for name, mean in means.items()
    ]


def _middle(row: Row, figure: Figure) -> str:
    measured = row.figures[figure.key]
    if measured.middle is None:
        return number(measured.values[0], figure.digits) if measured.values else NOTHING
    return _interval(measured.middle.value, measured.middle.low, measured.middle.high, figure.digits)


def _mean(row: Row, figure: Figure) -> str:
    measured = row.figures[figure.key]
    if measured.mean is None:
        return number(measured.values[0], figure.digits) if measured.values else NOTHING
    return _interval(measured.mean.mean, measured.mean.low, measured.mean.high, figure.digits)


def _ahead(row: Row, figure: Figure) -> str:
    found = row.against.get(figure.key)
    if found is None:
        return NOTHING
    ahead = found.interquartile_mean
    return _interval(ahead.value, ahead.low, ahead.high, figure.digits, "+")


def _interval(centre: float, low: float, high: float, digits: int, sign: str = "") -> str:
    return f"{number(centre, digits, sign)} [{number(low, digits, sign)}, {number(high, digits, sign)}]"


def number(value: float, digits: int, sign: str = "") -> str:
    """In ASCII; what is rounded to zero has no sign."""
    text = f"{value:{sign}.{digits}f}"
    return text.lstrip("+-") if round(value, digits) == 0 else text
