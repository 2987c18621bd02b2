"""What happened to learning rates, as facts of the journal."""

from __future__ import annotations

import msgspec


class RateChanged(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From this step on an optimiser's rate has other causes than its schedule alone.

    `causes` names what differs from the step before: `policy`, `factor`, `strength`, `joined`. `before` is the rate
    that step `step` (from 1) would have had without, `after` the one it had, both of the first group.
    """

    name: str
    step: int
    causes: list[str]
    before: float
    after: float


class Tampered(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Before step `step` somebody else had written a rate (L3); the controller's own was written back.

    `group` is the first group concerned, `groups` how many are; `found` is None where it was not a finite number.
    """

    name: str
    step: int
    group: int
    groups: int
    found: float | None
    written: float


RateFact = RateChanged | Tampered
