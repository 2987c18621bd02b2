"""What one finished episode came to, in any world."""

from __future__ import annotations

import msgspec


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One episode's end.

    Attributes:
        episode_return: Undiscounted sum of the rewards.
        length: Steps.
        success: Whether the world calls it one.
        measures: What else the world measured, by name.
    """

    episode_return: float
    length: int
    success: bool
    measures: dict[str, float]
