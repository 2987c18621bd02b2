"""Journals compare fingerprints for ever: the default one is, byte for byte, what it always was."""

from __future__ import annotations

import dataclasses
import json
import os
from importlib import metadata

import numpy as np
import torch

from esper_simic.execution import CPU, Execution
from esper_simic.execution_cuda import CudaDevice
from esper_simic.fingerprint import fingerprint, promises_bits


def as_it_always_was() -> dict[str, str]:
    """Written out, word for word, as the first journals have it."""
    return {
        "state": "2",
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
        "adam": "fused",
        "compile": "none",
        "device": "cpu",
    }


def test_the_default_is_byte_for_byte_what_it_always_was() -> None:
    expected = json.dumps(as_it_always_was()).encode()
    assert json.dumps(fingerprint()).encode() == expected
    assert json.dumps(fingerprint(Execution.choose("cpu", gpus=()))).encode() == expected


def test_every_other_way_has_another_fingerprint() -> None:
    gpu = CudaDevice(0, "NVIDIA H200", (9, 0))
    ways = [
        CPU,
        dataclasses.replace(CPU, is_adam_fused=False),
        dataclasses.replace(CPU, is_compiled=True),
        dataclasses.replace(CPU, autocast_dtype=torch.bfloat16),
        Execution.choose("cuda", gpus=(gpu,)),
        Execution.choose("cuda", plain=True, gpus=(gpu,)),
        Execution.choose("cuda", gpus=(CudaDevice(0, "Tesla V100", (7, 0)),)),
        Execution.choose("cuda", gpus=(CudaDevice(0, "NVIDIA A100", (8, 0)),)),
    ]
    prints = [fingerprint(way) for way in ways]
    assert len({json.dumps(one) for one in prints}) == len(ways)
    for way, one in zip(ways, prints, strict=True):
        assert way.describe().items() <= one.items()
        assert ("replay" in one) is not way.is_exact
        assert promises_bits(one) is way.is_exact


def test_where_among_equal_gpus_a_learner_runs_is_no_matter() -> None:
    first, second = (
        Execution.choose("cuda", gpus=(CudaDevice(index, "NVIDIA H200", (9, 0)),)) for index in (0, 1)
    )
    assert first.device != second.device
    assert fingerprint(first) == fingerprint(second)
