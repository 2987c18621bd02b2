"""`simic-supervisor`: the operator's door. It parses, asks, prints; what things look like is `view`'s affair."""

from __future__ import annotations

import contextlib
import io
import platform
import shlex
import sys
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn, cast

import msgspec
import typer
from rich.console import Console

from esper_simic.config import Config, SupervisorConfig, parse, to_yaml
from esper_simic.config_gym import BLUEPRINT_CHOICE, GROWING_HOST
from esper_simic.errors import ConfigError, SimicError, UnavailableError
from supervisor import cli_curriculum, cli_history, cli_report, cli_trials, config_file, faults, status, view
from supervisor.cli_common import (
    CONFIGURATION,
    FAILED,
    NOT_RUNNING,
    OK,
    PRESET_HELP,
    RUNS,
    UNKNOWN,
    USAGE,
    FileOption,
    JsonOption,
    PresetOption,
    RunArgument,
    SetOption,
    commands,
    directory_of,
    fail,
)
from supervisor.clock import SystemClock
from supervisor.decide import LIMITS
from supervisor.events import FIXED, LEARNED
from supervisor.loop import RunFacts
from supervisor.outcome import past_of
from supervisor.resume import RESTART_BEHAVIORS, RestartBehavior, check_resumable, prepare
from supervisor.run import run as supervise
from supervisor.vitals import Snapshot

if TYPE_CHECKING:
    from supervisor.metrics.endpoint import HttpEndpoint
    from supervisor.metrics.prometheus import PrometheusExporter
    from supervisor.metrics.tensorboard import TensorBoardWriter

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

EVALUATED: Final = (
    LEARNED,
    FIXED,
    "heuristic",
    "patient",
    "fixed-schedule",
    "farm",
    "random",
    "never-grow",
)
"""Policies measured at the end of a run, in the order of the table. The two dearest begin first: whoever trains the
networks that the learned policy grew has to grow them again."""

EVALUATED_IN_PLAY: Final = (LEARNED, "random")
"""Policies measured at the end of a run in an environment that is no growing host."""

EVALUATED_IN_CHOICE: Final = (LEARNED, "best-possible", "best-single", "random")
"""Those where a blueprint is chosen and what each would have come to is known."""

TRAINING_LIMITS: Final = frozenset(f"supervisor.{key}" for key in LIMITS)
"""Keys by which a finished run is extended, where they are named on the command line."""

DEFAULT_PRESET: Final = "digits"

SCALARS_RETRY_S: Final = 30.0
"""After so long a disk that did not take the scalars is tried again."""

VERSIONED: Final = ("simic", "torch", "torch-geometric", "numpy", "gymnasium", "pyzmq", "msgspec")

app = commands(
    "Train controllers of growing networks, and look after the runs.\n\n"
    "Exit status: 0 ok, 1 failed or degraded, 2 usage, 3 not running, 4 unknown, 78 configuration."
)
config_app = commands("Check and explain configurations.")


def main() -> NoReturn:
    """Run the command line; every expected error is one line on standard error and its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path may hold what the terminal's encoding cannot say; that must not end a run.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="simic-supervisor")
    except ConfigError as error:
        fail(f"configuration: {error}", CONFIGURATION)
    except SimicError as error:
        fail(str(error), FAILED)
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


@app.command()
def run(
    preset: Annotated[str | None, typer.Option(help=PRESET_HELP, show_default=DEFAULT_PRESET)] = None,
    file: FileOption = None,
    assignments: SetOption = None,
    run_dir: Annotated[Path | None, typer.Option(help="Default: a new runs/<preset>-<time>.")] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set simic_trainer.seed=.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Training time limit of this invocation.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Environment step limit of this invocation.")] = None,
    evaluation: Annotated[bool, typer.Option(help="Measure the policies at the end.")] = True,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with this run under its own configuration; --set for supervisor.* only."),
    ] = None,
    train_on: Annotated[
        bool,
        typer.Option("--train-on", help="Let a training go on that halted itself or met its timeout."),
    ] = False,
    restart_behavior: Annotated[
        str,
        typer.Option(
            metavar="|".join(RESTART_BEHAVIORS),
            help="What to do with a run that --run-dir holds: go on, move it aside, remove it.",
        ),
    ] = "resume",
) -> None:
    """Train a controller, then measure it. A run directory that holds a run goes on with it."""
    faults.arm("supervisor")
    short = {
        "simic_trainer.seed": seed,
        "supervisor.max_seconds": max_seconds,
        "supervisor.max_steps": max_steps,
    }
    given = [*(assignments or []), *(f"{key}={value}" for key, value in short.items() if value is not None)]
    if resume is not None:
        others = {"--preset": preset, "--config": file, "--run-dir": run_dir}
        unwanted = [name for name, value in others.items() if value is not None]
        _refuse_beside_resume(unwanted + (["--restart-behavior"] if restart_behavior != "resume" else []))
        directory = resume
        begun_with, config = _own_configuration(resume, given)
    else:
        begun_with = preset or DEFAULT_PRESET
        config = config_file.load(begun_with, file, given)
        directory = run_dir or RUNS / f"{begun_with}-{time.strftime('%Y%m%d-%H%M%S')}"
        _make_way(directory, restart_behavior)
    facts = _facts(begun_with, config, given, evaluation=evaluation, trains_on=train_on)
    console = view.SteadyConsole()
    display = _Display(console, directory, config.supervisor)
    try:
        outcome = supervise(directory, config, facts, clock=SystemClock(), observer=display)
    finally:
        display.close()
    again = "" if resume else _again(begun_with, config.simic_trainer.seed, file, given)
    if outcome.evaluations:
        from supervisor.results import show_results  # brings numpy and scipy

        show_results(console, outcome.evaluations, config.simic_trainer.seed, EVALUATED)
    wanted_h = config.simic_trainer.convergence_time_hours
    view.report(console, directory, outcome, again, view.convergence(display.metrics, wanted_h))
    raise typer.Exit(outcome.exit_code)


def _refuse_beside_resume(unwanted: list[str]) -> None:
    if unwanted:
        named = ", ".join(unwanted)
        fail(f"--resume RUN goes on with that run under its own configuration: leave out {named}", USAGE)


def _facts(preset: str, config: Config, given: list[str], *, evaluation: bool, trains_on: bool) -> RunFacts:
    """What is written down before anything happens; `given` are the assignments of the command line."""
    return RunFacts(
        preset=preset,
        config_text=to_yaml(config),
        evaluation_policies=_evaluated(config) if evaluation else (),
        fingerprint={"python": platform.python_version(), "platform": sys.platform},
        versions={name: metadata.version(name) for name in VERSIONED},
        is_extended=any(assignment.partition("=")[0].strip() in TRAINING_LIMITS for assignment in given),
        trains_on=trains_on,
    )


def _again(preset: str, seed: int, file: Path | None, given: list[str]) -> str:
    """The command for another run like this one, of the next seed."""
    words = ["run", "--preset", preset, "--seed", str(seed + 1), *(["--config", str(file)] if file else [])]
    for assignment in given:
        if assignment.partition("=")[0].strip() != "simic_trainer.seed":
            words += ["--set", assignment]
    return shlex.join(words)


def _own_configuration(directory: Path, given: list[str]) -> tuple[str, Config]:
    """Preset and configuration of a run, as its journal has them, with changes that do not make another run of it."""
    started = past_of(directory).started if directory.is_dir() else None
    if started is None:
        fail(f"{directory} holds no run to resume", UNKNOWN)
    config = parse(started.config_text, assignments=given, is_recorded=True)
    check_resumable(started.config, config)
    return started.preset, config


def _evaluated(config: Config) -> tuple[str, ...]:
    by_world = {GROWING_HOST: EVALUATED, BLUEPRINT_CHOICE: EVALUATED_IN_CHOICE}
    return by_world.get(config.environment.id, EVALUATED_IN_PLAY)


def _make_way(directory: Path, restart_behavior: str) -> None:
    if restart_behavior not in RESTART_BEHAVIORS:
        fail(f"--restart-behavior is {' or '.join(RESTART_BEHAVIORS)}, not {restart_behavior!r}", USAGE)
    aside = prepare(directory, cast("RestartBehavior", restart_behavior))
    if aside is not None:
        print(f"the run in {directory} was moved to {aside}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make the run directory {directory}: {error.strerror}", FAILED)


class _Display:
    """Shows snapshots and writes them to TensorBoard.

    TensorBoard's writer is imported with the first update: it costs a fifth of a second that would delay the children.
    A disk that does not take the scalars is no reason to end a run: after a pause another file is begun.
    """

    def __init__(self, console: Console, directory: Path, config: SupervisorConfig) -> None:
        self._exporter: PrometheusExporter | None = None
        self._endpoint: HttpEndpoint | None = None
        self._config = config
        self._console, self._view, self._rate = console, view.LiveView(console), view.RateMeter()
        self._directory = directory / "tensorboard"
        self._writer: TensorBoardWriter | None = None
        self._not_before_s = 0.0
        self.metrics: dict[str, float] = {}
        """What the learner told last."""
        self._is_introduced = False
        self._execution = ""

    def __call__(self, snapshot: Snapshot) -> None:
        if snapshot.resumes and not self._is_introduced:
            view.tell(self._console, f"going on with run {snapshot.run_id}")
        self._is_introduced = True
        if snapshot.execution != self._execution:
            self._execution = snapshot.execution
            view.tell(self._console, f"the learner computes on {self._execution}")
        rate = self._rate.observe(snapshot)
        self.metrics = snapshot.learner.metrics
        if self._config.metrics_port is not None:
            self._serve(snapshot, rate, self._config.metrics_port)
        self._view.show(snapshot, rate)
        # Where this supervisor found the run was drawn by the one before.
        is_new = snapshot.learner.step > snapshot.learner.before
        if is_new and snapshot.elapsed_s >= self._not_before_s:
            self._draw(snapshot, rate)

    def _serve(self, snapshot: Snapshot, rate: float, port: int) -> None:
        """Let Prometheus see this moment; a port that cannot be had is told once and tried again."""
        if self._exporter is None or self._endpoint is None:
            from supervisor.metrics.endpoint import HttpEndpoint
            from supervisor.metrics.prometheus import PrometheusExporter

            self._exporter = PrometheusExporter({"run_id": snapshot.run_id, "preset": snapshot.preset})
            self._endpoint = HttpEndpoint(self._config.metrics_host, port, {"/metrics": self._exporter.page})
        self._exporter.show(
            snapshot.learner.metrics
            | snapshot.counters
            | {
                "learner_step": float(snapshot.learner.step),
                "environment_steps": float(snapshot.environment.steps),
                "steps_per_second": rate,
            }
            | {f"memory_bytes.{one.role}-{one.index}": float(one.memory_bytes) for one in snapshot.processes},
            snapshot.histograms,
        )
        before, is_chosen = self._endpoint.note, self._endpoint.port != port
        self._endpoint.attend(snapshot.elapsed_s)
        host = self._config.metrics_host
        if before and not self._endpoint.note:
            view.tell(self._console, f"metrics are served on http://{host}:{self._endpoint.port}/metrics now")
        if self._endpoint.port != port and not is_chosen:
            view.tell(self._console, f"metrics are served on http://{host}:{self._endpoint.port}/metrics")
        if self._endpoint.note and not before:
            view.tell(self._console, f"{self._endpoint.note}; the run goes on without")

    def _draw(self, snapshot: Snapshot, rate: float) -> None:
        metrics = snapshot.learner.metrics | {"steps_per_second": rate}
        try:
            if self._writer is None:
                from supervisor.metrics.tensorboard import TensorBoardWriter

                self._writer = TensorBoardWriter(self._directory)
            self._writer.write(snapshot.environment.steps, metrics, time.time())
        except UnavailableError as error:
            self._not_before_s = snapshot.elapsed_s + SCALARS_RETRY_S
            self._give_up_scalars(error)

    def _give_up_scalars(self, error: UnavailableError) -> None:
        view.tell(self._console, f"{error}; the run goes on without them and tries again")
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(UnavailableError):  # it has just said so
                writer.close()

    def close(self) -> None:
        self._view.close()
        if self._endpoint is not None:
            self._endpoint.close()
        if self._writer is not None:
            try:
                self._writer.close()
            except UnavailableError as error:
                view.tell(self._console, str(error))


@app.command("status")
def show_status(
    run_dir: RunArgument = None,
    as_json: JsonOption = False,
) -> None:
    """Show a run, live or from its files.

    Exit status 0 while it runs, 1 degraded or failed, 3 not running any more, 4 unknown.
    """
    directory = directory_of(run_dir)
    snapshot, health = _observed(directory)
    if as_json:
        print(msgspec.json.encode(snapshot).decode())
    else:
        console = Console()
        view.show(console, view.status_page(snapshot))
        if health is status.Health.ENDED and snapshot.evaluated:
            from supervisor.results import show_results  # brings numpy and scipy
            from supervisor.standings import run_seed_of

            state = status.state_of(directory)
            show_results(console, state.evaluations, run_seed_of(state.started), EVALUATED)
    raise typer.Exit(STATUS_CODE[health])


@app.command("is-healthy")
def is_healthy(run_dir: RunArgument = None) -> None:
    """Tell by the exit status if a run is well.

    0 it trains or evaluates with all its processes; 1 it does not: it starts, stops, is degraded or failed; 3 not
    running any more; 4 unknown.
    """
    snapshot, health = _observed(directory_of(run_dir))
    code = GATE_CODE[health]
    words = (
        f"{snapshot.state}, update {snapshot.learner.step}, {snapshot.environment.steps} environment steps"
    )
    why = "; ".join([snapshot.reason] if snapshot.reason else status.worries(snapshot))
    reason = f": {why}" if why else ""
    print(f"{'healthy' if code == OK else f'not healthy ({health})'}: {words}{reason}")
    raise typer.Exit(code)


def _observed(directory: Path) -> tuple[Snapshot, status.Health]:
    """What a run looks like; whatever prevents an answer makes it unknown."""
    try:
        snapshot = status.observe(directory)
        return snapshot, status.health(snapshot)
    except SimicError as error:
        fail(str(error), UNKNOWN)


@app.command()
def stop(run_dir: RunArgument = None) -> None:
    """Ask a run to stop.

    Training ends, and the learner leaves a checkpoint.
    """
    directory = directory_of(run_dir)
    try:
        reply = status.command(directory, "stop", uuid.uuid4().hex)
    except UnavailableError as error:
        fail(str(error), NOT_RUNNING)
    if not reply.accepted:
        fail(f"refused: {reply.reason}", FAILED)
    print(f"stopping {directory} (event {reply.position})")


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


# Help lists commands in this order: what is above first, then these.
app.command("report")(cli_report.report)
app.command("curriculum")(cli_curriculum.curriculum)
app.command("replay")(cli_history.replay)
app.command("verify-recovery")(cli_history.verify_recovery)
app.command("try-blueprints")(cli_trials.try_blueprints)
app.add_typer(config_app, name="config")
app.add_typer(cli_history.checkpoint_app, name="checkpoint")
app.add_typer(cli_history.log_app, name="log")


if __name__ == "__main__":
    main()
