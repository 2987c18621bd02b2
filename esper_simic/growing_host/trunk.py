"""The way of features through a host: block, slot, pool, slot, block after block; and how lanes are cut into tiles."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import Tensor

from esper_simic.growing_host.hosts import SlotPlace
from esper_simic.growing_host.hosts.convolutional import max_pool
from esper_simic.growing_host.hosts.layers import Block


def walk(
    blocks: tuple[Block, ...],
    places: tuple[SlotPlace, ...],
    x: Tensor,
    block: Callable[[int, Tensor], Tensor],
    slot: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Lead features through all blocks and slots, in data-flow order.

    Args:
        blocks: The host's blocks.
        places: Where the slots are.
        x: Features behind the stem.
        block: Index of a block and features in front of it to features behind it.
        slot: Index of a slot and features in front of it to features behind it.
    """
    by_place = {(place.block, place.behind_pool): index for index, place in enumerate(places)}
    for index, layer in enumerate(blocks):
        x = block(index, x)
        if (index, False) in by_place:
            x = slot(by_place[index, False], x)
        if layer.pool is not None:
            x = max_pool(x, layer.pool)
        if (index, True) in by_place:
            x = slot(by_place[index, True], x)
    return x


def flow_order(places: tuple[SlotPlace, ...]) -> list[int]:
    """Slots in the order in which features meet them."""
    return sorted(range(len(places)), key=lambda slot: (places[slot].block, places[slot].behind_pool))


def tiles(lanes: int, lane_elements: int, tile_elements: int) -> list[tuple[int, int]]:
    """Cut lanes into tiles of nearly equal size: `(start, end)` of each.

    Args:
        lanes: Number of lanes.
        lane_elements: Numbers a lane's widest features have.
        tile_elements: Numbers all lanes of a tile may have; a tile has one lane at least.
    """
    largest = max(1, tile_elements // lane_elements)
    count = -(-lanes // largest)
    bounds = [lanes * index // count for index in range(count + 1)]
    return list(itertools.pairwise(bounds))
