"""One journal and what it folds to, kept for ever: decoding and folding must always work.

Digests count per fingerprint. On a machine whose fingerprint is not in `digests.json` the metrics of every step are
compared within the tolerance instead.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from esper_simic.fingerprint import fingerprint
from supervisor import audit
from supervisor.cli_history.inventory import take_inventory, verify
from supervisor.clock import ManualClock
from supervisor.journal import read
from supervisor.outcome import fold_journal
from supervisor.playback import ReplayReport, Request, replay, words
from supervisor.roles.fold import event_of
from supervisor.state import Phase
from tests.replay.record import BYTES_MAX, OWNER, RUN, UPDATES, WANTED, Computed, compute, known, recorded

HOW = "to note what it folds to here: python -m tests.replay.record --digests"


@pytest.fixture(scope="module")
def computed() -> Computed:
    return compute(RUN)


def expected_here() -> Computed | None:
    here = fingerprint()
    found = [one for one in known() if one["fingerprint"] == here]
    return Computed(found[0]["steps"], found[0]["states"]) if found else None


def look(**asked: Any) -> ReplayReport:
    return replay(Request(RUN, verify=True, **asked), ManualClock())


def test_it_is_small_and_holds_what_can_happen() -> None:
    assert sum(path.stat().st_size for path in RUN.rglob("*") if path.is_file()) <= BYTES_MAX
    held = Counter(record.kind for record in read(RUN / "journal" / OWNER))
    assert {kind: held[kind] for kind, count in WANTED.items() if held[kind] < count} == {}
    assert held["RunStarted"] == 1
    ended = sum(
        len(record.header["episodes"])
        for record in read(RUN / "journal" / OWNER)
        if record.kind == "ExperienceAdmitted"
    )
    assert ended >= 10


def test_every_byte_of_it_is_as_it_was_written() -> None:
    for owner in (OWNER, "supervisor"):
        report = audit.verify(RUN / "journal" / owner)
        assert report.is_sound, report.damage
        assert report.torn_tail is None


def test_every_record_decodes() -> None:
    decoded = [type(event_of(record)).__name__ for record in read(RUN / "journal" / OWNER)]
    assert decoded == [record.kind for record in read(RUN / "journal" / OWNER)]


def test_the_supervisors_journal_folds_to_a_finished_run(tmp_path: Path) -> None:
    shutil.copytree(RUN, tmp_path / "run")
    state = fold_journal(tmp_path / "run")
    assert state.phase is Phase.FINISHED
    assert state.started is not None


def test_it_folds_to_the_digests_that_are_noted_for_this_fingerprint(computed: Computed) -> None:
    assert len(computed.steps) == UPDATES
    expected = expected_here()
    if expected is None:
        pytest.skip(f"this fingerprint is not known, see the next test; {HOW}\n{json.dumps(fingerprint())}")
    assert computed == expected, f"the journal folds to something else than it did; {HOW}, if that is meant"


def test_what_was_noted_where_it_was_made_is_what_the_learner_wrote() -> None:
    made_under = next(read(RUN / "journal" / OWNER)).header["fingerprint"]
    (noted,) = [one for one in known() if one["fingerprint"] == made_under]
    assert Computed(noted["steps"], noted["states"]) == recorded(RUN)


def test_replay_finds_it_equal_or_within_the_tolerance() -> None:
    report = look()
    assert report.is_good, "\n".join(words(report))
    made_under = next(read(RUN / "journal" / OWNER)).header["fingerprint"]
    if made_under == fingerprint():
        assert (report.outcome, report.steps_by_digest) == ("equal", UPDATES)
    assert report.steps == UPDATES
    assert len(report.checkpoints) == len(list((RUN / "checkpoints").iterdir()))


@pytest.mark.parametrize("name", sorted(path.name for path in (RUN / "checkpoints").iterdir()))
def test_it_folds_from_its_checkpoints(name: str) -> None:
    report = look(origin=name)
    assert report.is_good, "\n".join(words(report))
    assert report.last_step == UPDATES


def test_its_checkpoints_count_and_are_sound() -> None:
    found = take_inventory(RUN, RUN / "journal" / OWNER)
    assert len(found.entries) == 2
    for entry in found.entries:
        assert entry.counts, entry.why_not
        assert verify(entry, found.journal) == ""
