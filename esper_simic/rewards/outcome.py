"""What one environment step changed: all that any reward reads."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from esper_simic.actions import Op
from esper_simic.errors import ContractError
from esper_simic.lifecycle import Bools, Floats, Integers, SeedStage


def _none() -> NDArray[np.int64]:
    """The neutral value of a number that a step need not tell."""
    return np.asarray(0)


def _never() -> Bools:
    """The neutral value of what did not happen."""
    return np.asarray(False)


def _unknown() -> NDArray[np.float64]:
    """The neutral value of what was not measured."""
    return np.asarray(np.nan)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one environment step changed, for E hosts with S slots.

    *Before* is the state in which the action was taken, *after* the one at the end of the step: acted, one epoch
    older, trained and measured. Fields are broadcast to their shapes; those with a neutral value may be left out, which
    says that nothing of the kind happened or is known. NaN means unknown.

    | field `[E, S]` | neutral | meaning |
    |---|---|---|
    | `stage_before`, `stage` | | `SeedStage` before and after |
    | `epochs_before`, `epochs_in_stage` | | epochs in those stages |
    | `alpha_before`, `alpha` | 0 | blending weight before and after, in [0, 1] |
    | `parameters_before`, `seed_parameters` | 0 | parameters of the seed in the slot, 0 where empty |
    | `age_before`, `age` | 0 | epochs since germination, 0 where empty |
    | `fossilized` | | true where a FOSSILIZE really happened in this step |
    | `auto_pruned` | 0 | true where the environment, no action, pruned the seed |
    | `contribution_before`, `contribution` | NaN | points the seed was last measured to be worth, before and after |
    | `progress_before`, `progress` | NaN | points gained since germination, measured together with it |
    | `stage_improvement` | NaN | points gained since the seed entered its stage (after) |
    | `interaction` | NaN | points the seed is worth more beside its partners than their sum (after), summed over them |

    | field `[E]` | neutral | meaning |
    |---|---|---|
    | `op`, `target` | WAIT, 0 | operation and slot of the action, whether it happened or not |
    | `succeeded` | 0 | true where it happened |
    | `epoch`, `horizon` | 0 | epochs since the episode's start, after the step; at which it ends |
    | `accuracy` | | validation accuracy after, in percent |
    | `loss_before`, `loss` | NaN | validation loss, in nats |
    | `loss_scale` | NaN | loss of guessing uniformly, `ln(classes)` |
    | `improvement_before`, `improvement` | NaN | points that all live blended seeds together are worth: `d` |
    | `committed_accuracy` | NaN | percent with the fossils alone, at least at the horizon |
    | `terminated` | | true where the episode reached its horizon |

    `host_parameters` is the number of parameters of the host alone, at least 1.

    Raises:
        ContractError: A field does not fit the shape that `stage` gives, or the host has no parameter.
    """

    stage_before: Integers
    epochs_before: Integers
    stage: Integers
    epochs_in_stage: Integers
    alpha: Floats
    seed_parameters: Integers
    host_parameters: int
    fossilized: Bools
    contribution: Floats
    progress: Floats
    accuracy: Floats
    terminated: Bools
    alpha_before: Floats = field(default_factory=lambda: np.asarray(0.0))
    parameters_before: Integers = field(default_factory=_none)
    age_before: Integers = field(default_factory=_none)
    age: Integers = field(default_factory=_none)
    auto_pruned: Bools = field(default_factory=_never)
    contribution_before: Floats = field(default_factory=_unknown)
    progress_before: Floats = field(default_factory=_unknown)
    stage_improvement: Floats = field(default_factory=_unknown)
    interaction: Floats = field(default_factory=_unknown)
    op: Integers = field(default_factory=_none)
    target: Integers = field(default_factory=_none)
    succeeded: Bools = field(default_factory=_never)
    epoch: Integers = field(default_factory=_none)
    horizon: Integers = field(default_factory=_none)
    loss_before: Floats = field(default_factory=_unknown)
    loss: Floats = field(default_factory=_unknown)
    loss_scale: Floats = field(default_factory=_unknown)
    improvement_before: Floats = field(default_factory=_unknown)
    improvement: Floats = field(default_factory=_unknown)
    committed_accuracy: Floats = field(default_factory=_unknown)

    def __post_init__(self) -> None:
        shape = np.shape(self.stage)
        if len(shape) != 2 or self.host_parameters < 1:
            raise ContractError(
                f"an outcome has stages [lanes, slots] and a host with parameters, not {list(shape)} and "
                f"{self.host_parameters}"
            )
        for name in PER_SLOT + PER_LANE:
            value = np.asarray(getattr(self, name))
            wanted = shape if name in PER_SLOT else shape[:1]
            fits = all(size in (1, whole) for size, whole in zip(value.shape, wanted, strict=False))
            if value.ndim not in (0, len(wanted)) or not fits:
                raise ContractError(f"{name} of an outcome is {list(wanted)}, not {list(value.shape)}")
            object.__setattr__(self, name, np.broadcast_to(value, wanted))

    @property
    def fossil_parameters(self) -> NDArray[np.int64]:
        """`[E]` parameters of fossilised seeds."""
        return np.asarray(np.where(self.stage == SeedStage.FOSSILIZED, self.seed_parameters, 0).sum(axis=-1))

    def contributing_fossils(self, contribution_min: float) -> NDArray[np.int64]:
        """`[E]` fossilised seeds that were last measured to be worth `contribution_min` points or more."""
        worthy = self.contribution >= contribution_min
        return np.asarray(((self.stage == SeedStage.FOSSILIZED) & worthy).sum(axis=-1))

    def at_target(self, values: NDArray[Any]) -> NDArray[Any]:
        """`[E]` what a field `[E, S]` holds at the slots that the actions meant."""
        return np.asarray(np.take_along_axis(values, self.target[:, None].astype(np.int64), axis=1)[:, 0])

    def happened(self, op: Op) -> Bools:
        """`[E, S]` true in the slot in which an operation was accepted in this step."""
        slots = np.arange(self.stage.shape[1])
        done = self.succeeded.astype(np.bool_) & (self.op == op)
        return np.asarray(done[:, None] & (slots == self.target[:, None]))


PER_LANE: Final = (
    "accuracy",
    "terminated",
    "op",
    "target",
    "succeeded",
    "epoch",
    "horizon",
    "loss_before",
    "loss",
    "loss_scale",
    "improvement_before",
    "improvement",
    "committed_accuracy",
)
"""Fields `[E]`."""

PER_SLOT: Final = tuple(
    one.name for one in fields(Outcome) if one.name not in PER_LANE and one.name != "host_parameters"
)
"""Fields `[E, S]`."""
