"""Actors in lockstep: whoever dies, the unrolls are those of a run in which nobody did, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from esper_simic.errors import InvariantViolation
from supervisor.journal import Record, read
from supervisor.protocol import Progress
from supervisor.roles import actor, learner_line, sources
from tests.roles.bench import bench
from tests.roles.pair import SMALL, Pair, Thread, control_line

ROUNDS = 6
ACTORS = (0, 1)


class Run:
    """Two actors and a learner in lockstep; every one of them can end and be followed by its next life."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.held = pair, pair.held
        self.lives = dict.fromkeys(ACTORS, 0)
        self.children: dict[int, Thread] = {}
        self.learner_life = 1

    def begin(self, *indices: int) -> None:
        for index in indices:
            self.lives[index] += 1
            self.children[index] = self.pair.begin(self.lives[index], index)

    def end(self, *indices: int) -> None:
        for index in indices:
            self.pair.stop(self.children.pop(index), self.lives[index], index)

    def replace_learner(self) -> None:
        self.held.kill()
        self.learner_life += 1
        self.held.live(self.learner_life)

    def until(self, *unrolls: int) -> None:
        """Go on until each actor has so many unrolls in the learner's hands."""
        learner = self.held.loop.learner
        self.pair.wait(
            lambda: all(
                learner.ledger.unrolls(index) >= count for index, count in zip(ACTORS, unrolls, strict=True)
            ),
            self.pair.step_turn,
        )

    def work(self, index: int) -> int:
        """What the actor's present life last said of its work; 0 before its first word."""
        said: list[Progress] = self.pair.control.said(Progress)
        mine = [one.work for one in said if (one.index, one.incarnation) == (index, self.lives[index])]
        return mine[-1] if mine else 0


@contextmanager
def lockstep(directory: Path) -> Iterator[Run]:
    with bench(directory, *SMALL, "supervisor.lockstep=true") as held, control_line() as control:
        yield Run(Pair(held, control))


class History(NamedTuple):
    """What a journal says of a run, without lives and times."""

    unrolls: list[tuple[dict[str, Any], list[bytes]]]
    digests: list[str]


def history(run: Run) -> History:
    unrolls, digests = [], []
    for record in run.held.records():
        if record.kind == "ExperienceAdmitted" and record.header["sequence"] <= ROUNDS:
            header = {name: value for name, value in record.header.items() if name != "incarnation"}
            unrolls.append((header, [bytes(frame) for frame in record.frames]))
        elif record.kind == "LearnerStepped":
            digests.append(record.header["digest"])
    return History(unrolls, digests)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_line, "GREETING_INTERVAL_S", 0.1)
    monkeypatch.setattr(actor, "WAIT_MS", 20.0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> History:
    with lockstep(tmp_path_factory.mktemp("whole")) as run:
        run.begin(*ACTORS)
        run.until(ROUNDS, ROUNDS)
        run.end(*ACTORS)
        made = history(run)
    order = [(header["sequence"], header["actor"]) for header, _ in made.unrolls]
    assert order == [(number, index) for number in range(1, ROUNDS + 1) for index in ACTORS]
    versions = [header["policy_version"] for header, _ in made.unrolls]
    assert versions == sorted(versions)
    assert len(set(versions)) > 2, "rounds are made with different weights"
    assert {number for header, _ in made.unrolls for number in header["episode_numbers"]} > {0, 1}
    return made


def assert_same(run: Run, expected: History) -> None:
    found = history(run)
    assert found.unrolls == expected.unrolls
    common = min(len(found.digests), len(expected.digests))
    assert common >= 3
    assert found.digests[:common] == expected.digests[:common]
    assert run.held.records("ExperienceRefused") == []


@pytest.mark.parametrize("lived", range(1, ROUNDS))
def test_an_actors_next_life_makes_the_unrolls_its_last_one_would_have_made(
    tmp_path: Path, uninterrupted: History, lived: int
) -> None:
    with lockstep(tmp_path) as run:
        run.begin(*ACTORS)
        run.until(lived, lived)
        run.end(0)
        # Before its end it may have been in time for one unroll more.
        stood = run.held.loop.learner.ledger.unrolls(0)
        run.begin(0)
        run.until(ROUNDS, ROUNDS)
        # The last round may have been made before; the next life stands there only after it has re-simulated.
        run.pair.wait(lambda: run.work(0) >= stood, run.pair.turn)
        run.end(*ACTORS)
        assert_same(run, uninterrupted)
        made = run.held.loop.learner.ledger.unrolls(0) - stood
        assert run.work(0) >= stood + made, "re-simulating is work: nobody takes it for hanging"


def test_actors_go_on_with_the_next_learner(tmp_path: Path, uninterrupted: History) -> None:
    with lockstep(tmp_path) as run:
        run.begin(*ACTORS)
        run.until(1, 1)
        run.replace_learner()
        run.until(3, 3)
        # An unroll was taken in and is not durable; its sender was told nothing.
        run.pair.wait(lambda: run.held.loop.learner.ledger.unrolls(0) == 4, run.held.loop.take_messages)
        run.replace_learner()
        assert run.held.loop.learner.ledger.unrolls(0) == 3
        run.until(ROUNDS, ROUNDS)
        run.end(*ACTORS)
        assert_same(run, uninterrupted)


def test_everybody_may_die_at_once(tmp_path: Path, uninterrupted: History) -> None:
    with lockstep(tmp_path) as run:
        for rounds in (1, 3, 4, ROUNDS):
            run.begin(*ACTORS)
            run.until(rounds, rounds)
            run.end(*ACTORS)
            if rounds < ROUNDS:
                run.replace_learner()
        assert_same(run, uninterrupted)


def test_an_actor_may_be_followed_by_the_next_while_the_learner_is_away(
    tmp_path: Path, uninterrupted: History
) -> None:
    with lockstep(tmp_path) as run:
        run.begin(*ACTORS)
        run.until(2, 2)
        run.end(0)
        run.held.kill()
        run.begin(0)
        run.pair.wait(
            lambda: any(one.incarnation == 2 for one in run.pair.control.said(Progress)),
            run.pair.control.hear,
        )
        run.learner_life += 1
        run.held.live(run.learner_life)
        run.until(ROUNDS, ROUNDS)
        run.end(*ACTORS)
        assert_same(run, uninterrupted)


# ---- a journal that does not fit -------------------------------------------------------------------------------------


def fail(run: Run) -> str:
    """Why the next life of actor 0 ends."""
    run.begin(0)
    child = run.children.pop(0)
    run.pair.wait(lambda: not child.is_alive(), run.pair.turn)
    with pytest.raises(InvariantViolation) as caught:
        child.finish()
    return str(caught.value)


def test_a_journal_without_an_unroll_that_the_learner_has_ends_the_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lockstep(tmp_path) as run:
        run.begin(*ACTORS)
        run.until(1, 1)
        run.end(*ACTORS)
        stood = run.held.loop.learner.ledger.unrolls(0)

        def without_the_last(directory: Path) -> Iterator[Record]:
            return (
                record
                for record in read(directory)
                if (record.header.get("actor"), record.header.get("sequence")) != (0, stood)
            )

        monkeypatch.setattr(sources, "read", without_the_last)
        assert f"the learner has {stood} unrolls of actor 0" in fail(run)


def test_unrolls_that_are_not_numbered_through_end_the_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lockstep(tmp_path) as run:
        run.begin(*ACTORS)
        run.until(2, 2)
        run.end(*ACTORS)

        def without_the_first(directory: Path) -> Iterator[Record]:
            return (record for record in read(directory) if record.header.get("sequence") != 1)

        monkeypatch.setattr(sources, "read", without_the_first)
        assert "number 1 of actor 0" in (reason := fail(run))
        assert reason.endswith("says it is 2")
