"""What one update costs, and its parts beside the requirements' figures: medians on one thread, in milliseconds.

A real learner of the `digits` preset with real experience: hosts of 8 x 8 digits, unrolls of 10 steps, 32 lanes. An
update is `Learner.step` without its journal: sampling, the batch, forward and backward pass, the optimisers, what
follows for the next one, and the digest of the weights. *One by one* is the gradient of the same 32 experiences, a
lane at a time.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the default learner has one thread

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from bench.report import emit
from esper_simic import seeding
from esper_simic.config import Config
from esper_simic.config_curriculum import CurriculumKeys
from esper_simic.curriculum import Curriculum, CurriculumState
from esper_simic.events import ExperienceAdmitted
from esper_simic.learner import Learner
from esper_simic.learning_rates import GroupConfig, LRPolicy, UnifiedLRController
from esper_simic.policies.build import build_policy
from esper_simic.policies.lora import attach
from esper_simic.safety import StepInputs
from esper_simic.trajectory import Trajectory
from esper_simic.unroll import begin, unroll
from esper_simic.worlds.world import world_of
from supervisor.config_file import load

LANES: Final = 32
UNROLLS: Final = 4
WARM_UP: Final = 3
REPEATS: Final = 30
WIDTH: Final = 512


def median_ms(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median time of one call, in milliseconds."""
    for _ in range(WARM_UP):
        work()
    times = []
    for _ in range(repeats):
        begin_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin_s)
    return round(1000 * statistics.median(times), 4)


def config_of(*assignments: str) -> Config:
    """The preset, with 32 lanes and the batch size that the requirement's figure is for."""
    fixed = (f"environment.environments_per_actor={LANES}", "simic_trainer.batch_size=32")
    return load(preset="digits", assignments=[*fixed, *assignments])


def recorded(config: Config) -> list[tuple[ExperienceAdmitted, Trajectory]]:
    """Real unrolls of the untrained policy."""
    trainer, world = config.simic_trainer, world_of(config.environment, config.simic_trainer.gamma)
    policy = build_policy(world.spec, trainer, seeding.generator(trainer.seed, "policy"))
    seeds = [seeding.derive(trainer.seed, "actor", 0, lane) for lane in range(LANES)]
    first = np.zeros(LANES, dtype=np.int64)
    lanes = world.lanes(seeds, first.tolist(), stagger=True)
    carry = begin(policy, lanes.reset()[0], seeds, first)
    made = []
    for number in range(1, UNROLLS + 1):
        numbers = carry.episode_numbers.tolist()
        trajectory, finished = unroll(policy, lanes, carry, trainer.unroll_length)
        event = ExperienceAdmitted(
            actor=0,
            incarnation=0,
            sequence=number,
            policy_version=0,
            length=trajectory.length,
            lanes=LANES,
            episode_numbers=numbers,
            episodes=finished,
        )
        made.append((event, trajectory))
    lanes.close()
    return made


class Updates:
    """A learner that makes one update after the other from the same unrolls."""

    def __init__(self, config: Config, unrolls: Sequence[tuple[ExperienceAdmitted, Trajectory]]) -> None:
        self.learner = Learner(config, world_of(config.environment, config.simic_trainer.gamma).spec)
        self._unrolls, self._admitted = unrolls, 0
        for _ in range(3):
            self._admit()

    def _admit(self) -> None:
        event, trajectory = self._unrolls[self._admitted % len(self._unrolls)]
        self._admitted += 1
        self.learner.admit(self._admitted, event, trajectory)

    def times_ms(self, repeats: int = REPEATS) -> float:
        """Median time of an update; admissions are not counted."""
        times = []
        for number in range(WARM_UP + repeats):
            while not self.learner.can_step():
                self._admit()
            begin_s = time.perf_counter()
            report = self.learner.step(StepInputs(at_s=float(self.learner.steps_done)))
            if number >= WARM_UP:
                times.append(time.perf_counter() - begin_s)
            if report.failure:
                raise SystemExit(report.failure)
        return round(1000 * statistics.median(times), 3)


def update_figures(
    config: Config, unrolls: Sequence[tuple[ExperienceAdmitted, Trajectory]]
) -> dict[str, float]:
    """Whole updates: of each algorithm, and with what may be added."""
    variants: dict[str, tuple[str, ...]] = {
        "impala": (),
        "ppo": ("simic_trainer.algorithm=PPO", "experience_buffer.replay_ratio=0"),
        "appo": ("simic_trainer.algorithm=APPO",),
        "iql": ("simic_trainer.algorithm=IQL",),
        "bc": ("simic_trainer.algorithm=BC", "environment.behaviour=heuristic"),
        "impala_lora": ("simic_trainer.lora_start_step=0",),
    }
    found = {
        f"update_{name}_ms": Updates(config_of(*keys), unrolls).times_ms() for name, keys in variants.items()
    }
    held = Updates(config, unrolls)
    learner = held.learner
    serials = np.arange(learner.buffer.inserted - LANES, learner.buffer.inserted)
    learner.engine.consolidate(learner._few_at_a_time(serials), np.random.default_rng(0))
    return found | {"update_impala_ewc_ms": held.times_ms()}


def batching_figures(config: Config, trajectory: Trajectory) -> dict[str, float]:
    """The gradient of 32 experiences: all at once, and a lane at a time."""
    trainer = config.simic_trainer
    spec = world_of(config.environment, trainer.gamma).spec
    policy = build_policy(spec, trainer, seeding.generator(trainer.seed, "policy"))

    def gradient(lanes: slice) -> None:
        seen = {key: tensor[:, lanes].contiguous() for key, tensor in trajectory.observations.items()}
        starts, state = trajectory.episode_start[:, lanes], trajectory.initial_state[lanes]
        actions = trajectory.actions[:, lanes]
        found = policy.evaluate(seen, starts, state, torch.cat([actions, actions[-1:]]))
        (found.log_probs.mean() + found.entropy.mean() + found.values.mean()).backward()  # type: ignore[no-untyped-call]

    def one_by_one() -> None:
        for lane in range(LANES):
            gradient(slice(lane, lane + 1))

    together, apart = median_ms(lambda: gradient(slice(0, LANES))), median_ms(one_by_one, 5)
    return {
        "gradient_32_together_ms": together,
        "gradient_32_one_by_one_ms": apart,
        "batching_speedup": round(apart / together, 2),
    }


def lora_figures() -> dict[str, float]:
    """A layer of 512 x 512 for 32 rows, without and with an adapter of rank 16; and how exactly it merges."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, rows: Tensor) -> Tensor:
            found: Tensor = self.linear(rows)
            return found

    layer, rows = Layer(), torch.randn(LANES, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = median_ms(lambda: layer(rows))
        attach(layer, np.random.default_rng(0), rank=16, alpha=32.0, dropout=0.0)
        return {"linear_512_ms": plain, "lora_forward_rank_16_ms": median_ms(lambda: layer(rows))}


def curriculum_figures() -> dict[str, float]:
    """Counting the outcomes of 100 episodes, and the verdict that advances."""
    rules = Curriculum.of(CurriculumKeys())
    passed = [True] * 100
    ready = rules.counted(CurriculumState(), 0, passed)
    if not rules.judged(ready, 1.0).facts:
        raise SystemExit("nothing advances")
    return {
        "curriculum_count_100_ms": median_ms(lambda: rules.counted(CurriculumState(), 0, passed)),
        "curriculum_advance_ms": median_ms(lambda: rules.judged(ready, 1.0)),
    }


def controller_figures() -> dict[str, float]:
    """An optimiser step through the learning-rate controller and without it; a look for rates that others wrote."""
    weights = [nn.Parameter(torch.zeros(128, 128)) for _ in range(16)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    adam: dict[str, Any] = {"lr": 1e-3, "fused": True}
    bare, driven = torch.optim.Adam(weights, **adam), torch.optim.Adam(weights, **adam)
    listed = torch.optim.Adam(weights, lr=1e-3, fused=False, foreach=True)
    single = torch.optim.Adam(weights, lr=1e-3, fused=False, foreach=False)
    rates = UnifiedLRController()
    rates.register_optimizer("policy", driven, GroupConfig(LRPolicy.POLICY_NETWORK, 1e-3, 10, 1e-6, None))
    added = iter([nn.Parameter(torch.zeros(128, 128))] for _ in range(WARM_UP + REPEATS))
    without, through = median_ms(bare.step), median_ms(lambda: rates.step("policy"))
    return {
        "adam_step_ms": without,
        "adam_foreach_step_ms": median_ms(listed.step),
        "adam_single_step_ms": median_ms(single.step),
        "controller_step_ms": through,
        "controller_verify_ms": median_ms(rates.tampered),
        "controller_add_group_ms": median_ms(lambda: rates.add_group("policy", next(added))),
    }


def main() -> None:
    """Measure and print one line."""
    torch.set_num_threads(1)
    config = config_of()
    unrolls = recorded(config)
    figures = update_figures(config, unrolls) | batching_figures(config, unrolls[0][1])
    figures |= lora_figures() | curriculum_figures() | controller_figures()
    emit(
        "trainer", figures, batch=LANES, steps=config.simic_trainer.unroll_length, threads=1, lora_rows=LANES
    )


if __name__ == "__main__":
    main()
