"""Copies of whole lanes, kept for the case that a host breaks down.

The governor says when a lane is worth a copy and when it must be put back; what is copied is everything that training
changes: parameters, momentum and running statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_simic.growing_host.hosts import Statistics
from esper_simic.growing_host.parameters import LaneCopy, ParameterBank


class LaneKeeper:
    """Keeps one copy of each lane of a bank, in main memory.

    Args:
        bank: The parameters of E hosts.
    """

    def __init__(self, bank: ParameterBank) -> None:
        self._bank = bank
        self._every = np.arange(bank.lanes)
        self._kept = bank.snapshot(self._every)

    def keep(self, lanes: NDArray[np.int64]) -> None:
        """Replace the copies of some lanes by what they are now."""
        if not len(lanes):
            return
        chosen = torch.from_numpy(lanes)
        fresh = self._bank.snapshot(lanes)
        for kept, new in zip(_tensors(self._kept), _tensors(fresh), strict=True):
            kept.index_copy_(0, chosen, new)

    def put_back(self, lanes: NDArray[np.int64]) -> None:
        """Make some lanes what they were when they were kept, without momentum."""
        chosen = torch.from_numpy(lanes)
        kept = self._kept
        rows = LaneCopy(
            kept.parameters[chosen],
            kept.momentum[chosen],
            tuple(Statistics(each.mean[chosen], each.variance[chosen]) for each in kept.statistics),
        )
        self._bank.restore(lanes, rows)
        self._bank.clear_momentum(lanes)

    def state_of_bank(self) -> dict[str, Any]:
        """The bank as it is now, as arrays."""
        return _arrays(self._bank.snapshot(self._every))

    def load_bank(self, state: Mapping[str, Any]) -> None:
        """Make the bank what `state_of_bank` gave."""
        self._bank.restore(self._every, _copy_of(state))

    def state_dict(self) -> dict[str, Any]:
        """The copies that are kept, as arrays."""
        return _arrays(self._kept)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep what `state_dict` gave.

        Raises:
            ValueError: It is of other lanes or hosts.
        """
        mine, theirs = _tensors(self._kept), _tensors(_copy_of(state))
        if [tensor.shape for tensor in mine] != [tensor.shape for tensor in theirs]:
            raise ValueError("the kept lanes are of other hosts, or of another number of them")
        for kept, new in zip(mine, theirs, strict=True):
            kept.copy_(new)


def _tensors(copy: LaneCopy) -> list[Tensor]:
    statistics = [tensor for each in copy.statistics for tensor in (each.mean, each.variance)]
    return [copy.parameters, copy.momentum, *statistics]


def _arrays(copy: LaneCopy) -> dict[str, Any]:
    return {
        "parameters": copy.parameters.numpy().copy(),
        "momentum": copy.momentum.numpy().copy(),
        "means": [each.mean.numpy().copy() for each in copy.statistics],
        "variances": [each.variance.numpy().copy() for each in copy.statistics],
    }


def _copy_of(state: Mapping[str, Any]) -> LaneCopy:
    pairs = zip(state["means"], state["variances"], strict=True)
    return LaneCopy(
        torch.tensor(state["parameters"]),
        torch.tensor(state["momentum"]),
        tuple(Statistics(torch.tensor(mean), torch.tensor(variance)) for mean, variance in pairs),
    )
