"""All of a learner at one journal position, and its digest.

Tensors, numbers, and *addresses*, which name records of the journal where a copy of them would be a second truth.
Addresses and identities of senders are no part of the state's digest: two runs in lockstep have equal digests although
one of them was killed and has other positions and lives in its journal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from torch import Tensor


def digest(named: dict[str, Tensor], more: bytes = b"") -> str:
    """XXH3-64, as 16 hexadecimal digits, of tensors in the order of their names, then of more bytes."""
    hasher = xxhash.xxh3_64()
    for name in sorted(named):
        hasher.update(
            np.ascontiguousarray(named[name].detach().cpu().numpy()).reshape(-1).view(np.uint8).data
        )
    hasher.update(more)
    return hasher.hexdigest()


@dataclass(frozen=True, slots=True)
class LearnerState:
    """All of a learner at one journal position.

    Attributes:
        tensors: By name: `policy.…` and `optimizer.<name>.<index>.…`.
        numbers: Everything else that decides what comes; JSON types only.
        addresses: Journal positions of what the buffer holds and of unrolls not consumed yet, and the newest sequence
            answered of each actor's life; JSON types only.
    """

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    addresses: dict[str, Any]

    @property
    def digest(self) -> str:
        """XXH3-64 of tensors and numbers."""
        return digest(self.tensors, repr(self.numbers).encode())

    def copy(self) -> LearnerState:
        """The same with tensors of its own, which later updates do not change."""
        return LearnerState(
            {name: tensor.clone() for name, tensor in self.tensors.items()}, self.numbers, self.addresses
        )
