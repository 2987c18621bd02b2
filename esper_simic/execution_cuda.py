"""The lines of `execution` that only a GPU can run, kept small; they are not measured for coverage.

**Streams.** A batch is copied on a stream of its own, so that it travels while the present one is computed with. Two
rules make that safe. The stream that uses a batch first waits for the event that ends its copy. And memory that was
allocated on one stream and is used on another is marked so (`record_stream`): otherwise the allocator, which knows the
first stream alone, would hand it out again while the second still reads it. Pinned memory needs neither: torch's
allocator of it waits by itself for copies that were begun with `non_blocking`.

**CUDA graphs.** They come with `torch.compile(mode="reduce-overhead")`, not with `make_graphed_callables`: the compiler
records a graph for each shape that it meets, keeps inputs apart from what it records, and runs what cannot be recorded
as it is, all of which would have to be written by hand for the other. The price is a rule: what a recorded function
returned is overwritten when it runs in the next step (`begin_step`). A learner reads its losses as numbers within the
step, and keeps nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """A GPU: its index in this process, its model, and its compute capability (major, minor)."""

    index: int
    name: str
    capability: tuple[int, int]


def devices() -> tuple[CudaDevice, ...]:
    """The GPUs that this process sees; none without a driver."""
    if not torch.cuda.is_available():
        return ()
    return tuple(
        CudaDevice(index, torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
        for index in range(torch.cuda.device_count())
    )


def use(device: torch.device) -> None:
    """Make it the device on which work without one lands."""
    torch.cuda.set_device(device)


def begin_step() -> None:
    """Give up what recorded functions returned before."""
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def memory_fraction(device: torch.device) -> float:
    """Share of the device's memory that is taken, by this process or another."""
    free, total = torch.cuda.mem_get_info(device)
    return 1.0 - free / total


def sent(tensor: Tensor, device: torch.device, is_pinned: bool) -> Tensor:
    """A copy of it on the device, whole for work queued on the present stream from now on."""
    if not is_pinned:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Started:
    """A batch on its way, and the event that ends its copy."""

    tensors: dict[str, Tensor]
    copied: torch.cuda.Event


class Copier:
    """Copies batches to a GPU, beside what it computes.

    Args:
        device: Which GPU.
        is_pinned: Through pinned memory, on a stream of its own; otherwise the caller waits for each copy.
    """

    def __init__(self, device: torch.device, *, is_pinned: bool) -> None:
        self._device, self._is_pinned = device, is_pinned
        present = torch.cuda.current_stream(device)
        self._stream = torch.cuda.Stream(device) if is_pinned else present  # type: ignore[no-untyped-call]

    def start(self, tensors: Mapping[str, Tensor]) -> Started:
        """Begin to copy; the tensors must not be changed before `finish`."""
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            moved = {name: sent(tensor, self._device, self._is_pinned) for name, tensor in tensors.items()}
            copied.record(self._stream)
        return Started(moved, copied)

    def finish(self, started: Started) -> Mapping[str, Tensor]:
        """Let the present stream wait for the copy; its tensors can be used there from now on."""
        present = torch.cuda.current_stream(self._device)
        present.wait_event(started.copied)
        for tensor in started.tensors.values():
            tensor.record_stream(present)
        return started.tensors
