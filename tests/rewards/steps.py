"""Outcomes by hand: a host with one slot, or with as many as are given, in which little happens."""

from __future__ import annotations

from typing import Any

import numpy as np

from esper_simic.actions import Op
from esper_simic.config_rewards import RewardConfig
from esper_simic.lifecycle import SeedStage
from esper_simic.rewards import Outcome, Rewards, total
from esper_simic.rewards.outcome import PER_SLOT

HOST_PARAMETERS = 1000
WEIGHTS = RewardConfig()


def step(**changes: Any) -> Outcome:
    """One lane in the twentieth of forty epochs; a field `[E, S]` is given as one value a slot, or one for all."""
    values: dict[str, Any] = {
        "stage_before": SeedStage.DORMANT,
        "epochs_before": 0,
        "stage": SeedStage.DORMANT,
        "epochs_in_stage": 0,
        "alpha": 0.0,
        "seed_parameters": 0,
        "host_parameters": HOST_PARAMETERS,
        "fossilized": False,
        "contribution": np.nan,
        "progress": np.nan,
        "accuracy": 50.0,
        "terminated": False,
        "epoch": 20,
        "horizon": 40,
    } | changes
    for name, value in values.items():
        if name in PER_SLOT:
            values[name] = np.atleast_2d(value)
        elif name != "host_parameters":
            values[name] = np.atleast_1d(value)
    slots = max(values[name].shape[1] for name in values if name in PER_SLOT)
    values["stage"] = np.broadcast_to(values["stage"], (len(values["stage"]), slots))
    return Outcome(**values)


def held(**changes: Any) -> Outcome:
    """A seed of 100 parameters that stays in HOLDING, wholly blended in, and has germinated in epoch 10."""
    return step(
        **{
            "stage_before": SeedStage.HOLDING,
            "stage": SeedStage.HOLDING,
            "epochs_before": 0,
            "epochs_in_stage": 1,
            "alpha_before": 1.0,
            "alpha": 1.0,
            "parameters_before": 100,
            "seed_parameters": 100,
            "age_before": 9,
            "age": 10,
        }
        | changes
    )


def decided(op: Op, **changes: Any) -> Outcome:
    """The seed of `held`, fossilised or pruned in this step; what was known of it lies in the `_before` fields."""
    fossilized = op == Op.FOSSILIZE
    after = {"stage": SeedStage.FOSSILIZED, "fossilized": True} if fossilized else {"stage": SeedStage.PRUNED}
    gone = {} if fossilized else {"alpha": 0.0, "seed_parameters": 0, "age": 0}
    return held(**{"op": op, "succeeded": True, "epochs_in_stage": 1} | after | gone | changes)


def refused(op: Op, **changes: Any) -> Outcome:
    """The seed of `held` stays where it is: an operation on it was refused."""
    return held(**{"op": op, "succeeded": False} | changes)


def config(mode: str, **changes: Any) -> RewardConfig:
    """The defaults, in some mode."""
    return RewardConfig.model_validate(
        {"mode": mode, "family": "loss" if mode == "loss" else "contribution"} | changes
    )


def parts(mode: str, *outcomes: Outcome, gamma: float = 0.99, **changes: Any) -> dict[str, float]:
    """Parts of the last step of an episode with one lane."""
    lanes, slots = outcomes[0].stage.shape
    rewards = Rewards(lanes, slots, config(mode, **changes), gamma)
    found: dict[str, np.ndarray] = {}
    for outcome in outcomes:
        found = rewards.parts(outcome)
    return {name: float(part[0]) for name, part in found.items()}


def returns(mode: str, outcomes: list[Outcome], gamma: float = 0.99) -> float:
    """Discounted return of an episode with one lane."""
    lanes, slots = outcomes[0].stage.shape
    rewards = Rewards(lanes, slots, config(mode), gamma)
    return float(sum(gamma**t * total(rewards.parts(one))[0] for t, one in enumerate(outcomes)))
