"""Checkpoints beside the training: nothing before its ground is durable, and no trouble of the disk stops a step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from esper_simic.errors import UnavailableError
from esper_simic.events import CheckpointSaved, CheckpointStaged
from supervisor import checkpoints
from supervisor.clock import ManualClock
from supervisor.journal import Record, read
from supervisor.roles.checkpointing import Checkpointer
from supervisor.roles.fold import LearnerFold, read_state
from tests.roles.bench import RUN_ID, episode, make_config
from tests.roles.scribe import Scribe, contents, is_same_state

DEADLINE_S = 20.0
BASE = ("supervisor.checkpoint_interval_s=60", "supervisor.keep_last=2", "supervisor.keep_best=0")


class Work:
    """A learner at work and the checkpointer beside it; time and disk are in a test's hands."""

    def __init__(self, scribe: Scribe) -> None:
        self.scribe, self.learner, self.journal = scribe, scribe.learner, scribe.journal
        self.clock = ManualClock()
        limits = scribe.config.supervisor
        self.directory = scribe.checkpoints
        self.checkpointer = Checkpointer(
            self.directory, self.journal, RUN_ID, limits, self.clock, controller="karn"
        )

    def names(self) -> list[str]:
        """The checkpoints on the disk."""
        found = self.directory.glob("step-*") if self.directory.is_dir() else []
        return sorted(path.name for path in found)

    def records(self, kind: type) -> list[Record]:
        self.journal.sync()
        return [record for record in read(self.journal.directory) if record.kind == kind.__name__]

    def advance(self) -> None:
        """Let it go on, with what is durable now."""
        self.checkpointer.advance(self.journal.durable_position)

    def until(self, condition: Callable[[], object]) -> None:
        """Let it go on until then; nothing becomes durable meanwhile but by the condition."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline_s
            self.advance()

    def write(self) -> None:
        """Have what is staged written and journaled."""
        before = self.journal.next_position
        self.journal.sync()
        self.until(lambda: self.journal.next_position > before)

    def checkpoint(self) -> str:
        """Stage, write, journal, prune; its name."""
        self.checkpointer.stage(self.learner)
        self.write()
        self.journal.sync()
        self.advance()
        name: str = self.records(CheckpointSaved)[-1].header["directory"]
        return name


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Work]:
    with making(tmp_path) as made:
        yield made


@contextmanager
def making(tmp_path: Path, *assignments: str) -> Iterator[Work]:
    """A run that has made updates and has no checkpoint yet."""
    with Scribe(tmp_path / "run", make_config(*BASE, *assignments)) as scribe:
        scribe.teach(5)
        yield Work(scribe)


# -- four moves --------------------------------------------------------------------------------------------------------


def test_staging_journals_what_the_state_is(work: Work) -> None:
    work.scribe.admit(episodes=(episode(episode_return=2.5),))
    work.checkpointer.stage(work.learner)
    event = work.records(CheckpointStaged)[0].header_as(CheckpointStaged)
    assert event.state_digest == work.learner.state().digest
    assert (event.step, event.environment_steps) == (work.learner.steps_done, work.learner.environment_steps)
    assert event.score == work.learner.score == 2.5


def test_what_is_written_is_the_state_that_was_staged_whatever_is_learned_meanwhile(work: Work) -> None:
    work.checkpointer.stage(work.learner)
    staged = work.learner.state().copy()
    work.scribe.teach(4)
    assert work.learner.state().digest != staged.digest
    work.write()
    (record,) = work.records(CheckpointSaved)
    saved, position = record.header_as(CheckpointSaved), work.records(CheckpointStaged)[0].position
    manifest, state = read_state(work.directory / saved.directory)
    assert is_same_state(state, staged)
    assert saved.state_digest == manifest.state_digest == staged.digest
    assert manifest.journal_position == saved.staged_at == position
    assert (saved.step, saved.environment_steps) == (manifest.step, manifest.environment_steps)
    assert saved.files == {name: file.sha256 for name, file in manifest.files.items()}
    assert (manifest.run_id, manifest.score) == (RUN_ID, work.learner.score)
    assert manifest.controller == "karn", "whose policy it is"

    fold = LearnerFold(work.scribe.config, work.journal.directory, work.directory)
    fold.restore(work.directory / saved.directory)
    for tail in read(work.journal.directory, fold.position):
        fold.take(tail)
    assert is_same_state(fold.learner.state(), work.learner.state())
    assert contents(fold.learner) == contents(work.learner)


def test_nothing_is_written_before_its_place_in_the_journal_is_durable(work: Work) -> None:
    """Else a crash could leave a checkpoint of a state that the journal has never come to."""
    work.journal.sync()
    work.scribe.teach(2)
    work.checkpointer.stage(work.learner)
    staged_at = work.journal.next_position - 1
    for durable in (0, work.journal.durable_position, staged_at):
        work.checkpointer.advance(durable)
        assert threading.active_count() == threads(), "nobody writes"
    assert work.names() == []
    work.write()
    assert len(work.names()) == 1


def threads() -> int:
    """Threads but those that write a checkpoint."""
    return sum(thread.name != "checkpoint" for thread in threading.enumerate())


class Gate:
    """Makes the disk slow: a write waits until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        save = checkpoints.save

        def saving(*arguments: Any) -> Path:
            self.entered.set()
            assert self.opened.wait(DEADLINE_S)
            return save(*arguments)

        monkeypatch.setattr(checkpoints, "save", saving)


def test_it_counts_only_once_it_is_there_and_training_goes_on_meanwhile(
    monkeypatch: pytest.MonkeyPatch, work: Work
) -> None:
    gate = Gate(monkeypatch)
    work.checkpointer.stage(work.learner)
    work.journal.sync()
    work.advance()
    assert gate.entered.wait(DEADLINE_S)
    steps = work.learner.steps_done
    for _ in range(4):
        work.scribe.teach(2)
        work.journal.sync()
        work.advance()
    assert work.learner.steps_done > steps
    assert work.records(CheckpointSaved) == []
    assert work.names() == []
    gate.opened.set()
    work.write()
    (record,) = work.records(CheckpointSaved)
    assert work.names() == [record.header["directory"]]
    checkpoints.load(work.directory / work.names()[0])


def test_one_at_a_time(monkeypatch: pytest.MonkeyPatch, work: Work) -> None:
    gate = Gate(monkeypatch)
    assert not work.checkpointer.is_due(work.learner.steps_done)
    work.clock.advance(61)
    assert work.checkpointer.is_due(work.learner.steps_done)
    work.checkpointer.stage(work.learner)
    work.clock.advance(61)
    work.scribe.teach(2)
    assert not work.checkpointer.is_due(work.learner.steps_done), "one is staged"
    work.journal.sync()
    work.advance()
    assert gate.entered.wait(DEADLINE_S)
    assert not work.checkpointer.is_due(work.learner.steps_done), "one is being written"
    gate.opened.set()
    work.write()
    assert work.checkpointer.is_due(work.learner.steps_done)


# -- when --------------------------------------------------------------------------------------------------------------


def test_by_time_it_is_due_when_the_interval_has_passed_and_something_was_learned(work: Work) -> None:
    step = work.learner.steps_done
    work.checkpointer.begin(step, 0)
    work.clock.advance(1000)
    assert not work.checkpointer.is_due(step), "nothing was learned since the recovery"
    assert work.checkpointer.is_due(step + 1)
    work.scribe.teach(2)
    work.checkpoint()
    work.clock.advance(59.5)
    assert not work.checkpointer.is_due(work.learner.steps_done + 5)
    work.clock.advance(1)
    assert work.checkpointer.is_due(work.learner.steps_done + 5)


def test_by_steps_it_is_due_when_so_many_were_made(tmp_path: Path) -> None:
    with making(tmp_path, "supervisor.checkpoint_interval_steps=3") as work:
        work.checkpointer.begin(10, 0)
        assert [work.checkpointer.is_due(step) for step in range(10, 15)] == [False] * 3 + [True] * 2


def test_its_figures_are_told(work: Work) -> None:
    work.checkpointer.begin(work.learner.steps_done, 1)
    work.clock.advance(7)
    assert work.checkpointer.metrics() == {
        "checkpoint.step": 1.0,
        "checkpoint.age_s": 7.0,
        "checkpoint.failures": 0.0,
    }
    work.scribe.teach(2)
    work.checkpoint()
    work.clock.advance(3)
    assert work.checkpointer.metrics() == {
        "checkpoint.step": float(work.learner.steps_done),
        "checkpoint.age_s": 3.0,
        "checkpoint.failures": 0.0,
    }


# -- pruning -----------------------------------------------------------------------------------------------------------


def test_the_newest_are_kept(work: Work) -> None:
    names = []
    for _ in range(4):
        work.scribe.teach(2)
        names.append(work.checkpoint())
    assert work.names() == names[-2:]


def test_an_old_one_goes_only_when_it_is_durable_that_the_new_one_counts(tmp_path: Path) -> None:
    with making(tmp_path, "supervisor.keep_last=1") as work:
        old = work.checkpoint()
        work.scribe.teach(2)
        work.checkpointer.stage(work.learner)
        work.write()
        saved_at = work.journal.next_position - 1
        work.checkpointer.advance(saved_at)
        assert old in work.names(), "a crash now would find no CheckpointSaved of the new one"
        assert len(work.names()) == 2
        work.checkpointer.advance(saved_at + 1)
        assert work.names() == [work.records(CheckpointSaved)[-1].header["directory"]]


def test_the_best_are_kept_beside_the_newest(tmp_path: Path) -> None:
    with making(tmp_path, "supervisor.keep_last=1", "supervisor.keep_best=1") as work:
        names = {}
        for outcome in (1.0, 900.0, -5000.0, -1.0):
            work.scribe.admit(episodes=(episode(episode_return=outcome),))
            while work.learner.can_step():
                work.scribe.step()
            work.learner.skip()
            names[outcome] = work.checkpoint()
        assert work.names() == [names[900.0], names[-1.0]]


def test_one_that_does_not_count_yet_pushes_none_out_that_does(tmp_path: Path) -> None:
    """The second is on the disk already, and unknown to the journal, while the first is pruned for."""
    with making(tmp_path, "supervisor.keep_last=1") as work:
        work.checkpointer.stage(work.learner)
        work.write()
        counts = work.names()
        work.scribe.teach(2)
        work.scribe.checkpoint(is_noted=False)
        work.journal.sync()
        work.advance()
        assert work.names()[0] == counts[0]


# -- trouble -----------------------------------------------------------------------------------------------------------


def refuse(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refusing(*_: Any, **__: Any) -> Any:
        raise UnavailableError("No space left on device")

    monkeypatch.setattr(checkpoints, name, refusing)


def test_a_disk_that_refuses_is_counted_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as context:
        refuse(context, "save")
        work.checkpointer.stage(work.learner)
        work.journal.sync()
        work.until(lambda: work.checkpointer.metrics()["checkpoint.failures"] == 1)
    step = work.learner.steps_done
    assert capsys.readouterr().err == f"checkpoint of step {step}: No space left on device\n"
    assert work.records(CheckpointSaved) == []
    work.clock.advance(61)
    work.scribe.teach(2)
    assert work.checkpointer.is_due(work.learner.steps_done), "it is tried again"
    assert work.checkpoint() in work.names()
    assert work.checkpointer.metrics()["checkpoint.failures"] == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_of_anything_else_is_counted_too(
    monkeypatch: pytest.MonkeyPatch, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    def dying(*_: Any) -> Path:
        raise MemoryError

    with monkeypatch.context() as context:
        context.setattr(checkpoints, "save", dying)
        work.checkpointer.stage(work.learner)
        work.journal.sync()
        work.until(lambda: work.checkpointer.metrics()["checkpoint.failures"] == 1)
    assert "the thread died" in capsys.readouterr().err
    assert work.checkpoint() in work.names()


def test_old_ones_that_cannot_be_removed_stop_no_training(
    monkeypatch: pytest.MonkeyPatch, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as context:
        refuse(context, "prune")
        work.checkpoint()
    assert work.checkpointer.metrics()["checkpoint.failures"] == 1
    assert "No space left on device" in capsys.readouterr().err
    assert len(work.names()) == 1


# -- one at once -------------------------------------------------------------------------------------------------------


def test_saving_waits_until_it_counts(work: Work) -> None:
    saved = work.checkpointer.save(work.learner)
    assert work.journal.durable_position == work.journal.next_position
    path = Path(saved.path)
    (record,) = work.records(CheckpointSaved)
    event = record.header_as(CheckpointSaved)
    assert event.directory == path.name
    assert (saved.learner_step, saved.environment_steps) == (event.step, event.environment_steps)
    assert saved.digest == event.state_digest == work.learner.state().digest
    assert event.staged_at == work.records(CheckpointStaged)[0].position
    assert read_state(path)[1].digest == saved.digest


def test_saving_while_one_is_written_waits_for_it_and_both_count(
    monkeypatch: pytest.MonkeyPatch, work: Work
) -> None:
    gate = Gate(monkeypatch)
    work.checkpointer.stage(work.learner)
    work.journal.sync()
    work.advance()
    assert gate.entered.wait(DEADLINE_S)
    work.scribe.teach(2)
    threading.Timer(0.05, gate.opened.set).start()
    saved = work.checkpointer.save(work.learner)
    first, second = work.records(CheckpointSaved)
    assert first.header["step"] < second.header["step"] == saved.learner_step
    assert work.names() == [first.header["directory"], second.header["directory"]]
    assert [record.header["staged_at"] for record in (first, second)] == [
        record.position for record in work.records(CheckpointStaged)
    ]


def test_saving_drops_what_was_only_staged(work: Work) -> None:
    work.checkpointer.stage(work.learner)
    work.scribe.teach(2)
    saved = work.checkpointer.save(work.learner)
    work.advance()
    assert work.names() == [Path(saved.path).name]
    assert len(work.records(CheckpointStaged)) == 2
    assert len(work.records(CheckpointSaved)) == 1


def test_saving_the_same_step_again_replaces_nothing(work: Work) -> None:
    first, second = work.checkpointer.save(work.learner), work.checkpointer.save(work.learner)
    assert first.path != second.path
    assert first.digest == second.digest
    assert len(work.names()) == 2


def test_saving_prunes_too(tmp_path: Path) -> None:
    with making(tmp_path, "supervisor.keep_last=1") as work:
        work.checkpointer.save(work.learner)
        work.scribe.teach(2)
        assert work.names() != [(name := Path(work.checkpointer.save(work.learner).path).name)]
        assert work.names() == [name]


def test_saving_on_a_disk_that_refuses_says_so(monkeypatch: pytest.MonkeyPatch, work: Work) -> None:
    refuse(monkeypatch, "save")
    with pytest.raises(UnavailableError, match="No space left"):
        work.checkpointer.save(work.learner)
    assert work.records(CheckpointSaved) == []


def test_what_cannot_be_pruned_does_not_undo_what_was_saved(
    monkeypatch: pytest.MonkeyPatch, work: Work
) -> None:
    refuse(monkeypatch, "prune")
    saved = work.checkpointer.save(work.learner)
    assert Path(saved.path).is_dir()
    assert len(work.records(CheckpointSaved)) == 1
