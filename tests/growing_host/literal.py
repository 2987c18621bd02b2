"""The slow literal truth: one growing host in ordinary torch modules, one after another, nothing batched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_simic.lifecycle import SeedStage


def light(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(1, channels), nn.ReLU()
    )


class Norm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.normalise = nn.GroupNorm(1, channels)
        self.strength = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        return x + self.strength * (self.normalise(x) - x)


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 4)
        self.squeeze = nn.Linear(channels, hidden, bias=False)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Any:
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


def module(name: str, channels: int) -> nn.Module:
    """An ordinary module that computes what the blueprint of this name computes."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "norm": lambda: Norm(channels),
        "attention": lambda: Attention(channels),
        "depthwise": lambda: nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.GroupNorm(1, channels),
            nn.ReLU(),
        ),
        "conv_light": lambda: light(channels),
        "conv_heavy": lambda: nn.Sequential(light(channels), light(channels)),
    }
    return makers[name]()


def flat(made: nn.Module) -> list[nn.Parameter]:
    """Parameters in the order of the blueprint's flat row."""
    parameters = list(made.parameters())
    # A module lists its own parameters before its children's; the blueprint's row ends with the strength.
    return parameters[1:] + parameters[:1] if isinstance(made, Norm) else parameters


def load(parameters: list[nn.Parameter], row: np.ndarray) -> None:
    start = 0
    for parameter in parameters:
        values = row[start : start + parameter.numel()]
        parameter.data = torch.tensor(values, dtype=torch.float64).view(parameter.shape)
        start += parameter.numel()
    assert start == len(row)


def row_of(parameters: list[nn.Parameter]) -> np.ndarray:
    return torch.cat([parameter.detach().flatten() for parameter in parameters]).numpy()


@dataclass
class LiteralSeed:
    made: nn.Module
    stage: SeedStage
    alpha: float
    optimiser: torch.optim.SGD
    norms: list[float] = field(default_factory=list)


class LiteralHost:
    """One host with its seeds; a seed sits behind block s before its pool."""

    def __init__(
        self, row: np.ndarray, *, channels_in: int = 1, lr: float, momentum: float, clip: float
    ) -> None:
        widths = (channels_in, 1, 2, 4)
        self.convolutions = [nn.Conv2d(widths[i], widths[i + 1], 1, bias=False).double() for i in range(3)]
        self.norms = [nn.BatchNorm2d(width).double() for width in widths[1:]]
        self.classifier = nn.Linear(4, 10).double()
        self.parameters: list[nn.Parameter] = [
            parameter
            for convolution, norm in zip(self.convolutions, self.norms, strict=True)
            for parameter in (*convolution.parameters(), *norm.parameters())
        ] + list(self.classifier.parameters())
        load(self.parameters, row)
        self.momentum, self.clip = momentum, clip
        self.optimiser = torch.optim.SGD(self.parameters, lr=lr, momentum=momentum)
        self.seeds: dict[int, LiteralSeed] = {}

    def add_seed(
        self, slot: int, name: str, row: np.ndarray, stage: SeedStage, alpha: float, lr: float
    ) -> None:
        made = module(name, (1, 2, 4)[slot]).double()
        load(flat(made), row)
        optimiser = torch.optim.SGD(flat(made), lr=lr, momentum=self.momentum)
        self.seeds[slot] = LiteralSeed(made, stage, alpha, optimiser)

    def forward(self, x: Tensor, off: int | None = None) -> Any:
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = torch.relu(norm(convolution(x)))
            seed = self.seeds.get(index)
            if seed is not None and index != off:
                grown = seed.made(x.detach())
                if seed.stage is SeedStage.TRAINING:
                    x = x + (grown - grown.detach())
                else:
                    x = (1 - seed.alpha) * x + seed.alpha * grown
            x = F.max_pool2d(x, 2)
        return self.classifier(x.mean((2, 3)))

    def train_batch(self, images: Tensor, labels: Tensor) -> None:
        for norm in self.norms:
            norm.train()
        optimisers = [self.optimiser, *(seed.optimiser for seed in self.seeds.values())]
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=False)
        F.cross_entropy(self.forward(images), labels).backward()
        for seed in self.seeds.values():
            seed.norms.append(float(nn.utils.clip_grad_norm_(flat(seed.made), self.clip)))
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for optimiser in optimisers:
            optimiser.step()

    def measure(self, images: Tensor, labels: Tensor, off: int | None = None) -> tuple[float, float]:
        for norm in self.norms:
            norm.eval()
        with torch.no_grad():
            logits = self.forward(images, off)
        accuracy = float((logits.argmax(1) == labels).double().mean()) * 100
        return accuracy, float(F.cross_entropy(logits, labels))
