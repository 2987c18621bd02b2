"""One pass over each journal of a run: whatever state it is in, living, finished, killed or empty."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from esper_simic.config_gym import GROWING_HOST
from esper_simic.errors import ContractError, UnavailableError
from supervisor import status
from supervisor.journal import JournalDamage, Record, read
from supervisor.report.past import LearnerPast, Stretch, SupervisorPast
from supervisor.state import TERMINAL, Phase

LEARNER: Final = "learner-0"


@dataclass(frozen=True, slots=True)
class Gathered:
    """All that a page tells, but for one episode's observations, which are read from the journal afterwards."""

    directory: Path
    supervisor: SupervisorPast
    learner: LearnerPast
    is_living: bool
    damage: tuple[str, ...]
    """What could not be read, in words; what stands before it was."""

    @property
    def state(self) -> str:
        """The run's phase, or `died` where its supervisor is gone before the end."""
        phase = self.supervisor.state.phase
        if self.is_living or phase in TERMINAL or phase is Phase.EMPTY:
            return str(phase)
        return status.DIED

    @property
    def run_id(self) -> str:
        """The run's name, as far as any journal tells."""
        started = self.supervisor.state.started
        return (started.run_id if started else self.learner.run_id) or "without a name"

    def setting(self, section: str, key: str) -> Any:
        """A key of the newest configuration; None where there is none."""
        configured = self.supervisor.configured
        config = configured.config if configured and configured.config else self.learner.config
        part = config.get(section)
        return part.get(key) if isinstance(part, dict) else None

    @property
    def grows_hosts(self) -> bool:
        """Whether the run's world is the growing host, which it was before there were others to name."""
        return self.setting("environment", "id") in (None, GROWING_HOST)

    @property
    def run_seed(self) -> int:
        """The seed from which all chance of the run is derived; 0 where it is not known."""
        seed = self.setting("simic_trainer", "seed")
        return seed if isinstance(seed, int) else 0

    @property
    def first_s(self) -> float:
        """When the first record was written; NaN without any."""
        return _least(self.supervisor.first_s, self.learner.first_s)

    @property
    def last_s(self) -> float:
        """When the newest record was written; NaN without any."""
        return -_least(-self.supervisor.last_s, -self.learner.last_s)

    def stretches(self) -> list[Stretch]:
        """The phases in turn.

        A supervisor that died left no word of when: its last phase ends with the newest record that anybody wrote
        before the next supervisor came.
        """
        turns = list(self.supervisor.turns)
        heard_s = dict(zip(self.supervisor.resumed_s, self.learner.last_before_resume_s, strict=False))
        found = []
        for index, (start_s, phase) in enumerate(turns):
            if phase in TERMINAL:
                continue
            stop_s = turns[index + 1][0] if index + 1 < len(turns) else self.last_s
            if stop_s in heard_s:
                last_word_s = heard_s[stop_s]
                stop_s = start_s if math.isnan(last_word_s) else min(stop_s, max(start_s, last_word_s))
            found.append(Stretch(start_s, stop_s, phase))
        return found


def _least(*values: float) -> float:
    return min((value for value in values if not math.isnan(value)), default=math.nan)


def gather(directory: Path) -> Gathered:
    """Read a run.

    Raises:
        UnavailableError: Its files may not be read.
    """
    damage: list[str] = []
    supervisor = SupervisorPast()
    _read(directory / "journal" / "supervisor", supervisor.take, damage)
    learner = LearnerPast(supervisor.resumed_s)
    _read(directory / "journal" / LEARNER, learner.take, damage)
    learner.close()
    return Gathered(directory, supervisor, learner, status.is_supervised(directory), tuple(damage))


def _read(journal: Path, take: Callable[[Record], None], damage: list[str]) -> None:
    if not journal.is_dir():
        return
    try:
        for record in read(journal):
            take(record)
    except (JournalDamage, ContractError, UnavailableError) as error:
        damage.append(str(error))
