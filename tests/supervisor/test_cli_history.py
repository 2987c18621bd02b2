"""Looking back from the command line: `checkpoint` and `replay`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from esper_simic.policies.adapter_state import AdapterState
from supervisor.playback import wording
from tests.supervisor.doors import Door, open_door
from tests.supervisor.recorded_learner import OWNER, life, make_config, records, rewritten


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Door:
    return open_door(monkeypatch, capsys, tmp_path / "cwd")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints: the best score belongs to the first, the last stands beside one that nobody saved."""
    run_dir = tmp_path_factory.mktemp("recorded") / "run"
    config = make_config("supervisor.keep_last=2", "supervisor.keep_best=1")
    with life(run_dir, config) as living:
        living.learn([20, 20, 20, 20])
        living.checkpoint()
        living.learn([1, 2, 3, 4])
        living.checkpoint()
        living.learn([5, 6, 7, 8])
        living.checkpoint()
    return run_dir


@pytest.fixture
def run_dir(recorded: Path, tmp_path: Path) -> Path:
    shutil.copytree(recorded, tmp_path / "run")
    return tmp_path / "run"


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# Usage


@pytest.mark.parametrize(
    "arguments",
    [
        ("checkpoint", "dance"),
        ("checkpoint", "ls", "a", "b"),
        ("checkpoint", "show", "a", "b", "c"),
        ("replay", "a", "b"),
        ("replay", "--until", "0"),
        ("replay", "--from"),
    ],
)
def test_what_is_no_command_is_a_usage_error(door: Door, arguments: tuple[str, ...]) -> None:
    said = door(*arguments)
    assert (said.code, said.out) == (2, "")
    assert "Error: " in said.err


@pytest.mark.parametrize("arguments", [("checkpoint",), ("replay",), ("checkpoint", "show")])
def test_every_command_has_a_help_page(door: Door, arguments: tuple[str, ...]) -> None:
    assert arguments[0] in door("--help").out
    said = door(*arguments, "--help")
    assert (said.code, said.err) == (0, "")
    assert f"Usage: simic-supervisor {' '.join(arguments)}" in said.out


@pytest.mark.parametrize(
    "arguments", [("checkpoint", "ls"), ("checkpoint", "show"), ("checkpoint", "verify"), ("replay",)]
)
def test_where_there_is_no_run_nothing_is_known(
    door: Door, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    said = door(*arguments)
    assert (said.code, said.out) == (4, "")
    assert said.err.startswith("simic-supervisor: no run under runs/")
    (tmp_path / "empty").mkdir()
    said = door(*arguments, tmp_path / "empty")
    assert (said.code, said.out) == (4, "")
    assert "has no journal of 'learner-0'; it has: none" in said.err


# Checkpoints


def test_ls_says_which_count_and_why_each_is_kept(door: Door, run_dir: Path) -> None:
    first, second, third = names(run_dir)
    nobodys = run_dir / "checkpoints" / f"{third}-2"
    shutil.copytree(run_dir / "checkpoints" / third, nobodys)
    half = run_dir / "checkpoints" / f"{third}-3"
    half.mkdir()
    now = records(run_dir)[-1].time_ns / 1e9
    os.utime(nobodys, (now, now))
    said = door("checkpoint", "ls", run_dir)
    assert (said.code, said.err) == (0, "")
    header, *rows, bad = said.out.splitlines()
    assert header.split() == ["NAME", "STEP", "ENV", "STEPS", "BYTES", "AGE", "SCORE", "COUNTS", "KEPT"]
    assert [row.split()[0] for row in rows] == [first, second, third, nobodys.name]
    last = [" ".join(row.split()[7:]) for row in rows]
    assert last == [
        "yes best score",
        "yes until the next one is saved",
        "yes among the newest 2",
        "NO: no CheckpointSaved in the journal newest",
    ]
    assert bad.startswith(f"{half.name} is BAD: ")
    staged = records(run_dir, "CheckpointStaged")[0].header
    bytes_there = sum(
        path.stat().st_size
        for path in (run_dir / "checkpoints" / first).iterdir()
        if path.name != "manifest.json"
    )
    cells = rows[0].split()
    assert cells[1:4] == [str(staged["step"]), f"{staged['environment_steps']:,}", f"{bytes_there:,}"]
    assert cells[6] == f"{staged['score']:.2f}" == "2.00"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"state_digest": "f" * 16}, "the journal saved one of digest ffffffffffffffff under its name"),
        ({"staged_at": 3}, "the journal saved one staged at 3 under its name"),
        ({"directory": "step-000000000099"}, "no CheckpointSaved in the journal"),
    ],
)
def test_one_that_the_journal_speaks_of_differently_does_not_count(
    door: Door, run_dir: Path, tmp_path: Path, changes: dict[str, object], why: str
) -> None:
    saved = records(run_dir, "CheckpointSaved")[0]
    altered = rewritten(
        run_dir,
        tmp_path / "altered",
        lambda record: (saved.header | changes, ()) if record.position == saved.position else None,
    )
    first, second, _ = door("checkpoint", "ls", altered).out.splitlines()[1:]
    assert f"NO: {why}" in first
    assert "NO" not in second
    said = door("checkpoint", "show", altered, names(run_dir)[0])
    assert (said.code, f"it does NOT count: {why}" in said.out) == (0, True)


def test_one_of_another_run_does_not_count(door: Door, run_dir: Path) -> None:
    path = run_dir / "checkpoints" / names(run_dir)[0] / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run_id": "another"}))
    assert "NO: it belongs to run another" in door("checkpoint", "ls", run_dir).out


def test_ls_of_a_run_without_checkpoints(door: Door, run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    said = door("checkpoint", "ls", run_dir)
    assert (said.code, said.out) == (0, f"no checkpoints in {run_dir / 'checkpoints'}\n")
    assert door("checkpoint", "verify", run_dir).code == 0
    assert door("checkpoint", "show", run_dir).code == 4


def test_show_says_what_is_and_is_not_restored(door: Door, run_dir: Path) -> None:
    said = door("checkpoint", "show", run_dir)
    assert (said.code, said.err) == (0, "")
    newest = names(run_dir)[-1]
    text = said.out
    staged = records(run_dir, "CheckpointStaged")[-1]
    assert text.startswith(str(run_dir / "checkpoints" / newest))
    assert (
        f"state of all records before {staged.position} of learner-0, digest {staged.header['state_digest']}"
        in text
    )
    assert "it counts" in text
    restored, lost = text.split("NOT restored by it:")
    for part in (
        "weights of the policy: ",
        "statistics of the observation normaliser: 9 tensors",
        "optimiser moments of the policy network: ",
        "optimiser moments of the value network: 18 tensors",
        "learning-rate schedules",
        "reward scale: 144 rewards seen",
        "buffer: 48 experiences inserted, 44 consumed; its contents are read again from 10 journal positions",
        "episode window: 12 episodes",
        "6 steps, 144 environment steps, 12 unrolls, next episode numbers of 2 actors",
        "credits ledger: 1 unrolls not consumed yet; answered: actor 0 life 1 up to 8, actor 1 life 1 up to 4",
    ):
        assert part in restored, part
    assert "environments of the actors: lost and counted" in lost
    assert "messages under way" in lost
    assert "metrics" in lost


def test_show_of_a_lockstep_run_simulates_environments_again(door: Door, tmp_path: Path) -> None:
    with life(tmp_path / "run", make_config("supervisor.lockstep=true")) as living:
        living.checkpoint()
    text = door("checkpoint", "show", tmp_path / "run").out
    assert "simulated again from seeds and recorded actions" in text
    assert "lost and counted" not in text


def test_show_of_what_is_not_there(door: Door, run_dir: Path) -> None:
    said = door("checkpoint", "show", run_dir, "step-9")
    assert (said.code, said.out) == (4, "")
    assert f"has no checkpoint step-9; it has: {', '.join(names(run_dir))}" in said.err
    (run_dir / "checkpoints" / "step-000000000009").mkdir()
    said = door("checkpoint", "show", run_dir, "step-000000000009")
    assert (said.code, said.out) == (1, "")
    assert "is bad: " in said.err


def test_verify_finds_sound_what_is(door: Door, run_dir: Path) -> None:
    said = door("checkpoint", "verify", run_dir)
    assert (said.code, said.err) == (0, "")
    assert said.out.splitlines() == [f"{name}: sound, 2 files" for name in names(run_dir)]
    assert (
        door("checkpoint", "verify", run_dir, names(run_dir)[1]).out
        == f"{names(run_dir)[1]}: sound, 2 files\n"
    )


@pytest.mark.parametrize("file", ["state.safetensors", "numbers.json"])
def test_verify_finds_every_flipped_byte(door: Door, run_dir: Path, file: str) -> None:
    first, second, _ = names(run_dir)
    path = run_dir / "checkpoints" / second / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    said = door("checkpoint", "verify", run_dir)
    assert said.code == 1
    assert f"{first}: sound" in said.out
    assert f"{second} is BAD: {path} has SHA-256" in said.out
    assert door("checkpoint", "verify", run_dir, first).code == 0
    assert door("checkpoint", "verify", run_dir, second).code == 1


def test_verify_misses_records_that_the_buffer_held(door: Door, run_dir: Path) -> None:
    """The journal ends before what the checkpoint refers to: its last segment is gone."""
    (segment,) = (run_dir / "journal" / OWNER).glob("*.log")
    boundary = records(run_dir, "CheckpointStaged")[1].position
    from supervisor.journal import Journal

    kept = [record for record in records(run_dir) if record.position < boundary]
    segment.unlink()
    with Journal(run_dir / "journal" / OWNER, owner=OWNER, run_id="run-1") as journal:
        for record in kept:
            journal.append(record.kind, record.header, [bytes(frame) for frame in record.frames])
        journal.sync()
    said = door("checkpoint", "verify", run_dir)
    first, second, third = names(run_dir)
    assert said.code == 1
    assert f"{first}: sound, 2 files\n" in said.out
    assert f"{second}: sound, 2 files; it does not count: no CheckpointSaved in the journal" in said.out
    assert f"{third} is BAD: the journal has no record " in said.out


def test_verify_compares_with_what_the_journal_saved(door: Door, run_dir: Path, tmp_path: Path) -> None:
    saved = records(run_dir, "CheckpointSaved")[0]
    files = dict.fromkeys(saved.header["files"], "0" * 64)
    altered = rewritten(
        run_dir,
        tmp_path / "altered",
        lambda record: (saved.header | {"files": files}, ()) if record.position == saved.position else None,
    )
    said = door("checkpoint", "verify", altered)
    assert said.code == 1
    assert f"{names(run_dir)[0]} is BAD: " in said.out
    assert f"the journal saved {'0' * 64}" in said.out


# Adapters alone


def test_adapters_are_saved_alone_once_there_are_some(door: Door, run_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "adapters.safetensors"
    none = door("checkpoint", "adapters", str(run_dir), "--out", str(file))
    assert none.code == 1
    assert "it has no adapters" in none.err
    adapted = tmp_path / "adapted"
    with life(adapted, make_config("simic_trainer.lora_start_step=1", "simic_trainer.lora_rank=2")) as living:
        living.learn([20, 20, 20, 20])
        living.checkpoint()
    done = door("checkpoint", "adapters", str(adapted), "--out", str(file))
    assert done.code == 0, done.err
    state = AdapterState.from_bytes(file.read_bytes())
    assert done.out.startswith(f"{file}: adapters of {state.matrices} matrices, rank 2, alpha 32, of update ")
    assert done.out.strip().endswith(f"trained on weights of digest {state.base_digest}")
    again = door("checkpoint", "adapters", str(adapted), "--out", str(file))
    assert again.code == 2
    assert f"{file} is there already" in again.err
    nowhere = door("checkpoint", "adapters", str(adapted), "--out", str(tmp_path / "no" / "file"))
    assert nowhere.code == 1
    assert f"cannot write {tmp_path / 'no' / 'file'}: No such file" in nowhere.err


# Replay


def test_replay_of_an_equal_run(door: Door, run_dir: Path) -> None:
    said = door("replay", run_dir, "--verify")
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[0].startswith(f"every byte read: {len(records(run_dir))} records, ")
    assert [line.split(" (")[0] for line in lines[1:4]] == [f"checkpoint {name}" for name in names(run_dir)]
    assert all(line.endswith("tensors equal to the bit") for line in lines[1:4])
    assert lines[-1].startswith(f"{len(records(run_dir, 'LearnerStepped'))} steps replayed, all equal (")
    assert lines[-1].endswith("times as fast as the run)")


def test_replay_of_a_divergent_run(door: Door, run_dir: Path, tmp_path: Path) -> None:
    stepped = records(run_dir, "LearnerStepped")[3]
    altered = rewritten(
        run_dir,
        tmp_path / "altered",
        lambda record: (
            (record.header | {"digest": "f" * 16}, ()) if record.position == stepped.position else None
        ),
    )
    said = door("replay", altered)
    assert said.code == 1
    assert f"FIRST DIVERGENT STEP: 4 (record {stepped.position}, LearnerStepped)" in said.out
    assert "ffffffffffffffff" in said.out
    shown = json.loads(door("replay", altered, "--json").out)
    assert (shown["outcome"], shown["divergence"]["step"]) == ("divergent", 4)


def test_replay_from_until_as_json(door: Door, run_dir: Path) -> None:
    said = door("replay", run_dir, "--from", names(run_dir)[0], "--until", "4", "--json")
    assert (said.code, said.err) == (0, "")
    shown = json.loads(said.out)
    first = int(names(run_dir)[0].split("-")[1])
    assert (shown["schema"], shown["outcome"], shown["first_step"], shown["last_step"]) == (
        1,
        "equal",
        first,
        4,
    )
    assert shown["stopped"]["digest"] == records(run_dir, "LearnerStepped")[3].header["digest"]


def test_replay_stops_before_a_step_without_a_terminal(door: Door, run_dir: Path) -> None:
    said = door("replay", run_dir, "--break", "3")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("stopped before step 3 (record ")
    assert "2 steps replayed, all equal" in said.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--break", "loss"), "no place to stop at"),
        (("--break", "los > 1"), "did you mean policy_loss, value_loss"),
        (("--until", "999"), "step 999 is not among those to replay"),
        (("--from", "nowhere"), "no checkpoint 'nowhere'"),
    ],
)
def test_what_is_not_there_to_replay_is_a_usage_error(
    door: Door, run_dir: Path, options: tuple[str, ...], words: str
) -> None:
    said = door("replay", run_dir, *options)
    assert (said.code, said.out) == (2, "")
    assert words in said.err
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize("options", [(), ("--verify",)])
def test_damage_is_named_by_segment_and_offset(door: Door, run_dir: Path, options: tuple[str, ...]) -> None:
    (segment,) = (run_dir / "journal" / OWNER).glob("*.log")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    said = door("replay", run_dir, *options)
    assert said.code == 1
    assert f"DAMAGED: {segment.name}:" in said.out
    assert ("steps replayed, then the journal" in said.out) == (not options)
    assert ("nothing was replayed" in said.out) == bool(options)
    shown = json.loads(door("replay", run_dir, *options, "--json").out)
    assert shown["outcome"] == "damaged"
    assert shown["damage"][0]["segment"] == segment.name
    assert shown["damage"][0]["offset"] > 0


def test_the_words_say_how_many_tensors_are_not_shown(
    door: Door, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wording, "TENSORS_SHOWN_MAX", 3)
    unroll = records(run_dir, "ExperienceAdmitted")[2]
    frames = [bytes(frame) for frame in unroll.frames]
    frames[-3] = bytes(len(frames[-3]))
    altered = rewritten(
        run_dir,
        tmp_path / "altered",
        lambda record: (record.header, frames) if record.position == unroll.position else None,
    )
    said = door("replay", altered)
    assert said.code == 1
    assert " more tensors" in said.out
    assert said.out.count(" elements, max abs ") == 3
