"""`simic-supervisor run`: options, going on with runs, what it shows meanwhile and at the end."""

from __future__ import annotations

import io
import socket
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import yaml
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from esper_simic.config import Config, SupervisorConfig
from esper_simic.errors import ConfigError, UnavailableError
from supervisor import cli, status
from supervisor.cli_common import USAGE
from supervisor.events import CheckpointReported, RunStarted
from supervisor.loop import RunFacts
from supervisor.outcome import RunOutcome
from supervisor.state import Phase
from supervisor.vitals import EnvironmentView, LearnerView
from tests.supervisor.doors import Door, open_door
from tests.supervisor.recorded_runs import (
    finished,
    record,
    spoil,
    training,
)
from tests.supervisor.shown_runs import measured, picture


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Door:
    return open_door(monkeypatch, capsys, tmp_path / "cwd")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return record(tmp_path / "run", finished().events)


class Supervision(NamedTuple):
    directory: Path
    config: Config
    facts: RunFacts


OUTCOME = RunOutcome(
    run_id="run-1",
    exit_code=0,
    outcome="finished",
    reason="the run is complete",
    evaluations={"random": measured("random", 3.0), "learned": measured("learned", 9.0)},
    checkpoint=CheckpointReported(
        at_s=1.0, path="checkpoints/step-7", learner_step=7, environment_steps=70, digest="abc"
    ),
)


@pytest.fixture
def supervision(monkeypatch: pytest.MonkeyPatch) -> list[Supervision]:
    """Instead of processes: three snapshots for the observer, then the outcome."""
    calls: list[Supervision] = []

    def supervise(
        directory: Path, config: Config, facts: RunFacts, *, clock: object, observer: Any
    ) -> RunOutcome:
        calls.append(Supervision(directory, config, facts))
        observer(picture(training(), state=str(Phase.STARTING)))
        assert not (directory / "tensorboard").exists(), "nothing to draw before the first update"
        for step in (1, 2):
            learner = LearnerView(step=step, metrics={"entropy": 1.0 / step})
            observer(picture(training(), learner=learner, environment=EnvironmentView(steps=64 * step)))
        return OUTCOME

    monkeypatch.setattr(cli, "supervise", supervise)
    return calls


def test_run_obeys_its_options_and_reports(
    door: Door, supervision: list[Supervision], tmp_path: Path
) -> None:
    Path("mine.yaml").write_text("simic_trainer: {seed: 1, unroll_length: 5}\n")
    said = door(
        *("run", "--run-dir", tmp_path / "deep" / "run", "--config", "mine.yaml", "--seed", "7"),
        *("--max-seconds", "12.5", "--max-steps", "900", "--set", "supervisor.num_actors=1"),
    )
    assert (said.code, said.err) == (0, "")
    (call,) = supervision
    trainer, limits = call.config.simic_trainer, call.config.supervisor
    assert (trainer.seed, trainer.unroll_length) == (7, 5)
    assert (limits.max_seconds, limits.max_steps, limits.num_actors) == (12.5, 900, 1)
    assert yaml.safe_load(call.facts.config_text) == call.config.model_dump(mode="json")
    assert call.facts.evaluation_policies == cli.EVALUATED
    assert cli.EVALUATED[:3] == ("learned", "fixed-network", "heuristic")
    assert set(call.facts.versions) >= {"simic", "torch", "pyzmq"}
    text = " ".join(said.out.split())
    learned, rival = (
        "| learned | 9.00 [9.00, 9.00] | - |",
        "| random | 3.00 [3.00, 3.00] | +6.00 [+6.00, +6.00] |",
    )
    assert text.index(learned) < text.index(rival)
    assert "learned against random: higher in return, host accuracy, parameters added" in text
    assert "run run-1 finished: the run is complete" in text
    again = next(line.strip() for line in said.out.splitlines() if "run --preset" in line)
    assert again.startswith("simic-supervisor run --preset digits --seed 8 --config mine.yaml --set ")
    for given in ("supervisor.num_actors=1", "supervisor.max_seconds=12.5", "supervisor.max_steps=900"):
        assert f" --set {given}" in again, "another run like it has the same keys"
    assert "simic_trainer.seed" not in text, "the next seed is another one"


def test_run_says_when_the_return_reached_its_last_height(
    door: Door, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def supervise(directory: Path, *_: object, observer: Any, **__: object) -> RunOutcome:
        observer(picture(training(), learner=LearnerView(step=1, metrics={"convergence_hours": 1.25})))
        return OUTCOME

    monkeypatch.setattr(cli, "supervise", supervise)
    said = door("run", "--run-dir", tmp_path / "run", "--set", "simic_trainer.convergence_time_hours=3")
    text = " ".join(said.out.split())
    assert "last new height after 1.25 h of training (convergence_time_hours: 3)" in text


def test_run_hands_on_that_a_training_is_to_go_on(
    door: Door, supervision: list[Supervision], tmp_path: Path
) -> None:
    door("run", "--run-dir", tmp_path / "one", "--train-on")
    door("run", "--run-dir", tmp_path / "other")
    assert [call.facts.trains_on for call in supervision] == [True, False]


def test_run_writes_scalars_for_every_step_once(
    door: Door, supervision: list[Supervision], tmp_path: Path
) -> None:
    door("run", "--run-dir", tmp_path / "run")
    reader = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    reader.Reload()
    assert [(event.step, event.value) for event in reader.Scalars("losses/entropy")] == [
        (64, 1.0),
        (128, 0.5),
    ]
    assert [event.step for event in reader.Scalars("charts/SPS")] == [64, 128]


def test_run_that_goes_on_says_so_and_draws_only_what_is_new(
    door: Door, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def supervise(directory: Path, *_: object, observer: Any, **__: object) -> RunOutcome:
        for step in (40, 40, 41):
            learner = LearnerView(step=step, before=40, metrics={"entropy": 1.0})
            shot = picture(
                training(), learner=learner, environment=EnvironmentView(steps=10 * step), resumes=1
            )
            shot = msgspec.structs.replace(shot, execution="cpu: adam fused, compile none")
            observer(shot)
            assert (directory / "tensorboard").exists() == (step > 40)
        return OUTCOME

    monkeypatch.setattr(cli, "supervise", supervise)
    said = door("run", "--run-dir", tmp_path / "run")
    assert said.out.count("going on with run run-1\n") == 1
    assert said.out.count("the learner computes on cpu: adam fused, compile none\n") == 1
    reader = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in reader.Scalars("losses/entropy")] == [410]


def test_a_taken_port_is_told_once_and_so_is_when_it_was_had(tmp_path: Path) -> None:
    out = io.StringIO()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        display = cli._Display(Console(file=out), tmp_path, SupervisorConfig(metrics_port=port))
        for elapsed_s in (1.0, 2.0, 15.0):
            display(picture(training(), elapsed_s=elapsed_s))
    display(picture(training(), elapsed_s=30.0))
    display(picture(training(), elapsed_s=45.0))
    display.close()
    told = [line for line in out.getvalue().splitlines() if "metrics are" in line]
    assert len(told) == 2
    assert told[0].startswith(f"metrics are not served: 127.0.0.1:{port} cannot be had")
    assert told[1] == f"metrics are served on http://127.0.0.1:{port}/metrics now"


def test_a_disk_that_does_not_take_the_scalars_ends_no_run(
    door: Door, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def supervise(directory: Path, *_: object, observer: Any, **__: object) -> RunOutcome:
        (directory / "tensorboard").touch()
        for step, elapsed_s in ((1, 10.0), (2, 39.0), (3, 41.0), (4, 70.0), (5, 71.0)):
            if step == 4:
                (directory / "tensorboard").unlink()
            learner = LearnerView(step=step, metrics={"entropy": 1.0})
            environment = EnvironmentView(steps=10 * step)
            observer(picture(training(), learner=learner, environment=environment, elapsed_s=elapsed_s))
        return OUTCOME

    monkeypatch.setattr(cli, "supervise", supervise)
    said = door("run", "--run-dir", tmp_path / "run")
    assert said.code == 0
    assert said.out.count("cannot write scalars to ") == 2, "tried again after 30 s"
    reader = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in reader.Scalars("losses/entropy")] == [50]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--preset", "digits"), "--preset"),
        (("--config", "mine.yaml"), "--config"),
        (("--run-dir", "elsewhere"), "--run-dir"),
        (("--restart-behavior", "overwrite"), "--restart-behavior"),
        (("--run-dir", "a", "--restart-behavior", "restart"), "--run-dir, --restart-behavior"),
    ],
)
def test_resume_takes_the_runs_own_directory_and_configuration(
    door: Door, supervision: list[Supervision], run_dir: Path, options: tuple[str, ...], named: str
) -> None:
    said = door("run", "--resume", run_dir, *options)
    assert (said.code, said.out, supervision) == (USAGE, "", [])
    assert said.err.endswith(f"under its own configuration: leave out {named}\n")


def begun(directory: Path, **trainer: Any) -> Path:
    """A run of another preset and with other keys than the default."""
    config = Config.model_validate({"simic_trainer": {"seed": 5} | trainer, "supervisor": {"num_actors": 4}})
    first, *others = training().events
    assert isinstance(first, RunStarted)
    text = yaml.safe_dump(config.model_dump(mode="json"))
    own = {"preset": "digits-spec", "config_text": text, "config": config.model_dump(mode="json")}
    return record(directory, [msgspec.structs.replace(first, **own), *others])


def test_resume_goes_on_under_the_runs_own_configuration(
    door: Door, supervision: list[Supervision], tmp_path: Path
) -> None:
    run_dir = begun(tmp_path / "run")
    said = door("run", "--resume", run_dir, "--max-seconds", "7", "--set", "supervisor.stop_timeout_s=3")
    assert (said.code, said.err) == (0, "")
    (call,) = supervision
    assert (call.directory, call.facts.preset) == (run_dir, "digits-spec")
    limits = call.config.supervisor
    assert (call.config.simic_trainer.seed, limits.num_actors) == (5, 4)
    assert (limits.max_seconds, limits.stop_timeout_s) == (7.0, 3.0)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (("--seed", "6"), "simic_trainer.seed was 5, now 6"),
        (("--set", "simic_trainer.gamma=0.95"), "simic_trainer.gamma was "),
        (("--set", "supervisor.lockstep=true"), "supervisor.lockstep was False, now True"),
        (("--set", "supervisor.actors=1"), "supervisor.actors: unknown key"),
    ],
)
def test_resume_under_what_would_be_another_run_is_refused(
    door: Door, supervision: list[Supervision], tmp_path: Path, options: tuple[str, ...], key: str
) -> None:
    said = door("run", "--resume", begun(tmp_path / "run"), *options)
    assert (said.code, said.out, supervision) == (78, "", [])
    assert key in said.err
    assert len(said.err.splitlines()) == 1


def test_there_must_be_something_to_resume(
    door: Door, supervision: list[Supervision], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "empty", tmp_path / "nowhere"):
        said = door("run", "--resume", directory)
        assert (said.code, said.err) == (4, f"simic-supervisor: {directory} holds no run to resume\n")
    assert supervision == []
    spoil(damaged := begun(tmp_path / "run"))
    said = door("run", "--resume", damaged)
    assert (said.code, supervision) == (78, [])
    assert "is damaged at byte" in said.err
    assert len(said.err.splitlines()) == 1


def test_what_becomes_of_a_run_that_is_there_can_be_said(
    door: Door, supervision: list[Supervision], tmp_path: Path
) -> None:
    run_dir = begun(tmp_path / "run")
    said = door("run", "--run-dir", run_dir, "--restart-behavior", "maybe")
    assert (said.code, said.out) == (USAGE, "")
    assert "--restart-behavior is resume or restart or overwrite, not 'maybe'" in said.err
    said = door("run", "--run-dir", run_dir, "--restart-behavior", "restart")
    assert said.out.startswith(f"the run in {run_dir} was moved to {run_dir}-old-1\n")
    assert status.observe(tmp_path / "run-old-1").preset == "digits-spec"
    begun(run_dir)
    assert door("run", "--run-dir", run_dir, "--restart-behavior", "overwrite").code == 0
    assert not (run_dir / "journal").exists()
    assert len(supervision) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    said = door("run", "--run-dir", tmp_path / "mine", "--restart-behavior", "overwrite")
    assert (said.code, said.out) == (78, "")
    assert "does not hold a run; it is left alone" in said.err


def test_run_without_a_directory_makes_one_named_after_the_preset_and_the_time(
    door: Door, supervision: list[Supervision]
) -> None:
    assert door("run", "--no-evaluation").code == 0
    (call,) = supervision
    assert call.directory.parent == Path("runs")
    assert call.directory.name.startswith("digits-20")
    assert call.facts.evaluation_policies == ()


def test_run_leaves_the_exit_status_of_the_outcome(
    door: Door, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = msgspec.structs.replace(OUTCOME, outcome="failed", exit_code=1, evaluations={}, checkpoint=None)
    monkeypatch.setattr(cli, "supervise", lambda *_, **__: gone)
    said = door("run", "--run-dir", tmp_path / "run")
    assert said.code == 1
    assert f"logs of the processes: {tmp_path / 'run' / 'logs'}\n" in said.out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnavailableError("the directory is in use by process 7"), 1),
        (ConfigError("choose another --run-dir"), 78),
    ],
)
def test_run_that_is_refused_is_one_line(
    door: Door, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, code: int
) -> None:
    def supervise(*_: object, **__: object) -> RunOutcome:
        raise error

    monkeypatch.setattr(cli, "supervise", supervise)
    said = door("run", "--run-dir", tmp_path / "run")
    assert (said.code, said.out) == (code, "")
    assert said.err.endswith(f"{error}\n")
    assert len(said.err.splitlines()) == 1


def test_run_into_a_file_is_refused(door: Door, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = door("run", "--run-dir", tmp_path / "file")
    assert (said.code, said.out) == (1, "")
    assert said.err == f"simic-supervisor: cannot make the run directory {tmp_path / 'file'}: File exists\n"
