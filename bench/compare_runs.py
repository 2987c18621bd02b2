"""What finished runs have learned, on more held-out episodes than they measured themselves: tables in Markdown.

`python -m bench.compare_runs RUN_DIR [RUN_DIR …] [--episodes 256] [--set environment.task=mnist1d …]`

The newest checkpoint of each run and every baseline play whole episodes on the run's held-out seeds; the first of them
are those that the run itself measured, the others nobody has met. `fixed-network` are the networks that the learned
policy grew there, trained whole from the start. With `--set` all of them play in another environment (transfer): the
policy, its slots and the meaning of what it sees stay those of its run.

Tables go to standard output, progress to standard error. Each policy of each run is one task of a worker process with
one thread; figures do not depend on how many workers there are.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import torch

from bench.comparison_tables import pooled_tables, run_tables
from esper_simic.config import Config, parse
from esper_simic.errors import ConfigError, SimicError
from esper_simic.evaluation import FIXED, LEARNED, PolicyOutcome, baseline_names, evaluate, held_out_seeds
from esper_simic.growing_host.spaces import observation_spec_of
from supervisor import checkpoints
from supervisor.outcome import past_of
from supervisor.roles.data import examined_data
from supervisor.roles.evaluate import load_policy

POLICIES: Final = (LEARNED, *baseline_names(), FIXED)

MOVABLE: Final = "environment."


@dataclass(frozen=True, slots=True)
class Trained:
    """A run's newest checkpoint and the configuration under which it is measured."""

    directory: Path
    checkpoint: Path
    updates: int
    environment_steps: int
    config: Config
    began_in: str

    @property
    def name(self) -> str:
        """What its tables are called."""
        here = place(self.config)
        trained = f"update {self.updates:,}, {self.environment_steps:,} environment steps"
        if here != self.began_in:
            trained += f", trained on {self.began_in}"
        return f"{self.directory.name}, seed {self.config.simic_trainer.seed}: {here} ({trained})"


def place(config: Config) -> str:
    """Task and host."""
    return f"{config.environment.task}, host {config.environment.host}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status."""
    options = _options(arguments)
    try:
        runs = [trained_run(directory, options.assignments) for directory in options.runs]
        measured = measure(runs, options.policies, options.episodes, options.workers)
    except SimicError as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return 78 if isinstance(error, ConfigError) else 1
    for run, outcomes in zip(runs, measured, strict=True):
        print(run_tables(run.name, outcomes))
    # Returns of different tasks have no common mean.
    if len(runs) > 1 and len({place(run.config) for run in runs}) == 1:
        print(pooled_tables(measured))
    return 0


def trained_run(directory: Path, assignments: Sequence[str] = ()) -> Trained:
    """A run's newest checkpoint, under its own configuration with some keys of `environment` set anew.

    Raises:
        ConfigError: No run, no checkpoint, a key that belongs to another section, an environment in which the run's
            policy has nothing it could act on, or one whose hosts cannot be grown here.
    """
    foreign = [text for text in assignments if not text.startswith(MOVABLE)]
    if foreign:
        raise ConfigError(f"--set moves a policy to another environment.*, not to {foreign[0]!r}")
    started = past_of(directory).started if directory.is_dir() else None
    if started is None:
        raise ConfigError(f"{directory} holds no run")
    checkpoint = checkpoints.newest(directory / "checkpoints")
    if checkpoint is None:
        raise ConfigError(f"{directory} has no checkpoint yet")
    own, config = parse(started.config_text), parse(started.config_text, assignments=assignments)
    check_transfer(own, config)
    examined_data(config)
    manifest = checkpoints.read_manifest(checkpoint)
    return Trained(
        directory, checkpoint, manifest.step, manifest.environment_steps, config, began_in=place(own)
    )


def check_transfer(own: Config, other: Config) -> None:
    """Whether a policy of one configuration can act under another one.

    A policy reads any number of host layers; how many slots there are and what is told of each is part of its network.

    Raises:
        ConfigError: It cannot.
    """
    before, after = own.environment.slots, other.environment.slots
    if len(before) != len(after):
        raise ConfigError(
            f"the policy acts on the {len(before)} slots {', '.join(before)}; give the other environment as many "
            f"(it has {len(after)})",
            "environment.slots",
        )
    seen, there = observation_spec_of(own.environment), observation_spec_of(other.environment)
    for part in ("host_features", "slot_features", "global_features"):
        if getattr(seen, part) != getattr(there, part):
            raise ConfigError(
                f"the policy was trained on {getattr(seen, part)} {part}, {other.environment.task} on "
                f"{other.environment.host} gives {getattr(there, part)}"
            )


def measure(
    runs: Sequence[Trained], policies: Sequence[str], episodes: int, workers: int
) -> list[dict[str, PolicyOutcome]]:
    """Outcomes of the policies, by name and in their order, for each run."""
    jobs = [(at, names) for at in range(len(runs)) for names in _tasks(policies)]
    measured: list[dict[str, PolicyOutcome]] = [{} for _ in runs]
    began_s = time.monotonic()
    # One thread a process: the sums are then the same on every machine with the same instructions.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin) as pool:
        futures = {
            pool.submit(measured_together, runs[at], names, episodes): (at, names) for at, names in jobs
        }
        for done, future in enumerate(as_completed(futures), 1):
            at, names = futures[future]
            for outcome in future.result():
                measured[at][outcome.name] = outcome
            elapsed_s = time.monotonic() - began_s
            words = (
                f"{runs[at].directory.name} {' and '.join(names)}: {done} of {len(jobs)}, {elapsed_s:.0f} s"
            )
            print(words, file=sys.stderr, flush=True)
    return [{name: outcomes[name] for name in policies} for outcomes in measured]


def _tasks(policies: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Policies that are measured by one worker: fixed networks need what the learned policy grew."""
    yield from [(LEARNED, FIXED)] if FIXED in policies else [(LEARNED,)]
    yield from ((name,) for name in policies if name not in (LEARNED, FIXED))


def measured_together(run: Trained, names: Sequence[str], episodes: int) -> list[PolicyOutcome]:
    """Some policies on a run's held-out seeds; a later one may refer to the episodes of the first."""
    config, outcomes = run.config, list[PolicyOutcome]()
    seeds = held_out_seeds(config.simic_trainer.seed, episodes)
    policy = load_policy(config, run.checkpoint) if LEARNED in names else None
    for name in names:
        outcomes.append(
            evaluate(
                name,
                config.environment,
                seeds,
                gamma=config.simic_trainer.gamma,
                policy=policy,
                reference=outcomes[0].episodes if outcomes else None,
            )
        )
    return outcomes


def _begin() -> None:
    torch.set_num_threads(1)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare_runs",
        description="Measure the policies of runs and all baselines; print tables.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--episodes", type=int, default=256, help="held-out episodes of each policy")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument(
        "--policies", type=_names, default=POLICIES, metavar="NAME,…", help=f"of: {', '.join(POLICIES)}"
    )
    parser.add_argument(
        "--set", dest="assignments", action="append", default=[], metavar="environment.KEY=VALUE"
    )
    options = parser.parse_args(arguments)
    if options.episodes < 2:
        parser.error("--episodes: an interval needs at least two")
    return options


def _names(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in POLICIES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no policy {', '.join(unknown)}; there are: {', '.join(POLICIES)}")
    return tuple(name for name in POLICIES if name in (LEARNED, *names))


if __name__ == "__main__":
    sys.exit(main())
