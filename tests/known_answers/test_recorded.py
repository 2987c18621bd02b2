"""IQL and BC learn from what others did: one seed of each claim; all five seeds are proven by `tests/prove`."""

from __future__ import annotations

import numpy as np
import pytest

from esper_simic.config_safety import SafetyKeys
from esper_simic.safety import Observed, Safety, StepInputs, StepOutcome, observe
from tests.known_answers.claims import COMMON, OFFLINE, Claim, holds, quick, tried
from tests.known_answers.harness import Array, Behaviour, Loop, configured

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("claim", quick(is_recorded=True), ids=lambda claim: claim.name)
def test_it_comes_close_to_the_best_from_what_was_recorded(claim: Claim) -> None:
    holds(claim, tried(claim, seed=0))


@pytest.mark.parametrize("algorithm", ["BC", "IQL"])
def test_a_likelihood_that_grows_without_bound_is_not_judged_a_loss(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A density's negative log-likelihood falls below zero, where the size of it grows with every success."""

    def stays(vector: Array, episode_start: Array) -> Array:
        return np.zeros((len(vector), 2), dtype=np.float32)

    config = configured("Target-v0", 0, {**COMMON, **OFFLINE, "algorithm": algorithm})
    loop = Loop(config, lambda spec, state_size: Behaviour(spec, stays, 0.0, state_size))
    weights = dict(loop.learner.policy.named_parameters())
    for name, value in (("heads.log_deviation", -4.0), ("heads.mean.weight", 0.0), ("heads.mean.bias", 0.0)):
        weights[name].data.fill_(value)
    seen: list[StepOutcome] = []

    def observed(safety: Safety, keys: SafetyKeys, outcome: StepOutcome, inputs: StepInputs) -> Observed:
        seen.append(outcome)
        return observe(safety, keys, outcome, inputs)

    monkeypatch.setattr("esper_simic.safety.observe", observed)
    loop.take_in()
    report = loop.learner.step(StepInputs(at_s=0.0))
    loop.close()
    assert report.metrics["policy_loss"] < -3.0
    assert seen[0].policy_loss == 0.0
