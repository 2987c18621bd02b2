"""`simic-supervisor log`: what it prints of journals, sound and damaged, and the exit status it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from supervisor import cli_history
from supervisor.journal import Record, read
from tests.supervisor.doors import Door, Said, open_door
from tests.supervisor.recorded_runs import (
    finished,
    record,
    record_learner,
    spoil,
    stepped,
    training,
)


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Door:
    return open_door(monkeypatch, capsys, tmp_path / "cwd")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return record(tmp_path / "run", finished().events)


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
