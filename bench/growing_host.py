"""Environment steps/s of the growing host: hosts and tasks, 1 to 64 environments, none, one and three blended seeds.

A *step* is one epoch of one host as a controller meets it: 11 training batches of 128 samples, 3 validation batches of
128 with every distinct variant of the blended seeds (0, 1 and 7 for none, one and three), gates, reward, observation.
Each step does the same work whatever the number of environments. Seeds are `conv_light`, put into BLENDING behind the
first blocks. A rate is the best of several rounds, since other work on the machine can only slow a round down.

- `steps_per_s`: one process, one thread. With one environment it is the rate of hosts stepped one after another,
  `one_by_one_steps_per_s` in the other lines.
- `threads_steps_per_s`: one process with a thread for each core.
- `processes_steps_per_s`: as many processes as there are cores, one thread each, each with so many environments; how
  a run's actors work.
- `arithmetic_share_percent`, `memory_share_percent`: multiplications and additions of matrix products and
  convolutions, and bytes that all operations read and write, per second and thread, of what a product of 1024 x 1024
  matrices and a copy of 64 MiB reach on the same thread. Beyond 100 % of memory, caches serve the rest.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any, Final

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bench.report import emit
from esper_simic.actions import BLUEPRINTS, HEADS, Op
from esper_simic.config import EnvironmentConfig
from esper_simic.growing_host.core import GrowingHosts
from esper_simic.lifecycle import SeedStage

CASES: Final = (("digits", "rescue"), ("digits", "augment"), ("digits32", "rescue"))
LANES: Final = (1, 4, 16, 64)
SEEDS: Final = (0, 1, 3)
TRAIN_BATCHES, BATCH, VALIDATION_BATCHES = 11, 128, 3
PARALLEL_LANES: Final = 16
PROFILE_ROWS: Final = 12
ROUNDS: Final = 4
ROUND_S: Final = 0.7
CORES: Final = len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Case:
    """What is stepped."""

    task: str
    host: str
    lanes: int
    seeds: int

    def prepared(self, first_seed: int = 0) -> GrowingHosts:
        """Hosts whose first slots hold seeds: germinated through actions, then put straight into BLENDING."""
        config = EnvironmentConfig(
            task=self.task,
            host=self.host,
            max_epochs=10_000,
            train_batches=TRAIN_BATCHES,
            train_batch_size=BATCH,
            validation_samples=VALIDATION_BATCHES * BATCH,
        )
        hosts = GrowingHosts(self.lanes, config, gamma=0.99)
        hosts.start(
            np.arange(self.lanes), [first_seed + lane for lane in range(self.lanes)], [0] * self.lanes
        )
        for slot in range(self.seeds):
            hosts.step(action(self.lanes, Op.GERMINATE, slot))
            hosts.slots.stage[:, slot] = SeedStage.BLENDING
            hosts.slots.alpha[:, slot] = 0.5
            step(hosts)  # the masks see that the slot no longer blocks the next one
        step(hosts)
        return hosts


def action(lanes: int, op: Op, slot: int) -> np.ndarray:
    """The same action in every lane."""
    choices = {
        "slot": slot,
        "op": op,
        "blueprint": BLUEPRINTS.index("conv_light"),
        "style": 2,
        "alpha_target": 2,
    }
    row = [int(choices.get(head, 0)) for head in HEADS]
    return np.tile(np.array(row), (lanes, 1))


def step(hosts: GrowingHosts) -> None:
    """One epoch of every host, and its observation."""
    hosts.step(action(hosts.lanes, Op.WAIT, 0))
    hosts.observe()


def best_rate(hosts: GrowingHosts, rounds: int = ROUNDS) -> float:
    """Environment steps a second in the best of several rounds."""
    best = 0.0
    for _ in range(rounds):
        done, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < ROUND_S or not done:
            step(hosts)
            done += hosts.lanes
        best = max(best, done / elapsed)
    return best


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that operations read and write; views move none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moved_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count its tensors."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            self.moved_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def _convolution_operations(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Two operations for each output and each of the inputs it reads, those of its own group."""
    return int(2 * math.prod(out_shape) * math.prod(weight[1:]))


def _convolution_backward_operations(
    gradient: Any, x: Any, weight: Any, *rest: Any, out_shape: Any, **__: Any
) -> int:
    """As many for the gradient of the input and of the weight; torch's own count forgets groups there."""
    wanted = rest[-1]
    return int(2 * math.prod(gradient) * math.prod(weight[1:])) * sum(map(bool, wanted[:2]))


def arithmetic_and_bytes(case: Case) -> tuple[float, float]:
    """Floating-point operations and bytes moved in one environment step."""
    hosts = case.prepared()
    counted = {
        torch.ops.aten.convolution: _convolution_operations,
        torch.ops.aten.convolution_backward: _convolution_backward_operations,
    }
    with FlopCounterMode(display=False, custom_mapping=counted) as flops:
        step(hosts)
    with Traffic() as traffic:
        step(hosts)
    return flops.get_total_flops() / case.lanes, traffic.moved_bytes / case.lanes


def limits() -> tuple[float, float]:
    """Operations/s of a large matrix product and bytes/s (read and written) of a large copy, on one thread."""
    square = torch.randn(1024, 1024)
    source, target = torch.zeros(2**24), torch.zeros(2**24)

    def best_s(call: Any) -> float:
        times = []
        for _ in range(12):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return min(times)

    product_s = best_s(lambda: torch.mm(square, square))
    return 2 * 1024**3 / product_s, 2 * source.nbytes / best_s(lambda: target.copy_(source))


def together(case: Case) -> float:
    """Steps a second of one process a core, all at once, one thread each."""
    context = multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(CORES), context.Queue()
    children = [
        context.Process(target=_child, args=(case, index * case.lanes, barrier, rates))
        for index in range(CORES)
    ]
    for child in children:
        child.start()
    total = sum(rates.get(timeout=600) for _ in children)
    for child in children:
        child.join()
    return float(total)


def _child(case: Case, first_seed: int, barrier: Barrier, rates: Any) -> None:
    torch.set_num_threads(1)
    hosts = case.prepared(first_seed)
    barrier.wait(timeout=600)
    rates.put(best_rate(hosts))


def measure(case: Case, alone: float | None, machine: tuple[float, float], *, parallel: bool) -> float:
    """Measure one case, print its line, return its rate."""
    torch.set_num_threads(1)
    hosts = case.prepared()
    rate = best_rate(hosts)
    operations, moved = arithmetic_and_bytes(case)
    figures: dict[str, float] = {
        "steps_per_s": round(rate, 1),
        "arithmetic_mflop": round(operations / 1e6, 2),
        "arithmetic_share_percent": round(100 * rate * operations / machine[0], 1),
        "memory_mbytes": round(moved / 1e6, 1),
        "memory_share_percent": round(100 * rate * moved / machine[1], 1),
    }
    if alone is not None:
        figures |= {"one_by_one_steps_per_s": round(alone, 1), "speedup_times": round(rate / alone, 2)}
    if parallel:
        torch.set_num_threads(CORES)
        figures["threads_steps_per_s"] = round(best_rate(hosts), 1)
        torch.set_num_threads(1)
        figures["processes_steps_per_s"] = round(together(case), 1)
    emit(
        "growing_host",
        figures,
        task=case.task,
        host=case.host,
        lanes=case.lanes,
        seeds_per_lane=case.seeds,
        train_batches=TRAIN_BATCHES,
        train_batch_size=BATCH,
        validation_batches=VALIDATION_BATCHES,
        variants=2**case.seeds - 1,
        threads=1,
        cores=CORES,
        product_gflops=round(machine[0] / 1e9, 1),
        copy_gbytes_per_s=round(machine[1] / 1e9, 1),
    )
    return rate


def print_profile(case: Case) -> None:
    """Where a step's time goes: operations by their own share of it, and calls a step."""
    hosts, steps = case.prepared(), 3
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step(hosts)
    rows = sorted(recorded.key_averages(), key=lambda row: row.self_cpu_time_total, reverse=True)
    whole_us = sum(row.self_cpu_time_total for row in rows)
    step_ms = whole_us / steps / 1e3
    print(f"{case.task} {case.host}, {case.lanes} environments, {case.seeds} seeds: {step_ms:.0f} ms a step")
    for row in rows[:PROFILE_ROWS]:
        share = 100 * row.self_cpu_time_total / whole_us
        print(f"  {share:5.1f} %  {row.count // steps:6d} calls  {row.key}")


def main() -> None:
    """Measure every case, or those of one host; 16 environments also on all cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", action="append", help="TASK/HOST, such as digits/rescue; all by default")
    parser.add_argument("--lanes", action="append", type=int, help="environments; 1, 4, 16 and 64 by default")
    parser.add_argument(
        "--profile", action="store_true", help="where the time of 16 environments goes, as text"
    )
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    machine = limits()
    for task, host in CASES:
        if options.case and f"{task}/{host}" not in options.case:
            continue
        for seeds in SEEDS:
            alone = None
            if options.profile:
                print_profile(Case(task, host, PARALLEL_LANES, seeds))
                continue
            for lanes in options.lanes or LANES:
                case = Case(task, host, lanes, seeds)
                rate = measure(case, alone, machine, parallel=lanes == PARALLEL_LANES)
                alone = rate if alone is None else alone


if __name__ == "__main__":
    main()
