"""The slow literal truth: one growing host in ordinary torch modules, in torch's own layout, nothing batched.

Features are `[samples, channels, height, width]` for convolutions and `[samples, positions, width]` for transformers.
A seed is computed by its blueprint for one host alone (`test_blueprints.py` compares those with ordinary modules); how
it is blended in, isolated, clipped and moved is spelled out here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_simic.growing_host.alpha import Composition
from esper_simic.growing_host.blueprints import Blueprint
from esper_simic.growing_host.hosts import HostSpec
from esper_simic.growing_host.hosts.convolutional import ConvolutionBlock
from esper_simic.growing_host.hosts.layers import Block
from esper_simic.growing_host.hosts.transformer import TransformerBlock
from esper_simic.lifecycle import SeedStage


class LiteralConvolution(nn.Module):
    def __init__(self, block: ConvolutionBlock) -> None:
        super().__init__()
        padding = (block.kernel[0] // 2, block.kernel[1] // 2)
        self.convolution = nn.Conv2d(
            block.channels_in, block.output.channels, block.kernel, padding=padding, bias=False
        )
        self.norm = nn.BatchNorm2d(block.output.channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.relu(self.norm(self.convolution(x)))
        return out


class LiteralTransformer(nn.Module):
    def __init__(self, block: TransformerBlock) -> None:
        super().__init__()
        width = block.output.channels
        self.heads = block.heads
        self.first = nn.LayerNorm(width)
        self.mixed = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.second = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 4 * width)
        self.outer = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attend(self.mixed(self.first(x))))
        out: Tensor = x + self.outer(F.gelu(self.inner(self.second(x))))
        return out

    def attend(self, mixed: Tensor) -> Tensor:
        """Position by position, head by head, softmax over what came before."""
        query, key, value = mixed.chunk(3, dim=2)
        size = query.shape[2] // self.heads
        outputs = []
        for head in range(self.heads):
            part = slice(head * size, (head + 1) * size)
            rows = []
            for position in range(mixed.shape[1]):
                seen = slice(0, position + 1)
                scores = (query[:, position, None, part] * key[:, seen, part]).sum(2) / math.sqrt(size)
                weights = torch.softmax(scores, dim=1)
                rows.append((weights[:, :, None] * value[:, seen, part]).sum(1))
            outputs.append(torch.stack(rows, dim=1))
        return torch.cat(outputs, dim=2)


def literal_block(block: Block) -> nn.Module:
    if isinstance(block, TransformerBlock):
        return LiteralTransformer(block)
    assert isinstance(block, ConvolutionBlock)
    return LiteralConvolution(block)


@dataclass
class LiteralSeed:
    blueprint: Blueprint
    row: Tensor
    stage: SeedStage
    alpha: float
    composition: Composition
    frozen: bool
    momentum: Tensor
    norms: list[float] = field(default_factory=list)


class LiteralHost:
    """One host with its seeds, by slot name."""

    def __init__(
        self, spec: HostSpec, row: np.ndarray, *, lr: float, seed_lr: float, momentum: float, clip: float
    ):
        self.spec = spec
        self.tokens = spec.kind == "tokens"
        self.blocks: list[nn.Module] = [literal_block(block) for block in spec.blocks]
        width = spec.blocks[-1].output.channels
        self.stem: list[nn.Parameter] = []
        if self.tokens:
            positions = spec.blocks[0].output.width
            self.embedding = nn.Parameter(torch.zeros(spec.classes, width))
            self.places = nn.Parameter(torch.zeros(width, positions))
            self.stem = [self.embedding, self.places]
            self.head: nn.Module = nn.LayerNorm(width)
        else:
            self.head = nn.Linear(width, spec.classes)
        modules = [*self.blocks, self.head]
        self.parameters = [*self.stem, *(each for module in modules for each in module.double().parameters())]
        start = 0
        for parameter in self.parameters:
            values = torch.tensor(row[start : start + parameter.numel()], dtype=torch.float64)
            parameter.data = values.view(parameter.shape)
            start += parameter.numel()
        assert start == len(row)
        self.lr, self.seed_lr, self.momentum, self.clip = lr, seed_lr, momentum, clip
        self.velocity = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.seeds: dict[str, LiteralSeed] = {}

    def row(self) -> np.ndarray:
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters]).numpy()

    def train(self, on: bool) -> None:
        for block in self.blocks:
            block.train(on)

    def forward(self, inputs: Tensor, keep: set[str] | None = None) -> Tensor:
        """Logits `[samples, classes]`, or `[samples, positions, classes]` of tokens."""
        x = self.embedding[inputs] + self.places.t() if self.tokens else inputs
        for index, (block, layer) in enumerate(zip(self.blocks, self.spec.blocks, strict=True)):
            x = self.grow(f"r0c{index}", block(x), keep)
            if layer.pool is not None:
                x = self.grow(f"r1c{index}", F.max_pool2d(x, layer.pool), keep)
        logits: Tensor = self.head(x) @ self.embedding.t() if self.tokens else self.head(x.mean((2, 3)))
        return logits

    def grow(self, slot: str, x: Tensor, keep: set[str] | None) -> Tensor:
        seed = self.seeds.get(slot)
        if seed is None or (keep is not None and slot not in keep):
            return x
        apart = not self.tokens or seed.stage is SeedStage.TRAINING
        met = x.detach() if apart else x
        grown, gate = self.alone(seed, met)
        if seed.stage is SeedStage.TRAINING:
            return x + (grown - grown.detach())
        if seed.composition is Composition.MULTIPLY:
            return x * (1 + seed.alpha * torch.tanh(grown))
        return x + seed.alpha * gate * (grown - x)

    def alone(self, seed: LiteralSeed, x: Tensor) -> tuple[Tensor, Tensor]:
        """The features of one host's seed, or its correction for MULTIPLY, and its gate (1 unless GATE)."""
        channels = x.shape[2] if self.tokens else x.shape[1]
        count = seed.blueprint.parameter_count(channels, self.spec.kind)
        multiply = seed.composition is Composition.MULTIPLY
        compute = seed.blueprint.correction if multiply else seed.blueprint.forward
        own, gate_row = seed.row[None, :count], seed.row[count:]
        gate = self.gate(gate_row, x) if len(gate_row) else torch.ones((), dtype=torch.float64)
        if self.tokens:
            laid = x.permute(2, 1, 0)[None, :, None].contiguous()
            return compute(own, laid, "tokens")[0, :, 0].permute(2, 1, 0), gate
        laid = x.permute(1, 2, 3, 0)[None].contiguous()
        return compute(own, laid, self.spec.kind)[0].permute(3, 0, 1, 2), gate

    def gate(self, row: Tensor, x: Tensor) -> Tensor:
        """Pool, linear, ReLU, linear, sigmoid; of a text at each position, over what came before."""
        channels = x.shape[2] if self.tokens else x.shape[1]
        hidden = max(8, channels // 4)
        weight, bias, last, last_bias = torch.split(row, [hidden * channels, hidden, hidden, 1])

        def score(pooled: Tensor) -> Tensor:
            inner = torch.relu(pooled @ weight.view(hidden, channels).t() + bias)
            return torch.sigmoid(inner @ last + last_bias)

        if self.tokens:
            means = [x[:, : position + 1].mean(1) for position in range(x.shape[1])]
            return torch.stack([score(mean) for mean in means], dim=1)[:, :, None]
        return score(x.mean((2, 3)))[:, None, None, None]

    def loss(self, inputs: Tensor, labels: Tensor, keep: set[str] | None = None) -> Tensor:
        logits = self.forward(inputs, keep)
        return F.cross_entropy(logits.reshape(-1, self.spec.classes), labels.reshape(-1))

    def train_batch(self, inputs: Tensor, labels: Tensor) -> None:
        self.train(True)
        for seed in self.seeds.values():
            seed.row.requires_grad_()
        rows = [seed.row for seed in self.seeds.values()]
        gradients = torch.autograd.grad(self.loss(inputs, labels), [*self.parameters, *rows])
        host, others = gradients[: len(self.parameters)], gradients[len(self.parameters) :]
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in host))
        share = min(1.0, self.clip / (norm + 1e-6))
        with torch.no_grad():
            for parameter, velocity, gradient in zip(self.parameters, self.velocity, host, strict=True):
                velocity.mul_(self.momentum).add_(gradient * share)
                parameter.sub_(self.lr * velocity)
            for seed, gradient in zip(self.seeds.values(), others, strict=True):
                norm = float(gradient.norm())
                seed.norms.append(norm)
                if seed.frozen:
                    continue
                seed.momentum = self.momentum * seed.momentum + gradient * min(1.0, self.clip / (norm + 1e-6))
                seed.row = seed.row.detach() - self.seed_lr * seed.momentum

    def measure(self, inputs: Tensor, labels: Tensor, keep: set[str] | None = None) -> tuple[float, float]:
        """Accuracy in percent and mean loss, with the seeds in `keep` only."""
        self.train(False)
        with torch.no_grad():
            right = self.forward(inputs, keep).argmax(-1) == labels
            return float(right.double().mean()) * 100, float(self.loss(inputs, labels, keep))
