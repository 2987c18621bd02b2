"""Keys of the algorithms: defaults, ranges, and what must not stand together."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from esper_simic.actions import HEADS
from esper_simic.config_algorithms import IqlKeys, PpoKeys, VtraceKeys
from esper_simic.config_section import Section


def test_defaults_are_the_platforms() -> None:
    ppo, iql = PpoKeys(), IqlKeys()
    assert (ppo.ppo_clip, ppo.ppo_target_kl, ppo.gae_lambda, ppo.ppo_value_clip) == (0.2, 0.015, 0.98, None)
    assert (ppo.ppo_epochs, ppo.ppo_minibatches, ppo.advantage_deviation_min) == (1, 1, 0.1)
    assert (iql.iql_expectile, iql.iql_beta, iql.iql_target_rate, iql.iql_cql_alpha) == (0.7, 3.0, 0.005, 0.0)
    for table in (ppo.entropy_floors, ppo.entropy_floor_coefficients, ppo.entropy_multipliers):
        assert sorted(table) == sorted(HEADS)


def test_the_clip_of_the_advantage_follows_rho_bar_until_it_is_set() -> None:
    assert VtraceKeys(rho_bar=2.0).effective_clip_pg_rho == 2.0
    assert VtraceKeys(rho_bar=2.0, clip_pg_rho=0.5).effective_clip_pg_rho == 0.5


@pytest.mark.parametrize(
    ("keys", "values", "says"),
    [
        (PpoKeys, {"ppo_value_clip": 10.0, "ppo_epochs": 2}, "ppo_value_clip 10 with ppo_epochs 2"),
        (PpoKeys, {"entropy_floors": {"wait": 0.1}}, "names wait"),
        (PpoKeys, {"entropy_floors": {"op": 1.1}}, "less than or equal to 1"),
        (PpoKeys, {"entropy_multipliers": {"op": -1.0}}, "greater than or equal to 0"),
        (PpoKeys, {"ppo_clip": 0.0}, "greater than 0"),
        (PpoKeys, {"ppo_epochs": 0}, "greater than or equal to 1"),
        (PpoKeys, {"gae_lambda": 1.01}, "less than or equal to 1"),
        (VtraceKeys, {"clip_pg_rho": 0.0}, "greater than 0"),
        (IqlKeys, {"iql_expectile": 1.0}, "less than 1"),
        (IqlKeys, {"iql_target_rate": 0.0}, "greater than 0"),
    ],
)
def test_bad_values_are_refused(keys: type[Section], values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        keys.model_validate(values)


def test_value_clipping_goes_with_one_epoch_and_other_heads_with_their_coefficients() -> None:
    assert PpoKeys(ppo_value_clip=10.0).ppo_value_clip == 10.0
    keys = PpoKeys(entropy_floors={"wait": 0.1}, entropy_floor_coefficients={"wait": 0.2})
    assert keys.entropy_floors == {"wait": 0.1}


def test_the_groups_can_be_inherited_together() -> None:
    class Trainer(VtraceKeys, PpoKeys, IqlKeys):
        pass

    assert Trainer(ppo_clip=0.1, iql_beta=1.0).rho_bar == 1.0
    with pytest.raises(ValidationError, match="ppo_value_clip"):
        Trainer(ppo_value_clip=1.0, ppo_epochs=3)
