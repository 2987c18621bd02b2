"""What must be equal for two machines to make the same bytes from the same journal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import metadata
from typing import Final

import numpy as np
import torch

from esper_simic.execution import CPU, Execution

STATE_COMPOSITION: Final = "2"
"""Which numbers and tensors the digest of a learner's whole state covers; another composition, another number."""


def fingerprint(execution: Execution = CPU) -> dict[str, str]:
    """Versions and modes on which the bits of a learner's step depend.

    Digests in a journal can be compared only under an equal fingerprint. Found by experiment: thread count, oneDNN,
    the CPU's instruction set, Adam's implementation and compilation each change the last bits from the first step on.

    Args:
        execution: How steps are carried out; where it is not exact, the fingerprint says so under `replay`, and equal
            ones promise no equal bits.
    """
    return {
        "state": STATE_COMPOSITION,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "torch_geometric": metadata.version("torch-geometric"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": str(torch._C._get_mkldnn_enabled()),
        "mkl_cbwr": os.environ.get("MKL_CBWR", ""),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "aten_cpu_capability": os.environ.get("ATEN_CPU_CAPABILITY", ""),
        "intra_op_threads": str(torch.get_num_threads()),
        "deterministic_algorithms": str(torch.are_deterministic_algorithms_enabled()),
    } | execution.describe()


def promises_bits(recorded: Mapping[str, str]) -> bool:
    """Whether who computes under this very fingerprint gets the same bits; else they agree within a tolerance."""
    return "replay" not in recorded
