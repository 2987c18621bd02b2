"""What a learner makes of experience that another made, and of weights that were made elsewhere."""

from __future__ import annotations

import json

import msgspec
import pytest
import safetensors.torch
import torch
from torch import Tensor

from esper_simic.events import EpisodeFinished
from esper_simic.learner import Learner
from esper_simic.learner_state import digest
from esper_simic.ledger import EPISODE_WINDOW
from esper_simic.safety import StepInputs
from tests.policies.synthetic import SPEC, make_policy
from tests.test_learner import make_config, make_event, make_unroll


def episode(number: int, episode_return: float) -> EpisodeFinished:
    return EpisodeFinished(
        lane=0, number=number, episode_return=episode_return, length=5, truncated=False, cut=False
    )


def admitted(behaviour: str, *assignments: str, steps: bool = True) -> Learner:
    learner = Learner(make_config(*assignments), SPEC)
    for number in range(6):
        event = make_event(number, episodes=[episode(number, float(number))])
        learner.admit(10 * number, msgspec.structs.replace(event, behaviour=behaviour), make_unroll(number))
        while steps and learner.can_step():
            learner.step(StepInputs(at_s=float(learner.steps_done)))
    return learner


def test_what_another_achieves_is_no_result_of_this_training() -> None:
    own, others = admitted("policy"), admitted("recorded")
    assert own.score == 2.5
    assert others.score is None, "no checkpoint is the best for what another did"
    assert own.safety.improvement.episodes > 0
    assert others.safety.improvement.episodes == 0, "no objective is reached by it"
    learner = admitted("recorded", steps=False)
    metrics = learner.step(StepInputs(at_s=0.0)).metrics
    assert metrics["behaviour_return"] == 2.5
    assert "episodic_return" not in metrics
    assert "behaviour_return" not in admitted("policy", steps=False).step(StepInputs(at_s=0.0)).metrics


def test_they_learn_the_same_from_the_same_steps() -> None:
    own, others = admitted("policy"), admitted("patient")
    assert own.steps_done == others.steps_done > 0
    assert digest(dict(own.policy.named_parameters())) == digest(dict(others.policy.named_parameters()))
    assert own.environment_steps == others.environment_steps


def test_what_others_did_is_in_the_state_and_nothing_is_where_nobody_else_acted() -> None:
    ledger = admitted("recorded").ledger
    numbers = json.loads(json.dumps(ledger.numbers()))
    again = Learner(make_config(), SPEC).ledger
    again.load(numbers, ledger.addresses())
    assert again.others_episodes == ledger.others_episodes
    assert [one.number for one in again.others_episodes] == list(range(6))
    assert again.others_episodes.maxlen == EPISODE_WINDOW
    assert "others_episodes" not in admitted("policy").ledger.numbers()


# -- weights from elsewhere --------------------------------------------------------------------------------------------


def elsewhere(seed: int = 5) -> dict[str, Tensor]:
    """Weights of another policy of this shape, with a normaliser that has seen something."""
    other = admitted("policy", f"simic_trainer.seed={seed}")
    return {name: tensor.clone() for name, tensor in other.policy.state_dict().items()}


def is_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def published(learner: Learner) -> dict[str, Tensor]:
    return safetensors.torch.load(learner.weights())


def test_a_learner_begins_with_weights_that_it_is_given() -> None:
    weights = elsewhere()
    learner = Learner(make_config(), SPEC)
    assert not is_equal(published(learner), weights)
    said = learner.begin_with(safetensors.torch.save(weights))
    assert is_equal(published(learner), weights), "the normaliser came with them"
    assert said == digest(dict(learner.policy.named_parameters()))
    assert learner.steps_done == learner.environment_steps == 0


def test_a_failed_update_goes_back_to_them_and_not_to_fresh_weights() -> None:
    weights = elsewhere()
    learner = Learner(make_config(), SPEC)
    learner.begin_with(safetensors.torch.save(weights))
    with torch.no_grad():
        for parameter in learner.policy.parameters():
            parameter.fill_(torch.nan)
    learner.engine.restore_good()
    found = dict(learner.policy.state_dict())
    assert is_equal({name: found[name] for name in weights}, weights)


def test_the_state_holds_them() -> None:
    one, other = Learner(make_config(), SPEC), Learner(make_config(), SPEC)
    one.begin_with(safetensors.torch.save(elsewhere()))
    other.load_state(one.state().copy(), [])
    assert other.state().digest == one.state().digest
    assert is_equal(published(other), published(one))


def test_adapters_begin_on_them() -> None:
    config = make_config("simic_trainer.lora_start_step=0", "simic_trainer.lora_rank=4")
    learner = Learner(config, SPEC)
    adapters = learner.engine.adapters
    assert adapters is not None
    before = [parameter.detach().clone() for parameter in adapters.parameters()]
    weights = elsewhere()
    learner.begin_with(safetensors.torch.save(weights))
    assert is_equal(adapters.base_state_dict(), weights)
    assert all(map(torch.equal, adapters.parameters(), before))
    assert is_equal(published(learner), weights), "adapters that have learned nothing change nothing"
    learning = {name for name, parameter in learner.policy.named_parameters() if parameter.requires_grad}
    assert learning
    assert all(name.endswith((".a", ".b")) for name in learning), "the base is frozen as before"


@pytest.mark.parametrize("change", ["missing", "other shape"])
def test_another_networks_weights_are_an_error(change: str) -> None:
    weights = dict(make_policy(3).state_dict())
    name = next(iter(weights))
    if change == "missing":
        del weights[name]
    else:
        weights[name] = torch.zeros([*weights[name].shape, 2])
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        Learner(make_config(), SPEC).begin_with(safetensors.torch.save(weights))
