"""Blueprints: the kinds of seed that can be grafted behind features with C channels.

Each keeps the shape of its input. A blueprint's parameters lie in one flat row per seed; `Blueprint.forward` gets the
rows of all seeds of that blueprint in one slot, `[n, P]`, and computes them as one. `catalogue` lists them.
"""

from __future__ import annotations

from esper_simic.config_environment import Kind
from esper_simic.growing_host.blueprints.catalogue import CATALOGUE, blueprint, probe
from esper_simic.growing_host.blueprints.convolutional import normalisation_groups
from esper_simic.growing_host.blueprints.form import Blueprint, Form, Piece, initial_row, residual

__all__ = [
    "CATALOGUE",
    "Blueprint",
    "Form",
    "Kind",
    "Piece",
    "blueprint",
    "initial_row",
    "normalisation_groups",
    "probe",
    "residual",
]
