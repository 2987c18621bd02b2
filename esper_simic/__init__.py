"""Simic computes: algorithms, policies and the growing-host environment.

Importing the package registers the Gymnasium environments `esper_simic/GrowingHost-v0` and
`esper_simic/BlueprintChoice-v0` and, for algorithms to be tried on, some small ones whose best return is known; it
loads no torch.
"""

from __future__ import annotations

from typing import Final

import gymnasium

_KNOWN_ANSWERS: Final = {
    "Bandit": None,
    "Chain": 100,
    "GridWorld": 50,
    "Catch": None,
    "Target": None,
    "Recall": None,
}
"""Problems whose optimum is known, and the steps after which an episode of each is cut."""

gymnasium.register(
    id="esper_simic/GrowingHost-v0",
    entry_point="esper_simic.growing_host.environment:GrowingHostEnv",
    vector_entry_point="esper_simic.growing_host.vector:GrowingHostVectorEnv",
    disable_env_checker=False,
)

gymnasium.register(
    id="esper_simic/BlueprintChoice-v0",
    entry_point="esper_simic.worlds.blueprint_choice:BlueprintChoiceEnv",
    vector_entry_point="esper_simic.worlds.blueprint_choice:BlueprintChoiceVectorEnv",
)

for _problem, _steps_max in _KNOWN_ANSWERS.items():
    gymnasium.register(
        id=f"esper_simic/{_problem}-v0",
        entry_point=f"esper_simic.worlds.known_answers:{_problem}Env",
        vector_entry_point=f"esper_simic.worlds.known_answers:{_problem}VectorEnv",
        max_episode_steps=_steps_max,
    )
