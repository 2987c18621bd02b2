"""The order in which lanes see their training samples."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


class SampleOrders:
    """Each lane walks through its own shuffle of the training samples and shuffles again when it runs out.

    Args:
        lanes: Number of lanes.
        available: Training samples.
        batches: Batches in an epoch.
        batch_size: Samples in a batch.
    """

    def __init__(self, lanes: int, available: int, batches: int, batch_size: int) -> None:
        self._available = available
        self._shape = (lanes, batches, batch_size)
        self._needed = batches * batch_size
        self._shuffles = math.ceil(self._needed / available)
        self._orders = np.zeros((lanes, self._shuffles * available), dtype=np.int64)
        self._cursors = np.full(lanes, self._orders.shape[1])

    def restart(self, lane: int) -> None:
        """Forget a lane's order; its next epoch begins with a fresh shuffle."""
        self._cursors[lane] = self._orders.shape[1]

    def next_epoch(self, generators: list[np.random.Generator]) -> NDArray[np.int64]:
        """Samples of every lane's next epoch: `[batches, E, B]`.

        Args:
            generators: Each lane's own stream; used only by lanes that shuffle.
        """
        for lane in np.flatnonzero(self._cursors + self._needed > self._orders.shape[1]):
            shuffles = [generators[lane].permutation(self._available) for _ in range(self._shuffles)]
            self._orders[lane] = np.concatenate(shuffles)
            self._cursors[lane] = 0
        columns = self._cursors[:, None] + np.arange(self._needed)
        self._cursors += self._needed
        chosen = np.take_along_axis(self._orders, columns, axis=1).reshape(self._shape)
        return np.ascontiguousarray(chosen.transpose(1, 0, 2))

    def state_dict(self) -> dict[str, NDArray[np.int64]]:
        """Orders and how far each lane has come in its own, copied."""
        return {"orders": self._orders.copy(), "cursors": self._cursors.copy()}

    def load_state_dict(self, state: dict[str, NDArray[np.int64]]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: It is of other lanes or samples.
        """
        if (
            np.shape(state["orders"]) != self._orders.shape
            or np.shape(state["cursors"]) != self._cursors.shape
        ):
            raise ValueError(f"sample orders {np.shape(state['orders'])}, not {self._orders.shape}")
        np.copyto(self._orders, state["orders"])
        np.copyto(self._cursors, state["cursors"])
