"""Which way a learner computes: chosen when its journal begins, and kept over all its lives as far as that can be.

`auto` means the best there is, but a run that began on the CPU stays there when it finds a GPU one day: its digests,
and what recovery and replay promise of them, are worth more than its speed. Any other change (a GPU that is gone, a
device that the configuration names) is a change of the fingerprint, which recovery journals.
"""

from __future__ import annotations

from pathlib import Path

from esper_simic.config import TrainerConfig
from esper_simic.events import RunStarted
from esper_simic.execution import Execution
from supervisor import checkpoints
from supervisor.journal import JournalDamage, read
from supervisor.roles.recovery import mend


def choose(trainer: TrainerConfig, journal: Path, checkpoints_directory: Path, rank: int) -> Execution:
    """The way of one learner.

    Args:
        trainer: What the configuration wants.
        journal: The learner's, where it has lived before; it may be empty.
        checkpoints_directory: The run's.
        rank: Which learner of the run.

    Raises:
        ConfigError: There is no such device, or the journal's beginning is damaged.
    """
    device = trainer.device
    if device == "auto" and _recorded(journal, checkpoints_directory).get("device") == "cpu":
        device = "cpu"
    return Execution.choose(device, plain=trainer.plain_execution, rank=rank)


def _recorded(journal: Path, checkpoints_directory: Path) -> dict[str, str]:
    """The newest fingerprint that is at hand: a change of it is followed by a checkpoint."""
    for listed in reversed(checkpoints.list_checkpoints(checkpoints_directory)):
        if isinstance(listed, checkpoints.GoodCheckpoint):
            return listed.manifest.fingerprint
    try:
        for record in read(journal):
            return record.header_as(RunStarted).fingerprint if record.kind == RunStarted.__name__ else {}
    except JournalDamage as error:
        raise mend(error) from error
    return {}
