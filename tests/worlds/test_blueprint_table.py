"""Recorded outcomes as a table to choose from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from esper_simic.actions import BLUEPRINTS
from esper_simic.blueprint_outcomes import describe, encode
from esper_simic.config import HOST_NAMES
from esper_simic.errors import ConfigError
from esper_simic.worlds.blueprint_table import (
    HELD_OUT_HOSTS,
    NOOP,
    PARTS,
    SHIPPED,
    Cases,
    Part,
    Table,
    cases_of,
    read_table,
)
from tests.test_blueprint_outcomes import HEAD, grown, outcomes

NORM, MLP, HEAVY = (BLUEPRINTS.index(name) for name in ("norm", "mlp", "conv_heavy"))

TABLE = Table(
    HEAD,
    (
        outcomes(grown("norm", 1.0, 2.0, 9.0), grown("conv_heavy", 5.0, -5.0, 0.0), seeds=3),
        outcomes(grown("norm", 4.0, 4.0, 4.0), seeds=3, slot="r0c2"),
        outcomes(
            grown("norm", 8.0, 0.0, 0.0), grown("mlp", 1.0, 1.0, 1.0), seeds=3, host="mlp", kind="vector"
        ),
    ),
    "d",
)


def cases(part: Part = "training", **changed: Any) -> Cases:
    settings: dict[str, Any] = {
        "held_out_hosts": (),
        "held_out_trials": 1,
        "accuracy_weight": 0.1,
        "rent_weight": 0.5,
    }
    return cases_of(TABLE, part, **(settings | changed))


def test_a_reward_is_what_accuracy_earns_less_the_rent() -> None:
    rent = 0.5 * math.log(1 + 40 / 200)
    found = cases()
    assert found.names == ("digits/rescue", "digits/mlp")
    assert found.place.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.host.tolist() == [0, 0, 0, 0, 1, 1]
    assert found.reward[:, NORM] == pytest.approx(np.array([0.1, 0.2, 0.4, 0.4, 0.8, 0.0]) - rent)
    assert found.reward[:2, HEAVY] == pytest.approx(np.array([0.5, -0.5]) - rent)
    assert np.flatnonzero(found.mask[0]).tolist() == [NOOP, NORM, HEAVY]
    assert np.flatnonzero(found.mask[2]).tolist() == [NOOP, NORM]
    assert np.flatnonzero(found.mask[5]).tolist() == [NOOP, NORM, MLP]
    assert not found.reward[found.mask == 0].any()
    assert not found.reward[:, NOOP].any()
    assert np.array_equal(found.features[3], describe(TABLE.outcomes[1], 1))


def test_parts_share_no_case_and_leave_none_out() -> None:
    seen = [
        (int(place), tuple(row))
        for part in PARTS
        for found in [cases(part, held_out_hosts=("digits/mlp",))]
        for place, row in zip(found.place, found.features.tolist(), strict=True)
    ]
    assert len(seen) == len(set(seen)) == 9
    assert [len(cases(part, held_out_hosts=("digits/mlp",)).place) for part in PARTS] == [4, 2, 3]
    assert set(cases("unseen-hosts", held_out_hosts=("digits/mlp",)).names) == {"digits/mlp"}
    assert [len(cases(part, held_out_trials=2).place) for part in PARTS[:2]] == [3, 6]


def test_hosts_weigh_alike_however_many_places_they_have() -> None:
    found = cases()
    assert found.weights == pytest.approx([1 / 8] * 4 + [1 / 4] * 2)
    assert found.weights.sum() == pytest.approx(1)


def test_means_by_place_and_over_all() -> None:
    found = cases(rent_weight=0.0)
    by_place = found.mean_by_place()
    assert by_place[:, NORM] == pytest.approx([0.15, 0.15, 0.4, 0.4, 0.4, 0.4])
    assert by_place[:2, HEAVY] == pytest.approx([0.0, 0.0])
    assert np.isneginf(by_place[found.mask == 0]).all()
    ranking = found.ranking()
    assert ranking[NORM] == pytest.approx(((0.1 + 0.2 + 0.4 + 0.4) / 4 + (0.8 + 0.0) / 2) / 2)
    assert ranking[MLP] == pytest.approx(0.1), "over the hosts alone that may be given it"
    assert ranking[NOOP] == 0.0
    assert np.isneginf(ranking[BLUEPRINTS.index("lora")])


def test_what_cannot_be_held_out_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="no outcome of 'digits/oak' is recorded; there are digits/mlp, digits/r"
    ):
        cases(held_out_hosts=("digits/oak",))
    for part in ("unseen-hosts", "training"):
        with pytest.raises(ConfigError, match=f"no case is left for {part}"):
            cases(part, held_out_trials=3)


def test_a_file_is_read_once_and_known_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    path.write_bytes(encode(HEAD, TABLE.outcomes))
    read = read_table(str(path))
    assert (read.head, read.outcomes) == (HEAD, TABLE.outcomes)
    assert read_table(str(path)) is read
    other = tmp_path / "other.jsonl"
    other.write_bytes(encode(msgspec.structs.replace(HEAD, command="other"), TABLE.outcomes))
    assert read_table(str(other)).digest != read.digest


def test_a_file_that_is_not_there_is_missed_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="No such file or directory; make one with simic-supervisor try-blueprints"
    ):
        read_table(str(tmp_path / "none"))


def test_the_table_of_the_package() -> None:
    """It says how it was made, is small, has every kind of host, and enough to hold out."""
    table = read_table("")
    assert table.head.command.startswith("simic-supervisor try-blueprints --out ")
    assert {one.place.task for one in table.outcomes} == set(table.head.tasks)
    assert {one.place.kind for one in table.outcomes} == {"image", "series", "vector", "tokens"}
    assert {one.place.host for one in table.outcomes} <= set(HOST_NAMES)
    assert len({one.place.host for one in table.outcomes}) >= 8
    assert len(encode(table.head, table.outcomes)) < 300_000
    names = {f"{one.place.task}/{one.place.host}" for one in table.outcomes}
    assert set(HELD_OUT_HOSTS) < names
    tried = {one.blueprint for place in table.outcomes for one in place.grown}
    assert tried == set(BLUEPRINTS) - {"noop"}
    found = cases_of(
        table,
        "training",
        held_out_hosts=HELD_OUT_HOSTS,
        held_out_trials=2,
        accuracy_weight=0.1,
        rent_weight=0.5,
    )
    best = found.mean_by_place().argmax(axis=1)
    assert len(set(best.tolist())) >= 4, "no single blueprint is the answer"
    assert SHIPPED == "blueprint_outcomes.jsonl"
