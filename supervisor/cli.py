"""`simic-supervisor`: the operator's door.

Exit status: 0 ok, 1 failed or degraded, 2 usage, 3 not running, 4 unknown, 78 configuration.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer
from rich.console import Console

from esper_simic.config import Config, to_yaml
from esper_simic.errors import ConfigError, SimicError, UnavailableError
from supervisor import audit, config_file, status, view
from supervisor.clock import SystemClock
from supervisor.journal import JournalDamage, Record, read
from supervisor.run import RunFacts, RunOutcome
from supervisor.run import run as supervise
from supervisor.vitals import Snapshot

OK, FAILED, USAGE, NOT_RUNNING, UNKNOWN, CONFIGURATION = 0, 1, 2, 3, 4, 78

LEARNED: Final = "learned"
EVALUATED: Final = (LEARNED, "heuristic", "patient", "random", "never-grow")
"""Policies measured at the end of a run, in the order of the table; the learned one, the dearest, begins first."""

RUNS: Final = Path("runs")

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
log_app = typer.Typer(no_args_is_help=True, help="Read and check the event log of a run.")
config_app = typer.Typer(no_args_is_help=True, help="Check and explain configurations.")
app.add_typer(log_app, name="log")
app.add_typer(config_app, name="config")

RunArgument = Annotated[Path | None, typer.Argument(help="A run directory; by default the newest under runs/.")]
PresetOption = Annotated[str, typer.Option(help="Shipped preset to start from.")]
FileOption = Annotated[Path | None, typer.Option("--config", help="YAML file that overlays the preset.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one key; may be repeated.")
]
OwnerOption = Annotated[str, typer.Option(help="Whose journal: supervisor, learner-0, …")]


def main() -> NoReturn:
    """Run the command line; every expected error is one line on standard error and its exit status."""
    try:
        app(standalone_mode=True)
    except ConfigError as error:
        _fail(f"configuration: {error}", CONFIGURATION)
    except JournalDamage as error:
        _fail(str(error), FAILED)
    except SimicError as error:
        _fail(str(error), FAILED)
    raise SystemExit(OK)


def _fail(message: str, code: int) -> NoReturn:
    print(f"simic-supervisor: {message}", file=sys.stderr)
    raise SystemExit(code)


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
    """Train a growth controller, then measure it on held-out episodes."""
    short = {"simic_trainer.seed": seed, "supervisor.max_seconds": max_seconds, "supervisor.max_steps": max_steps}
    given = [*(assignments or []), *(f"{key}={value}" for key, value in short.items() if value is not None)]
    config = config_file.load(preset, file, given)
    directory = run_dir or RUNS / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    console = Console()
    display = _Display(console, directory)
    facts = RunFacts(
        preset=preset,
        config_text=to_yaml(config),
        evaluation_policies=EVALUATED if evaluation else (),
        fingerprint={"python": sys.version.split()[0], "platform": sys.platform},
        versions=_versions(),
    )
    try:
        outcome = supervise(directory, config, facts, clock=SystemClock(), observer=display)
    finally:
        display.close()
    _report(console, directory, outcome, config)
    raise typer.Exit(outcome.exit_code)


class _Display:
    """Shows snapshots and writes them to TensorBoard. The writer is imported after the children were started: it
    costs half a second that would delay them."""

    def __init__(self, console: Console, directory: Path) -> None:
        self._view = view.LiveView(console)
        self._rate = view.RateMeter()
        self._directory = directory / "tensorboard"
        self._writer: Any = None

    def __call__(self, snapshot: Snapshot) -> None:
        self._view(snapshot)
        rate = self._rate.observe(snapshot)
        if snapshot.learner.step == 0:
            return
        if self._writer is None:
            from supervisor.metrics import TensorBoardWriter  # noqa: PLC0415 (see the class)

            self._writer = TensorBoardWriter(self._directory)
        metrics = snapshot.learner.metrics | {"steps_per_second": rate}
        self._writer.write(snapshot.environment.steps, metrics, time.time())

    def close(self) -> None:
        self._view.close()
        if self._writer is not None:
            self._writer.close()


def _versions() -> dict[str, str]:
    names = ("simic", "torch", "torch-geometric", "numpy", "gymnasium", "pyzmq", "msgspec")
    return {name: metadata.version(name) for name in names}


def _report(console: Console, directory: Path, outcome: RunOutcome, config: Config) -> None:
    """Print what a run came to and what to do next."""
    if outcome.evaluations:
        ordered = {name: outcome.evaluations[name] for name in EVALUATED if name in outcome.evaluations}
        console.print(view.result_table(ordered))
        for sentence in view.verdict(ordered, LEARNED):
            console.print(f"  {sentence}", highlight=False)
    console.print(f"\nrun {outcome.run_id} {outcome.outcome}: {outcome.reason}", highlight=False)
    if outcome.checkpoint is not None:
        checkpoint = outcome.checkpoint
        console.print(
            f"checkpoint: {checkpoint.path} (update {checkpoint.learner_step}, {checkpoint.environment_steps} "
            f"environment steps, state digest {checkpoint.digest})",
            highlight=False,
            soft_wrap=True,
        )
    if outcome.exit_code:
        console.print(f"logs of the processes: {directory / 'logs'}", highlight=False, soft_wrap=True)
    console.print(
        f"next:\n"
        f"  simic-supervisor status {directory}\n"
        f"  simic-supervisor log verify {directory} --owner learner-0\n"
        f"  tensorboard --logdir {directory / 'tensorboard'}\n"
        f"  simic-supervisor run --seed {config.simic_trainer.seed + 1}",
        highlight=False,
        soft_wrap=True,
    )


@app.command("status")
def show_status(
    run_dir: RunArgument = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, schema versioned.")] = False,
) -> None:
    """Show a run: live from its supervisor, or from its files. Exit 0 runs well, 1 degraded or failed, 3 not running."""
    try:
        directory = run_dir or status.newest_run(RUNS)
        snapshot = status.observe(directory)
    except UnavailableError as error:
        _fail(str(error), UNKNOWN)
    if as_json:
        import msgspec  # noqa: PLC0415

        print(msgspec.json.encode(snapshot).decode())
    else:
        Console().print(view.status_page(snapshot))
    codes = {
        status.Health.RUNNING: OK,
        status.Health.DEGRADED: FAILED,
        status.Health.FAILED: FAILED,
        status.Health.ENDED: NOT_RUNNING,
    }
    raise typer.Exit(codes[status.health(snapshot)])


@app.command()
def stop(run_dir: RunArgument = None) -> None:
    """Ask a run to stop: training ends, the learner leaves a checkpoint."""
    directory = run_dir or status.newest_run(RUNS)
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
        print(f"{segment.name}  {segment.first_position}..{last}  {segment.records} records  {segment.bytes} bytes  {kinds}")


@log_app.command("cat")
def log_cat(
    run_dir: RunArgument = None,
    owner: OwnerOption = "supervisor",
    start: Annotated[int, typer.Option(help="First position.")] = 0,
    limit: Annotated[int | None, typer.Option(help="At most so many records.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only this kind.")] = None,
) -> None:
    """Print records as JSON lines; frames by their sizes."""
    for record in _chosen(read(_journal(run_dir, owner), start), kind, limit):
        print(
            json.dumps(
                {
                    "position": record.position,
                    "time_ns": record.time_ns,
                    "kind": record.kind,
                    "header": record.header,
                    "frames": [frame.nbytes for frame in record.frames],
                }
            )
        )


def _chosen(records: Iterator[Record], kind: str | None, limit: int | None) -> Iterator[Record]:
    given = 0
    for record in records:
        if limit is not None and given >= limit:
            return
        if kind is None or record.kind == kind:
            given += 1
            yield record


@log_app.command("verify")
def log_verify(run_dir: RunArgument = None, owner: Annotated[str | None, typer.Option(help="Default: all.")] = None) -> None:
    """Read every byte of the journals and say whether all is as it was written."""
    directory = run_dir or status.newest_run(RUNS)
    journals = [_journal(directory, owner)] if owner else sorted(p for p in (directory / "journal").glob("*") if p.is_dir())
    if not journals:
        _fail(f"{directory} holds no journal", UNKNOWN)
    sound = True
    for journal in journals:
        report = audit.verify(journal)
        sound &= report.is_sound
        print(
            f"{journal.name}: {report.records} records, {report.bytes} bytes in {len(report.segments)} segments: "
            f"{'sound' if report.is_sound else 'DAMAGED'}"
        )
        if report.torn_tail is not None:
            tail = report.torn_tail
            print(f"  torn tail: {tail.bytes_removed} bytes at {tail.segment}:{tail.offset}; the next writer cuts it off")
        for damage in report.damage:
            print(f"  {damage.segment}:{damage.offset}: {damage.reason}")
    raise typer.Exit(OK if sound else FAILED)


def _journal(run_dir: Path | None, owner: str) -> Path:
    directory = run_dir or status.newest_run(RUNS)
    journal = directory / "journal" / owner
    if not journal.is_dir():
        known = sorted(path.name for path in (directory / "journal").glob("*") if path.is_dir())
        _fail(f"{directory} has no journal of {owner!r}; it has: {', '.join(known) or 'none'}", UNKNOWN)
    return journal


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
    key: Annotated[str, typer.Argument(help="Part of a dotted key; everything by default.")] = "",
    preset: PresetOption = "digits",
) -> None:
    """Explain keys: meaning, range, default and the preset's value."""
    config = config_file.load(preset)
    shown = 0
    for path, field, value in _fields(Config(), config):
        if key in path:
            shown += 1
            limits = ", ".join(str(rule) for rule in field.metadata)
            print(f"{path} = {value[1]}  (default {value[0]}{'; ' + limits if limits else ''})\n    {field.description or ''}")
    if not shown:
        raise ConfigError("no such key; `config explain` lists all", key)


def _fields(default: Any, effective: Any, prefix: str = "") -> Iterator[tuple[str, Any, tuple[Any, Any]]]:
    for name, field in type(default).model_fields.items():
        one, other = getattr(default, name), getattr(effective, name)
        if hasattr(type(one), "model_fields"):
            yield from _fields(one, other, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field, (one, other)


if __name__ == "__main__":
    main()
