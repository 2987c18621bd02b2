"""One training episode taken out of a learner's journal, for a look at what grows.

A journal holds unrolls of many lanes; an episode lies across several of them. This is the only room of the page that
brings torch, because a journal's frames are read by the one function that knows them (`trajectory.decode`); so it is
imported when the episode is wanted and not before.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esper_simic.errors import ContractError
from esper_simic.events import ExperienceAdmitted
from esper_simic.graphs import OBSERVATION_KEYS, ObservationSpec
from esper_simic.growing_host.alpha import Composition
from esper_simic.growing_host.blueprints import CATALOGUE
from esper_simic.growing_host.compositions import seed_parameter_count
from esper_simic.growing_host.hosts import HOSTS
from esper_simic.growing_host.lifelines import Lifeline, read_lifeline
from esper_simic.trajectory import Trajectory, decode, frame_layout
from supervisor.journal import Record, read
from supervisor.report.choice import Choice, SeenEpisode

Array = NDArray[Any]


class _Rows(NamedTuple):
    """One lane of one or several unrolls, a row a step."""

    observations: dict[str, Array]
    starts: Array
    ended: Array
    rewards: Array


def read_episode(journal: Path, choice: Choice, host: str) -> SeenEpisode:
    """Read the observations of an episode.

    Args:
        journal: The learner's journal.
        choice: Which one.
        host: Name of the host.

    Raises:
        ContractError: The frames are of another version, or do not fit what the journal says of them.
        JournalDamage: The journal is damaged there.
        UnavailableError: It cannot be read.
    """
    parts, last = [], None
    for record in _records(journal, [unroll.position for unroll in choice.unrolls]):
        last = decoded(record)
        parts.append(_rows(last, choice.lane))
    if last is None or len(parts) != len(choice.unrolls):
        raise ContractError(f"{journal} does not hold the unrolls of the episode any more")
    rows = _joined(parts)
    start, stop = _bounds(rows, len(parts[-1].ended), choice)
    observations = {key: array[start:stop] for key, array in rows.observations.items()}
    if choice.episode is None and not bool(last.episode_start[-1, choice.lane]):
        # It goes on: the newest state is the one at which the next unroll begins.
        newest = {key: last.observations[key][-1:, choice.lane].numpy() for key in OBSERVATION_KEYS}
        observations = {key: np.concatenate([array, newest[key]]) for key, array in observations.items()}
    lifeline = read_lifeline(observations)
    return SeenEpisode(choice, lifeline, rows.rewards[start:stop], seed_parameters(lifeline, host))


def _records(journal: Path, positions: list[int]) -> Iterator[Record]:
    wanted = set(positions)
    for record in read(journal, positions[0]):
        if record.position in wanted:
            yield record
        if record.position >= positions[-1]:
            return


def decoded(record: Record) -> Trajectory:
    """The unroll of a record; shapes of its observations are read from the sizes of its frames.

    Raises:
        ContractError: They are no frames of an unroll.
    """
    event = record.header_as(ExperienceAdmitted)
    layout = frame_layout(ObservationSpec(1, 1, 1, 1, 1), event.length, event.lanes, 1)
    if event.length < 1 or event.lanes < 1 or len(record.frames) < len(layout):
        raise ContractError(f"record {record.position} has {len(record.frames)} frames, not {len(layout)}")
    # How much larger each frame is than if every dimension that is not known were 1.
    size = {spec.name: frame.nbytes // spec.bytes for spec, frame in zip(layout, record.frames, strict=False)}
    hosts, slots = size["observations.host_mask"], size["observations.slot_mask"]
    if not (hosts and slots):
        raise ContractError(f"record {record.position} holds observations without a host or a slot")
    spec = ObservationSpec(
        host_nodes=hosts,
        host_features=size["observations.host_nodes"] // hosts,
        slots=slots,
        slot_features=size["observations.slot_nodes"] // slots,
        global_features=size["observations.globals"],
    )
    # In lockstep one frame more follows, which belongs to the actor's recovery.
    frames = record.frames[: len(layout)]
    return decode(frames, spec, event.length, event.lanes, size["initial_state"])


def _rows(trajectory: Trajectory, lane: int) -> _Rows:
    """The steps of one lane; the observation behind the last step is the first one of the next unroll."""
    length = trajectory.length
    return _Rows(
        {key: trajectory.observations[key][:length, lane].numpy() for key in OBSERVATION_KEYS},
        trajectory.episode_start[:length, lane].numpy(),
        trajectory.ended[:, lane].numpy(),
        trajectory.rewards[:, lane].numpy(),
    )


def _joined(parts: list[_Rows]) -> _Rows:
    return _Rows(
        {key: np.concatenate([part.observations[key] for part in parts]) for key in OBSERVATION_KEYS},
        np.concatenate([part.starts for part in parts]),
        np.concatenate([part.ended for part in parts]),
        np.concatenate([part.rewards for part in parts]),
    )


def _bounds(rows: _Rows, last_steps: int, choice: Choice) -> tuple[int, int]:
    """First row of the episode and the one behind its last."""
    total = len(rows.ended)
    if choice.episode is None:
        starts = np.flatnonzero(rows.starts)
        return (int(starts[-1]) if len(starts) else 0), total
    ends = total - last_steps + np.flatnonzero(rows.ended[total - last_steps :])
    if choice.ending >= len(ends):
        raise ContractError(
            f"lane {choice.lane} of an unroll does not end the episode that the journal says ended"
        )
    stop = int(ends[choice.ending]) + 1
    start = stop - choice.episode.length
    if start < 0 or not rows.starts[start]:
        raise ContractError(f"an episode of lane {choice.lane} does not begin where its length says")
    return start, stop


def seed_parameters(lifeline: Lifeline, host: str) -> tuple[int | None, ...]:
    """Parameters of the seeds in the last epoch, by slot.

    Args:
        lifeline: The episode.
        host: Name of its host, which tells the kind of features that the seeds compute.

    Returns:
        0 where there is no seed; None for one that is of another version: what it is can be shown all the same.
    """
    kind = HOSTS[host].kind if host in HOSTS else None
    counts: list[int | None] = []
    for slot, (name, layer) in enumerate(
        zip(lifeline.blueprint[-1].tolist(), lifeline.slot_layer, strict=True)
    ):
        if not name:
            counts.append(0)
        elif kind is None or name not in CATALOGUE or kind not in CATALOGUE[name].kinds:
            counts.append(None)
        else:
            composition = Composition(int(lifeline.composition[slot]))
            channels = lifeline.layers[layer].outputs
            counts.append(seed_parameter_count(CATALOGUE[name], composition, channels, kind))
    return tuple(counts)
