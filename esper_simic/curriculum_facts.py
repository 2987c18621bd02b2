"""What happened to a curriculum, as facts of the journal."""

from __future__ import annotations

import msgspec

from esper_simic.safety_facts import BreakerFact


class CurriculumAdvanced(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A stage was passed with this rate after so many episodes of its last round."""

    from_stage: str
    to_stage: str
    difficulty: float
    episodes: int
    success_rate: float


class CurriculumHeld(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A round of a stage ended without its success rate; `rounds` have by now."""

    stage: str
    rounds: int
    episodes: int
    success_rate: float


CurriculumFact = CurriculumAdvanced | CurriculumHeld | BreakerFact
