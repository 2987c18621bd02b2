"""Which of the episodes in a journal is shown, and what is shown of it. Values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from esper_simic.events import EpisodeFinished
from esper_simic.growing_host.lifelines import Lifeline
from supervisor.report.past import UnrollAt


@dataclass(frozen=True, slots=True)
class Choice:
    """A lane of unrolls that follow each other, and the episode that ended in the last of them.

    `episode` is None for one under way; `ending` is its number among those of its lane that ended in the last unroll.
    """

    actor: int
    lane: int
    unrolls: tuple[UnrollAt, ...]
    episode: EpisodeFinished | None
    ending: int = 0


@dataclass(frozen=True, slots=True)
class SeenEpisode:
    """An episode as its controller saw it.

    Attributes:
        choice: Where it is from.
        lifeline: What grew, epoch by epoch.
        rewards: `[T]`, for the action taken at each epoch seen.
        seed_parameters: `[S]` of the seeds of the last epoch seen; 0 where there is none, None where not known.
    """

    choice: Choice
    lifeline: Lifeline
    rewards: NDArray[Any]
    seed_parameters: tuple[int | None, ...]


def choose(unrolls: Mapping[int, Sequence[UnrollAt]]) -> Choice | None:
    """The newest episode that stands whole in the journal; of those that ended together the most accurate.

    Where there is none yet, the one under way in the first lane of the newest unroll. None without any unroll.
    """
    found: tuple[tuple[int, float], Choice] | None = None
    for actor, row in unrolls.items():
        for index, unroll in enumerate(row):
            chain = chain_to(row, index)
            for choice in _whole(actor, chain, unroll):
                accuracy = (choice.episode.accuracy if choice.episode else None) or 0.0
                rank = (unroll.position, accuracy)
                if found is None or rank > found[0]:
                    found = rank, choice
    if found is not None:
        return found[1]
    newest = max(((row[-1].position, actor) for actor, row in unrolls.items() if row), default=None)
    if newest is None:
        return None
    row = unrolls[newest[1]]
    return Choice(newest[1], 0, chain_to(row, len(row) - 1), None)


def chain_to(row: Sequence[UnrollAt], index: int) -> tuple[UnrollAt, ...]:
    """The unrolls of one life of an actor that lead to one of them without a gap, oldest first.

    Where one was refused or lost, what came before does not join on.
    """
    first = index
    while first > 0 and _follows(row[first - 1], row[first]):
        first -= 1
    return tuple(row[place] for place in range(first, index + 1))


def _follows(before: UnrollAt, after: UnrollAt) -> bool:
    return before.incarnation == after.incarnation and before.sequence + 1 == after.sequence


def _whole(actor: int, chain: tuple[UnrollAt, ...], last: UnrollAt) -> list[Choice]:
    """The episodes that ended in the last unroll of a chain and lie in it from their first epoch on."""
    choices = []
    endings: dict[int, int] = {}
    steps_before = sum(unroll.length for unroll in chain[:-1])
    for episode in last.episodes:
        ending = endings.get(episode.lane, 0)
        endings[episode.lane] = ending + 1
        # It may have ended with the unroll's first step. A life begins with fresh episodes.
        if episode.truncated or not (steps_before >= episode.length - 1 or chain[0].sequence == 1):
            continue
        wanted, steps = len(chain), 0
        while wanted > 0 and steps < episode.length + last.length:
            wanted -= 1
            steps += chain[wanted].length
        choices.append(Choice(actor, episode.lane, chain[wanted:], episode, ending))
    return choices
