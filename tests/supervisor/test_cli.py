"""The operator's door: what each command prints and the exit status it leaves, through `main()` itself."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import yaml

from esper_simic.config import Config
from supervisor import status
from supervisor.cli_common import USAGE
from supervisor.events import PolicyEvaluated, RunStarted
from supervisor.protocol import CommandReply, StatusReply
from supervisor.vitals import EnvironmentView, LearnerView
from tests.supervisor.doors import Door, Said, open_door
from tests.supervisor.recorded_runs import (
    failed,
    finished,
    record,
    record_learner,
    spoil,
    stepped,
    stopped,
    supervised,
    training,
)
from tests.supervisor.shown_runs import measured, picture
from tests.supervisor.worlds import World


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Door:
    return open_door(monkeypatch, capsys, tmp_path / "cwd")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return record(tmp_path / "run", finished().events)


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
