"""`simic-supervisor curriculum`: asking something of the curriculum of a run that trains."""

# ruff: noqa: T201 - the door's own words

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from esper_simic.config import parse
from esper_simic.config_curriculum import CurriculumStage
from esper_simic.curriculum_facts import CoordinationMode, CurriculumReply, CurriculumRequest
from esper_simic.errors import UnavailableError
from supervisor import status
from supervisor.cli_common import (
    FAILED,
    NOT_RUNNING,
    OK,
    UNKNOWN,
    USAGE,
    JsonOption,
    RunArgument,
    directory_of,
    fail,
)
from supervisor.coordination import COMMAND
from supervisor.view import STAGE


def curriculum(
    run_dir: RunArgument = None,
    advance: Annotated[
        bool, typer.Option("--advance", help="Go on to the next stage now, and stay.")
    ] = False,
    hold: Annotated[bool, typer.Option("--hold", help="Stay in this stage until told otherwise.")] = False,
    release: Annotated[
        bool, typer.Option("--release", help="Go by the run's own stages again, whatever was asked before.")
    ] = False,
    stage: Annotated[str | None, typer.Option(metavar="NAME", help="The stage that --mode is about.")] = None,
    mode: Annotated[
        str,
        typer.Option(
            metavar="|".join(CoordinationMode.__members__),
            help="With --stage: who sets the pace; docs/decisions/0018-curriculum.md has what each means.",
        ),
    ] = CoordinationMode.STRATEGY_DRIVEN.value,
    min_success_rate: Annotated[
        float | None, typer.Option(help="TASK_DRIVEN: instead of the stage's.")
    ] = None,
    min_episodes: Annotated[int | None, typer.Option(help="TASK_DRIVEN: instead of the stage's.")] = None,
    max_episodes: Annotated[int | None, typer.Option(help="TASK_DRIVEN: instead of the stage's.")] = None,
    request_id: Annotated[
        str | None, typer.Option(help="A repeated one gets its first answer; default: a new one.")
    ] = None,
    wait_seconds: Annotated[float, typer.Option(help="How long to wait for the answer.")] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Ask something of the curriculum of a run that trains, and tell the answer.

    Exit status 0 where it was obeyed, 1 where it was refused, 3 where nobody answers.
    """
    if sum((advance, hold, release, stage is not None)) != 1:
        fail("ask one thing: --advance, --hold, --release or --stage NAME", USAGE)
    if mode not in CoordinationMode.__members__:
        fail(f"--mode is {' or '.join(CoordinationMode.__members__)}, not {mode!r}", USAGE)
    directory = directory_of(run_dir)
    stages = _stages(directory)
    if stage is None:
        asked = CoordinationMode.INDEPENDENT if release else CoordinationMode.STRATEGY_DRIVEN
        present = _present(directory)
        # Whoever asks again by an id may have got there by the first time, and shall hear its answer.
        is_first = request_id is None
        about = _next(stages, present, is_first=is_first) if advance else stages[present]
    else:
        asked = CoordinationMode(mode)
        # An unknown one is the learner's to refuse: it knows what it follows.
        about = next((one for one in stages if one.name == stage), stages[0])
    request = CurriculumRequest(
        request_id=request_id or uuid.uuid4().hex,
        stage=about.name if stage is None else stage,
        difficulty=about.difficulty,
        min_success_rate=about.min_success_rate if min_success_rate is None else min_success_rate,
        min_episodes=about.min_episodes if min_episodes is None else min_episodes,
        max_episodes=about.max_episodes if max_episodes is None else max_episodes,
        mode=asked,
        issued_at_s=time.time(),
    )
    _check_sendable(request)
    raise typer.Exit(_told(directory, request, wait_seconds, as_json=as_json))


def _check_sendable(request: CurriculumRequest) -> None:
    """Refuse here what the supervisor's door would drop without a word: a name too long, a number beyond all counts."""
    try:
        msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=CurriculumRequest)
    except (msgspec.ValidationError, OverflowError) as error:
        fail(f"this cannot be asked: {error}", USAGE)


def _told(directory: Path, request: CurriculumRequest, wait_s: float, *, as_json: bool) -> int:
    """Ask, and print the answer; the exit status."""
    try:
        answer = status.command(directory, COMMAND, request.request_id, request, int(1000 * wait_s))
    except UnavailableError as error:
        if not status.is_supervised(directory):
            fail(str(error), NOT_RUNNING)
        fail(
            f"no answer within {wait_s:g} s; the same command with --request-id {request.request_id} tells it later",
            NOT_RUNNING,
        )
    if as_json:
        print(msgspec.json.encode(answer).decode())
    elif answer.accepted and answer.reply is not None:
        print(_words(answer.reply))
    if not answer.accepted:
        fail(f"refused: {answer.reason}", FAILED)
    return OK


def _words(reply: CurriculumReply) -> str:
    went_on = "went on to" if reply.advanced else "is in"
    return (
        f"granted: the training {went_on} stage {reply.stage!r}, {reply.episodes} episodes in its round, "
        f"success rate {reply.success_rate:.2f}"
    )


def _stages(directory: Path) -> tuple[CurriculumStage, ...]:
    """The stages of the run, as its journal has them."""
    try:
        started = status.state_of(directory).started
    except UnavailableError as error:
        fail(str(error), UNKNOWN)
    text = "" if started is None else started.config_text
    return parse(text, is_recorded=True).simic_trainer.curriculum_stages


def _next(stages: tuple[CurriculumStage, ...], present: int, *, is_first: bool) -> CurriculumStage:
    """The stage after the present one; the last one itself where this is not the request's first time."""
    if is_first and present + 1 >= len(stages):
        fail(f"refused: stage {stages[present].name!r} is the last one, there is none to go on to", FAILED)
    return stages[min(present + 1, len(stages) - 1)]


def _present(directory: Path) -> int:
    """The index of the stage that is on, as the learner last said."""
    if not status.is_supervised(directory):
        fail(f"no supervisor lives in {directory}", NOT_RUNNING)
    found = status.observe(directory).learner.metrics.get(STAGE)
    if found is None:
        fail("the learner has not said yet in which stage it is, or follows no curriculum", FAILED)
    return int(found)
