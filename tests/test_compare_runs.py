"""The tables of finished runs: the kept run's policy and baselines, and what the tables say of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import compare_runs
from bench.compare_runs import POLICIES, main, measured_together, trained_run
from bench.comparison_tables import on_front, pooled_tables, run_tables
from esper_simic.comparison import bootstrap_interval, interquartile_mean, mean_interval, paired
from esper_simic.errors import ConfigError
from esper_simic.evaluation import (
    FIXED,
    LEARNED,
    EpisodeOutcome,
    PolicyOutcome,
    evaluate,
    held_out_seeds,
)

KEPT = Path(__file__).parent / "replay" / "run"
EPISODES = 4


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    shutil.copytree(KEPT, tmp_path / "kept")
    return tmp_path / "kept"


class InThisProcess:
    """Takes the place of the pool of workers: one after the other, here."""

    def __init__(self, *_: object, **__: object) -> None:
        self.submitted: list[tuple[Any, ...]] = []

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except ConfigError as error:
            future.set_exception(error)
        return future


def cells_of(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")
    ]


# Runs


def test_a_runs_newest_policy_meets_its_held_out_seeds(kept: Path) -> None:
    run = trained_run(kept)
    assert (run.checkpoint.name, run.updates) == ("step-000000000024-2", 24)
    learned, fixed = measured_together(run, (LEARNED, FIXED), EPISODES)
    (random,) = measured_together(run, ("random",), EPISODES)
    trainer, environment = run.config.simic_trainer, run.config.environment
    seeds = held_out_seeds(trainer.seed, EPISODES)
    for outcome in (learned, fixed, random):
        assert [episode.seed for episode in outcome.episodes] == seeds
    assert random == evaluate("random", environment, seeds, gamma=trainer.gamma)
    assert fixed == evaluate(FIXED, environment, seeds, gamma=trainer.gamma, reference=learned.episodes)


def test_the_command_prints_the_tables_of_each_run_and_of_all(
    kept: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_runs, "ProcessPoolExecutor", InThisProcess)
    asked = ("--episodes", str(EPISODES), "--policies", "never-grow,fixed-network")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main([str(kept), str(kept), *asked]) == 0
    said = capsys.readouterr()
    title = "### kept, seed 0: digits, host rescue (update 24, 340 environment steps)"
    assert said.out.count(title) == 2
    assert "### All 2 runs together" in said.out
    names = [line[0] for line in cells_of(said.out)]
    assert names[2:5] == [LEARNED, "never-grow", FIXED], "the learned policy is always among them"
    assert said.err.count("kept never-grow: ") == 2


def test_a_policy_moves_to_another_task(kept: Path) -> None:
    moved = trained_run(kept, ["environment.task=mnist1d", "environment.host=series"])
    assert moved.name.startswith("kept, seed 0: mnist1d, host series (")
    assert moved.name.endswith(", trained on digits, host rescue)")
    (learned,) = measured_together(moved, (LEARNED,), 2)
    (at_home,) = measured_together(trained_run(kept), (LEARNED,), 2)
    assert learned.accuracy != at_home.accuracy


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("simic_trainer.seed=3", "not to 'simic_trainer.seed=3'"),
        (
            "environment.slots=[r0c0]",
            "acts on the 3 slots r0c0, r0c1, r0c2; give the other environment as many",
        ),
        ("environment.host=mlp", "host 'mlp' takes samples of kind 'vector'"),
        ("environment.tusk=wine", "unknown key"),
    ],
)
def test_where_a_policy_cannot_act_it_is_not_moved(
    kept: Path,
    assignment: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare_runs, "ProcessPoolExecutor", None)  # no worker is started for it
    assert main([str(kept), "--set", assignment]) == 78
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err


def test_what_is_no_run_or_has_no_policy_is_named(kept: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere holds no run"):
        trained_run(tmp_path / "nowhere")
    shutil.rmtree(kept / "checkpoints")
    with pytest.raises(ConfigError, match="kept has no checkpoint yet"):
        trained_run(kept)


@pytest.mark.parametrize("arguments", [("--policies", "greedy"), ("--episodes", "1"), ()])
def test_a_wrong_use_is_told(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*(["run"] if arguments else []), *arguments])
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


# Tables


def outcome(name: str, level: float, accuracy: float, parameters: int, seed: int = 0) -> PolicyOutcome:
    """Eight episodes around a level, as hard for everybody."""
    hard = np.random.default_rng(seed).normal(0, 2, 8)
    episodes = [
        EpisodeOutcome(
            seed=index,
            episode_return=None if name == FIXED else level + value,
            accuracy=accuracy + value,
            parameters_added=parameters,
            fossils=0,
            grown=(),
        )
        for index, value in enumerate(hard.tolist())
    ]
    returns = [] if name == FIXED else [level + value for value in hard.tolist()]
    accuracies, added = [one.accuracy for one in episodes], [float(parameters)] * 8
    rng = np.random.default_rng
    return PolicyOutcome(
        name=name,
        episodes=episodes,
        episode_return=mean_interval(returns) if returns else None,
        accuracy=mean_interval(accuracies),
        parameters_added=mean_interval(added),
        episode_return_middle=bootstrap_interval([returns], rng=rng(0)) if returns else None,
        accuracy_middle=bootstrap_interval([accuracies], rng=rng(0)),
        parameters_added_middle=bootstrap_interval([added], rng=rng(0)),
    )


def made(*levels: tuple[str, float, float, int], seed: int = 0) -> dict[str, PolicyOutcome]:
    return {name: outcome(name, level, accuracy, cost, seed) for name, level, accuracy, cost in levels}


MEASURED = (
    (LEARNED, 5.0, 60.0, 200),
    ("heuristic", 3.0, 40.0, 100),
    ("patient", 4.0, 59.0, 300),
    (FIXED, 0.0, 70.0, 200),
)


def test_a_table_holds_the_figures_and_who_is_on_the_front_of_what_grows() -> None:
    outcomes = made(*MEASURED)
    table, differences = run_tables("x", outcomes).split("seed by seed:")
    rows = {line[0]: line[1:] for line in cells_of(table)}
    middle = outcomes[LEARNED].episode_return_middle
    assert middle is not None
    assert rows[LEARNED][0] == f"{middle.value:.2f} [{middle.low:.2f}, {middle.high:.2f}]"
    assert rows[LEARNED][4] == "200 [200, 200]"
    assert {name: line[-1] for name, line in rows.items() if name in outcomes} == {
        LEARNED: "yes",
        "heuristic": "yes",
        "patient": "no",
        FIXED: "–",
    }
    assert rows[FIXED][:2] == ["–", "–"]
    against = {line[0]: line[1:] for line in cells_of(differences)}
    assert against["heuristic"][0] == "+2.00 [+2.00, +2.00]", "on the same seeds nothing else differs"
    assert against["patient"][3:] == ["+1.0 [+1.0, +1.0]", "−100 [−100, −100]"]
    assert against[FIXED] == ["–", "–", "–", "−10.0 [−10.0, −10.0]", "0 [0, 0]"]


def test_runs_are_pooled_with_how_they_differ_kept_out_of_chance() -> None:
    runs = [made(*MEASURED), made((LEARNED, 25.0, 60.0, 200), *MEASURED[1:], seed=1)]
    table, differences = pooled_tables(runs).split("seed by seed;")
    rows = {line[0]: line[1:] for line in cells_of(table)}
    values = [[one.episode_return for one in run[LEARNED].episodes] for run in runs]
    whole = interquartile_mean([value for run in values for value in run if value is not None])
    assert rows[LEARNED][0].startswith(f"{whole:.2f} [")
    assert rows[FIXED][0] == "–"
    against = {line[0]: line[1:] for line in cells_of(differences)}
    # 2 more in each episode of one run and 22 of the other: drawn within runs, the mean is always 12.
    assert against["heuristic"][3] == "+12.00 [+12.00, +12.00]"
    assert against["heuristic"][4] == "2 of 2"
    assert against[FIXED][-2:] == ["–", "–"]


def test_only_an_interval_wholly_above_counts_as_such() -> None:
    near, far = (
        made((LEARNED, 5.0, 60.0, 1), ("heuristic", 4.9, 60.0, 1)),
        made((LEARNED, 50.0, 60.0, 1), ("heuristic", 4.9, 60.0, 1)),
    )
    against = {line[0]: line[1:] for line in cells_of(pooled_tables([near, far]))}
    assert against["heuristic"][-2:] == ["2 of 2", "1 of 2"]


def test_a_policy_alone_is_on_its_front() -> None:
    assert on_front({LEARNED: (50.0, 10.0), FIXED: (90.0, 10.0)}) == {LEARNED: "yes", FIXED: "–"}
    assert "seed by seed" not in run_tables("x", made(MEASURED[0]))


def test_paired_figures_are_those_of_the_comparison() -> None:
    ours, theirs = made(*MEASURED)[LEARNED], outcome("heuristic", 3.0, 40.0, 100, seed=9)
    found = cells_of(run_tables("x", {LEARNED: ours, "heuristic": theirs}))[-1]
    pairs = [
        (one.episode_return, other.episode_return)
        for one, other in zip(ours.episodes, theirs.episodes, strict=True)
    ]
    first, second = zip(*pairs, strict=True)
    expected = paired(first, second, rng=np.random.default_rng(0))
    assert found[1].startswith(f"+{expected.interquartile_mean.value:.2f} [")
    assert found[3].startswith(f"{expected.probability.value:.2f} [")


def test_every_policy_has_its_place() -> None:
    assert POLICIES[0] == LEARNED
    assert POLICIES[-1] == FIXED
    assert len(set(POLICIES)) == 8
