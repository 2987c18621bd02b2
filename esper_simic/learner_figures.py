"""What a learner tells of its state in figures, for whoever watches; nothing here changes or decides anything."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from esper_simic import safety as safety_rules
from esper_simic import slo
from esper_simic.config_trainer import TrainerConfig
from esper_simic.curriculum import Curriculum, CurriculumState
from esper_simic.events import EpisodeFinished
from esper_simic.replay import ReplaySample
from esper_simic.safety import Safety


def of_batch(sample: ReplaySample, steps_done: int) -> dict[str, float]:
    """Size and age of the batch of one update, in updates since the policies that made it.

    Args:
        sample: The batch.
        steps_done: Updates made before this one.
    """
    lags = steps_done - sample.versions
    return {
        "batch_size": float(len(sample.serials)),
        "policy_lag": float(lags[: sample.fresh].mean()),
        "policy_lag_max": float(lags[: sample.fresh].max()),
        "replay_age": float(lags.mean()),
    }


def of_episodes(episodes: Iterable[EpisodeFinished]) -> dict[str, float]:
    """Means over the recent training episodes; nothing for what none of them has."""
    episodes = list(episodes)
    shown: dict[str, list[float]] = {
        "episodic_return": [episode.episode_return for episode in episodes],
        "episodic_length": [episode.length for episode in episodes],
        "episodic_accuracy": [e.accuracy for e in episodes if e.accuracy is not None],
        "episodic_parameters": [e.parameters_added for e in episodes if e.parameters_added is not None],
    }
    return {name: float(np.mean(values)) for name, values in shown.items() if values}


def of_others(episodes: Iterable[EpisodeFinished]) -> dict[str, float]:
    """What the newest episodes came to in which not the policy acted; nothing where there are none."""
    returns = [episode.episode_return for episode in episodes]
    return {"behaviour_return": float(np.mean(returns))} if returns else {}


def of_curriculum(rules: Curriculum, state: CurriculumState) -> dict[str, float]:
    """Where the curriculum stands."""
    return {
        "curriculum_stage": float(state.stage),
        "curriculum_difficulty": rules.difficulty(state),
        "curriculum_success_rate": rules.success_rate(state),
    }


def of_convergence(safety: Safety) -> dict[str, float]:
    """Hours of training after which the mean return reached its last new height; nothing before the first.

    See `slo`; `convergence_time_hours` is what it is measured against. In lockstep an update counts as a second.
    """
    improvement = safety.improvement
    return {} if improvement.best is None else {"convergence_hours": improvement.best_s / slo.HOUR_S}


def of_safety(safety: Safety, keys: TrainerConfig) -> dict[str, float]:
    """How breakers (1 closed, 2 open, 3 half open) and error budgets (share left) stand.

    Of what nobody has observed nothing is told: an untouched budget would look like a promise that is kept.
    """
    reports = [
        report
        for report in safety_rules.reports(safety, keys)
        if report.value is not None or report.budget_left < 1.0
    ]
    return {
        f"breaker.{breaker.name}": float(breaker.state) for breaker in (safety.training, safety.vtrace)
    } | {f"slo_budget_left.{report.objective}": report.budget_left for report in reports}
