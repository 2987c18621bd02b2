"""A learner's state as the fold of its journal, record by record: for its own recovery, and for whoever looks back.

`LearnerFold.take` moves the state by one record, exactly as the living learner moved it when the record was written.
It judges nothing: what a record says (digests, metrics) and what was computed lie side by side in `Folded`.

A fold begins at the start of the journal or in a checkpoint (`restore`), which is a cache of the fold at one position:
tensors, numbers, and the addresses of what the buffer held, which is read again from the journal.

Where a learner recovered *inexactly* (`LearnerRecovered.is_exact`), the state it went on with is not the fold of what
stands before, but the next checkpoint is it: the fold takes its state from there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import safetensors.torch

from esper_simic.config import Config
from esper_simic.errors import ConfigError, ContractError, InvariantViolation, UnavailableError
from esper_simic.events import (
    LEARNER_EVENTS,
    CheckpointStaged,
    CurriculumJudged,
    ExperienceAdmitted,
    ExperienceRefused,
    FingerprintChanged,
    HaltLifted,
    HardwareNoted,
    LearnerEvent,
    LearnerRecovered,
    LearnerStepped,
    PolicyImported,
    RunStarted,
    StepFailed,
    StepSkipped,
)
from esper_simic.execution import CPU, Execution, unheard
from esper_simic.learner import Learner
from esper_simic.learner_state import LearnerState
from esper_simic.replay import Held
from esper_simic.step_report import StepReport
from esper_simic.trajectory import Trajectory, decode
from esper_simic.worlds.world import world_of
from supervisor import checkpoints
from supervisor.config_file import config_of
from supervisor.journal import JournalDamage, Record, read

STATE_FILE: Final = "state.safetensors"
NUMBERS_FILE: Final = "numbers.json"


class Folded(NamedTuple):
    """What one record said and what it did.

    `report` is what was computed for a `LearnerStepped`, `state_digest` for a `CheckpointStaged`, `LearnerRecovered` or
    a `LearnerStepped` that has one; None where nothing was computed: for a quarantined record, and for an update that
    lacks what was quarantined. `consumed` are the positions of unrolls that are wholly consumed now.
    """

    event: LearnerEvent
    report: StepReport | None = None
    state_digest: str | None = None
    consumed: tuple[int, ...] = ()


class LearnerFold:
    """One learner, moved by the records of its journal.

    Args:
        config: The run's configuration.
        journal: The journal's directory.
        checkpoints_directory: Where the run's checkpoints are.
        rank: Which learner of the run.
        quarantined: Positions of records to pass over.
        execution: How updates are made again. Where it is not exact, what comes of one may be otherwise than it was,
            in whether it succeeds and in how much experience the next one takes, too; that ends no fold.
        compiling: Told, now and later, before an update may have to be compiled.
        consolidating: Told, now and later, while it is estimated what an old task needs; see `Engine`.
    """

    def __init__(
        self,
        config: Config,
        journal: Path,
        checkpoints_directory: Path,
        *,
        rank: int = 0,
        quarantined: Collection[int] = (),
        execution: Execution = CPU,
        compiling: Callable[[], None] = unheard,
        consolidating: Callable[[], None] = unheard,
    ) -> None:
        self._config, self._rank, self._execution = config, rank, execution
        self._compiling, self._consolidating = compiling, consolidating
        self._journal, self._checkpoints = journal, checkpoints_directory
        self._quarantined = frozenset(quarantined)
        self.learner = self._new_learner()
        self.position = 0
        """Position of the next record."""
        self.fingerprint: dict[str, str] = {}
        """Under which the updates were made, as far as the records taken tell."""
        self.is_waiting_for_checkpoint = False
        """An inexact recovery was passed: the state is not the one with which the learner went on. `restore` it from
        the checkpoint that the next `CheckpointSaved` names."""

    def restore(self, directory: Path) -> None:
        """Become the fold that a checkpoint holds; what its buffer held is read from the journal.

        Raises:
            ContractError: The checkpoint is not whole, not of this run's shape, or its records are not there.
            JournalDamage: The journal is damaged where the buffer's contents stand.
            UnavailableError: Checkpoint or journal cannot be read.
        """
        manifest, state = read_state(directory)
        learner = self._new_learner()
        positions: list[int] = list(state.addresses["buffer"]["positions"])
        learner.load_state(state, self._held(positions))
        self.learner = learner
        self.position, self.fingerprint = manifest.journal_position, dict(manifest.fingerprint)
        self.is_waiting_for_checkpoint = False

    def _new_learner(self) -> Learner:
        world = world_of(self._config.environment, self._config.simic_trainer.gamma)
        learner = Learner(self._config, world.spec, rank=self._rank, execution=self._execution)
        learner.engine.computation.compiling = self._compiling
        learner.engine.consolidating = self._consolidating
        return learner

    def take(self, record: Record) -> Folded:  # noqa: PLR0911 (a table)
        """Move the state by the next record.

        Raises:
            ContractError: It is of no known kind, or not what its kind says.
            InvariantViolation: An update cannot be made where one was made.
        """
        event = event_of(record)
        self.position = record.position + 1
        if record.position in self._quarantined:
            return self._pass_over(event)
        match event:
            case ExperienceAdmitted():
                trajectory = self.trajectory_of(record, event)
                return Folded(event, consumed=self.learner.admit(record.position, event, trajectory))
            case ExperienceRefused():
                self.learner.refuse(event)
                return Folded(event)
            case PolicyImported():
                return self._import(record, event)
            case LearnerStepped():
                return self._step(event)
            case StepFailed():
                return self._fail(event)
            case CurriculumJudged() | HaltLifted() | HardwareNoted():
                self._note(event)
                return Folded(event)
            case StepSkipped():
                return Folded(event, consumed=self.learner.skip())
            case CheckpointStaged():
                return Folded(event, state_digest=self.learner.state().digest)
            case LearnerRecovered():
                self.is_waiting_for_checkpoint |= not event.is_exact
                return Folded(event, state_digest=self.learner.state().digest)
            case RunStarted(fingerprint=fingerprint) | FingerprintChanged(after=fingerprint):
                self.fingerprint = fingerprint
                return Folded(event)
            case _:
                return Folded(event)

    def _note(self, event: CurriculumJudged | HaltLifted | HardwareNoted) -> None:
        match event:
            case CurriculumJudged():
                self.learner.judge(event)
            case HaltLifted():
                self.learner.lift(event)
            case HardwareNoted():
                self.learner.ledger.hardware.add(event.id)

    def trajectory_of(self, record: Record, event: ExperienceAdmitted) -> Trajectory:
        """The unroll of a record, decoded.

        Raises:
            ContractError: The frames are not what an unroll of this run consists of.
        """
        policy = self.learner.policy
        frames = record.frames[:-1] if self._config.supervisor.lockstep else record.frames
        return decode(frames, policy.spec, event.length, event.lanes, policy.state_size)

    def _import(self, record: Record, event: PolicyImported) -> Folded:
        found = self.learner.begin_with(*map(bytes, record.frames))
        if found != event.digest:
            raise ContractError(
                f"the weights in record {record.position} have digest {found}, it says {event.digest}"
            )
        return Folded(event)

    def _step(self, event: LearnerStepped) -> Folded:
        if self._is_lenient and not self._can_step(event):
            # It was made with experience that is lost now. To die of that would quarantine one update after the other.
            return Folded(event, consumed=self.learner.skip())
        report = self.learner.step(event.inputs)
        if report.failure and self._execution.is_exact:
            raise InvariantViolation(f"update {event.step} was made once, and fails here: {report.failure}")
        return self._reported(event, report)

    def _fail(self, event: StepFailed) -> Folded:
        if self._is_lenient and not self._can_step(event):
            return Folded(event, consumed=self.learner.skip())
        return self._reported(event, self.learner.fail(event))

    @property
    def _is_lenient(self) -> bool:
        """Whether the state may be another one than that in which the update was made."""
        return bool(self._quarantined) or not self._execution.is_exact

    def _can_step(self, event: LearnerStepped | StepFailed) -> bool:
        """Whether there is enough for an update of the size that this one had."""
        if event.inputs is None:
            return self.learner.can_step()
        mode = self.learner.mode(event.inputs.at_s)
        return mode.may_step and self.learner.can_step(mode.batch_size(self._config.simic_trainer.batch_size))

    def _reported(self, event: LearnerStepped | StepFailed, report: StepReport) -> Folded:
        state_digest = report.state_digest
        if event.state_digest is not None and state_digest is None:
            state_digest = self.learner.state().digest
        return Folded(event, report, state_digest, report.unrolls_consumed)

    def _pass_over(self, event: LearnerEvent) -> Folded:
        """A quarantined experience is lost; a quarantined update learns nothing; a quarantined verdict holds nothing.

        What a verdict may die of is the estimate of what a passed stage needs; in which stage actors are it says all
        the same.
        """
        if isinstance(event, ExperienceAdmitted):
            self.learner.lose(event)
        if isinstance(event, CurriculumJudged):
            self.learner.judge(msgspec.structs.replace(event, consolidated=0))
        consumed = self.learner.skip() if isinstance(event, LearnerStepped | StepFailed) else ()
        return Folded(event, consumed=consumed)

    def _held(self, positions: list[int]) -> Iterator[Held]:
        """The unrolls at these positions, one after the other: one of them is in memory at a time."""
        if not positions:
            return
        wanted = iter(positions)
        next_position: int | None = next(wanted)
        for record in read(self._journal, positions[0]):
            if record.position != next_position:
                continue
            event = event_of(record)
            if not isinstance(event, ExperienceAdmitted):
                raise ContractError(f"the buffer held record {record.position}, which is a {record.kind}")
            yield Held(self.trajectory_of(record, event), event.policy_version, record.position)
            next_position = next(wanted, None)
            if next_position is None:
                return
        raise UnavailableError(f"{self._journal} ends before record {next_position}, which the buffer held")


def event_of(record: Record) -> LearnerEvent:
    """The event that a record of a learner's journal holds.

    Raises:
        ContractError: Unknown kind, or a header that does not fit it.
    """
    kind = LEARNER_EVENTS.get(record.kind)
    if kind is None:
        raise ContractError(
            f"record {record.position} is of unknown kind {record.kind!r}; known: {', '.join(LEARNER_EVENTS)}"
        )
    return record.header_as(kind)


def config_of_journal(journal: Path) -> Config:
    """The configuration with which a learner's journal began.

    Raises:
        ContractError: The journal does not begin with `RunStarted`.
    """
    for record in read(journal):
        event = event_of(record)
        if isinstance(event, RunStarted):
            return config_of(event.config)
        break
    else:
        raise ContractError(f"{journal} does not begin with RunStarted: it is empty, no learner got so far")
    raise ContractError(f"{journal} does not begin with RunStarted: it is not a learner's journal")


def config_of_other_run(directory: Path, key: str) -> Config:
    """The configuration of a run that another one is to learn from.

    Args:
        directory: The run's.
        key: Of the other one's configuration, by which this one is named.

    Raises:
        ConfigError: It is no run, or one of a version with other keys.
    """
    try:
        return config_of_journal(directory / "journal" / "learner-0")
    except (ContractError, JournalDamage, UnavailableError) as error:
        raise ConfigError(f"{directory} is no run with a learner's journal: {error}", key) from error
    except ConfigError as error:
        raise ConfigError(f"{directory} is a run of another version: {error}", key) from error


class _Numbers(msgspec.Struct, frozen=True):
    """What `numbers.json` of a checkpoint holds."""

    numbers: dict[str, object]
    addresses: dict[str, object]


def checkpoint_files(state: LearnerState) -> dict[str, bytes]:
    """The files of a checkpoint of this state."""
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
    numbers = {"numbers": state.numbers, "addresses": state.addresses}
    return {
        STATE_FILE: safetensors.torch.save(tensors),
        NUMBERS_FILE: msgspec.json.format(msgspec.json.encode(numbers), indent=2),
    }


def read_state(directory: Path) -> tuple[checkpoints.Manifest, LearnerState]:
    """The state in a checkpoint, every byte of it checked against the manifest.

    Raises:
        ContractError: It is not whole, or its state is not the one that its manifest names.
        UnavailableError: It cannot be read.
    """
    manifest, files = checkpoints.load(directory)
    try:
        tensors = safetensors.torch.load(files[STATE_FILE])
        rest = msgspec.json.decode(files[NUMBERS_FILE], type=_Numbers)
    except KeyError as error:
        raise ContractError(f"{directory} has no file {error}: it is not a learner's checkpoint") from None
    except (msgspec.DecodeError, safetensors.SafetensorError) as error:
        raise ContractError(f"{directory} cannot be decoded: {error}") from error
    state = LearnerState(tensors, rest.numbers, rest.addresses)
    if state.digest != manifest.state_digest:
        raise ContractError(
            f"the state in {directory} has digest {state.digest}, its manifest says {manifest.state_digest}"
        )
    return manifest, state
