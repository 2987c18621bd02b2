"""What a process that grows hosts makes sure of before it says READY: that it can, and on which data."""

from __future__ import annotations

from esper_simic.config import Config
from esper_simic.growing_host.tasks import load_task
from esper_simic.growing_host.vector import GrowingHostVectorEnv


def examined_data(config: Config) -> str:
    """Make sure that this machine can grow the hosts of a configuration; the digest of the data they grow on.

    It costs the loading of the task, which has to be done anyway, and milliseconds.

    Returns:
        `Task.digest`: 64 hexadecimal digits.

    Raises:
        ConfigError: The task's data is not here or is broken, or its host does not take it; a slot or blueprint does
            not fit, or more validation samples are asked for than there are. The process ends with status 78, and so
            does the run.
    """
    task = load_task(config.environment.task)
    GrowingHostVectorEnv(1, config.environment, gamma=config.simic_trainer.gamma)
    return task.digest
