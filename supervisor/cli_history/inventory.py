"""The checkpoints of a run beside its learner's journal: which count, why each is kept, what is in it, if it is whole.

A checkpoint is a cache of the journal's fold at one position. It counts once `CheckpointSaved` stands in the journal
with its name, its position and its digest.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from esper_simic.config import SupervisorConfig
from esper_simic.errors import ConfigError, ContractError, UnavailableError
from esper_simic.events import CheckpointSaved, ExperienceAdmitted, RunStarted
from supervisor import checkpoints
from supervisor.checkpoints import Manifest
from supervisor.config_file import config_of
from supervisor.journal import read

STATE_FILE: Final = "state.safetensors"
NUMBERS_FILE: Final = "numbers.json"


class Numbers(msgspec.Struct, frozen=True):
    """What `numbers.json` of a checkpoint holds."""

    numbers: dict[str, Any]
    addresses: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint with a readable manifest."""

    path: Path
    manifest: Manifest
    saved_s: float
    """When: seconds since 1970-01-01 UTC."""
    saved: CheckpointSaved | None
    kept: str
    why_not: str
    """Why it does not count; empty if it does."""

    @property
    def name(self) -> str:
        """Its directory's name."""
        return self.path.name

    @property
    def counts(self) -> bool:
        """Whether a recovery may begin from it."""
        return not self.why_not


@dataclass(frozen=True, slots=True)
class Inventory:
    """All of them, by step, and the directories that only look like one."""

    directory: Path
    journal: Path
    entries: list[Entry]
    bad: dict[str, str]
    is_lockstep: bool


def take_inventory(run_dir: Path, journal: Path) -> Inventory:
    """Look at a run's checkpoints.

    Raises:
        JournalDamage: The journal is damaged behind the oldest of them.
        UnavailableError: A file cannot be read.
        ContractError: The journal is none of a learner.
    """
    directory = run_dir / "checkpoints"
    listed = checkpoints.list_checkpoints(directory)
    good = [one for one in listed if isinstance(one, checkpoints.GoodCheckpoint)]
    saved = _saved(journal, min((one.manifest.journal_position for one in good), default=None))
    started = _started(journal)
    limits = _limits(started)
    reasons = _kept(good, limits)
    entries = []
    for one in good:
        event, saved_s = saved.get(one.path.name, (None, one.path.stat().st_mtime))
        why_not = _why_not(one.manifest, event, started.run_id)
        entries.append(Entry(one.path, one.manifest, saved_s, event, reasons[one.path.name], why_not))
    bad = {one.path.name: one.reason for one in listed if isinstance(one, checkpoints.BadCheckpoint)}
    return Inventory(directory, journal, entries, bad, limits.lockstep)


def _started(journal: Path) -> RunStarted:
    for record in read(journal):
        if record.kind == RunStarted.__name__:
            return record.header_as(RunStarted)
        break
    else:
        raise ContractError(f"{journal} does not begin with RunStarted: it is empty, no learner got so far")
    raise ContractError(f"{journal} does not begin with RunStarted: it is not a learner's journal")


def _limits(started: RunStarted) -> SupervisorConfig:
    """How many were to be kept; the defaults where the configuration is of another version."""
    try:
        return config_of(started.config).supervisor
    except ConfigError:
        return SupervisorConfig()


def _saved(journal: Path, first_position: int | None) -> dict[str, tuple[CheckpointSaved, float]]:
    """The `CheckpointSaved` of each name from a position on, with its second."""
    if first_position is None:
        return {}
    return {
        event.directory: (event, record.time_ns / 1e9)
        for record in read(journal, first_position)
        if record.kind == CheckpointSaved.__name__
        for event in (record.header_as(CheckpointSaved),)
    }


def _why_not(manifest: Manifest, event: CheckpointSaved | None, run_id: str) -> str:
    if manifest.run_id != run_id:
        return f"it belongs to run {manifest.run_id}"
    if event is None:
        return "no CheckpointSaved in the journal"
    if event.staged_at >= 0 and event.staged_at != manifest.journal_position:
        return f"the journal saved one staged at {event.staged_at} under its name"
    if event.state_digest != manifest.state_digest:
        return f"the journal saved one of digest {event.state_digest} under its name"
    return ""


def _kept(good: list[checkpoints.GoodCheckpoint], limits: SupervisorConfig) -> dict[str, str]:
    """Why each is kept, as `checkpoints.prune` chooses."""
    chosen = checkpoints.choose(good, limits.keep_last, limits.keep_best)
    last, best = [one.path.name for one in chosen.newest], list(chosen.best)
    reasons = {}
    for one in good:
        name, why = one.path.name, []
        if name in last:
            age = len(last) - last.index(name)
            why.append("newest" if age == 1 else f"among the newest {limits.keep_last}")
        if one in best:
            why.append("best score" if one is best[0] else f"among the best {limits.keep_best}")
        reasons[name] = ", ".join(why) or "until the next one is saved"
    return reasons


def verify(entry: Entry, journal: Path) -> str:
    """What is wrong with a checkpoint; empty if nothing is."""
    try:
        _, files = checkpoints.load(entry.path)
        if entry.saved is not None and entry.counts:
            _check_digests(entry.saved, entry.manifest)
        if NUMBERS_FILE not in files or STATE_FILE not in files:
            return f"it lacks {STATE_FILE} or {NUMBERS_FILE}: it is not a learner's checkpoint"
        _check_positions(_numbers(files[NUMBERS_FILE]), journal)
    except (ContractError, UnavailableError) as error:
        return str(error)
    return ""


def _check_digests(saved: CheckpointSaved, manifest: Manifest) -> None:
    for name, file in manifest.files.items():
        if saved.files.get(name) != file.sha256:
            raise ContractError(
                f"{name} has SHA-256 {file.sha256}, the journal saved {saved.files.get(name, 'none')}"
            )


def _check_positions(numbers: Numbers, journal: Path) -> None:
    wanted = positions_of(numbers)
    if not wanted:
        return
    missing = set(wanted)
    for record in read(journal, wanted[0]):
        if record.position in missing:
            if record.kind != ExperienceAdmitted.__name__:
                raise ContractError(f"the buffer held record {record.position}, which is a {record.kind}")
            missing.discard(record.position)
        if record.position >= wanted[-1]:
            break
    if missing:
        raise ContractError(f"the journal has no record {min(missing)}, which the buffer held")


def positions_of(numbers: Numbers) -> list[int]:
    """Journal positions that a checkpoint refers to, in order: what the buffer held and what was not consumed yet."""
    addresses = numbers.addresses
    held = addresses.get("buffer", {}).get("positions", [])
    return sorted({*held, *(entry[0] for entry in addresses.get("unconsumed", []))})


def _numbers(data: bytes) -> Numbers:
    try:
        return msgspec.json.decode(data, type=Numbers)
    except msgspec.DecodeError as error:
        raise ContractError(f"{NUMBERS_FILE} cannot be read: {error}") from error


def contents(path: Path) -> list[str]:
    """What is in a checkpoint, in words, a line for each part of the state.

    Raises:
        ContractError: It is damaged, or no learner's.
        UnavailableError: It cannot be read.
    """
    _, files = checkpoints.load(path)
    if NUMBERS_FILE not in files or STATE_FILE not in files:
        raise ContractError(f"{path} lacks {STATE_FILE} or {NUMBERS_FILE}: it is not a learner's checkpoint")
    try:
        return [*_tensors(files[STATE_FILE]), *_other(_numbers(files[NUMBERS_FILE]))]
    except (KeyError, TypeError, ValueError, struct.error) as error:
        raise ContractError(f"{path} is of a version that this program cannot explain: {error!r}") from error


def _tensors(data: bytes) -> list[str]:
    """From the header of a safetensors file: a length (u64, little-endian) and a JSON object."""
    (length,) = struct.unpack_from("<Q", data)
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    groups = (
        ("weights of the policy", "policy.", "policy.normaliser."),
        ("statistics of the observation normaliser", "policy.normaliser.", ""),
        ("optimiser moments of the policy network", "optimizer.policy.", ""),
        ("optimiser moments of the value network", "optimizer.value.", ""),
    )
    lines = []
    for words, prefix, but in groups:
        chosen = [
            entry
            for name, entry in header.items()
            if name.startswith(prefix) and not (but and name.startswith(but))
        ]
        numbers = sum(math.prod(entry["shape"]) for entry in chosen)
        lines.append(f"{words}: {len(chosen)} tensors, {numbers:,} numbers")
    return lines


def _other(numbers: Numbers) -> list[str]:
    state, addresses = numbers.numbers, numbers.addresses
    buffer, held = state["buffer"], addresses["buffer"]["positions"]
    span = f", {held[0]} to {held[-1]}" if held else ""
    unrolls = sum(state["unrolls"].values())
    answered = ", ".join(
        f"actor {actor} life {life} up to {newest}" for actor, (life, newest) in addresses["answered"].items()
    )
    experiences = f"{buffer['inserted']:,} experiences inserted, {buffer['consumed']:,} consumed"
    steps = f"{state['steps_done']:,} steps, {state['environment_steps']:,} environment steps, {unrolls:,} unrolls"
    actors = len(state["next_episodes"])
    return [
        "learning-rate schedules of both",
        f"reward scale: {state['reward_scale']['count']:,} rewards seen",
        f"buffer: {experiences}; its contents are read again from {len(held)} journal positions{span}",
        f"episode window: {len(state['episodes'])} episodes",
        f"counters: {steps}, next episode numbers of {actors} actors",
        f"credits ledger: {len(addresses['unconsumed'])} unrolls not consumed yet; answered: {answered or 'nobody'}",
    ]
