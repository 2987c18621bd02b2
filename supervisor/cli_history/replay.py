"""`simic-supervisor replay`: the learner's run done again from its journal, and compared with what it was."""

# ruff: noqa: T201 - the door's own words

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer

from supervisor import audit
from supervisor.cli_common import (
    FAILED,
    OK,
    USAGE,
    JsonOption,
    RunArgument,
    directory_of,
    fail,
    journal_of,
)
from supervisor.clock import SystemClock

if TYPE_CHECKING:
    from supervisor.playback import Progress

LINE_COLUMNS: Final = 79


def replay(
    run_dir: RunArgument = None,
    origin: Annotated[
        str, typer.Option("--from", metavar="CHECKPOINT", help="Name of a checkpoint, or start.")
    ] = "start",
    until: Annotated[int | None, typer.Option(min=1, help="Stop after this step and show it.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every byte first, and every checkpoint that is passed.")
    ] = False,
    stop_at: Annotated[
        str | None,
        typer.Option(
            "--break", metavar="WHERE", help="Stop before a step: 17, nan, or a comparison: 'loss > 10'."
        ),
    ] = None,
    owner: Annotated[str, typer.Option(help="Which learner.")] = "learner-0",
    as_json: JsonOption = False,
) -> None:
    """Do a run again from its journal and compare every step.

    One process, no environments. Exit status 0 if all that was replayed is equal, 1 with the first divergent step. On a
    terminal --break opens a console with the state before the step.
    """
    directory = directory_of(run_dir)
    journal = journal_of(directory, owner)
    audited = _audit(journal, as_json=as_json) if verify else None
    with warnings.catch_warnings():
        # torch-geometric compiles its helpers with a deprecated call while it is imported.
        warnings.simplefilter("ignore", FutureWarning)
        from supervisor import playback  # brings torch

    is_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    try:
        condition = playback.parse_break(stop_at) if stop_at is not None else None
        report = playback.replay(
            playback.Request(directory, owner, origin, until, verify, condition),
            SystemClock(),
            interact=playback.console if is_terminal else None,
            progress=_show if sys.stderr.isatty() else _silence,
        )
    except playback.RequestError as error:
        fail(str(error), USAGE)
    if sys.stderr.isatty():
        print("\r".ljust(LINE_COLUMNS), end="\r", file=sys.stderr)
    if audited is not None:
        report.audited = playback.Audited(
            records=audited.records,
            bytes=audited.bytes,
            segments=len(audited.segments),
            torn_tail_bytes=audited.torn_tail.bytes_removed if audited.torn_tail else 0,
        )
    if as_json:
        print(msgspec.json.encode(report.to_builtins()).decode())
    else:
        print("\n".join(playback.words(report)))
    raise typer.Exit(OK if report.is_good else FAILED)


def _audit(journal: Path, *, as_json: bool) -> audit.AuditReport:
    """Every byte of the journal; damage ends it here, before anything is folded."""
    report = audit.verify(journal)
    if report.is_sound:
        return report
    if as_json:
        damage = [msgspec.to_builtins(one) for one in report.damage]
        shown = {
            "schema": 1,
            "journal": str(journal),
            "outcome": "damaged",
            "is_good": False,
            "damage": damage,
        }
        print(msgspec.json.encode(shown).decode())
    else:
        for one in report.damage:
            print(f"{journal.name} is DAMAGED: {one.segment}:{one.offset}: {one.reason}")
        print("nothing was replayed; without --verify the replay goes as far as it can")
    raise typer.Exit(FAILED)


def _silence(progress: Progress) -> None:
    """Nobody watches."""


def _show(progress: Progress) -> None:
    left = f", {_duration(progress.seconds_left)} left" if progress.seconds_left is not None else ""
    line = f"\r{progress.steps:,} of {progress.steps_total:,} steps, {progress.steps_per_second:.1f} steps/s{left}"
    print(line.ljust(LINE_COLUMNS), end="", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
