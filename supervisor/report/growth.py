"""One host that was grown: drawn, and the lives of its seeds."""

from __future__ import annotations

from collections.abc import Sequence

from esper_simic.growing_host.lifelines import Lifeline
from esper_simic.lifecycle import SeedStage
from supervisor.report import diagrams
from supervisor.report.choice import SeenEpisode
from supervisor.report.gather import Gathered
from supervisor.report.markup import Content, Markup, element, fixed, note


def growth(gathered: Gathered, seen: SeenEpisode | str) -> Content:
    """The section of the grown host; without an episode it says why there is none."""
    if isinstance(seen, str):
        return note(seen)
    lifeline, choice = seen.lifeline, seen.choice
    names = _slot_names(gathered, len(lifeline.slot_layer))
    planted = [
        diagrams.Planted(
            name,
            lifeline.slot_layer[slot],
            SeedStage(int(lifeline.stage[-1, slot])),
            str(lifeline.blueprint[-1, slot]),
            float(lifeline.alpha[-1, slot]),
            seen.seed_parameters[slot],
        )
        for slot, name in enumerate(names)
    ]
    episode = choice.episode
    where = f"actor {choice.actor}, lane {choice.lane}"
    epochs = len(lifeline.stage)
    if episode is None:
        text = f"The episode under way in {where}, {epochs} epochs seen so far: none stands whole in the journal yet."
    else:
        text = (
            f"The newest whole training episode ({where}, episode {episode.number}; of those that ended with it the "
            f"most accurate). It came to a return of {fixed(episode.episode_return, 2)} and {episode.accuracy:.1f} % "
            f"with {episode.parameters_added:,} parameters added and {episode.fossils} fossilised seeds. Drawn as the "
            f"controller saw it before its last epoch."
        )
    used = {span.stage for span in lifeline.spans()}
    source = gathered.setting("environment", "task")
    return [
        note(text),
        element(
            "figure",
            element(
                "div",
                diagrams.host_diagram(
                    lifeline.layers, planted, source if isinstance(source, str) else "input"
                ),
                class_="wide",
            ),
        ),
        element("h3", "Its seeds in the course of the episode"),
        element("figure", element("div", diagrams.lives_chart(lifeline, names), class_="wide")),
        diagrams.stage_legend([stage for stage in diagrams.STAGES if stage in used]),
        note(
            "The line in a row is alpha: how far the seed is blended in, from 0 at the bottom to 1 at the top."
        ),
        _lives_table(lifeline, names),
    ]


def _slot_names(gathered: Gathered, count: int) -> list[str]:
    names = gathered.setting("environment", "slots")
    if isinstance(names, list | tuple) and len(names) == count:
        return [str(name) for name in names]
    return [f"slot {index}" for index in range(count)]


def _lives_table(lifeline: Lifeline, names: Sequence[str]) -> Markup:
    """The same in figures, for who cannot see the picture."""
    body = [
        element(
            "tr",
            element("th", names[span.slot], scope="row"),
            element("td", span.blueprint or "–", class_="left"),
            element("td", span.stage.name.lower(), class_="left"),
            element("td", f"{span.start}–{span.stop}"),
        )
        for span in lifeline.spans()
    ]
    heads = [
        element("th", name, scope="col", class_="left") for name in ("slot", "blueprint", "stage", "epochs")
    ]
    table = element("table", element("thead", element("tr", heads)), element("tbody", body))
    return element("details", element("summary", "as a table"), element("div", table, class_="wide"))
