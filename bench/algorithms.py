"""How long the algorithms' arithmetic takes on one thread, and V-trace and GAE beside the plain loop in the same run.

The plain loop is how V-trace is commonly written: one step after the other, each a handful of operations on `[B]`. It
takes turns with ours, so that whatever else the machine does meets both. Times are medians.

- `vtrace_ms`, `gae_ms`, T = 80, B = 32, and `…_plain_ms`; `…_speedup` is plain over ours.
- `ppo_loss_ms`: the loss of one minibatch, eight heads, T = 10, B = 32, forward; `ppo_loss_and_gradient_ms` with the
  backward pass.
- `ewc_penalty_…`: of 1,000 and 1,000,000 parameters in ten tensors.
- `fisher_200_samples_ms`: of a network of about 100,000 parameters, eight samples a batch, forward passes included.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch is imported: an actor and the default learner have one thread
)

import statistics
import sys
import time
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from bench.report import emit
from esper_simic import seeding
from esper_simic.actions import HEADS
from esper_simic.algorithms.ewc import Consolidation, estimate_fisher
from esper_simic.algorithms.gae import gae
from esper_simic.algorithms.ppo import PpoHead, PpoOptions, ppo_loss
from esper_simic.algorithms.vtrace import vtrace

STEPS: Final = 80
LANES: Final = 32
UNROLL: Final = 10
GAMMA: Final = 0.99
FISHER_SAMPLES: Final = 200
SAMPLES_A_BATCH: Final = 8
WARM_UP: Final = 20
REPEATS: Final = 300
TOLERANCE: Final = 1e-4
"""Between two ways to compute the same in single precision."""


def plain_vtrace(
    log_rhos: Tensor, discounts: Tensor, rewards: Tensor, values: Tensor, bootstrap_value: Tensor
) -> tuple[Tensor, Tensor]:
    """Targets and advantages, all clips at 1, one step after the other."""
    with torch.no_grad():
        rhos = log_rhos.exp()
        clipped = rhos.clamp(max=1.0)
        following = torch.cat([values[1:], bootstrap_value.unsqueeze(0)])
        deltas = clipped * (rewards + discounts * following - values)
        total, found = torch.zeros_like(bootstrap_value), []
        for t in range(discounts.shape[0] - 1, -1, -1):
            total = deltas[t] + discounts[t] * clipped[t] * total
            found.append(total)
        vs = torch.stack(found[::-1]) + values
        following = torch.cat([vs[1:], bootstrap_value.unsqueeze(0)])
        return vs, clipped * (rewards + discounts * following - values)


def plain_gae(
    rewards: Tensor, discounts: Tensor, values: Tensor, bootstrap_value: Tensor, lambda_: float
) -> Tensor:
    """Advantages, one step after the other."""
    with torch.no_grad():
        following, total, found = bootstrap_value, torch.zeros_like(bootstrap_value), []
        for t in range(discounts.shape[0] - 1, -1, -1):
            total = rewards[t] + discounts[t] * following - values[t] + discounts[t] * lambda_ * total
            following = values[t]
            found.append(total)
        return torch.stack(found[::-1])


def medians_ms(*works: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Median time of one call of each, in milliseconds; they take turns."""
    for _ in range(min(WARM_UP, repeats)):
        for work in works:
            work()
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, taken in zip(works, times, strict=True):
            begin = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begin)
    return [round(1000 * statistics.median(taken), 4) for taken in times]


def check_equal(name: str, found: Tensor, plain: Tensor) -> None:
    """Refuse to compare the times of two computations whose results differ."""
    if not torch.allclose(found, plain, atol=TOLERANCE):
        furthest = float((found - plain).abs().max())
        raise SystemExit(
            f"{name} differs from its plain loop by up to {furthest:g}; at most {TOLERANCE:g} is rounding"
        )


def targets_figures(rng: np.random.Generator) -> dict[str, float]:
    """V-trace and GAE beside the plain loop."""
    numbers = torch.from_numpy(rng.normal(size=(4, STEPS, LANES)).astype(np.float32))
    log_rhos, rewards, values, bootstrap = numbers[0], numbers[1], numbers[2], numbers[3, 0]
    ends = torch.from_numpy(rng.random((STEPS, LANES)) < 1 / 60)
    discounts = torch.full((STEPS, LANES), GAMMA).masked_fill(ends, 0.0)
    trace, advantages = (
        (log_rhos, discounts, rewards, values, bootstrap),
        (rewards, discounts, values, bootstrap),
    )
    check_equal("V-trace", vtrace(*trace).vs, plain_vtrace(*trace)[0])
    check_equal("GAE", gae(*advantages, 0.95).advantages, plain_gae(*advantages, 0.95))
    ours, plain = medians_ms(lambda: vtrace(*trace), lambda: plain_vtrace(*trace))
    our_gae, a_plain_gae = medians_ms(lambda: gae(*advantages, 0.95), lambda: plain_gae(*advantages, 0.95))
    return {
        "vtrace_ms": ours,
        "vtrace_plain_ms": plain,
        "vtrace_speedup": round(plain / ours, 2),
        "gae_ms": our_gae,
        "gae_plain_ms": a_plain_gae,
        "gae_speedup": round(a_plain_gae / our_gae, 2),
    }


def ppo_figures(rng: np.random.Generator) -> dict[str, float]:
    """The loss of one minibatch of the growth controller's heads, without its policy."""
    shape = (UNROLL, LANES)

    def normal(scale: float = 1.0) -> Tensor:
        return torch.from_numpy(rng.normal(scale=scale, size=shape).astype(np.float32))

    def head() -> PpoHead:
        anchor, relevant = -normal().abs(), torch.from_numpy(rng.random(shape) < 0.5)
        return PpoHead(
            (anchor + normal(0.1)).requires_grad_(), anchor, normal().requires_grad_(), relevant, relevant
        )

    heads, values, ones = {name: head() for name in HEADS}, normal().requires_grad_(), torch.ones(shape)
    advantages, anchors, targets, options = normal(), normal(), normal(), PpoOptions()

    def loss() -> Tensor:
        return ppo_loss(
            heads=heads,
            advantages=advantages,
            importance=ones,
            values=values,
            anchor_values=anchors,
            value_targets=targets,
            policy_weights=ones,
            value_weights=ones,
            options=options,
        ).total

    forward, both = medians_ms(loss, lambda: loss().backward())  # type: ignore[no-untyped-call]
    return {"ppo_loss_ms": forward, "ppo_loss_and_gradient_ms": both}


def ewc_figures(rng: np.random.Generator) -> dict[str, float]:
    """The penalty of few and of many parameters."""
    figures: dict[str, float] = {}
    for count, name in ((1_000, "1k"), (1_000_000, "1m")):
        tensors = torch.from_numpy(rng.normal(size=(3, 10, count // 10)).astype(np.float32))
        parameters = {str(index): row.clone().requires_grad_() for index, row in enumerate(tensors[0])}
        held = Consolidation(
            dict(zip(parameters, tensors[1], strict=True)),
            dict(zip(parameters, tensors[2].square(), strict=True)),
        )

        def gradient(held: Consolidation = held, parameters: dict[str, Tensor] = parameters) -> None:
            for parameter in parameters.values():
                parameter.grad = None
            held.penalty(parameters).backward()  # type: ignore[no-untyped-call]

        def penalty(held: Consolidation = held, parameters: dict[str, Tensor] = parameters) -> None:
            held.penalty(parameters)

        forward, both = medians_ms(penalty, gradient)
        figures |= {f"ewc_penalty_{name}_ms": forward, f"ewc_penalty_and_gradient_{name}_ms": both}
    return figures


def fisher_figures(rng: np.random.Generator) -> dict[str, float]:
    """The Fisher estimate of a network of about 100,000 parameters."""
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
    batches = torch.from_numpy(
        rng.normal(size=(FISHER_SAMPLES // SAMPLES_A_BATCH, SAMPLES_A_BATCH, 64)).astype(np.float32)
    )
    labels = torch.from_numpy(rng.integers(64, size=(SAMPLES_A_BATCH, 1)))
    parameters = dict(network.named_parameters())

    def log_prob_of_samples(batch: Tensor) -> Tensor:
        log_probs: Tensor = network(batch).log_softmax(-1)
        return log_probs.gather(1, labels).squeeze(1)

    (taken,) = medians_ms(lambda: estimate_fisher(log_prob_of_samples, batches, parameters), repeats=15)
    return {
        "fisher_200_samples_ms": taken,
        "fisher_parameters": sum(parameter.numel() for parameter in parameters.values()),
    }


def main() -> None:
    """Measure; print a table (to standard error) and one line."""
    torch.set_num_threads(1)
    rng = seeding.generator("bench", "algorithms")
    figures = targets_figures(rng) | ppo_figures(rng) | ewc_figures(rng) | fisher_figures(rng)
    for name, figure in figures.items():
        print(f"{name:34s} {figure:12g}", file=sys.stderr)
    emit("algorithms", figures, steps=STEPS, lanes=LANES, unroll=UNROLL, heads=len(HEADS), threads=1)


if __name__ == "__main__":
    main()
