"""Compositions: how the features of seeds join those of their hosts.

With host features `h`, a seed's features `s`, its correction `d` (what it would add to its input: `s - input` of the
blueprint's residual form, see `blueprints`), a gate `g` in (0, 1) and `a = alpha`:

| composition | output | gradient of `h` | gradient of the seed |
|---|---|---|---|
| ADD | `h + a (s - h)` | `(1 - a) G` | `a G` of s |
| MULTIPLY | `h (1 + a t)`, `t = tanh(d)` | `(1 + a t) G` | `a h (1 - t^2) G` of d |
| GATE | `h + a g (s - h)` | `(1 - a g) G` | `a g G` of s, `a (s - h) G` of g |
| isolated, whichever | `h`, bit for bit | `G`, bit for bit | `G`, of s or d |

`G` is the output's gradient. The last line is the literal `h + (s - stopgrad(s))` of a seed in TRAINING: the seed
learns from the whole gradient, and nothing of it reaches the host, not even its NaN. A gate does not learn then.

A gate looks at a sample's mean over all positions; in a text at each position's mean over itself and those before it,
because a mean over all would tell a position what follows. Its pieces lie behind those of the blueprint in the seed's
flat row: `C h + 2 h + 1` numbers, `h = max(8, C // 4)`.

A MULTIPLY seed starts with its last layer at zero, so that `t = 0`: whatever alpha, the output is then `h`, bit for
bit.

All joins of a slot are one operation: one copy of the host's features, into which each join writes its rows. Where
features are small, neighbouring joins of one composition are merged first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from esper_simic.errors import InvariantViolation
from esper_simic.growing_host.alpha import Composition
from esper_simic.growing_host.blueprints import Blueprint, Kind, Piece, initial_row

GATE_HIDDEN_MIN: Final = 8
"""Least width of a gate's hidden layer; a quarter of the channels where that is more."""

MERGED_ELEMENTS_MAX: Final = 2**17
"""Numbers in a host's features up to which calls cost more than memory traffic, so that joins are merged."""


@dataclass(frozen=True, slots=True)
class Join:
    """Seeds that join their hosts in the same way; made once a pass.

    | field | meaning |
    |---|---|
    | `composition` | what they share |
    | `rows` | `[n]` int64, the host row of each, a row in one join at most; None: all rows in order, in the only join |
    | `alpha` | `[n]` in [0, 1]; ignored where isolated |
    | `isolated` | which seeds are in TRAINING: all, none, or `[n]` bool |
    """

    composition: Composition
    rows: Tensor | None
    alpha: Tensor
    isolated: Tensor | bool = False


@dataclass(frozen=True, slots=True)
class Grown:
    """What the seeds of a join have computed for a batch.

    | field | meaning |
    |---|---|
    | `seeds` | `[n, C, H, W, B]`: features, or corrections for MULTIPLY |
    | `gates` | GATE: `[n, 1, 1, 1 or W, B]`; needed unless all are isolated |
    """

    seeds: Tensor
    gates: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Way:
    """A join, prepared.

    | field | meaning |
    |---|---|
    | `composition`, `rows` | see `Join` |
    | `apart` | whether all its seeds are isolated |
    | `alone` | `[m]` int64, the isolated ones of its seeds where some but not all are |
    | `alpha` | `[n]`, 0 where isolated |
    | `share` | `[n]`, alpha, 1 where isolated |
    """

    composition: Composition
    rows: Tensor | None
    apart: bool
    alone: Tensor | None
    alpha: Tensor
    share: Tensor

    @classmethod
    def of(cls, joins: Sequence[Join]) -> _Way:
        """Prepare joins of one composition as one."""
        first, alpha = joins[0], torch.cat([join.alpha for join in joins])
        rows = (
            None if first.rows is None else torch.cat([join.rows for join in joins if join.rows is not None])
        )
        isolated = torch.cat(
            [torch.zeros_like(join.alpha, dtype=torch.bool) | join.isolated for join in joins]
        )
        alone = isolated.nonzero().view(-1)
        apart = len(alone) == len(isolated)
        return cls(
            first.composition,
            rows,
            apart,
            alone if 0 < len(alone) < len(isolated) else None,
            alpha.masked_fill(isolated, 0),
            alpha.masked_fill(isolated, 1),
        )


@dataclass(frozen=True, slots=True)
class Joins:
    """All joins of a slot, prepared once a pass.

    | field | meaning |
    |---|---|
    | `single` | each join by itself |
    | `merged` | neighbours of one composition as one, but those that are isolated throughout |
    | `members` | for each merged one: first and last + 1 of those it consists of |
    """

    single: tuple[_Way, ...]
    merged: tuple[_Way, ...]
    members: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, joins: Sequence[Join]) -> Joins:
        """Prepare joins of different rows.

        Raises:
            InvariantViolation: A join of all rows beside others.
        """
        if len(joins) > 1 and any(join.rows is None for join in joins):
            raise InvariantViolation(f"a join of all rows beside {len(joins) - 1} others")
        single = tuple(_Way.of([join]) for join in joins)
        members = []
        for _, run in itertools.groupby(
            range(len(joins)), lambda index: (single[index].composition, index if single[index].apart else -1)
        ):
            first, *rest = run
            members.append((first, first + 1 + len(rest)))
        merged = tuple(
            single[first] if last == first + 1 else _Way.of(joins[first:last]) for first, last in members
        )
        return cls(single, merged, tuple(members))


def seed_parameter_count(
    blueprint: Blueprint, composition: Composition, channels: int, kind: Kind = "image"
) -> int:
    """Length of a seed's flat row: the blueprint's pieces, and the gate's for GATE."""
    count = blueprint.parameter_count(channels, kind)
    return count + gate_parameter_count(channels) if composition is Composition.GATE else count


def initial_seed(
    blueprint: Blueprint,
    composition: Composition,
    channels: int,
    rng: np.random.Generator,
    kind: Kind = "image",
) -> NDArray[np.float64]:
    """A fresh flat row, `[seed_parameter_count]`: last layer zero for MULTIPLY, a gate behind it for GATE."""
    row = blueprint.initial_parameters(
        channels, rng, kind, starts_at_zero=composition is Composition.MULTIPLY
    )
    if composition is not Composition.GATE:
        return row
    return np.concatenate((row, initial_gate(channels, rng)))


def grow(
    blueprint: Blueprint,
    composition: Composition,
    parameters: Tensor,
    x: Tensor,
    kind: Kind = "image",
    *,
    isolated: bool = False,
) -> Grown:
    """Compute seeds of one blueprint and one composition.

    Args:
        blueprint: Of all n seeds.
        composition: Of all n seeds.
        parameters: `[n, seed_parameter_count]`.
        x: `[n, C, H, W, B]` features of their hosts; detached by the caller where no gradient may flow back.
        kind: What the features are.
        isolated: All n are in TRAINING, where gates have no effect and are not computed.
    """
    if composition is Composition.MULTIPLY:
        return Grown(blueprint.correction(parameters, x, kind))
    if composition is Composition.ADD:
        return Grown(blueprint.forward(parameters, x, kind))
    count = blueprint.parameter_count(x.shape[1], kind)
    own, gate_rows = torch.split(parameters, [count, parameters.shape[1] - count], dim=1)
    seeds = blueprint.forward(own, x, kind)
    return Grown(seeds, None if isolated else gate(gate_rows, x, kind))


def gate_pieces(channels: int) -> tuple[Piece, ...]:
    """Hidden weight and bias, last weight and bias."""
    hidden = max(GATE_HIDDEN_MIN, channels // 4)
    return (
        Piece(hidden * channels, channels),
        Piece(hidden, start="zeros"),
        Piece(hidden, hidden),
        Piece(1, start="zeros"),
    )


def gate_parameter_count(channels: int) -> int:
    """Parameters of one gate behind `channels` channels."""
    return sum(piece.size for piece in gate_pieces(channels))


def initial_gate(channels: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """A fresh gate, `[gate_parameter_count]`: weights uniform within `1 / sqrt(fan in)`, biases 0."""
    return initial_row(gate_pieces(channels), rng)


def gate(parameters: Tensor, x: Tensor, kind: Kind = "image") -> Tensor:
    """`sigmoid(w relu(W m(x) + b) + c)` with `m` the mean over positions (those seen so far in a text).

    Args:
        parameters: `[n, gate_parameter_count(C)]`.
        x: `[n, C, H, W, B]`.
        kind: What the features are.

    Returns:
        `[n, 1, 1, 1, B]`; `[n, 1, 1, W, B]` for tokens.
    """
    rows, channels, _, width, samples = x.shape
    sizes = [piece.size for piece in gate_pieces(channels)]
    weight, bias, last_weight, last_bias = torch.split(parameters, sizes, dim=1)
    if kind == "tokens":
        so_far = torch.arange(1, width + 1, dtype=x.dtype, device=x.device).view(-1, 1)
        pooled = x.sum(2).cumsum(2) / so_far
    else:
        pooled = x.mean((2, 3)).unsqueeze(2)
    flat = pooled.reshape(rows, channels, -1)
    hidden = torch.relu(torch.baddbmm(bias.unsqueeze(2), weight.reshape(rows, -1, channels), flat))
    logit = torch.baddbmm(last_bias.unsqueeze(2), last_weight.unsqueeze(1), hidden)
    return torch.sigmoid(logit).view(rows, 1, 1, -1, samples)


def compose(host: Tensor, joins: Joins, grown: Sequence[Grown]) -> Tensor:
    """Let the seeds of a slot join their hosts; the module's formulas.

    Args:
        host: `[R, C, H, W, B]` features of all rows.
        joins: How the seeds join.
        grown: What the seeds have computed, join by join.

    Returns:
        `[R, C, H, W, B]`; rows without a seed are untouched.

    Raises:
        InvariantViolation: Gates where there should be none, or the reverse.
    """
    ways = joins.single
    if not ways:
        return host
    for way, each in zip(ways, grown, strict=True):
        gated = way.composition is Composition.GATE
        if not way.apart and gated != (each.gates is not None):
            raise InvariantViolation(
                f"seeds are blended by {way.composition.name} {'without' if gated else 'with'} gates"
            )
    if len(joins.merged) < len(ways) and host.numel() <= MERGED_ELEMENTS_MAX:
        ways = joins.merged
        grown = [_together(grown[first:last]) for first, last in joins.members]
    tensors = [tensor for each in grown for tensor in (each.seeds, each.gates)]
    out: Tensor = _Compose.apply(host, ways, *tensors)
    return out


def _together(grown: Sequence[Grown]) -> Grown:
    if len(grown) == 1:
        return grown[0]
    gates = [each.gates for each in grown if each.gates is not None]
    return Grown(torch.cat([each.seeds for each in grown]), torch.cat(gates) if gates else None)


class _Compose(Function):
    """All joins of a slot; see `compose`. Tensors come in pairs: seeds and gates of each join."""

    @staticmethod
    def forward(ctx: Any, host: Tensor, ways: tuple[_Way, ...], *tensors: Tensor) -> Tensor:
        ctx.ways = ways
        out = host
        saved: list[Tensor | None] = []
        for index, way in enumerate(ways):
            if way.apart:
                saved += (None, None, None)
                continue
            mine = host if way.rows is None else host.index_select(0, way.rows)
            blended, kept = _blend(way, mine, *tensors[2 * index : 2 * index + 2])
            saved += kept
            if way.rows is None:
                out = blended
            else:
                out = host.clone() if out is host else out
                out.index_copy_(0, way.rows, blended)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        g_host = gradient
        others: list[Tensor | None] = []
        for index, way in enumerate(ctx.ways):
            g = gradient if way.rows is None else gradient.index_select(0, way.rows)
            if way.apart:
                others += (g, None)
                continue
            g_mine, g_seeds, g_gates = _gradients(way, g, *saved[3 * index : 3 * index + 3])
            others += (g_seeds, g_gates)
            if way.rows is None:
                g_host = g_mine
            else:
                g_host = gradient.clone() if g_host is gradient else g_host
                g_host.index_copy_(0, way.rows, g_mine)
        return g_host, None, *others


def _blend(
    way: _Way, host: Tensor, seeds: Tensor, gates: Tensor | None
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The output of a join's rows, and what `_gradients` needs."""
    alpha = _per_row(way.alpha, host)
    kept: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if way.composition is Composition.MULTIPLY:
        modulation = torch.tanh(seeds)
        out = (modulation * alpha).add_(1).mul_(host)
        kept = (host, modulation, None)
    elif gates is None:
        out = torch.lerp(host, seeds, alpha)
    else:
        out = torch.lerp(host, seeds, alpha * gates)
        kept = (host, seeds, gates)
    return _restored(out, host, way.alone), kept


def _gradients(
    way: _Way, g: Tensor, host: Tensor, kept: Tensor, gates: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of a join's rows of the host, of its seeds and of its gates; `kept` is `t` for MULTIPLY, else `s`."""
    alpha = _per_row(way.alpha, g)
    g_gates = None
    if way.composition is Composition.MULTIPLY:
        g_seeds = (kept * kept).neg_().add_(1).mul_(host).mul_(alpha).mul_(g)
        g_host = (kept * alpha).add_(1).mul_(g)
    elif gates is None:
        return g * (1 - alpha), g * _per_row(way.share, g), None
    else:
        weight = alpha * gates
        g_host, g_seeds = g * (1 - weight), g * weight
        g_gates = (kept - host).mul_(g).sum_to_size(gates.shape).mul_(alpha)
        if way.alone is not None:
            g_gates.index_fill_(0, way.alone, 0)
    return _restored(g_host, g, way.alone), _restored(g_seeds, g, way.alone), g_gates


def _restored(blended: Tensor, untouched: Tensor, alone: Tensor | None) -> Tensor:
    """Isolated rows put back, in place: with a weight of 0 alone, a seed's NaN would reach its host."""
    if alone is None:
        return blended
    return blended.index_copy_(0, alone, untouched.index_select(0, alone))


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *([1] * (like.dim() - 1)))
