"""Simic computes: algorithms, policies and the growing-host environment.

Importing the package registers the Gymnasium environment `esper_simic/GrowingHost-v0`; it loads no torch.
"""

from __future__ import annotations

import gymnasium

gymnasium.register(
    id="esper_simic/GrowingHost-v0",
    entry_point="esper_simic.growing_host.environment:GrowingHostEnv",
    vector_entry_point="esper_simic.growing_host.vector:GrowingHostVectorEnv",
    disable_env_checker=False,
)
