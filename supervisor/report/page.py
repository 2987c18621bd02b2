"""The page of a run: one HTML document that needs nothing beside it, section by section.

A section that has nothing to show says what is missing, and why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import resources
from typing import Final

from supervisor.outcome import needs_order
from supervisor.report.choice import SeenEpisode
from supervisor.report.gather import Gathered
from supervisor.report.growth import growth
from supervisor.report.happenings import happenings
from supervisor.report.learning import learning
from supervisor.report.markup import Content, Markup, duration, element, note, utc
from supervisor.report.policies import comparison, front
from supervisor.standings import Row, compare

STYLE: Final = resources.files("supervisor.report") / "page.css"

POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""What a browser may do for this page: nothing but show it."""


def page(gathered: Gathered, seen: SeenEpisode | str) -> str:
    """The whole document.

    Args:
        gathered: What the journals tell.
        seen: An episode to look at, or why there is none.
    """
    rows = compare(gathered.supervisor.state.evaluations, gathered.run_seed)
    body = [
        _header(gathered),
        _section("learning", "Learning", learning(gathered)),
        _section("comparison", "Comparison", comparison(gathered, rows)),
        *(_of_hosts(gathered, rows, seen) if gathered.grows_hosts else ()),
        _section("events", "What happened", happenings(gathered)),
        _section("about", "About this run", _about(gathered)),
    ]
    title = f"Simic run {gathered.run_id}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="generator", content="simic-supervisor report"),
        element("title", title),
        element("style", Markup(STYLE.read_text("utf-8"))),
    )
    document = element("html", head, element("body", body, _footer(gathered)), lang="en")
    return f"<!doctype html>\n{document}\n"


def _of_hosts(gathered: Gathered, rows: Sequence[Row], seen: SeenEpisode | str) -> list[Markup]:
    """What there is to say where hosts grow; other worlds have neither accuracy nor parameters."""
    return [
        _section("front", "Accuracy against parameters", front(gathered, rows)),
        _section("host", "A grown host", growth(gathered, seen)),
    ]


def _section(anchor: str, title: str, content: Content) -> Markup:
    return element("section", element("h2", title), content, id=anchor)


# What the run is


def _header(gathered: Gathered) -> list[Markup]:
    state, learner, configured = (
        gathered.supervisor.state,
        gathered.learner,
        gathered.supervisor.configured,
    )
    good = {"finished": "good", "failed": "bad", "died": "bad"}
    class_ = f"state {good.get(gathered.state, 'live' if gathered.is_living else 'note')}"
    facts: list[tuple[str, Content]] = [
        ("preset", configured.preset if configured else "not known"),
        ("began", utc(gathered.first_s)),
        ("newest record", utc(gathered.last_s)),
        ("environment steps", f"{learner.environment_steps:,}"),
        ("updates", f"{learner.step:,}"),
        ("whole episodes", f"{learner.whole_episodes:,}"),
    ]
    if math.isfinite(gathered.first_s):
        facts.insert(3, ("in all", duration(gathered.last_s - gathered.first_s)))
    if state.resumes:
        facts.append(("resumed", f"{state.resumes} times" if state.resumes > 1 else "once"))
    if learner.kinds["LearnerRecovered"]:
        facts.append(("learner came back", f"{learner.kinds['LearnerRecovered']:,} times"))
    reason = state.finished.reason if state.finished else state.failure
    return [
        element(
            "header",
            element(
                "h1",
                "Run ",
                element("bdi", gathered.run_id),
                " ",
                element("span", gathered.state, class_=class_),
            ),
            element("p", element("bdi", reason)) if reason else None,
            element(
                "dl",
                [
                    element("div", element("dt", name), element("dd", element("bdi", value)))
                    for name, value in facts
                ],
            ),
        ),
        *_warnings(gathered),
    ]


def _warnings(gathered: Gathered) -> list[Markup]:
    found = [
        f"Not everything could be read: {damage}. What stands before it is shown."
        for damage in gathered.damage
    ]
    unread = gathered.supervisor.unread + gathered.learner.unread
    if unread:
        found.append(f"{unread:,} records are of another version and were passed over.")
    if gathered.state == "died":
        order = " --train-on" if needs_order(gathered.supervisor.state) else ""
        found.append(
            "The run's supervisor died before the run came to its end: "
            f"simic-supervisor run --resume RUN{order} goes on."
        )
    if gathered.supervisor.state.started is None:
        found.append("The supervisor's journal holds no record: nobody wrote down how the run was begun.")
    return [element("p", text, class_="warning") for text in found]


# About


def _about(gathered: Gathered) -> Content:
    configured, learner = gathered.supervisor.configured, gathered.learner
    versions = configured.versions if configured else {}
    fingerprint = {**(configured.fingerprint if configured else {}), **learner.fingerprint}
    text = configured.config_text if configured else ""
    kinds = {name: f"{count:,}" for name, count in sorted(learner.kinds.items())}
    return [
        element("h3", "Versions"),
        _facts(versions),
        element(
            "details",
            element("summary", "fingerprint: what must be equal for bits to be equal"),
            _facts(fingerprint),
        ),
        element("details", element("summary", "records of the learner's journal"), _facts(kinds)),
        element("details", element("summary", "configuration"), element("pre", text)) if text else None,
    ]


def _facts(facts: dict[str, str]) -> Markup:
    if not facts:
        return note("none written down")
    items = [
        element("div", element("dt", name), element("dd", element("bdi", str(value))))
        for name, value in facts.items()
    ]
    return element("dl", items)


def _footer(gathered: Gathered) -> Markup:
    text = f"Made by simic-supervisor report from the journals in {gathered.directory}, up to {utc(gathered.last_s)}."
    return element("footer", note(text))
