"""The hosts there are, by name, and how each is shaped for a task.

| host | blocks | kernel | pools | parameters (3x32x32, 10 classes) | what it is for |
|---|---|---|---|---|---|
| `rescue` | 1, 2, 4 | 1x1 | 3 | 77 | far too small for its task: seeds must rescue it |
| `minimal` | 2, 4, 8 | 1x1 | 0 | 164 | sees no neighbourhood at all: seeds carry everything |
| `deep_impaired` | 2 to 32 | 1x1 | 5 | 1 140 | rescue in ten slots |
| `augment` | 8, 16, 32 | 3x3 | 3 | 6 418 | able by itself: seeds augment it |
| `highres` | 16, 32, 64 | 3x3 | 3 | 24 346 | places before and behind a pool to choose from |
| `scale` | 8 to 128 | 3x3 | 5 | 99 922 | depth and width |
| `series` | 2, 4, 8 | 1x3 | 3 | | one-dimensional signals |
| `mlp` | 2, 4, 8 | | 0 | | feature vectors |
| `transformer` | 3 of width 16, 2 heads | | 0 | | the next token of a text |
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Final, Protocol

from esper_simic.errors import ConfigError
from esper_simic.growing_host.blueprints import Kind
from esper_simic.growing_host.hosts.convolutional import ClassifierHead, ConvolutionBlock, PlainStem
from esper_simic.growing_host.hosts.layers import Shape
from esper_simic.growing_host.hosts.spec import HostSpec
from esper_simic.growing_host.hosts.transformer import TokenHead, TokenStem, TransformerBlock


class TaskShape(Protocol):
    """What a host must know of a task; for tokens the width is the number of positions, the classes the vocabulary."""

    @property
    def name(self) -> str:
        """Name of the task."""
        ...

    @property
    def kind(self) -> Kind:
        """Kind of its samples."""
        ...

    @property
    def classes(self) -> int:
        """Labels a sample or position can have."""
        ...

    @property
    def channels(self) -> int:
        """Channels of a sample."""
        ...

    @property
    def height(self) -> int:
        """Height of a sample."""
        ...

    @property
    def width(self) -> int:
        """Width of a sample."""
        ...


@dataclass(frozen=True, slots=True)
class ConvolutionalHost:
    """A chain of convolution blocks; `pools` counts the first blocks that pool."""

    kind: Kind
    channels: tuple[int, ...]
    kernel: int
    pools: int

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.channels)

    def build(self, name: str, task: TaskShape) -> HostSpec:
        """Shape it for a task.

        Raises:
            ConfigError: A pool would meet an odd side.
        """
        self._check_sides(name, task)
        height_step = 1 if self.kind == "series" else 2
        kernel = (1 if self.kind == "series" else self.kernel, self.kernel)
        shape = Shape(task.channels, task.height, task.width)
        stem, blocks = PlainStem(shape), []
        for index, channels in enumerate(self.channels):
            pool = (height_step, 2) if index < self.pools else None
            output = Shape(channels, shape.height, shape.width)
            blocks.append(ConvolutionBlock(shape.channels, output, kernel, pool))
            shape = output if pool is None else Shape(channels, shape.height // height_step, shape.width // 2)
        head = ClassifierHead(self.channels[-1], task.classes)
        return HostSpec(name, self.kind, stem, tuple(blocks), head, task.classes)

    def _check_sides(self, name: str, task: TaskShape) -> None:
        sides = (task.width,) if self.kind == "series" else (task.height, task.width)
        shrink = 2**self.pools
        if all(side % shrink == 0 for side in sides):
            return
        fewer = [
            other
            for other, host in HOSTS.items()
            if isinstance(host, ConvolutionalHost)
            and host.kind == self.kind
            and all(side % 2**host.pools == 0 for side in sides)
        ]
        remedy = f"resize the task's samples to a multiple of {shrink}"
        if fewer:
            remedy += f", or choose a host with fewer pools ({', '.join(fewer)})"
        raise ConfigError(
            f"host {name!r} halves its samples {self.pools} times and needs sides that {shrink} divides; task "
            f"{task.name!r} has {' x '.join(str(side) for side in sides)}: {remedy}",
            "environment.host",
        )


@dataclass(frozen=True, slots=True)
class TransformerHost:
    """A chain of transformer blocks."""

    width: int
    heads: int
    blocks: int
    kind: Kind = "tokens"

    def build(self, name: str, task: TaskShape) -> HostSpec:
        """Shape it for a task: as many positions as the task's samples have, its vocabulary."""
        shape = Shape(self.width, 1, task.width)
        blocks = tuple(TransformerBlock(shape, self.heads) for _ in range(self.blocks))
        stem, head = TokenStem(task.classes, shape), TokenHead(self.width, task.classes)
        return HostSpec(name, self.kind, stem, blocks, head, task.classes)


HOSTS: Final[dict[str, ConvolutionalHost | TransformerHost]] = {
    "rescue": ConvolutionalHost("image", (1, 2, 4), 1, 3),
    "minimal": ConvolutionalHost("image", (2, 4, 8), 1, 0),
    "deep_impaired": ConvolutionalHost("image", (2, 4, 8, 16, 32), 1, 5),
    "augment": ConvolutionalHost("image", (8, 16, 32), 3, 3),
    "highres": ConvolutionalHost("image", (16, 32, 64), 3, 3),
    "scale": ConvolutionalHost("image", (8, 16, 32, 64, 128), 3, 5),
    "series": ConvolutionalHost("series", (2, 4, 8), 3, 3),
    "mlp": ConvolutionalHost("vector", (2, 4, 8), 1, 0),
    "transformer": TransformerHost(16, 2, 3),
}
"""Name to host."""


def build_host(name: str, task: TaskShape) -> HostSpec:
    """The host of this name, shaped for a task.

    Raises:
        ConfigError: No host has this name, it takes samples of another kind, or its pools do not fit.
    """
    host = HOSTS.get(name)
    if host is None:
        near = difflib.get_close_matches(name, HOSTS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown host {name!r}{hint}; known: {', '.join(HOSTS)}", "environment.host")
    if host.kind != task.kind:
        fitting = [other for other, candidate in HOSTS.items() if candidate.kind == task.kind]
        raise ConfigError(
            f"host {name!r} takes samples of kind {host.kind!r}; task {task.name!r} has {task.kind!r}: "
            f"choose {' or '.join(fitting)}",
            "environment.host",
        )
    return host.build(name, task)
