"""What a person sees: a live picture of a run, its result table, a status page."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from supervisor.events import PolicyEvaluated
from supervisor.state import Phase
from supervisor.vitals import Snapshot

RATE_WINDOW_S: Final = 10.0
PLAIN_INTERVAL_S: Final = 10.0
MIB: Final = 2**20

METRICS: Final = (
    ("episodic_return", "return", "{:.2f}"),
    ("episodic_accuracy", "host accuracy %", "{:.1f}"),
    ("episodic_parameters", "parameters added", "{:.0f}"),
    ("policy_loss", "policy loss", "{:+.4f}"),
    ("value_loss", "value loss", "{:.4f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("approx_kl", "approx. KL", "{:.4f}"),
    ("explained_variance", "explained variance", "{:.2f}"),
    ("policy_lag", "policy lag", "{:.1f}"),
    ("grad_norm", "gradient norm", "{:.2f}"),
)


class RateMeter:
    """Environment steps per second over the last `RATE_WINDOW_S`."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def observe(self, snapshot: Snapshot) -> float:
        """Take a snapshot in; give the rate, 0 while training has not begun."""
        at_s, steps = snapshot.training_elapsed_s, snapshot.environment.steps
        if not self._points or at_s > self._points[-1][0]:
            self._points.append((at_s, steps))
        while len(self._points) > 2 and self._points[0][0] < at_s - RATE_WINDOW_S:
            self._points.popleft()
        (from_s, from_steps), (to_s, to_steps) = self._points[0], self._points[-1]
        return (to_steps - from_steps) / (to_s - from_s) if to_s > from_s else 0.0


class LiveView:
    """Shows snapshots as they come: a moving picture on a terminal, now and then a line elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rate = RateMeter()
        self._live: Live | None = None
        self._next_line_s = 0.0
        self._last_state = ""

    def __call__(self, snapshot: Snapshot) -> None:
        """Show one snapshot."""
        rate = self._rate.observe(snapshot)
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False, transient=True)
                self._live.start()
            self._live.update(picture(snapshot, rate), refresh=True)
        elif snapshot.state != self._last_state or snapshot.elapsed_s >= self._next_line_s:
            self._last_state = snapshot.state
            self._next_line_s = snapshot.elapsed_s + PLAIN_INTERVAL_S
            self._console.print(line(snapshot, rate), highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the moving picture away."""
        if self._live is not None:
            self._live.stop()


def line(snapshot: Snapshot, rate: float) -> str:
    """One line for a log."""
    words = [f"[{snapshot.elapsed_s:6.1f} s] {snapshot.state}"]
    if snapshot.state == Phase.EVALUATING:
        words.append(f"{len(snapshot.evaluated)} of {len(snapshot.to_evaluate)} policies measured")
    else:
        words += [f"steps {snapshot.environment.steps}", f"{rate:.0f} steps/s", f"updates {snapshot.learner.step}"]
        metrics = snapshot.learner.metrics
        words += [f"{label} {form.format(metrics[name])}" for name, label, form in METRICS[:6] if name in metrics]
        if "policy_lag" in metrics:
            words.append(f"lag {metrics['policy_lag']:.1f}")
        words.append(f"memory {sum(process.memory_bytes for process in snapshot.processes) / MIB:.0f} MiB")
        left_s = time_left_s(snapshot, rate)
        if left_s is not None:
            words.append(f"{left_s:.0f} s left")
    return "  ".join(words)


def time_left_s(snapshot: Snapshot, rate: float) -> float | None:
    """Seconds until training ends by its limits; None where no limit is set or the rate is not known."""
    if snapshot.state != Phase.TRAINING:
        return None
    candidates = []
    if snapshot.max_seconds is not None:
        candidates.append(snapshot.max_seconds - snapshot.training_elapsed_s)
    if snapshot.max_steps is not None and rate > 0:
        candidates.append((snapshot.max_steps - snapshot.environment.steps) / rate)
    return max(0.0, min(candidates)) if candidates else None


def picture(snapshot: Snapshot, rate: float) -> RenderableType:
    """The whole picture of a run."""
    head = Text.assemble(
        ("simic ", "bold"),
        (f"{snapshot.preset} ", "bold cyan"),
        f"{snapshot.state}  ",
        (f"{snapshot.run_dir}", "dim"),
    )
    numbers = Table.grid(padding=(0, 2))
    numbers.add_row("environment steps", f"{snapshot.environment.steps:,}", "steps/s", f"{rate:.0f}")
    numbers.add_row("updates", f"{snapshot.learner.step:,}", "elapsed", f"{snapshot.elapsed_s:.0f} s")
    metrics = [
        (label, form.format(snapshot.learner.metrics[name]))
        for name, label, form in METRICS
        if name in snapshot.learner.metrics
    ]
    for left, right in zip(metrics[::2], [*metrics[1::2], ("", "")], strict=False):
        numbers.add_row(*left, *right)
    return Group(head, _progress(snapshot, rate), numbers, processes(snapshot))


def _progress(snapshot: Snapshot, rate: float) -> RenderableType:
    if snapshot.state == Phase.EVALUATING:
        done, total = float(len(snapshot.evaluated)), float(len(snapshot.to_evaluate))
        words = f"{done:.0f} of {total:.0f} policies measured on held-out episodes"
    elif snapshot.max_seconds is not None:
        done, total = snapshot.training_elapsed_s, snapshot.max_seconds
        left_s = time_left_s(snapshot, rate)
        words = "" if left_s is None else f"{left_s:.0f} s of training left"
    elif snapshot.max_steps is not None:
        done, total = float(snapshot.environment.steps), float(snapshot.max_steps)
        left_s = time_left_s(snapshot, rate)
        words = "" if left_s is None else f"about {left_s:.0f} s of training left"
    else:
        return Text("no limit set; stop with Ctrl-C", style="dim")
    row = Table.grid(padding=(0, 2))
    row.add_row(ProgressBar(total=max(total, 1e-9), completed=min(done, total), width=40), words)
    return row


def processes(snapshot: Snapshot) -> Table:
    """The process table."""
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column, justify in (("process", "left"), ("pid", "right"), ("state", "left"), ("memory MiB", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("restarts", justify="right")
    table.add_column("waits for")
    for process in snapshot.processes:
        table.add_row(
            f"{process.role}-{process.index}",
            str(process.pid or "-"),
            process.state,
            f"{process.memory_bytes / MIB:.0f}" if process.memory_bytes else "-",
            str(process.restarts),
            process.waiting_for,
        )
    return table


def status_page(snapshot: Snapshot) -> RenderableType:
    """What `simic-supervisor status` prints for a person."""
    rate = snapshot.environment.steps / snapshot.training_elapsed_s if snapshot.training_elapsed_s else 0.0
    parts: list[RenderableType] = [picture(snapshot, rate)]
    if snapshot.checkpoint:
        parts.append(Text(f"checkpoint  {snapshot.checkpoint}"))
    if snapshot.reason:
        parts.append(Text(f"reason      {snapshot.reason}"))
    return Group(*parts)


def result_table(evaluations: Mapping[str, PolicyEvaluated]) -> Table:
    """Return, host accuracy and added parameters of every policy, with 95 % intervals, always the three together."""
    episodes = max((len(evaluated.returns) for evaluated in evaluations.values()), default=0)
    table = Table(title=f"{episodes} held-out episodes each, same seeds; mean [95 % interval]", title_justify="left")
    table.add_column("policy")
    for column in ("return", "host accuracy %", "parameters added"):
        table.add_column(column, justify="right")
    for name, evaluated in evaluations.items():
        cells = [
            "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(
                *(evaluated.summary[f"{key}_{part}"] for part in ("mean", "low", "high")), d=digits
            )
            for key, digits in (("return", 2), ("accuracy", 1), ("parameters", 0))
        ]
        table.add_row(name, *cells, style="bold" if name == "learned" else None)
    return table


def verdict(evaluations: Mapping[str, PolicyEvaluated], learned: str) -> list[str]:
    """A sentence on each rival: whether the learned policy's interval lies above, below, or touches, in each figure."""
    if learned not in evaluations:
        return []
    own = evaluations[learned].summary
    sentences = []
    for name, evaluated in evaluations.items():
        if name == learned:
            continue
        words = [f"{_relation(own, evaluated.summary, key)} in {label}" for key, label in _COMPARED]
        sentences.append(f"{learned} against {name}: {', '.join(words)}")
    return sentences


_COMPARED: Final = (("return", "return"), ("accuracy", "accuracy"), ("parameters", "parameters added"))


def _relation(own: Mapping[str, float], other: Mapping[str, float], key: str) -> str:
    if own[f"{key}_low"] > other[f"{key}_high"]:
        return "higher"
    if own[f"{key}_high"] < other[f"{key}_low"]:
        return "lower"
    return "no clear difference"
