"""Which way is chosen for which device; the way back from a compiler that fails; the loss scale against torch's own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config as inductor_config

from esper_simic import execution_cuda
from esper_simic.errors import ConfigError, InvariantViolation
from esper_simic.execution import (
    CPU,
    FAILED_SHAPES_MAX,
    IN_FLIGHT_MAX,
    Compiled,
    Execution,
    Feed,
    HostCopier,
    in_words,
)
from esper_simic.execution_cuda import CudaDevice
from esper_simic.loss_scale import GROWTH_INTERVAL, LossScale

H200 = CudaDevice(0, "NVIDIA H200", (9, 0))
A100 = CudaDevice(1, "NVIDIA A100", (8, 0))
V100 = CudaDevice(0, "Tesla V100", (7, 0))
P100 = CudaDevice(0, "Tesla P100", (6, 0))

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NO GPU HERE, or SIMIC_TEST_GPU is not set: not tried"
)


# -- the choice --------------------------------------------------------------------------------------------------------


def test_a_machine_without_a_gpu_computes_as_it_always_did() -> None:
    chosen = Execution.choose("auto", gpus=())
    assert chosen == CPU == Execution.choose("cpu", gpus=(H200,))
    assert json.dumps(chosen.describe()) == '{"adam": "fused", "compile": "none", "device": "cpu"}'
    assert chosen.is_exact
    assert chosen.optimizer_kwargs() == {"fused": True}
    assert (chosen.autocast_dtype, chosen.loss_scale(), chosen.memory_fraction()) == (None, None, None)


def test_a_new_gpu_computes_in_bfloat16_compiled_and_recorded() -> None:
    chosen = Execution.choose("auto", gpus=(H200, A100))
    assert chosen.device == torch.device("cuda", 0)
    assert chosen.autocast_dtype is torch.bfloat16
    assert chosen.loss_scale() is None
    assert (chosen.has_tf32, chosen.is_compiled, chosen.has_cuda_graphs, chosen.is_pinned) == (True,) * 4
    assert not chosen.is_exact
    assert chosen.describe() == {
        "adam": "fused",
        "compile": "inductor",
        "device": "NVIDIA H200",
        "autocast": "bfloat16",
        "tf32": "on",
        "cuda_graphs": "on",
        "cuda": str(torch.version.cuda),
        "replay": "within a tolerance",
    }


def test_an_older_gpu_computes_in_float16_with_a_scaled_loss() -> None:
    chosen = Execution.choose("auto", gpus=(V100,))
    assert chosen.autocast_dtype is torch.float16
    assert chosen.loss_scale() == LossScale()
    assert not chosen.has_tf32
    assert chosen.is_compiled
    assert chosen.describe()["loss_scale"] == "on"


def test_a_gpu_for_which_the_compiler_makes_no_code_is_taken_only_when_asked_for() -> None:
    assert Execution.choose("auto", gpus=(P100,)) == CPU
    chosen = Execution.choose("cuda", gpus=(P100,))
    assert chosen.device == torch.device("cuda", 0)
    assert not chosen.is_compiled
    assert not chosen.has_cuda_graphs


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_plain_forces_the_plain_way(device: str) -> None:
    chosen = Execution.choose(device, plain=True, gpus=(H200, A100))
    assert chosen.autocast_dtype is None
    assert chosen.loss_scale() is None
    fast = (
        chosen.has_tf32,
        chosen.is_compiled,
        chosen.has_cuda_graphs,
        chosen.is_pinned,
        chosen.is_adam_fused,
    )
    assert fast == (False,) * 5
    assert chosen.optimizer_kwargs() == {"fused": False, "foreach": False}
    assert chosen.is_deterministic == chosen.is_cuda == (device != "cpu")
    assert chosen.is_exact == (device == "cpu")
    assert chosen.describe() != Execution.choose(device, gpus=(H200, A100)).describe()


def test_learners_share_the_gpus_in_turn_unless_one_is_named() -> None:
    gpus = (H200, A100)
    assert [Execution.choose("auto", rank=rank, gpus=gpus).device.index for rank in range(3)] == [0, 1, 0]
    assert [Execution.choose("cuda", rank=rank, gpus=gpus).device.index for rank in range(3)] == [0, 1, 0]
    assert [Execution.choose("cuda:1", rank=rank, gpus=gpus).device_name for rank in range(2)] == [
        "NVIDIA A100"
    ] * 2


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda", (), "no CUDA device"),
        ("cuda:0", (), r"no cuda:0 here, but 0"),
        ("cuda:2", (H200, A100), r"no cuda:2 here, but 2"),
        ("cuda:", (H200,), "must be auto, cpu, cuda or cuda:N"),
        ("cuda:-1", (H200,), "must be auto"),
        ("cpu:0", (), "must be auto"),
        ("tpu", (H200,), "must be auto"),
    ],
)
def test_a_device_that_is_not_there_is_named(device: str, gpus: tuple[CudaDevice, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        Execution.choose(device, gpus=gpus)
    assert raised.value.key == "simic_trainer.device"


def test_it_looks_by_itself_when_it_is_not_told_what_there_is() -> None:
    assert Execution.choose("auto").is_cuda == torch.cuda.is_available()


def test_on_the_cpu_the_process_stays_as_it_is() -> None:
    before = (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled())
    CPU.apply()
    CPU.begin_step()
    assert (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()) == before


@pytest.fixture
def _modes_come_back() -> Iterator[None]:
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_modes_come_back")
def test_for_a_gpu_torchs_modes_are_set_once_through_the_interface_that_the_compiler_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[torch.device] = []
    monkeypatch.setattr(execution_cuda, "use", used.append)
    for plain, precision in ((False, "high"), (True, "highest")):
        Execution.choose("cuda:1", plain=plain, gpus=(H200, A100)).apply()
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 is not plain
        assert torch.backends.cuda.matmul.allow_tf32 is not plain
        assert torch.are_deterministic_algorithms_enabled() is plain
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert used == [torch.device("cuda", 1)] * 2


def test_autocast_makes_products_of_matrices_smaller_and_only_where_it_is_chosen() -> None:
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    with CPU.autocast():
        assert layer(x).dtype is torch.float32
    with dataclasses.replace(CPU, autocast_dtype=torch.bfloat16).autocast():
        assert layer(x).dtype is torch.bfloat16


@pytest.mark.parametrize("plain", [False, True])
def test_adam_takes_its_arguments(plain: bool) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam(
        [parameter], lr=0.1, **Execution.choose("cpu", plain=plain).optimizer_kwargs()
    )
    parameter.sum().backward()
    optimizer.step()
    assert torch.allclose(parameter.detach(), torch.full((3,), 0.9))
    assert optimizer.defaults["fused"] is not plain


# -- the way of a fingerprint ------------------------------------------------------------------------------------------

WAYS = {
    "cpu": CPU,
    "plain cpu": Execution.choose("cpu", plain=True),
    "bfloat16 on the cpu": dataclasses.replace(CPU, autocast_dtype=torch.bfloat16),
    "compiled on the cpu": dataclasses.replace(CPU, is_compiled=True),
    "new": Execution.choose("cuda", gpus=(H200,)),
    "plain": Execution.choose("cuda", plain=True, gpus=(H200,)),
    "second": Execution.choose("cuda:1", gpus=(H200, A100)),
    "older": Execution.choose("cuda", gpus=(V100,)),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_way_of_a_fingerprint_is_found_again_where_there_is_its_device(way: Execution) -> None:
    words = {"torch": "1.0", "mkldnn": "True"} | way.describe()
    assert Execution.recorded(words, gpus=(V100, dataclasses.replace(H200, index=2), A100)) == (
        dataclasses.replace(way, device=torch.device("cuda", 2)) if way.device_name == H200.name else way
    )


def test_without_its_device_it_is_the_cpu_with_the_same_adam() -> None:
    for plain in (False, True):
        words = Execution.choose("cuda", plain=plain, gpus=(H200,)).describe()
        found = Execution.recorded(words, gpus=(A100,))
        assert found == Execution.choose("cpu", plain=plain)
    assert Execution.recorded({}, gpus=()) == CPU == Execution.recorded(CPU.describe())


def test_a_way_in_one_line() -> None:
    assert str(CPU) == "cpu: adam fused, compile none"
    assert str(WAYS["older"]).startswith(
        "Tesla V100: adam fused, compile inductor, autocast float16, loss scale on, cuda graphs on, cuda "
    )
    assert str(WAYS["older"]).endswith(", replay within a tolerance")
    assert in_words({"torch": "1.0"} | CPU.describe()) == str(CPU)


# -- batches -----------------------------------------------------------------------------------------------------------


def batch(number: float) -> dict[str, Tensor]:
    return {"x": torch.full((2, 3), number), "y": torch.full((2,), int(number))}


def test_on_the_cpu_a_batch_is_where_it_is_needed() -> None:
    tensors = batch(1)
    assert CPU.to_device(tensors) is tensors


def test_a_feed_gives_batches_in_their_order_and_holds_only_so_many() -> None:
    feed = CPU.feed()
    first, second, third = batch(1), batch(2), batch(3)
    feed.put(first)
    feed.put(second)
    assert len(feed) == IN_FLIGHT_MAX == 2
    with pytest.raises(InvariantViolation, match="take one first"):
        feed.put(third)
    assert feed.take() is first
    feed.put(third)
    assert feed.take() is second
    assert feed.take() is third
    with pytest.raises(InvariantViolation, match="no batch"):
        feed.take()


def test_a_feed_finishes_only_what_is_taken() -> None:
    told: list[str] = []

    class Telling(HostCopier):
        def start(self, tensors):
            told.append("start")
            return tensors

        def finish(self, started):
            told.append("finish")
            return started

    feed = Feed(Telling())
    feed.put(batch(1))
    feed.put(batch(2))
    feed.take()
    assert told == ["start", "start", "finish"]


# -- the loss scale ----------------------------------------------------------------------------------------------------


def torch_scales(finite: list[bool], growth_interval: int) -> list[float]:
    """What torch's own scaler does after steps whose gradients are finite, or not."""
    scaler = torch.amp.GradScaler("cpu", growth_interval=growth_interval)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    scales = []
    for is_finite in finite:
        scaler.scale((parameter * (1.0 if is_finite else float("inf"))).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(float(scaler.get_scale()))
    return scales


@settings(deadline=None, max_examples=25)
@given(st.lists(st.booleans(), max_size=14))
def test_it_follows_the_rule_of_torchs_own_scaler(finite: list[bool]) -> None:
    scale, scales = LossScale(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("esper_simic.loss_scale.GROWTH_INTERVAL", 3)
        for is_finite in finite:
            scale = scale.followed(is_finite)
            scales.append(scale.scale)
    assert scales == torch_scales(finite, 3)


def test_it_never_falls_below_one_and_never_rounds() -> None:
    scale = LossScale()
    for _ in range(40):
        scale = scale.followed(False)
    assert scale == LossScale(scale=1.0)
    assert scale.is_exhausted
    assert not LossScale().is_exhausted
    assert LossScale(scale=2.0**24, finite_steps=GROWTH_INTERVAL - 1).followed(True) == LossScale(
        scale=2.0**24
    )


@pytest.mark.parametrize(
    "wrong", [{"scale": 3.0}, {"scale": 0.5}, {"scale": float("inf")}, {"finite_steps": -1}]
)
def test_what_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no loss scale"):
        LossScale(**wrong)
    with pytest.raises(msgspec.ValidationError, match="no loss scale"):
        msgspec.convert(wrong, LossScale)


def test_it_is_plain_numbers_for_a_checkpoint() -> None:
    scale = LossScale().followed(True)
    assert msgspec.to_builtins(scale) == {"scale": 65536.0, "finite_steps": 1}
    assert msgspec.convert(msgspec.to_builtins(scale), LossScale) == scale


def test_scaled_and_unscaled_gradients_are_the_same_bits() -> None:
    x = torch.randn(5, generator=torch.Generator().manual_seed(1))
    plain, scaled, unused = (nn.Parameter(x.clone()) for _ in range(3))
    plain.exp().sum().backward()
    scale = LossScale()
    (scaled.exp().sum() * scale.scale).backward()
    scale.unscale([scaled, unused])
    assert plain.grad is not None
    assert scaled.grad is not None
    assert torch.equal(plain.grad, scaled.grad)
    assert unused.grad is None


# -- compiled functions ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def squares(x: Tensor) -> Tensor:
    return (x * x).sum(dim=0)


class Backend:
    """A compiler of which one says for which sizes it fails."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        self._fails = fails
        self.asked: list[int] = []

    def __call__(self, graph: Any, examples: list[Any]) -> Any:
        size = next(int(example.shape[0]) for example in examples if isinstance(example, Tensor))
        self.asked.append(size)
        if self._fails(size):
            raise ValueError(f"no code for size {size}\nand a long story")
        return graph.forward


def through(backend: Any, function: Callable[..., Any] = squares) -> tuple[Compiled[..., Any], list[str]]:
    told: list[str] = []
    # Static shapes: each is compiled by itself.
    fast = torch.compile(function, backend=backend, dynamic=False)
    return Compiled(function, fast, "squares", told.append), told


def test_not_compiled_is_the_function_itself() -> None:
    told: list[str] = []
    function = CPU.compiled(squares, "squares", told.append)
    assert torch.equal(function(torch.ones(3, 2)), torch.full((2,), 3.0))
    assert (function.name, function.failures, told) == ("squares", 0, [])


def test_who_is_waited_for_is_told_before_each_shape_that_may_have_to_be_compiled() -> None:
    backend, began = Backend(lambda size: size == 4), []
    fast = torch.compile(squares, backend=backend, dynamic=False)
    function = Compiled(
        squares, fast, "squares", lambda said: None, lambda: began.append(list(backend.asked))
    )
    for rows in (3, 3, 4, 4, 5):
        function(torch.ones(rows, 2))
    assert began == [[], [3], [3, 4]]
    Compiled(squares, None, "squares", lambda said: None, lambda: began.append([]))(torch.ones(3, 2))
    assert len(began) == 3, "nothing is compiled here"


def test_a_failure_is_said_once_and_every_call_has_its_result() -> None:
    backend = Backend(lambda size: True)
    function, told = through(backend)
    for rows in (3, 3, 4):
        assert torch.equal(function(torch.ones(rows, 2)), torch.full((2,), float(rows)))
    assert len(told) == 1
    assert told[0].startswith("squares cannot be compiled and is run as it is: BackendCompilerFailed: ")
    assert "\n" not in told[0]
    assert "no code for size 3" in told[0]


def test_a_failure_for_one_shape_is_remembered_for_that_shape_alone() -> None:
    backend = Backend(lambda size: size == 3)
    function, told = through(backend)
    for rows in (3, 3, 3, 4, 4, 5):
        assert torch.equal(function(torch.ones(rows, 2)), torch.full((2,), float(rows)))
    assert backend.asked == [3, 4, 5]
    assert function.failures == 1
    assert len(told) == 1


def test_another_type_is_another_shape() -> None:
    backend = Backend(lambda size: True)
    function, _ = through(backend)
    function(torch.ones(3, 2))
    function(torch.ones(3, 2, dtype=torch.float64))
    function(x=torch.ones(3, 2))
    assert (function.failures, len(backend.asked)) == (3, 3)


def test_after_too_many_failures_it_is_not_tried_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper_simic.execution.FAILED_SHAPES_MAX", 3)
    assert FAILED_SHAPES_MAX >= 3
    backend = Backend(lambda size: True)
    function, told = through(backend)
    for rows in range(2, 9):
        assert float(function(torch.ones(rows, 1))) == rows
    assert backend.asked == [2, 3, 4]
    assert len(told) == 1


def test_a_compiler_that_fails_at_the_backward_pass_is_noticed_before_it() -> None:
    def fails(graph: Any, examples: Any) -> Any:
        raise ValueError("no code for gradients")

    backend = aot_autograd(fw_compiler=lambda graph, examples: graph.forward, bw_compiler=fails)
    function, told = through(backend)
    x = torch.ones(3, 2, requires_grad=True)
    function(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((3, 2), 2.0))
    assert len(told) == 1
    assert "no code for gradients" in told[0]


def test_what_the_function_itself_raises_is_raised() -> None:
    def wrong(x: Tensor) -> Tensor:
        return x @ x

    function, _ = through(aot_autograd(fw_compiler=lambda graph, examples: graph.forward), wrong)
    with pytest.raises(RuntimeError, match="3"):
        function(torch.ones(3, 2))

    def out_of_memory(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory is left")

    told_of_memory: list[str] = []
    with pytest.raises(torch.OutOfMemoryError):
        Compiled(squares, out_of_memory, "squares", told_of_memory.append)(torch.ones(3, 2))
    assert told_of_memory == []


def test_a_machine_without_a_compiler_runs_it_as_it_is() -> None:
    told: list[str] = []
    with inductor_config.patch({"cpp.cxx": (None, "/nonexistent/c++"), "fx_graph_cache": False}):
        function = dataclasses.replace(CPU, is_compiled=True).compiled(squares, "squares", told.append)
        x = torch.ones(3, 2, requires_grad=True)
        for _ in range(2):
            function(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((3, 2), 4.0))
    assert len(told) == 1
    assert "compiler" in told[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")
def test_a_compiled_function_is_the_same_for_every_shape_and_compiled_once(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
    told: list[str] = []
    layer = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    execution = dataclasses.replace(CPU, is_compiled=True)
    assert execution.describe() == {
        "adam": "fused",
        "compile": "inductor",
        "device": "cpu",
        "replay": "within a tolerance",
    }
    function = execution.compiled(layer.forward, "layer", told.append)
    for rows in (7, 5, 12):
        x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
        results = []
        for run in (function, layer.forward):
            layer.zero_grad(set_to_none=True)
            y = run(x)
            y.square().sum().backward()
            results.append([y, *(parameter.grad for parameter in layer.parameters())])
        for fast, slow in zip(*results, strict=True):
            assert fast is not None
            assert slow is not None
            assert torch.allclose(fast, slow, rtol=1e-4, atol=1e-5)
    assert told == []
    assert function.failures == 0


# -- what only a GPU can show ------------------------------------------------------------------------------------------


@needs_gpu
def test_on_a_gpu_batches_arrive_whole_and_in_their_order() -> None:
    for plain in (False, True):
        execution = Execution.choose("cuda", plain=plain)
        feed = execution.feed()
        feed.put(batch(1))
        for number in range(2, 50):
            feed.put(batch(number))
            taken = feed.take()
            assert taken["x"].device == execution.device
            assert float((taken["x"] * 2).sum()) == 12 * (number - 1)
        sent = execution.to_device(batch(7))
        assert int(sent["y"].sum()) == 14


@needs_gpu
def test_on_a_gpu_a_step_learns_as_on_the_cpu() -> None:
    execution = Execution.choose("cuda")
    execution.apply()
    told: list[str] = []
    layer = nn.Linear(8, 8).to(execution.device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2, **execution.optimizer_kwargs())
    function = execution.compiled(layer.forward, "layer", told.append)
    x = torch.randn(64, 8, device=execution.device)
    losses = []
    for _ in range(50):
        execution.begin_step()
        optimizer.zero_grad(set_to_none=True)
        with execution.autocast():
            y = function(x)
        loss = (y.float() - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2
    assert told == []
    fraction = execution.memory_fraction()
    assert fraction is not None
    assert 0 < fraction < 1
