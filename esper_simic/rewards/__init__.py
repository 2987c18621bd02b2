"""From what happened in an environment step, or in the field, to its reward, in named parts.

The reward is computed after the action, from outcomes: an action that was refused changes no stage and earns nothing.

| module | holds |
|---|---|
| `outcome.py` | what one step changed: all that any mode reads |
| `potential.py` | the potential of the slots, and shaping |
| `contribution.py` | what a seed is credited with |
| `basic.py` `shaped.py` `operations.py` `escrow.py` `sparse.py` `loss.py` | the modes |
| `modes.py` | the configured mode over many lanes, and what it remembers |
| `offline.py` | what a field report is worth |

`FARMABLE` names the modes that pay for never fossilising, `INDIFFERENT` those that pay the same either way.
"""

from __future__ import annotations

from esper_simic.config_rewards import FARMABLE_REWARDS as FARMABLE
from esper_simic.config_rewards import INDIFFERENT_REWARDS as INDIFFERENT
from esper_simic.rewards.basic import BASIC_PARTS, MODES_THAT_ABLATE_FOSSILS, basic, fossil_bonus
from esper_simic.rewards.modes import PARTS, Rewards, total
from esper_simic.rewards.offline import ReportOutcome
from esper_simic.rewards.outcome import Outcome
from esper_simic.rewards.potential import STAGE_POTENTIAL, potential

__all__ = [
    "BASIC_PARTS",
    "FARMABLE",
    "INDIFFERENT",
    "MODES_THAT_ABLATE_FOSSILS",
    "PARTS",
    "STAGE_POTENTIAL",
    "Outcome",
    "ReportOutcome",
    "Rewards",
    "basic",
    "fossil_bonus",
    "potential",
    "total",
]
