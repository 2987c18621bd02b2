"""One episode read back from its observations: what grew where, through which stages, and how far it was blended in.

A journal keeps what controllers saw, not the hosts themselves. `observation.py` says what stands where in it; here
those columns are read the other way round. Row t of an episode is the host after t epochs; the state after the last
one is in no observation, because the step that ends an episode already shows the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from esper_simic.actions import BLUEPRINTS
from esper_simic.errors import ContractError
from esper_simic.lifecycle import OCCUPIED, Floats, SeedStage

Array = NDArray[Any]

GLOBAL_ACCURACY: Final = 2
SLOT_STAGE: Final = slice(1, 11)
SLOT_ALPHA: Final = 11
SLOT_COMPOSITION: Final = 21
HOST_OUTPUTS, HOST_PARAMETERS, HOST_IS_CLASSIFIER = 1, 3, 6

_STAGE_OF_COLUMN: Final = np.array([0, *SeedStage], dtype=np.int8)
"""The ten columns of the one-hot stage are numbers 0 to 10 of the wire contract without the retired 5."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a host: width of its output, parameters (to three parts in a million), and if it is the last."""

    outputs: int
    parameters: int
    is_classifier: bool


@dataclass(frozen=True, slots=True)
class Span:
    """A seed (or what is left of it) in one stage: epochs `start` up to, not including, `stop`."""

    slot: int
    stage: SeedStage
    blueprint: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Lifeline:
    """An episode of T observed epochs with S slots.

    Attributes:
        layers: The host, in data-flow order.
        slot_layer: `[S]` the layer behind which each slot sits.
        stage: `[T, S]` values of `SeedStage`.
        blueprint: `[T, S]` names; empty where there is no seed.
        alpha: `[T, S]` weight of the seed in [0, 1].
        composition: `[S]` values of `Composition` in the last epoch.
        accuracy: `[T]` percent.
    """

    layers: tuple[Layer, ...]
    slot_layer: tuple[int, ...]
    stage: NDArray[np.int8]
    blueprint: NDArray[np.str_]
    alpha: Floats
    composition: NDArray[np.int64]
    accuracy: Floats

    def spans(self) -> list[Span]:
        """What every slot went through, by slot and then by time; an empty slot has no span."""
        found = []
        epochs = len(self.stage)
        for slot in range(self.stage.shape[1]):
            stage, blueprint = self.stage[:, slot], self.blueprint[:, slot]
            changes = np.flatnonzero((stage[1:] != stage[:-1]) | (blueprint[1:] != blueprint[:-1])) + 1
            edges = [0, *changes.tolist(), epochs]
            found += [
                Span(slot, SeedStage(int(stage[start])), str(blueprint[start]), start, stop)
                for start, stop in itertools.pairwise(edges)
                if stage[start] != SeedStage.DORMANT
            ]
        return found


def read_lifeline(observations: Mapping[str, Array]) -> Lifeline:
    """Read an episode of one lane.

    Args:
        observations: `[T, ...]` each, T at least 1, keys and shapes as in `graphs.ObservationSpec`.

    Raises:
        ContractError: They are not such observations.
    """
    slots, host = observations["slot_nodes"], observations["host_nodes"]
    if slots.shape[-1] <= SLOT_COMPOSITION or host.shape[-1] <= HOST_IS_CLASSIFIER:
        raise ContractError(
            f"observations of {slots.shape[-1]} slot and {host.shape[-1]} host features are of another version"
        )
    exists = observations["slot_mask"][-1].astype(bool)
    stage = stages(slots[:, exists])
    return Lifeline(
        layers=layers(host[-1][observations["host_mask"][-1].astype(bool)]),
        slot_layer=tuple(int(layer) for layer in observations["slot_host"][-1][exists]),
        stage=stage,
        blueprint=_names(observations["slot_blueprint"][:, exists], stage),
        alpha=slots[:, exists, SLOT_ALPHA].astype(np.float64),
        composition=np.rint(2 * np.clip(slots[-1, exists, SLOT_COMPOSITION], 0, 1)).astype(np.int64),
        accuracy=100.0 * observations["globals"][:, GLOBAL_ACCURACY].astype(np.float64),
    )


def stages(slot_nodes: Array) -> NDArray[np.int8]:
    """Stages `[...]` of slot features `[..., F]`; all zeros are an empty slot."""
    one_hot = slot_nodes[..., SLOT_STAGE]
    stage = _STAGE_OF_COLUMN[one_hot.argmax(axis=-1)]
    return np.where(one_hot.any(axis=-1), stage, SeedStage.DORMANT).astype(np.int8)


def layers(host_nodes: Array) -> tuple[Layer, ...]:
    """Layers of host features `[layers, F]`: `2^(8 f) - 1` outputs, `e^(12 f) - 1` parameters."""
    features = host_nodes.astype(np.float64)
    # No layer is wider than 2^40: features that are none must not overflow.
    outputs = np.rint(np.exp2(np.clip(8 * features[:, HOST_OUTPUTS], 0, 40)) - 1).astype(np.int64)
    parameters = np.rint(np.expm1(np.clip(12 * features[:, HOST_PARAMETERS], 0, 40))).astype(np.int64)
    last = features[:, HOST_IS_CLASSIFIER] > 0.5
    return tuple(
        Layer(int(width), int(count), bool(is_last))
        for width, count, is_last in zip(outputs, parameters, last, strict=True)
    )


def _names(blueprint: Array, stage: NDArray[np.int8]) -> NDArray[np.str_]:
    names = np.array([*BLUEPRINTS, ""])[np.clip(blueprint, 0, len(BLUEPRINTS))]
    return np.where(OCCUPIED[stage], names, "")
