"""Configurations on disk: shipped presets, a user's file, and what a journal recorded."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from esper_simic.config import Config, parse, parse_mapping
from esper_simic.errors import ConfigError


def preset_names() -> tuple[str, ...]:
    """Names of the shipped presets."""
    shipped = resources.files("supervisor") / "presets"
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir() if entry.name.endswith(".yaml")))


def load(preset: str, path: Path | None = None, assignments: Sequence[str] = ()) -> Config:
    """The defaults, overlaid by a preset, a file and assignments, in this order.

    Raises:
        ConfigError: No such preset or file, or the configuration cannot be obeyed.
    """
    if preset not in preset_names():
        raise ConfigError(f"unknown preset {preset!r}; shipped: {', '.join(preset_names())}")
    base = parse_mapping((resources.files("supervisor") / "presets" / f"{preset}.yaml").read_text("utf-8"))
    text = ""
    if path is not None:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
    return parse(text, base=base, assignments=assignments)


def config_of(recorded: dict[str, Any]) -> Config:
    """The configuration that a journal's first event recorded.

    Raises:
        ConfigError: It was written by a version with other keys.
    """
    return parse(yaml.safe_dump(recorded))
