"""The evaluator's main in a thread, told what to measure as a supervisor tells it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from esper_simic.comparison import interquartile_mean, mean_interval
from esper_simic.config import Config
from esper_simic.errors import ContractError
from esper_simic.evaluation import (
    FIXED,
    LEARNED,
    EpisodeOutcome,
    PolicyOutcome,
    baseline_names,
    evaluate,
    held_out_seeds,
)
from supervisor import events
from supervisor.bus import Received, Server, ipc_endpoint, runtime_directory
from supervisor.cli import EVALUATED
from supervisor.protocol import ACCEPTS, Evaluate, Evaluated, Message, Noted, Progress, Ready, Stop, Stopped
from supervisor.roles import evaluate as role
from tests.roles.bench import RUN_ID, bench, make_config, spec_of

DEADLINE_S = 60.0
EPISODES = 3
SMALL = (
    "environment.environments_per_actor=2",
    "environment.max_epochs=6",
    "environment.training_epochs_min=2",
    "environment.train_batches=1",
    "environment.train_batch_size=4",
    "environment.validation_samples=20",
)


class Evaluator:
    """An evaluator in a thread, and the supervisor's end of its line."""

    def __init__(self, server: Server, endpoint: str, run_dir: Path, config: Config) -> None:
        self.server = server
        self.heard: list[Message] = []
        self.error: Exception | None = None
        spec = spec_of("evaluate", 0, run_dir, config, {"control": endpoint})

        def live() -> None:
            try:
                role.main(spec)
            except Exception as error:  # noqa: BLE001 - handed to the test
                self.error = error

        self.thread = threading.Thread(target=live, daemon=True)
        self.thread.start()

    def until(self, condition: Callable[[], object]) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            received = self.server.receive()
            if isinstance(received, Received):
                self.heard.append(received.message)
                if isinstance(received.message, Evaluated | Stopped):
                    self.server.send(received.peer, Noted(of=type(received.message).__name__))
            else:
                time.sleep(0.002)
            assert time.monotonic() < deadline_s, self.error

    def measure(self, policy: str, checkpoint: str = "") -> Evaluated:
        self.until(lambda: any(isinstance(message, Ready) for message in self.heard))
        count = len(self.outcomes())
        self.server.send("evaluate-0-1", Evaluate(policy=policy, episodes=EPISODES, checkpoint=checkpoint))
        self.until(lambda: len(self.outcomes()) > count or not self.thread.is_alive())
        if self.error is not None:
            raise self.error
        return self.outcomes()[-1]

    def outcomes(self) -> list[Evaluated]:
        return [message for message in self.heard if isinstance(message, Evaluated)]

    def stop(self) -> None:
        self.server.send("evaluate-0-1", Stop(reason="evaluation finished"))
        self.until(lambda: not self.thread.is_alive())


@pytest.fixture
def config() -> Config:
    return make_config(*SMALL)


@pytest.fixture
def evaluator(tmp_path: Path, config: Config) -> Iterator[Evaluator]:
    with runtime_directory() as sockets:
        endpoint = ipc_endpoint(sockets, "control")
        with Server(endpoint, run_id=RUN_ID, accepts=ACCEPTS["control"], frame_bytes_max=2**20) as server:
            made = Evaluator(server, endpoint, tmp_path, config)
            yield made
            if made.thread.is_alive():
                made.stop()


def test_a_baseline_is_measured_on_the_held_out_seeds_of_the_run(
    evaluator: Evaluator, config: Config
) -> None:
    told = evaluator.measure("heuristic")
    trainer = config.simic_trainer
    seeds = held_out_seeds(trainer.seed, EPISODES)
    expected = evaluate("heuristic", config.environment, seeds, gamma=trainer.gamma)
    assert told.policy == "heuristic"
    assert told.returns == tuple(episode.episode_return for episode in expected.episodes)
    assert told.accuracies == tuple(episode.accuracy for episode in expected.episodes)
    assert told.parameters == tuple(float(episode.parameters_added) for episode in expected.episodes)
    for name, values in (
        ("return", told.returns),
        ("accuracy", told.accuracies),
        ("parameters", told.parameters),
    ):
        interval = mean_interval(values)
        summary = (told.summary[f"{name}_mean"], told.summary[f"{name}_low"], told.summary[f"{name}_high"])
        assert summary == (interval.mean, interval.low, interval.high)
        assert told.summary[f"{name}_iqm"] == interquartile_mean(values)
        assert (
            told.summary[f"{name}_iqm_low"] <= told.summary[f"{name}_iqm"] <= told.summary[f"{name}_iqm_high"]
        )


def test_all_that_a_run_orders_can_be_measured() -> None:
    assert (events.LEARNED, events.FIXED) == (LEARNED, FIXED)
    assert sorted(EVALUATED) == sorted((LEARNED, FIXED, *baseline_names()))


def test_it_measures_one_after_the_other_and_leaves_in_order(evaluator: Evaluator) -> None:
    assert [evaluator.measure(name).policy for name in ("never-grow", "random")] == ["never-grow", "random"]
    evaluator.stop()
    assert evaluator.error is None
    assert isinstance(evaluator.heard[0], Ready)
    assert evaluator.heard[-1] == Stopped(role="evaluate", index=0, incarnation=1)


def test_progress_is_reported_within_a_task(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation may take longer than the patience with a child that does nothing."""
    monkeypatch.setattr("supervisor.roles.channel.PROGRESS_INTERVAL_S", 0.0)
    evaluator.measure("never-grow")
    work = [
        message.work
        for message in evaluator.heard
        if isinstance(message, Progress) and not message.waiting_for
    ]
    assert work == sorted(set(work)), "every report tells of more"
    chunks = 2  # three episodes in vectors of two
    assert work[-1] == chunks * 6


def test_the_learned_policy_comes_from_its_checkpoint(
    tmp_path: Path, evaluator: Evaluator, config: Config
) -> None:
    with bench(tmp_path / "learner", *SMALL) as held:
        saved = held.checkpointer.save(held.loop.learner)
        told = evaluator.measure(LEARNED, saved.path)
        trainer = config.simic_trainer
        expected = evaluate(
            LEARNED,
            config.environment,
            held_out_seeds(trainer.seed, EPISODES),
            gamma=trainer.gamma,
            policy=held.loop.learner.policy,
        )
        assert told.returns == tuple(episode.episode_return for episode in expected.episodes)


def test_fixed_networks_are_those_that_the_learned_policy_grows(
    tmp_path: Path, evaluator: Evaluator, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They earn nothing, so neither the returns nor the summary say anything of returns."""
    measured: list[tuple[str, list[EpisodeOutcome] | None]] = []

    def noted(
        name: str, *arguments: Any, reference: list[EpisodeOutcome] | None, **named: Any
    ) -> PolicyOutcome:
        measured.append((name, reference))
        return evaluate(name, *arguments, reference=reference, **named)

    monkeypatch.setattr(role, "evaluate", noted)
    with bench(tmp_path / "learner", *SMALL) as held:
        saved = held.checkpointer.save(held.loop.learner)
        told = evaluator.measure(FIXED, saved.path)
        trainer = config.simic_trainer
        seeds = held_out_seeds(trainer.seed, EPISODES)
        grown = evaluate(
            LEARNED, config.environment, seeds, gamma=trainer.gamma, policy=held.loop.learner.policy
        )
        expected = evaluate(FIXED, config.environment, seeds, gamma=trainer.gamma, reference=grown.episodes)
    assert measured == [(LEARNED, None), (FIXED, grown.episodes)]
    assert told.policy == FIXED
    assert told.returns == ()
    assert told.accuracies == tuple(episode.accuracy for episode in expected.episodes)
    assert told.parameters == tuple(float(episode.parameters_added) for episode in expected.episodes)
    assert not [name for name in told.summary if name.startswith("return")]
    assert told.summary["accuracy_iqm"] == interquartile_mean(told.accuracies)


@pytest.mark.parametrize("policy", [LEARNED, FIXED])
def test_without_its_checkpoint_the_learned_policy_is_not_measured(
    evaluator: Evaluator, tmp_path: Path, policy: str
) -> None:
    with pytest.raises(ContractError, match=r"manifest\.json"):
        evaluator.measure(policy, str(tmp_path / "nowhere"))
