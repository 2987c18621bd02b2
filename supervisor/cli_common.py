"""What the commands of the operator's door share: exit statuses, options, and how an expected error ends."""

# ruff: noqa: T201 - the door's own words

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from esper_simic.errors import UnavailableError
from supervisor import config_file, status

OK, FAILED, USAGE, NOT_RUNNING, UNKNOWN, CONFIGURATION = 0, 1, 2, 3, 4, 78

RUNS: Final = Path("runs")

RunArgument = Annotated[Path | None, typer.Argument(help="A run directory; by default the newest in runs/.")]
PRESET_HELP: Final = f"Shipped preset to start from: {', '.join(config_file.preset_names())}."
PresetOption = Annotated[str, typer.Option(help=PRESET_HELP)]
FileOption = Annotated[Path | None, typer.Option("--config", help="YAML file that overlays the preset.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Set one key; repeatable.")
]
OwnerOption = Annotated[str, typer.Option(help="Whose journal: supervisor, learner-0, ...")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object, schema versioned.")]


def commands(text: str) -> typer.Typer:
    """A group of commands whose help and errors are plain text."""
    return typer.Typer(
        help=text,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


def fail(message: str, code: int) -> NoReturn:
    """Say in one line why there is nothing else to say, and end."""
    print(f"simic-supervisor: {message}", file=sys.stderr)
    raise SystemExit(code)


def directory_of(run_dir: Path | None) -> Path:
    """The run directory that was named, or the newest; none there is exit status 4."""
    try:
        directory = run_dir or status.newest_run(RUNS)
    except UnavailableError as error:
        fail(str(error), UNKNOWN)
    if not directory.is_dir():
        fail(f"there is no directory {directory}", UNKNOWN)
    return directory


def journals_of(directory: Path) -> dict[str, Path]:
    """The journals of a run by their owners."""
    return {path.name: path for path in sorted((directory / "journal").glob("*")) if path.is_dir()}


def journal_of(directory: Path, owner: str) -> Path:
    """The journal of one owner; none there is exit status 4."""
    known = journals_of(directory)
    if owner not in known:
        fail(f"{directory} has no journal of {owner!r}; it has: {', '.join(known) or 'none'}", UNKNOWN)
    return known[owner]
