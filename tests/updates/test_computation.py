"""Parts of a batch sum up to the whole, precision ends before the loss, and a compiler may fail without harm."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from esper_simic.breaker import VtraceRatios
from esper_simic.execution import CPU, Execution
from esper_simic.loss_scale import LossScale
from esper_simic.policies.policy import Evaluation
from esper_simic.reward_scale import RewardScale
from esper_simic.safety import StepMode
from esper_simic.telemetry import NullObserver
from esper_simic.trajectory import Trajectory
from esper_simic.updates import impala as impala_module
from esper_simic.updates import ppo as ppo_module
from esper_simic.updates.batch import Batch, prepare
from esper_simic.updates.computation import Computation
from esper_simic.updates.engine import Engine
from esper_simic.updates.optimisers import Optimisers
from esper_simic.updates.update import Terms, Updated
from tests.updates.ground import LANES, SPECS, copied, trainer, unroll, weights

HALF = dataclasses.replace(CPU, autocast_dtype=torch.bfloat16)
COMPILED = dataclasses.replace(CPU, is_compiled=True)
SCALED = dataclasses.replace(CPU, has_loss_scale=True)

KINDS = [
    ("IMPALA", "graph", {}),
    ("IMPALA", "many", {"network": "lstm"}),
    ("PPO", "flat", {"ppo_epochs": 1, "ppo_minibatches": 1, "entropy_floors": {"op": 0.9}}),
    ("PPO", "one", {"ppo_epochs": 2, "ppo_minibatches": 2}),
    ("APPO", "numbers", {}),
    ("BC", "masked", {}),
    ("IQL", "many", {"iql_cql_alpha": 0.5}),
]


class Gradients(NullObserver):
    """Copies of all gradients as the optimisers find them, update by update."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[dict[int, Tensor]] = []
        parameters = engine.optimisers._parameters
        clip = nn.utils.clip_grad_norm_

        def clipped(these: list[nn.Parameter], max_norm: float) -> Tensor:
            if these is parameters:
                self.found.append({i: p.grad.clone() for i, p in enumerate(these) if p.grad is not None})
            return clip(these, max_norm)

        monkeypatch.setattr(nn.utils, "clip_grad_norm_", clipped)


def in_double(trajectory: Trajectory) -> Trajectory:
    return Trajectory.from_tensors(
        {name: t.double() if t.is_floating_point() else t for name, t in trajectory.tensors().items()}
    )


def doubled(batch: Batch) -> Batch:
    parts = (batch.rewards, batch.discounts, batch.policy_weights, batch.value_weights)
    return Batch(in_double(batch.trajectory), *(part.double() for part in parts))


def update(engine: Engine, trajectory: Trajectory, *, double: bool = False, chance: int = 0) -> Updated:
    batch = prepare(trajectory, engine.policy, RewardScale(0.99), engine._trainer)
    return engine.update(
        doubled(batch) if double else batch,
        StepMode(),
        entropy_coefficient=0.01,
        progress=0.0,
        rng=np.random.default_rng(chance),
    )


@pytest.mark.parametrize(("algorithm", "spec", "settings"), KINDS)
@pytest.mark.parametrize("parts", [2, 4, 100])
def test_gradients_of_parts_sum_up_to_that_of_the_whole(
    algorithm: str, spec: str, settings: dict, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, so that what is left is rounding; 4 parts of 6 lanes are not equal, and 100 are as many as lanes."""
    found, metrics = [], []
    for count in (1, parts):
        keys = trainer(algorithm, gradient_accumulation=count, value_coefficient=0.7, **settings)
        engine = Engine(keys, SPECS[spec])
        trajectory = unroll(engine.policy, 3)
        engine.policy.double()
        if engine._iql is not None:
            engine._iql.critics.double()
            engine._iql.slow.double()
        engine.optimisers = engine._optimisers(None)
        gradients = Gradients(engine, monkeypatch)
        metrics.append(update(engine, trajectory, double=True).metrics)
        found.append(gradients.found)
    whole, summed = found
    assert len(whole) == len(summed) >= 1
    for one, other in zip(whole, summed, strict=True):
        assert one.keys() == other.keys()
        assert any(float(gradient.abs().max()) > 1e-6 for gradient in one.values())
        for index in one:
            assert torch.allclose(one[index], other[index], rtol=1e-9, atol=1e-12)
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-9, abs=1e-12)


def test_one_part_at_a_time_has_a_gradient_and_each_goes_forward_twice() -> None:
    engine = Engine(trainer(), SPECS["one"])
    trajectory = unroll(engine.policy)
    batch = prepare(trajectory, engine.policy, RewardScale(0.99), engine._trainer)
    seen: list[tuple[int, bool]] = []

    def run(part: Batch) -> Evaluation:
        seen.append((part.lanes, torch.is_grad_enabled()))
        return part.evaluate(engine.policy)._replace(state=part.rewards)

    found = Computation(CPU, 4).forward(run, batch)
    assert seen == [(2, False), (2, False), (1, False), (1, False)]
    whole = batch.evaluate(engine.policy)
    assert torch.allclose(found.log_probs, whole.log_probs, atol=1e-6)
    assert torch.equal(found.heads.relevance["action"], whole.heads.relevance["action"])
    assert not found.heads.relevance["action"].requires_grad
    found.values.sum().backward()
    assert seen[4:] == [(2, True), (2, True), (1, True), (1, True)]
    seen.clear()
    with torch.no_grad():
        Computation(CPU, 4).forward(run, batch)
    assert seen == [(LANES, False)], "without a gradient there is nothing to save"


def test_in_parts_the_recurrent_state_comes_back_too() -> None:
    engine = Engine(trainer(network="lstm"), SPECS["one"])
    batch = prepare(unroll(engine.policy), engine.policy, RewardScale(0.99), engine._trainer)
    parted, whole = Computation(CPU, 3).evaluate(batch, engine.policy), batch.evaluate(engine.policy)
    assert parted.state.shape == whole.state.shape
    assert torch.allclose(parted.state, whole.state, atol=1e-6)


@pytest.mark.parametrize(("algorithm", "spec", "settings"), KINDS)
def test_what_is_computed_in_half_precision_is_judged_in_whole_precision(
    algorithm: str, spec: str, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = [Engine(trainer(algorithm, **settings), SPECS[spec], way) for way in (CPU, HALF)]
    trajectory = unroll(engines[0].policy)
    seen: set[torch.dtype] = set()
    evaluate = type(engines[1].policy).evaluate

    def watched(self, *args):
        assert torch.is_autocast_enabled("cpu")
        found = evaluate(self, *args)
        seen.add(found.values.dtype)
        return found

    plain = update(engines[0], trajectory)
    monkeypatch.setattr(type(engines[1].policy), "evaluate", watched)
    half = update(engines[1], trajectory)
    assert torch.bfloat16 in seen, "the products of matrices were made in bfloat16"
    assert half.loss != plain.loss
    assert half.loss == pytest.approx(plain.loss, rel=0.05, abs=0.05)
    batch = prepare(trajectory, engines[1].policy, RewardScale(0.99), engines[1]._trainer)
    found = engines[1].computation.evaluate(batch, engines[1].policy)
    assert {found.log_probs.dtype, found.entropy.dtype, found.values.dtype} == {torch.float32}
    assert {tensor.dtype for tensor in engines[1].acting_weights().values()} <= {torch.float32, torch.float64}
    assert {w.dtype for w in engines[1].policy.parameters()} == {torch.float32}


def test_parts_are_computed_in_half_precision_too() -> None:
    engine = Engine(trainer(gradient_accumulation=3), SPECS["one"], HALF)
    whole = Engine(trainer(), SPECS["one"], HALF)
    trajectory = unroll(engine.policy)
    assert update(engine, trajectory).grad_norm == pytest.approx(
        update(whole, trajectory).grad_norm, rel=0.02
    )


# -- the scale of a loss -----------------------------------------------------------------------------------------------


class Overflowing:
    """Weights' gradients become infinite as often as it was told, at the scale that there is then."""

    def __init__(self, engine: Engine, times: int) -> None:
        self.left = times
        self.scales: list[float | None] = []
        self.engine = engine
        next(engine.policy.parameters()).register_hook(self.pass_through)

    def pass_through(self, gradient: Tensor) -> Tensor:
        scale = self.engine.optimisers.loss_scale
        self.scales.append(None if scale is None else scale.scale)
        self.left -= 1
        return gradient * float("inf") if self.left >= 0 else gradient


def test_a_scaled_loss_moves_the_weights_as_the_plain_one() -> None:
    plain, scaled = (Engine(trainer(), SPECS["one"], way) for way in (CPU, SCALED))
    trajectory = unroll(plain.policy)
    first, second = update(plain, trajectory), update(scaled, trajectory)
    assert copied(weights(plain)) == copied(weights(scaled)), "a power of two rounds nothing"
    assert first.grad_norm == second.grad_norm
    assert second.metrics == first.metrics | {"loss_scale": 2.0**16, "loss_scale_overflows": 0.0}
    assert scaled.optimisers.loss_scale == LossScale(finite_steps=1)


def test_after_an_overflow_the_scale_falls_and_nothing_has_moved() -> None:
    engine = Engine(trainer(), SPECS["one"], SCALED)
    trajectory = unroll(engine.policy)
    overflowing = Overflowing(engine, 1)
    before, rates = copied(weights(engine)), engine.optimisers.rates.state_dict()
    updated = update(engine, trajectory)
    assert copied(weights(engine)) == before
    assert engine.optimisers.rates.state_dict() == rates
    assert (updated.grad_norm, updated.metrics["loss_scale"]) == (0.0, 2.0**15)
    assert updated.metrics["loss_scale_overflows"] == 1.0
    updated = update(engine, trajectory)
    assert copied(weights(engine)) != before
    assert (updated.metrics["loss_scale"], updated.metrics["loss_scale_overflows"]) == (2.0**15, 0.0)
    assert overflowing.scales == [2.0**16, 2.0**15]


def test_where_the_scale_is_not_to_blame_it_is_a_failure() -> None:
    engine = Engine(trainer(), SPECS["one"], SCALED)
    trajectory = unroll(engine.policy)
    engine.optimisers.loss_scale = LossScale(scale=1.0)
    Overflowing(engine, 1)
    with pytest.raises(FloatingPointError, match="gradient norm"):
        update(engine, trajectory)
    optimisers = Optimisers(engine._groups(), {}, LossScale())
    with pytest.raises(FloatingPointError, match="loss nan"):
        optimisers.minimise(next(engine.policy.parameters()).sum() * float("nan"), max_norm=1.0)
    assert optimisers.loss_scale == LossScale(), "a loss that is none says nothing of its scale"


def test_adapters_go_on_with_the_scale_and_the_way() -> None:
    engine = Engine(trainer(lora_rank=2), SPECS["one"], dataclasses.replace(SCALED, is_adam_fused=False))
    engine.optimisers.loss_scale = LossScale(scale=4.0)
    engine.begin_adapters()
    assert engine.optimisers.loss_scale == LossScale(scale=4.0)
    assert {o.defaults["fused"] for o in engine.optimisers._by_name.values()} == {False}


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything of the compiler but the making of code: traced, differentiated, run as it is."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


# The compiler looks at gradients of tensors that are none of the leaves, and torch warns of it.
looks_at_gradients = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@looks_at_gradients
@pytest.mark.slow
@pytest.mark.usefixtures("_traced")
@pytest.mark.parametrize(
    ("algorithm", "spec", "settings"), [KINDS[1], KINDS[3], KINDS[6]], ids=["IMPALA", "PPO", "IQL"]
)
def test_a_compiled_update_is_the_update(algorithm: str, spec: str, settings: dict) -> None:
    parts = 2 if algorithm == "IMPALA" else 1
    keys = trainer(algorithm, gradient_accumulation=parts, **settings)
    plain, compiled = (Engine(keys, SPECS[spec], way) for way in (CPU, COMPILED))
    trajectory = unroll(plain.policy)
    for chance in range(2):
        one, other = (update(engine, trajectory, chance=chance) for engine in (plain, compiled))
        assert other.loss == pytest.approx(one.loss, rel=1e-4, abs=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4, abs=1e-5)
    assert compiled.computation.notes == []
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@looks_at_gradients
@pytest.mark.usefixtures("_traced")
def test_evaluation_and_loss_of_vectors_are_one_graph_each_however_the_entropy_is_weighed() -> None:
    torch._dynamo.utils.counters.clear()
    engine = Engine(trainer(), SPECS["many"], COMPILED)
    batch = prepare(unroll(engine.policy), engine.policy, RewardScale(0.99), engine._trainer)
    for number in range(12):
        engine.update(
            batch,
            StepMode(),
            entropy_coefficient=0.05 - 0.003 * number,
            progress=0.0,
            rng=np.random.default_rng(0),
        )
    counters = torch._dynamo.utils.counters
    assert dict(counters["graph_break"]) == {}
    # A first weight is a constant; every other one is a number that comes in.
    assert counters["stats"]["unique_graphs"] <= 3


@looks_at_gradients
@pytest.mark.usefixtures("_traced")
def test_a_copy_computes_with_its_own_weights() -> None:
    engine = Engine(trainer(), SPECS["one"], COMPILED)
    trajectory = unroll(engine.policy)
    update(engine, trajectory)
    twin = copy.deepcopy(engine)
    before = copied(weights(engine))
    with torch.no_grad():
        for weight in twin.policy.parameters():
            weight.mul_(2.0)
    there = prepare(trajectory, twin.policy, RewardScale(0.99), twin._trainer)
    found = twin.computation.evaluate(there, twin.policy)
    assert torch.allclose(found.values, there.evaluate(twin.policy).values, atol=1e-6)
    update(twin, trajectory)
    assert copied(weights(engine)) == before


@looks_at_gradients
@pytest.mark.usefixtures("_traced")
def test_who_waits_is_told_that_a_policy_with_adapters_is_compiled_anew() -> None:
    """It takes minutes, of which a learner that said nothing would be killed."""
    engine = Engine(trainer(lora_start_step=1, lora_rank=2), SPECS["one"], COMPILED)
    told: list[int] = []
    engine.computation.compiling = lambda: told.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    trajectory = unroll(engine.policy)
    torch._dynamo.utils.counters.clear()
    update(engine, trajectory)
    update(engine, trajectory)
    assert told == [0, 1], "before the evaluation, and before the loss"
    engine.adapters_at(1)
    for _ in range(2):
        update(engine, trajectory)
    assert told == [0, 1, 2], "the loss is the same as ever"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


def test_without_a_compiler_it_is_said_once_of_each_and_the_bits_are_the_plain_ones() -> None:
    torch._dynamo.reset()
    plain, compiled = (Engine(trainer(), SPECS["one"], way) for way in (CPU, COMPILED))
    trajectory = unroll(plain.policy)
    with inductor_config.patch({"cpp.cxx": (None, "/nonexistent/c++"), "fx_graph_cache": False}):
        for _ in range(2):
            update(plain, trajectory)
            update(compiled, trajectory)
    evaluation, loss = compiled.computation.notes
    assert evaluation.startswith("the policy's evaluation cannot be compiled and is run as it is: ")
    assert loss.startswith("the loss cannot be compiled and is run as it is: ")
    assert copied(weights(compiled)) == copied(weights(plain))
    torch._dynamo.reset()


# -- the device --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["IMPALA", "IQL"])
def test_what_leaves_the_engine_is_for_the_cpu(algorithm: str) -> None:
    engine = Engine(trainer(algorithm), SPECS["one"])
    update(engine, unroll(engine.policy))
    engine.keep_good()
    named = engine.tensors() | engine.acting_weights()
    assert {tensor.device.type for tensor in named.values()} == {"cpu"}


class _Reached(Exception):
    """The loss was. The way back needs a real device."""


class _ToTheLoss(Computation):
    def loss(self, function, *args, **kwargs):
        found = function(*args, **kwargs)
        assert found.total.device.type == "cuda"
        assert found.total.requires_grad
        raise _Reached


def on_a_fake_gpu(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                there = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                part._parameters[name] = nn.Parameter(there, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")


@pytest.mark.parametrize(("algorithm", "spec", "settings"), KINDS)
@pytest.mark.parametrize("parts", [1, 2])
def test_nothing_of_an_update_is_on_two_devices(
    algorithm: str, spec: str, settings: dict, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without contents know their device, and an operation on two devices is an error."""
    if spec == "graph" and parts > 1:
        pytest.skip("the edges of a graph are counted by contents, twice: which are none")
    keys = trainer(algorithm, **settings)
    engine = Engine(keys, SPECS[spec])
    trajectory = unroll(engine.policy)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # nothing looks at contents
    for module in (impala_module, ppo_module):
        monkeypatch.setattr(
            module, "ratios_of", lambda *_: VtraceRatios(finite=True, log_ratio_max=0.0, mean_ratio=1.0)
        )
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False):
        modules: list[nn.Module] = [engine.policy]
        if engine._iql is not None:
            modules += [engine._iql.critics, engine._iql.slow]
        for network in modules:
            on_a_fake_gpu(network)
        there = Trajectory.from_tensors(
            {
                name: torch.empty(t.shape, dtype=t.dtype, device="cuda")
                for name, t in trajectory.tensors().items()
            }
        )
        batch = prepare(there, engine.policy, RewardScale(0.99), keys)
        terms = Terms(
            trainer=keys,
            policy=engine.policy,
            optimisers=engine.optimisers,
            mode=StepMode(),
            entropy_coefficient=0.01,
            progress=0.0,
            rng=np.random.default_rng(0),
            computation=_ToTheLoss(CPU, parts),
        )
        with pytest.raises(_Reached):
            engine._update(batch, terms)


# -- what only a GPU can show ------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NO GPU HERE, or SIMIC_TEST_GPU is not set: not tried"
)


@needs_gpu
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("algorithm", "spec", "settings"), KINDS)
def test_on_a_gpu_an_update_is_near_that_of_the_cpu(
    algorithm: str, spec: str, settings: dict, parts: int, plain: bool
) -> None:
    execution = Execution.choose("cuda", plain=plain)
    execution.apply()
    keys = trainer(algorithm, gradient_accumulation=parts, **settings)
    near, far = Engine(keys, SPECS[spec]), Engine(keys, SPECS[spec], execution)
    trajectory = unroll(near.policy)
    sent = Trajectory.from_tensors(execution.to_device(trajectory.tensors()))
    for _ in range(3):
        one, other = update(near, trajectory), update(far, sent)
        assert other.loss == pytest.approx(one.loss, rel=0.1, abs=0.05)
    named = far.tensors() | far.acting_weights()
    assert {tensor.device.type for tensor in named.values()} == {"cpu"}
    assert far.computation.notes == []
    twin = Engine(keys, SPECS[spec], execution)
    twin.load_tensors(far.tensors())
    assert copied(twin.tensors()) == copied(far.tensors())
