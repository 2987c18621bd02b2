"""`simic-supervisor checkpoint`: what there is to come back to, what it holds, and whether it is whole."""

# ruff: noqa: T201 - the door's own words

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer

from esper_simic.errors import ContractError, UnavailableError
from supervisor.cli_common import (
    FAILED,
    OK,
    UNKNOWN,
    USAGE,
    RunArgument,
    commands,
    directory_of,
    fail,
    journal_of,
)
from supervisor.cli_history.inventory import Entry, Inventory, contents, take_inventory, verify
from supervisor.clock import SystemClock
from supervisor.files import write_atomically

checkpoint_app = commands("List, explain and check the checkpoints of a run, and save adapters alone.")

NameArgument = Annotated[str | None, typer.Argument(help="A checkpoint; by default the newest that counts.")]
LearnerOption = Annotated[str, typer.Option(help="Which learner.")]

NOT_RESTORED: Final = """\
NOT restored by it:
  environments of the actors: {environments}
  messages under way: unacknowledged unrolls are sent again by the actors that hold them, others are lost
  metrics, rates and TensorBoard: they are not state; TensorBoard goes on at the same environment step
  processes, sockets, pids: made anew"""

LOST: Final = "lost and counted (asynchronous mode); their actors begin new episodes"
SIMULATED: Final = "not in it either, but simulated again from seeds and recorded actions (lockstep mode)"


HEADINGS: Final[tuple[str, ...]] = ("NAME", "STEP", "ENV STEPS", "BYTES", "AGE", "SCORE", "COUNTS", "KEPT")


@checkpoint_app.command("ls")
def checkpoint_ls(run_dir: RunArgument = None, owner: LearnerOption = "learner-0") -> None:
    """List the checkpoints: only those that the journal says were saved count."""
    found = _inventory(run_dir, owner)
    if not found.entries and not found.bad:
        print(f"no checkpoints in {found.directory}")
    rows = [HEADINGS, *(_row(entry, SystemClock().now_s()) for entry in found.entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    for row in rows if found.entries else ():
        cells = [
            cell.rjust(width) if 1 <= at <= 5 else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    for name, reason in found.bad.items():
        print(f"{name} is BAD: {reason}")


def _row(entry: Entry, now_s: float) -> tuple[str, ...]:
    manifest = entry.manifest
    return (
        entry.name,
        f"{manifest.step:,}",
        f"{manifest.environment_steps:,}",
        f"{sum(file.bytes for file in manifest.files.values()):,}",
        _age(now_s - entry.saved_s),
        "-" if manifest.score is None else f"{manifest.score:.2f}",
        "yes" if entry.counts else "NO: " + entry.why_not,
        entry.kept,
    )


def _age(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


@checkpoint_app.command("show")
def checkpoint_show(
    run_dir: RunArgument = None, name: NameArgument = None, owner: LearnerOption = "learner-0"
) -> None:
    """Show what a checkpoint holds, and what is and is not restored by it."""
    found = _inventory(run_dir, owner)
    entry = _entry(found, name)
    manifest, held = entry.manifest, contents(entry.path)
    print(f"{found.directory / entry.name}")
    print(
        f"  run {manifest.run_id}, step {manifest.step:,}, {manifest.environment_steps:,} environment steps"
    )
    print(
        f"  state of all records before {manifest.journal_position} of {owner}, digest {manifest.state_digest}"
    )
    saved = datetime.fromtimestamp(entry.saved_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    print(f"  saved {saved}; {'it counts' if entry.counts else f'it does NOT count: {entry.why_not}'}")
    print(f"  kept: {entry.kept}")
    if manifest.score is not None:
        print(f"  score {manifest.score:.4g}: mean return of the recent training episodes")
    print(
        "  fingerprint " + " ".join(f"{key}={value}" for key, value in manifest.fingerprint.items() if value)
    )
    for file, described in manifest.files.items():
        print(f"  {file}: {described.bytes:,} bytes, SHA-256 {described.sha256}")
    print("restored by it:")
    for line in held:
        print(f"  {line}")
    print(NOT_RESTORED.format(environments=SIMULATED if found.is_lockstep else LOST))


@checkpoint_app.command("verify")
def checkpoint_verify(
    run_dir: RunArgument = None,
    name: Annotated[str | None, typer.Argument(help="A checkpoint; by default all.")] = None,
    owner: LearnerOption = "learner-0",
) -> None:
    """Check every file by size and SHA-256, and that the journal holds what the checkpoint refers to."""
    found = _inventory(run_dir, owner)
    entries = found.entries if name is None else [_entry(found, name)]
    bad = dict(found.bad) if name is None else {}
    if not entries and not bad:
        print(f"no checkpoints in {found.directory}")
    for entry in entries:
        problem = verify(entry, found.journal)
        if problem:
            bad[entry.name] = problem
        else:
            counts = "" if entry.counts else f"; it does not count: {entry.why_not}"
            print(f"{entry.name}: sound, {len(entry.manifest.files)} files{counts}")
    for path, reason in bad.items():
        print(f"{path} is BAD: {reason}")
    raise typer.Exit(FAILED if bad else OK)


@checkpoint_app.command("adapters")
def checkpoint_adapters(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write them, as safetensors.")],
    run_dir: RunArgument = None,
    name: NameArgument = None,
    owner: LearnerOption = "learner-0",
) -> None:
    """Save the adapters of a checkpoint alone: another run begins with them by simic_trainer.initial_adapters."""
    found = _inventory(run_dir, owner)
    entry = _entry(found, name)
    if out.exists():
        fail(f"{out} is there already; name another --out, or move it away", USAGE)
    from supervisor.roles.adapters import adapters_in  # brings torch
    from supervisor.roles.fold import config_of_journal, read_state

    try:
        _, state = read_state(entry.path)
        adapters = adapters_in(state.tensors, config_of_journal(found.journal))
    except (ContractError, UnavailableError) as error:
        fail(f"{found.directory / entry.name}: {error}", FAILED)
    try:
        write_atomically(out, adapters.to_bytes())
    except OSError as error:
        fail(f"cannot write {out}: {error.strerror}", FAILED)
    print(
        f"{out}: adapters of {adapters.matrices} matrices, rank {adapters.rank}, alpha {adapters.alpha:g}, "
        f"of update {entry.manifest.step:,}; trained on weights of digest {adapters.base_digest}"
    )


def _inventory(run_dir: Path | None, owner: str) -> Inventory:
    directory = directory_of(run_dir)
    return take_inventory(directory, journal_of(directory, owner))


def _entry(found: Inventory, name: str | None) -> Entry:
    """The checkpoint of that name, or the newest that counts; none is exit status 4, a bad one 1."""
    if name in found.bad:
        fail(f"{name} is bad: {found.bad[name]}", FAILED)
    fitting = [entry for entry in found.entries if (entry.counts if name is None else entry.name == name)]
    if not fitting:
        names = ", ".join(entry.name for entry in found.entries) or "none"
        fail(f"{found.directory} has no checkpoint {name or 'that counts'}; it has: {names}", UNKNOWN)
    return fitting[-1]
