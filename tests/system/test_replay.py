"""A real asynchronous run of two actors, done again from its journal alone, through the installed command."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from supervisor.journal import Record, read
from tests.system.driver import COMMAND, DEADLINE_S, output_path, running, say

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

MAX_STEPS = 800


class Recorded(NamedTuple):
    run_dir: Path
    records: list[Record]

    def of(self, kind: str) -> list[Record]:
        return [record for record in self.records if record.kind == kind]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    run_dir = tmp_path_factory.mktemp("replayed") / "run"
    changed: dict[str, Any] = {
        "supervisor__max_steps": MAX_STEPS,
        "supervisor__num_actors": 2,
        "supervisor__checkpoint_interval_steps": 10,
        "supervisor__keep_last": 20,
        "supervisor__evaluation_episodes": 2,
        "simic_trainer__digest_every_steps": 4,
    }
    with running(run_dir, **changed) as run:
        code = run.process.wait(200)
    assert code == 0, output_path(run_dir).read_text("utf-8")
    return Recorded(run_dir, list(read(run_dir / "journal" / "learner-0")))


def checkpoints_of(recorded: Recorded) -> list[str]:
    return sorted(path.name for path in (recorded.run_dir / "checkpoints").iterdir())


def test_every_step_is_equal_and_every_checkpoint_to_the_bit(recorded: Recorded) -> None:
    said = say("replay", recorded.run_dir, "--verify", "--json")
    assert said.code == 0, said.out + said.err
    assert said.err == ""
    shown = said.json()
    steps = len(recorded.of("LearnerStepped"))
    assert steps >= 30
    assert (shown["outcome"], shown["steps"], shown["steps_by_digest"]) == ("equal", steps, steps)
    assert shown["audited"]["records"] == len(recorded.records)
    assert [one["name"] for one in shown["checkpoints"]] == checkpoints_of(recorded)
    assert len(shown["checkpoints"]) >= 3
    assert all(one["is_equal"] for one in shown["checkpoints"])
    assert shown["times_as_fast"] > 0


def test_from_a_checkpoint_it_goes_on_equally(recorded: Recorded) -> None:
    origin = checkpoints_of(recorded)[1]
    said = say("replay", recorded.run_dir, "--from", origin, "--json")
    assert said.code == 0, said.out + said.err
    shown = said.json()
    assert shown["first_step"] == int(origin.split("-")[1])
    assert shown["steps"] == len(recorded.of("LearnerStepped")) - shown["first_step"] > 0


def test_the_checkpoints_count_and_are_sound(recorded: Recorded) -> None:
    listed = say("checkpoint", "ls", recorded.run_dir)
    assert listed.code == 0
    assert [line.split()[0] for line in listed.out.splitlines()[1:]] == checkpoints_of(recorded)
    assert "NO" not in listed.out
    checked = say("checkpoint", "verify", recorded.run_dir)
    assert checked.code == 0
    assert checked.out.count(": sound, 2 files\n") == len(checkpoints_of(recorded))
    shown = say("checkpoint", "show", recorded.run_dir)
    assert shown.code == 0
    assert "restored by it:" in shown.out
    assert "lost and counted" in shown.out


def test_a_damaged_journal_is_named_by_segment_and_offset(recorded: Recorded, tmp_path: Path) -> None:
    damaged = tmp_path / "run"
    shutil.copytree(recorded.run_dir, damaged)
    (segment,) = (damaged / "journal" / "learner-0").glob("*.log")
    data = bytearray(segment.read_bytes())
    data[len(data) * 3 // 4] ^= 0x10
    segment.write_bytes(data)
    said = say("replay", damaged, "--json")
    assert said.code == 1
    shown = said.json()
    assert (shown["outcome"], shown["damage"][0]["segment"]) == ("damaged", segment.name)
    assert 0 < shown["damage"][0]["offset"] <= len(data) * 3 // 4
    assert 0 < shown["steps"] == shown["steps_by_digest"] < len(recorded.of("LearnerStepped"))


def test_break_opens_a_console_with_the_state_before_the_step(recorded: Recorded) -> None:
    """On a terminal: what is typed is answered; leaving it, the replay goes on to its end."""
    step = recorded.of("LearnerStepped")[6]
    typed = (
        "print('stands at', learner.steps_done, 'before', step, 'batch of', len(batch.serials))\n"
        "print(advance()['digest'])\n"
        "\x04"
    )
    text, code = on_a_terminal(["replay", str(recorded.run_dir), "--break", "7"], "Ctrl-D leaves", typed)
    assert code == 0, text
    assert f"Before step 7 (record {step.position})" in text
    assert "stands at 6 before 7 batch of 8" in text
    digest = step.header["digest"]
    assert str({"recorded": digest, "computed": digest}) in text
    assert f"{len(recorded.of('LearnerStepped'))} steps replayed, all equal" in text
    assert "steps/s" in text, "progress on a terminal"


def on_a_terminal(arguments: list[str], prompt: str, typed: str) -> tuple[str, int]:
    """Run the command on a terminal of its own and type once the prompt is there; what it showed, and its end."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "dumb", "PYTHON_BASIC_REPL": "1"}
    process = subprocess.Popen(
        [COMMAND, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True
    )
    os.close(theirs)
    shown, has_typed = b"", False
    deadline_s = time.monotonic() + DEADLINE_S
    try:
        while time.monotonic() < deadline_s:
            if not select.select([ours], [], [], 0.1)[0]:
                continue
            try:
                piece = os.read(ours, 65_536)
            except OSError:  # the other side is closed
                break
            shown += piece
            if not has_typed and prompt.encode() in shown and b">>>" in shown:
                os.write(ours, typed.encode())
                has_typed = True
        return shown.decode(errors="replace").replace("\r\n", "\n"), process.wait(DEADLINE_S)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_json_is_one_object(recorded: Recorded) -> None:
    said = say("replay", recorded.run_dir, "--until", "3", "--break", "grad_norm > 1e9", "--json")
    assert said.code == 0
    (line,) = said.out.splitlines()
    shown = json.loads(line)
    assert (shown["schema"], shown["stopped"]["step"]) == (1, 3)
