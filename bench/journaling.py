"""What journaling costs: CPU-seconds of a whole run's processes per environment step, with the journal and without.

Pairs of runs of the digits preset, one with the real journal and one with a null journal that keeps nothing (it exists
only here), each in turn first, so that a machine that grows warm or busy burdens both. The runs are in lockstep with
one seed, so both of a pair make the same updates from the same unrolls, bit for bit (the digests of their last states
are compared): what differs is the journaling alone. Free runs drift apart, and hosts that have grown cost three times
as much; `--asynchronous` measures those.

The CPU time of all processes is read by the learner itself at two of its updates, so imports, start and end do not
count. Writing back dirty pages is the kernel's own work and is not in it. Intervals are of the paired figures.

Beside it, through the journal alone: the records that such a run writes, at its pace, and a synthetic stream at
100 MB/s in records of 100 KB.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import psutil

from bench.report import emit
from esper_simic.comparison import mean_interval
from esper_simic.config import to_yaml
from supervisor import config_file
from supervisor.child import ChildSpec
from supervisor.clock import SystemClock
from supervisor.journal import Journal
from supervisor.loop import RunFacts
from supervisor.run import ROLES, run

if TYPE_CHECKING:
    from typing_extensions import Buffer

WARM_UPDATE: Final = 24
"""Learner update from which on the time counts."""

MEASURED: Final = "measured.json"

STREAM_BYTES_PER_S: Final = 100e6
STREAM_RECORD_BYTES: Final = 100_000
STREAM_S: Final = 10.0

UNROLL_BYTES: Final = 310_000
UNROLLS_PER_S: Final = 3
UPDATES_PER_S: Final = 9
RECORDS_S: Final = 20.0
"""What a learner of the digits preset writes in a second, and for how long it is written here."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What one run cost between two of its updates."""

    cpu_s: float
    environment_steps: int
    journal_bytes: int
    seconds: float
    digest: str = ""
    """Of the run's last state."""

    @property
    def us_per_step(self) -> float:
        """CPU time of an environment step and all that belongs to it, microseconds."""
        return 1e6 * self.cpu_s / self.environment_steps


class NullJournal:
    """A journal that forgets: what is appended is durable at once. It takes the arguments of `Journal`."""

    def __init__(self, directory: Path, **_arguments: Any) -> None:
        self.directory = directory
        self.next_position = 0
        self.is_on_reserve = False
        self.durable_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._encoder = msgspec.msgpack.Encoder()

    def append(self, kind: str, header: object, frames: Iterable[Buffer] = ()) -> int:
        """Encode the header, as a caller's cost that has nothing to do with a disk, and forget it."""
        self._encoder.encode(header)
        self.next_position += 1
        os.eventfd_write(self.durable_fd, 1)
        return self.next_position - 1

    def sync(self) -> int:
        """All there is."""
        return self.next_position

    def poll_durable(self) -> int:
        """All there is."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.durable_fd)
        return self.next_position

    def hold_reserve(self) -> bool:
        """Nothing is kept back."""
        return True

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> NullJournal:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def learner_with(spec: ChildSpec) -> None:
    """The learner's main as it is, metered."""
    from supervisor.roles import learner
    from supervisor.roles.learner_loop import LearnerLoop

    class Metered(LearnerLoop):
        """Reads the CPU time of the run's processes at two updates, and leaves the difference in the run directory."""

        _first: tuple[float, int, int, float] | None = None

        def step(self) -> None:
            super().step()
            if self.learner.steps_done == WARM_UPDATE:
                self._first = self._read()
            elif self.is_over and self._first is not None:
                cpu_s, steps, size, at_s = (
                    later - earlier for later, earlier in zip(self._read(), self._first, strict=True)
                )
                measured = Measured(
                    cpu_s=cpu_s, environment_steps=int(steps), journal_bytes=int(size), seconds=at_s
                )
                (Path(spec.run_dir) / MEASURED).write_bytes(msgspec.json.encode(measured))

        def _read(self) -> tuple[float, int, int, float]:
            supervisor = psutil.Process(os.getppid())
            tree = [supervisor, *supervisor.children(recursive=True)]
            cpu_s = sum(sum(process.cpu_times()[:2]) for process in tree)
            logs = (Path(spec.run_dir) / "journal" / spec.who.name).glob("*.log")
            return (
                cpu_s,
                self.learner.environment_steps,
                sum(path.stat().st_size for path in logs),
                time.monotonic(),
            )

    vars(learner)["LearnerLoop"] = Metered
    learner.main(spec)


def learner_without(spec: ChildSpec) -> None:
    """The learner's main with a journal that forgets, metered."""
    from supervisor.roles import learner

    vars(learner)["Journal"] = NullJournal
    learner_with(spec)


def one_run(journal: str, updates: int, seed: int, *, is_asynchronous: bool) -> None:
    """Train once and print what it cost; a process of its own."""
    settings = {
        "simic_trainer.seed": seed,
        "supervisor.lockstep": "false" if is_asynchronous else "true",
        "supervisor.max_seconds": "null",
        "supervisor.max_updates": WARM_UPDATE + updates,
        "supervisor.checkpoint_interval_s": 100_000,
    }
    config = config_file.load("digits", None, [f"{key}={value}" for key, value in settings.items()])
    main_of = "learner_with" if journal == "real" else "learner_without"
    roles = {**ROLES, "learner": f"bench.journaling:{main_of}"}
    with tempfile.TemporaryDirectory(prefix="simic-bench-") as scratch:
        run_dir = Path(scratch) / "run"
        facts = RunFacts(preset="digits", config_text=to_yaml(config), evaluation_policies=())
        outcome = run(run_dir, config, facts, clock=SystemClock(), roles=roles)
        if outcome.exit_code or outcome.checkpoint is None:
            raise SystemExit(f"the run with the {journal} journal failed: {outcome.reason}")
        measured = msgspec.json.decode((run_dir / MEASURED).read_bytes(), type=Measured)
    print(
        msgspec.json.encode(msgspec.structs.replace(measured, digest=outcome.checkpoint.digest)).decode(),
        flush=True,
    )


def measure(journal: str, updates: int, seed: int, *, is_asynchronous: bool) -> Measured:
    """One run, in a process of its own."""
    command = [sys.executable, "-m", "bench.journaling", "--one", journal]
    command += ["--updates", str(updates), "--seed", str(seed)]
    command += ["--asynchronous"] if is_asynchronous else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Measured)


def pairs(count: int, updates: int, *, is_asynchronous: bool) -> None:
    """The cost in whole runs: both of a pair have one seed, each pair another."""
    shares, extras_us, extras_ms_per_mb = [], [], []
    real: list[Measured] = []
    null: list[Measured] = []
    for number in range(count):
        order = ("real", "null") if number % 2 == 0 else ("null", "real")
        made = {
            journal: measure(journal, updates, number, is_asynchronous=is_asynchronous) for journal in order
        }
        with_it, without = made["real"], made["null"]
        if with_it.digest != without.digest and not is_asynchronous:
            raise SystemExit(f"the runs of pair {number} differ: {with_it.digest}, {without.digest}")
        real.append(with_it)
        null.append(without)
        extra_us = with_it.us_per_step - without.us_per_step
        shares.append(100 * extra_us / without.us_per_step)
        extras_us.append(extra_us)
        extras_ms_per_mb.append(extra_us * with_it.environment_steps / 1e3 / (with_it.journal_bytes / 1e6))
        print(
            f"pair {number}: {with_it.us_per_step:.0f} and {without.us_per_step:.0f} us a step, {shares[-1]:+.2f} %",
            file=sys.stderr,
            flush=True,
        )
    figures: dict[str, float] = {}
    for name, values in (
        ("cost_percent", shares),
        ("extra_us_per_environment_step", extras_us),
        ("extra_cpu_ms_per_mb", extras_ms_per_mb),
    ):
        figures[f"{name}_mean"] = round(sum(values) / count, 3)
        if count > 1:
            interval = mean_interval(values)
            figures[f"{name}_low"], figures[f"{name}_high"] = round(interval.low, 3), round(interval.high, 3)
    emit(
        "journaling_run",
        figures
        | {
            "with_journal_us_per_environment_step": round(sum(one.us_per_step for one in real) / count, 1),
            "without_us_per_environment_step": round(sum(one.us_per_step for one in null) / count, 1),
            "journal_mb_per_s": round(sum(one.journal_bytes / 1e6 / one.seconds for one in real) / count, 3),
            "journal_bytes_per_environment_step": round(
                sum(one.journal_bytes / one.environment_steps for one in real) / count, 1
            ),
            "environment_steps_each": real[0].environment_steps,
        },
        pairs=count,
        updates=updates,
        mode="asynchronous" if is_asynchronous else "lockstep",
    )


def stream() -> None:
    """The cost of 100 MB/s through the journal, apart from everything else."""
    frame = os.urandom(STREAM_RECORD_BYTES)
    cost = {}
    for name in ("real", "null"):
        with tempfile.TemporaryDirectory(prefix="simic-bench-") as scratch:
            maker: Any = Journal if name == "real" else NullJournal
            with maker(Path(scratch) / "j", owner="bench", run_id="bench") as journal:
                began_s, cpu_s = time.monotonic(), time.process_time()
                count = round(STREAM_S * STREAM_BYTES_PER_S / STREAM_RECORD_BYTES)
                for number in range(count):
                    journal.append("Frame", {"number": number}, [frame])
                    due_s = began_s + (number + 1) * STREAM_RECORD_BYTES / STREAM_BYTES_PER_S
                    if number % 20 == 19 and (early_s := due_s - time.monotonic()) > 0:
                        time.sleep(early_s)
                journal.sync()
                cost[name] = (time.process_time() - cpu_s, time.monotonic() - began_s)
    (real_cpu_s, real_s), (null_cpu_s, null_s) = cost["real"], cost["null"]
    megabytes = STREAM_S * STREAM_BYTES_PER_S / 1e6
    emit(
        "journaling_stream",
        {
            "reached_mb_per_s": round(megabytes / real_s, 1),
            "cpu_ms_per_mb": round(1e3 * real_cpu_s / megabytes, 3),
            "null_cpu_ms_per_mb": round(1e3 * null_cpu_s / megabytes, 3),
            "core_percent": round(100 * real_cpu_s / real_s, 1),
            "null_core_percent": round(100 * null_cpu_s / null_s, 1),
        },
        offered_mb_per_s=STREAM_BYTES_PER_S / 1e6,
        record_bytes=STREAM_RECORD_BYTES,
    )


def records() -> None:
    """The cost of what a run of the digits preset writes, at its pace, apart from the run."""
    frame = os.urandom(UNROLL_BYTES)
    cost = {}
    for name in ("real", "null"):
        with tempfile.TemporaryDirectory(prefix="simic-bench-") as scratch:
            maker: Any = Journal if name == "real" else NullJournal
            with maker(Path(scratch) / "j", owner="bench", run_id="bench") as journal:
                began_s, cpu_s = time.monotonic(), time.process_time()
                for update in range(round(RECORDS_S * UPDATES_PER_S)):
                    if update % (UPDATES_PER_S // UNROLLS_PER_S) == 0:
                        journal.append("ExperienceAdmitted", {"episodes": [{"x": 1.0}] * 8}, [frame])
                    journal.append("LearnerStepped", {"metrics": {f"m{i}": float(i) for i in range(25)}})
                    time.sleep(max(0.0, began_s + (update + 1) / UPDATES_PER_S - time.monotonic()))
                    journal.poll_durable()
                journal.sync()
                cost[name] = 1e3 * (time.process_time() - cpu_s) / (time.monotonic() - began_s)
    emit(
        "journaling_records",
        {
            "cpu_ms_per_s": round(cost["real"], 2),
            "null_cpu_ms_per_s": round(cost["null"], 2),
            "percent_of_two_cores": round((cost["real"] - cost["null"]) / 20, 3),
        },
        unrolls_per_s=UNROLLS_PER_S,
        unroll_bytes=UNROLL_BYTES,
        updates_per_s=UPDATES_PER_S,
    )


def main() -> None:
    """All measurements, a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--updates", type=int, default=160, help="learner updates measured in one run")
    parser.add_argument("--asynchronous", action="store_true", help="free runs, which are not alike")
    parser.add_argument("--one", choices=("real", "null"), help="a single run, for this program's own use")
    parser.add_argument("--seed", type=int, default=0, help="of a single run")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if options.one:
        one_run(options.one, options.updates, options.seed, is_asynchronous=options.asynchronous)
        return
    records()
    stream()
    if not options.pairs:
        return
    pairs(options.pairs, options.updates, is_asynchronous=options.asynchronous)


if __name__ == "__main__":
    main()
