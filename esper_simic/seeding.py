"""Counter-based random streams: chance is derived from a key, never stored.

A stream is named by what it is for, such as `(run_seed, "learner", rank, step)` or `(lane_seed, episode)`. The same
name gives the same numbers in any process, in any order of use, so nothing about chance has to be saved or restored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np


def derive(*name: int | str) -> int:
    """A 64-bit seed for the stream of this name.

    Args:
        name: Integers (any size below 2**64) and strings; their order and types count.

    Returns:
        The first 8 bytes of the SHA-256 of the name's MessagePack encoding, in [0, 2**63).
    """
    digest = hashlib.sha256(msgspec.msgpack.encode(name)).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*name: int | str) -> np.random.Generator:
    """A fresh Philox generator at the start of the stream of this name."""
    digest = hashlib.sha256(msgspec.msgpack.encode(name)).digest()
    key = np.frombuffer(digest[:16], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def restored(state: Mapping[str, Any]) -> np.random.Generator:
    """A generator that goes on where another one stood, by that one's `bit_generator.state`.

    Raises:
        ValueError: It is not the state of a Philox generator.
    """
    stream = np.random.Philox()
    stream.state = state  # type: ignore[assignment]
    return np.random.Generator(stream)
