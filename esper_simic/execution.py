"""How a learner's step is carried out on this machine's device: one choice, made once, that everybody else obeys.

`Execution.choose` looks at the hardware and takes the fastest way that it has; `plain` forces the plain one. There are
no other switches. What was chosen is said by `describe`, for the start of a run and for its fingerprint.

| | CPU | CUDA, capability 8.0 and up | CUDA, 7.x | plain CUDA | plain CPU |
|---|---|---|---|---|---|
| products of matrices | float32 | bfloat16 (autocast), the rest TF32 | float16 (autocast) | float32 | float32 |
| loss scale | none | none: bfloat16 has float32's range | dynamic | none | none |
| compiled | no: slower here, and needs a C++ compiler | yes | yes | no | no |
| CUDA graphs | | yes | yes | no | |
| Adam | fused | fused | fused | one tensor at a time | one tensor at a time |
| transfer | none | pinned, own stream | pinned, own stream | blocking | none |

Adam has a fused kernel on both devices; its `foreach` form, the second choice elsewhere, is never needed.

**Replay.** On the CPU, not compiled, an equal fingerprint means equal bits; that is what recovery and old journals rest
on, and why it is the default there. Every other way is replayed within a tolerance, and says so (`is_exact`, and the
key `replay` of `describe`): compiled code adds up in an order that the compiler chooses, which is not part of a
fingerprint; CUDA kernels add up in the order in which threads arrive. Plain CUDA asks for deterministic kernels, which
makes equal bits likely, but some operations have none. A run must not change its way in the middle: the
fingerprint of a journal would then speak of two.

The CUDA column is written from PyTorch's documentation; lines that only a GPU can run are in `execution_cuda`.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, ParamSpec, Self, TypeVar

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.utils import _pytree as pytree

from esper_simic import execution_cuda
from esper_simic.errors import ConfigError, InvariantViolation
from esper_simic.execution_cuda import CudaDevice
from esper_simic.loss_scale import LossScale

P = ParamSpec("P")
R = TypeVar("R")

KEY: Final = "simic_trainer.device"
TRITON_CAPABILITY: Final = (7, 0)
"""The oldest GPUs for which the compiler makes code; older ones are not chosen by themselves."""

BFLOAT16_CAPABILITY: Final = (8, 0)
"""The oldest GPUs that compute in bfloat16 and TF32."""

IN_FLIGHT_MAX: Final = 2
"""Batches on their way to the device: one is used while the next one travels."""

FAILED_SHAPES_MAX: Final = 32
"""Shapes for which compiling has failed; after so many a function is not compiled any more."""


def unheard() -> None:
    """Nobody listens."""


@dataclass(frozen=True, slots=True)
class Execution:
    """The way chosen. Frozen: `dataclasses.replace` makes another one, for measurements.

    Attributes:
        device: Where weights and batches are.
        device_name: Its model, as it stands in fingerprints.
        autocast_dtype: What products of matrices are computed in; None for their own type.
        has_loss_scale: Whether gradients need one (`LossScale`): float16's range is too small for them.
        has_tf32: Whether float32 products of matrices may be rounded to 10 bits.
        is_compiled: Whether `compiled` compiles.
        has_cuda_graphs: Whether compiled functions are recorded once a shape and then replayed by the GPU alone.
        is_adam_fused: Whether Adam changes all tensors in one kernel.
        is_pinned: Whether batches travel through pinned memory, while the device computes.
        is_deterministic: Whether deterministic kernels are asked for where there is a choice.
    """

    device: torch.device
    device_name: str = "cpu"
    autocast_dtype: torch.dtype | None = None
    has_loss_scale: bool = False
    has_tf32: bool = False
    is_compiled: bool = False
    has_cuda_graphs: bool = False
    is_adam_fused: bool = True
    is_pinned: bool = False
    is_deterministic: bool = False

    @classmethod
    def choose(
        cls,
        device: str = "auto",
        *,
        plain: bool = False,
        rank: int = 0,
        gpus: tuple[CudaDevice, ...] | None = None,
    ) -> Self:
        """Choose for a device.

        Args:
            device: `auto` (a GPU if there is one), `cpu`, `cuda` (as `auto`, but there must be one) or `cuda:N`.
            plain: Force the plain way: nothing compiled, fused, rounded or recorded.
            rank: Which learner of the run; several share the GPUs in turn, unless one is named.
            gpus: What there is; None looks.

        Raises:
            ConfigError: There is no such device.
        """
        there = execution_cuda.devices() if gpus is None else gpus
        gpu = _asked_for(device, rank, there)
        if gpu is None:
            return cls(torch.device("cpu"), is_adam_fused=not plain)
        at = torch.device("cuda", gpu.index)
        if plain:
            return cls(at, gpu.name, is_adam_fused=False, is_deterministic=True)
        is_new = gpu.capability >= BFLOAT16_CAPABILITY
        can_compile = gpu.capability >= TRITON_CAPABILITY
        return cls(
            device=at,
            device_name=gpu.name,
            autocast_dtype=torch.bfloat16 if is_new else torch.float16,
            has_loss_scale=not is_new,
            has_tf32=is_new,
            is_compiled=can_compile,
            has_cuda_graphs=can_compile,
            is_pinned=True,
        )

    @classmethod
    def recorded(cls, words: Mapping[str, str], gpus: tuple[CudaDevice, ...] | None = None) -> Self:
        """The way of which a fingerprint speaks, as far as this machine has it; for who makes recorded updates again.

        On a machine without that model of GPU it is the CPU, with the same Adam: its fingerprint is another one.

        Args:
            words: As `describe` gave them; others beside them are of no account, and journals of before there were
                any mean the CPU.
            gpus: What there is; None looks.
        """
        name, is_fused = words.get("device", "cpu"), words.get("adam") != "single"
        there = execution_cuda.devices() if gpus is None else gpus
        gpu = next((one for one in there if one.name == name), None)
        if gpu is None and name != "cpu":
            return cls(torch.device("cpu"), is_adam_fused=is_fused)
        is_plain = "deterministic_kernels" in words
        return cls(
            device=torch.device("cpu") if gpu is None else torch.device("cuda", gpu.index),
            device_name=name,
            autocast_dtype=_HALVES.get(words.get("autocast", "")),
            has_loss_scale="loss_scale" in words,
            has_tf32="tf32" in words,
            is_compiled=words.get("compile", "none") != "none",
            has_cuda_graphs="cuda_graphs" in words,
            is_adam_fused=is_fused,
            is_pinned=gpu is not None and not is_plain,
            is_deterministic=is_plain,
        )

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def is_exact(self) -> bool:
        """Whether equal fingerprints mean equal bits; if not, replay compares within a tolerance."""
        return not (self.is_cuda or self.is_compiled)

    def describe(self) -> dict[str, str]:
        """The way chosen as words, for a person and for a fingerprint; what is not out of the ordinary is left out.

        On the CPU by default: `{"adam": "fused", "compile": "none", "device": "cpu"}`. Journals hold these words, so
        they are for ever.
        """
        words = {
            "adam": "fused" if self.is_adam_fused else "single",
            "compile": "inductor" if self.is_compiled else "none",
            "device": self.device_name,
        }
        if self.autocast_dtype is not None:
            words["autocast"] = str(self.autocast_dtype).removeprefix("torch.")
        for key, is_on in (
            ("tf32", self.has_tf32),
            ("loss_scale", self.has_loss_scale),
            ("cuda_graphs", self.has_cuda_graphs),
            ("deterministic_kernels", self.is_deterministic),
        ):
            if is_on:
                words[key] = "on"
        if self.is_cuda:
            words["cuda"] = str(torch.version.cuda)
        if not self.is_exact:
            words["replay"] = "within a tolerance"
        return words

    def __str__(self) -> str:
        """For people: `cpu: adam fused, compile none`."""
        return in_words(self.describe())

    # -- what the process is told once -----------------------------------------------------------------------------

    def apply(self) -> None:
        """Set torch's global modes for this way; once, before the first tensor. Leaves a CPU's process as it is."""
        if not self.is_cuda:
            return
        # The older of two interfaces, on purpose: after a word through the newer one (`fp32_precision`) the compiler's
        # own reading of the older one raises.
        torch.set_float32_matmul_precision("high" if self.has_tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = self.has_tf32
        # Only a warning where an operation has no such kernel: the plain way must work, above all.
        torch.use_deterministic_algorithms(self.is_deterministic, warn_only=True)
        execution_cuda.use(self.device)

    # -- what a step uses ------------------------------------------------------------------------------------------

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around forward passes. What comes out of them is to be made float32 before losses and targets."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def optimizer_kwargs(self) -> dict[str, Any]:
        """For Adam, beside rates and parameters."""
        return {"fused": True} if self.is_adam_fused else {"fused": False, "foreach": False}

    def loss_scale(self) -> LossScale | None:
        """The one to begin with; None where gradients need none."""
        return LossScale() if self.has_loss_scale else None

    def to_device(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A batch on the device, ready for use; on the CPU the very same tensors."""
        if not self.is_cuda:
            return tensors
        return {
            name: execution_cuda.sent(tensor, self.device, self.is_pinned) for name, tensor in tensors.items()
        }

    def feed(self) -> Feed:
        """A way to the device on which the next batch travels while the present one is used."""
        return Feed(
            execution_cuda.Copier(self.device, is_pinned=self.is_pinned) if self.is_cuda else HostCopier()
        )

    def begin_step(self) -> None:
        """At the beginning of each step: what recorded functions returned in the step before is given up now."""
        if self.has_cuda_graphs:
            execution_cuda.begin_step()

    def compiled(
        self,
        function: Callable[P, R],
        name: str,
        told: Callable[[str], None],
        beginning: Callable[[], None] = unheard,
    ) -> Compiled[P, R]:
        """A function as this way runs it: compiled, with a way back; or as it is.

        Args:
            function: Pure, of tensors: it may be run twice for one call.
            name: What it is, for people; it says nothing of being compiled, since it may not be.
            told: Told once why it is run as it is for some shape, where it should have been compiled.
            beginning: Told before a shape that may have to be compiled, which can take minutes.
        """
        mode = "reduce-overhead" if self.has_cuda_graphs else None
        fast = torch.compile(function, dynamic=True, mode=mode) if self.is_compiled else None
        return Compiled(function, fast, name, told, beginning)

    def memory_fraction(self) -> float | None:
        """Share of the device's memory that is taken, by anybody; None on the CPU, whose memory is the process's."""
        return execution_cuda.memory_fraction(self.device) if self.is_cuda else None


_WORDS: Final = (
    *("adam", "compile", "autocast", "tf32", "loss_scale"),
    *("cuda_graphs", "deterministic_kernels", "cuda", "replay"),
)


def in_words(described: Mapping[str, str]) -> str:
    """What `describe` gave, or a fingerprint has of it, in one line: `cpu: adam fused, compile none`."""
    words = [f"{key.replace('_', ' ')} {described[key]}" for key in _WORDS if key in described]
    return f"{described.get('device', 'cpu')}: {', '.join(words)}"


_HALVES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}

CPU: Final = Execution(torch.device("cpu"))
"""The default on the CPU, on which old journals rest."""


def _asked_for(device: str, rank: int, gpus: tuple[CudaDevice, ...]) -> CudaDevice | None:
    """The GPU that is meant, or None for the CPU."""
    kind, _, number = device.partition(":")
    if device == "cpu":
        return None
    if device in {"auto", "cuda"}:
        usable = [gpu for gpu in gpus if gpu.capability >= TRITON_CAPABILITY]
        if device == "cuda":
            if not gpus:
                raise ConfigError("there is no CUDA device here; auto takes what there is", KEY)
            usable = usable or list(gpus)
        return usable[rank % len(usable)] if usable else None
    if kind == "cuda" and number.isdecimal():
        for gpu in gpus:
            if gpu.index == int(number):
                return gpu
        raise ConfigError(f"there is no {device} here, but {len(gpus)} CUDA devices", KEY)
    raise ConfigError(f"must be auto, cpu, cuda or cuda:N, not {device!r}", KEY)


# -- batches on their way ----------------------------------------------------------------------------------------------


class HostCopier:
    """The device is the machine itself: nothing travels. A `Copier`."""

    def start(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `execution_cuda.Copier`."""
        return tensors

    def finish(self, started: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `execution_cuda.Copier`."""
        return started


class Feed:
    """Batches on their way to the device, first in, first out, at most `IN_FLIGHT_MAX`.

    `put` the next one before using the present one, and its journey costs no time.

    Args:
        copier: How one travels.
    """

    def __init__(self, copier: HostCopier | execution_cuda.Copier) -> None:
        self._copier = copier
        self._under_way: deque[Any] = deque()

    def __len__(self) -> int:
        return len(self._under_way)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Send one. Its tensors must not be changed before it is taken.

        Raises:
            InvariantViolation: As many as may be are under way.
        """
        if len(self) == IN_FLIGHT_MAX:
            raise InvariantViolation(
                f"{IN_FLIGHT_MAX} batches are on their way to the device; take one first"
            )
        self._under_way.append(self._copier.start(tensors))

    def take(self) -> Mapping[str, Tensor]:
        """The oldest, on the device; work queued from now on finds it whole.

        Raises:
            InvariantViolation: None was put.
        """
        if not self._under_way:
            raise InvariantViolation("no batch is on its way to the device")
        return self._copier.finish(self._under_way.popleft())


# -- compiled functions ------------------------------------------------------------------------------------------------


class Compiled(Generic[P, R]):
    """A function that is compiled if that can be done, and runs as it is where not.

    A failure is remembered for the shapes (and types) with which it happened, and for no others: the next batch may be
    one for which it works. What the function itself raises is raised; only the compiler's own failures are caught.

    The backward pass is compiled together with the forward one, at the first call of a shape: torch would otherwise
    wait for `backward`, where nobody could fall back any more.

    Args:
        function: The function as it is.
        fast: Its compiled form; None where this way does not compile.
        name: What it is.
        told: Told once, at the first failure, a sentence for a log.
        beginning: Told before the first call of each shape that is not run as it is; again after `begin_anew`.
    """

    def __init__(
        self,
        function: Callable[P, R],
        fast: Callable[P, R] | None,
        name: str,
        told: Callable[[str], None],
        beginning: Callable[[], None] = unheard,
    ) -> None:
        self._function, self._fast, self._told, self._beginning = function, fast, told, beginning
        self.name = name
        self._met: set[tuple[object, ...]] = set()
        self._failed: set[tuple[object, ...]] = set()

    @property
    def failures(self) -> int:
        """For how many shapes it is run as it is although it should be compiled; a counter for a report."""
        return len(self._failed)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call it."""
        if self._fast is None or len(self._failed) == FAILED_SHAPES_MAX:
            return self._function(*args, **kwargs)
        signature = _signature(args, kwargs)
        if signature not in self._failed:
            if signature not in self._met:
                self._met.add(signature)
                self._beginning()
            try:
                with functorch_config.patch(force_non_lazy_backward_lowering=True):
                    return self._fast(*args, **kwargs)
            except RuntimeError as error:
                if not _is_of_compiler(error):
                    raise
                self._fail(signature, error)
        return self._function(*args, **kwargs)

    def begin_anew(self) -> None:
        """What it computes with has another form now: each shape may have to be compiled once more, and is told."""
        self._met.clear()

    def _fail(self, signature: tuple[object, ...], error: RuntimeError) -> None:
        if not self._failed:
            reason = " ".join(str(error).split("\n")[:2]).strip()
            self._told(
                f"{self.name} cannot be compiled and is run as it is: {type(error).__name__}: {reason}"
            )
        self._failed.add(signature)


def _signature(args: tuple[object, ...], kwargs: Mapping[str, object]) -> tuple[object, ...]:
    """What a compiled form depends on: structure, and of each tensor shape and type."""
    leaves, structure = pytree.tree_flatten((args, dict(kwargs)))
    return (
        str(structure),
        *(
            (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else type(leaf)
            for leaf in leaves
        ),
    )


def _is_of_compiler(error: RuntimeError) -> bool:
    """Whether the compiler raised it, told by where its class is at home: importing these would cost a second."""
    homes = ("torch._dynamo", "torch._inductor")
    return any(kind.__module__.startswith(homes) for kind in type(error).__mro__)
