"""The proof of recovery: a small run is killed at every named fault point, and what is left is checked.

One run for each role. All faults of the role are armed in order (`faults`); each fires once and the run goes on: a dead
learner or actor is replaced by the supervisor, a dead supervisor is started again with the same command. When all have
fired and training goes on, the run is stopped in order (`campaign`).

Then the witnesses speak: every actor noted which unrolls were acknowledged to it, and where, and which versions of the
weights it was given. Each unroll must stand in the learner's journal at that position, and none twice; no recovery may
have reached less than what somebody had seen; and the whole journal, folded again from its first record, must give
every digest that stands in it, those of every recovery too (`evidence`). `verdict` makes the table.
"""

from __future__ import annotations

from supervisor.recovery_proof.campaign import SETTINGS, orphans
from supervisor.recovery_proof.evidence import (
    Death,
    Evidence,
    Heard,
    equal_until,
    examine,
    hear,
    history,
    replayed,
    training_after,
)
from supervisor.recovery_proof.planning import ROLES, plan
from supervisor.recovery_proof.verdict import Row, prove, table

__all__ = [
    "ROLES",
    "SETTINGS",
    "Death",
    "Evidence",
    "Heard",
    "Row",
    "equal_until",
    "examine",
    "hear",
    "history",
    "orphans",
    "plan",
    "prove",
    "replayed",
    "table",
    "training_after",
]
