"""`simic-supervisor log`: the records of a run, and whether every byte of them is right."""

# ruff: noqa: T201 - the door's own words and options

from __future__ import annotations

import itertools
from typing import Annotated

import msgspec
import typer

from supervisor import audit
from supervisor.cli_common import (
    FAILED,
    OK,
    UNKNOWN,
    OwnerOption,
    RunArgument,
    commands,
    directory_of,
    fail,
    journal_of,
    journals_of,
)
from supervisor.journal import read

log_app = commands("Read and check the event log of a run.")


@log_app.command("ls")
def log_ls(run_dir: RunArgument = None, owner: OwnerOption = "supervisor") -> None:
    """List the segments of a journal."""
    for segment in audit.list_segments(journal_of(directory_of(run_dir), owner)):
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(segment.kinds.items()))
        last = "-" if segment.last_position is None else segment.last_position
        print(
            f"{segment.name}  {segment.first_position}..{last}  {segment.records} records  {segment.bytes} bytes"
            f"  {kinds}"
        )


@log_app.command("cat")
def log_cat(
    run_dir: RunArgument = None,
    owner: OwnerOption = "supervisor",
    start: Annotated[int, typer.Option(min=0, help="First position.")] = 0,
    limit: Annotated[int | None, typer.Option(min=0, help="At most so many records.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only this kind.")] = None,
) -> None:
    """Print records as JSON lines; frames by their sizes."""
    records = read(journal_of(directory_of(run_dir), owner), start)
    chosen = (record for record in records if kind is None or record.kind == kind)
    for record in itertools.islice(chosen, limit):
        shown = {
            "position": record.position,
            "time_ns": record.time_ns,
            "kind": record.kind,
            "header": record.header,
            "frames": [frame.nbytes for frame in record.frames],
        }
        print(msgspec.json.encode(shown).decode())


@log_app.command("verify")
def log_verify(
    run_dir: RunArgument = None, owner: Annotated[str | None, typer.Option(help="Default: all.")] = None
) -> None:
    """Check every byte of the journals."""
    directory = directory_of(run_dir)
    journals = [journal_of(directory, owner)] if owner else list(journals_of(directory).values())
    if not journals:
        fail(f"{directory} holds no journal", UNKNOWN)
    reports = [audit.verify(journal) for journal in journals]
    for journal, report in zip(journals, reports, strict=True):
        print(
            f"{journal.name}: {report.records} records, {report.bytes} bytes in {len(report.segments)} segments: "
            f"{'sound' if report.is_sound else 'DAMAGED'}"
        )
        if report.torn_tail is not None:
            tail = report.torn_tail
            where = f"{tail.segment.name}:{tail.offset}"
            print(f"  torn tail: {tail.bytes_removed} bytes at {where}; the next writer cuts it off")
        for damage in report.damage:
            print(f"  {damage.segment}:{damage.offset}: {damage.reason}")
    raise typer.Exit(OK if all(report.is_sound for report in reports) else FAILED)
