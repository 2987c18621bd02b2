"""How long the policy takes to act and to learn, and V-trace beside it: medians on one thread, in milliseconds."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch is imported: an actor and the default learner have one thread
)

import statistics
import time
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor

from bench.report import emit
from esper_simic import seeding
from esper_simic.actions import BLUEPRINTS, HEADS
from esper_simic.algorithms.vtrace import vtrace
from esper_simic.config import TrainerConfig
from esper_simic.graphs import ObservationSpec
from esper_simic.policies.graph_policy import GraphPolicy

SPEC: Final = ObservationSpec(host_nodes=4, host_features=8, slots=3, slot_features=31, global_features=23)
"""The shapes of the host `rescue` with three slots."""

LANES: Final = 32
VTRACE_STEPS: Final = 80
WARM_UP: Final = 10
REPEATS: Final = 100


def observations(rng: np.random.Generator, *lead: int) -> dict[str, Tensor]:
    """Random observations `[*lead, …]` of whole hosts with full slots, in which everything is legal."""
    made = {}
    for key, (shape, dtype) in SPEC.shapes().items():
        if dtype == "float32":
            array = rng.normal(size=(*lead, *shape)).astype(dtype)
        elif dtype == "int8":
            array = np.ones((*lead, *shape), dtype=dtype)
        else:
            choices = len(BLUEPRINTS) if key == "slot_blueprint" else SPEC.host_nodes - 1
            array = rng.integers(choices, size=(*lead, *shape))
        made[key] = torch.from_numpy(array)
    return made


def median_ms(work: Callable[[], object]) -> float:
    """Median time of one call, in milliseconds."""
    for _ in range(WARM_UP):
        work()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return round(1000 * statistics.median(times), 3)


def main() -> None:
    """Measure and print one line."""
    torch.set_num_threads(1)
    config, rng = TrainerConfig(), seeding.generator("bench", "policy")
    policy = GraphPolicy(SPEC, config, rng)
    rows = config.unroll_length + 1
    state, seen = policy.initial_state(LANES), observations(rng, rows, LANES)
    starts = torch.from_numpy(rng.random((rows, LANES)) < 1 / 60)
    first = {key: tensor[0] for key, tensor in seen.items()}
    uniforms = torch.from_numpy(rng.random((LANES, len(HEADS))))
    actions = policy.act(first, starts[0], state, uniforms).actions.expand(rows, LANES, len(HEADS))

    def learn() -> None:
        policy.zero_grad(set_to_none=True)
        found = policy.evaluate(seen, starts, state, actions)
        loss = found.log_probs.mean() + found.entropy.mean() + found.values.mean()
        loss.backward()  # type: ignore[no-untyped-call]

    numbers = torch.from_numpy(rng.normal(size=(4, VTRACE_STEPS, LANES)).astype(np.float32))
    discounts = torch.full((VTRACE_STEPS, LANES), config.gamma)

    def targets() -> None:
        vtrace(numbers[0], discounts, numbers[1], numbers[2], numbers[3, 0])

    figures = {
        "act_ms": median_ms(lambda: policy.act(first, starts[0], state, uniforms)),
        "evaluate_forward_backward_ms": median_ms(learn),
        "normaliser_update_ms": median_ms(lambda: policy.normaliser.update(seen)),
        "vtrace_ms": median_ms(targets),
    }
    emit(
        "policy",
        figures,
        lanes=LANES,
        rows=rows,
        hidden=config.hidden_size,
        vtrace_steps=VTRACE_STEPS,
        threads=1,
        parameters=sum(parameter.numel() for parameter in policy.parameters()),
    )


if __name__ == "__main__":
    main()
