"""What every section of the configuration has in common, and how names in it are checked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A frozen part of the configuration in which unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: object, info: ValidationInfo) -> object:
        # YAML reads `no`, `on`, `yes` as truth values; as numbers they would silently be 0 and 1.
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("a truth value (YAML reads yes, no, on, off as such) cannot stand here")
        return value


RECORDED: Final = "recorded"
"""In the context of a validation: the configuration is read back from where a run wrote it down."""


def was_recorded(info: ValidationInfo) -> bool:
    """Whether this was taken once, by an earlier version perhaps: what has come to be refused since must not end a run.

    Only of refusals that came later, and of what can be done all the same.
    """
    return bool((info.context or {}).get(RECORDED))


def distinct_known(value: tuple[str, ...], known: Iterable[str], noun: str) -> tuple[str, ...]:
    """Names as they were given, if each is known and none is there twice.

    Raises:
        ValueError: An unknown name (with the nearest known one), a repeated one, or none at all.
    """
    known = tuple(known)
    for name in value:
        if name not in known:
            raise ValueError(f"unknown {noun} {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    if not value or len(set(value)) != len(value):
        raise ValueError(f"name at least one {noun}, each once")
    return value


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint at the nearest known word, empty where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
