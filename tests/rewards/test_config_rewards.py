"""A mode is validated against its family, environment by environment, and old configurations mean what they meant."""

from __future__ import annotations

import pytest

from esper_simic.config import parse
from esper_simic.config_rewards import REWARD_FAMILIES, RewardConfig
from esper_simic.errors import ConfigError

MODES = [(family, mode) for family, modes in REWARD_FAMILIES.items() for mode in modes]


@pytest.mark.parametrize(("family", "mode"), MODES)
def test_a_mode_of_its_family_is_taken(family, mode):
    found = parse(
        "", assignments=[f"environment.reward.family={family}", f"environment.reward.mode={mode}"]
    ).environment.reward
    assert (found.family, found.mode) == (family, mode)


@pytest.mark.parametrize(("family", "mode"), MODES)
def test_a_mode_of_the_other_family_is_refused_with_the_remedy(family, mode):
    other = next(name for name in REWARD_FAMILIES if name != family)
    with pytest.raises(ConfigError) as refused:
        parse("", assignments=[f"environment.reward.family={other}", f"environment.reward.mode={mode}"])
    assert refused.value.key == "environment.reward"
    assert f"mode {mode} is of the family {family}, not {other}: set family to {family}" in str(refused.value)
    assert all(known in str(refused.value) for known in REWARD_FAMILIES[other])


def test_the_mode_alone_does_not_change_the_family():
    with pytest.raises(ConfigError, match="set family to loss, or mode to one of shaped, escrow"):
        parse("", assignments=["environment.reward.mode=loss"])


def test_the_keys_and_defaults_of_basic_are_as_journals_have_them():
    told = {
        "mode": "basic",
        "potential_weight": 0.3,
        "stage_bonus_per_epoch": 0.3,
        "stage_bonus_max": 2.0,
        "rent_weight": 0.01,
        "fossil_bonus_base": 0.3,
        "fossil_bonus_per_point": 0.5,
        "fossil_bonus_max": 5.0,
        "terminal_accuracy_weight": 0.05,
        "terminal_parameter_weight": 0.1,
    }
    assert RewardConfig.model_validate(told) == RewardConfig()
