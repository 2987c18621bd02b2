"""`environment`: who acts in the episodes that are learned from."""

from __future__ import annotations

from typing import Final, Self

from pydantic import Field, model_validator

from esper_simic.config_gym import GROWING_HOST, WorldKeys
from esper_simic.config_section import distinct_known

POLICY: Final = "policy"
"""The policy that is learned acts."""

RECORDED: Final = "recorded"
"""Nobody acts: what other runs recorded is learned from."""

RANDOM: Final = "random"

GROWTH_SCRIPTS: Final = ("heuristic", "patient", "fixed-schedule", "farm", RANDOM, "never-grow")
"""The scripted controllers of growing hosts, in the order in which they are shown."""

PLAY_SCRIPTS: Final = (RANDOM,)
"""The scripted policies of every other world."""


class BehaviourKeys(WorldKeys):
    """The keys of `environment` that say who acts."""

    behaviour: str = Field(
        POLICY,
        description="Who acts in training. policy: the one that is learned; recorded: nobody, the unrolls of `records` "
        f"are learned from; or a scripted policy: {', '.join(GROWTH_SCRIPTS)} of growing hosts, {RANDOM} elsewhere.",
    )
    records: tuple[str, ...] = Field(
        (),
        description="Directories of the runs whose recorded unrolls are learned from, again and again in their order.",
    )

    @property
    def scripts(self) -> tuple[str, ...]:
        """The scripted policies of this world."""
        return GROWTH_SCRIPTS if self.id == GROWING_HOST else PLAY_SCRIPTS

    @property
    def script(self) -> str | None:
        """The scripted policy that acts, if one does."""
        return None if self.behaviour in (POLICY, RECORDED) else self.behaviour

    @model_validator(mode="after")
    def _somebody_acts(self) -> Self:
        distinct_known((self.behaviour,), (POLICY, RECORDED, *self.scripts), f"behaviour in {self.id}")
        if self.behaviour == RECORDED and not self.records:
            raise ValueError("behaviour 'recorded' needs records: the directories of runs to learn from")
        if self.behaviour != RECORDED and self.records:
            raise ValueError(
                f"records are learned from with behaviour 'recorded' only; behaviour is {self.behaviour!r}"
            )
        return self
