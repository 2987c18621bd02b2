"""Checkpoint directories: complete, synced and verified, or not there at all.

A checkpoint is `checkpoints/step-<12 digits>/` with its files and a `manifest.json` that names every file with size
and SHA-256. It is written under a temporary name, every file synced, the directory synced, read back, renamed, and the
parent synced. It counts only once `CheckpointSaved` stands in the learner's journal: that is the caller's next move.

Until then the one before counts, so no checkpoint is ever replaced: the second of the same step becomes
`step-<12 digits>-2`, and so on. It is removed name first, then file by file, so what has a checkpoint's name is whole
or damaged, never half removed. One writer a directory; `save` may run in a thread beside `prune`.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from esper_simic.errors import ContractError, UnavailableError
from supervisor import faults
from supervisor.files import fsync_directory, write_atomically

FORMAT_VERSION: Final = 1
MANIFEST: Final = "manifest.json"
_NAME: Final = re.compile(r"step-(\d{12})(?:-([1-9]\d*))?")
_FILE_NAME: Final = re.compile(r"\w[\w.-]*")
_LEFTOVERS: Final = ".step-*.partial"
_REMOVED: Final = ".step-*.removed"


class CheckpointFile(msgspec.Struct, frozen=True):
    """Size and digest of one file of a checkpoint."""

    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint consists of and which state it holds."""

    format_version: int
    run_id: str
    step: int
    environment_steps: int
    journal_position: int
    state_digest: str
    fingerprint: dict[str, str]
    files: dict[str, CheckpointFile]
    score: float | None = None
    """Mean return of the recent training episodes when it was staged; the higher the better."""
    controller: str = ""
    """Whose policy it holds; empty where it was not said."""


class GoodCheckpoint(msgspec.Struct, frozen=True):
    """A checkpoint with a right manifest; its files may still be bad (`load` tells)."""

    path: Path
    manifest: Manifest


class BadCheckpoint(msgspec.Struct, frozen=True):
    """What has a checkpoint's name and no right manifest, and why."""

    path: Path
    reason: str


def directory_name(step: int, copy: int = 1) -> str:
    """Name of the `copy`-th checkpoint of a learner step."""
    return f"step-{step:012d}" if copy == 1 else f"step-{step:012d}-{copy}"


def save(parent: Path, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> Path:
    """Write a checkpoint; it gets its name once it was read back as it was written.

    However this ends, checkpoints that stood there before stand there still. What an interrupted call has left is
    removed by the next one.

    Args:
        parent: The run's `checkpoints/` directory; made if missing.
        files: Contents by file name.
        manifest: The fields of `Manifest` but `format_version` and `files`.

    Returns:
        The checkpoint's directory.

    Raises:
        ContractError: A file's name is no plain one, or the manifest's own.
        UnavailableError: The disk refused, or what was read back differs from what was written.
    """
    for name in files:
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise ContractError(f"a file of a checkpoint cannot be called {name!r}")
    described = {name: _describe(data) for name, data in files.items()}
    whole = msgspec.convert({**manifest, "format_version": FORMAT_VERSION, "files": described}, Manifest)
    if whole.score is not None and not math.isfinite(whole.score):
        whole = msgspec.structs.replace(whole, score=None)  # JSON has no such number
    staging = parent / f".{directory_name(whole.step)}.partial"
    try:
        _make_staging(parent, staging)
        for name, data in files.items():
            write_atomically(staging / name, data)
            faults.point("checkpoint.file.after")
        write_atomically(staging / MANIFEST, msgspec.json.format(msgspec.json.encode(whole), indent=2))
        if load(staging)[0] != whole:
            raise ContractError(f"{staging / MANIFEST} differs from what was written")
        faults.point("checkpoint.rename.before")
        final = staging.rename(_free_name(parent, whole.step))
        faults.point("checkpoint.rename.after")
        fsync_directory(parent)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UnavailableError(f"cannot write checkpoint {staging}: {error}") from error
    except ContractError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UnavailableError(f"a checkpoint was not read back as it was written: {error}") from error
    return final


def _make_staging(parent: Path, staging: Path) -> None:
    parent.mkdir(parents=True, exist_ok=True)
    fsync_directory(parent.parent)
    for leftover in parent.glob(_LEFTOVERS):
        shutil.rmtree(leftover)
    staging.mkdir()


def _free_name(parent: Path, step: int) -> Path:
    copy = 1
    while (parent / directory_name(step, copy)).exists():
        copy += 1
    return parent / directory_name(step, copy)


def _describe(data: bytes) -> CheckpointFile:
    return CheckpointFile(len(data), hashlib.sha256(data).hexdigest())


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ContractError: Missing, not a manifest, or of an unknown format version.
        UnavailableError: It cannot be read.
    """
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ContractError(f"{directory} is no checkpoint: it has no {MANIFEST}") from None
    except OSError as error:
        raise UnavailableError(f"cannot read {path}: {error}") from error
    try:
        version = msgspec.json.decode(data, type=_Versioned).format_version
        if version != FORMAT_VERSION:
            raise ContractError(f"{path} has format version {version}; this program reads {FORMAT_VERSION}")
        return msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise ContractError(f"{path} is not a manifest: {error}") from error


class _Versioned(msgspec.Struct):
    """What a manifest of any version has: so that another version is named as such."""

    format_version: int


def load(directory: Path) -> tuple[Manifest, dict[str, bytes]]:
    """Read a checkpoint, every file checked against the manifest.

    Returns:
        The manifest, and the contents by file name.

    Raises:
        ContractError: A file is missing, has another size or digest, or stands there unnamed.
        UnavailableError: A file cannot be read.
    """
    manifest = read_manifest(directory)
    present = {path.name for path in directory.iterdir()} - {MANIFEST}
    named = set(manifest.files)
    if named - present:
        raise ContractError(
            f"{directory} lacks {', '.join(sorted(named - present))}, which its manifest names"
        )
    if present - named:
        raise ContractError(
            f"{directory} holds {', '.join(sorted(present - named))}, which its manifest does not name"
        )
    return manifest, {name: _read(directory / name, expected) for name, expected in manifest.files.items()}


def _read(path: Path, expected: CheckpointFile) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnavailableError(f"cannot read {path}: {error}") from error
    found = _describe(data)
    if found.bytes != expected.bytes:
        raise ContractError(f"{path} has {found.bytes} bytes, its manifest says {expected.bytes}")
    if found.sha256 != expected.sha256:
        raise ContractError(f"{path} has SHA-256 {found.sha256}, its manifest says {expected.sha256}")
    return data


def list_checkpoints(parent: Path) -> list[GoodCheckpoint | BadCheckpoint]:
    """The checkpoints in a directory, by step and copy, the oldest first; none where there is no directory."""
    listed: list[GoodCheckpoint | BadCheckpoint] = []
    for path in _in_order(parent):
        try:
            listed.append(GoodCheckpoint(path, read_manifest(path)))
        except (ContractError, UnavailableError) as error:
            listed.append(BadCheckpoint(path, str(error)))
    return listed


def newest(parent: Path) -> Path | None:
    """The checkpoint of the highest step, the last made of it; None where there is none."""
    paths = _in_order(parent)
    return paths[-1] if paths else None


def _in_order(parent: Path) -> list[Path]:
    found = [
        (int(match[1]), int(match[2] or 1), path)
        for path in (parent.iterdir() if parent.is_dir() else ())
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, _, path in sorted(found)]


class Kept(NamedTuple):
    """The checkpoints that are kept for their age, and for their score; some may be both."""

    newest: list[GoodCheckpoint]
    """The oldest of them first."""
    best: list[GoodCheckpoint]
    """The best first."""


def choose(good: Sequence[GoodCheckpoint], keep_last: int, keep_best: int) -> Kept:
    """Which checkpoints `prune` keeps.

    Args:
        good: As `list_checkpoints` gave them, in that order.
        keep_last: The newest ones kept; at least one is.
        keep_best: Those of the highest score; of equal ones the newer. One without a score is never among them.
    """
    scored = [(one.manifest.score, index) for index, one in enumerate(good) if one.manifest.score is not None]
    best = [good[index] for _, index in sorted(scored, reverse=True)[:keep_best]]
    return Kept(list(good[-max(keep_last, 1) :]), best)


def prune(parent: Path, keep_last: int, keep_best: int, protected: Collection[str] = ()) -> list[str]:
    """Remove the checkpoints that need not be kept, and what an interrupted removal has left.

    Bad ones are left for a person to look at, and count for nothing: the last good one always stays.

    Args:
        parent: The run's `checkpoints/` directory.
        keep_last: The newest ones kept, at least 1.
        keep_best: Those of the highest score kept beside them.
        protected: Names of directories that stay in any case.

    Returns:
        The names of the removed ones, oldest first.

    Raises:
        UnavailableError: The disk refused.
    """
    for leftover in parent.glob(_REMOVED):
        _delete(leftover)
    good = [listed for listed in list_checkpoints(parent) if isinstance(listed, GoodCheckpoint)]
    chosen = choose(good, keep_last, keep_best)
    kept = {one.path.name for one in (*chosen.newest, *chosen.best)} | set(protected)
    superfluous = [one.path for one in good if one.path.name not in kept]
    for path in superfluous:
        remove(path)
    return [path.name for path in superfluous]


def remove(directory: Path) -> None:
    """Remove a checkpoint: its name first, at once, then its files.

    Raises:
        UnavailableError: The disk refused.
    """
    faults.point("checkpoint.prune.before")
    hidden = directory.with_name(f".{directory.name}.removed")
    if hidden.exists():  # an earlier one of this name, whose removal was interrupted
        _delete(hidden)
    try:
        directory.rename(hidden)
        fsync_directory(directory.parent)
    except OSError as error:
        raise UnavailableError(f"cannot remove checkpoint {directory}: {error}") from error
    _delete(hidden)
    faults.point("checkpoint.prune.after")


def _delete(hidden: Path) -> None:
    try:
        for path in sorted(path for path in hidden.iterdir() if not path.is_dir())[:1]:
            path.unlink()
            faults.point("checkpoint.prune.half")
        shutil.rmtree(hidden)
    except OSError as error:
        raise UnavailableError(f"cannot remove {hidden}: {error}") from error


def set_aside(directory: Path) -> Path:
    """Give a bad checkpoint a name that nobody takes for a checkpoint's, for a person to look at.

    Raises:
        UnavailableError: The disk refused.
    """
    aside = directory.with_name(f"bad-{directory.name}")
    try:
        if aside.exists():
            shutil.rmtree(aside)
        directory.rename(aside)
        fsync_directory(directory.parent)
    except OSError as error:
        raise UnavailableError(f"cannot set checkpoint {directory} aside: {error}") from error
    return aside
