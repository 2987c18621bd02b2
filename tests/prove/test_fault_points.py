"""Every named fault point: a run dies there, goes on, and has lost and doubled nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor import recovery_proof
from tests.prove.conftest import WHOLE

pytestmark = [pytest.mark.processes, pytest.mark.timeout(1200)]

AT_ONCE = 10 if WHOLE else 5
"""Deaths of one run."""


def parts() -> list[tuple[str, tuple[str, ...]]]:
    divided = []
    for role in recovery_proof.ROLES:
        points = [fault.point for fault in recovery_proof.plan(role)]
        divided += [(role, tuple(points[at : at + AT_ONCE])) for at in range(0, len(points), AT_ONCE)]
    return divided


@pytest.mark.parametrize(
    ("role", "points"), parts(), ids=lambda part: part if isinstance(part, str) else part[0]
)
def test_nothing_promised_is_lost(
    role: str, points: tuple[str, ...], tmp_path: Path, record_proof: Callable[[str, str], None]
) -> None:
    planned = recovery_proof.plan(role, points)
    rows = recovery_proof.prove(planned, tmp_path / role, tell=print)
    record_proof(f"Fault points: {role}, from {points[0]}", recovery_proof.table(rows))
    assert [row for row in rows if not row.is_good] == [], recovery_proof.table(rows)
    assert sum(row.acknowledged for row in rows) > len(rows)
