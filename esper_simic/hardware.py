"""On what an experience was made: kept once, and named from then on by a short id.

The fields that Leyline's `HardwareContext` has carry its names; what changes while a process lives (free memory,
temperature, load) is no part of it, or every unroll would have hardware of its own.
"""

from __future__ import annotations

import msgspec
import xxhash


class HardwareContext(msgspec.Struct, frozen=True, kw_only=True):
    """The hardware of one process's life.

    Attributes:
        device_type: `cpu` or `cuda`.
        device_id: The device's model, as the machine calls it.
        total_memory_gb: Memory of the device, in 10⁹ bytes.
        compute_capability: CUDA's, times ten; 0 for a CPU.
        cores: Logical cores on which the process may run.
        threads: With which it computes.
    """

    device_type: str
    device_id: str
    total_memory_gb: float
    compute_capability: int = 0
    cores: int = 1
    threads: int = 1

    @property
    def id(self) -> str:
        """Eight hexadecimal digits; equal for equal hardware, on whatever machine."""
        return xxhash.xxh3_64(msgspec.msgpack.encode(self)).hexdigest()[:8]
