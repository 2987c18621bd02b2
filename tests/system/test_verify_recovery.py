"""`simic-supervisor verify-recovery` as an operator calls it, one fault each of two roles; more in tests/prove."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.driver import say

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]


def test_deaths_are_proven_to_lose_nothing(tmp_path: Path) -> None:
    points = ("journal.sync.after", "actor.send.after")
    asked = ["--role=actor", "--role=supervisor", *(f"--point={point}" for point in points)]
    said = say("verify-recovery", *asked, "--keep", tmp_path / "kept", "--json", within_s=800)
    assert said.code == 0, said.out + said.err
    rows = said.json()
    assert [(row["role"], row["fault"]) for row in rows] == [
        ("actor", "actor.send.after"),
        ("supervisor", "journal.sync.after"),
    ]
    for row in rows:
        assert row["fired"]
        assert (row["lost"], row["duplicated"]) == (0, 0)
        assert row["is_digest_equal"]
        assert row["acknowledged"] > 0
        assert 0 < row["seconds_to_training"] < 120
    assert "supervisor died at journal.sync.after" in said.err, "progress is shown while it works"
    again = say("verify-recovery", *asked, "--keep", tmp_path / "kept")
    assert again.code == 1
    assert "name another directory" in again.err


def test_unknown_points_and_roles_are_refused(tmp_path: Path) -> None:
    said = say("verify-recovery", "--point", "learner.sneeze", "--keep", tmp_path / "kept")
    assert said.code == 78
    assert "learner.sneeze" in said.err
    assert "learner.step.after" in said.err, "the known ones are named"
    said = say("verify-recovery", "--role", "editor", "--keep", tmp_path / "kept")
    assert said.code == 78
    assert not (tmp_path / "kept").exists()
