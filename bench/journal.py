"""The journal against the disk: records and MB a second, and how long an acknowledgement takes.

For each record size four loops of equal duration, interleaved in rounds so that a busy neighbour disturbs all alike:

* `group`: a producer appends as fast as it can with at most 2 MiB not durable yet, the flusher commits in groups. An
  acknowledgement is timed from the `append` of a record to the moment its `durable_fd` wake-up has been read.
* `each`: append and sync one record at a time.
* `bare_group`: `os.write` of 1 MiB of the same records, then `fdatasync`: what the disk gives without a journal.
* `bare_each`: `os.write` of one record, then `fdatasync`.

Ratios say what the journal keeps of the bare loop's rate.
"""

from __future__ import annotations

import argparse
import os
import select
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from bench.report import emit
from supervisor.journal import Journal, read

SIZES_BYTES: Final = (200, 4_000, 100_000)
ROUNDS: Final = 3
GROUP_BYTES: Final = 1 << 20
BACKLOG_BYTES: Final = 2 * GROUP_BYTES  # one group is written while the next one gathers
PRODUCED_AT_ONCE: Final = 64


def group(directory: Path, payload: bytes, duration_s: float) -> tuple[float, list[float], list[float]]:
    """Append without waiting for the disk.

    Returns:
        Records per second until all are durable; seconds of each append, waiting for room included; seconds from
        append to acknowledgement, of one record in 64.
    """
    append_s: list[float] = []
    asked: list[tuple[int, float]] = []
    acknowledge_s: list[float] = []
    is_over = threading.Event()

    with Journal(directory, owner="bench", run_id="bench", backlog_bytes_max=BACKLOG_BYTES) as journal:

        def acknowledge() -> None:
            told = 0
            while not is_over.is_set() or told < len(asked):
                if not select.select([journal.durable_fd], [], [], 0.1)[0]:
                    continue
                durable, now_s = journal.poll_durable(), time.perf_counter()
                while told < len(asked) and asked[told][0] < durable:
                    acknowledge_s.append(now_s - asked[told][1])
                    told += 1

        listener = threading.Thread(target=acknowledge)
        listener.start()
        start_s = now_s = time.perf_counter()
        while now_s - start_s < duration_s:
            for index in range(PRODUCED_AT_ONCE):
                before_s = time.perf_counter()
                position = journal.append("Bench", {"step": index, "actor": 3}, (payload,))
                now_s = time.perf_counter()
                append_s.append(now_s - before_s)
                if index == 0:
                    asked.append((position, before_s))
        count = journal.sync()
        rate = count / (time.perf_counter() - start_s)
        is_over.set()
        listener.join()
    return rate, append_s, acknowledge_s


def each(directory: Path, payload: bytes, duration_s: float) -> tuple[float, list[float]]:
    """Records per second and seconds of each when every record is synced by itself."""
    took_s: list[float] = []
    with Journal(directory, owner="bench", run_id="bench") as journal:
        start_s = now_s = time.perf_counter()
        while now_s - start_s < duration_s:
            journal.append("Bench", {"step": 1, "actor": 3}, (payload,))
            journal.sync()
            took_s.append(time.perf_counter() - now_s)
            now_s = time.perf_counter()
        return len(took_s) / (now_s - start_s), took_s


def bare(path: Path, payload: bytes, duration_s: float, records_per_sync: int) -> float:
    """Records per second of `os.write` and `fdatasync` alone."""
    block = payload * records_per_sync
    count = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        start_s = now_s = time.perf_counter()
        while now_s - start_s < duration_s:
            os.write(descriptor, block)
            os.fdatasync(descriptor)
            count += records_per_sync
            now_s = time.perf_counter()
        return count / (now_s - start_s)
    finally:
        os.close(descriptor)


def scan(directory: Path) -> float:
    """Megabytes per second of reading everything back, checksums verified, from the page cache."""
    start_s = time.perf_counter()
    size = sum(len(frame) for record in read(directory) for frame in record.frames)
    return size / 1e6 / (time.perf_counter() - start_s)


def percentile(values: Sequence[float], percent: float, unit: float) -> float:
    """A percentile of seconds, in units of `unit` seconds."""
    return round(float(np.percentile(values, percent)) / unit, 2) if values else float("inf")


def measure(size_bytes: int, seconds: float) -> dict[str, float]:
    """All figures of one record size, in about `seconds` seconds."""
    payload = np.random.default_rng(0).bytes(size_bytes)
    slice_s = seconds / (4 * ROUNDS)
    rates: dict[str, list[float]] = {
        name: [] for name in ("group", "each", "bare_group", "bare_each", "scan")
    }
    append_s: list[float] = []
    acknowledge_s: list[float] = []
    each_s: list[float] = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory(prefix="bench-journal-") as temporary:
            root = Path(temporary)
            rate, appends, acknowledgements = group(root / "group", payload, slice_s)
            rates["group"].append(rate)
            append_s += appends
            acknowledge_s += acknowledgements
            rates["scan"].append(scan(root / "group"))
            rate, times = each(root / "each", payload, slice_s)
            rates["each"].append(rate)
            each_s += times
            rates["bare_group"].append(
                bare(root / "bare_group", payload, slice_s, max(1, GROUP_BYTES // size_bytes))
            )
            rates["bare_each"].append(bare(root / "bare_each", payload, slice_s, 1))
    best = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "group_records_per_s": round(best["group"]),
        "group_mb_per_s": round(best["group"] * size_bytes / 1e6, 1),
        "group_ack_p50_ms": percentile(acknowledge_s, 50, 1e-3),
        "group_ack_p99_ms": percentile(acknowledge_s, 99, 1e-3),
        "append_p50_us": percentile(append_s, 50, 1e-6),
        "append_p99_us": percentile(append_s, 99, 1e-6),
        "group_of_bare_ratio": round(best["group"] / best["bare_group"], 2),
        "each_records_per_s": round(best["each"]),
        "each_ack_p50_ms": percentile(each_s, 50, 1e-3),
        "each_ack_p99_ms": percentile(each_s, 99, 1e-3),
        "each_of_bare_ratio": round(best["each"] / best["bare_each"], 2),
        "scan_mb_per_s": round(best["scan"], 1),
    }


def main() -> None:
    """Measure all sizes and print the line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.journal", description="The journal against the disk."
    )
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="about how long to measure, all sizes together"
    )
    options, _ = parser.parse_known_args()
    figures = {
        f"{name}_{size}": value
        for size in SIZES_BYTES
        for name, value in measure(size, options.seconds / len(SIZES_BYTES)).items()
    }
    emit("journal", figures, seconds=options.seconds, rounds=ROUNDS)


if __name__ == "__main__":
    main()
