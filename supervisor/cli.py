"""`simic-supervisor`: the operator's door. It parses, asks, prints; what things look like is `view`'s affair."""

from __future__ import annotations

import io
import itertools
import platform
import shlex
import sys
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import msgspec
import typer
from rich.console import Console

from esper_simic.config import to_yaml
from esper_simic.errors import ConfigError, SimicError, UnavailableError
from supervisor import audit, config_file, status, view
from supervisor.clock import SystemClock
from supervisor.journal import read
from supervisor.run import RunFacts
from supervisor.run import run as supervise
from supervisor.vitals import Snapshot

if TYPE_CHECKING:
    from supervisor.metrics import TensorBoardWriter

OK, FAILED, USAGE, NOT_RUNNING, UNKNOWN, CONFIGURATION = 0, 1, 2, 3, 4, 78

STATUS_CODE: Final = {
    status.Health.STARTING: OK,
    status.Health.RUNNING: OK,
    status.Health.STOPPING: OK,
    status.Health.DEGRADED: FAILED,
    status.Health.FAILED: FAILED,
    status.Health.ENDED: NOT_RUNNING,
}
GATE_CODE: Final = STATUS_CODE | {status.Health.STARTING: FAILED, status.Health.STOPPING: FAILED}
"""`status` informs; `is-healthy` is a gate, which a run that has not begun or is ending does not pass."""

EVALUATED: Final = (view.LEARNED, "heuristic", "patient", "random", "never-grow")
"""Policies measured at the end of a run, in the order of the table; the learned one, the dearest, begins first."""

VERSIONED: Final = ("simic", "torch", "torch-geometric", "numpy", "gymnasium", "pyzmq", "msgspec")
RUNS: Final = Path("runs")


def _commands(text: str) -> typer.Typer:
    """A group of commands whose help and errors are plain text."""
    return typer.Typer(
        help=text,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


app = _commands(
    "Train controllers of growing networks, and look after the runs.\n\n"
    "Exit status: 0 ok, 1 failed or degraded, 2 usage, 3 not running, 4 unknown, 78 configuration."
)
log_app = _commands("Read and check the event log of a run.")
config_app = _commands("Check and explain configurations.")
app.add_typer(log_app, name="log")
app.add_typer(config_app, name="config")

RunArgument = Annotated[Path | None, typer.Argument(help="A run directory; by default the newest in runs/.")]
PresetOption = Annotated[str, typer.Option(help="Shipped preset to start from.")]
FileOption = Annotated[Path | None, typer.Option("--config", help="YAML file that overlays the preset.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Set one key; repeatable.")
]
OwnerOption = Annotated[str, typer.Option(help="Whose journal: supervisor, learner-0, ...")]


def main() -> NoReturn:
    """Run the command line; every expected error is one line on standard error and its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path may hold what the terminal's encoding cannot say; that must not end a run.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="simic-supervisor")
    except ConfigError as error:
        _fail(f"configuration: {error}", CONFIGURATION)
    except SimicError as error:
        _fail(str(error), FAILED)
    finally:
        _flush()
    raise SystemExit(OK)


def _flush() -> None:
    """Write out what is buffered; where the reader has gone away, nobody is left to be told."""
    if sys.stdout is None:  # closed by whoever started us
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        view.discard(sys.stdout)


def _fail(message: str, code: int) -> NoReturn:
    print(f"simic-supervisor: {message}", file=sys.stderr)
    raise SystemExit(code)


def _directory(run_dir: Path | None) -> Path:
    """The run directory that was named, or the newest; none there is exit status 4."""
    try:
        directory = run_dir or status.newest_run(RUNS)
    except UnavailableError as error:
        _fail(str(error), UNKNOWN)
    if not directory.is_dir():
        _fail(f"there is no directory {directory}", UNKNOWN)
    return directory


@app.command()
def run(
    preset: PresetOption = "digits",
    file: FileOption = None,
    assignments: SetOption = None,
    run_dir: Annotated[Path | None, typer.Option(help="Default: a new runs/<preset>-<time>.")] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set simic_trainer.seed=.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Training time limit of this invocation.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Environment step limit of this invocation.")] = None,
    evaluation: Annotated[bool, typer.Option(help="Measure the policies at the end.")] = True,
) -> None:
    """Train a controller, then measure it."""
    short = {
        "simic_trainer.seed": seed,
        "supervisor.max_seconds": max_seconds,
        "supervisor.max_steps": max_steps,
    }
    given = [*(assignments or []), *(f"{key}={value}" for key, value in short.items() if value is not None)]
    config = config_file.load(preset, file, given)
    directory = run_dir or RUNS / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _fail(f"cannot make the run directory {directory}: {error.strerror}", FAILED)
    facts = RunFacts(
        preset=preset,
        config_text=to_yaml(config),
        evaluation_policies=EVALUATED if evaluation else (),
        fingerprint={"python": platform.python_version(), "platform": sys.platform},
        versions={name: metadata.version(name) for name in VERSIONED},
    )
    console = view.SteadyConsole()
    display = _Display(console, directory)
    try:
        outcome = supervise(directory, config, facts, clock=SystemClock(), observer=display)
    finally:
        display.close()
    again = f"run --preset {preset} --seed {config.simic_trainer.seed + 1}"
    again += f" --config {shlex.quote(str(file))}" if file else ""
    view.report(console, directory, outcome, EVALUATED, again)
    raise typer.Exit(outcome.exit_code)


class _Display:
    """Shows snapshots and writes them to TensorBoard.

    TensorBoard's writer is imported with the first update: it costs a fifth of a second that would delay the children.
    """

    def __init__(self, console: Console, directory: Path) -> None:
        self._view, self._rate = view.LiveView(console), view.RateMeter()
        self._directory = directory / "tensorboard"
        self._writer: TensorBoardWriter | None = None

    def __call__(self, snapshot: Snapshot) -> None:
        rate = self._rate.observe(snapshot)
        self._view.show(snapshot, rate)
        if snapshot.learner.step == 0:
            return
        if self._writer is None:
            from supervisor.metrics import TensorBoardWriter

            self._writer = TensorBoardWriter(self._directory)
        metrics = snapshot.learner.metrics | {"steps_per_second": rate}
        self._writer.write(snapshot.environment.steps, metrics, time.time())

    def close(self) -> None:
        self._view.close()
        if self._writer is not None:
            self._writer.close()


@app.command("status")
def show_status(
    run_dir: RunArgument = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, schema versioned.")] = False,
) -> None:
    """Show a run, live or from its files.

    Exit status 0 while it runs, 1 degraded or failed, 3 not running any more, 4 unknown.
    """
    directory = _directory(run_dir)
    snapshot, health = _observed(directory)
    if as_json:
        print(msgspec.json.encode(snapshot).decode())
    else:
        console = Console()
        view.show(console, view.status_page(snapshot))
        if health is status.Health.ENDED and snapshot.evaluated:
            view.show_results(console, status.state_of(directory).evaluations, EVALUATED)
    raise typer.Exit(STATUS_CODE[health])


@app.command("is-healthy")
def is_healthy(run_dir: RunArgument = None) -> None:
    """Tell by the exit status if a run is well.

    0 it trains or evaluates with all its processes; 1 it does not: it starts, stops, is degraded or failed; 3 not
    running any more; 4 unknown.
    """
    snapshot, health = _observed(_directory(run_dir))
    code = GATE_CODE[health]
    words = (
        f"{snapshot.state}, update {snapshot.learner.step}, {snapshot.environment.steps} environment steps"
    )
    reason = f": {snapshot.reason}" if snapshot.reason else ""
    print(f"{'healthy' if code == OK else f'not healthy ({health})'}: {words}{reason}")
    raise typer.Exit(code)


def _observed(directory: Path) -> tuple[Snapshot, status.Health]:
    """What a run looks like; whatever prevents an answer makes it unknown."""
    try:
        snapshot = status.observe(directory)
        return snapshot, status.health(snapshot)
    except SimicError as error:
        _fail(str(error), UNKNOWN)


@app.command()
def stop(run_dir: RunArgument = None) -> None:
    """Ask a run to stop.

    Training ends, and the learner leaves a checkpoint.
    """
    directory = _directory(run_dir)
    try:
        reply = status.command(directory, "stop", uuid.uuid4().hex)
    except UnavailableError as error:
        _fail(str(error), NOT_RUNNING)
    if not reply.accepted:
        _fail(f"refused: {reply.reason}", FAILED)
    print(f"stopping {directory} (event {reply.position})")


@log_app.command("ls")
def log_ls(run_dir: RunArgument = None, owner: OwnerOption = "supervisor") -> None:
    """List the segments of a journal."""
    for segment in audit.list_segments(_journal(run_dir, owner)):
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
    records = read(_journal(run_dir, owner), start)
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
    directory = _directory(run_dir)
    journals = [_journal(directory, owner)] if owner else _journals(directory)
    if not journals:
        _fail(f"{directory} holds no journal", UNKNOWN)
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


def _journals(directory: Path) -> list[Path]:
    return sorted(path for path in (directory / "journal").glob("*") if path.is_dir())


def _journal(run_dir: Path | None, owner: str) -> Path:
    directory = _directory(run_dir)
    known = {path.name: path for path in _journals(directory)}
    if owner not in known:
        _fail(f"{directory} has no journal of {owner!r}; it has: {', '.join(known) or 'none'}", UNKNOWN)
    return known[owner]


@config_app.command("check")
def config_check(
    file: Annotated[Path | None, typer.Argument(help="YAML file that overlays the preset.")] = None,
    preset: PresetOption = "digits",
    assignments: SetOption = None,
) -> None:
    """Check a configuration and print it with every value resolved."""
    print(to_yaml(config_file.load(preset, file, assignments or [])), end="")


@config_app.command("explain")
def config_explain(
    part: Annotated[str, typer.Argument(help="Part of a dotted key; everything by default.")] = "",
    preset: PresetOption = "digits",
) -> None:
    """Explain keys: meaning, what they accept, default and the preset's value."""
    for key in config_file.explain(preset, part):
        facts = ", ".join(fact for fact in (f"default {key.default}", key.allowed) if fact)
        print(f"{key.path} = {key.value}  ({facts})\n    {key.description}")


if __name__ == "__main__":
    main()
