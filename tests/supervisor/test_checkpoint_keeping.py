"""Which checkpoints stay, how the others go, and what a kill at each point of it leaves."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_simic.errors import ContractError, UnavailableError
from supervisor import checkpoints
from supervisor.faults import DIRECTORY_VARIABLE, FAULTS_VARIABLE
from tests.supervisor.checkpoint_files import SMALL, facts, fault, flip_a_byte


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path / "checkpoints", {"state.safetensors": bytes(200)}, facts())


# ---- listing, keeping, removing --------------------------------------------------------------------------------------


def save_scored(parent: Path, *scores: float | None) -> list[Path]:
    """One checkpoint a score, of steps 1, 2, …"""
    return [
        checkpoints.save(parent, SMALL, facts(step) | {"score": score})
        for step, score in enumerate(scores, start=1)
    ]


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def test_a_manifest_of_before_there_were_scores_is_read(saved: Path) -> None:
    path = saved / "manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["score"]
    path.write_text(json.dumps(manifest | {"of_a_later_version": True}))
    assert checkpoints.load(saved)[0].score is None


@pytest.mark.parametrize(
    ("score", "read"), [(None, None), (1.5, 1.5), (-0.0, 0.0), (float("nan"), None), (float("inf"), None)]
)
def test_a_score_is_kept_and_one_that_is_no_number_is_none(
    tmp_path: Path, score: float | None, read: float | None
) -> None:
    (path,) = save_scored(tmp_path, score)
    assert checkpoints.load(path)[0].score == read


def test_a_listing_names_the_bad_ones_in_their_place(tmp_path: Path) -> None:
    assert checkpoints.list_checkpoints(tmp_path / "none") == []
    first, second, third = save_scored(tmp_path, None, 2.0, None)
    again = checkpoints.save(tmp_path, SMALL, facts(2))
    (second / "manifest.json").write_text("{}")
    (third / "manifest.json").unlink()
    (third / "manifest.json").mkdir()  # cannot be read at all
    (tmp_path / "step-000000000004").touch()
    (tmp_path / "notes").mkdir()
    listed = checkpoints.list_checkpoints(tmp_path)
    assert [one.path for one in listed] == [first, second, again, third, tmp_path / "step-000000000004"]
    assert [isinstance(one, checkpoints.GoodCheckpoint) for one in listed] == [
        True,
        False,
        True,
        False,
        False,
    ]
    reasons = [one.reason for one in listed if isinstance(one, checkpoints.BadCheckpoint)]
    assert [
        words in reason for words, reason in zip(("not a man", "cannot read", "is no"), reasons, strict=True)
    ]
    assert isinstance(listed[0], checkpoints.GoodCheckpoint)
    assert listed[0].manifest.step == 1


def kept_by_the_book(
    scores: list[float | None], keep_last: int, keep_best: int, protected: set[int]
) -> set[int]:
    """Steps that stay, by the words of the rule: one is removed if it is in none of the three."""
    stay = set()
    for step, score in enumerate(scores, start=1):
        newer = len(scores) - step
        better = sum(
            other is not None and score is not None and (other, number) > (score, step)
            for number, other in enumerate(scores, start=1)
        )
        if newer < keep_last or (score is not None and better < keep_best) or step in protected:
            stay.add(step)
    return stay


@settings(max_examples=40)
@given(data=st.data(), scores=st.lists(st.none() | st.sampled_from([-1.0, 0.0, 1.0, 2.0]), max_size=7))
def test_what_is_kept_is_the_newest_the_best_and_the_protected(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, scores: list[float | None]
) -> None:
    parent = tmp_path_factory.mktemp("checkpoints")
    paths = save_scored(parent, *scores)
    keep_last, keep_best = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    protected = data.draw(st.sets(st.integers(1, 7), max_size=3))
    removed = checkpoints.prune(
        parent, keep_last, keep_best, protected={checkpoints.directory_name(step) for step in protected}
    )
    stay = kept_by_the_book(scores, keep_last, keep_best, protected)
    assert removed == [path.name for step, path in enumerate(paths, start=1) if step not in stay]
    assert names(parent) == [path.name for step, path in enumerate(paths, start=1) if step in stay]
    for path in parent.iterdir():
        assert checkpoints.load(path)[1] == SMALL


def test_the_last_good_one_stays_and_bad_ones_are_left_for_a_person(tmp_path: Path) -> None:
    paths = save_scored(tmp_path, 1.0, 2.0, 3.0, 4.0)
    for path in paths[2:]:
        (path / "manifest.json").unlink()
    assert checkpoints.prune(tmp_path, 0, 0) == [paths[0].name]
    assert names(tmp_path) == [path.name for path in paths[1:]]
    assert checkpoints.prune(tmp_path, 1, 1) == []
    assert checkpoints.prune(tmp_path / "none", 1, 1) == []


def test_of_equal_scores_the_newer_one_is_the_best(tmp_path: Path) -> None:
    save_scored(tmp_path, 5.0, 5.0, 1.0)
    checkpoints.prune(tmp_path, 1, 1)
    assert names(tmp_path) == ["step-000000000002", "step-000000000003"]


def test_an_interrupted_removal_is_finished_by_the_next_one(tmp_path: Path) -> None:
    paths = save_scored(tmp_path, None, None, None)
    half = tmp_path / f".{paths[0].name}.removed"
    paths[0].rename(half)
    (half / "state.safetensors").unlink()
    assert checkpoints.newest(tmp_path) == paths[2]
    assert checkpoints.prune(tmp_path, 2, 0) == []
    assert names(tmp_path) == [path.name for path in paths[1:]]
    # ... and the same step made anew can be removed although the remains of the first are still there
    (tmp_path / f".{paths[1].name}.removed").mkdir()
    (tmp_path / f".{paths[1].name}.removed" / "numbers.json").touch()
    checkpoints.remove(paths[1])
    assert names(tmp_path) == [paths[2].name]


def test_a_removal_that_the_disk_refuses_is_told(tmp_path: Path) -> None:
    paths = save_scored(tmp_path, None, None)
    with fault(0, lambda: OSError(errno.EROFS, "Read-only file system")):
        with pytest.raises(UnavailableError, match=r"cannot remove .*step-000000000001.*Read-only"):
            checkpoints.prune(tmp_path, 1, 0)
    assert names(tmp_path) == [path.name for path in paths]
    with pytest.raises(UnavailableError, match="cannot remove checkpoint"):
        checkpoints.remove(tmp_path / "step-000000000009")


def test_a_name_is_gone_for_good_before_its_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave the name with half of the files."""
    seen: list[tuple[str, bool]] = []
    real_fsync, real_unlink = os.fsync, os.unlink
    (path,) = save_scored(tmp_path, None)

    def fsync(descriptor: int) -> None:
        seen.append(("sync", path.exists()))
        real_fsync(descriptor)

    def unlink(*arguments: Any, **keywords: Any) -> None:
        seen.append(("unlink", path.exists()))
        real_unlink(*arguments, **keywords)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "unlink", unlink)
    checkpoints.remove(path)
    assert seen == [("sync", False), ("unlink", False), ("unlink", False)]
    assert names(tmp_path) == []


def test_a_bad_one_is_set_aside_whole_under_a_name_that_is_no_checkpoints(saved: Path) -> None:
    for _ in range(2):  # the second of the name takes the place of the first
        flip_a_byte(saved)
        aside = checkpoints.set_aside(saved)
        assert checkpoints.list_checkpoints(saved.parent) == []
        assert names(saved.parent) == [aside.name] == ["bad-step-000000000007"]
        with pytest.raises(ContractError, match="has SHA-256"):
            checkpoints.load(aside)
        saved = checkpoints.save(saved.parent, {"state.safetensors": bytes(200)}, facts())
    (saved.parent / "step-000000000008").mkdir()
    with fault(0, lambda: OSError(errno.EROFS, "Read-only file system")):
        with pytest.raises(UnavailableError, match="cannot set checkpoint .*step-000000000008 aside"):
            checkpoints.set_aside(saved.parent / "step-000000000008")


def test_a_thread_may_save_while_another_prunes(tmp_path: Path) -> None:
    saved: list[Path] = []

    def save_many() -> None:
        saved.extend(save_scored(tmp_path, *[None] * 30))

    thread = threading.Thread(target=save_many)
    thread.start()
    while thread.is_alive():
        checkpoints.prune(tmp_path, 1, 0)
        for one in checkpoints.list_checkpoints(tmp_path):
            assert isinstance(one, checkpoints.GoodCheckpoint)
    thread.join()
    assert len(saved) == 30
    checkpoints.prune(tmp_path, 1, 0)
    assert names(tmp_path) == [saved[-1].name]
    assert checkpoints.load(saved[-1])[1] == SMALL


# ---- killed at the fault points --------------------------------------------------------------------------------------

LIFE = """
import sys, pathlib
from supervisor import checkpoints, faults
faults.arm("learner")
parent = pathlib.Path(sys.argv[1])
for _ in range(4):
    newest = checkpoints.newest(parent)
    step = checkpoints.read_manifest(newest).step + 1 if newest else 1
    facts = {"run_id": "r", "step": step, "environment_steps": 0, "journal_position": step, "state_digest": "d",
             "fingerprint": {}}
    checkpoints.save(parent, {"a": b"a" * step, "b": b"b" * step}, facts)
    print(step, flush=True)
    checkpoints.prune(parent, 2, 0)
"""
OWN_POINTS = [f"checkpoint.{name}" for name in "file.after rename.before rename.after".split()] + [
    f"checkpoint.prune.{name}" for name in "before half after".split()
]


@pytest.mark.processes
@pytest.mark.parametrize("point", OWN_POINTS)
def test_killed_at_a_point_what_has_a_name_is_whole_and_the_next_life_cleans_up(
    tmp_path: Path, point: str
) -> None:
    parent, faults_directory = tmp_path / "checkpoints", tmp_path / "faults"
    faults_directory.mkdir()
    environment = os.environ | {
        FAULTS_VARIABLE: f"learner:{point}:{3 if point == 'checkpoint.file.after' else 2}",
        DIRECTORY_VARIABLE: str(faults_directory),
    }
    steps: list[int] = []
    for expected in (-signal.SIGKILL, 0):
        done = subprocess.run(
            [sys.executable, "-c", LIFE, str(parent)],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[2],
            env=environment,
        )
        assert done.returncode == expected, done.stderr
        told = [int(line) for line in done.stdout.split()]
        steps = [
            checkpoints.load(path)[0].step for path in sorted(parent.glob("step-*"))
        ]  # every named one is whole
        assert steps[-1] >= max(told, default=0)
        assert steps == list(range(steps[0], steps[-1] + 1))
        if expected != 0:
            assert bool(list(parent.glob(".*"))) == (
                point in {"checkpoint.file.after", "checkpoint.rename.before", "checkpoint.prune.half"}
            )
    assert len(steps) == 2
    assert not list(parent.glob(".*"))
