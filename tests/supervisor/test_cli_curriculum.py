"""`simic-supervisor curriculum`: what is asked for each option, and what is said of the answer."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from esper_simic.config import parse, to_yaml
from esper_simic.curriculum_facts import CoordinationMode, CurriculumReply, CurriculumRequest
from supervisor import status
from supervisor.protocol import Command, CommandReply, Message, StatusReply, StatusRequest
from supervisor.vitals import LearnerView
from tests.supervisor.doors import Door, open_door
from tests.supervisor.recorded_runs import record, stopped, supervised, training

STAGES = """
simic_trainer:
  curriculum_stages:
    - name: walk
      difficulty: 0.5
      min_success_rate: 0.5
      min_episodes: 4
      max_episodes: 9
      environment: {max_epochs: 20}
    - {name: run, difficulty: 1.0, min_success_rate: 0.75, min_episodes: 5, max_episodes: 10}
"""


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Door:
    return open_door(monkeypatch, capsys, tmp_path / "cwd")


class Supervisor:
    """What it was asked, and its answer."""

    def __init__(self, run_dir: Path, stage: int | None) -> None:
        snapshot = msgspec.structs.replace(
            status.observe(run_dir),
            learner=LearnerView(metrics={} if stage is None else {"curriculum_stage": float(stage)}),
        )
        self.snapshot = msgspec.to_builtins(snapshot)
        self.refusal = ""
        self.requests: list[CurriculumRequest] = []

    def answer(self, message: Message) -> Message:
        if isinstance(message, StatusRequest):
            return StatusReply(snapshot=self.snapshot)
        assert isinstance(message, Command)
        assert message.request is not None
        assert (message.name, message.command_id) == ("curriculum", message.request.request_id)
        self.requests.append(message.request)
        reply = CurriculumReply(
            request_id=message.command_id,
            correlation_id="",
            stage="run",
            episodes=3,
            success_rate=0.5,
            advanced=message.request.stage == "run",
            refusal=self.refusal,
        )
        return CommandReply(
            command_id=message.command_id,
            accepted=not self.refusal,
            reason=self.refusal,
            position=7,
            reply=reply,
        )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    events = training().events
    config = parse(STAGES)
    begun = msgspec.structs.replace(
        events[0], config_text=to_yaml(config), config=config.model_dump(mode="json")
    )
    return record(tmp_path / "run", [begun, *events[1:]])


@pytest.mark.parametrize(
    ("arguments", "present", "stage", "mode"),
    [
        (("--advance",), 0, "run", CoordinationMode.STRATEGY_DRIVEN),
        (("--advance", "--request-id", "before"), 1, "run", CoordinationMode.STRATEGY_DRIVEN),
        (("--hold",), 0, "walk", CoordinationMode.STRATEGY_DRIVEN),
        (("--release",), 1, "run", CoordinationMode.INDEPENDENT),
        (("--stage", "walk"), None, "walk", CoordinationMode.STRATEGY_DRIVEN),
        (("--stage", "run", "--mode", "SYNCHRONIZED"), None, "run", CoordinationMode.SYNCHRONIZED),
    ],
)
def test_what_each_option_asks(
    door: Door,
    run_dir: Path,
    arguments: tuple[str, ...],
    present: int | None,
    stage: str,
    mode: CoordinationMode,
) -> None:
    supervisor = Supervisor(run_dir, present)
    with supervised(run_dir, supervisor.answer):
        said = door("curriculum", run_dir, *arguments)
    assert said.code == 0
    assert said.out.startswith("granted: the training ")
    assert "stage 'run', 3 episodes in its round, success rate 0.50" in said.out
    (asked,) = supervisor.requests
    assert (asked.stage, asked.mode) == (stage, mode)
    numbers = (asked.difficulty, asked.min_success_rate, asked.min_episodes, asked.max_episodes)
    assert numbers == ((0.5, 0.5, 4, 9) if stage == "walk" else (1.0, 0.75, 5, 10))


def test_numbers_and_id_can_be_named_and_the_answer_read_by_programs(door: Door, run_dir: Path) -> None:
    supervisor = Supervisor(run_dir, 0)
    numbers = ("--min-success-rate", "0.1", "--min-episodes", "2", "--max-episodes", "3")
    with supervised(run_dir, supervisor.answer):
        said = door(
            "curriculum",
            run_dir,
            "--stage",
            "walk",
            "--mode",
            "TASK_DRIVEN",
            *numbers,
            "--request-id",
            "mine",
            "--json",
        )
    (asked,) = supervisor.requests
    assert (asked.request_id, asked.min_success_rate, asked.min_episodes, asked.max_episodes) == (
        "mine",
        0.1,
        2,
        3,
    )
    told = json.loads(said.out)
    assert (said.code, told["command_id"], told["reply"]["stage"]) == (0, "mine", "run")


def test_a_refusal_is_told_with_its_reason(door: Door, run_dir: Path) -> None:
    supervisor = Supervisor(run_dir, 0)
    supervisor.refusal = "unknown stage 'rnu'; did you mean 'run'?"
    with supervised(run_dir, supervisor.answer):
        said = door("curriculum", run_dir, "--stage", "rnu")
    assert (said.code, said.out) == (1, "")
    assert "refused: unknown stage 'rnu'; did you mean 'run'?" in said.err
    assert supervisor.requests[0].stage == "rnu"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--advance", "--request-id", "x" * 129), "length <= 128"),
        (("--stage", "s" * 129), "length <= 128"),
        (("--advance", "--min-episodes", str(10**30)), "2**64"),
    ],
)
def test_what_no_door_takes_is_refused_here_with_the_reason(
    door: Door, run_dir: Path, arguments: tuple[str, ...], words: str
) -> None:
    supervisor = Supervisor(run_dir, 0)
    with supervised(run_dir, supervisor.answer):
        said = door("curriculum", run_dir, *arguments, "--wait-seconds", "1")
    assert (said.code, said.out, supervisor.requests) == (2, "", [])
    assert words in said.err


def test_the_last_stage_is_not_said_to_have_been_left(door: Door, run_dir: Path) -> None:
    supervisor = Supervisor(run_dir, 1)
    with supervised(run_dir, supervisor.answer):
        said = door("curriculum", run_dir, "--advance")
    assert (said.code, said.out) == (1, "")
    assert "stage 'run' is the last one" in said.err
    assert supervisor.requests == []


@pytest.mark.parametrize("arguments", [(), ("--advance", "--hold"), ("--stage", "a", "--release")])
def test_one_thing_is_asked(door: Door, run_dir: Path, arguments: tuple[str, ...]) -> None:
    said = door("curriculum", run_dir, *arguments)
    assert said.code == 2
    assert "ask one thing" in said.err


def test_another_mode_is_a_mistake(door: Door, run_dir: Path) -> None:
    said = door("curriculum", run_dir, "--stage", "run", "--mode", "SLOW")
    assert (said.code, "not 'SLOW'" in said.err) == (2, True)


def test_a_stage_that_is_not_known_yet_is_to_be_named(door: Door, run_dir: Path) -> None:
    with supervised(run_dir, Supervisor(run_dir, None).answer):
        said = door("curriculum", run_dir, "--advance")
    assert (said.code, "in which stage it is" in said.err) == (1, True)


def test_nobody_answers_where_nobody_runs(door: Door, tmp_path: Path) -> None:
    over = record(tmp_path / "over", stopped().events)
    for arguments in (("--advance",), ("--stage", "walk")):
        said = door("curriculum", over, *arguments)
        assert (said.code, said.out) == (3, "")
    (tmp_path / "none").mkdir()
    assert door("curriculum", tmp_path / "none", "--stage", "walk").code == 4


def test_an_answer_that_takes_longer_can_be_asked_for_again(
    door: Door, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with supervised(run_dir, Supervisor(run_dir, 0).answer):
        monkeypatch.setattr(status, "ask", lambda *arguments: None)
        said = door("curriculum", run_dir, "--stage", "run", "--request-id", "r9", "--wait-seconds", "0.5")
    assert said.code == 3
    assert "no answer within 0.5 s; the same command with --request-id r9 tells it later" in said.err
