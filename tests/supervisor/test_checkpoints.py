"""Checkpoints are whole or not there: round trip, every kind of damage refused by name, faults at every write."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper_simic.errors import ContractError, UnavailableError
from supervisor import checkpoints, files
from tests.supervisor.checkpoint_files import SMALL, Killed, facts, fault, flip_a_byte

FILES = {"state.safetensors": bytes(range(256)) * 40, "numbers.json": b'{"step": 7}', "empty": b""}
OTHER_FILES = {"state.safetensors": b"other"}


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
