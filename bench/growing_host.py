"""Environment steps/s of the batched growing host against the same hosts stepped one by one, on one thread.

Both sides do the same work in the same run: equal lanes, epochs, batches and validation samples, from the same
states. A *step* is one epoch of one host. With 3 seeds every lane holds three `conv_light` seeds in BLENDING, whose
counterfactuals are measured every step; with 0 there are none. The best of several rounds is printed, since other
work on the machine can only slow a round down.
"""

from __future__ import annotations

import time
from typing import Final

import numpy as np
import torch

from bench.report import emit
from esper_simic.actions import BLUEPRINTS, HEADS, Op
from esper_simic.config import EnvironmentConfig
from esper_simic.growing_host.core import GrowingHosts
from esper_simic.lifecycle import SeedStage

LANES: Final = 32
ROUNDS: Final = 5
EPOCHS: Final = 4
CONFIG: Final = EnvironmentConfig(max_epochs=10_000)


def prepared(lanes: int, first_seed: int, seeds: int) -> GrowingHosts:
    """Hosts whose first slots hold blended seeds: germinated through actions, then put straight into BLENDING."""
    hosts = GrowingHosts(lanes, CONFIG, gamma=0.99)
    hosts.start(np.arange(lanes), [first_seed + lane for lane in range(lanes)], [0] * lanes)
    for slot in range(seeds):
        hosts.step(action(lanes, Op.GERMINATE, slot))
        hosts.slots.stage[:, slot] = SeedStage.BLENDING
        hosts.slots.alpha[:, slot] = 0.5
        hosts.step(action(lanes, Op.WAIT, 0))
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


def step_all(parts: list[GrowingHosts]) -> None:
    """One epoch of every host, and its observation."""
    for hosts in parts:
        hosts.step(action(hosts.lanes, Op.WAIT, 0))
        hosts.observe()


def steps_per_s(parts: list[GrowingHosts], epochs: int) -> float:
    """Environment steps a second of one round."""
    started = time.perf_counter()
    for _ in range(epochs):
        step_all(parts)
    return epochs * sum(hosts.lanes for hosts in parts) / (time.perf_counter() - started)


def main() -> None:
    """Measure 0 and 3 seeds per lane, both ways, turn and turn about."""
    torch.set_num_threads(1)
    for seeds in (0, 3):
        batched = [prepared(LANES, 0, seeds)]
        one_by_one = [prepared(1, lane, seeds) for lane in range(LANES)]
        rates = [(steps_per_s(batched, EPOCHS), steps_per_s(one_by_one, 1)) for _ in range(ROUNDS)]
        fast, slow = (max(column) for column in zip(*rates, strict=True))
        emit(
            "growing_host",
            {
                "batched_steps_per_s": round(fast, 1),
                "one_by_one_steps_per_s": round(slow, 1),
                "speedup_times": round(fast / slow, 2),
            },
            lanes=LANES,
            seeds_per_lane=seeds,
            task=CONFIG.task,
            host=CONFIG.host,
            train_batches=CONFIG.train_batches,
            train_batch_size=CONFIG.train_batch_size,
            validation_samples=CONFIG.validation_samples,
            validation_configurations=1 + seeds,
            threads=1,
        )


if __name__ == "__main__":
    main()
