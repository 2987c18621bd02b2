"""Keys of networks and adapters: defaults, ranges, and what contradicts itself."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from esper_simic.config import TrainerConfig
from esper_simic.config_memory import LoraKeys
from esper_simic.config_networks import NetworkKeys


def test_a_default_run_has_no_adapters_although_their_rank_is_the_requirements() -> None:
    keys = LoraKeys()
    assert (keys.lora_rank, keys.lora_alpha, keys.lora_dropout) == (16, 32.0, 0.1)
    assert not keys.lora_enabled


def test_adapters_follow_from_rank_and_start() -> None:
    assert LoraKeys(lora_start_step=0).lora_enabled
    assert not LoraKeys(lora_rank=0).lora_enabled
    with pytest.raises(ValidationError, match="lora_rank 0 rules them out"):
        LoraKeys(lora_rank=0, lora_start_step=5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lora_rank": -1},
        {"lora_alpha": 0.0},
        {"lora_dropout": 1.0},
        {"lora_start_step": -1},
        {"lora_enabled": True},
    ],
)
def test_adapter_keys_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LoraKeys(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"network": "transformer"},
        {"hidden_size": 4},
        {"hidden_layers": 0},
        {"activation": "gelu"},
        {"layers": 2},
    ],
)
def test_network_keys_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        NetworkKeys(**wrong)


def test_widths_are_those_a_trainer_has_by_default() -> None:
    keys, trainer = NetworkKeys(), TrainerConfig()
    assert (keys.hidden_size, keys.graph_layers) == (trainer.hidden_size, trainer.graph_layers)
