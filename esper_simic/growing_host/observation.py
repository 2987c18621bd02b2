"""Observations: the graph of each growing host as padded arrays (`graphs.ObservationSpec`).

`symlog(x) = sign(x) ln(1 + |x|)`. Normalisation by running statistics is the policy's work.

**globals** (23): 0 epoch / horizon; 1 symlog(loss) / 7; 2 accuracy / 100; 3–7 last five losses, symlog / 7, oldest
first (absent −1); 8–12 last five accuracies / 100 (absent −1); 13–15 share of slots in TRAINING, BLENDING, and
HOLDING or FOSSILIZED; 16 the last action succeeded; 17–22 one-hot of the last operation (all 0 before the first).

**slot_nodes** (31): 0 holds a seed; 1–10 one-hot stage; 11 alpha; 12 contribution / 10 in ±1 (never measured 0); 13
its velocity / 10 in ±1; 14 tempo / 12; 15 alpha target; 16 alpha mode / 2 (0 still, ½ rising, 1 falling); 17, 18, 19
epochs of the ramp in all, done and left, / horizon; 20 change of alpha in ±1; 21 composition / 2 (0 ADD, ½ MULTIPLY,
1 GATE); 22 interaction with its partners / 10 in ±1; 23 symlog(gradient norm) / 7; 24 gradient health (unmeasured 0);
25 vanishing; 26 exploding; 27 gradient health an epoch earlier (never −1); 28 epochs in stage / horizon; 29
gamma^(epochs since the contribution was measured) (never −1); 30 age / horizon. A DORMANT slot is all 0.

**host_nodes** (8), one per block and one for the classifier: 0 depth as a share of the whole; 1 log2(1 + outputs) / 8;
2 log2(1 + positions) / 12; 3 ln(1 + parameters) / 12; 4 symlog(weight norm) / 7; 5 symlog(gradient norm) / 7; 6 is
the classifier; 7 is followed by a pool.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_simic.actions import Op
from esper_simic.errors import InvariantViolation
from esper_simic.graphs import ObservationSpec
from esper_simic.growing_host.hosts import HostSpec
from esper_simic.growing_host.slots import SlotTable
from esper_simic.lifecycle import OCCUPIED, Bools, Floats, Integers, SeedStage

GLOBAL_FEATURES: Final = 23
SLOT_FEATURES: Final = 31
HOST_FEATURES: Final = 8
REMEMBERED: Final = 5

_STAGE_COLUMN: Final = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 6: 5, 7: 6, 8: 7, 9: 8, 10: 9}
_COLUMN_OF_STAGE: Final = np.array([_STAGE_COLUMN.get(stage, 0) for stage in range(11)])


def symlog(x: Floats) -> Floats:
    """`sign(x) ln(1 + |x|)`."""
    return np.sign(x) * np.log1p(np.abs(x))


def observation_spec(blocks: int, slots: int) -> ObservationSpec:
    """Shapes of the observations of a host of so many blocks, whatever its task."""
    return ObservationSpec(
        host_nodes=blocks + 1,
        host_features=HOST_FEATURES,
        slots=slots,
        slot_features=SLOT_FEATURES,
        global_features=GLOBAL_FEATURES,
    )


def global_features(
    slots: SlotTable,
    *,
    epoch: Integers,
    horizon: int,
    loss: Floats,
    accuracy: Floats,
    last_op: Integers,
    last_succeeded: Bools,
) -> NDArray[np.float32]:
    """Features of whole hosts, `[E, 23]`.

    Args:
        slots: The hosts' slots.
        epoch: `[E]` epochs of the episode so far.
        horizon: Epochs of a whole episode.
        loss: `[E, >= 5]` nats, newest last; NaN where absent.
        accuracy: `[E, >= 5]` percent, newest last; NaN where absent.
        last_op: `[E]` values of `Op`; -1 before the first action.
        last_succeeded: `[E]`.
    """
    features = np.zeros((len(epoch), GLOBAL_FEATURES), dtype=np.float32)
    losses, accuracies = symlog(loss[:, -REMEMBERED:]) / 7, accuracy[:, -REMEMBERED:] / 100
    features[:, 0] = epoch / horizon
    features[:, 1] = losses[:, -1]
    features[:, 2] = accuracies[:, -1]
    # Only "never measured" becomes -1; an infinite loss must not hide.
    features[:, 3:8] = np.where(np.isnan(loss[:, -REMEMBERED:]), -1.0, losses)
    features[:, 8:13] = np.where(np.isnan(accuracies), -1.0, accuracies)
    features[:, 13] = (slots.stage == SeedStage.TRAINING).mean(axis=1)
    features[:, 14] = (slots.stage == SeedStage.BLENDING).mean(axis=1)
    kept = (slots.stage == SeedStage.HOLDING) | (slots.stage == SeedStage.FOSSILIZED)
    features[:, 15] = kept.mean(axis=1)
    features[:, 16] = last_succeeded
    features[:, 17:] = last_op[:, None] == np.arange(len(Op))
    return features


def slot_features(slots: SlotTable, *, horizon: int, gamma: float) -> NDArray[np.float32]:
    """Features of slots, `[E, S, 31]`; an empty slot is all zero."""
    features = np.zeros((*slots.stage.shape, SLOT_FEATURES), dtype=np.float32)
    features[..., 0] = OCCUPIED[slots.stage]
    features[..., 1:11] = _COLUMN_OF_STAGE[slots.stage][..., None] == np.arange(10)
    features[..., 11] = slots.alpha
    features[..., 12] = np.clip(np.nan_to_num(slots.contribution) / 10, -1, 1)
    features[..., 13] = np.clip(np.nan_to_num(slots.contribution_velocity) / 10, -1, 1)
    features[..., 14] = slots.tempo_epochs / 12
    features[..., 15] = slots.alpha_target
    features[..., 16] = slots.alpha_mode / 2
    features[..., 17] = slots.ramp_total / horizon
    features[..., 18] = slots.ramp_done / horizon
    features[..., 19] = (slots.ramp_total - slots.ramp_done) / horizon
    features[..., 20] = np.clip(slots.alpha - slots.alpha_before, -1, 1)
    features[..., 21] = slots.composition / 2
    features[..., 22] = np.clip(slots.interaction / 10, -1, 1)
    features[..., 23] = symlog(slots.gradient_norm) / 7
    features[..., 24] = np.nan_to_num(slots.gradient_health)
    features[..., 25] = slots.vanishing
    features[..., 26] = slots.exploding
    features[..., 27] = np.where(
        OCCUPIED[slots.stage], np.nan_to_num(slots.gradient_health_before, nan=-1.0), 0
    )
    features[..., 28] = slots.epochs_in_stage / horizon
    known = slots.epochs_since_contribution >= 0
    freshness = np.where(known, gamma ** np.maximum(slots.epochs_since_contribution, 0), -1.0)
    features[..., 29] = np.where(OCCUPIED[slots.stage], freshness, 0)
    features[..., 30] = slots.age / horizon
    features[slots.stage == SeedStage.DORMANT] = 0
    return features


def host_features(spec: HostSpec, weight_norms: Floats, gradient_norms: Floats) -> NDArray[np.float32]:
    """Features of host layers, `[E, layers, 8]`.

    Args:
        spec: The host.
        weight_norms: `[E, layers]`.
        gradient_norms: `[E, layers]`, before clipping, mean of the last epoch.
    """
    layers = len(spec.blocks) + 1
    features = np.zeros((len(weight_norms), layers, HOST_FEATURES), dtype=np.float32)
    outputs = np.array(spec.layer_outputs)
    positions = np.array(spec.layer_positions)
    features[..., 0] = np.arange(layers) / (layers - 1)
    features[..., 1] = np.log2(1 + outputs) / 8
    features[..., 2] = np.log2(1 + positions) / 12
    features[..., 3] = np.log1p(spec.layer_parameter_counts) / 12
    features[..., 4] = symlog(weight_norms) / 7
    features[..., 5] = symlog(gradient_norms) / 7
    features[..., -1, 6] = 1
    features[..., :-1, 7] = 1
    return features


def check_finite(observation: dict[str, NDArray[np.generic]]) -> None:
    """Refuse to show a controller what is not a number.

    Raises:
        InvariantViolation: A feature is not finite; names the array, lane and position.
    """
    for key in ("host_nodes", "slot_nodes", "globals"):
        array = observation[key]
        if not np.isfinite(array.sum(dtype=np.float64)):
            where = np.argwhere(~np.isfinite(array.astype(np.float64)))[0].tolist()
            raise InvariantViolation(f"feature {where[1:]} of {key} in lane {where[0]} is not finite")
