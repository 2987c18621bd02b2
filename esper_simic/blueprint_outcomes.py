"""What growing a blueprint into a host came to: records, their file, and a host in numbers.

A *place* is a slot of a host on a task, met at one epoch of its training. Each trial of a place is a seed of chance: a
host, its *twin* that never grew, and copies of it that differ in nothing but the blueprint that was grown there. Host,
samples and their order are the same for all of them, so what a copy ends with more than the twin is what growing the
blueprint did: not the cost of removing a seed that its host has come to lean on.

A file of outcomes is JSON, one value a line: an `OutcomesHead`, which says how it was made, then one `PlaceOutcomes` a
place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from esper_simic.actions import BLUEPRINTS
from esper_simic.config_environment import KINDS
from esper_simic.errors import ConfigError

Floats = npt.NDArray[np.float32]

FORMAT: Final = 1

HOST_PARAMETERS_MIN: Final = 200
"""What a seed adds is measured against its host, and against so many parameters where that has fewer."""

SCALE: Final = 10.0
"""Logarithms of counts are divided by it: e^10 is 22 026."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A slot of a host on a task.

    Attributes:
        task: Name of the task.
        host: Name of the host.
        slot: Name of the slot.
        kind: Of the task's samples.
        channels: Of the features that the slot meets.
        positions: Of these features: height times width.
        block: Number of the block behind which the slot lies, from 0.
        blocks: Of the host.
        behind_pool: Whether it lies behind that block's pool.
        host_parameters: Of the host without seeds.
        classes: Of the task.
        input_size: Numbers in a sample.
        train_size: Training samples.
    """

    task: str
    host: str
    slot: str
    kind: str
    channels: int
    positions: int
    block: int
    blocks: int
    behind_pool: bool
    host_parameters: int
    classes: int
    input_size: int
    train_size: int


class Grown(msgspec.Struct, frozen=True, kw_only=True):
    """What one blueprint came to at a place, trial by trial.

    Attributes:
        blueprint: Its name.
        parameters: It adds.
        accuracy_change: Validation accuracy at the end, less the twin's; points.
        loss_change: Validation loss at the end, less the twin's; nats.
        contribution: What removing the seed at the end would cost; points. None where there was none to remove.
        kept: Whether it was fossilised.
    """

    blueprint: str
    parameters: int
    accuracy_change: tuple[float, ...]
    loss_change: tuple[float, ...]
    contribution: tuple[float | None, ...]
    kept: tuple[bool, ...]


class PlaceOutcomes(msgspec.Struct, frozen=True, kw_only=True):
    """All that was tried at a place.

    Attributes:
        place: Which.
        seeds: Of the trials.
        accuracy: Validation accuracy when the seed germinated, percent, trial by trial.
        loss: Validation loss then, nats.
        grown: One entry a blueprint that the place takes.
    """

    place: Place
    seeds: tuple[int, ...]
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]
    grown: tuple[Grown, ...]


class OutcomesHead(msgspec.Struct, frozen=True, kw_only=True):
    """How a file of outcomes was made.

    Attributes:
        format: Of the file.
        command: That made it.
        versions: Of what took part, by name.
        germinated_at: Epoch in which seeds germinated.
        environment: Keys of `environment` that were not left as they are.
        tasks: Digest of each task's data.
    """

    format: int
    command: str
    versions: dict[str, str]
    germinated_at: int
    environment: dict[str, int | float | str]
    tasks: dict[str, str]


def encode(head: OutcomesHead, outcomes: Sequence[PlaceOutcomes]) -> bytes:
    """A file's bytes; places in the order given."""
    return msgspec.json.Encoder(order="deterministic").encode_lines([head, *outcomes])


def decode(data: bytes, name: str) -> tuple[OutcomesHead, list[PlaceOutcomes]]:
    """What a file holds.

    Args:
        data: Its bytes.
        name: How it is called in complaints.

    Raises:
        ConfigError: It is no file of outcomes, of another format, or a record does not hold together.
    """
    lines = data.splitlines()
    try:
        head = msgspec.json.decode(lines[0], type=OutcomesHead)
        outcomes = [msgspec.json.decode(line, type=PlaceOutcomes) for line in lines[1:]]
    except (IndexError, msgspec.DecodeError) as error:
        raise ConfigError(f"{name} is no file of outcomes: {error}", "environment.kwargs") from error
    if head.format != FORMAT:
        raise ConfigError(
            f"{name} has format {head.format}, this version reads {FORMAT}; make it anew",
            "environment.kwargs",
        )
    if not outcomes:
        raise ConfigError(f"{name} holds no outcome", "environment.kwargs")
    for number, one in enumerate(outcomes, start=2):
        _check(one, f"line {number} of {name}")
    return head, outcomes


def _check(outcomes: PlaceOutcomes, where: str) -> None:
    trials = len(outcomes.seeds)
    columns: list[Sequence[float | None]] = [outcomes.accuracy, outcomes.loss]
    for grown in outcomes.grown:
        if grown.blueprint not in BLUEPRINTS[1:]:
            raise ConfigError(f"{where}: unknown blueprint {grown.blueprint!r}", "environment.kwargs")
        columns += [grown.accuracy_change, grown.loss_change, grown.contribution, grown.kept]
    if not trials or any(len(column) != trials for column in columns):
        raise ConfigError(
            f"{where}: every column needs one entry for each of its seeds", "environment.kwargs"
        )
    if outcomes.place.kind not in KINDS:
        raise ConfigError(f"{where}: unknown kind of samples {outcomes.place.kind!r}", "environment.kwargs")


def relative_parameters(parameters: int, host_parameters: int) -> float:
    """`ln(1 + parameters / max(host, 200))`: how much larger a seed makes its host; 0 for none."""
    return math.log1p(parameters / max(host_parameters, HOST_PARAMETERS_MIN))


FEATURES: Final = (
    *(f"is {kind}" for kind in KINDS),
    "ln channels",
    "ln positions",
    "share of the blocks before it",
    "ln blocks",
    "behind a pool",
    "ln host parameters",
    "ln classes",
    "ln input size",
    "ln training samples",
    "accuracy",
    "advantage over guessing",
    "loss by that of guessing",
    *(f"relative parameters of {name}" for name in BLUEPRINTS[1:]),
)
"""A described host, number by number: what is known of it before anything is grown."""


def describe(outcomes: PlaceOutcomes, trial: int) -> Floats:
    """A host in numbers, `[len(FEATURES)]`, all of about the size of 1.

    Args:
        outcomes: Of the place.
        trial: Which of its hosts.
    """
    place = outcomes.place
    accuracy, loss = outcomes.accuracy[trial] / 100, outcomes.loss[trial]
    sizes = {
        grown.blueprint: relative_parameters(grown.parameters, place.host_parameters)
        for grown in outcomes.grown
    }
    return np.array(
        [
            *(float(place.kind == kind) for kind in KINDS),
            _log(place.channels),
            _log(place.positions),
            (place.block + 1) / place.blocks,
            _log(place.blocks),
            float(place.behind_pool),
            _log(place.host_parameters),
            _log(place.classes),
            _log(place.input_size),
            _log(place.train_size),
            accuracy,
            accuracy - 1 / place.classes,
            min(loss / math.log(place.classes), 10.0),
            *(sizes.get(name, 0.0) for name in BLUEPRINTS[1:]),
        ],
        dtype=np.float32,
    )


def _log(count: int) -> float:
    return math.log(count) / SCALE
