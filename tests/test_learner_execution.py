"""The learner's fold in every way of computing: the default is what it always was, and a loss scale is part of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from esper_simic.config import Config
from esper_simic.events import StepFailed
from esper_simic.execution import CPU, Execution
from esper_simic.learner import Learner
from esper_simic.loss_scale import LossScale
from esper_simic.replay import Held, Serials
from esper_simic.safety import StepInputs
from esper_simic.step_report import StepReport
from esper_simic.trajectory import Trajectory
from tests.policies.synthetic import SPEC
from tests.test_learner import LANES, admit, learn, make_config, make_unroll

PLAIN = Execution.choose("cpu", plain=True)
HALF = dataclasses.replace(CPU, autocast_dtype=torch.bfloat16)
SCALED = dataclasses.replace(CPU, has_loss_scale=True)
ORDER = tuple(range(8))

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NO GPU HERE, or SIMIC_TEST_GPU is not set: not tried"
)


def learner(execution: Execution = CPU, *assignments: str) -> Learner:
    return Learner(make_config(*assignments), SPEC, execution=execution)


def digests(reports: Sequence[StepReport]) -> list[str]:
    return [report.digest for report in reports]


def restored(of: Learner, config: Config, execution: Execution) -> Learner:
    """Another learner, from the state of one that has admitted `ORDER`."""
    twin = Learner(config, SPEC, execution=execution)
    state = of.state().copy()
    positions = state.addresses["buffer"]["positions"]
    twin.load_state(state, (Held(make_unroll(at // 10), 0, at) for at in positions))
    return twin


def test_nothing_is_said_of_a_scale_that_there_is_not() -> None:
    one, two = Learner(make_config(), SPEC), learner(CPU)
    assert digests(learn(one, ORDER)) == digests(learn(two, ORDER))
    assert one.state().digest == two.state().digest
    assert "loss_scale" not in one.state().numbers


@pytest.mark.parametrize("execution", [PLAIN, HALF, SCALED], ids=str)
def test_each_way_on_the_cpu_is_a_fold(execution: Execution) -> None:
    one, two = learner(execution), learner(execution)
    first, second = learn(one, ORDER), learn(two, ORDER)
    assert digests(first) == digests(second)
    assert one.state().digest == two.state().digest
    default = learn(learner(), ORDER)
    assert [report.metrics["total"] for report in first] == pytest.approx(
        [report.metrics["total"] for report in default], rel=0.05, abs=0.02
    )
    is_same = digests(first) == digests(default)
    assert is_same == (execution is SCALED), "a power of two rounds nothing, all else does"


def test_the_scale_is_in_the_state_and_comes_back() -> None:
    one = learner(SCALED)
    learn(one, ORDER)
    one.engine.optimisers.loss_scale = LossScale(scale=512.0, finite_steps=3)
    assert one.state().numbers["loss_scale"] == {"scale": 512.0, "finite_steps": 3}
    config = make_config()
    twin = restored(one, config, SCALED)
    assert twin.engine.optimisers.loss_scale == LossScale(scale=512.0, finite_steps=3)
    assert twin.state().digest == one.state().digest
    without = restored(one, config, CPU)
    assert without.engine.optimisers.loss_scale is None
    assert "loss_scale" not in without.state().numbers
    other = restored(without, config, SCALED)
    assert other.engine.optimisers.loss_scale == LossScale()


def test_an_update_that_failed_leaves_the_scale_as_its_record_does() -> None:
    """Two minibatches: the first overflows and halves the scale, the second fails for another reason."""
    keys = (
        *("simic_trainer.algorithm=PPO", "experience_buffer.replay_ratio=0"),
        *("simic_trainer.ppo_epochs=1", "simic_trainer.ppo_minibatches=2"),
    )
    living, folding = (learner(SCALED, *keys) for _ in range(2))
    for one in (living, folding):
        for number in range(4):
            admit(one, number)
        assert one.can_step()
    minimise, calls = living.engine.optimisers.minimise, 0

    def broken(loss: torch.Tensor, **more: object) -> float:
        nonlocal calls
        calls += 1
        if calls == 1:
            living.engine.optimisers.loss_scale = LossScale(scale=2.0**15)
            return 0.0
        raise FloatingPointError("loss nan, gradient norm nan")

    living.engine.optimisers.minimise = broken  # type: ignore[method-assign]
    inputs = StepInputs(at_s=1.0)
    report = living.step(inputs)
    living.engine.optimisers.minimise = minimise  # type: ignore[method-assign]
    assert (calls, report.failure) == (2, "not finite: loss nan, gradient norm nan")
    assert living.engine.optimisers.loss_scale == LossScale()
    event = StepFailed(
        step=report.step,
        environment_steps=report.environment_steps,
        digest=report.digest,
        state_digest=report.state_digest,
        reason=report.failure,
        out_of_memory=report.out_of_memory,
        inputs=inputs,
        facts=list(report.facts),
    )
    folding.fail(event)
    assert folding.state().digest == living.state().digest


def test_old_tasks_are_held_from_the_same_samples_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one batch is used the next one is on its way: another time of gathering, and the same batches."""
    one = learner(CPU, "experience_buffer.capacity=64")
    for number in range(6):
        admit(one, number)
    serials = one.buffer.draw(20, rng=np.random.default_rng(0))
    batches = list(one._few_at_a_time(serials))
    assert [batch.lanes for batch in batches] == [8, 8, 4]
    whole = one.buffer.gather(serials)
    rewards = torch.cat([batch.trajectory.rewards for batch in batches], dim=1)
    assert torch.equal(rewards, whole.rewards)
    order: list[str] = []
    gather = one.buffer.gather

    def watched(chosen: Serials) -> Trajectory:
        order.append("gathered")
        return gather(chosen)

    monkeypatch.setattr(one.buffer, "gather", watched)
    order.extend("used" for _ in one._few_at_a_time(serials))
    assert order == ["gathered", "gathered", "used", "gathered", "used", "used"]


def test_parts_change_rounding_alone() -> None:
    whole, parts = (learn(learner(CPU, *keys), ORDER) for keys in ((), (f"simic_trainer.{ACCUMULATION}=3",)))
    for one, other in zip(whole, parts, strict=True):
        assert other.metrics["grad_norm"] == pytest.approx(one.metrics["grad_norm"], rel=1e-3)
        assert other.metrics["total"] == pytest.approx(one.metrics["total"], rel=1e-3, abs=1e-4)
    assert LANES == 4


ACCUMULATION = "gradient_accumulation"


@needs_gpu
@pytest.mark.parametrize("plain", [True, False])
def test_on_a_gpu_a_run_is_near_that_on_the_cpu_and_its_state_is_the_cpus(plain: bool) -> None:
    execution = Execution.choose("cuda", plain=plain)
    execution.apply()
    near, far = learner(), learner(execution)
    one, other = learn(near, ORDER), learn(far, ORDER)
    assert [report.metrics["total"] for report in other] == pytest.approx(
        [report.metrics["total"] for report in one], rel=0.1, abs=0.05
    )
    assert {tensor.device.type for tensor in far.state().tensors.values()} == {"cpu"}
    twin = restored(far, make_config(), execution)
    assert twin.state().digest == far.state().digest
    assert twin.weights() == far.weights()
    assert learner(execution).weights() == learner().weights(), "the first weights are drawn, not computed"


@needs_gpu
def test_on_a_gpu_a_lack_of_memory_is_a_failed_update_and_the_next_one_is_made() -> None:
    far = learner(Execution.choose("cuda"))
    for number in range(6):
        admit(far, number)
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        report = far.step(StepInputs(at_s=1.0))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert report.out_of_memory
    assert not far.step(StepInputs(at_s=2.0)).failure
