"""Which faults a role's run meets, in which order, and at which passage.

The list is armed in order, so a fault that cannot fire holds up all behind it: a point inside the recovery comes after
one that makes a recovery necessary, and one that only an orderly stop passes comes last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from esper_simic.errors import ConfigError
from supervisor import faults
from supervisor.faults import Fault

ROLES: Final = ("learner", "actor", "supervisor")

DAILY_PASSAGE: Final = 8
"""Passage at which a point of daily work kills: the run is well under way by then, and much was promised."""

BESIDE: Final = ("learner.facts.", "learner.judge.", "learner.stage.")
"""Points that only a run passes which has a curriculum, or trouble."""

RARE: Final = ("journal.segment.", "checkpoint.", "recovery.", "supervisor.resume.", "supervisor.noted.")
"""Points that are passed seldom: the first passage kills."""

SUPERVISOR_PASSAGES: Final[Mapping[str, int]] = {
    "journal.append.": 13,
    "journal.": 9,
    "supervisor.apply.": 9,
    "supervisor.effect.": 4,
}
"""A supervisor writes its journal while it starts its children, and then only when something happens to one of them.
One life with two actors appends 11 records in at most 7 groups and carries out 3 starts until all are ready: these
passages lie behind that, so that it dies while the run trains."""

NOT_PASSED: Final = {"supervisor": ("journal.segment.",)}
"""Points that a role never comes to in a short run: the supervisor's journal is far smaller than a segment."""

AT_THE_END: Final = ("supervisor.noted.before",)
"""Points that are passed only when the run is stopped."""

LEADS_TO_RECOVERY: Final = "checkpoint.prune.before"
"""A death at which a checkpoint counts already, so that the recovery comes to every one of its points."""


def plan(role: str, names: Sequence[str] = ()) -> list[Fault]:
    """The faults of a role in the order in which they are armed.

    Args:
        role: One of `ROLES`.
        names: Only these points; all of the role's by default. Names of other roles' points are passed over. Where a
            point inside the recovery would be the first, another death comes before it.

    Raises:
        ConfigError: No such role, or no such point.
    """
    if role not in ROLES:
        raise ConfigError(f"there is no role {role!r}; known: {', '.join(ROLES)}")
    if unknown := sorted(set(names) - faults.POINTS.keys()):
        raise ConfigError(f"no fault points: {', '.join(unknown)}; known: {', '.join(faults.POINTS)}")
    passed = [name for name, place in faults.POINTS.items() if role in place.roles]
    passed = [name for name in passed if not name.startswith(NOT_PASSED.get(role, ("?",)))]
    chosen = [name for name in passed if not names or name in names]
    if chosen and chosen[0].startswith("recovery."):
        chosen.insert(0, LEADS_TO_RECOVERY)
    chosen.sort(key=lambda name: name in AT_THE_END)
    return [Fault(role, name, passage_of(role, name)) for name in chosen]


def passage_of(role: str, name: str) -> int:
    """At which passage a point kills a process of this role."""
    if name.startswith(RARE):
        return 1
    if role == "supervisor":
        return next(passage for prefix, passage in SUPERVISOR_PASSAGES.items() if name.startswith(prefix))
    return DAILY_PASSAGE


def needs_trouble(planned: Iterable[Fault]) -> bool:
    """Whether some of these points are passed only in a run with a curriculum and trouble."""
    return any(fault.point.startswith(BESIDE) for fault in planned)


def needs_events(fault: Fault) -> bool:
    """Whether something has to happen to a child before this point is passed often enough."""
    return fault.role == "supervisor" and not fault.point.startswith(RARE)
