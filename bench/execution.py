"""Ways to carry out a learner's step against the plain one: compiled, in bfloat16, both; as ratios of one run.

What is timed is what a step spends its time on: the graph policy's `evaluate` over a batch and its backward pass. The
ways are interleaved in rounds, so that a busy neighbour disturbs all alike; a ratio below 1 means faster than eager
float32. Compiling itself is timed apart: it is paid once a process, or less where the compiler's cache is warm.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the default learner has one thread

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from bench.policy import LANES, SPEC, observations
from bench.report import emit
from esper_simic import seeding
from esper_simic.actions import HEADS
from esper_simic.config import TrainerConfig
from esper_simic.execution import CPU, Execution
from esper_simic.policies.graph_policy import GraphPolicy

WARM_UP: Final = 5


def ways(device: str) -> dict[str, Execution]:
    """What is compared, by name; the first is what the others are compared with."""
    chosen = Execution.choose(device)
    if chosen.is_cuda:
        return {"plain": Execution.choose(device, plain=True), "chosen": chosen}
    half = dataclasses.replace(CPU, autocast_dtype=torch.bfloat16)
    return {
        "eager": CPU,
        "compiled": dataclasses.replace(CPU, is_compiled=True),
        "bfloat16": half,
        "compiled_bfloat16": dataclasses.replace(half, is_compiled=True),
    }


def step_of(
    execution: Execution, policy: GraphPolicy, tensors: dict[str, Tensor], told: Callable[[str], None]
) -> Callable[[], None]:
    """One forward and backward pass as `execution` has it, whole when it returns."""
    there = dict(execution.to_device(tensors))
    starts, state, actions = there.pop("starts"), there.pop("state"), there.pop("actions")
    evaluate = execution.compiled(policy.evaluate, "evaluate", told)

    def step() -> None:
        execution.begin_step()
        policy.zero_grad(set_to_none=True)
        with execution.autocast():
            found = evaluate(there, starts, state, actions)
        parts = (found.log_probs, found.entropy, found.values)
        loss = torch.stack([part.float().mean() for part in parts]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        if execution.is_cuda:
            torch.cuda.synchronize(execution.device)

    return step


def seconds(execution: Execution, work: Callable[[], None]) -> float:
    """How long one call takes as `execution` has it; the process's modes are set before, outside of it."""
    execution.apply()
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def main(arguments: list[str] | None = None) -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(prog="python -m bench.execution")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=60)
    options, _ = parser.parse_known_args(arguments)
    torch.set_num_threads(1)
    config, rng = TrainerConfig(), seeding.generator("bench", "execution")
    rows = config.unroll_length + 1
    policy = GraphPolicy(SPEC, config, rng)
    seen = observations(rng, rows, LANES)
    starts = torch.from_numpy(rng.random((rows, LANES)) < 1 / 60)
    state = policy.initial_state(LANES)
    uniforms = torch.from_numpy(rng.random((LANES, len(HEADS))))
    first = {key: tensor[0] for key, tensor in seen.items()}
    acted = policy.act(first, starts[0], state, uniforms).actions.expand(rows, LANES, len(HEADS))
    compared = ways(options.device)
    device = next(iter(compared.values())).device
    policy.to(device)
    told: list[str] = []
    tensors = seen | {"starts": starts, "state": state, "actions": acted.contiguous()}
    steps = {name: step_of(way, policy, tensors, told.append) for name, way in compared.items()}
    first_s = {name: seconds(compared[name], step) for name, step in steps.items()}
    for name, step in steps.items():
        for _ in range(WARM_UP):
            seconds(compared[name], step)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(seconds(compared[name], step))
    median_s = {name: statistics.median(taken) for name, taken in times.items()}
    base = next(iter(median_s))
    figures = {f"{name}_ms": round(1000 * taken, 3) for name, taken in median_s.items()}
    figures |= {
        f"{name}_to_{base}_ratio": round(median_s[name] / median_s[base], 3)
        for name in median_s
        if name != base
    }
    figures |= {
        f"{name}_first_call_s": round(first_s[name], 2) for name in median_s if compared[name].is_compiled
    }
    emit(
        "execution",
        figures,
        lanes=LANES,
        rows=rows,
        hidden=config.hidden_size,
        threads=1,
        rounds=options.rounds,
        not_compiled="; ".join(told),
        device=compared[base].device_name,
    )


if __name__ == "__main__":
    main()
