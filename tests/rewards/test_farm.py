"""Does a mode pay for never fossilising? One host is grown twice, by script.

Both controllers plant the same three seeds in the same epochs, so that the host learns the same: 9 points a seed.
*Farm* keeps them in HOLDING for ever, *patient* fossilises each after five epochs of it, where it would else wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from esper_simic.actions import Op
from esper_simic.config_rewards import REWARD_FAMILIES, RewardConfig
from esper_simic.lifecycle import BLENDED, LIVE, OCCUPIED, SeedStage
from esper_simic.rewards import FARMABLE, INDIFFERENT, PARTS, Outcome, Rewards, total
from supervisor import config_file
from tests.rewards.steps import config, returns

SLOTS = 3
HOST_PARAMETERS, SEED_PARAMETERS = 75, 40
FIRST_ACCURACY, POINTS_A_SEED = 13.0, 9.0
TRAINING_EPOCHS, RAMP_EPOCHS, PATIENCE_EPOCHS = 4, 3, 5


@dataclass
class Slot:
    stage: int = SeedStage.DORMANT
    epochs: int = 0
    age: int = 0
    alpha: float = 0.0
    accuracy_at_germination: float = np.nan
    contribution: float = np.nan
    progress: float = np.nan

    @property
    def parameters(self):
        return SEED_PARAMETERS if OCCUPIED[self.stage] else 0

    def is_ready(self):
        return (
            self.stage == SeedStage.GERMINATED
            or (self.stage == SeedStage.TRAINING and self.epochs >= TRAINING_EPOCHS)
            or (self.stage == SeedStage.BLENDING and self.alpha >= 1.0)
        )


ADVANCED = {
    SeedStage.GERMINATED: SeedStage.TRAINING,
    SeedStage.TRAINING: SeedStage.BLENDING,
    SeedStage.BLENDING: SeedStage.HOLDING,
}


def decide(slots, fossilise):
    """The next operation: grow where it is possible, then fossilise, else wait."""
    for index, slot in enumerate(slots):
        if slot.is_ready():
            return Op.ADVANCE, index
    stages = [slot.stage for slot in slots]
    if SeedStage.DORMANT in stages and SeedStage.TRAINING not in stages:
        return Op.GERMINATE, stages.index(SeedStage.DORMANT)
    for index, slot in enumerate(slots):
        if fossilise and slot.stage == SeedStage.HOLDING and slot.epochs >= PATIENCE_EPOCHS:
            return Op.FOSSILIZE, index
    return Op.WAIT, 0


def act(slots, op, target, accuracy):
    slot = slots[target]
    if op == Op.GERMINATE:
        slot.stage, slot.epochs, slot.accuracy_at_germination = SeedStage.GERMINATED, 0, accuracy
    elif op == Op.ADVANCE:
        slot.stage, slot.epochs = ADVANCED[SeedStage(slot.stage)], 0
    elif op == Op.FOSSILIZE:
        slot.stage, slot.epochs = SeedStage.FOSSILIZED, 0


def measure(slots):
    """Accuracy, what all live seeds are worth together, and accuracy with the fossils alone."""
    live = sum(POINTS_A_SEED * slot.alpha for slot in slots if LIVE[slot.stage])
    fossils = sum(POINTS_A_SEED for slot in slots if slot.stage == SeedStage.FOSSILIZED)
    accuracy = FIRST_ACCURACY + live + fossils
    for slot in slots:
        if BLENDED[slot.stage]:
            slot.contribution = POINTS_A_SEED * slot.alpha
            slot.progress = accuracy - slot.accuracy_at_germination
    return accuracy, (live if live else np.nan), FIRST_ACCURACY + fossils


def gathered(slots, name):
    return np.array([[getattr(slot, name) for slot in slots]])


def grow(*, fossilise, horizon) -> list[Outcome]:
    slots = [Slot() for _ in range(SLOTS)]
    accuracy, improvement = FIRST_ACCURACY, np.nan
    steps = []
    for epoch in range(1, horizon + 1):
        op, target = decide(slots, fossilise)
        before = {
            "stage_before": gathered(slots, "stage"),
            "epochs_before": gathered(slots, "epochs"),
            "alpha_before": gathered(slots, "alpha"),
            "age_before": gathered(slots, "age"),
            "parameters_before": gathered(slots, "parameters"),
            "contribution_before": gathered(slots, "contribution"),
            "progress_before": gathered(slots, "progress"),
            "improvement_before": np.array([improvement]),
            "loss_before": np.array([loss(accuracy)]),
        }
        act(slots, op, target, accuracy)
        for slot in slots:
            slot.epochs += slot.stage != SeedStage.DORMANT
            slot.age += bool(OCCUPIED[slot.stage])
            if slot.stage == SeedStage.BLENDING:
                slot.alpha = min(1.0, slot.alpha + 1.0 / RAMP_EPOCHS)
        accuracy, improvement, committed = measure(slots)
        fossilized = (before["stage_before"] != SeedStage.FOSSILIZED) & (
            gathered(slots, "stage") == SeedStage.FOSSILIZED
        )
        steps.append(
            Outcome(
                **before,
                stage=gathered(slots, "stage"),
                epochs_in_stage=gathered(slots, "epochs"),
                alpha=gathered(slots, "alpha"),
                seed_parameters=gathered(slots, "parameters"),
                age=gathered(slots, "age"),
                contribution=gathered(slots, "contribution"),
                progress=gathered(slots, "progress"),
                fossilized=fossilized,
                host_parameters=HOST_PARAMETERS,
                accuracy=np.array([accuracy]),
                improvement=np.array([improvement]),
                committed_accuracy=np.array([committed]),
                loss=np.array([loss(accuracy)]),
                loss_scale=np.array([np.log(10.0)]),
                op=np.array([op]),
                target=np.array([target]),
                succeeded=np.array([True]),
                epoch=np.array([epoch]),
                horizon=np.array([horizon]),
                terminated=np.array([epoch == horizon]),
            )
        )
    return steps


def loss(accuracy):
    return np.log(10.0) * (1.0 - accuracy / 100.0)


HORIZONS = [60, 150]
FARM = {horizon: grow(fossilise=False, horizon=horizon) for horizon in HORIZONS}
PATIENT = {horizon: grow(fossilise=True, horizon=horizon) for horizon in HORIZONS}


@pytest.mark.parametrize("horizon", HORIZONS)
def test_both_controllers_grow_the_same_host(horizon):
    farm, patient = FARM[horizon], PATIENT[horizon]
    assert [one.accuracy for one in farm] == [one.accuracy for one in patient]
    assert farm[-1].accuracy == pytest.approx([FIRST_ACCURACY + 3 * POINTS_A_SEED])
    assert (farm[-1].stage == SeedStage.HOLDING).all()
    assert (patient[-1].stage == SeedStage.FOSSILIZED).all()
    assert sum(one.fossilized.sum() for one in patient) == SLOTS


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("mode", list(PARTS))
def test_which_modes_pay_for_never_fossilising(mode, horizon):
    """The data that the configuration's words are made of: paid, indifferent, or a loss."""
    farm, patient = returns(mode, FARM[horizon]), returns(mode, PATIENT[horizon])
    assert (farm > patient + 1e-6) == (mode in FARMABLE), (farm, patient)
    assert (abs(farm - patient) < 1e-6) == (mode in INDIFFERENT), (farm, patient)


def test_under_shaped_every_further_epoch_of_farming_is_paid_and_of_patience_is_not():
    """Undiscounted, an epoch: 9 points a seed, germinated in the epochs 0, 6 and 12, less indecision and rent."""
    an_epoch = {}
    for name, grown in (("farm", FARM), ("patient", PATIENT)):
        rewards = {horizon: Rewards(1, SLOTS, config("shaped"), 0.99) for horizon in HORIZONS}
        paid = [sum(total(rewards[one].parts(step))[0] for step in grown[one]) for one in HORIZONS]
        an_epoch[name] = (paid[1] - paid[0]) / (HORIZONS[1] - HORIZONS[0])
    assert (60 - FARM[60][-1].age).tolist() == [[0, 6, 12]]
    attributed = POINTS_A_SEED * (0.4 + (0.4 + 0.6 * 0.6) + 1.0)
    assert an_epoch["farm"] == pytest.approx(attributed - 3 * 0.3 - 0.3, abs=0.1)
    assert -0.5 < an_epoch["patient"] < 0.0


def test_the_configuration_says_so():
    explained = config_file.explain("digits", "reward.mode")[0]
    assert (
        f"Paid for never fossilising, so that its return proves nothing: {', '.join(FARMABLE)}."
        in explained.description
    )
    assert f"Indifferent to fossilising: {', '.join(INDIFFERENT)}." in explained.description


@pytest.mark.parametrize("preset", ["digits", "digits-spec"])
def test_none_of_them_is_anybody_s_default(preset):
    assert RewardConfig().mode not in FARMABLE | INDIFFERENT
    assert config_file.load(preset).environment.reward.mode not in FARMABLE | INDIFFERENT


def test_every_mode_belongs_to_one_family():
    known = [mode for modes in REWARD_FAMILIES.values() for mode in modes]
    assert sorted(known) == sorted(PARTS)
