"""The second controller: what its choices of blueprints earn, against all that could be earned.

Starts `simic-supervisor run --preset karn` as a user would, once a seed and algorithm, and looks at the policy of its
last checkpoint. What a policy earns is computed, not sampled: the mean of the recorded rewards over its probabilities
and over all cases of a part, hosts alike. `best_possible` gives each place what earned most there in the mean over the
trials of that part; `regret` is how much less the policy earns.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench.report import emit
from esper_simic.config import parse
from esper_simic.policies.policy import Policy
from esper_simic.worlds.blueprint_choice import BlueprintChoiceVectorEnv
from esper_simic.worlds.blueprint_table import PARTS, Cases
from supervisor.outcome import fold_journal
from supervisor.roles.evaluate import load_policy


def main() -> None:
    """Run every algorithm and seed, and print a line for each part of the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algorithms", nargs="+", default=["IMPALA", "PPO", "IQL"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=40.0, help="training time of each run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="further settings")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    for algorithm in options.algorithms:
        for seed in range(options.seeds):
            for part, figures in _run(algorithm, seed, options.seconds, options.set).items():
                emit(
                    "blueprint_choice",
                    figures,
                    algorithm=algorithm,
                    seed=seed,
                    part=part,
                    training_s=options.seconds,
                    settings=" ".join(options.set),
                )


def _run(algorithm: str, seed: int, seconds: float, settings: list[str]) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory(prefix="simic-bench-") as scratch:
        run_dir = Path(scratch) / "run"
        assignments = [f"simic_trainer.algorithm={algorithm}", "supervisor.metrics_port=null", *settings]
        command = [
            *(sys.executable, "-m", "supervisor.cli", "run", "--preset", "karn", "--run-dir", str(run_dir)),
            *("--seed", str(seed), "--max-seconds", str(seconds), "--no-evaluation"),
            *(part for assignment in assignments for part in ("--set", assignment)),
        ]
        began_s = time.monotonic()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        return measured(run_dir, time.monotonic() - began_s)


def measured(run_dir: Path, wall_s: float) -> dict[str, dict[str, float]]:
    """What the policy of a run's last checkpoint earns, part by part."""
    state = fold_journal(run_dir)
    if state.started is None or state.checkpoint is None:
        raise SystemExit(f"{run_dir} has no checkpoint")
    config = parse(state.started.config_text)
    policy = load_policy(config, Path(state.checkpoint.path))
    made = {
        "environment_steps": state.checkpoint.environment_steps,
        "updates": state.checkpoint.learner_step,
        "wall_s": round(wall_s, 1),
    }
    kwargs = config.environment.kwargs
    ranking = BlueprintChoiceVectorEnv(**kwargs).cases.ranking()
    return {
        part: _earned(policy, BlueprintChoiceVectorEnv(**{**kwargs, "part": part}).cases, ranking) | made
        for part in PARTS
    }


def _earned(policy: Policy, cases: Cases, ranking: np.ndarray) -> dict[str, float]:
    chance = _probabilities(policy, cases)
    legal = cases.mask > 0
    single = np.where(legal, ranking, -np.inf).argmax(axis=1)
    best = cases.mean_by_place().argmax(axis=1)
    rows = np.arange(len(best))
    random = (cases.reward * legal).sum(axis=1) / legal.sum(axis=1)
    earned = {
        "learned": (chance * cases.reward).sum(axis=1),
        "learned_greedy": cases.reward[rows, chance.argmax(axis=1)],
        "best_single": cases.reward[rows, single],
        "best_possible": cases.reward[rows, best],
        "random": random,
    }
    means = {name: float(cases.weights @ rewards) for name, rewards in earned.items()}
    means["regret"] = means["best_possible"] - means["learned"]
    means["regret_of_best_single"] = means["best_possible"] - means["best_single"]
    return {"cases": len(rows), **{name: round(mean, 3) for name, mean in means.items()}}


def _probabilities(policy: Policy, cases: Cases) -> np.ndarray:
    """`[N, 13]` of each choice."""
    count = len(cases.features)
    observations = {
        "vector": torch.from_numpy(cases.features)[None],
        "action_mask": torch.from_numpy(cases.mask)[None],
    }
    start = torch.ones(1, count, dtype=torch.bool)
    with torch.no_grad():
        columns = [
            policy.evaluate(
                observations, start, policy.initial_state(count), torch.full((1, count, 1), choice)
            ).log_probs[0]
            for choice in range(cases.mask.shape[1])
        ]
    return torch.stack(columns, dim=1).exp().numpy()


if __name__ == "__main__":
    main()
