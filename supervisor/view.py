"""What a person sees: a live picture of a run, a status page, the words at its end; the comparison is in `results`.

On a terminal the picture moves. Elsewhere there is a line for every change of state and one now and then: plain ASCII,
no colour, nothing cut to a width nobody has.
"""

from __future__ import annotations

import os
import shlex
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from supervisor.child import CONFIGURATION_EXIT_CODE
from supervisor.outcome import RunOutcome
from supervisor.state import Phase
from supervisor.vitals import ProcessView, Snapshot

RATE_WINDOW_S: Final = 10.0
PLAIN_INTERVAL_S: Final = 10.0
PROCESS_ROWS_MAX: Final = 12
"""More processes are summed up in a last row, so that the picture fits a terminal."""

UNBOUNDED_COLUMNS: Final = 400
"""Width for output that no terminal cuts; a table takes only what it needs."""

MIB: Final = 2**20

CONVERGENCE: Final = "convergence_hours"
STAGE: Final = "curriculum_stage"

METRICS: Final = (
    ("episodic_return", "return", "{:.2f}"),
    ("behaviour_return", "behaviour return", "{:.2f}"),
    ("episodic_accuracy", "host accuracy %", "{:.1f}"),
    ("episodic_parameters", "parameters added", "{:.0f}"),
    ("policy_loss", "policy loss", "{:+.4f}"),
    ("value_loss", "value loss", "{:.4f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("approx_kl", "approx. KL", "{:.4f}"),
    ("explained_variance", "explained variance", "{:.2f}"),
    ("policy_lag", "policy lag", "{:.1f}"),
    ("grad_norm", "gradient norm", "{:.2f}"),
    (CONVERGENCE, "last new height", "after {:.2f} h"),
    (STAGE, "curriculum stage, from 0", "{:.0f}"),
)
"""The learner's metrics that are shown: name, words, format."""

LINE_METRICS: Final = frozenset(name for name, _, _ in METRICS) - {
    "approx_kl",
    "explained_variance",
    "grad_norm",
    CONVERGENCE,
    STAGE,
}
"""Those of them that fit a line."""


class SteadyConsole(Console):
    """A console for a long run, which outlives whoever reads its output.

    When the reader of a pipe goes away, nothing more is shown and the run goes on: it is in its journal and can be
    watched with `status`. Other consoles end the program then.
    """

    def on_broken_pipe(self) -> None:
        """Write nothing more, and let what is still buffered go nowhere."""
        self.quiet = True
        discard(self.file)


def discard(file: IO[str]) -> None:
    """Let what is buffered for a reader that has gone away, and all that follows, go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, file.fileno())
    os.close(nowhere)


class RateMeter:
    """Environment steps per second over the last `RATE_WINDOW_S` of training."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def observe(self, snapshot: Snapshot) -> float:
        """Take a snapshot in; give the rate, 0 while training has not begun.

        The oldest point kept is the last one that is at least as old as the window; after the end of training time
        stands still, and so does the rate.
        """
        at_s, steps = snapshot.training_elapsed_s, snapshot.environment.steps
        if len(self._points) == 1 and at_s <= self._points[0][0]:
            self._points[0] = (
                at_s,
                steps,
            )  # training has not begun yet; a run that goes on may find its steps late
        elif not self._points or at_s > self._points[-1][0]:
            self._points.append((at_s, steps))
        while len(self._points) > 2 and self._points[1][0] <= at_s - RATE_WINDOW_S:
            self._points.popleft()
        (from_s, from_steps), (to_s, to_steps) = self._points[0], self._points[-1]
        # Steps that were not yet durable when the learner died are taken back.
        return max(0.0, (to_steps - from_steps) / (to_s - from_s)) if to_s > from_s else 0.0


class LiveView:
    """Shows snapshots as they come: a moving picture on a terminal, now and then a line elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._next_line_s = 0.0
        self._last_state = ("", False)

    def show(self, snapshot: Snapshot, rate: float) -> None:
        """Show one snapshot; `rate` in environment steps per second."""
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False, transient=True)
                self._live.start()
            self._live.update(picture(snapshot, rate), refresh=True)
            return
        state = (snapshot.state, bool(recovering(snapshot)))
        if state != self._last_state or snapshot.elapsed_s >= self._next_line_s:
            self._last_state = state
            self._next_line_s = snapshot.elapsed_s + PLAIN_INTERVAL_S
            tell(self._console, line(snapshot, rate))

    def close(self) -> None:
        """Take the moving picture away; twice is harmless."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def tell(console: Console, text: str) -> None:
    """Print lines as they are: what looks like markup is none, and nothing is wrapped or coloured."""
    console.out(text, highlight=False)


def show(console: Console, what: RenderableType) -> None:
    """Print a page or a table: as wide as the terminal allows, elsewhere as wide as it is."""
    if not console.is_terminal:
        console.width = UNBOUNDED_COLUMNS
    console.print(what)


def line(snapshot: Snapshot, rate: float) -> str:
    """One line for a log."""
    words = [f"[{snapshot.elapsed_s:6.1f} s] {snapshot.state}"]
    if snapshot.state == Phase.EVALUATING:
        words.append(_measured(snapshot))
        return "  ".join(words)
    words += [
        f"steps {snapshot.environment.steps}",
        f"{rate:.0f} steps/s",
        f"updates {snapshot.learner.step}",
        *filter(None, [recovering(snapshot)]),
    ]
    metrics = snapshot.learner.metrics
    words += [
        f"{label} {form.format(metrics[name])}"
        for name, label, form in METRICS
        if name in metrics and name in LINE_METRICS
    ]
    words.append(f"memory {_mib(snapshot.processes)} MiB")
    left_s = time_left_s(snapshot, rate)
    if left_s is not None:
        words.append(f"{left_s:.0f} s left")
    return "  ".join([*words, *(f"! {trouble}" for trouble in snapshot.troubles)])


def recovering(snapshot: Snapshot) -> str:
    """How far a learner on its way back has come; empty if there is none."""
    metrics = snapshot.learner.metrics
    total = metrics.get("recovery.total")
    if total is None:
        return ""
    done, left_s = metrics.get("recovery.done", 0.0), metrics.get("recovery.seconds_left", 0.0)
    return f"recovering {done:.0f} of {total:.0f} records, {left_s:.0f} s left"


def last_checkpoint(snapshot: Snapshot) -> str:
    """The newest checkpoint that counts, as the learner reports it; empty if there is none."""
    metrics = snapshot.learner.metrics
    step = metrics.get("checkpoint.step", 0.0)
    return f"update {step:.0f}, {metrics.get('checkpoint.age_s', 0.0):.0f} s old" if step > 0 else ""


def time_left_s(snapshot: Snapshot, rate: float) -> float | None:
    """Seconds until training ends by its limits; None where no limit is set or the rate is not known."""
    if snapshot.state != Phase.TRAINING:
        return None
    candidates = []
    made, updates = _steps_made(snapshot), snapshot.learner.step
    if snapshot.max_seconds is not None:
        candidates.append(snapshot.max_seconds - snapshot.training_elapsed_s)
    if snapshot.max_steps is not None and rate > 0:
        candidates.append((snapshot.max_steps - made) / rate)
    if snapshot.max_updates is not None and rate > 0 and updates > 0:
        steps_per_update = snapshot.environment.steps / updates
        candidates.append((snapshot.max_updates - updates) * steps_per_update / rate)
    return max(0.0, min(candidates)) if candidates else None


def _steps_made(snapshot: Snapshot) -> int:
    """Environment steps of this invocation."""
    return snapshot.environment.steps - snapshot.environment.before


def picture(snapshot: Snapshot, rate: float) -> RenderableType:
    """The whole picture of a run that goes on."""
    return Group(
        _head(snapshot),
        _progress(snapshot),
        _numbers(snapshot, rate),
        processes(snapshot),
        *_remarks(snapshot),
    )


def _remarks(snapshot: Snapshot) -> list[Text]:
    return [
        *([Text(f"computes    {snapshot.execution}", style="dim")] if snapshot.execution else []),
        *(Text(f"trouble     {trouble}", style="bold red") for trouble in snapshot.troubles),
        *(Text(f"note        {note}") for note in snapshot.notes),
    ]


def _head(snapshot: Snapshot) -> Text:
    return Text.assemble(
        ("simic ", "bold"),
        (f"{snapshot.preset} ", "bold cyan"),
        f"{snapshot.state}  ",
        (f"{snapshot.run_dir}", "dim"),
    )


def _numbers(snapshot: Snapshot, rate: float) -> Table:
    cells = [
        ("environment steps", f"{snapshot.environment.steps:,}"),
        ("steps/s", f"{rate:.0f}"),
        ("updates", f"{snapshot.learner.step:,}"),
        ("elapsed", f"{snapshot.elapsed_s:.0f} s"),
    ]
    metrics = snapshot.learner.metrics
    cells += [(label, form.format(metrics[name])) for name, label, form in METRICS if name in metrics]
    if snapshot.resumes:
        cells.append(("resumed", f"{snapshot.resumes} time{'s' if snapshot.resumes > 1 else ''}"))
    checkpoint = last_checkpoint(snapshot)
    if checkpoint:
        cells.append(("last checkpoint", checkpoint))
    left_s = time_left_s(snapshot, rate)
    if left_s is not None:
        cells.append(("training left", f"about {left_s:.0f} s"))
    cells += [("", "")] * (len(cells) % 2)
    table = Table.grid(padding=(0, 2))
    for left, right in zip(cells[::2], cells[1::2], strict=True):
        table.add_row(*left, *right)
    return table


def _progress(snapshot: Snapshot) -> RenderableType:
    if snapshot.state == Phase.EVALUATING:
        done, total = float(len(snapshot.evaluated)), float(len(snapshot.to_evaluate))
        words = f"{_measured(snapshot)} on held-out episodes"
    elif recovering(snapshot):
        done, total = (snapshot.learner.metrics[f"recovery.{part}"] for part in ("done", "total"))
        words = recovering(snapshot)
    elif limits := _done_of_limits(snapshot):
        done, total = max(limits, key=lambda limit: limit[0] / limit[1])
        words = f"{min(1.0, done / total):.0%} of the training"
    else:
        return Text("no limit set; stop with Ctrl-C", style="dim")
    row = Table.grid(padding=(0, 2))
    row.add_row(ProgressBar(total=max(total, 1.0), completed=min(done, total), width=40), words)
    return row


def _measured(snapshot: Snapshot) -> str:
    return f"{len(snapshot.evaluated)} of {len(snapshot.to_evaluate)} policies measured"


def _done_of_limits(snapshot: Snapshot) -> list[tuple[float, float]]:
    """What is done and the limit, of each limit that is set."""
    limits: list[tuple[float, float]] = []
    if snapshot.max_seconds is not None:
        limits.append((snapshot.training_elapsed_s, snapshot.max_seconds))
    if snapshot.max_steps is not None:
        limits.append((_steps_made(snapshot), snapshot.max_steps))
    if snapshot.max_updates is not None:
        limits.append((snapshot.learner.step, snapshot.max_updates))
    return limits


def processes(snapshot: Snapshot, rows_max: int = PROCESS_ROWS_MAX) -> Table:
    """The process table; what goes beyond `rows_max` is summed up in a row."""
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("process")
    table.add_column("pid", justify="right")
    table.add_column("state")
    table.add_column("memory MiB", justify="right")
    table.add_column("restarts", justify="right")
    table.add_column("waits for")
    shown = snapshot.processes
    if len(shown) > rows_max:
        shown = shown[: rows_max - 1]
    for process in shown:
        table.add_row(
            f"{process.role}-{process.index}",
            str(process.pid or "-"),
            f"{process.state}, {process.phase}" if process.phase else process.state,
            _mib([process]) if process.memory_bytes else "-",
            str(process.restarts),
            process.waiting_for,
        )
    rest = snapshot.processes[len(shown) :]
    if rest:
        restarts = sum(process.restarts for process in rest)
        table.add_row(f"and {len(rest)} more", "", "", _mib(rest), str(restarts), "")
    return table


def _mib(some: Sequence[ProcessView]) -> str:
    return f"{sum(process.memory_bytes for process in some) / MIB:.0f}"


def status_page(snapshot: Snapshot) -> RenderableType:
    """What `simic-supervisor status` prints for a person; the rate is the mean over this invocation's training."""
    rate = _steps_made(snapshot) / snapshot.training_elapsed_s if snapshot.training_elapsed_s else 0.0
    parts: list[RenderableType] = [_head(snapshot), _numbers(snapshot, max(0.0, rate)), processes(snapshot)]
    if recovering(snapshot):
        parts.append(Text(f"learner     {recovering(snapshot)}"))
    parts += _remarks(snapshot)
    if snapshot.controller:
        parts.append(Text(f"controller  {snapshot.controller}"))
    if snapshot.to_evaluate and snapshot.state not in (Phase.STARTING, Phase.TRAINING):
        parts.append(Text(f"evaluation  {_measured(snapshot)}"))
    if snapshot.checkpoint:
        parts.append(Text(f"checkpoint  {snapshot.checkpoint}"))
    if snapshot.reason:
        parts.append(Text(f"reason      {snapshot.reason}"))
    return Group(*parts)


def convergence(metrics: Mapping[str, float], wanted_h: float) -> str:
    """When the mean return reached its last new height, beside when it should have; empty before the first."""
    hours = metrics.get(CONVERGENCE)
    if hours is None:
        return ""
    return (
        f"convergence: the mean return reached its last new height after {hours:.2f} h of training "
        f"(convergence_time_hours: {wanted_h:g})"
    )


def report(console: Console, directory: Path, outcome: RunOutcome, again: str, convergence: str = "") -> None:
    """Print what a run came to and what to do next; `again` is the command for another run like it, if there is one."""
    lines = ["", f"run {outcome.run_id} {outcome.outcome}: {outcome.reason}"]
    lines += [convergence] if convergence else []
    if outcome.checkpoint is not None:
        checkpoint = outcome.checkpoint
        lines.append(
            f"checkpoint: {checkpoint.path} (update {checkpoint.learner_step}, {checkpoint.environment_steps} "
            f"environment steps, state digest {checkpoint.digest})"
        )
    if outcome.exit_code:
        lines.append(f"logs of the processes: {directory / 'logs'}")
    if outcome.exit_code == CONFIGURATION_EXIT_CODE:
        lines.append(
            "a run keeps its configuration: --resume goes on once what it needs is there; under other keys begin in "
            "another --run-dir"
        )
    place = shlex.quote(str(directory))
    order = " --train-on" if outcome.needs_order else ""
    goes_on = outcome.outcome != "finished" or outcome.needs_order
    lines += [
        "next:",
        *([f"  simic-supervisor run --resume {place}{order}"] if goes_on else []),
        f"  simic-supervisor report {place}",
        f"  simic-supervisor status {place}",
        f"  simic-supervisor log verify {place} --owner learner-0",
        f"  tensorboard --logdir {shlex.quote(str(directory / 'tensorboard'))}",
        *([f"  simic-supervisor {again}"] if again else []),
    ]
    tell(console, "\n".join(lines))
