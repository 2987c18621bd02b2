"""The operator's door: what each command prints and the exit status it leaves, through `main()` itself."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import yaml
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from esper_simic.config import Config, SupervisorConfig
from esper_simic.errors import ConfigError, UnavailableError
from supervisor import cli, cli_history, status
from supervisor.cli_common import USAGE
from supervisor.events import CheckpointReported, PolicyEvaluated, RunStarted
from supervisor.journal import Record, read
from supervisor.loop import RunFacts
from supervisor.outcome import RunOutcome
from supervisor.protocol import CommandReply, StatusReply
from supervisor.state import Phase
from supervisor.vitals import EnvironmentView, LearnerView, Snapshot, Vitals
from tests.supervisor.doors import Door, Said, open_door
from tests.supervisor.recorded_runs import (
    failed,
    finished,
    record,
    record_learner,
    stepped,
    stopped,
    supervised,
    training,
)
from tests.supervisor.worlds import World


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Door:
    return open_door(monkeypatch, capsys, tmp_path / "cwd")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return record(tmp_path / "run", finished().events)


def picture(world: World, **changes: Any) -> Snapshot:
    shot = Vitals().snapshot(
        world.state,
        now_s=world.now_s,
        run_dir="/r",
        config=world.config,
        memory_bytes={3011: 2**20},
        refused={},
    )
    return msgspec.structs.replace(shot, **changes)


def measured(policy: str, mean: float) -> PolicyEvaluated:
    summary = {
        f"{key}_{part}": mean + offset
        for key in ("return", "accuracy", "parameters")
        for part, offset in (("mean", 0.0), ("low", -1.0), ("high", 1.0))
    }
    return PolicyEvaluated(
        at_s=1.0,
        policy=policy,
        returns=(mean,) * 3,
        accuracies=(mean,) * 3,
        parameters=(mean,) * 3,
        summary=summary,
    )


# Usage


@pytest.mark.parametrize(
    "arguments",
    [
        ("dance",),
        ("run", "--speed", "3"),
        ("run", "--seed", "many"),
        ("run", "--max-steps", "1.5"),
        ("run", "extra"),
        ("status", "a", "b"),
        ("status", "--yaml"),
        ("is-healthy", "--json"),
        ("stop", "a", "b"),
        ("log", "dance"),
        ("log", "ls", "--owner"),
        ("log", "cat", "--limit", "-1"),
        ("log", "cat", "--start", "-1"),
        ("log", "verify", "a", "b"),
        ("config", "check", "a", "b"),
        ("config", "explain", "a", "b"),
    ],
)
def test_what_is_no_command_is_a_usage_error(door: Door, arguments: tuple[str, ...]) -> None:
    said = door(*arguments)
    assert said.code == USAGE == 2
    assert "Error: " in said.err
    assert said.out == ""


@pytest.mark.parametrize("command", ["run", "status", "is-healthy", "stop", "log", "config"])
def test_every_command_has_a_help_page(door: Door, command: str) -> None:
    assert command in door("--help").out
    said = door(command, "--help")
    assert (said.code, said.err) == (0, "")
    assert "Usage: simic-supervisor" in said.out


@pytest.mark.parametrize(
    "arguments", [("status",), ("is-healthy",), ("stop",), ("log", "ls"), ("log", "cat"), ("log", "verify")]
)
def test_where_there_is_no_run_nothing_is_known(door: Door, arguments: tuple[str, ...]) -> None:
    said = door(*arguments)
    assert (said.code, said.out) == (4, "")
    assert said.err.startswith("simic-supervisor: no run under runs/")
    said = door(*arguments, "elsewhere")
    assert (said.code, said.out) == (4, "")
    assert said.err == "simic-supervisor: there is no directory elsewhere\n"


def test_without_a_name_the_newest_run_is_meant(door: Door) -> None:
    for name, events, started_ns in (("a", failed().events, 9), ("b", stopped().events, 5)):
        record(Path("runs") / name, events)
        os.utime(Path("runs") / name / "journal" / "supervisor" / "writer.lock", ns=(started_ns, started_ns))
    assert json.loads(door("status", "--json").out)["state"] == "failed"


# Status


@pytest.mark.parametrize(
    ("world", "code", "gate", "word"),
    [
        (finished, 3, 3, "not healthy (ended): finished"),
        (stopped, 3, 3, "not healthy (ended): stopped"),
        (failed, 1, 1, "not healthy (failed): failed"),
        (training, 1, 1, "not healthy (failed): died"),
    ],
)
def test_exit_status_of_a_run_that_is_over(
    door: Door, tmp_path: Path, world: Callable[[], World], code: int, gate: int, word: str
) -> None:
    run_dir = record(
        tmp_path / "run", [event for event in world().events if not isinstance(event, PolicyEvaluated)]
    )
    assert door("status", run_dir).code == code
    said = door("is-healthy", run_dir)
    assert said.code == gate
    assert said.out.startswith(word)


@pytest.mark.parametrize(
    ("state", "code", "gate"),
    [("starting", 0, 1), ("training", 0, 0), ("stopping", 0, 1), ("evaluating", 0, 0), ("failed", 1, 1)],
)
def test_exit_status_of_a_run_that_answers(
    door: Door, tmp_path: Path, state: str, code: int, gate: int
) -> None:
    run_dir = record(tmp_path / "run", training().events)
    shot = picture(
        training(), state=state, learner=LearnerView(step=7), environment=EnvironmentView(steps=320)
    )
    with supervised(run_dir, lambda _: StatusReply(snapshot=msgspec.to_builtins(shot))):
        assert door("status", run_dir).code == code
        said = door("is-healthy", run_dir)
    assert said.code == gate
    words = f"{state}, update 7, 320 environment steps\n"
    assert said.out.endswith(words)
    assert (said.out == f"healthy: {words}") == (gate == 0)


def test_what_makes_a_run_less_than_healthy_is_said(door: Door, tmp_path: Path) -> None:
    run_dir = record(tmp_path / "run", training().events)
    shot = picture(training(), troubles=["the disk is full: nothing is taken in"])
    with supervised(run_dir, lambda _: StatusReply(snapshot=msgspec.to_builtins(shot))):
        said = door("is-healthy", run_dir)
        assert "trouble     the disk is full" in door("status", run_dir).out
    assert said.code == 1
    assert said.out.endswith("environment steps: the disk is full: nothing is taken in\n")
    assert said.out.startswith("not healthy (degraded): training")


def test_a_silent_supervisor_is_degraded(door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = record(tmp_path / "run", training().events)
    observe = status.observe
    monkeypatch.setattr(status, "observe", lambda directory: observe(directory, timeout_ms=200))
    with supervised(run_dir, lambda _: None):
        assert json.loads(door("status", run_dir, "--json").out)["state"] == "silent"
        said = door("is-healthy", run_dir)
    assert (said.code, said.out.split(":")[0]) == (1, "not healthy (degraded)")


def spoil(run_dir: Path) -> None:
    segment = next((run_dir / "journal" / "supervisor").glob("*.log"))
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)


@pytest.mark.parametrize("command", ["status", "is-healthy"])
def test_what_cannot_be_read_is_unknown(door: Door, tmp_path: Path, run_dir: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    said = door(command, tmp_path / "empty")
    assert (said.code, said.out) == (4, "")
    assert "holds no run" in said.err
    spoil(run_dir)
    said = door(command, run_dir)
    assert (said.code, said.out) == (4, "")
    assert "00000.log" in said.err
    first, *others = training().events
    assert isinstance(first, RunStarted)
    old = record(tmp_path / "old", [msgspec.structs.replace(first, config={"flux": {}}), *others])
    said = door(command, old)
    assert (said.code, said.out) == (4, "")
    assert "flux" in said.err


def test_status_as_json_has_its_versioned_schema(door: Door, tmp_path: Path) -> None:
    run_dir = record(tmp_path / "run", training().events)
    record_learner(run_dir, (9.0, stepped(5, 160)))
    shot = json.loads(door("status", run_dir, "--json").out)
    assert shot["schema"] == 1
    assert shot["state"] == "died"
    assert shot["learner"] == {"step": 5, "before": 0, "metrics": {"entropy": 1.5}}
    assert shot["environment"] == {"steps": 160, "before": 0}
    assert {"role", "index", "pid", "memory_bytes", "state", "restarts"} <= set(shot["processes"][0])
    assert sorted(process["role"] for process in shot["processes"]) == ["actor", "actor", "learner"]


def test_status_of_an_ended_run_shows_its_results(door: Door, tmp_path: Path) -> None:
    events = [
        measured(event.policy, 5.0) if isinstance(event, PolicyEvaluated) else event
        for event in finished().events
    ]
    said = door("status", record(tmp_path / "run", events))
    assert said.code == 3
    assert "digits finished" in said.out
    assert "| never-grow | 5.00 [5.00, 5.00] | 0.00 [0.00, 0.00] | 5.0 [5.0, 5.0] | " in " ".join(
        said.out.split()
    )
    assert "learned against random: no clear difference in return" in said.out
    assert said.out.isascii()


# Stop


def test_stop_is_answered(door: Door, tmp_path: Path) -> None:
    accepted = CommandReply(command_id="x", accepted=True, reason="", position=12)
    with supervised(tmp_path, lambda _: accepted) as heard:
        said = door("stop", tmp_path)
    assert (said.code, said.out) == (0, f"stopping {tmp_path} (event 12)\n")
    assert getattr(heard[0], "name", "") == "stop"


def test_a_refused_command_tells_why(door: Door, tmp_path: Path) -> None:
    refused = CommandReply(command_id="x", accepted=False, reason="the run is over", position=12)
    with supervised(tmp_path, lambda _: refused):
        said = door("stop", tmp_path)
    assert (said.code, said.out, said.err) == (1, "", "simic-supervisor: refused: the run is over\n")


def test_nobody_can_be_stopped_where_nobody_runs(door: Door, run_dir: Path) -> None:
    said = door("stop", run_dir)
    assert (said.code, said.out) == (3, "")
    assert "no supervisor answers" in said.err


# Log


def records(said: Said) -> list[dict[str, Any]]:
    assert said.code == 0
    return [json.loads(text) for text in said.out.splitlines()]


def test_log_cat_prints_every_record_as_a_line_of_json(door: Door, run_dir: Path) -> None:
    shown = records(door("log", "cat", run_dir))
    events = finished().events
    assert [line["position"] for line in shown] == list(range(len(events)))
    assert [line["kind"] for line in shown] == [type(event).__name__ for event in events]
    assert shown[0]["header"]["run_id"] == "run-1"
    assert shown[0]["frames"] == []
    assert set(shown[0]) == {"position", "time_ns", "kind", "header", "frames"}


@pytest.mark.parametrize(
    ("options", "positions"),
    [
        (("--start", "3", "--limit", "2"), [3, 4]),
        (("--limit", "0"), []),
        (("--start", "1000"), []),
        (("--kind", "Nothing"), []),
    ],
)
def test_log_cat_from_a_position_and_so_many(
    door: Door, run_dir: Path, options: tuple[str, ...], positions: list[int]
) -> None:
    assert [line["position"] for line in records(door("log", "cat", run_dir, *options))] == positions


def test_log_cat_of_one_kind_counts_only_these(door: Door, run_dir: Path) -> None:
    shown = records(door("log", "cat", run_dir, "--kind", "ChildReady", "--limit", "3"))
    assert [line["kind"] for line in shown] == ["ChildReady"] * 3
    later = records(
        door("log", "cat", run_dir, "--kind", "ChildReady", "--start", str(shown[0]["position"] + 1))
    )
    assert later[0] == shown[1]


def test_log_cat_knows_the_learner_and_numbers_that_are_none(door: Door, run_dir: Path) -> None:
    record_learner(run_dir, (1.0, msgspec.structs.replace(stepped(1, 10), metrics={"loss": float("nan")})))
    (shown,) = records(door("log", "cat", run_dir, "--owner", "learner-0"))
    assert shown["header"]["metrics"] == {"loss": None}
    assert shown["time_ns"] == 1_000_000_000


@pytest.mark.parametrize("command", ["ls", "cat", "verify"])
def test_a_missing_owner_is_named_with_those_there_are(door: Door, run_dir: Path, command: str) -> None:
    said = door("log", command, run_dir, "--owner", "actor-9")
    assert (said.code, said.out) == (4, "")
    assert said.err == f"simic-supervisor: {run_dir} has no journal of 'actor-9'; it has: supervisor\n"


def test_a_path_is_no_owner(door: Door, run_dir: Path) -> None:
    assert door("log", "ls", run_dir, "--owner", "../journal").code == 4


def test_log_ls_lists_segments(door: Door, run_dir: Path) -> None:
    said = door("log", "ls", run_dir)
    last = len(finished().events) - 1
    assert said.code == 0
    (line,) = said.out.splitlines()
    assert f"0..{last}  {last + 1} records" in line
    assert "ChildReady 5" in line


def test_log_ls_of_an_empty_journal_has_no_last_position(door: Door, tmp_path: Path) -> None:
    said = door("log", "ls", record(tmp_path / "young", []))
    assert said.code == 0
    assert "0..-  0 records" in said.out


def test_log_verify_finds_sound_what_is(door: Door, run_dir: Path) -> None:
    record_learner(run_dir, (1.0, stepped(1, 10)))
    said = door("log", "verify", run_dir)
    assert said.code == 0
    assert [line.split(":")[0] for line in said.out.splitlines()] == ["learner-0", "supervisor"]
    assert said.out.count("sound") == 2
    assert door("log", "verify", run_dir, "--owner", "learner-0").out.count("sound") == 1


def test_log_verify_names_damage_and_the_position(door: Door, run_dir: Path) -> None:
    record_learner(run_dir, (1.0, stepped(1, 10)))
    spoil(run_dir)
    said = door("log", "verify", run_dir)
    assert said.code == 1
    assert "learner-0: 1 records" in said.out
    assert "DAMAGED" in said.out
    assert "00000.log:" in said.out.splitlines()[-1]
    assert door("log", "cat", run_dir).code == 1


def test_log_verify_tells_of_a_torn_tail(door: Door, run_dir: Path) -> None:
    segment = next((run_dir / "journal" / "supervisor").glob("*.log"))
    size = segment.stat().st_size
    with segment.open("ab") as file:
        file.write(b"\x99" * 5)
    said = door("log", "verify", run_dir)
    assert said.code == 0
    assert f"torn tail: 5 bytes at {segment.name}:{size}" in said.out


def test_log_verify_of_a_directory_without_journals(door: Door, tmp_path: Path) -> None:
    said = door("log", "verify", tmp_path)
    assert (said.code, said.err) == (4, f"simic-supervisor: {tmp_path} holds no journal\n")


def test_ctrl_c_in_a_long_log_is_no_traceback(
    door: Door, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(directory: Path, start: int) -> Iterator[Record]:
        yield next(read(directory, start))
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_history.log, "read", interrupted)
    said = door("log", "cat", run_dir)
    assert (said.code, said.err) == (130, "")
    assert len(said.out.splitlines()) == 1


@pytest.mark.processes
@pytest.mark.parametrize("count", [3, 4000], ids=["in one buffer", "in many"])
def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path, count: int) -> None:
    first, *_ = training().events
    run_dir = record(tmp_path / "run", [first] * count)
    command = [sys.executable, "-m", "supervisor.cli", "log", "cat", str(run_dir)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    process = subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writer)
    if count > 3:
        assert os.read(reader, 100).startswith(b'{"position":0')
    os.close(reader)
    _, err = process.communicate(timeout=60)
    assert err == ""
    assert process.returncode in (0, 1)


# Config


def test_config_check_prints_every_value(door: Door, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("simic_trainer: {seed: 9}\n")
    said = door("config", "check", path, "--set", "environment.max_epochs=50")
    assert (said.code, said.err) == (0, "")
    values = yaml.safe_load(said.out)
    assert (values["simic_trainer"]["seed"], values["environment"]["max_epochs"]) == (9, 50)
    assert Config.model_validate(values).simic_trainer.learning_rate == 7e-4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("config", "check", "--preset", "digit"), "unknown preset 'digit'"),
        (("config", "explain", "--preset", "digit"), "unknown preset 'digit'"),
        (("config", "check", "nothing.yaml"), "cannot read nothing.yaml: No such file"),
        (("config", "check", "."), "cannot read .: Is a directory"),
        (("config", "check", "binary.yaml"), "binary.yaml is not UTF-8 text"),
        (
            ("config", "check", "--set", "simic_trainer.batch_size=33"),
            "simic_trainer.batch_size: must be a power",
        ),
        (("config", "check", "--set", "simic_trainer.sed=1"), "did you mean 'seed'"),
        (("config", "check", "--set", "seed"), "--set takes section.key=value"),
        (("config", "explain", "flux"), "flux: no such key"),
        (("run", "--max-steps", "0"), "supervisor.max_steps"),
        (("run", "--config", "nothing.yaml"), "cannot read nothing.yaml"),
    ],
)
def test_a_configuration_that_cannot_be_obeyed_is_exit_status_78(
    door: Door, arguments: tuple[str, ...], words: str
) -> None:
    Path("binary.yaml").write_bytes(b"\xff\xfe")
    said = door(*arguments)
    assert (said.code, said.out) == (78, "")
    assert said.err.startswith("simic-supervisor: configuration: ")
    assert len(said.err.splitlines()) == 1
    assert words in said.err
    assert not Path("runs").exists()


def test_config_explain_says_ranges_in_words(door: Door) -> None:
    said = door("config", "explain", "learning_rate")
    assert said == Said(
        0,
        "simic_trainer.learning_rate = 0.0007  (default 0.0003, in [1e-06, 0.01])\n"
        "    Adam step size of both optimisers.\n",
        "",
    )
    everything = door("config", "explain").out
    assert "environment.slots = [r0c0, r0c1, r0c2]  (default [r0c0, r0c1, r0c2])\n" in everything
    assert "Ge(" not in everything


# Run


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


# Output


def test_what_the_terminal_cannot_say_is_escaped(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = record(tmp_path / "größe", stopped().events)
    raw = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
        assert door("status", run_dir).code == 3
        sys.stdout.flush()
        assert b"gr\\xf6\\xdfe" in raw.getvalue()


@pytest.mark.processes
def test_the_door_opens_without_the_heavy_libraries() -> None:
    heavy = "torch torch_geometric tensorboard scipy sklearn pandas matplotlib"
    check = f"import sys, supervisor.cli; print(*sorted(set('{heavy}'.split()) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "\n"
