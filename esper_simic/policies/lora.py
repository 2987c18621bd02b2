"""Low-rank adaptation: a frozen policy learns a little more.

    W' = W + (alpha / rank) · B · diag(m) · A        A [rank, in], B [out, rank], m the dropout's mask

B is zero at first, so an adapted policy begins as what it was. Adapters sit on the weights themselves, so every layer
that multiplies by a matrix can have one (linear layers, message passing, both matrices of an LSTM), and whoever reads a
weight reads the effective one. Base weights are never written: merging keeps the product beside them, and what is
merged can be taken apart again without a bit lost. Actors are given `merged_state_dict` and need not know of adapters.

Dropout acts on the rank's coordinates, between A and B, and is one mask for a whole update: it is drawn from a
generator that the caller names, and is the same for every row and every step of the batch.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (2021), section 4.1.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import numpy as np
import torch
import torch_geometric.nn
import xxhash
from torch import Tensor, nn
from torch.nn.utils import parametrize

from esper_simic.errors import ContractError, InvariantViolation
from esper_simic.policies.adapter_state import AdapterState

LAYERS: Final = (nn.Linear, nn.LSTMCell, torch_geometric.nn.Linear)
"""Modules whose matrices can be adapted. Not embeddings: they are read by row, not multiplied."""

_ORIGINAL: Final = "parametrizations.{}.original"


class LowRank(nn.Module):
    """From a base weight `[out, in]` to the effective one.

    Args:
        weight: The base weight; its shape and dtype count.
        rank: Width between A and B.
        alpha: The product is scaled by alpha / rank.
        rng: A is drawn from it: uniform in ±1 / √in.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, rng: np.random.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        bound = 1 / math.sqrt(columns)
        drawn = torch.from_numpy(rng.uniform(-bound, bound, (rank, columns)))
        self.a = nn.Parameter(drawn.to(dtype=weight.dtype, device=weight.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, dtype=weight.dtype, device=weight.device))
        self.scaling = alpha / rank
        self.mask: Tensor | None = None
        self.merged: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight `[out, in]`."""
        if self.merged is not None:
            return self.merged
        a = self.a if self.mask is None else self.mask.unsqueeze(-1) * self.a
        return torch.addmm(weight, self.b, a, alpha=self.scaling)


class Adapters:
    """Adapters on a policy's matrices; made by `attach`, gone after `detach` or `fold`."""

    def __init__(self, policy: nn.Module, rank: int, alpha: float, dropout: float) -> None:
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self._policy = policy
        self._by_name: dict[str, LowRank] = {}

    def _add(self, name: str, rng: np.random.Generator) -> None:
        layer, leaf = _owner(self._policy, name)
        adapter = LowRank(getattr(layer, leaf), self.rank, self.alpha, rng)
        parametrize.register_parametrization(layer, leaf, adapter)
        self._by_name[name] = adapter

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapted weights."""
        return tuple(self._by_name)

    def parameters(self) -> list[nn.Parameter]:
        """A and B of every adapter."""
        return [parameter for adapter in self._by_name.values() for parameter in (adapter.a, adapter.b)]

    # -- training --------------------------------------------------------------------------------------------------

    def freeze_base(self) -> None:
        """Let adapters alone learn: no other parameter of the policy takes a gradient."""
        self._set_base(learns=False)

    def unfreeze_base(self) -> None:
        """Let every parameter of the policy learn."""
        self._set_base(learns=True)

    def _set_base(self, *, learns: bool) -> None:
        own = {id(parameter) for parameter in self.parameters()}
        for parameter in self._policy.parameters():
            if id(parameter) not in own:
                parameter.requires_grad_(learns)

    @contextlib.contextmanager
    def dropping(self, rng: np.random.Generator) -> Iterator[None]:
        """Within it each coordinate of each rank is dropped with probability `dropout`, the others are scaled up.

        Args:
            rng: The stream of one update; it is all of the chance, so the masks are a function of its name.

        Raises:
            InvariantViolation: The adapters are merged.
        """
        if self.merged:
            raise InvariantViolation("merged adapters do not learn; unmerge them first")
        for adapter in self._by_name.values():
            kept = torch.from_numpy(rng.random(self.rank) >= self.dropout)
            adapter.mask = kept.to(adapter.a) / (1 - self.dropout)
        try:
            yield
        finally:
            for adapter in self._by_name.values():
                adapter.mask = None

    # -- merging ---------------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether effective weights are kept instead of being made at each use."""
        return any(adapter.merged is not None for adapter in self._by_name.values())

    @torch.no_grad()
    def merge(self) -> None:
        """Make the effective weights once and keep them beside the base; nothing learns until `unmerge`."""
        for name, adapter in self._by_name.items():
            adapter.merged = None
            adapter.merged = adapter(self._original(name)).clone()

    def unmerge(self) -> None:
        """Drop what `merge` kept. The base was never written, so it is bit for bit what it was."""
        for adapter in self._by_name.values():
            adapter.merged = None

    @torch.no_grad()
    def merged_state_dict(self) -> dict[str, Tensor]:
        """The policy as one without adapters: names as before `attach`, effective weights without dropout.

        The tensors share no memory with the policy where they were adapted.
        """
        return merged_weights(self._policy.state_dict(), rank=self.rank, alpha=self.alpha)

    def own_state_dict(self) -> dict[str, Tensor]:
        """The adapted policy's own state, which it can load again: its base and its adapters.

        Some layers save their weight by name, which here is the effective one: it follows from the others, and a policy
        with adapters has no place for it.
        """
        state: dict[str, Tensor] = self._policy.state_dict()
        return {name: tensor for name, tensor in state.items() if name not in self._by_name}

    def base_state_dict(self) -> dict[str, Tensor]:
        """The policy as one without adapters, with its base weights."""
        return base_weights(self._policy.state_dict())

    def load_base_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Make this the base: the state of a policy without adapters. The adapters stay as they are.

        Raises:
            RuntimeError: It is the state of another policy.
        """
        stored = {_stored(name) if name in self._by_name else name: tensor for name, tensor in state.items()}
        own = self.own_state_dict()
        outside = _outside(own)
        kept = {n: t for n, t in own.items() if n not in outside and not n.endswith(".original")}
        self._policy.load_state_dict(kept | stored)

    def detach(self) -> None:
        """Take the adapters off: the policy is its base again, bit for bit, and all of it learns."""
        self._remove(keep=False)

    def fold(self) -> None:
        """Take the adapters off and leave the effective weights as the policy's own; all of it learns."""
        self.unmerge()
        self._remove(keep=True)

    def _remove(self, *, keep: bool) -> None:
        self.unfreeze_base()
        for name in self._by_name:
            layer, leaf = _owner(self._policy, name)
            parametrize.remove_parametrizations(layer, leaf, leave_parametrized=keep)
        self._by_name.clear()

    # -- bytes -----------------------------------------------------------------------------------------------------

    def base_digest(self) -> str:
        """XXH3-64 of names and bytes of the base's parameters."""
        own = {id(parameter) for parameter in self.parameters()}
        hasher = xxhash.xxh3_64()
        named = {
            _plain(name): parameter
            for name, parameter in self._policy.named_parameters()
            if id(parameter) not in own
        }
        for name in sorted(named):
            hasher.update(name.encode())
            array = np.ascontiguousarray(named[name].detach().cpu().numpy())
            hasher.update(array.reshape(-1).view(np.uint8).data)
        return hasher.hexdigest()

    def adapter_state(self) -> AdapterState:
        """The adapters without their base, with the statistics they learned with; in memory of their own."""
        tensors = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        return AdapterState(tensors, self.rank, self.alpha, self.base_digest())

    @torch.no_grad()
    def load_adapter_state(self, state: AdapterState) -> None:
        """Become these adapters; nothing is changed unless all of it fits.

        Raises:
            ContractError: Another rank, alpha or base, a tensor that is missing or unknown, or one of another shape or
                dtype; names it.
        """
        for what, found, wanted in (
            ("rank", state.rank, self.rank),
            ("alpha", state.alpha, self.alpha),
            ("base digest", state.base_digest, self.base_digest()),
        ):
            if found != wanted:
                raise ContractError(f"adapters of {what} {found} do not fit a policy with {what} {wanted}")
        own = self._tensors()
        _refuse_difference(state.tensors, own)
        for name, tensor in own.items():
            tensor.copy_(state.tensors[name])
        if self.merged:
            self.merge()

    def _tensors(self) -> dict[str, Tensor]:
        """What moves while the base is frozen: the adapters, and buffers such as a normaliser's."""
        parameters = {name for name, _ in self._policy.named_parameters()}
        state: dict[str, Tensor] = self._policy.state_dict(keep_vars=True)
        moving = {name: tensor for name, tensor in _outside(state).items() if name not in parameters}
        for name, adapter in self._by_name.items():
            moving.pop(name, None)  # the effective weight, which some layers save
            moving |= {f"{name}.a": adapter.a, f"{name}.b": adapter.b}
        return moving

    def _original(self, name: str) -> Tensor:
        layer, leaf = _owner(self._policy, name)
        return layer.get_parameter(_ORIGINAL.format(leaf))


def attach(
    policy: nn.Module,
    rng: np.random.Generator,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    names: Iterable[str] | None = None,
) -> Adapters:
    """Put adapters on a policy; until they learn, it computes what it did.

    Args:
        policy: Anything made of modules.
        rng: All of the chance: A of each weight, in the order of the names.
        rank: At least 1.
        alpha: Scale of the product, above 0.
        dropout: Probability in [0, 1) of a rank's coordinate being dropped in an update.
        names: Weights to adapt; all of `adaptable` where not given.

    Raises:
        ValueError: A number out of range, or a name that is not one of `adaptable`.
    """
    if rank < 1 or not alpha > 0 or not 0 <= dropout < 1:
        raise ValueError(f"rank {rank} >= 1, alpha {alpha} > 0 and dropout {dropout} in [0, 1) are wanted")
    known = adaptable(policy)
    chosen = known if names is None else tuple(names)
    for name in chosen:
        if name not in known:
            raise ValueError(f"{name} is no weight that can be adapted; there are: {', '.join(known)}")
    adapters = Adapters(policy, rank, alpha, dropout)
    for name in chosen:
        adapters._add(name, rng)
    return adapters


def merged_weights(state: Mapping[str, Tensor], *, rank: int, alpha: float) -> dict[str, Tensor]:
    """The state of a policy with adapters as that of one without: effective weights under their plain names.

    Args:
        state: As `state_dict` of the adapted policy gives it; one without adapters comes back as it is.
        rank: Of the adapters.
        alpha: Of the adapters.
    """
    merged = _outside(state)
    for stored, base in _bases(state).items():
        stem = stored.removesuffix("original")
        merged[_plain(stored)] = torch.addmm(
            base, state[f"{stem}0.b"], state[f"{stem}0.a"], alpha=alpha / rank
        )
    return merged


def base_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a policy with adapters as that of one that never had any: base weights under their plain names."""
    return _outside(state) | {_plain(stored): base for stored, base in _bases(state).items()}


def has_adapters(state: Mapping[str, Tensor]) -> bool:
    """Whether this is the state of a policy with adapters."""
    return any(_is_of_adapters(name) for name in state)


def adaptable(policy: nn.Module) -> tuple[str, ...]:
    """Names of the matrices of linear layers and LSTM cells that have no adapter yet."""
    return tuple(
        f"{path}.{leaf}" if path else leaf
        for path, module in policy.named_modules()
        if isinstance(module, LAYERS)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 2
    )


def _refuse_difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name in sorted(wanted.keys() - found.keys()):
        raise ContractError(f"the saved adapters lack {name}")
    for name in sorted(found.keys() - wanted.keys()):
        raise ContractError(f"the saved adapters hold {name}, which is not adapted here")
    for name, tensor in wanted.items():
        there = found[name]
        if there.shape != tensor.shape or there.dtype != tensor.dtype:
            raise ContractError(
                f"adapter {name} is {list(there.shape)} {there.dtype}, "
                f"wanted is {list(tensor.shape)} {tensor.dtype}"
            )


def _is_of_adapters(name: str) -> bool:
    return ".parametrizations." in f".{name}"


def _outside(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state that no adapter touches."""
    return {name: tensor for name, tensor in state.items() if not _is_of_adapters(name)}


def _bases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapted weights of a state by the names under which they are stored."""
    return {n: tensor for n, tensor in state.items() if _is_of_adapters(n) and n.endswith(".original")}


def _owner(policy: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return policy.get_submodule(path), leaf


def _stored(name: str) -> str:
    """Where an adapted weight's base stands in the policy's state."""
    path, _, leaf = name.rpartition(".")
    stored = _ORIGINAL.format(leaf)
    return f"{path}.{stored}" if path else stored


def _plain(stored: str) -> str:
    """The name of a base weight without adapters."""
    return stored.replace("parametrizations.", "", 1).removesuffix(".original")
