"""The keys of safety: defaults of the requirements, ranges, and what is refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from esper_simic.config_safety import TRIGGER_NAMES, SafetyKeys


def test_the_defaults_are_the_requirements():
    keys = SafetyKeys()
    assert keys.circuit_breaker_failure_threshold == 3
    assert keys.circuit_breaker_recovery_timeout_s == 30
    assert keys.training_breaker_failure_threshold == 5
    assert keys.training_breaker_recovery_timeout_s == 60
    assert keys.conservative_mode_triggers == TRIGGER_NAMES
    assert set(TRIGGER_NAMES) == {
        "high_error_rate",
        "memory_pressure",
        "circuit_breaker_open",
        "slo_violation",
        "training_instability",
    }
    assert keys.conservative_batch_size_factor == 0.5
    assert keys.conservative_timeout_factor == 1.5
    assert keys.conservative_lr_factor == 0.5
    assert keys.max_validation_loss == 0.5
    assert keys.memory_pressure_fraction == 0.9
    assert keys.unstable_grad_norm == 10
    assert keys.exploding_grad_norm == 100
    assert keys.divergence_epochs == 10
    assert keys.target_throughput_exp_sec == 180
    assert keys.convergence_time_hours == 48
    assert keys.epoch_boundary_budget_ms == 18
    assert keys.training_step_budget_ms == 500
    assert keys.training_timeout_hours == 24


def test_every_key_says_what_it_is():
    assert all((field.description or "").endswith(".") for field in SafetyKeys.model_fields.values())


@pytest.mark.parametrize(
    "values",
    [
        {"circuit_breaker_failure_threshold": 0},
        {"circuit_breaker_recovery_timeout_s": 0},
        {"conservative_batch_size_factor": 0},
        {"conservative_batch_size_factor": 1.1},
        {"conservative_timeout_factor": 0.9},
        {"conservative_lr_factor": 0},
        {"conservative_leave_factor": 1.0},
        {"memory_pressure_fraction": 1.0},
        {"max_validation_loss": 0},
        {"clip_tighten_factor": 1.0},
        {"divergence_lr_factor": 1.0},
        {"halt_after_openings": 1},
        {"training_timeout_hours": 0},
        {"training_step_budget_ms": True},
        {"target_throughput": 180},
    ],
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ValidationError):
        SafetyKeys.model_validate(values)


def test_triggers_may_be_fewer_or_none():
    assert SafetyKeys(conservative_mode_triggers=()).conservative_mode_triggers == ()
    only = SafetyKeys.model_validate({"conservative_mode_triggers": ["memory_pressure"]})
    assert only.conservative_mode_triggers == ("memory_pressure",)


def test_an_unknown_trigger_is_refused_with_the_nearest_known_one():
    with pytest.raises(ValidationError, match="did you mean 'memory_pressure'"):
        SafetyKeys(conservative_mode_triggers=("memory_presure",))


def test_a_trigger_named_twice_is_refused():
    with pytest.raises(ValidationError, match="once"):
        SafetyKeys(conservative_mode_triggers=("slo_violation", "slo_violation"))


def test_an_explosion_is_an_instability():
    with pytest.raises(ValidationError, match="at least unstable_grad_norm"):
        SafetyKeys(exploding_grad_norm=5)
