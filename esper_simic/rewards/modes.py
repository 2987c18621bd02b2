"""The rewards of many lanes: the configured mode, and what it must remember of each episode.

Everything that is remembered begins anew with an episode, so that the rewards of an episode are a function of what
happened in it, whatever came before it in its lane.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final, assert_never

import numpy as np
from numpy.typing import NDArray

from esper_simic.config_rewards import RewardConfig, RewardMode
from esper_simic.errors import ContractError
from esper_simic.lifecycle import Integers
from esper_simic.rewards.basic import BASIC_PARTS, BASIC_PLUS_PARTS, basic, basic_plus
from esper_simic.rewards.contribution import Evidence, evidence
from esper_simic.rewards.escrow import ESCROW_PARTS, escrow
from esper_simic.rewards.loss import LOSS_PARTS, loss
from esper_simic.rewards.outcome import Outcome
from esper_simic.rewards.shaped import SHAPED_PARTS, followed_boost, hindsight_credit, shaped
from esper_simic.rewards.sparse import (
    MINIMAL_PARTS,
    SIMPLIFIED_PARTS,
    SPARSE_PARTS,
    minimal,
    simplified,
    sparse,
)

PARTS: Final[dict[RewardMode, tuple[str, ...]]] = {
    "shaped": SHAPED_PARTS,
    "escrow": ESCROW_PARTS,
    "basic": BASIC_PARTS,
    "basic_plus": BASIC_PLUS_PARTS,
    "sparse": SPARSE_PARTS,
    "minimal": MINIMAL_PARTS,
    "simplified": SIMPLIFIED_PARTS,
    "loss": LOSS_PARTS,
}
"""Names of the parts of every mode, in order."""


@dataclass(slots=True)
class Memory:
    """What modes remember of the episodes under way.

    | field | shape | mode | meaning |
    |---|---|---|---|
    | `credit` | `[E, S]` | escrow | paid for a live seed, not yet earned for good |
    | `accuracies` | `[E, n]` | escrow | percent of the last n epochs, NaN before the episode |
    | `boost`, `boost_delay` | `[E, S]` | shaped, escrow | last positive interaction of a live seed, epochs since |
    | `drip_share`, `drip_promised` | `[E, S]` | basic_plus | what a fossil is owed an epoch, points it promised |
    | `loss_deviation` | `[E]` | loss | deviation of the changes of the loss |
    """

    credit: NDArray[np.float64]
    accuracies: NDArray[np.float64]
    boost: NDArray[np.float64]
    boost_delay: NDArray[np.int64]
    drip_share: NDArray[np.float64]
    drip_promised: NDArray[np.float64]
    loss_deviation: NDArray[np.float64]


def fresh_memory(lanes: int, slots: int, config: RewardConfig) -> Memory:
    """What is remembered when an episode begins: nothing."""
    return Memory(
        credit=np.zeros((lanes, slots)),
        accuracies=np.full((lanes, config.escrow.stable_epochs), np.nan),
        boost=np.zeros((lanes, slots)),
        boost_delay=np.zeros((lanes, slots), dtype=np.int64),
        drip_share=np.zeros((lanes, slots)),
        drip_promised=np.zeros((lanes, slots)),
        loss_deviation=np.full(lanes, config.loss.deviation),
    )


class Rewards:
    """The reward of E lanes with S slots, in one mode.

    | mode | pays | never fossilising |
    |---|---|---|
    | `basic` | fossils once, the end (`basic.py`) | loses |
    | `basic_plus` | the same, most of a fossil's bonus while it keeps its promise | loses |
    | `escrow` | credits that are kept at the fossilisation only (`escrow.py`) | loses |
    | `sparse`, `minimal` | the committed accuracy at the end (`sparse.py`) | loses |
    | `simplified` | accuracy and fossils at the end (`sparse.py`) | loses |
    | `shaped` | attribution, every epoch (`shaped.py`) | **is paid**: `FARMABLE` |
    | `loss` | what the loss does (`loss.py`) | makes no difference |

    Args:
        lanes: E.
        slots: S.
        config: Mode and weights; mode and family agree, or the configuration would have been refused.
        gamma: The learner's own discount, for shaping and hindsight.
    """

    def __init__(self, lanes: int, slots: int, config: RewardConfig, gamma: float) -> None:
        self._shape = (lanes, slots)
        self._config = config
        self._gamma = gamma
        self._memory = fresh_memory(lanes, slots, config)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts, in order."""
        return PARTS[self._config.mode]

    def reset(self, lanes: Integers) -> None:
        """Forget the episodes of some lanes (`[n]`); theirs begin."""
        fresh = fresh_memory(1, self._shape[1], self._config)
        for one in fields(Memory):
            getattr(self._memory, one.name)[lanes] = getattr(fresh, one.name)[0]

    def parts(self, outcome: Outcome) -> dict[str, NDArray[np.float64]]:
        """The reward of one step, in named parts, and remember what later steps need.

        Returns:
            Name to `[E]` float64, in the order of `names`; the reward is their sum.

        Raises:
            ContractError: The outcome is of other lanes or slots, or lacks what the mode cannot do without.
        """
        if outcome.stage.shape != self._shape:
            raise ContractError(
                f"an outcome of {list(outcome.stage.shape)} lanes and slots, not {list(self._shape)}"
            )
        config, memory, gamma = self._config, self._memory, self._gamma
        match config.mode:
            case "basic":
                parts = basic(outcome, config, gamma=gamma)
            case "basic_plus":
                parts, memory.drip_share, memory.drip_promised = basic_plus(
                    outcome, config, memory.drip_share, memory.drip_promised, gamma=gamma
                )
            case "shaped":
                found, hindsight = self._judge(outcome)
                parts = shaped(outcome, found, hindsight, config, gamma=gamma)
            case "escrow":
                found, hindsight = self._judge(outcome)
                stable = self._stable_accuracy(outcome)
                parts, memory.credit = escrow(
                    outcome, found, hindsight, stable, memory.credit, config, gamma=gamma
                )
            case "sparse":
                parts = sparse(outcome, config)
            case "minimal":
                parts = minimal(outcome, config)
            case "simplified":
                parts = simplified(outcome, config, gamma=gamma)
            case "loss":
                parts, memory.loss_deviation = loss(outcome, memory.loss_deviation, config, gamma=gamma)
            case _:
                assert_never(config.mode)
        return parts

    def state_dict(self) -> dict[str, NDArray[np.generic]]:
        """Copies of everything that is remembered, by the names of `Memory`."""
        return {one.name: getattr(self._memory, one.name).copy() for one in fields(Memory)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what `state_dict` gave.

        Raises:
            ContractError: It is of other lanes or slots, or not of this class.
        """
        mine = self.state_dict()
        theirs = {name: np.shape(value) for name, value in state.items()}
        wanted = {name: array.shape for name, array in mine.items()}
        if theirs != wanted:
            raise ContractError(f"the state of rewards has the arrays {wanted}, not {theirs}")
        for name, array in mine.items():
            setattr(self._memory, name, np.array(state[name], dtype=array.dtype))

    def _judge(self, outcome: Outcome) -> tuple[Evidence, NDArray[np.float64]]:
        """What seeds are judged by, and the hindsight credit; interactions are followed."""
        memory = self._memory
        found = evidence(outcome, self._config)
        credit = hindsight_credit(found, memory.boost, memory.boost_delay, self._config.shaped, self._gamma)
        memory.boost, memory.boost_delay = followed_boost(outcome, memory.boost, memory.boost_delay)
        return found, credit

    def _stable_accuracy(self, outcome: Outcome) -> NDArray[np.float64]:
        """`[E]` the least accuracy of the last epochs of the episode, this one included."""
        self._memory.accuracies = np.concatenate(
            [self._memory.accuracies[:, 1:], outcome.accuracy[:, None].astype(np.float64)], axis=1
        )
        return np.asarray(np.nanmin(self._memory.accuracies, axis=1))


def total(parts: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """The reward, `[E]`: the sum of its parts."""
    return np.asarray(np.sum(list(parts.values()), axis=0))
