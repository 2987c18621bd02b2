"""Checkpoints are whole or not there: round trip, every kind of damage refused by name, faults at every write."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_simic.errors import ContractError, UnavailableError
from supervisor import checkpoints, files
from supervisor.faults import DIRECTORY_VARIABLE, FAULTS_VARIABLE

FILES = {"state.safetensors": bytes(range(256)) * 40, "numbers.json": b'{"step": 7}', "empty": b""}
OTHER_FILES = {"state.safetensors": b"other"}
SMALL = {"state.safetensors": b"new"}


def facts(step: int = 7) -> dict[str, Any]:
    return {
        "run_id": "run-1",
        "step": step,
        "environment_steps": 70,
        "journal_position": 12,
        "state_digest": "abc",
        "fingerprint": {"cpu": "x"},
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path / "checkpoints", FILES, facts())


def test_what_was_saved_is_loaded(saved: Path) -> None:
    manifest, contents = checkpoints.load(saved)
    assert contents == FILES
    assert saved.name == "step-000000000007"
    assert (manifest.run_id, manifest.step, manifest.environment_steps) == ("run-1", 7, 70)
    assert (manifest.journal_position, manifest.state_digest, manifest.fingerprint) == (
        12,
        "abc",
        {"cpu": "x"},
    )
    assert manifest == checkpoints.read_manifest(saved)


def test_the_manifest_names_every_file_with_size_and_sha256(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_bytes())
    assert manifest["format_version"] == 1
    assert manifest["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in FILES.items()
    }
    assert {path.name for path in saved.iterdir()} == {*FILES, "manifest.json"}


def truncate(directory: Path) -> None:
    path = directory / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(directory: Path) -> None:
    path = directory / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def manifest_with(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        (directory / "manifest.json").write_text(json.dumps(manifest | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda directory: (directory / "numbers.json").unlink(), "lacks numbers.json"),
        (lambda directory: (directory / "guest").touch(), "holds guest, which its manifest does not name"),
        (truncate, r"state.safetensors has 10239 bytes, its manifest says 10240"),
        (flip_a_byte, r"state.safetensors has SHA-256 \w{64}, its manifest says \w{64}"),
        (
            lambda directory: (directory / "manifest.json").unlink(),
            "step-000000000007 is no checkpoint: it has no manifest.json",
        ),
        (
            lambda directory: (directory / "manifest.json").write_text('{"format'),
            "manifest.json is not a manifest",
        ),
        (lambda directory: (directory / "manifest.json").write_text("{}"), "`format_version`"),
        (manifest_with(format_version=2), "manifest.json has format version 2; this program reads 1"),
        (manifest_with(format_version=2, files=None), "format version 2"),
        (manifest_with(step="seven"), r"manifest.json is not a manifest: Expected `int`"),
        (manifest_with(files={}), "holds empty, numbers.json, state.safetensors"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    saved: Path, damage: Callable[[Path], object], words: str
) -> None:
    damage(saved)
    with pytest.raises(ContractError, match=words):
        checkpoints.load(saved)


def test_what_cannot_be_read_is_unavailable_and_named(saved: Path) -> None:
    (saved / "numbers.json").unlink()
    (saved / "numbers.json").mkdir()
    with pytest.raises(UnavailableError, match=r"cannot read .*numbers\.json"):
        checkpoints.load(saved)
    (saved / "manifest.json").unlink()
    (saved / "manifest.json").mkdir()
    with pytest.raises(UnavailableError, match=r"cannot read .*manifest\.json"):
        checkpoints.load(saved)


@pytest.mark.parametrize("path", ["nothing", "file/inside"])
def test_a_path_that_is_no_checkpoint_is_said_to_be_none(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ContractError, match="is no checkpoint"):
        checkpoints.load(tmp_path / path)


@pytest.mark.parametrize("name", ["manifest.json", "../escape", "a/b", "", ".", "..", ".hidden"])
def test_a_file_name_that_would_not_stay_in_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ContractError, match="cannot be called"):
        checkpoints.save(tmp_path / "checkpoints", {name: b""}, facts())
    assert not (tmp_path / "checkpoints").exists()


def test_leftovers_of_a_killed_save_are_removed_by_the_next_one(tmp_path: Path) -> None:
    parent = tmp_path / "checkpoints"
    for name in (".step-000000000007.partial", ".step-000000000003.partial"):
        (parent / name).mkdir(parents=True)
        (parent / name / "state.safetensors").write_bytes(b"half")
    saved = checkpoints.save(parent, FILES, facts())
    assert checkpoints.load(saved)[1] == FILES
    assert list(parent.iterdir()) == [saved]


def test_a_second_checkpoint_of_a_step_stands_beside_the_first(tmp_path: Path) -> None:
    first, second, third = (
        checkpoints.save(tmp_path, files, facts()) for files in (FILES, OTHER_FILES, FILES)
    )
    assert [path.name for path in (first, second, third)] == [
        "step-000000000007",
        "step-000000000007-2",
        "step-000000000007-3",
    ]
    assert checkpoints.load(first)[1] == FILES
    assert checkpoints.load(second)[1] == OTHER_FILES
    assert checkpoints.newest(tmp_path) == third


def test_the_newest_is_the_highest_step_and_of_it_the_last(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path / "none") is None
    assert checkpoints.newest(tmp_path) is None
    for name in ("step-000000000009-2", "step-000000000009", "step-000000000009-10", "step-000000000002"):
        (tmp_path / name).mkdir()
    for name in (".step-000000000011.partial", "step-12", "notes", "step-000000000013-0"):
        (tmp_path / name).mkdir()
    assert checkpoints.newest(tmp_path) == tmp_path / "step-000000000009-10"


def test_what_is_read_back_otherwise_than_written_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = checkpoints.save(tmp_path, OTHER_FILES, facts(step=6))
    write = files.write_atomically

    def lying_disk(path: Path, data: bytes) -> None:
        write(path, data[:-1] + b"?" if path.name == "numbers.json" else data)

    monkeypatch.setattr(checkpoints, "write_atomically", lying_disk)
    with pytest.raises(
        UnavailableError, match=r"not read back as it was written: .*numbers\.json has SHA-256"
    ):
        checkpoints.save(tmp_path, FILES, facts())
    assert list(tmp_path.iterdir()) == [old]


class Killed(BaseException):
    """Stands for the end of the process: nothing of the product runs any more."""


TOUCHES_THE_DISK = ("mkdir", "open", "fsync", "replace", "rename")


@contextmanager
def fault(at: int, error: Callable[[], BaseException]) -> Iterator[list[str]]:
    """Let the `at`-th call that changes or syncs something fail instead; yields the calls made."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in TOUCHES_THE_DISK:
            real = getattr(os, name)

            def faulty(*arguments: Any, _real: Any = real, _name: str = name, **keywords: Any) -> Any:
                calls.append(_name)
                if len(calls) - 1 == at:
                    raise error()
                return _real(*arguments, **keywords)

            patch.setattr(os, name, faulty)
        yield calls


def count_of_calls(parent: Path) -> int:
    with fault(-1, Killed) as calls:
        checkpoints.save(parent, SMALL, facts())
    assert {"mkdir", "fsync", "replace", "rename"} <= set(calls)
    return len(calls)


@pytest.mark.parametrize("is_kill", [True, False], ids=["killed", "disk full"])
@pytest.mark.parametrize("same_step", [True, False])
def test_a_fault_at_any_step_leaves_the_old_whole_and_the_new_whole_or_absent(
    tmp_path: Path, same_step: bool, is_kill: bool
) -> None:
    steps = count_of_calls(tmp_path / "dry")
    assert steps > 10
    outcomes = set()
    for at in range(1, steps):  # the first call makes the directory, which stands there already
        parent = tmp_path / f"at-{at}"
        old = checkpoints.save(parent, OTHER_FILES, facts(step=7 if same_step else 6))
        full = OSError(errno.ENOSPC, "No space left on device")
        expected: type[BaseException] = Killed if is_kill else UnavailableError
        with fault(at, Killed if is_kill else lambda full=full: full), pytest.raises(expected):  # type: ignore[misc]
            checkpoints.save(parent, SMALL, facts())
        assert checkpoints.load(old)[1] == OTHER_FILES
        newest = checkpoints.newest(parent)
        assert newest is not None
        outcomes.add(newest == old)
        if newest != old:
            assert checkpoints.load(newest)[1] == SMALL
        again = checkpoints.save(parent, SMALL, facts())
        assert checkpoints.load(again)[1] == SMALL
        assert not list(parent.glob(".*"))
    assert outcomes == {True, False}, "the last sync comes after the new name, the others before"


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with fault(6, lambda: OSError(errno.ENOSPC, "No space left on device")):
        with pytest.raises(
            UnavailableError, match=r"cannot write checkpoint .*step-000000000007.*No space left"
        ):
            checkpoints.save(tmp_path / "checkpoints", FILES, facts())
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_every_file_and_every_name_is_synced_before_the_rename_and_the_name_after(tmp_path: Path) -> None:
    with fault(-1, Killed) as calls:
        checkpoints.save(tmp_path / "checkpoints", FILES, facts())
    before, after = calls[: calls.index("rename")], calls[calls.index("rename") + 1 :]
    assert before.count("fsync") == 1 + 2 * (len(FILES) + 1)
    assert after == ["open", "fsync"]


# ---- listing, keeping, removing --------------------------------------------------------------------------------------


def save_scored(parent: Path, *scores: float | None) -> list[Path]:
    """One checkpoint a score, of steps 1, 2, …"""
    return [
        checkpoints.save(parent, SMALL, facts(step) | {"score": score})
        for step, score in enumerate(scores, start=1)
    ]


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def test_a_manifest_of_before_there_were_scores_is_read(saved: Path) -> None:
    path = saved / "manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["score"]
    path.write_text(json.dumps(manifest | {"of_a_later_version": True}))
    assert checkpoints.load(saved)[0].score is None


@pytest.mark.parametrize(
    ("score", "read"), [(None, None), (1.5, 1.5), (-0.0, 0.0), (float("nan"), None), (float("inf"), None)]
)
def test_a_score_is_kept_and_one_that_is_no_number_is_none(
    tmp_path: Path, score: float | None, read: float | None
) -> None:
    (path,) = save_scored(tmp_path, score)
    assert checkpoints.load(path)[0].score == read


def test_a_listing_names_the_bad_ones_in_their_place(tmp_path: Path) -> None:
    assert checkpoints.list_checkpoints(tmp_path / "none") == []
    first, second, third = save_scored(tmp_path, None, 2.0, None)
    again = checkpoints.save(tmp_path, SMALL, facts(2))
    (second / "manifest.json").write_text("{}")
    (third / "manifest.json").unlink()
    (third / "manifest.json").mkdir()  # cannot be read at all
    (tmp_path / "step-000000000004").touch()
    (tmp_path / "notes").mkdir()
    listed = checkpoints.list_checkpoints(tmp_path)
    assert [one.path for one in listed] == [first, second, again, third, tmp_path / "step-000000000004"]
    assert [isinstance(one, checkpoints.GoodCheckpoint) for one in listed] == [
        True,
        False,
        True,
        False,
        False,
    ]
    reasons = [one.reason for one in listed if isinstance(one, checkpoints.BadCheckpoint)]
    assert [
        words in reason for words, reason in zip(("not a man", "cannot read", "is no"), reasons, strict=True)
    ]
    assert isinstance(listed[0], checkpoints.GoodCheckpoint)
    assert listed[0].manifest.step == 1


def kept_by_the_book(
    scores: list[float | None], keep_last: int, keep_best: int, protected: set[int]
) -> set[int]:
    """Steps that stay, by the words of the rule: one is removed if it is in none of the three."""
    stay = set()
    for step, score in enumerate(scores, start=1):
        newer = len(scores) - step
        better = sum(
            other is not None and score is not None and (other, number) > (score, step)
            for number, other in enumerate(scores, start=1)
        )
        if newer < keep_last or (score is not None and better < keep_best) or step in protected:
            stay.add(step)
    return stay


@settings(max_examples=40)
@given(data=st.data(), scores=st.lists(st.none() | st.sampled_from([-1.0, 0.0, 1.0, 2.0]), max_size=7))
def test_what_is_kept_is_the_newest_the_best_and_the_protected(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, scores: list[float | None]
) -> None:
    parent = tmp_path_factory.mktemp("checkpoints")
    paths = save_scored(parent, *scores)
    keep_last, keep_best = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    protected = data.draw(st.sets(st.integers(1, 7), max_size=3))
    removed = checkpoints.prune(
        parent, keep_last, keep_best, protected={checkpoints.directory_name(step) for step in protected}
    )
    stay = kept_by_the_book(scores, keep_last, keep_best, protected)
    assert removed == [path.name for step, path in enumerate(paths, start=1) if step not in stay]
    assert names(parent) == [path.name for step, path in enumerate(paths, start=1) if step in stay]
    for path in parent.iterdir():
        assert checkpoints.load(path)[1] == SMALL


def test_the_last_good_one_stays_and_bad_ones_are_left_for_a_person(tmp_path: Path) -> None:
    paths = save_scored(tmp_path, 1.0, 2.0, 3.0, 4.0)
    for path in paths[2:]:
        (path / "manifest.json").unlink()
    assert checkpoints.prune(tmp_path, 0, 0) == [paths[0].name]
    assert names(tmp_path) == [path.name for path in paths[1:]]
    assert checkpoints.prune(tmp_path, 1, 1) == []
    assert checkpoints.prune(tmp_path / "none", 1, 1) == []


def test_of_equal_scores_the_newer_one_is_the_best(tmp_path: Path) -> None:
    save_scored(tmp_path, 5.0, 5.0, 1.0)
    checkpoints.prune(tmp_path, 1, 1)
    assert names(tmp_path) == ["step-000000000002", "step-000000000003"]


def test_an_interrupted_removal_is_finished_by_the_next_one(tmp_path: Path) -> None:
    paths = save_scored(tmp_path, None, None, None)
    half = tmp_path / f".{paths[0].name}.removed"
    paths[0].rename(half)
    (half / "state.safetensors").unlink()
    assert checkpoints.newest(tmp_path) == paths[2]
    assert checkpoints.prune(tmp_path, 2, 0) == []
    assert names(tmp_path) == [path.name for path in paths[1:]]
    # ... and the same step made anew can be removed although the remains of the first are still there
    (tmp_path / f".{paths[1].name}.removed").mkdir()
    (tmp_path / f".{paths[1].name}.removed" / "numbers.json").touch()
    checkpoints.remove(paths[1])
    assert names(tmp_path) == [paths[2].name]


def test_a_removal_that_the_disk_refuses_is_told(tmp_path: Path) -> None:
    paths = save_scored(tmp_path, None, None)
    with fault(0, lambda: OSError(errno.EROFS, "Read-only file system")):
        with pytest.raises(UnavailableError, match=r"cannot remove .*step-000000000001.*Read-only"):
            checkpoints.prune(tmp_path, 1, 0)
    assert names(tmp_path) == [path.name for path in paths]
    with pytest.raises(UnavailableError, match="cannot remove checkpoint"):
        checkpoints.remove(tmp_path / "step-000000000009")


def test_a_name_is_gone_for_good_before_its_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave the name with half of the files."""
    seen: list[tuple[str, bool]] = []
    real_fsync, real_unlink = os.fsync, os.unlink
    (path,) = save_scored(tmp_path, None)

    def fsync(descriptor: int) -> None:
        seen.append(("sync", path.exists()))
        real_fsync(descriptor)

    def unlink(*arguments: Any, **keywords: Any) -> None:
        seen.append(("unlink", path.exists()))
        real_unlink(*arguments, **keywords)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "unlink", unlink)
    checkpoints.remove(path)
    assert seen == [("sync", False), ("unlink", False), ("unlink", False)]
    assert names(tmp_path) == []


def test_a_bad_one_is_set_aside_whole_under_a_name_that_is_no_checkpoints(saved: Path) -> None:
    for _ in range(2):  # the second of the name takes the place of the first
        flip_a_byte(saved)
        aside = checkpoints.set_aside(saved)
        assert checkpoints.list_checkpoints(saved.parent) == []
        assert names(saved.parent) == [aside.name] == ["bad-step-000000000007"]
        with pytest.raises(ContractError, match="has SHA-256"):
            checkpoints.load(aside)
        saved = checkpoints.save(saved.parent, FILES, facts())
    (saved.parent / "step-000000000008").mkdir()
    with fault(0, lambda: OSError(errno.EROFS, "Read-only file system")):
        with pytest.raises(UnavailableError, match="cannot set checkpoint .*step-000000000008 aside"):
            checkpoints.set_aside(saved.parent / "step-000000000008")


def test_a_thread_may_save_while_another_prunes(tmp_path: Path) -> None:
    saved: list[Path] = []

    def save_many() -> None:
        saved.extend(save_scored(tmp_path, *[None] * 30))

    thread = threading.Thread(target=save_many)
    thread.start()
    while thread.is_alive():
        checkpoints.prune(tmp_path, 1, 0)
        for one in checkpoints.list_checkpoints(tmp_path):
            assert isinstance(one, checkpoints.GoodCheckpoint)
    thread.join()
    assert len(saved) == 30
    checkpoints.prune(tmp_path, 1, 0)
    assert names(tmp_path) == [saved[-1].name]
    assert checkpoints.load(saved[-1])[1] == SMALL


# ---- killed at the fault points --------------------------------------------------------------------------------------

LIFE = """
import sys, pathlib
from supervisor import checkpoints, faults
faults.arm("learner")
parent = pathlib.Path(sys.argv[1])
for _ in range(4):
    newest = checkpoints.newest(parent)
    step = checkpoints.read_manifest(newest).step + 1 if newest else 1
    facts = {"run_id": "r", "step": step, "environment_steps": 0, "journal_position": step, "state_digest": "d",
             "fingerprint": {}}
    checkpoints.save(parent, {"a": b"a" * step, "b": b"b" * step}, facts)
    print(step, flush=True)
    checkpoints.prune(parent, 2, 0)
"""
OWN_POINTS = [f"checkpoint.{name}" for name in "file.after rename.before rename.after".split()] + [
    f"checkpoint.prune.{name}" for name in "before half after".split()
]


@pytest.mark.processes
@pytest.mark.parametrize("point", OWN_POINTS)
def test_killed_at_a_point_what_has_a_name_is_whole_and_the_next_life_cleans_up(
    tmp_path: Path, point: str
) -> None:
    parent, faults_directory = tmp_path / "checkpoints", tmp_path / "faults"
    faults_directory.mkdir()
    environment = os.environ | {
        FAULTS_VARIABLE: f"learner:{point}:{3 if point == 'checkpoint.file.after' else 2}",
        DIRECTORY_VARIABLE: str(faults_directory),
    }
    for expected in (-signal.SIGKILL, 0):
        done = subprocess.run(
            [sys.executable, "-c", LIFE, str(parent)],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[2],
            env=environment,
        )
        assert done.returncode == expected, done.stderr
        told = [int(line) for line in done.stdout.split()]
        steps = [
            checkpoints.load(path)[0].step for path in sorted(parent.glob("step-*"))
        ]  # every named one is whole
        assert steps[-1] >= max(told, default=0)
        assert steps == list(range(steps[0], steps[-1] + 1))
        if expected != 0:
            assert bool(list(parent.glob(".*"))) == (
                point in {"checkpoint.file.after", "checkpoint.rename.before", "checkpoint.prune.half"}
            )
    assert len(steps) == 2
    assert not list(parent.glob(".*"))
