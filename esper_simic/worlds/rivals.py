"""Who a learned policy is measured against in a world that is no growing host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from esper_simic.config import EnvironmentConfig
from esper_simic.config_behaviour import RANDOM
from esper_simic.config_gym import BLUEPRINT_CHOICE
from esper_simic.specs import ActionSpec
from esper_simic.worlds.blueprint_choice import BlueprintChoiceVectorEnv, evaluation_kwargs
from esper_simic.worlds.blueprint_table import Cases
from esper_simic.worlds.play import Acting, RandomActing

Array = npt.NDArray[Any]

BEST_POSSIBLE: Final = "best-possible"
BEST_SINGLE: Final = "best-single"


class BestPossible:
    """Gives every host what earned most at its place, in the mean over the trials it is measured on.

    It has seen the outcomes that are to come: nobody can be expected to be better, and what others earn less is their
    regret.

    Args:
        cases: That it is measured on.
    """

    def __init__(self, cases: Cases) -> None:
        best = cases.mean_by_place().argmax(axis=1).tolist()
        self._choice = dict(zip((row.tobytes() for row in cases.features), best, strict=True))

    def act(self, observation: Mapping[str, Array], episode_start: Array, uniforms: Array) -> Array:
        """See `worlds.play.Acting`."""
        rows = np.ascontiguousarray(observation["vector"])
        return np.array([[self._choice[row.tobytes()]] for row in rows])


class BestSingle:
    """Gives every host the same blueprint, the one that earned most in training; where it may not, the next best.

    Args:
        cases: Of the training.
    """

    def __init__(self, cases: Cases) -> None:
        self._ranking = cases.ranking()

    def act(self, observation: Mapping[str, Array], episode_start: Array, uniforms: Array) -> Array:
        """See `worlds.play.Acting`."""
        legal = observation["action_mask"] > 0
        choice: Array = np.where(legal, self._ranking, -np.inf).argmax(axis=1)[:, None]
        return choice


def rivals(config: EnvironmentConfig, action: ActionSpec) -> dict[str, Callable[[], Acting]]:
    """What makes each rival, by name.

    Args:
        config: Section `environment`, as it was trained in.
        action: What an action of the world is.
    """
    made: dict[str, Callable[[], Acting]] = {RANDOM: lambda: RandomActing(action)}
    if config.id == BLUEPRINT_CHOICE:
        made[BEST_POSSIBLE] = lambda: BestPossible(_cases(evaluation_kwargs(config.kwargs)))
        made[BEST_SINGLE] = lambda: BestSingle(_cases(config.kwargs))
    return made


def _cases(kwargs: Mapping[str, Any]) -> Cases:
    return BlueprintChoiceVectorEnv(1, **kwargs).cases
