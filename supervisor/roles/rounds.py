"""The fixed schedule of lockstep mode.

Round r: every actor makes its r-th unroll with the weights that were published after round r - 1; the learner admits
them in the order of the actors, whichever comes first, makes every update that is possible, publishes, and opens the
next round with one credit for each actor. So arrival order decides nothing, and the run is a function of its seed.

Where the schedule stands follows from the fold alone (how many unrolls of each actor were admitted); only the unrolls
that came before their turn are kept here, and a lost one is made again, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from esper_simic.trajectory import Trajectory
from supervisor.protocol import Unroll


@dataclass(frozen=True, slots=True)
class Arrived:
    """An unroll that waits for its turn."""

    peer: str
    message: Unroll
    frames: tuple[bytes, ...]
    trajectory: Trajectory


class Rounds:
    """Whose turn it is.

    Args:
        actors: How many actors the run has.
        unrolls_of: How many unrolls of an actor were admitted so far.
    """

    def __init__(self, actors: int, unrolls_of: Callable[[int], int]) -> None:
        self._actors = range(actors)
        self._unrolls_of = unrolls_of
        self._round = max(map(unrolls_of, self._actors))
        self._arrived: dict[int, Arrived] = {}

    @property
    def is_open(self) -> bool:
        """Whether unrolls of the present round are still to be admitted; between two rounds updates are made."""
        return min(map(self._unrolls_of, self._actors)) < self._round

    def open(self) -> None:
        """Begin the next round."""
        self._round += 1

    def admitted(self) -> list[int]:
        """The actors whose unroll of the open round was admitted."""
        return [actor for actor in self._actors if self.is_open and self._unrolls_of(actor) == self._round]

    def offer(self, unroll: Arrived) -> None:
        """Keep an unroll until it is its turn."""
        self._arrived[unroll.message.actor] = unroll

    def forget(self, actor: int) -> None:
        """Drop what an earlier life of this actor sent; the new one makes the same again."""
        self._arrived.pop(actor, None)

    def take(self) -> Arrived | None:
        """The unroll whose turn it is, if it is here."""
        for actor in self._actors:
            if self._unrolls_of(actor) < self._round:
                return self._arrived.pop(actor, None)
        return None
