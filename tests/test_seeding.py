"""Random streams: equal names give equal numbers in any process, different names different ones."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from esper_simic import seeding

NAMES = st.lists(st.one_of(st.integers(0, 2**63 - 1), st.text(max_size=8)), min_size=1, max_size=4)


@given(NAMES, NAMES)
def test_streams_are_equal_exactly_when_their_names_are(one: list[int | str], other: list[int | str]) -> None:
    equal = np.array_equal(seeding.generator(*one).random(8), seeding.generator(*other).random(8))
    assert equal == (one == other)
    assert (seeding.derive(*one) == seeding.derive(*other)) == (one == other)


@given(NAMES)
def test_derived_seeds_are_in_range(name: list[int | str]) -> None:
    assert 0 <= seeding.derive(*name) < 2**63


def test_parts_do_not_run_together() -> None:
    assert seeding.derive("ab", "c") != seeding.derive("a", "bc")
    assert seeding.derive(1) != seeding.derive("1")


def test_another_process_draws_the_same() -> None:
    code = (
        "from esper_simic import seeding; "
        "print(seeding.derive(7, 'actor', 0), *seeding.generator(7, 'x').integers(99, size=4))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    here = [seeding.derive(7, "actor", 0), *seeding.generator(7, "x").integers(99, size=4)]
    assert [int(word) for word in printed] == here
