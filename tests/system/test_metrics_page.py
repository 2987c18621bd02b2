"""What a run shows to Prometheus while it runs, and that every figure of every algorithm has a name."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from esper_simic.config import Config, parse
from esper_simic.telemetry import unknown
from supervisor import view
from supervisor.cli import _Display
from tests.known_answers.two_tasks import Staged, configured
from tests.supervisor.recorded_runs import training
from tests.supervisor.shown_runs import picture
from tests.system.driver import running, until

URL = re.compile(r"metrics are served on (http://127\.0\.0\.1:\d+/metrics)")

NAMES = (
    "simic_trainer_policy_loss",
    "simic_trainer_value_loss",
    "simic_trainer_grad_norm_bucket",
    "simic_trainer_training_duration_seconds_count",
    "simic_trainer_vtrace_duration_seconds_sum",
    "simic_trainer_conservative_mode_total",
    "simic_buffer_size",
    "simic_buffer_memory_bytes",
    "simic_trainer_learning_rate{",
    "simic_run_info{",
)
"""Some of each kind; the catalogue's own tests have all."""


def page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert answer.status == 200
        return str(answer.read().decode())


@pytest.mark.processes
@pytest.mark.timeout(300)
def test_a_run_is_to_be_seen_while_it_runs_and_one_without_a_port_goes_on(tmp_path: Path) -> None:
    with running(tmp_path / "seen", evaluation=False, supervisor__metrics_port=0) as run:
        shot = run.until_it_learns()
        until(lambda: URL.search(run.output), "the address")
        found = URL.search(run.output)
        assert found is not None
        url = found[1]
        until(lambda: "\nsimic_trainer_policy_loss" in page(url), "an update on the page")
        text = page(url)
        missing = [name for name in NAMES if f"\n{name}" not in text]
        assert missing == []
        shot = run.until_it_learns()
        assert f'run_id="{shot.run_id}"' in text
        assert unknown(shot.learner.metrics | shot.counters) == frozenset()
        port = re.search(r":(\d+)/", found[1])
        assert port is not None
        with running(
            tmp_path / "unseen", evaluation=False, supervisor__metrics_port=port[1], supervisor__max_updates=2
        ) as other:
            assert other.process.wait(200) == 0, other.output
            assert other.output.count("metrics are not served") == 1
            assert "the run goes on without" in " ".join(other.output.split())
        assert f'run_id="{shot.run_id}"' in page(found[1]), "still the first one's"
        run.interrupt()
        assert run.process.wait(200) is not None
    with pytest.raises(OSError, match="refused"):
        page(found[1])


def test_without_a_port_nothing_is_served(tmp_path: Path) -> None:
    limits = parse("supervisor: {metrics_port: null}").supervisor
    display = _Display(view.SteadyConsole(), tmp_path, limits)
    display(picture(training()))
    assert display._endpoint is None
    assert display._exporter is None
    display.close()


def imitating(**settings: Any) -> Config:
    return configured(curriculum_enabled=False, behaviour="random", **settings)


@pytest.mark.parametrize("algorithm", ["IMPALA", "PPO", "APPO", "BC", "IQL"])
@pytest.mark.parametrize("lora", [None, 2])
def test_every_figure_of_a_learner_has_a_row_in_the_catalogue(algorithm: str, lora: int | None) -> None:
    settings: dict[str, Any] = {"algorithm": algorithm, "lora_start_step": lora, "ewc_lambda": 0.5}
    loop = Staged(configured(**settings) if algorithm != "BC" else imitating(**settings))
    loop.turns(5)
    loop.learner.engine.consolidate(loop.learner._few_at_a_time(loop.newest(4)), loop.chance)
    loop.turns(2)
    assert loop.learner.steps_done > 3
    assert {"ewc_penalty", "grad_norm"} <= loop.metrics.keys()
    assert ("curriculum_stage" in loop.metrics) == (algorithm != "BC"), (
        "which has somebody else act in one stage"
    )
    assert unknown(loop.metrics | loop.learner.safety_figures()) == frozenset()
