"""What a learner knows of its actors: who sent what, what was answered, and what is still to be consumed.

Part of the learner's fold. Identities of senders and journal positions are *addresses*: two runs in lockstep agree in
all but these although one of them was killed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from esper_simic.events import EpisodeFinished, ExperienceAdmitted, ExperienceRefused

EPISODE_WINDOW: Final = 100
"""Training episodes over which means are shown."""

NOT_LIVING: Final = "not_the_living_incarnation"
"""Why an unroll is refused that was not sent by the life that it names: it settles nothing of that life."""


class Unconsumed(NamedTuple):
    """An admitted unroll of which something is still to be consumed; its experiences end below `stop_serial`."""

    position: int
    actor: int
    stop_serial: int


class Ledger:
    """The books of one learner.

    Args:
        lanes: Of each actor.
    """

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self.environment_steps = 0
        self._next_episodes: dict[int, list[int]] = {}
        self._unrolls: dict[int, int] = {}
        self._answered: dict[int, tuple[int, int]] = {}
        self._unconsumed: deque[Unconsumed] = deque()
        self.hardware: set[str] = set()
        """Ids of the hardware that is noted in the journal."""
        self.episodes: deque[EpisodeFinished] = deque(maxlen=EPISODE_WINDOW)
        self.others_episodes: deque[EpisodeFinished] = deque(maxlen=EPISODE_WINDOW)
        """Recent ones in which another than the learned policy acted."""

    def admitted(self, event: ExperienceAdmitted) -> None:
        """Fold that an unroll was taken."""
        self.environment_steps += event.length * event.lanes
        self._unrolls[event.actor] = self.unrolls(event.actor) + 1
        self._answer(event)
        reached = list(event.episode_numbers)
        for episode in event.episodes:
            reached[episode.lane] = max(reached[episode.lane], episode.number + 1)
        self._next_episodes[event.actor] = [number + 1 for number in reached]

    def refused(self, event: ExperienceRefused) -> None:
        """Fold that one was not taken: its environment steps were made, its contents are gone."""
        self.environment_steps += event.steps
        if event.reason != NOT_LIVING:
            self._answer(event)

    def waits(self, unroll: Unconsumed) -> None:
        """Note an unroll whose experiences are to be consumed."""
        self._unconsumed.append(unroll)

    def take_consumed(self, consumed: int) -> tuple[int, ...]:
        """Positions of the unrolls that are wholly consumed, now that every serial below `consumed` is."""
        taken = []
        while self._unconsumed and self._unconsumed[0].stop_serial <= consumed:
            taken.append(self._unconsumed.popleft().position)
        return tuple(taken)

    def _answer(self, event: ExperienceAdmitted | ExperienceRefused) -> None:
        life, sequence = self._answered.get(event.actor, (0, 0))
        if event.incarnation > life:
            self._answered[event.actor] = (event.incarnation, event.sequence)
        elif event.incarnation == life:
            self._answered[event.actor] = (life, max(sequence, event.sequence))

    def settled(self, actor: int, incarnation: int) -> int:
        """The newest sequence of this life of an actor that was admitted or refused; 0 for none."""
        life, sequence = self._answered.get(actor, (0, 0))
        return sequence if life == incarnation else 0

    def unrolls(self, actor: int) -> int:
        """Unrolls of an actor that were admitted, over all its lives."""
        return self._unrolls.get(actor, 0)

    def next_episodes(self, actor: int) -> list[int]:
        """Numbers of the episodes with which a new incarnation of an actor begins its lanes.

        They follow the highest number that any admitted unroll of the actor has reached, so that no episode's chance
        is used twice; what its predecessor did not finish is lost.
        """
        return list(self._next_episodes.get(actor, [0] * self._lanes))

    def unconsumed(self) -> tuple[Unconsumed, ...]:
        """Admitted unrolls of which something is still to be consumed, oldest first."""
        return tuple(self._unconsumed)

    def numbers(self) -> dict[str, Any]:
        """What decides what comes, JSON types only."""
        numbers: dict[str, Any] = {
            "environment_steps": self.environment_steps,
            "next_episodes": {str(actor): list(n) for actor, n in sorted(self._next_episodes.items())},
            "unrolls": {str(actor): count for actor, count in sorted(self._unrolls.items())},
            "episodes": [msgspec.to_builtins(episode) for episode in self.episodes],
        }
        if self.others_episodes:
            numbers["others_episodes"] = [msgspec.to_builtins(episode) for episode in self.others_episodes]
        return numbers

    def addresses(self) -> dict[str, Any]:
        """Positions and identities, JSON types only."""
        noted = {"hardware": sorted(self.hardware)} if self.hardware else {}
        return {
            "unconsumed": [list(entry) for entry in self._unconsumed],
            "answered": {str(actor): list(newest) for actor, newest in sorted(self._answered.items())},
            **noted,
        }

    def load(self, numbers: Mapping[str, Any], addresses: Mapping[str, Any]) -> None:
        """Become what gave these `numbers` and `addresses`. For a ledger in which nothing stands yet."""
        self.environment_steps = numbers["environment_steps"]
        self._next_episodes = {int(actor): list(n) for actor, n in numbers["next_episodes"].items()}
        self._unrolls = {int(actor): count for actor, count in numbers["unrolls"].items()}
        self.episodes.extend(msgspec.convert(numbers["episodes"], list[EpisodeFinished]))
        others = numbers.get("others_episodes", [])
        self.others_episodes.extend(msgspec.convert(others, list[EpisodeFinished]))
        self._answered = {int(a): (life, newest) for a, (life, newest) in addresses["answered"].items()}
        self._unconsumed.extend(Unconsumed(*entry) for entry in addresses["unconsumed"])
        self.hardware = set(addresses.get("hardware", []))
