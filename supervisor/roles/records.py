"""What other runs recorded, to be learned from: the unrolls in the journals of their learners, by number.

A journal can be read quickly from front to back only. Whoever asks for rising numbers gets them from one pass; whoever
asks for an earlier one begins another pass there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import torch

from esper_simic.config import Config
from esper_simic.errors import ConfigError, ContractError, UnavailableError
from esper_simic.events import ExperienceAdmitted
from esper_simic.execution import unheard
from esper_simic.policies.policy import Policy
from esper_simic.trajectory import Trajectory, decode, frame_layout
from esper_simic.worlds.world import world_of
from supervisor.journal import JournalDamage, Record, read
from supervisor.roles.fold import config_of_other_run

KEY: Final = "environment.records"

ADMITTED: Final = ExperienceAdmitted.__name__


class Taken(NamedTuple):
    """A recorded unroll: what its journal says of it, its steps, and those before them of the same lanes if known.

    The `initial_state` is empty: what was recorded is another network's.
    """

    event: ExperienceAdmitted
    trajectory: Trajectory
    before: Trajectory | None


@dataclass(slots=True)
class _Run:
    """The unrolls of one run: their positions, and for each that of the one that the same actor sent before."""

    journal: Path
    positions: list[int] = field(default_factory=list)
    before: list[int | None] = field(default_factory=list)


class Records:
    """All unrolls of some runs, run after run, each in the order of its journal.

    Args:
        directories: The runs' directories.
        config: Of the run that learns from them.
        policy: The one that learns.
        run_dir: The directory of the run that learns.
        surveyed: Told of each record that was looked at to find the unrolls, all of them before this is made.

    Raises:
        ConfigError: There is no such run, it cannot be read, it holds no experience, or experience of another
            environment or shape; with the remedy.
    """

    def __init__(
        self,
        directories: Sequence[Path],
        config: Config,
        policy: Policy,
        run_dir: Path,
        surveyed: Callable[[], None] = unheard,
    ) -> None:
        self._config, self._policy, self._surveyed = config, policy, surveyed
        self._lanes = config.environment.environments_per_actor
        self._length = config.simic_trainer.unroll_length
        self._runs = [self._run(directory, run_dir) for directory in directories]
        self._total = sum(len(run.positions) for run in self._runs)
        self._pass: tuple[_Run, Iterator[Record]] | None = None
        self._read_to = -1
        self._newest: dict[int, Record] = {}

    def __len__(self) -> int:
        return self._total

    def take(self, number: int) -> Taken:
        """The unroll of this number, in `[0, len)`.

        Raises:
            ConfigError: It cannot be read any more.
        """
        run, index = self._place(number)
        wants_before = self._policy.state_size > 0
        try:
            record = self._record(run, run.positions[index])
            event, trajectory = self._decoded(record)
            position = run.before[index] if wants_before else None
            before = None if position is None else self._decoded(self._earlier(run, event.actor, position))[1]
            self._newest[event.actor] = record
        except (ContractError, JournalDamage, UnavailableError) as error:
            raise ConfigError(f"{run.journal}, record {run.positions[index]}: {error}", KEY) from error
        return Taken(event, trajectory, before if _joins(before, trajectory) else None)

    def _place(self, number: int) -> tuple[_Run, int]:
        for run in self._runs:
            if number < len(run.positions):
                return run, number
            number -= len(run.positions)
        raise IndexError(number)

    # -- reading ---------------------------------------------------------------------------------------------------

    def _record(self, run: _Run, position: int) -> Record:
        """The record at a position; those of the same kind that are passed on the way are noted, by actor."""
        if self._pass is None or self._pass[0] is not run or position <= self._read_to:
            self._pass = run, read(run.journal, position)
            self._newest.clear()
        for record in self._pass[1]:
            self._read_to = record.position
            if record.position == position:
                return record
            if record.kind == ADMITTED and self._policy.state_size > 0:
                self._newest[record.header_as(ExperienceAdmitted).actor] = record
        raise UnavailableError(f"the journal ends before record {position}")

    def _earlier(self, run: _Run, actor: int, position: int) -> Record:
        """The record at an earlier position, from what was noted or from the journal."""
        noted = self._newest.get(actor)
        if noted is not None and noted.position == position:
            return noted
        return next(iter(read(run.journal, position)))

    def _decoded(self, record: Record) -> tuple[ExperienceAdmitted, Trajectory]:
        event, policy = record.header_as(ExperienceAdmitted), self._policy
        layout = frame_layout(policy.spec, event.length, event.lanes, policy.state_size)
        # In lockstep one frame more follows, which belongs to the recovery of an actor.
        frames = list(record.frames[: len(layout)])
        place = next(index for index, frame in enumerate(layout) if frame.name == "initial_state")
        if place < len(frames):
            frames[place] = memoryview(bytes(layout[place].bytes))
        return event, decode(frames, policy.spec, event.length, event.lanes, policy.state_size)

    # -- what is there ---------------------------------------------------------------------------------------------

    def _run(self, directory: Path, run_dir: Path) -> _Run:
        journal = directory / "journal" / "learner-0"
        if directory.resolve() == run_dir.resolve():
            raise ConfigError(f"{directory} is this run itself; name others", KEY)
        if not journal.is_dir():
            what = "holds no run with a learner's journal" if directory.is_dir() else "is not there"
            raise ConfigError(f"{directory} {what} ({journal}); name directories of runs", KEY)
        self._check(directory, config_of_other_run(directory, KEY))
        try:
            run = self._survey(journal)
        except (ContractError, JournalDamage, UnavailableError) as error:
            raise ConfigError(f"{directory} cannot be learned from: {error}", KEY) from error
        if not run.positions:
            raise ConfigError(
                f"{directory} holds no experience: not one unroll was admitted in {journal}; name a run that trained",
                KEY,
            )
        return run

    def _check(self, directory: Path, recorded: Config) -> None:
        ours, theirs = self._config.environment, recorded.environment
        if theirs.id != ours.id:
            raise ConfigError(
                f"{directory} was recorded in {theirs.id}, and environment.id is {ours.id}; set environment.id="
                f"{theirs.id}, or name runs of {ours.id}",
                KEY,
            )
        spec = world_of(theirs, recorded.simic_trainer.gamma).spec
        if spec != self._policy.spec:
            raise ConfigError(
                f"{directory} was recorded with other observations or actions: {spec}, here they are "
                f"{self._policy.spec}; take the environment section of that run",
                KEY,
            )
        for key, found, wanted in (
            ("simic_trainer.unroll_length", recorded.simic_trainer.unroll_length, self._length),
            ("environment.environments_per_actor", theirs.environments_per_actor, self._lanes),
        ):
            if found != wanted:
                raise ConfigError(
                    f"{directory} was recorded with {key} {found}, here it is {wanted}; set {key}={found}",
                    KEY,
                )

    def _survey(self, journal: Path) -> _Run:
        run, newest = _Run(journal), dict[int, int]()
        for record in read(journal):
            self._surveyed()
            if record.kind != ADMITTED:
                continue
            actor = record.header_as(ExperienceAdmitted).actor
            run.positions.append(record.position)
            run.before.append(newest.get(actor))
            newest[actor] = record.position
        return run


def _joins(before: Trajectory | None, after: Trajectory) -> bool:
    """Whether one unroll ends with what the next one begins with; a new life of an actor begins anew."""
    return before is not None and all(
        torch.equal(rows[-1], after.observations[key][0]) for key, rows in before.observations.items()
    )
