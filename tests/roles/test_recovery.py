"""A learner's way back: from any record on, past bad checkpoints, and not for ever into the same death."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from esper_simic.algorithms.impala import impala_loss
from esper_simic.config import Config
from esper_simic.errors import ConfigError, UnavailableError
from esper_simic.events import (
    CheckpointSaved,
    CheckpointStaged,
    FingerprintChanged,
    LearnerRecovered,
    LearnerStepped,
    RecordQuarantined,
    RunStarted,
    StepFailed,
    StepSkipped,
)
from esper_simic.fingerprint import fingerprint
from esper_simic.learner import Learner
from esper_simic.safety import StepInputs
from esper_simic.updates import impala as impala_module
from supervisor import checkpoints
from supervisor.clock import ManualClock
from supervisor.journal import Journal, Record, read
from supervisor.journal.format import SegmentCursor
from supervisor.roles import recovery as recovery_module
from supervisor.roles.attempts import Attempts, Work
from supervisor.roles.checkpointing import Checkpointer
from supervisor.roles.fold import STATE_FILE, LearnerFold
from supervisor.roles.recovery import Progress, Recovery
from tests.roles.bench import LANES, NEVER_MS, RUN_ID, T, make_config
from tests.roles.scribe import Scribe, contents, is_same_state

SMALL = ("experience_buffer.capacity=16", "simic_trainer.digest_every_steps=2")


class Death(BaseException):
    """The end of a process, as far as a test can have it: nothing catches it."""


@dataclass
class Life:
    """What one life of a learner came to."""

    fold: LearnerFold
    recovery: Recovery
    journaled: list[Record]
    told: list[Progress]

    def event(self, kind: type) -> Any:
        """The only event of a kind that this life has journaled."""
        (record,) = [record for record in self.journaled if record.kind == kind.__name__]
        return record.header_as(kind)

    def kinds(self) -> list[str]:
        return [record.kind for record in self.journaled]


class TickingClock(ManualClock):
    """A clock that moves on by 0.2 s whenever it is read."""

    def monotonic_s(self) -> float:
        self.advance(0.2)
        return super().monotonic_s()


def journal_at(run_dir: Path) -> Journal:
    return Journal(
        run_dir / "journal" / "learner-0",
        owner="learner-0",
        run_id=RUN_ID,
        commit_interval_ms=NEVER_MS,
        segment_bytes_max=2**17,
    )


def live(run_dir: Path, config: Config, life: int = 2, *, is_checkpointed: bool = False) -> Life:
    """One life: recovered, perhaps with a checkpoint at once, and ended in order."""
    told: list[Progress] = []
    with journal_at(run_dir) as journal, Attempts(run_dir / "learner-0.attempts") as attempts:
        before = journal.next_position
        clock = TickingClock()
        recovery = Recovery(run_dir, RUN_ID, life, config, journal, attempts, clock, told.append)
        fold = recovery.run()
        assert journal.durable_position == journal.next_position == fold.position, "told only what is durable"
        if is_checkpointed:
            limits = config.supervisor
            Checkpointer(run_dir / "checkpoints", journal, RUN_ID, limits, clock).save(fold.learner)
        journaled = list(read(journal.directory, before))
    return Life(fold, recovery, journaled, told)


def die(run_dir: Path, config: Config) -> None:
    """A life that ends in its recovery."""
    with pytest.raises(Death):
        live(run_dir, config)


@pytest.fixture
def config() -> Config:
    return make_config(*SMALL)


@pytest.fixture
def scribe(tmp_path: Path, config: Config) -> Iterator[Scribe]:
    """A run with two checkpoints, steps after each, and a refusal."""
    with Scribe(tmp_path / "run", config) as made:
        made.teach(6)
        made.checkpoint()
        made.teach(4)
        made.refuse()
        made.checkpoint()
        made.teach(3)
        made.journal.sync()
        yield made


@pytest.fixture
def run_dir(scribe: Scribe) -> Path:
    """Its directory, after its learner's end."""
    scribe.journal.close()
    return scribe.directory


def checkpoint_paths(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step-*"))


def records_of(run_dir: Path) -> list[Record]:
    return list(read(run_dir / "journal" / "learner-0"))


def expect_whole(life: Life, scribe: Scribe) -> LearnerRecovered:
    """The life stands where the one before it stood."""
    assert is_same_state(life.fold.learner.state(), scribe.learner.state())
    assert contents(life.fold.learner) == contents(scribe.learner)
    event: LearnerRecovered = life.event(LearnerRecovered)
    assert event.state_digest == scribe.digests[-1]
    assert (event.step, event.environment_steps) == (
        scribe.learner.steps_done,
        scribe.learner.environment_steps,
    )
    assert event.is_exact
    assert life.recovery.is_exact
    assert life.kinds() == ["LearnerRecovered"]
    return event


# -- where it begins ---------------------------------------------------------------------------------------------------


def test_a_fresh_journal_begins_with_the_run(tmp_path: Path, config: Config) -> None:
    (tmp_path / "run").mkdir()
    life = live(tmp_path / "run", config, 1)
    started = life.event(RunStarted)
    assert (started.run_id, started.fingerprint) == (RUN_ID, fingerprint())
    assert started.config == config.model_dump(mode="json")
    assert life.kinds() == ["RunStarted"]
    assert life.fold.position == 1
    assert life.recovery.is_exact
    assert life.fold.learner.state().digest == Learner(config, life.fold.learner.policy.spec).state().digest


def test_it_goes_on_from_the_newest_checkpoint(scribe: Scribe, run_dir: Path) -> None:
    life = live(run_dir, scribe.config, 7)
    event = expect_whole(life, scribe)
    newest = checkpoint_paths(run_dir)[-1]
    manifest = checkpoints.read_manifest(newest)
    assert (event.incarnation, event.checkpoint, event.passed_over) == (7, newest.name, {})
    assert event.steps_redone == scribe.learner.steps_done - manifest.step > 0
    assert event.records_folded == len(scribe.digests) - manifest.journal_position
    assert event.seconds > 0
    assert life.recovery.checkpoint_step == manifest.step


@pytest.mark.parametrize("origin", ["checkpoint", "start"])
def test_whoever_waits_is_told_of_what_takes_long_wherever_it_went_on_from(
    scribe: Scribe, run_dir: Path, origin: str
) -> None:
    """Otherwise a learner that compiles, or estimates, for minutes would be taken for one that hangs."""
    if origin == "start":
        shutil.rmtree(run_dir / "checkpoints")
    told: list[str] = []
    with journal_at(run_dir) as journal, Attempts(run_dir / "learner-0.attempts") as attempts:
        recovery = Recovery(
            run_dir,
            RUN_ID,
            2,
            scribe.config,
            journal,
            attempts,
            TickingClock(),
            lambda _: None,
            compiling=lambda: told.append("compiling"),
            consolidating=lambda: told.append("consolidating"),
        )
        learner = recovery.run().learner
    assert (recovery.checkpoint_step > 0) == (origin == "checkpoint")
    learner.engine.computation.compiling()
    learner.engine.consolidating()
    assert told == ["compiling", "consolidating"]


def test_a_second_life_goes_on_from_what_the_first_one_left(scribe: Scribe, run_dir: Path) -> None:
    live(run_dir, scribe.config, 2)
    again = live(run_dir, scribe.config, 3)
    assert again.event(LearnerRecovered).state_digest == scribe.digests[-1]
    assert is_same_state(again.fold.learner.state(), scribe.learner.state())


def boundaries(journal: Path) -> list[tuple[Path, int]]:
    """Where each record ends: its segment, and the offset in it."""
    found = []
    for path in sorted(journal.glob("*.log")):
        with SegmentCursor(path) as cursor:
            while cursor.next(is_closed=False) is not None:
                found.append((path, cursor.offset))
    return found


def cut(run_dir: Path, target: Path, ends: list[tuple[Path, int]], records: int, more_bytes: int = 0) -> None:
    """A copy of a run whose power failed when this many records, and a few bytes of the next, were on the disk."""
    shutil.copytree(run_dir, target)
    last, offset = ends[records - 1]
    for path in (target / "journal" / "learner-0").glob("*.log"):
        if path.name > last.name:
            path.unlink()
        elif path.name == last.name:
            os.truncate(path, offset + more_bytes)


@pytest.mark.parametrize("shift", range(3))
def test_after_a_kill_at_any_record_the_state_is_the_fold(
    tmp_path: Path, scribe: Scribe, run_dir: Path, shift: int
) -> None:
    """Every boundary of records, some torn; checkpoints that are ahead of the journal are there and not used."""
    ends = boundaries(run_dir / "journal" / "learner-0")
    assert len(ends) == len(scribe.digests)
    assert len({path for path, _ in ends}) >= 2, "over several segments"
    saved = {
        record.header["directory"]: record.position
        for record in records_of(run_dir)
        if record.kind == "CheckpointSaved"
    }
    for count in range(1 + shift, len(ends) + 1, 3):
        copy = tmp_path / f"cut-{count}"
        is_next_in_same_file = count < len(ends) and ends[count][0] == ends[count - 1][0]
        cut(run_dir, copy, ends, count, more_bytes=7 * (count % 2) if is_next_in_same_file else 0)
        life = live(copy, scribe.config)
        event = life.event(LearnerRecovered)
        counting = [name for name, position in saved.items() if position < count]
        assert event.state_digest == life.fold.learner.state().digest == scribe.digests[count - 1]
        assert event.checkpoint == (counting[-1] if counting else "")
        assert set(event.passed_over) == set(saved) - set(counting)
        assert event.is_exact
        assert sorted(path.name for path in checkpoint_paths(copy)) == sorted(counting), (
            "the others are removed"
        )

        plain = LearnerFold(scribe.config, copy / "journal" / "learner-0", copy / "none")
        for record in records_of(copy):
            plain.take(record)
        assert is_same_state(life.fold.learner.state(), plain.learner.state())
        assert contents(life.fold.learner) == contents(plain.learner)
        shutil.rmtree(copy)


def test_progress_is_told_twice_a_second_and_never_goes_back(scribe: Scribe, run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    told = live(run_dir, scribe.config).told
    total = len(scribe.digests)
    assert 2 < len(told) < total
    assert told == sorted(told)
    assert {progress.total for progress in told} == {total}
    assert told[-1].done <= total
    assert told[-1].steps_redone > 0
    gaps = np.diff([progress.seconds for progress in told])
    assert gaps.min() >= 0.5 - 1e-9
    assert gaps.max() < 0.9


# -- bad checkpoints ---------------------------------------------------------------------------------------------------


def flip(path: Path, where: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if where is None else where] ^= 0x04
    path.write_bytes(data)


def empty(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


SPOILINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensors cut": (lambda d: os.truncate(d / STATE_FILE, 5000), "bytes, its manifest says"),
    "tensors empty": (lambda d: os.truncate(d / STATE_FILE, 0), "0 bytes"),
    "a tensor's byte flipped": (lambda d: flip(d / STATE_FILE), "SHA-256"),
    "a number's byte flipped": (lambda d: flip(d / "numbers.json"), "SHA-256"),
    "manifest missing": (lambda d: (d / "manifest.json").unlink(), "no manifest.json"),
    "manifest cut": (lambda d: os.truncate(d / "manifest.json", 100), "not a manifest"),
    "tensors missing": (lambda d: (d / STATE_FILE).unlink(), "lacks state.safetensors"),
    "a stranger's file": (lambda d: (d / "notes.txt").write_text("x"), "does not name"),
    "all files missing": (empty, "no manifest.json"),
}


@pytest.mark.parametrize("case", SPOILINGS)
def test_a_bad_checkpoint_falls_back_to_the_one_before_and_says_so(
    scribe: Scribe, run_dir: Path, case: str
) -> None:
    spoil, said = SPOILINGS[case]
    before, newest = checkpoint_paths(run_dir)
    spoil(newest)
    life = live(run_dir, scribe.config)
    event = expect_whole(life, scribe)
    assert event.checkpoint == before.name
    assert set(event.passed_over) == {newest.name}
    assert said in event.passed_over[newest.name]
    assert event.steps_redone == scribe.learner.steps_done - checkpoints.read_manifest(before).step

    assert checkpoint_paths(run_dir) == [before]
    assert (run_dir / "checkpoints" / f"bad-{newest.name}").is_dir(), "for a person to look at"
    again = live(run_dir, scribe.config, 3)
    assert again.event(LearnerRecovered).passed_over == {}, "said once"


def test_with_every_checkpoint_bad_it_folds_from_the_start(scribe: Scribe, run_dir: Path) -> None:
    for path in checkpoint_paths(run_dir):
        flip(path / STATE_FILE)
    event = expect_whole(live(run_dir, scribe.config), scribe)
    assert (event.checkpoint, len(event.passed_over)) == ("", 2)
    assert event.steps_redone == scribe.learner.steps_done
    assert event.records_folded == len(scribe.digests)


def test_without_a_directory_of_checkpoints_it_folds_from_the_start(scribe: Scribe, run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    event = expect_whole(live(run_dir, scribe.config), scribe)
    assert (event.checkpoint, event.passed_over) == ("", {})


def test_a_checkpoint_that_the_journal_does_not_name_does_not_count_and_is_removed(
    tmp_path: Path, config: Config
) -> None:
    with Scribe(tmp_path / "run", config) as scribe:
        scribe.teach(5)
        counts = scribe.checkpoint()
        scribe.teach(2)
        does_not = scribe.checkpoint(is_noted=False)
    event = expect_whole(live(scribe.directory, config), scribe)
    assert event.checkpoint == counts.name
    assert event.passed_over == {does_not.name: "no CheckpointSaved in the journal names it"}
    assert checkpoint_paths(scribe.directory) == [counts]


def test_what_an_interrupted_removal_left_does_not_stop_the_next_one(tmp_path: Path, config: Config) -> None:
    with Scribe(tmp_path / "run", config) as scribe:
        scribe.teach(5)
        does_not = scribe.checkpoint(is_noted=False)
    leftover = does_not.with_name(f".{does_not.name}.removed")
    leftover.mkdir()
    (leftover / "manifest.json").write_text("{}")
    event = expect_whole(live(scribe.directory, config), scribe)
    assert event.checkpoint == ""
    assert event.passed_over[does_not.name].startswith("no CheckpointSaved in the journal names it")


def test_one_that_does_not_count_and_cannot_be_removed_is_told_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: Config
) -> None:
    with Scribe(tmp_path / "run", config) as scribe:
        scribe.teach(5)
        does_not = scribe.checkpoint(is_noted=False)

    def removing(directory: Path) -> None:
        raise UnavailableError("Read-only file system")

    monkeypatch.setattr(checkpoints, "remove", removing)
    event = expect_whole(live(scribe.directory, config), scribe)
    assert event.passed_over == {
        does_not.name: "no CheckpointSaved in the journal names it; Read-only file system"
    }


def test_a_checkpoint_of_another_run_is_passed_over_and_left_alone(tmp_path: Path, config: Config) -> None:
    with Scribe(tmp_path / "run", config) as scribe:
        scribe.teach(5)
        path = scribe.checkpoint()
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text("utf-8").replace(RUN_ID, "run-2"), "utf-8")
    event = expect_whole(live(scribe.directory, config), scribe)
    assert event.passed_over == {path.name: "it belongs to run run-2"}
    assert path.is_dir()


def test_a_checkpoint_that_cannot_be_read_now_is_passed_over_and_left_for_later(
    monkeypatch: pytest.MonkeyPatch, scribe: Scribe, run_dir: Path
) -> None:
    before, newest = checkpoint_paths(run_dir)
    load = checkpoints.load

    def loading(directory: Path) -> Any:
        if directory == newest:
            raise UnavailableError("cannot read it: Input/output error")
        return load(directory)

    monkeypatch.setattr(checkpoints, "load", loading)
    event = expect_whole(live(run_dir, scribe.config), scribe)
    assert event.checkpoint == before.name
    assert event.passed_over == {newest.name: "cannot read it: Input/output error"}
    assert newest.is_dir()


# -- a journal that cannot be folded -----------------------------------------------------------------------------------


def segment_of(run_dir: Path, position: int) -> Path:
    paths = sorted((run_dir / "journal" / "learner-0").glob("*.log"))
    return max(path for path in paths if int(path.stem) <= position)


def flip_record(run_dir: Path, position: int) -> Path:
    """Damage one record in the middle of a segment that has a successor, or a mark behind it."""
    segment = segment_of(run_dir, position)
    with SegmentCursor(segment) as cursor:
        while (record := cursor.next(is_closed=False)) is not None:
            if record.position == position:
                flip(segment, cursor.offset - 20)
                return segment
    raise AssertionError(position)


@pytest.fixture
def wide(tmp_path: Path) -> Scribe:
    """A run of many segments with one checkpoint in the fourth of them, whose buffer begins two before."""
    with Scribe(tmp_path / "run", make_config("experience_buffer.capacity=80")) as scribe:
        scribe.teach(40)
        scribe.checkpoint()
        scribe.teach(24)
    return scribe


def test_damage_in_the_tail_stops_with_segment_and_offset(wide: Scribe) -> None:
    (path,) = checkpoint_paths(wide.directory)
    segment = flip_record(wide.directory, checkpoints.read_manifest(path).journal_position + 6)
    newest = sorted((wide.directory / "journal" / "learner-0").glob("*.log"))[-2:]
    assert segment not in newest, "those are checked already when the journal is opened"
    with pytest.raises(ConfigError, match=rf"{segment.name} is damaged at byte \d+.*restore .* from a copy"):
        live(wide.directory, wide.config)
    last = max((wide.directory / "journal" / "learner-0").glob("*.log"))
    assert {r.kind for r in read(last.parent, int(last.stem))} <= {"ExperienceAdmitted", "LearnerStepped"}


def test_damage_where_the_buffer_is_read_again_stops_too(wide: Scribe) -> None:
    (path,) = checkpoint_paths(wide.directory)
    position = checkpoints.read_manifest(path).journal_position
    segment = flip_record(wide.directory, position - 12)
    for _ in range(5):
        with pytest.raises(ConfigError, match=rf"{segment.name} is damaged at byte \d+"):
            live(wide.directory, wide.config)
    assert path.is_dir(), "the checkpoint is not to blame, however often it is met"


def test_damage_before_all_that_is_needed_does_no_harm(wide: Scribe) -> None:
    flip_record(wide.directory, 3)
    expect_whole(live(wide.directory, wide.config), wide)


@pytest.mark.parametrize("which", ["first", "inner"])
def test_a_segment_that_is_needed_and_missing_is_named(wide: Scribe, which: str) -> None:
    paths = sorted((wide.directory / "journal" / "learner-0").glob("*.log"))
    assert len(paths) >= 5
    if which == "first":
        shutil.rmtree(wide.directory / "checkpoints")
        missing = paths[0]
    else:
        (path,) = checkpoint_paths(wide.directory)
        missing = segment_of(wide.directory, checkpoints.read_manifest(path).journal_position + 14)
        assert missing not in (paths[0], *paths[-2:])
    missing.unlink()
    with pytest.raises(ConfigError, match=r"(oldest segment|follows)"):
        live(wide.directory, wide.config)


def test_a_missing_segment_that_is_not_needed_does_no_harm(wide: Scribe) -> None:
    min((wide.directory / "journal" / "learner-0").glob("*.log")).unlink()
    expect_whole(live(wide.directory, wide.config), wide)


def test_a_record_of_an_unknown_kind_stops_before_anything_is_done(scribe: Scribe) -> None:
    position = scribe.journal.append("GroupStepCommitted", {"step": 1})
    scribe.journal.close()
    with pytest.raises(
        ConfigError, match=f"record {position} .* unknown kind 'GroupStepCommitted'.*newer version"
    ):
        live(scribe.directory, scribe.config)
    assert len(records_of(scribe.directory)) == position + 1


# -- inexact recoveries ------------------------------------------------------------------------------------------------

OTHER = {"torch": "9.9.9", "threads": "64"}


def test_another_fingerprint_is_journaled_and_equal_digests_are_exact_all_the_same(
    monkeypatch: pytest.MonkeyPatch, scribe: Scribe, run_dir: Path
) -> None:
    monkeypatch.setattr(recovery_module, "fingerprint", lambda _: OTHER)
    life = live(run_dir, scribe.config)
    assert life.kinds() == ["FingerprintChanged", "LearnerRecovered"]
    changed = life.event(FingerprintChanged)
    assert (changed.before, changed.after) == (fingerprint(), OTHER)
    assert life.event(LearnerRecovered).is_exact
    assert life.fold.fingerprint == OTHER
    again = live(run_dir, scribe.config, 3)
    assert again.kinds() == ["LearnerRecovered"], "it is known now"


@pytest.fixture
def drifting(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes arithmetic come out a little differently from the moment it is called, as under another torch."""

    def drift() -> None:
        def drifted(**arguments: Any) -> Any:
            return impala_loss(
                **arguments | {"value_coefficient": arguments["value_coefficient"] * (1 + 1e-6)}
            )

        monkeypatch.setattr(impala_module, "impala_loss", drifted)

    return drift


def test_an_update_that_comes_out_otherwise_makes_the_recovery_inexact(
    scribe: Scribe, run_dir: Path, drifting: Callable[[], None]
) -> None:
    drifting()
    life = live(run_dir, scribe.config)
    assert not life.recovery.is_exact
    newest = checkpoints.read_manifest(checkpoint_paths(run_dir)[-1])
    assert life.recovery.divergent_step == newest.step + 1, "the first one that was made again"
    event = life.event(LearnerRecovered)
    assert not event.is_exact
    assert event.state_digest == life.fold.learner.state().digest != scribe.digests[-1]
    assert event.step == scribe.learner.steps_done


def test_a_state_that_comes_out_otherwise_makes_the_recovery_inexact(tmp_path: Path, config: Config) -> None:
    """What the parameters' digests of the updates do not show, such as a moment of Adam."""
    with Scribe(tmp_path / "run", config) as scribe:
        scribe.teach(5)
        step = scribe.learner.steps_done
        scribe.note(CheckpointStaged(step=step, environment_steps=1, state_digest="0" * 16, score=None))
    life = live(scribe.directory, config)
    assert not life.recovery.is_exact
    assert life.recovery.divergent_step == step


@pytest.mark.parametrize("is_exact", [True, False])
def test_an_update_that_failed_is_compared_like_one_that_was_made(
    tmp_path: Path, config: Config, is_exact: bool
) -> None:
    with Scribe(tmp_path / "run", config) as scribe:
        scribe.teach(5)
        while not scribe.learner.can_step():
            scribe.admit(0)
        event = StepFailed(
            step=scribe.learner.steps_done + 1,
            environment_steps=scribe.learner.environment_steps,
            digest="",
            state_digest=None,
            reason="not finite: loss nan",
            out_of_memory=False,
            inputs=StepInputs(at_s=100.0),
        )
        digest = scribe.learner.fail(event).digest
        scribe.note(msgspec.structs.replace(event, digest=digest if is_exact else "0" * 16))
    life = live(scribe.directory, config)
    assert life.recovery.is_exact is is_exact
    assert life.recovery.divergent_step == (None if is_exact else event.step)
    assert life.event(LearnerRecovered).steps_redone == event.step


def test_after_an_inexact_recovery_all_goes_on_from_its_checkpoint(
    scribe: Scribe, run_dir: Path, drifting: Callable[[], None]
) -> None:
    drifting()
    life = live(run_dir, scribe.config, is_checkpointed=True)
    saved = life.event(CheckpointSaved)
    again = live(run_dir, scribe.config, 3)
    event = again.event(LearnerRecovered)
    assert (event.checkpoint, event.steps_redone, event.is_exact) == (saved.directory, 0, True)
    assert event.state_digest == life.event(LearnerRecovered).state_digest


def test_while_its_checkpoint_is_missing_every_recovery_stays_inexact(
    monkeypatch: pytest.MonkeyPatch, scribe: Scribe, run_dir: Path, drifting: Callable[[], None]
) -> None:
    """The state that it went on with is lost: what is folded here is another one, and says so."""
    with monkeypatch.context() as context:
        drifting()
        live(run_dir, scribe.config)
        context.undo()
        monkeypatch.undo()
    again = live(run_dir, scribe.config, 3)
    assert again.recovery.divergent_step is None
    assert not again.event(LearnerRecovered).is_exact


# -- what kills the learner again and again ----------------------------------------------------------------------------


def deadly_admit(monkeypatch: pytest.MonkeyPatch, *positions: int) -> None:
    admit = Learner.admit

    def admitting(self: Learner, position: int, *rest: Any) -> Any:
        if position in positions:
            raise Death
        return admit(self, position, *rest)

    monkeypatch.setattr(Learner, "admit", admitting)


def last_admitted(run_dir: Path) -> int:
    return [record.position for record in records_of(run_dir) if record.kind == "ExperienceAdmitted"][-1]


def test_a_record_that_killed_it_three_times_is_quarantined(
    monkeypatch: pytest.MonkeyPatch, scribe: Scribe, run_dir: Path
) -> None:
    deadly = last_admitted(run_dir)
    deadly_admit(monkeypatch, deadly)
    for _ in range(3):
        die(run_dir, scribe.config)
    life = live(run_dir, scribe.config, 5)
    assert life.kinds() == ["RecordQuarantined", "LearnerRecovered"]
    quarantined = life.event(RecordQuarantined)
    assert (quarantined.position, quarantined.failures) == (deadly, 3)
    event = life.event(LearnerRecovered)
    assert not event.is_exact
    learner = life.fold.learner
    assert event.step == scribe.learner.steps_done
    assert event.environment_steps == scribe.learner.environment_steps
    assert learner.buffer.inserted == scribe.learner.buffer.inserted - LANES


def test_a_later_fold_honours_a_quarantine_and_does_not_say_it_again(
    monkeypatch: pytest.MonkeyPatch, scribe: Scribe, run_dir: Path
) -> None:
    deadly_admit(monkeypatch, last_admitted(run_dir))
    for _ in range(3):
        die(run_dir, scribe.config)
    life = live(run_dir, scribe.config, 5, is_checkpointed=True)
    digest = life.event(LearnerRecovered).state_digest
    again = live(run_dir, scribe.config, 6)
    assert again.kinds() == ["LearnerRecovered"]
    assert again.event(LearnerRecovered).state_digest == digest
    assert again.event(LearnerRecovered).is_exact

    shutil.rmtree(run_dir / "checkpoints")
    from_start = live(run_dir, scribe.config, 7)
    assert from_start.kinds() == ["LearnerRecovered"]
    assert from_start.event(LearnerRecovered).state_digest == digest
    assert contents(from_start.fold.learner) == contents(life.fold.learner)


def test_deaths_at_different_records_quarantine_none(
    monkeypatch: pytest.MonkeyPatch, scribe: Scribe, run_dir: Path
) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    for deadly in (4, 4, 6, 4, 4):
        with monkeypatch.context() as context:
            deadly_admit(context, deadly)
            positions = [r.position for r in records_of(run_dir) if r.kind == "ExperienceAdmitted"]
            assert deadly in positions
            die(run_dir, scribe.config)
    expect_whole(live(run_dir, scribe.config), scribe)


def test_an_update_that_killed_its_recovery_three_times_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, scribe: Scribe, run_dir: Path
) -> None:
    step = Learner.step
    deadly = scribe.learner.steps_done

    def stepping(self: Learner, inputs: StepInputs | None = None) -> Any:
        if self.steps_done + 1 == deadly:
            raise Death
        return step(self)

    monkeypatch.setattr(Learner, "step", stepping)
    for _ in range(3):
        die(run_dir, scribe.config)
    life = live(run_dir, scribe.config, 5)
    assert life.event(RecordQuarantined).position == max(scribe.reports)
    assert not life.event(LearnerRecovered).is_exact
    assert life.fold.learner.steps_done == deadly
    assert life.fold.learner.buffer.consumed == scribe.learner.buffer.consumed


def attempts_of(run_dir: Path, work: Work, number: int, times: int) -> None:
    """Lives that died of this outside of their recoveries."""
    for _ in range(times):
        with Attempts(run_dir / "learner-0.attempts") as attempts:
            attempts.begin(work, number)


def test_an_update_that_killed_it_three_times_is_skipped(tmp_path: Path, config: Config) -> None:
    with Scribe(tmp_path / "run", config) as scribe:
        scribe.teach(5)
        while not scribe.learner.can_step():
            scribe.admit()
    steps, fresh = scribe.learner.steps_done, scribe.learner.buffer.fresh
    attempts_of(scribe.directory, Work.STEP, steps + 1, 3)
    life = live(scribe.directory, config, 5)
    assert life.kinds() == ["StepSkipped", "LearnerRecovered"]
    assert life.event(StepSkipped).step == steps + 1
    assert life.event(LearnerRecovered).step == life.fold.learner.steps_done == steps + 1
    assert life.event(LearnerRecovered).is_exact, "every later fold skips it just so"
    assert life.fold.learner.buffer.fresh == fresh - 6
    again = live(scribe.directory, config, 6)
    assert again.kinds() == ["LearnerRecovered"]
    assert again.event(LearnerRecovered).state_digest == life.event(LearnerRecovered).state_digest


@pytest.mark.parametrize(("work", "failures"), [(Work.STEP, 2), (Work.NOTHING, 3)])
def test_fewer_failures_skip_nothing(tmp_path: Path, config: Config, work: Work, failures: int) -> None:
    with Scribe(tmp_path / "run", config) as scribe:
        scribe.teach(5)
    attempts_of(scribe.directory, work, scribe.learner.steps_done + 1, failures)
    expect_whole(live(scribe.directory, config), scribe)


def test_an_update_of_another_number_is_not_skipped(tmp_path: Path, config: Config) -> None:
    with Scribe(tmp_path / "run", config) as scribe:
        scribe.teach(5)
    attempts_of(scribe.directory, Work.STEP, scribe.learner.steps_done + 2, 3)
    expect_whole(live(scribe.directory, config), scribe)


@pytest.mark.parametrize("death", [Death, MemoryError], ids=lambda death: death.__name__)
def test_a_checkpoint_that_killed_it_three_times_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, scribe: Scribe, run_dir: Path, death: type[BaseException]
) -> None:
    """Killed by the kernel or by an exception of its own: both end the process in the middle of the same work."""
    before, newest = checkpoint_paths(run_dir)
    load = checkpoints.load

    def loading(directory: Path) -> Any:
        if directory == newest:
            raise death
        return load(directory)

    monkeypatch.setattr(checkpoints, "load", loading)
    for _ in range(3):
        with pytest.raises(death):
            live(run_dir, scribe.config)
    event = expect_whole(live(run_dir, scribe.config), scribe)
    assert event.checkpoint == before.name
    assert event.passed_over == {newest.name: "the learner died 3 times while it loaded it"}


def test_a_failure_at_a_record_that_never_got_to_the_disk_quarantines_nothing(
    scribe: Scribe, run_dir: Path
) -> None:
    """The position will be that of another record, even of the very event that would quarantine it."""
    attempts_of(run_dir, Work.RECORD, len(scribe.digests), 3)
    expect_whole(live(run_dir, scribe.config), scribe)


def test_how_many_failures_are_too_many_is_configured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make_config(*SMALL, "supervisor.recovery_attempts_max=1")
    with Scribe(tmp_path / "run", config) as scribe:
        scribe.teach(4)
    deadly_admit(monkeypatch, last_admitted(scribe.directory))
    die(scribe.directory, config)
    assert live(scribe.directory, config).event(RecordQuarantined).failures == 1


def test_steps_of_the_journal_are_counted_however_they_were_made(tmp_path: Path, config: Config) -> None:
    with Scribe(tmp_path / "run", config) as scribe:
        scribe.teach(5)
        scribe.skip()
        scribe.teach(3)
    event = expect_whole(live(scribe.directory, config), scribe)
    made = len([r for r in records_of(scribe.directory) if r.kind == LearnerStepped.__name__])
    assert (event.step, event.steps_redone) == (made + 1, made)
    assert event.environment_steps == T * LANES * 8
