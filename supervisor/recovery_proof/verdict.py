"""Each fault answers for what was promised since the death before it: the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from supervisor.faults import Fault
from supervisor.recovery_proof.campaign import Campaign, settings_of
from supervisor.recovery_proof.evidence import (
    Death,
    Evidence,
    Heard,
    Noted,
    equal_until,
    examine,
    hear,
    history,
    recovery_after,
    replayed,
    training_after,
)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one fault. `acknowledged` counts since the death before; losses are those of these promises."""

    fault: str
    role: str
    fired: bool
    acknowledged: int = 0
    lost: int = 0
    duplicated: int = 0
    is_digest_equal: bool = False
    seconds_to_training: float | None = None
    """None where training did not go on."""

    @property
    def is_good(self) -> bool:
        """Whether it fired, nothing was lost or doubled, digests are equal and training went on."""
        nothing_lost = self.lost == 0 and self.duplicated == 0
        return self.fired and nothing_lost and self.is_digest_equal and self.seconds_to_training is not None


def prove(
    planned: Sequence[Fault],
    directory: Path,
    *,
    tell: Callable[[str], None],
    settings: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Kill one run at each of these points, in order, and check what is left.

    Args:
        planned: Faults of one role.
        directory: Where the run and the witnesses' notes go; made, must not hold an earlier proof.
        tell: Told in a line whatever happens.
        settings: Changes of the small run's configuration, by dotted key.

    Returns:
        A row a fault.

    Raises:
        UnavailableError: The run ended otherwise than it should, left a process behind, or cannot be replayed.
        JournalDamage: What is left of its journal cannot be read.
    """
    campaign = Campaign(directory, planned, {**settings_of(planned), **(settings or {})}, tell)
    campaign.run()
    tell("folding the journal from its first record")
    noted, supervisors = history(campaign.run_dir), history(campaign.run_dir, "supervisor")
    heard, deaths = hear(campaign.notes), campaign.deaths
    evidence = examine(noted, heard, deaths.values())
    equal = 0 if evidence.steps_broken else equal_until(replayed(campaign.run_dir), noted)
    return rows(planned, deaths, heard, evidence, noted, supervisors, equal)


def rows(
    planned: Sequence[Fault],
    deaths: Mapping[int, Death],
    heard: Heard,
    evidence: Evidence,
    noted: Sequence[Noted],
    supervisors: Sequence[Noted],
    equal: int,
) -> list[Row]:
    """The verdict on each fault.

    Args:
        planned: The faults.
        deaths: Those that fired, by their number.
        heard: All that was promised.
        evidence: What is wrong.
        noted: The learner's journal.
        supervisors: The supervisor's journal.
        equal: Position below which digests are those of the fold from the start.
    """
    made = []
    before, began_ns = Heard(), 0
    last = max(deaths, default=-1)
    for number, fault in enumerate(planned):
        death = deaths.get(number)
        if death is None:
            made.append(Row(fault=fault.point, role=fault.role, fired=False))
            continue
        until = heard if number == last else death.heard
        ends_ns = noted[-1].time_ns if number == last and noted else death.at_ns
        since = until.promises - before.promises
        again = training_after(noted, supervisors, fault.role, death.at_ns)
        versions = (until.versions - before.versions) & set(evidence.versions_lost)
        made.append(
            Row(
                fault=fault.point,
                role=fault.role,
                fired=True,
                acknowledged=len(since),
                lost=len(since & evidence.lost) + len(versions),
                duplicated=sum(began_ns < one.time_ns <= ends_ns for one in evidence.duplicated),
                is_digest_equal=_is_equal(noted, death, again, equal),
                seconds_to_training=(again.time_ns - death.at_ns) / 1e9 if again else None,
            )
        )
        before, began_ns = until, ends_ns
    return made


def _is_equal(noted: Sequence[Noted], death: Death, again: Noted | None, equal: int) -> bool:
    """Whether what was recovered, and all up to the training after it, is the fold of the journal from its start."""
    if again is None or again.position >= equal:
        return False
    if death.role == "actor":
        return True
    recovered = recovery_after(noted, death)
    return recovered is not None and recovered.header["is_exact"] and recovered.position < equal


def table(made: Iterable[Row]) -> str:
    """The rows as a Markdown table, and the sum of it in a line."""
    rows_ = list(made)
    lines = [
        "| fault point | role | acknowledged | lost | duplicated | digest equal | s to training again |",
        "|---|---|---:|---:|---:|---|---:|",
    ]
    for row in rows_:
        if not row.fired:
            lines.append(f"| {row.fault} | {row.role} | did not fire | | | | |")
            continue
        seconds = "never" if row.seconds_to_training is None else f"{row.seconds_to_training:.1f}"
        digest = "yes" if row.is_digest_equal else "NO"
        counts = f"{row.acknowledged} | {row.lost} | {row.duplicated}"
        lines.append(f"| {row.fault} | {row.role} | {counts} | {digest} | {seconds} |")
    fired = [row for row in rows_ if row.fired]
    told, lost = sum(row.acknowledged for row in fired), sum(row.lost for row in fired)
    doubled, equal = sum(row.duplicated for row in fired), sum(row.is_digest_equal for row in fired)
    summary = (
        f"{len(fired)} of {len(rows_)} faults fired: {told:,} acknowledged, {lost} lost, {doubled} duplicated; digests "
        f"equal after {equal} of {len(fired)}."
    )
    return "\n".join([*lines, "", summary])
