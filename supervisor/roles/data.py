"""What a process that plays makes sure of before it says READY: that it can, and in which world."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from esper_simic.config import Config
from esper_simic.errors import ConfigError
from esper_simic.worlds.world import World, world_of


def examined_data(config: Config) -> str:
    """Make sure that this machine can run the worlds of a configuration, one a stage of its curriculum.

    Returns:
        What they consist of, 64 hexadecimal digits: the `World.digest` of a single one, or the SHA-256 of several.

    Raises:
        ConfigError: Data are not here or broken, the environment cannot be made, or a stage's has another shape. The
            process ends with status 78, and so does the run.
    """
    worlds = [world_of(one, config.simic_trainer.gamma) for one in config.stage_environments()]
    _check_shapes(config, worlds)
    digests = [world.digest() for world in worlds]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _check_shapes(config: Config, worlds: Sequence[World]) -> None:
    """What a Gymnasium id's spaces are is known once it is made: a configuration alone does not tell."""
    wanted = world_of(config.environment, config.simic_trainer.gamma).spec
    for stage, world in zip(config.simic_trainer.curriculum_stages, worlds, strict=False):
        if world.spec != wanted:
            raise ConfigError(
                f"stage {stage.name!r} would need another policy: its observations and actions are {world.spec}, "
                f"those of environment are {wanted}",
                "simic_trainer.curriculum_stages",
            )
