"""Low-rank adapters in the learner: from their update on the weights are frozen, and actors need not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from esper_simic.algorithms.ewc import Consolidation
from esper_simic.config import Config
from esper_simic.errors import InvariantViolation
from esper_simic.events import AdaptersBegun
from esper_simic.growing_host.spaces import observation_spec_of
from esper_simic.learner import Learner
from esper_simic.policies.lora import merged_weights
from esper_simic.replay import Held
from esper_simic.safety import StepInputs
from esper_simic.step_report import StepReport
from supervisor import checkpoints
from supervisor.roles.evaluate import load_policy
from supervisor.roles.fold import checkpoint_files
from tests.policies.synthetic import SPEC, make_policy
from tests.test_learner import LANES, admit, make_config, make_unroll

START = 2
ADAPTED = (f"simic_trainer.lora_start_step={START}", "simic_trainer.lora_rank=4")


def learner_of(*assignments: str) -> Learner:
    return Learner(make_config(*ADAPTED, *assignments), SPEC)


def learn(learner: Learner, numbers: range) -> list[StepReport]:
    """Admit unrolls and make every update that can be made, each at its own time."""
    reports = []
    for number in numbers:
        admit(learner, number)
        while learner.can_step():
            reports.append(learner.step(StepInputs(at_s=float(learner.steps_done))))
    return reports


def copied(learner: Learner) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in learner.engine.tensors().items()}


def base(learner: Learner) -> dict[str, Tensor]:
    assert learner.engine.adapters is not None
    found = learner.engine.adapters.base_state_dict()
    return {name: tensor.clone() for name, tensor in found.items() if not name.startswith("normaliser")}


def acts(policy: Any) -> list[Tensor]:
    """What a policy does with an unroll's first row, and says of it."""
    unroll = make_unroll(50)
    row = {key: tensor[0] for key, tensor in unroll.observations.items()}
    uniforms = torch.from_numpy(np.random.default_rng(0).random((LANES, policy.chance)))
    return list(policy.act(row, unroll.episode_start[0], unroll.initial_state, uniforms))


def held_by(learner: Learner) -> Consolidation | None:
    return learner.engine.consolidation


def test_adapters_begin_with_their_update_and_freeze_the_weights_bit_for_bit() -> None:
    learner = learner_of()
    reports = learn(learner, range(8))
    assert learner.steps_done == len(reports) > START
    begun = [
        (report.step, fact) for report in reports for fact in report.facts if isinstance(fact, AdaptersBegun)
    ]
    assert learner.engine.adapters is not None
    matrices = len(learner.engine.adapters.names)
    assert begun == [(START, AdaptersBegun(rank=4, alpha=32.0, matrices=matrices))]
    assert matrices > 5
    frozen, adapters = base(learner), copied(learner)
    learn(learner, range(8, 12))
    for name, weight in base(learner).items():
        assert torch.equal(weight, frozen[name]), name
    moved = [name for name, held in copied(learner).items() if held != adapters[name]]
    assert any(name.endswith(".0.b") for name in moved)
    assert any(name.endswith(".0.a") for name in moved)
    assert not any("original" in name for name in moved if name.startswith("policy."))


def test_until_then_the_training_is_the_same_as_without() -> None:
    plain, adapted = Learner(make_config(), SPEC), learner_of()
    one, two = learn(plain, range(8)), learn(adapted, range(8))
    assert [report.digest for report in one[: START - 1]] == [report.digest for report in two[: START - 1]]
    assert one[START - 1].metrics == two[START - 1].metrics
    assert one[START].digest != two[START].digest


def test_adapters_begin_even_where_their_update_was_given_up() -> None:
    learner = learner_of()
    for number in range(9):
        admit(learner, number)
    while learner.steps_done < START - 1:
        learner.step(StepInputs(at_s=float(learner.steps_done)))
    learner.skip()
    assert learner.steps_done == START
    assert learner.engine.adapters is None
    report = learner.step(StepInputs(at_s=9.0))
    assert [type(fact) for fact in report.facts if isinstance(fact, AdaptersBegun)] == [AdaptersBegun]
    assert learner.engine.adapters is not None


def test_with_step_0_all_of_the_training_is_the_adapters() -> None:
    learner = learner_of("simic_trainer.lora_start_step=0")
    frozen = base(learner)
    reports = learn(learner, range(5))
    told = [(r.step, fact) for r in reports for fact in r.facts if isinstance(fact, AdaptersBegun)]
    assert learner.engine.adapters is not None
    begun = AdaptersBegun(rank=4, alpha=32.0, matrices=len(learner.engine.adapters.names))
    assert told == [(1, begun)], "there is no update before the first"
    assert all(torch.equal(weight, frozen[name]) for name, weight in base(learner).items())


def test_actors_get_plain_weights_that_act_as_the_adapted_policy_without_dropout() -> None:
    learner = learner_of("simic_trainer.lora_dropout=0.5")
    learn(learner, range(8))
    admit(learner, 8)
    weights = safetensors.torch.load(learner.weights())
    plain = make_policy(99, learner._config.simic_trainer)
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    adapters = learner.engine.adapters
    assert adapters is not None
    original = adapters.base_state_dict()
    assert any(not torch.equal(weights[name], original[name]) for name in adapters.names), "they have learned"
    of_the_version = {name: tensor for name, tensor in weights.items() if name.startswith("normaliser")}
    cast(nn.Module, learner.policy).load_state_dict(of_the_version, strict=False)
    for found, expected in zip(acts(plain), acts(learner.policy), strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
    assert [tensor.tolist() for tensor in acts(learner.policy)] == [
        tensor.tolist() for tensor in acts(learner.policy)
    ], "outside of updates nothing is dropped"
    merged = merged_weights(dict(learner.policy.state_dict()), rank=4, alpha=32.0)
    assert all(torch.equal(merged[name], weights[name]) for name in adapters.names)


def test_another_learner_becomes_the_same_and_goes_on_alike() -> None:
    one, two = learner_of(), learner_of()
    learn(one, range(8))
    state = one.state().copy()
    held = [Held(make_unroll(p // 10), 0, p) for p in one.buffer.addresses()["positions"]]
    two.load_state(state, held)
    assert two.engine.adapters is not None
    assert two.state().digest == one.state().digest
    reports = [[(r.digest, r.state_digest) for r in learn(each, range(8, 12))] for each in (one, two)]
    assert reports[0] == reports[1]
    assert len(reports[0]) > 1
    assert two.state().digest == one.state().digest
    assert base(two).keys() == base(one).keys()
    assert not [
        p for n, p in two.policy.named_parameters() if p.requires_grad and not n.endswith((".0.a", ".0.b"))
    ]


def test_the_last_good_state_is_one_with_adapters() -> None:
    learner = learner_of()
    learn(learner, range(4))
    while learner.engine.adapters is None:
        learn(learner, range(20, 21))
    frozen = base(learner)
    good = {name: held for name, held in copied(learner).items() if name.startswith("good.")}
    assert any(name.endswith(".0.b") for name in good)
    learn(learner, range(30, 34))
    learner.engine.restore_good()
    now = copied(learner)
    for name, held in good.items():
        assert now[name.removeprefix("good.")] == held, name
    assert all(torch.equal(weight, frozen[name]) for name, weight in base(learner).items())
    assert learn(learner, range(40, 42)), "and it learns on"


def test_merging_takes_a_policy_with_adapters_out_of_training() -> None:
    learner = learner_of()
    reports = learn(learner, range(6))
    adapters = learner.engine.adapters
    assert adapters is not None
    assert reports
    adapters.merge()
    with pytest.raises(InvariantViolation, match="merged adapters do not learn"):
        learn(learner, range(6, 8))


def test_old_tasks_held_before_are_let_go_and_those_after_are_held_in_the_adapters() -> None:
    learner = learner_of("simic_trainer.ewc_lambda=1.0")
    for number in range(3):
        admit(learner, number)
    learner.engine.consolidate(learner._few_at_a_time(np.arange(4)), np.random.default_rng(0))
    assert held_by(learner) is not None
    learn(learner, range(3, 7))
    assert learner.engine.adapters is not None
    assert held_by(learner) is None, "the weights that it held are frozen"
    learner.engine.consolidate(learner._few_at_a_time(np.arange(4)), np.random.default_rng(0))
    held = held_by(learner)
    assert held is not None
    assert {name.rpartition(".")[2] for name in held.anchors} == {"a", "b"}
    assert all(report.metrics["ewc_penalty"] >= 0 for report in learn(learner, range(7, 10)))


def test_a_checkpoint_with_adapters_is_measured_as_the_policy_that_acts(tmp_path: Path) -> None:
    config: Config = make_config(*ADAPTED)
    learner = Learner(config, observation_spec_of(config.environment))
    learner.engine.begin_adapters()
    adapters = learner.engine.adapters
    assert adapters is not None
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.from_numpy(rng.normal(size=parameter.shape) * 0.1).to(parameter))
    state = learner.state().copy()
    manifest = {
        "run_id": "run-1",
        "step": 3,
        "environment_steps": 0,
        "journal_position": 1,
        "state_digest": state.digest,
        "fingerprint": {},
        "score": None,
    }
    directory = checkpoints.save(tmp_path, checkpoint_files(state), manifest)
    loaded = load_policy(config, directory).state_dict()
    expected = learner.engine.acting_weights()
    assert loaded.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(loaded[name], weight), name
