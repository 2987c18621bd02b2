"""Hosts: the networks that are grown, as shapes and a layout of flat parameters.

A host is a chain: a stem, blocks, a head. All parameters of one host lie in one flat row, in the order of
`HostSpec.pieces`, so that a step of the optimiser is a row-wise operation for any number of hosts. Every layer
computes any number of hosts at once, in the layout `[row, channels, height, width, samples]` (`layers.py`); series
have height 1, vectors one position, and the positions of a text lie along the width. Slots sit behind blocks: `r0c{i}`
behind block i before its pool, `r1c{i}` behind its pool.
"""

from __future__ import annotations

from esper_simic.growing_host.hosts.catalogue import (
    HOSTS,
    ConvolutionalHost,
    TaskShape,
    TransformerHost,
    build_host,
)
from esper_simic.growing_host.hosts.layers import Shape, Statistics
from esper_simic.growing_host.hosts.spec import HostPieces, HostSpec, SlotPlace

__all__ = [
    "HOSTS",
    "ConvolutionalHost",
    "HostPieces",
    "HostSpec",
    "Shape",
    "SlotPlace",
    "Statistics",
    "TaskShape",
    "TransformerHost",
    "build_host",
]
