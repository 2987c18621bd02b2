"""Checkpoint directories: complete, synced and verified, or not there at all.

A checkpoint is `checkpoints/step-<12 digits>/` with its files and a `manifest.json` that names every file with size
and SHA-256. It is written under a temporary name, every file synced, the directory synced, read back, renamed, and the
parent synced. It counts only once `CheckpointSaved` stands in the learner's journal: that is the caller's next move.

Until then the one before counts, so no checkpoint is ever replaced: the second of the same step becomes
`step-<12 digits>-2`, and so on. One writer a directory.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from esper_simic.errors import ContractError, UnavailableError
from supervisor.files import fsync_directory, write_atomically

FORMAT_VERSION: Final = 1
MANIFEST: Final = "manifest.json"
_NAME: Final = re.compile(r"step-(\d{12})(?:-([1-9]\d*))?")
_FILE_NAME: Final = re.compile(r"\w[\w.-]*")
_LEFTOVERS: Final = ".step-*.partial"


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
    staging = parent / f".{directory_name(whole.step)}.partial"
    try:
        _make_staging(parent, staging)
        for name, data in files.items():
            write_atomically(staging / name, data)
        write_atomically(staging / MANIFEST, msgspec.json.format(msgspec.json.encode(whole), indent=2))
        if load(staging)[0] != whole:
            raise ContractError(f"{staging / MANIFEST} differs from what was written")
        final = staging.rename(_free_name(parent, whole.step))
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


def newest(parent: Path) -> Path | None:
    """The checkpoint of the highest step, the last made of it; None where there is none."""
    found = [
        (int(match[1]), int(match[2] or 1), path)
        for path in (parent.iterdir() if parent.is_dir() else ())
        if (match := _NAME.fullmatch(path.name))
    ]
    return max(found)[2] if found else None
