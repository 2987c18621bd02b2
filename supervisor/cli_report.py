"""`simic-supervisor report`: a run as one page that can be opened, sent and printed."""

# ruff: noqa: T201 - the door's own words

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from esper_simic.errors import SimicError
from supervisor import files
from supervisor.cli_common import FAILED, OK, UNKNOWN, RunArgument, directory_of, fail, journals_of

if TYPE_CHECKING:
    from supervisor.report import Gathered, SeenEpisode

FILE: Final = "report.html"

LEFT_OUT: Final = "Left out, as was asked (--quick)."
NO_UNROLL: Final = "No experience has been taken in yet: there is no host to look at."


def report(
    run_dir: RunArgument = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"Where to write it; default: {FILE} in the run directory."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Without the grown host, which takes seconds to load.")
    ] = False,
) -> None:
    """Write a page about a run: learning curves, comparison, a grown host, events.

    One HTML file that needs nothing beside it. The run may be living, finished, killed or hardly begun; the page says
    what is missing. Exit status 1 where a journal is damaged: the page then shows what stands before the damage.
    """
    directory = directory_of(run_dir)
    if not journals_of(directory):
        fail(f"{directory} holds no journal: it is no run, or none that has begun", UNKNOWN)
    from supervisor.report import gather, page  # brings numpy and scipy, which no other command waits for

    gathered = gather(directory)
    target = out or directory / FILE
    is_left_out = quick or not gathered.grows_hosts
    data = page(gathered, LEFT_OUT if is_left_out else _seen(gathered)).encode()
    try:
        files.write_atomically(target, data)
    except OSError as error:
        fail(f"cannot write {target}: {error.strerror}; name another place with --out", FAILED)
    print(f"{target}: {len(data):,} bytes, run {gathered.state}")
    for damage in gathered.damage:
        print(f"  not all of it could be read: {damage}")
    raise typer.Exit(FAILED if gathered.damage else OK)


def _seen(gathered: Gathered) -> SeenEpisode | str:
    """An episode to look at, or why there is none."""
    from supervisor.report import LEARNER, choose

    choice = choose(gathered.learner.unrolls)
    if choice is None:
        return NO_UNROLL
    with warnings.catch_warnings():
        # torch-geometric compiles its helpers with a deprecated call while it is imported.
        warnings.simplefilter("ignore", FutureWarning)
        from supervisor.report.episode import read_episode  # brings torch

    try:
        host = str(gathered.setting("environment", "host"))
        return read_episode(gathered.directory / "journal" / LEARNER, choice, host)
    except SimicError as error:
        return f"The newest episode cannot be read: {error}."
