"""The governor: has a host broken down, may an action be tried, and what does a rollback cost?

Growing a network can destroy it. The governor looks at every host's validation after each epoch and decides; whoever
owns the parameters (`parameters.py`) copies and restores. It computes on arrays over lanes, without a tensor library,
and a lane's history is its own.

A host panics at once when

- its loss or accuracy is not finite (`NOT_FINITE`), or
- it had learned and now guesses (`LOBOTOMY`): the mean loss of its window lies below `0.6 ln(classes)` and its loss
  within 6.5 % of `ln(classes)`, the loss of the uniform answer;

and (`DIVERGED`) after 3 consecutive epochs whose loss exceeds all of a fixed limit (12 nats; 15 for language models),
the window's mean plus 6 standard deviations, and 3 times that mean. The window holds the loss of the last 20 sound
epochs; with fewer than 10 of them there is nothing to compare with, and only a loss that is not finite is a panic. An
epoch beyond the three limits is no sound one: it does not enter the window, or a diverging loss would soon look usual.

What a rollback does, and why its reward takes back the episode's: docs/decisions/0013-rollback.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from esper_simic.actions import BLUEPRINT, BLUEPRINTS, OP, SLOT, Op
from esper_simic.config import GovernorConfig
from esper_simic.errors import InvariantViolation
from esper_simic.lifecycle import OCCUPIED, Bools, Floats, Integers, SeedStage

ROLLBACK_PART: Final = "rollback"
"""Name of the reward part that a rollback writes."""


class PanicReason(IntEnum):
    """Why a host panicked."""

    NONE = 0
    NOT_FINITE = 1
    LOBOTOMY = 2
    DIVERGED = 3


class Veto(IntEnum):
    """Why an action must not be tried."""

    APPROVED = 0
    NOT_FINITE = 1
    INCOMPLETE = 2
    SLOT_OCCUPIED = 3
    NO_CAPACITY = 4


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the governor thinks of E hosts after an epoch.

    | field | shape | meaning |
    |---|---|---|
    | `panic` | `[E]` bool | the host has broken down and is to be rolled back |
    | `reason` | `[E]` int8 | `PanicReason`; `NONE` where there is no panic |
    | `healthy` | `[E]` bool | finite and within the limits: worth a copy |
    """

    panic: Bools
    reason: NDArray[np.int8]
    healthy: Bools


class Governor:
    """Watches E hosts on one task.

    Args:
        lanes: Number of hosts, E.
        classes: Labels of the task, C; uniform answers lose `ln(C)` nats.
        config: Limits; a governor that is not enabled finds every finite host healthy and never panics.
        tokens: Whether the task is a language model's, which has a limit of its own.
    """

    def __init__(self, lanes: int, classes: int, config: GovernorConfig, *, tokens: bool = False) -> None:
        self._config = config
        self._guessing_loss = float(np.log(classes))
        self._loss_max = config.loss_max_tokens if tokens else config.loss_max
        # The newest loss is last; NaN where an episode has not been watched for so long.
        self._window = np.full((lanes, config.window_epochs), np.nan)
        self._strikes = np.zeros(lanes, dtype=np.int64)

    def reset(self, lanes: NDArray[np.int64]) -> None:
        """Forget what was seen of some lanes: their next episode begins."""
        self._window[lanes] = np.nan
        self._strikes[lanes] = 0

    def watch(self, loss: Floats, accuracy: Floats) -> Verdict:
        """Judge every host by the validation that has just been made, and remember it.

        Args:
            loss: `[E]` mean cross-entropy, in nats.
            accuracy: `[E]` percent.
        """
        finite = np.isfinite(loss) & np.isfinite(accuracy)
        if not self._config.enabled:
            return Verdict(np.zeros_like(finite), np.zeros(len(loss), dtype=np.int8), finite)
        lobotomy, beyond = self._compare(np.where(finite, loss, np.nan))
        self._strikes = np.where(beyond, self._strikes + 1, 0)
        reason = np.select(
            [~finite, lobotomy, self._strikes >= self._config.strikes_max],
            [PanicReason.NOT_FINITE, PanicReason.LOBOTOMY, PanicReason.DIVERGED],
            PanicReason.NONE,
        ).astype(np.int8)
        healthy = finite & ~lobotomy & ~beyond
        self._remember(healthy, loss)
        return Verdict(reason != PanicReason.NONE, reason, healthy)

    def is_snapshot_due(self, epoch: Integers, healthy: Bools, fossilised: Bools) -> Bools:
        """Lanes that are to be copied now.

        At the start of an episode, every 5th epoch where the host is healthy, and whenever a seed has become a part
        of it for good, for a copy from before would lack it.

        Args:
            epoch: `[E]` epochs trained in this episode; 0 at its start.
            healthy: `[E]` from the verdict.
            fossilised: `[E]` a seed was fossilised in this epoch. A host that panics is rolled back and not copied:
                the caller leaves it out.
        """
        if not self._config.enabled:
            return np.zeros(len(epoch), dtype=np.bool_)
        periodic = (epoch % self._config.snapshot_interval_epochs == 0) & healthy
        return np.asarray((epoch == 0) | periodic | fossilised)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later verdict depends on, copied."""
        return {"window": self._window.copy(), "strikes": self._strikes.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: It is of another number of lanes, or of another window.
        """
        window, strikes = np.asarray(state["window"]), np.asarray(state["strikes"])
        if window.shape != self._window.shape or strikes.shape != self._strikes.shape:
            raise ValueError(
                f"a governor's window of shape {list(window.shape)} where {list(self._window.shape)} is expected"
            )
        self._window = window.astype(np.float64)
        self._strikes = strikes.astype(np.int64)

    def _compare(self, loss: Floats) -> tuple[Bools, Bools]:
        """Which hosts guess though they had learned, and which lie beyond all limits; both `[E]`."""
        config, guessing = self._config, self._guessing_loss
        known = np.isfinite(self._window)
        count = known.sum(axis=1)
        comparable = count >= config.samples_min
        past = np.where(known, self._window, 0.0)
        mean = past.sum(axis=1) / np.maximum(count, 1)
        spread = np.where(known, past - mean[:, None], 0.0)
        deviation = np.sqrt((spread * spread).sum(axis=1) / np.maximum(count, 1))
        learned = mean < config.learned_share_max * guessing
        guesses = np.abs(loss - guessing) <= config.guessing_margin * guessing
        beyond = (
            (loss > self._loss_max)
            & (loss > mean + config.deviations_max * deviation)
            & (loss > config.mean_ratio_max * mean)
        )
        return comparable & learned & guesses, comparable & beyond

    def _remember(self, lanes: Bools, loss: Floats) -> None:
        self._window[lanes, :-1] = self._window[lanes, 1:]
        self._window[lanes, -1] = loss[lanes]


def preflight(
    actions: NDArray[np.int64], *, loss: Floats, accuracy: Floats, stage: Integers, seeds_max: int
) -> NDArray[np.int8]:
    """Whether each host may be acted upon, whatever the masks said: the last check before an action happens.

    WAIT is always approved. On a host whose last validation was not finite nothing else is. A GERMINATE must name a
    blueprint that grows something, an empty slot, and leave the host within its number of seeds.

    Args:
        actions: `[E, 8]` in the order of `actions.HEADS`, each in its range.
        loss: `[E]` nats, of the last validation.
        accuracy: `[E]` percent, of the last validation.
        stage: `[E, S]` values of `SeedStage`.
        seeds_max: Seeds a host may hold at once, fossilised ones included.

    Returns:
        `[E]` values of `Veto`; where several apply, the one that is declared first.
    """
    op = actions[:, OP]
    here = np.take_along_axis(stage, actions[:, SLOT, None], axis=1)[:, 0]
    germinating = op == Op.GERMINATE
    broken = ~(np.isfinite(loss) & np.isfinite(accuracy)) & (op != Op.WAIT)
    incomplete = germinating & (actions[:, BLUEPRINT] == BLUEPRINTS.index("noop"))
    occupied = germinating & (here != SeedStage.DORMANT)
    full = germinating & (OCCUPIED[stage].sum(axis=1) >= seeds_max)
    return np.select(
        [broken, incomplete, occupied, full],
        [Veto.NOT_FINITE, Veto.INCOMPLETE, Veto.SLOT_OCCUPIED, Veto.NO_CAPACITY],
        Veto.APPROVED,
    ).astype(np.int8)


def settle(
    parts: Mapping[str, Floats], panic: Bools, paid: Floats, config: GovernorConfig
) -> dict[str, NDArray[np.float64]]:
    """The reward of a step in which some hosts were rolled back.

    Where a host panicked all other parts are 0 and the part `rollback` is `-penalty`, less what its episode was paid
    in earlier steps if that is forfeited, so that the whole episode's undiscounted return is exactly `-penalty`.

    Args:
        parts: Named parts of the step's reward, `[E]` each.
        panic: `[E]` from the verdict.
        paid: `[E]` sum of the rewards of the episode's earlier steps.
        config: Penalty and forfeiture.

    Raises:
        InvariantViolation: A part is already called `rollback`, or what was paid is not finite.
    """
    if ROLLBACK_PART in parts:
        raise InvariantViolation(f"a reward has a part {ROLLBACK_PART!r} of its own; rename it")
    if not np.isfinite(paid[panic]).all():
        raise InvariantViolation("an episode that is rolled back was paid a reward that is not finite")
    forfeited = paid if config.forfeit else np.zeros_like(paid)
    settled = {name: np.where(panic, 0.0, part) for name, part in parts.items()}
    return settled | {ROLLBACK_PART: np.where(panic, -config.penalty - forfeited, 0.0)}
