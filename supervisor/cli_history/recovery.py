"""`simic-supervisor verify-recovery`: the proof of recovery on the operator's own machine."""

# ruff: noqa: T201 - the door's own words

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from supervisor import recovery_proof
from supervisor.cli_common import FAILED, OK, JsonOption


def verify_recovery(
    role: Annotated[
        list[str] | None, typer.Option(help="learner, actor or supervisor; repeatable. Default: all.")
    ] = None,
    points: Annotated[
        list[str] | None, typer.Option("--point", help="Only this fault point; repeatable.")
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="Leave the runs and the notes in this directory.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Kill a small run at every named fault point and check what is left.

    Prints a table: records acknowledged, lost, duplicated, whether the whole journal folds to the same digests, and the
    seconds until training went on. Exit status 0 only if nothing was lost and every fault fired.
    """
    rows: list[recovery_proof.Row] = []
    with tempfile.TemporaryDirectory(prefix="simic-proof-") as temporary:
        directory = keep or Path(temporary)
        for name in role or recovery_proof.ROLES:
            planned = recovery_proof.plan(name, points or ())
            if planned:
                rows += recovery_proof.prove(planned, directory / name, tell=_tell)
    if as_json:
        print(msgspec.json.encode(rows).decode())
    else:
        print(recovery_proof.table(rows))
    raise typer.Exit(OK if rows and all(row.is_good for row in rows) else FAILED)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
