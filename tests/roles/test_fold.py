"""The laws of the fold: it is the living learner's state, and a checkpoint with a tail is the whole."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_simic.errors import ContractError, InvariantViolation, UnavailableError
from esper_simic.events import (
    CheckpointSaved,
    CheckpointStaged,
    ExperienceAdmitted,
    FingerprintChanged,
    LearnerRecovered,
    LearnerStepped,
    RecordQuarantined,
)
from esper_simic.fingerprint import fingerprint
from esper_simic.learner import Learner
from esper_simic.learner_state import LearnerState
from esper_simic.replay import Held
from supervisor import checkpoints
from supervisor.journal import Journal, JournalDamage, Record, read
from supervisor.roles.fold import (
    NUMBERS_FILE,
    STATE_FILE,
    Folded,
    LearnerFold,
    checkpoint_files,
    config_of_journal,
    event_of,
    read_state,
)
from tests.roles.bench import LANES, RUN_ID, make_config
from tests.roles.scribe import Scribe, contents, is_same_state, unroll_frames

SMALL = ("experience_buffer.capacity=16", "simic_trainer.digest_every_steps=2")
"""A buffer of four unrolls: it is overwritten several times in a short history, and seldom at an unroll's edge."""

MOVES = ("admit", "admit", "admit", "step", "step", "refuse", "skip", "stage")
Script = list[tuple[str, int]]
scripts = st.lists(st.tuples(st.sampled_from(MOVES), st.integers(0, 1)), min_size=1, max_size=45)


@contextmanager
def history(script: Script, *assignments: str) -> Iterator[Scribe]:
    """A run that was made by a script; its checkpoints and journal lie in a directory of its own."""
    directory = Path(tempfile.mkdtemp(prefix="simic-fold-"))
    try:
        with Scribe(directory / "run", make_config(*SMALL, *assignments)) as scribe:
            for move, actor in script:
                scribe.move(move, actor)
            scribe.journal.sync()
            yield scribe
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def long(tmp_path: Path) -> Iterator[Scribe]:
    """A run whose buffer was overwritten three times, in the middle of an unroll."""
    with Scribe(tmp_path / "run", make_config(*SMALL)) as scribe:
        scribe.teach(13)
        scribe.refuse(1)
        scribe.journal.sync()
        yield scribe


def new_fold(scribe: Scribe, quarantined: Collection[int] = ()) -> LearnerFold:
    return LearnerFold(scribe.config, scribe.journal.directory, scribe.checkpoints, quarantined=quarantined)


def records_of(scribe: Scribe, start: int = 0) -> list[Record]:
    return list(read(scribe.journal.directory, start))


def take_all(fold: LearnerFold, records: list[Record]) -> list[Folded]:
    return [fold.take(record) for record in records]


def save(scribe: Scribe, fold: LearnerFold) -> Path:
    """The state of a fold as a checkpoint: files, digests and all."""
    state = fold.learner.state()
    manifest = {
        "run_id": RUN_ID,
        "step": fold.learner.steps_done,
        "environment_steps": fold.learner.environment_steps,
        "journal_position": fold.position,
        "state_digest": state.digest,
        "fingerprint": fold.fingerprint,
        "score": fold.learner.score,
    }
    return checkpoints.save(scribe.checkpoints, checkpoint_files(state), manifest)


# -- the fold is the living learner ------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(scripts)
def test_at_every_record_the_fold_is_what_the_living_learner_was(script: Script) -> None:
    with history(script) as scribe:
        fold = new_fold(scribe)
        for record in records_of(scribe):
            folded = fold.take(record)
            assert fold.position == record.position + 1
            assert fold.learner.state().digest == scribe.digests[record.position]
            assert folded.consumed == scribe.consumed.get(record.position, ())
            assert folded.report == scribe.reports.get(record.position)
            if isinstance(folded.event, CheckpointStaged):
                assert folded.state_digest == folded.event.state_digest
            if isinstance(folded.event, LearnerStepped):
                assert folded.state_digest == folded.event.state_digest
        assert is_same_state(fold.learner.state(), scribe.learner.state())
        assert contents(fold.learner) == contents(scribe.learner)
        assert fold.learner.weights() == scribe.learner.weights()


@settings(max_examples=40)
@given(scripts, st.data())
def test_a_checkpoint_anywhere_and_the_tail_are_the_whole(script: Script, data: st.DataObject) -> None:
    """`fold(a + b) == fold(b, from fold(a))`, through the files of a checkpoint, with any records quarantined."""
    with history(script) as scribe:
        records = records_of(scribe)
        cut = data.draw(st.integers(1, len(records)), label="cut")
        movers = [r.position for r in records if r.kind in ("ExperienceAdmitted", "LearnerStepped")]
        quarantined = (
            data.draw(st.sets(st.sampled_from(movers), max_size=3), label="quarantined") if movers else set()
        )

        whole = new_fold(scribe, quarantined)
        take_all(whole, records[:cut])
        directory = save(scribe, whole)
        resumed = new_fold(scribe, quarantined)
        resumed.restore(directory)
        assert resumed.position == whole.position == cut
        assert resumed.fingerprint == whole.fingerprint == fingerprint()
        assert is_same_state(resumed.learner.state(), whole.learner.state())
        assert contents(resumed.learner) == contents(whole.learner)
        assert resumed.learner.weights() == whole.learner.weights(), "what actors act with, too"

        for record in records[cut:]:
            assert resumed.take(record) == whole.take(record)
        assert is_same_state(resumed.learner.state(), whole.learner.state())
        assert contents(resumed.learner) == contents(whole.learner)
        for actor in range(2):
            for life in range(3):
                assert resumed.learner.ledger.settled(actor, life) == whole.learner.ledger.settled(
                    actor, life
                )
            assert resumed.learner.ledger.unrolls(actor) == whole.learner.ledger.unrolls(actor)
            assert resumed.learner.ledger.next_episodes(actor) == whole.learner.ledger.next_episodes(actor)
        assert resumed.learner.ledger.unconsumed() == whole.learner.ledger.unconsumed()
        assert resumed.learner.score == whole.learner.score


def test_the_histories_of_these_laws_are_worth_it(long: Scribe) -> None:
    """Their buffer turns over, is cut inside an unroll, and holds unrolls of which a part is consumed."""
    learner = long.learner
    assert learner.steps_done >= 7
    assert learner.buffer.inserted >= 3 * learner.buffer.capacity
    assert learner.buffer.consumed % LANES != 0
    assert learner.ledger.unconsumed()


def test_a_checkpoint_of_every_position_of_a_long_history(long: Scribe) -> None:
    records = records_of(long)
    whole = new_fold(long)
    for cut, record in enumerate(records, start=1):
        whole.take(record)
        if cut % 5:
            continue
        resumed = new_fold(long)
        resumed.restore(save(long, whole))
        assert contents(resumed.learner) == contents(whole.learner), cut
        folded = take_all(resumed, records[cut:])
        assert [f.report for f in folded if f.report] == [
            report for position, report in long.reports.items() if position >= cut
        ]
        assert is_same_state(resumed.learner.state(), long.learner.state())


# -- the files ---------------------------------------------------------------------------------------------------------


def test_a_state_goes_through_its_files_unchanged(long: Scribe) -> None:
    long.admit(0, episodes=(), numbers=(3, 1, 4, 1))
    state = long.learner.state()
    directory = long.checkpoint()
    manifest, back = read_state(directory)
    assert (back.digest, manifest.state_digest) == (state.digest, state.digest)
    assert back.addresses == state.addresses
    assert repr(back.numbers) == repr(state.numbers), "not even 1 for 1.0"
    assert back.tensors.keys() == state.tensors.keys()
    assert all(back.tensors[name].equal(state.tensors[name]) for name in state.tensors)
    text = json.loads((directory / NUMBERS_FILE).read_text("utf-8"))
    assert set(text) == {"numbers", "addresses"}


def test_a_copy_stays_what_it_was_and_the_state_itself_moves(long: Scribe) -> None:
    copied, itself = long.learner.state().copy(), long.learner.state()
    before = copied.digest
    assert itself.digest == before
    while not long.learner.can_step():
        long.admit()
    long.step()
    assert copied.digest == before
    assert itself.digest != before, "its tensors are the learner's own"


def test_a_loaded_learner_has_tensors_of_its_own(long: Scribe) -> None:
    """Else a step of one of two learners that were made of one state would move the other."""
    while not long.learner.can_step():
        long.admit()
    long.journal.sync()
    state = long.learner.state()
    fold = new_fold(long)
    take_all(fold, records_of(long))
    other = Learner(long.config, long.learner.policy.spec)
    other.load_state(state, held_of(long))
    before = state.digest
    other.step()
    assert long.learner.state().digest == before


def held_of(scribe: Scribe, learner: Learner | None = None) -> Iterator[Held]:
    """What the buffer of the scribe's learner holds, from the journal."""
    fold = new_fold(scribe)
    for position in (learner or scribe.learner).state().addresses["buffer"]["positions"]:
        (record,) = [record for record in records_of(scribe) if record.position == position]
        event = record.header_as(ExperienceAdmitted)
        yield Held(fold.trajectory_of(record, event), event.policy_version, position)


@pytest.mark.parametrize(
    "assignments",
    [
        ("simic_trainer.hidden_size=8",),
        ("simic_trainer.graph_layers=2",),
        ("simic_trainer.unroll_length=2",),
        ("experience_buffer.capacity=24",),
        ("environment.slots=[r0c0]",),
    ],
    ids=lambda assignments: assignments[0],
)
def test_a_state_of_another_configuration_is_refused(long: Scribe, assignments: tuple[str, ...]) -> None:
    other = make_config(*SMALL, *assignments)
    fold = LearnerFold(other, long.journal.directory, long.checkpoints)
    with pytest.raises(ContractError):
        fold.restore(save(long, folded_whole(long)))


def test_a_state_of_a_larger_buffer_is_refused(tmp_path: Path) -> None:
    with Scribe(tmp_path / "run", make_config("experience_buffer.capacity=40")) as scribe:
        scribe.teach(12)
        directory = save(scribe, folded_whole(scribe))
        smaller = LearnerFold(make_config(*SMALL), scribe.journal.directory, scribe.checkpoints)
        with pytest.raises(ContractError, match="a buffer of capacity 16 held nothing of record 3$"):
            smaller.restore(directory)


def folded_whole(scribe: Scribe) -> LearnerFold:
    scribe.journal.sync()
    fold = new_fold(scribe)
    take_all(fold, records_of(scribe))
    return fold


Change = tuple[str, Any]


def without(mapping: dict[str, Any], *path: str) -> dict[str, Any]:
    """A deep copy of a mapping without one entry."""
    copied: dict[str, Any] = json.loads(json.dumps(mapping))
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return copied


@pytest.mark.parametrize(
    "path",
    [
        ("numbers", "steps_done"),
        ("numbers", "environment_steps"),
        ("numbers", "learning_rates"),
        ("numbers", "learning_rates", "value"),
        ("numbers", "reward_scale", "mean"),
        ("numbers", "next_episodes"),
        ("numbers", "unrolls"),
        ("numbers", "episodes"),
        ("numbers", "buffer", "consumed"),
        ("addresses", "answered"),
        ("addresses", "unconsumed"),
        ("addresses", "buffer", "first_serial"),
    ],
    ids=".".join,
)
def test_a_state_that_lacks_something_is_refused(long: Scribe, path: tuple[str, ...]) -> None:
    state = long.learner.state()
    whole = {"numbers": state.numbers, "addresses": state.addresses}
    rest = without(whole, *path)
    broken = LearnerState(state.tensors, rest["numbers"], rest["addresses"])
    learner = Learner(long.config, long.learner.policy.spec)
    with pytest.raises(ContractError, match="not one of a learner so configured"):
        learner.load_state(broken, held_of(long))


def test_a_state_without_a_tensor_is_refused(long: Scribe) -> None:
    state = long.learner.state()
    name = next(name for name in state.tensors if name.startswith("policy."))
    tensors = {key: tensor for key, tensor in state.tensors.items() if key != name}
    with pytest.raises(ContractError, match="not one of a learner so configured"):
        Learner(long.config, long.learner.policy.spec).load_state(
            LearnerState(tensors, state.numbers, state.addresses), held_of(long)
        )


@pytest.mark.parametrize("which", ["first", "last"])
def test_a_state_whose_unrolls_are_not_all_there_is_refused(long: Scribe, which: str) -> None:
    held = list(held_of(long))
    given_ = held[1:] if which == "first" else held[:-1]
    with pytest.raises(ContractError, match="experience"):
        Learner(long.config, long.learner.policy.spec).load_state(long.learner.state(), given_)


@pytest.mark.parametrize("name", [STATE_FILE, NUMBERS_FILE])
def test_a_checkpoint_of_somebody_else_is_no_learners(tmp_path: Path, long: Scribe, name: str) -> None:
    files = checkpoint_files(long.learner.state())
    manifest = {
        "run_id": RUN_ID,
        "step": 1,
        "environment_steps": 1,
        "journal_position": 1,
        "state_digest": long.learner.state().digest,
        "fingerprint": {},
        "score": None,
    }
    lacking = checkpoints.save(tmp_path / "one", {k: v for k, v in files.items() if k != name}, manifest)
    with pytest.raises(ContractError, match=f"has no file '{name}'"):
        read_state(lacking)
    garbage = checkpoints.save(tmp_path / "two", files | {name: b"[]garbage"}, manifest)
    with pytest.raises(ContractError, match="cannot be decoded"):
        read_state(garbage)


def test_a_checkpoint_with_another_state_than_its_manifest_names_is_refused(
    tmp_path: Path, long: Scribe
) -> None:
    """Files that are whole by their digests, of a state that is not the one: somebody wrote it so."""
    state = long.learner.state().copy()
    next(iter(state.tensors.values())).view(-1)[0] += 1
    manifest = {
        "run_id": RUN_ID,
        "step": 1,
        "environment_steps": 1,
        "journal_position": 1,
        "state_digest": long.learner.state().digest,
        "fingerprint": {},
        "score": None,
    }
    directory = checkpoints.save(tmp_path / "other", checkpoint_files(state), manifest)
    with pytest.raises(ContractError, match=f"has digest {state.digest}, its manifest says"):
        read_state(directory)


# -- what a journal may hold -------------------------------------------------------------------------------------------


def test_facts_that_move_nothing_move_nothing(long: Scribe) -> None:
    before = long.learner.state().digest
    other = {"torch": "another"}
    for event in (
        CheckpointSaved(step=1, environment_steps=1, directory="d", state_digest="", files={}),
        RecordQuarantined(position=1, failures=3, reason=""),
        recovered(is_exact=True, state_digest=before),
        FingerprintChanged(before=fingerprint(), after=other),
    ):
        long.note(event)
    fold = folded_whole(long)
    assert fold.learner.state().digest == before
    assert fold.fingerprint == other
    assert not fold.is_waiting_for_checkpoint


def recovered(*, is_exact: bool, state_digest: str = "") -> LearnerRecovered:
    return LearnerRecovered(
        incarnation=2,
        checkpoint="",
        passed_over={},
        records_folded=1,
        steps_redone=0,
        step=0,
        environment_steps=0,
        state_digest=state_digest,
        is_exact=is_exact,
        seconds=0.0,
    )


def test_an_inexact_recovery_is_crossed_through_the_checkpoint_behind_it(long: Scribe) -> None:
    """What follows it was made by another state than the fold of what stands before it: here, one without the past."""
    long.note(recovered(is_exact=False))
    elsewhere = Learner(long.config, long.learner.policy.spec)
    long.learner = elsewhere
    directory = long.checkpoint()
    saved_at = len(long.digests) - 1
    long.teach(6)
    assert elsewhere.steps_done >= 2
    long.journal.sync()

    fold = new_fold(long)
    differing = 0
    for record in records_of(long):
        folded = fold.take(record)
        assert fold.is_waiting_for_checkpoint == (record.position >= saved_at - 2), record.position
        if isinstance(folded.event, CheckpointSaved):
            break
    assert folded.event.directory == directory.name  # type: ignore[union-attr]
    fold.restore(long.checkpoints / directory.name)
    assert not fold.is_waiting_for_checkpoint
    assert fold.position == saved_at - 1, "where it was staged; what follows is folded upon it"
    for folded in take_all(fold, records_of(long, fold.position)):
        if isinstance(folded.event, LearnerStepped):
            assert folded.report is not None
            differing += folded.report.digest != folded.event.digest
    assert differing == 0
    assert is_same_state(fold.learner.state(), elsewhere.state())


def test_an_unknown_kind_and_a_wrong_header_are_refused_by_position(tmp_path: Path, long: Scribe) -> None:
    position = long.journal.append("SomethingNew", {"a": 1})
    wrong = long.journal.append("LearnerStepped", {"step": "one"})
    long.journal.sync()
    records = records_of(long, position)
    with pytest.raises(ContractError, match=f"record {position} is of unknown kind 'SomethingNew'; known: "):
        event_of(records[0])
    with pytest.raises(ContractError, match=f"record {wrong}"):
        event_of(records[1])


def test_a_journal_says_under_which_configuration_it_was_made(tmp_path: Path, long: Scribe) -> None:
    assert config_of_journal(long.journal.directory) == long.config
    with Journal(tmp_path / "other", owner="learner-0", run_id=RUN_ID) as journal:
        with pytest.raises(ContractError, match="does not begin with RunStarted: it is empty"):
            config_of_journal(journal.directory)
        journal.append("StepSkipped", {"step": 1, "reason": ""})
        journal.sync()
        with pytest.raises(ContractError, match="does not begin with RunStarted: it is not a learner's"):
            config_of_journal(journal.directory)


def test_an_update_where_none_can_be_made_contradicts_the_journal(long: Scribe) -> None:
    report = long.reports[max(long.reports)]
    for _ in range(9):
        stepped = LearnerStepped(
            step=report.step, environment_steps=1, digest="", state_digest=None, metrics={}
        )
        long.note(stepped)
    with pytest.raises(InvariantViolation, match="can_step"):
        folded_whole(long)


# -- what is passed over -----------------------------------------------------------------------------------------------


def test_whole_states_are_compared_wherever_the_journal_has_them(tmp_path: Path) -> None:
    """`digest_every_steps` may have been another one when the journal was written."""
    with Scribe(tmp_path / "run", make_config("simic_trainer.digest_every_steps=1")) as scribe:
        scribe.teach(5)
        scribe.journal.sync()
        seldom = make_config("simic_trainer.digest_every_steps=1000")
        fold = LearnerFold(seldom, scribe.journal.directory, scribe.checkpoints)
        folded = [f for f in take_all(fold, records_of(scribe)) if isinstance(f.event, LearnerStepped)]
    assert [f.state_digest for f in folded] == [report.state_digest for report in scribe.reports.values()]
    assert len(folded) >= 2
    assert None not in [f.state_digest for f in folded]


def test_a_quarantined_unroll_is_lost_and_counts_as_made_and_answered(tmp_path: Path) -> None:
    """Its sender was told, or will be, that it is durable; its episodes were begun; in lockstep its round is over."""
    with Scribe(tmp_path / "run", make_config(*SMALL)) as scribe:
        scribe.teach(3)
        lost = scribe.admit(1, numbers=(4, 5, 6, 7))
        scribe.journal.sync()
        fold = new_fold(scribe, {lost})
        take_all(fold, records_of(scribe))
        learner, truth = fold.learner, scribe.learner
        assert learner.buffer.inserted == truth.buffer.inserted - LANES
        assert learner.environment_steps == truth.environment_steps
        assert learner.ledger.settled(1, 1) == truth.ledger.settled(1, 1) == 2
        assert learner.ledger.unrolls(1) == truth.ledger.unrolls(1) == 2
        assert learner.ledger.next_episodes(1) == truth.ledger.next_episodes(1) == [5, 6, 7, 8]
        assert [unroll.position for unroll in learner.ledger.unconsumed()] == [
            unroll.position for unroll in truth.ledger.unconsumed() if unroll.position != lost
        ]


def test_updates_that_lack_what_was_quarantined_are_skipped_and_not_died_of(tmp_path: Path) -> None:
    """Else every one of them would be quarantined in its turn, after three deaths each."""
    with Scribe(tmp_path / "run", make_config(*SMALL)) as scribe:
        scribe.teach(2)
        lost = scribe.admit()
        scribe.teach(10)
        scribe.journal.sync()
        fold = new_fold(scribe, {lost})
        folded = [f for f in take_all(fold, records_of(scribe)) if isinstance(f.event, LearnerStepped)]
        assert any(f.report is None for f in folded), "an update lacks experience"
        assert any(f.report is not None for f in folded)
        assert fold.learner.steps_done == scribe.learner.steps_done, "each counts"
        assert fold.learner.buffer.fresh >= 0
        taken = [position for f in folded for position in f.consumed]
        assert lost not in taken
        assert len(set(taken)) == len(taken)


def test_a_quarantined_update_learns_nothing_and_consumes_its_batch(tmp_path: Path) -> None:
    with Scribe(tmp_path / "run", make_config(*SMALL)) as scribe:
        scribe.teach(5)
        lost = max(scribe.reports)
        scribe.journal.sync()
        records = records_of(scribe)
        fold, before = new_fold(scribe, {lost}), new_fold(scribe)
        take_all(fold, records)
        take_all(before, records[:lost])
        assert fold.learner.steps_done == scribe.learner.steps_done
        assert fold.learner.buffer.consumed == scribe.learner.buffer.consumed
        weights, truth = fold.learner.policy.state_dict(), before.learner.policy.state_dict()
        parameters = dict(fold.learner.policy.named_parameters())
        assert all(weights[name].equal(truth[name]) for name in parameters)


# -- the buffer's records ----------------------------------------------------------------------------------------------


def test_a_checkpoint_whose_records_are_not_in_this_journal_is_refused(tmp_path: Path, long: Scribe) -> None:
    directory = save(long, folded_whole(long))
    with Scribe(tmp_path / "short", long.config) as short:
        short.teach(3)
        short.journal.sync()
        fold = LearnerFold(short.config, short.journal.directory, short.checkpoints)
        with pytest.raises(UnavailableError, match="ends before record"):
            fold.restore(directory)
    with Scribe(tmp_path / "wrong", long.config) as wrong:
        for _ in range(200):
            wrong.refuse()
        wrong.journal.sync()
        fold = LearnerFold(wrong.config, wrong.journal.directory, wrong.checkpoints)
        with pytest.raises(ContractError, match="the buffer held record .*, which is a ExperienceRefused"):
            fold.restore(directory)


def test_damage_where_the_buffers_contents_stand_is_named(long: Scribe) -> None:
    directory = save(long, folded_whole(long))
    first = long.learner.state().addresses["buffer"]["positions"][0]
    segment = max(path for path in long.journal.directory.glob("*.log") if int(path.stem) <= first)
    data = bytearray(segment.read_bytes())
    data[len(data) - 5000] ^= 0x10
    segment.write_bytes(data)
    with pytest.raises(JournalDamage, match=segment.name):
        new_fold(long).restore(directory)


def test_a_lockstep_unroll_carries_the_actors_state_behind_its_frames(tmp_path: Path) -> None:
    config = make_config(*SMALL, "supervisor.lockstep=true")
    with Scribe(tmp_path / "run", config) as scribe:
        width = scribe.learner.policy.state_size
        for number in range(4):
            carried = np.zeros((LANES, width), dtype="<f4").tobytes()
            scribe.admit(number % 2, frames=(*unroll_frames(number), carried))
        scribe.step()
        scribe.journal.sync()
        fold = new_fold(scribe)
        take_all(fold, records_of(scribe))
        assert is_same_state(fold.learner.state(), scribe.learner.state())
        resumed = new_fold(scribe)
        resumed.restore(save(scribe, fold))
        assert contents(resumed.learner) == contents(scribe.learner)
