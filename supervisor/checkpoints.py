"""Checkpoint directories: complete, synced and verified, or not there at all.

A checkpoint is `checkpoints/step-<12 digits>/` with its files and a `manifest.json` that names every file with size
and SHA-256. It is written under a temporary name, every file synced, the directory synced, renamed, the parent synced,
and read back. It counts only once `CheckpointSaved` stands in the learner's journal: that is the caller's next move.
"""

from __future__ import annotations

import hashlib
import os
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
_NAME: Final = re.compile(r"step-(\d{12})")


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


def directory_name(step: int) -> str:
    """Name of the checkpoint of a learner step."""
    return f"step-{step:012d}"


def save(parent: Path, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> Path:
    """Write a checkpoint and read it back.

    Args:
        parent: The run's `checkpoints/` directory; made if missing.
        files: Contents by file name.
        manifest: The fields of `Manifest` but `format_version` and `files`.

    Returns:
        The checkpoint's directory.

    Raises:
        UnavailableError: The disk refused, or what was read back differs from what was written.
    """
    described = {name: CheckpointFile(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    whole = msgspec.convert({**manifest, "format_version": FORMAT_VERSION, "files": described}, Manifest)
    final = parent / directory_name(whole.step)
    staging = parent / f".{final.name}.partial"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        for name, data in files.items():
            write_atomically(staging / name, data)
        write_atomically(staging / MANIFEST, msgspec.json.format(msgspec.json.encode(whole), indent=2))
        if final.exists():
            shutil.rmtree(final)
        staging.rename(final)
        fsync_directory(parent)
        load(final)
    except OSError as error:
        raise UnavailableError(f"cannot write checkpoint {final}: {os.strerror(error.errno or 0)}") from error
    except ContractError as error:
        raise UnavailableError(f"checkpoint {final} was not read back as written: {error}") from error
    return final


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ContractError: Missing, not a manifest, or of an unknown format version.
    """
    path = directory / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise ContractError(f"{path} is not a readable manifest: {error}") from error
    if manifest.format_version != FORMAT_VERSION:
        raise ContractError(f"{path} has format version {manifest.format_version}, this version reads {FORMAT_VERSION}")
    return manifest


def load(directory: Path) -> tuple[Manifest, dict[str, bytes]]:
    """Read a checkpoint, every file checked against the manifest.

    Raises:
        ContractError: A file is missing, has another size or digest, or stands there unnamed.
    """
    manifest = read_manifest(directory)
    present = {path.name for path in directory.iterdir()} - {MANIFEST}
    if present != set(manifest.files):
        raise ContractError(f"{directory} holds {sorted(present)}, its manifest names {sorted(manifest.files)}")
    contents = {}
    for name, expected in manifest.files.items():
        data = (directory / name).read_bytes()
        if len(data) != expected.bytes or hashlib.sha256(data).hexdigest() != expected.sha256:
            raise ContractError(f"{directory / name} differs from its manifest (size or SHA-256)")
        contents[name] = data
    return manifest, contents


def newest(parent: Path) -> Path | None:
    """The checkpoint of the highest step, or None where there is none."""
    if not parent.is_dir():
        return None
    found = sorted(path for path in parent.iterdir() if _NAME.fullmatch(path.name))
    return found[-1] if found else None
