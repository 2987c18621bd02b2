"""What befell a run in the course of time."""

from __future__ import annotations

from supervisor.report import diagrams
from supervisor.report.gather import Gathered
from supervisor.report.markup import Content, duration, element, note, utc


def happenings(gathered: Gathered) -> Content:
    """The section of what happened: a picture, and the newest events in words."""
    supervisor, learner = gathered.supervisor, gathered.learner
    marks = [mark for past in (supervisor, learner) for lane in past.marks.lanes.values() for mark in lane]
    if not marks:
        return note("Nothing is written down.")
    stretches, pauses = gathered.stretches(), list(learner.pauses)
    drawn = diagrams.timeline(gathered.first_s, gathered.last_s, stretches, pauses, marks)
    phases = [stretch.phase for stretch in (*stretches, *pauses)]
    newest = sorted([*supervisor.marks.newest, *learner.marks.newest])
    total = supervisor.marks.count + learner.marks.count
    left_out = total - len(newest)
    rows = [
        element(
            "tr",
            element("td", utc(mark.at_s), class_="left"),
            element("td", f"+ {duration(mark.at_s - gathered.first_s)}"),
            element("td", mark.lane, class_="left"),
            element("td", mark.text, class_="words bad" if mark.is_trouble else "words"),
        )
        for mark in newest
    ]
    troubles = supervisor.marks.troubles + learner.marks.troubles
    said = f"{total:,} events, {troubles:,} of them trouble" + (
        f"; the {left_out:,} oldest are not listed" if left_out else ""
    )
    table = element("table", element("tbody", rows))
    return [
        note(_refusals(gathered)) if learner.refused else None,
        element("figure", element("div", drawn, class_="wide")),
        diagrams.phase_legend(phases),
        element("details", element("summary", said), element("div", table, class_="wide")),
    ]


def _refusals(gathered: Gathered) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in gathered.learner.refused.most_common())
    total = sum(gathered.learner.refused.values())
    return f"{total:,} unrolls were refused ({reasons})."
