"""What a task is: samples and labels, split for good, and a digest of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from esper_simic.config_environment import Kind

ARRAYS: Final = ("train_inputs", "train_labels", "validation_inputs", "validation_labels")
"""The fields of a task that hold its data."""


@dataclass(frozen=True, slots=True)
class Task:
    """Samples and labels, split for good.

    | kind | inputs | labels |
    |---|---|---|
    | `image` | float32 `[N, C, H, W]` | int64 `[N]` |
    | `series` | float32 `[N, C, 1, W]` | int64 `[N]` |
    | `vector` | float32 `[N, C, 1, 1]`, C features | int64 `[N]` |
    | `tokens` | int64 `[N, L]` | int64 `[N, L]`, the token that follows each |

    Args:
        name: The name under which it is loaded; a built-in task with parameters names these too.
        classes: Labels there are, at least 2; of tokens, the size of the vocabulary.
        kind: What the samples are.
        train_inputs: Samples to learn from; floats best standardised by themselves.
        train_labels: Their labels, in [0, classes).
        validation_inputs: Held-out samples, treated as the others were; any prefix of them should be balanced.
        validation_labels: Their labels.
    """

    name: str
    classes: int
    kind: Kind
    train_inputs: NDArray[Any]
    train_labels: NDArray[np.int64]
    validation_inputs: NDArray[Any]
    validation_labels: NDArray[np.int64]

    @property
    def channels(self) -> int:
        """Channels of a sample; 1 for tokens."""
        return 1 if self.kind == "tokens" else int(self.train_inputs.shape[1])

    @property
    def height(self) -> int:
        """Height of a sample; 1 for anything but images."""
        return 1 if self.kind == "tokens" else int(self.train_inputs.shape[2])

    @property
    def width(self) -> int:
        """Width of an image, points of a series, positions of tokens; 1 for vectors."""
        return int(self.train_inputs.shape[-1])

    @property
    def digest(self) -> str:
        """SHA-256 of kind, classes and all arrays (shape, little-endian bytes), in hexadecimal.

        Tasks of equal digests are the same data, whatever their names and machines. It is computed at each call: 0.4 s
        for a gigabyte.
        """
        digest = hashlib.sha256(f"{self.kind} {self.classes}".encode())
        for field in ARRAYS:
            array: NDArray[Any] = getattr(self, field)
            digest.update(f"\n{field} {array.dtype.name} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data)
        return digest.hexdigest()
