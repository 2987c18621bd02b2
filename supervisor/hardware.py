"""The hardware on which this process computes."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Final

import psutil

from esper_simic.hardware import HardwareContext

CPU_INFO: Final = Path("/proc/cpuinfo")

MODEL_BYTES_MAX: Final = 128
"""Of a model's name are kept; it travels with every greeting."""


def hardware_here(threads: int, cpu_info: Path = CPU_INFO) -> HardwareContext:
    """The CPU of this machine, as this process may use it.

    Args:
        threads: With which the process computes.
        cpu_info: Where the kernel tells the model.
    """
    return HardwareContext(
        device_type="cpu",
        device_id=_model(cpu_info)[:MODEL_BYTES_MAX],
        total_memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        cores=len(os.sched_getaffinity(0)),
        threads=threads,
    )


def _model(cpu_info: Path) -> str:
    """What the kernel calls the CPU; where it tells no model, the architecture."""
    try:
        lines = cpu_info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.machine()
