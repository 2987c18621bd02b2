"""The slow literal truth of every blueprint: one seed as an ordinary torch module, in torch's own layout.

Images are `[samples, channels, height, width]`, series `[samples, channels, width]`, texts `[samples, positions,
channels]`, vectors `[samples, channels]`. `forward` gives a seed's features, `correction` what it adds to its input.
Parameters are registered in the order of the blueprint's flat row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("image", "series", "vector", "tokens")


def to_torch(x: Tensor, kind: str) -> Tensor:
    """One row's features `[C, H, W, B]` in torch's layout of their kind."""
    if kind == "image":
        return x.permute(3, 0, 1, 2)
    if kind == "series":
        return x[:, 0].permute(2, 0, 1)
    return x[:, 0].permute(2, 1, 0) if kind == "tokens" else x[:, 0, 0].t()


def from_torch(x: Tensor, kind: str) -> Tensor:
    """The inverse of `to_torch`."""
    if kind == "image":
        return x.permute(1, 2, 3, 0)
    if kind == "series":
        return x.permute(1, 2, 0)[:, None]
    return x.permute(2, 1, 0)[:, None] if kind == "tokens" else x.t()[:, None, None]


def convolution(kind: str, inputs: int, outputs: int, size: int, *, groups: int = 1) -> nn.Module:
    make = nn.Conv2d if kind == "image" else nn.Conv1d
    return make(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)


def group_norm(channels: int) -> nn.GroupNorm:
    groups = max(1, channels // 16)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)


class Seed(nn.Module):
    """A residual seed."""

    def correction(self, x: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        return x + self.correction(x)


class Norm(Seed):
    def __init__(self, normalise: nn.Module) -> None:
        super().__init__()
        self.normalise = normalise
        self.wrapped = nn.ParameterList([torch.zeros(1)])  # behind the children's parameters, as in the row

    def correction(self, x: Tensor) -> Any:
        return self.wrapped[0] * (self.normalise(x) - x)


class Attention(Seed):
    """Squeeze-and-excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 4)
        self.squeeze = nn.Linear(channels, hidden, bias=False)
        self.excite = nn.Linear(hidden, channels)

    def gate(self, x: Tensor) -> Any:
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.flatten(2).mean(2)))))
        return gate.view(*gate.shape, *([1] * (x.dim() - 2)))

    def correction(self, x: Tensor) -> Any:
        return x * (2 * self.gate(x)) - x

    def forward(self, x: Tensor) -> Any:
        return x * self.gate(x)


class Rectified(Seed):
    """Layers behind each other; a ReLU behind the last in features only."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def correction(self, x: Tensor) -> Any:
        return self.layers(x)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.layers(x))


class Bottleneck(Seed):
    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        hidden = max(8, channels // 4)
        self.layers = nn.Sequential(
            convolution(kind, channels, hidden, 1),
            nn.ReLU(),
            convolution(kind, hidden, hidden, 3),
            nn.ReLU(),
            convolution(kind, hidden, channels, 1),
            group_norm(channels),
        )

    def correction(self, x: Tensor) -> Any:
        return self.layers(x)


class Chain(Seed):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def correction(self, x: Tensor) -> Any:
        return self.layers(x)


class CausalAttention(Seed):
    """Position by position, head by head, softmax over what came before, at most `window` positions back."""

    def __init__(self, channels: int, window: int | None = None) -> None:
        super().__init__()
        self.heads = max(h for h in range(1, 7) if channels % h == 0 and (h == 1 or channels // h >= 8))
        self.window = window
        self.mixed = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def correction(self, x: Tensor) -> Any:
        query, key, value = self.mixed(x).chunk(3, dim=2)
        size = query.shape[2] // self.heads
        outputs = []
        for head in range(self.heads):
            part = slice(head * size, (head + 1) * size)
            rows = []
            for position in range(x.shape[1]):
                first = 0 if self.window is None else max(0, position - self.window + 1)
                seen = slice(first, position + 1)
                scores = (query[:, position, None, part] * key[:, seen, part]).sum(2) / math.sqrt(size)
                rows.append((torch.softmax(scores, dim=1)[:, :, None] * value[:, seen, part]).sum(1))
            outputs.append(torch.stack(rows, dim=1))
        return self.out(torch.cat(outputs, dim=2))


def module(name: str, kind: str, channels: int) -> Seed:
    """An ordinary module that computes what the blueprint of this name computes."""

    def light() -> tuple[nn.Module, nn.Module]:
        return convolution(kind, channels, channels, 3), group_norm(channels)

    def low_rank(rank: int) -> Chain:
        return Chain(nn.Linear(channels, rank, bias=False), nn.Linear(rank, channels, bias=False))

    def perceptron(hidden: int) -> Chain:
        return Chain(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))

    pictures = kind in ("image", "series")
    makers: dict[str, Callable[[], Seed]] = {
        "norm": lambda: Norm(group_norm(channels) if pictures else nn.LayerNorm(channels)),
        "attention": lambda: Attention(channels) if pictures else CausalAttention(channels),
        "flex_attention": lambda: CausalAttention(channels, 16),
        "conv_small": lambda: Rectified(convolution(kind, channels, channels, 1), group_norm(channels)),
        "depthwise": lambda: Rectified(
            convolution(kind, channels, channels, 3, groups=channels),
            convolution(kind, channels, channels, 1),
            group_norm(channels),
        ),
        "bottleneck": lambda: Bottleneck(kind, channels),
        "conv_light": lambda: Rectified(*light()),
        "conv_heavy": lambda: Rectified(*light(), nn.ReLU(), *light()),
        "lora": lambda: low_rank(8),
        "lora_large": lambda: low_rank(32),
        "mlp_small": lambda: perceptron(2 * channels),
        "mlp": lambda: perceptron(4 * channels),
    }
    return makers[name]().double()


class Gate(nn.Module):
    """Share of a seed that is let through, `[samples]`, or `[samples, positions]` of texts."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(8, channels // 4)
        self.layers = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor, kind: str) -> Any:
        if kind == "tokens":
            means = [x[:, : position + 1].mean(1) for position in range(x.shape[1])]
            return self.layers(torch.stack(means, dim=1))[..., 0]
        return self.layers(x.flatten(2).mean(2) if x.dim() > 2 else x)[..., 0]


def load(made: nn.Module, row: Tensor) -> None:
    """Give a module the values of a flat row."""
    start = 0
    for parameter in made.parameters():
        parameter.data = row[start : start + parameter.numel()].detach().clone().view(parameter.shape)
        start += parameter.numel()
    assert start == len(row), f"{start} parameters in the module, {len(row)} in the row"


def gradient_row(out: Tensor, made: nn.Module, *others: Tensor) -> tuple[Tensor, ...]:
    """Gradient of a number with respect to a module's flat row, and to other tensors."""
    parameters = list(made.parameters())
    found = torch.autograd.grad(out, [*parameters, *others])
    return torch.cat([each.flatten() for each in found[: len(parameters)]]), *found[len(parameters) :]
