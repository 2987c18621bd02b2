"""The comparison on a console: figures of the episodes, the learned policy against each rival seed by seed."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest
from rich.console import Console

from esper_simic.comparison import interquartile_mean, mean_interval, paired
from supervisor.events import FIXED, PolicyEvaluated
from supervisor.results import number, regrets, result_table, show_results, verdict
from supervisor.standings import Row, chance, compare

SEED = 7
HARD = [0.0, 0.3, 0.6, 0.9, 4.0, 8.0]
"""How hard each seed is, for whoever is measured on it: most of what episodes differ by."""


def evaluated(
    policy: str, level: float, accuracy: float = 50.0, parameters: float = 100.0, wobble: float = 0.0
) -> PolicyEvaluated:
    """Six episodes that are all as hard for everybody; `wobble` moves every other one."""
    returns = tuple(level - hard + wobble * (-1) ** index for index, hard in enumerate(HARD))
    return PolicyEvaluated(
        at_s=1.0,
        policy=policy,
        returns=() if policy == FIXED else returns,
        accuracies=tuple(accuracy - hard for hard in HARD),
        parameters=(parameters,) * len(HARD),
        summary={},
    )


RESULTS = {
    one.policy: one
    for one in (
        evaluated("learned", 5.0, 80.0, 500.0),
        evaluated("heuristic", 4.5, 80.0, 900.0),
        evaluated("patient", 6.0, 85.0, 500.0),
        evaluated("random", 5.0, 40.0, 20.0, wobble=1.0),
        evaluated(FIXED, 0.0, 81.0, 500.0),
    )
}


def rows(results: dict[str, PolicyEvaluated] = RESULTS) -> list[Row]:
    found = {row.name: row for row in compare(results, SEED)}
    return [found[name] for name in results]


def shown(
    width: int = 400, results: dict[str, PolicyEvaluated] = RESULTS, order: tuple[str, ...] = ()
) -> str:
    out = io.StringIO()
    show_results(Console(force_terminal=False, file=out, width=width), results, SEED, order)
    return out.getvalue()


def cells_of(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("| ")
    ]


def words(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"[-+]?[\d.]+", text)]


def test_the_table_shows_policies_in_order_with_the_figures_of_their_episodes() -> None:
    head, *table = cells_of(shown(order=("never-grow", "patient", "learned")))
    assert head == ["policy", "return", "learned minus it", "host accuracy %", "parameters added"]
    assert [line[0] for line in table] == ["patient", "learned", "random", "heuristic", FIXED]
    for name, earned, ahead, accuracy, parameters in table:
        one = RESULTS[name]
        interval = mean_interval(one.accuracies)
        assert words(accuracy) == pytest.approx([interval.mean, interval.low, interval.high], abs=0.05)
        assert parameters == f"{one.parameters[0]:.0f} [{one.parameters[0]:.0f}, {one.parameters[0]:.0f}]"
        if name == FIXED:
            assert (earned, ahead) == ("-", "-")
            continue
        assert words(earned)[0] == pytest.approx(interquartile_mean(one.returns), abs=0.005)
        if name == "learned":
            assert ahead == "-"
            continue
        found = paired(RESULTS["learned"].returns, one.returns, rng=chance(SEED)).interquartile_mean
        assert words(ahead) == pytest.approx([found.value, found.low, found.high], abs=0.005)
    assert "6 held-out episodes each, same seeds; [95 % interval]" in shown()


def test_rivals_are_met_seed_by_seed_so_hard_seeds_hide_no_difference() -> None:
    """Half a point everywhere, where seeds differ by eight: the intervals of the returns overlap widely."""
    table = {line[0]: line for line in cells_of(shown())}
    (_, low, high), (_, other_low, other_high) = words(table["learned"][1]), words(table["heuristic"][1])
    assert low < other_high
    assert other_low < high
    assert table["heuristic"][2] == "+0.50 [+0.50, +0.50]"
    assert verdict(rows())[0] == (
        "learned against heuristic: higher in return; no clear difference in host accuracy; lower in parameters added"
    )


def test_the_verdict_names_each_rival_and_nothing_that_it_does_not_have() -> None:
    assert verdict(rows())[1:] == [
        "learned against patient: lower in return, host accuracy; no clear difference in parameters added",
        "learned against random: no clear difference in return; higher in host accuracy, parameters added",
        "learned against fixed-network: lower in host accuracy; no clear difference in parameters added",
    ]
    assert verdict(rows({"random": RESULTS["random"]})) == []


def test_where_the_best_is_known_everybody_has_a_regret() -> None:
    """In the mean, for returns of choices are skewed; without the best there is nothing to regret."""
    assert regrets(rows()) == []
    known = RESULTS | {"best-possible": evaluated("best-possible", 7.5, wobble=0.5)}
    hard = sum(HARD) / len(HARD)
    assert regrets(rows(known)) == [
        f"learned: mean return +{5 - hard:.3f}, mean regret 2.500",
        f"heuristic: mean return +{4.5 - hard:.3f}, mean regret 3.000",
        f"patient: mean return +{6 - hard:.3f}, mean regret 1.500",
        f"random: mean return +{5 - hard:.3f}, mean regret 2.500",
        f"best-possible: mean return +{7.5 - hard:.3f}, mean regret 0.000",
    ]
    assert "mean regret 2.500" in shown(results=known)


def test_the_table_is_at_most_110_columns_wide_and_ascii_off_a_terminal() -> None:
    wide = {
        name: evaluated(name, -10.5, 99.9, 2345.0, wobble=3.0)
        for name in ("learned", "fixed-schedule", FIXED, "never-grow")
    }
    text = shown(results=wide)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 110


def test_a_narrow_terminal_folds_the_table_and_loses_no_figure() -> None:
    out = io.StringIO()
    console = Console(force_terminal=True, file=out, width=50, height=40, _environ={"TERM": "xterm"})
    show_results(console, RESULTS, SEED)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "…" not in text
    for figure in ("+0.50", "900", "500", "fixed-netw"):
        assert figure in text


def test_one_episode_is_shown_without_an_interval_and_none_without_a_figure() -> None:
    few = [
        PolicyEvaluated(
            at_s=1.0, policy=name, returns=values, accuracies=values, parameters=values, summary={}
        )
        for name, values in (("learned", (2.5,)), ("odd", ()))
    ]
    table = cells_of(shown(results={one.policy: one for one in few}))
    assert table[1:] == [["learned", "2.50", "-", "2.5", "2"], ["odd", "-", "-", "-", "-"]]
    assert result_table([]).row_count == 0


def test_where_nothing_grows_there_are_returns_alone() -> None:
    played = {
        name: PolicyEvaluated(
            at_s=1.0, policy=name, returns=returns, accuracies=(), parameters=(), summary={}
        )
        for name, returns in (("learned", (500.0, 480.0, 500.0)), ("random", (22.0, 19.0, 31.0)))
    }
    text = shown(results=played)
    (head, *table) = cells_of(text)
    assert head == ["policy", "return", "learned minus it"]
    assert [line[0] for line in table] == ["learned", "random"]
    assert words(table[0][1])[0] == pytest.approx(interquartile_mean(played["learned"].returns), abs=0.005)
    assert "accuracy" not in text
    assert "parameters" not in text
    assert verdict(rows(played)) == ["learned against random: higher in return"]
    assert not any(row.is_on_front for row in rows(played)), "of accuracy against parameters"


def test_a_figure_that_one_policy_has_is_a_column_for_all() -> None:
    bare = PolicyEvaluated(
        at_s=1.0, policy="random", returns=(1.0, 2.0), accuracies=(), parameters=(), summary={}
    )
    (head, *table) = cells_of(shown(results={"learned": RESULTS["learned"], "random": bare}))
    assert head[3:] == ["host accuracy %", "parameters added"]
    assert table[1][3:] == ["-", "-"]


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [
        (-0.004, 2, "+", "0.00"),
        (-0.4, 0, "", "0"),
        (-0.006, 2, "", "-0.01"),
        (1.5, 1, "+", "+1.5"),
        (0.0, 1, "+", "0.0"),
    ],
)
def test_what_is_rounded_to_zero_has_no_sign(value: float, digits: int, sign: str, text: str) -> None:
    assert number(value, digits, sign) == text


def test_the_door_does_not_wait_for_the_statistics() -> None:
    """They are imported when there is something to compare."""
    program = "import sys, supervisor.cli; print({'scipy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
