"""Adapters without their policy: what they are as a file, and what they are for.

The file is safetensors with metadata: `format`, `rank`, `alpha`, and `base_digest`, the digest of the weights that the
adapters were trained on. On others they would compute something, and nothing that anybody trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec
import safetensors
import safetensors.torch
from torch import Tensor

from esper_simic.errors import ContractError

FORMAT: Final = "simic-adapters-1"

_LENGTH_BYTES: Final = 8
"""A safetensors file begins with the length of its JSON header, little-endian."""


class _Metadata(msgspec.Struct, frozen=True):
    format: str
    rank: str
    alpha: str
    base_digest: str


class _Header(msgspec.Struct, frozen=True):
    metadata: _Metadata = msgspec.field(name="__metadata__")


@dataclass(frozen=True, slots=True)
class AdapterState:
    """Adapters alone, to be saved.

    Attributes:
        tensors: `<name of the weight>.a` and `.b`, and by their own names the policy's buffers that are saved, such as
            the statistics of its normaliser: they moved while the adapters learned, and are part of what they do.
        rank: Of all of them.
        alpha: Of all of them.
        base_digest: XXH3-64, 16 hexadecimal digits, of the base they were trained on.
    """

    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    base_digest: str

    @property
    def matrices(self) -> int:
        """How many are adapted."""
        return sum(name.endswith(".a") and f"{name[:-1]}b" in self.tensors for name in self.tensors)

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        metadata = _Metadata(FORMAT, str(self.rank), repr(self.alpha), self.base_digest)
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        return safetensors.torch.save(tensors, msgspec.structs.asdict(metadata))

    @classmethod
    def from_bytes(cls, data: bytes) -> AdapterState:
        """What `to_bytes` gave.

        Raises:
            ContractError: It is no safetensors file, or one of something else than adapters.
        """
        try:
            tensors = safetensors.torch.load(data)
            length = int.from_bytes(data[:_LENGTH_BYTES], "little")
            header = msgspec.json.decode(data[_LENGTH_BYTES : _LENGTH_BYTES + length], type=_Header)
            metadata = header.metadata
            rank, alpha = int(metadata.rank), float(metadata.alpha)
        except safetensors.SafetensorError as error:
            raise ContractError(f"this is no safetensors file: {error}") from error
        except KeyError as error:
            raise ContractError(
                f"this file holds numbers of a type that is not known here: {error}"
            ) from error
        except (msgspec.DecodeError, ValueError) as error:
            raise ContractError(f"this safetensors file does not hold adapters: {error}") from error
        if metadata.format != FORMAT:
            raise ContractError(f"these adapters are of format {metadata.format!r}, known is {FORMAT!r}")
        return cls(tensors, rank, alpha, metadata.base_digest)
