"""`environment`: which world is trained in, and what a Gymnasium id needs.

Growing hosts are one world, and every Gymnasium id with spaces of numbers and choices is another. The keys of both
stand in one section; one that the chosen world would not obey is refused, as is any unknown key.
"""

from __future__ import annotations

import re
from math import isfinite
from typing import Any, Final, Literal, Self

import gymnasium
from pydantic import Field, field_validator, model_validator

from esper_simic.config_section import Section

GROWING_HOST: Final = "esper_simic/GrowingHost-v0"
"""Gymnasium id of the growing host."""

BLUEPRINT_CHOICE: Final = "esper_simic/BlueprintChoice-v0"
"""Gymnasium id of the choice of a blueprint for a described host."""

SHARED_KEYS: Final = frozenset({"id", "environments_per_actor", "stagger", "behaviour", "records"})
"""Keys of `environment` that every world obeys."""

GYMNASIUM_KEYS: Final = frozenset({"kwargs", "vectorised", "success_return"})
"""Keys that only a Gymnasium world obeys; the rest belongs to the growing host."""

RESERVED_KWARGS: Final = frozenset(
    {
        "id",
        "num_envs",
        "render_mode",
        "vectorization_mode",
        "vector_kwargs",
        "wrappers",
        "autoreset_mode",
        "disable_env_checker",
    }
)
"""What Simic itself tells Gymnasium when it makes environments."""

ID: Final = re.compile(r"(?:(?P<module>\w+(?:\.\w+)*):)?(?:[\w-]+/)?[\w.-]+-v\d+")


class WorldKeys(Section):
    """The keys of `environment` that say which world it is."""

    id: str = Field(
        GROWING_HOST,
        description="Gymnasium id of the environment. One that a package registers when it is imported stands behind "
        "the module's name, as in package.module:Name-v0.",
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Keywords a Gymnasium id is made with, such as {map_name: 8x8} or {max_episode_steps: 1000}.",
    )
    vectorised: Literal["auto", "never"] = Field(
        "auto",
        description="auto: all lanes are one computation where the id has such a form; never: one environment a lane.",
    )
    success_return: float | None = Field(
        None,
        description="An episode with this return or more is a success; unset: the id's own reward threshold, and "
        "without one no episode is.",
    )
    observation: Literal["graph", "flat"] = Field(
        "graph",
        description="What a policy sees of a growing host: its graph, or one vector of the same numbers.",
    )
    success_accuracy: float = Field(
        80.0,
        ge=0,
        le=100,
        description="A host that ends with this validation accuracy (percent) or more is a success.",
    )

    @field_validator("id")
    @classmethod
    def _known_id(cls, value: str) -> str:
        match = ID.fullmatch(value)
        if match is None:
            raise ValueError(
                "an id is name-v0, namespace/name-v0, or one of these behind the module that registers it, as in "
                "package.module:name-v0; its version belongs to it"
            )
        # What a module registers is known when it was imported, which is for the processes that need it.
        if match["module"] is None and value not in gymnasium.registry:
            try:
                gymnasium.spec(value)
            except gymnasium.error.Error as error:
                raise ValueError(
                    f"{error} An id that a package registers stands behind the module's name: package.module:{value}"
                ) from None
        return value

    @field_validator("kwargs")
    @classmethod
    def _plain_kwargs(cls, value: dict[str, Any]) -> dict[str, Any]:
        reserved = sorted(RESERVED_KWARGS & value.keys())
        if reserved:
            raise ValueError(f"{reserved[0]!r} is not for a configuration to say")
        for name, given in value.items():
            if not _is_plain(given):
                raise ValueError(
                    f"{name!r} must be made of texts, finite numbers, truth values, lists and mappings; it goes "
                    f"into the run's journal"
                )
        return value

    @model_validator(mode="after")
    def _keys_are_obeyed(self) -> Self:
        grows = self.id == GROWING_HOST
        for name, field in type(self).model_fields.items():
            obeyed = name in SHARED_KEYS or (name in GYMNASIUM_KEYS) != grows
            # Defaults are let pass even where they are spelled out: a saved configuration spells out all of them.
            if obeyed or getattr(self, name) == field.get_default(call_default_factory=True):
                continue
            if grows:
                raise ValueError(f"{name} is for other ids than {GROWING_HOST}, whose keys stand beside it")
            raise ValueError(
                f"{name} is for growing hosts ({GROWING_HOST}), and id is {self.id!r}; leave it out (the preset gym "
                f"names no such key): what that id takes stands under kwargs"
            )
        return self


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(_is_plain(inner) for inner in value)
    # The journal's JSON has no word for NaN and infinity: they would come back as nothing.
    return (
        value is None or isinstance(value, str | int | bool) or (isinstance(value, float) and isfinite(value))
    )
