"""Records of what growing a blueprint came to: their file, and a host in numbers."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import numpy as np
import pytest

from esper_simic import blueprint_outcomes
from esper_simic.actions import BLUEPRINTS
from esper_simic.blueprint_outcomes import (
    FEATURES,
    FORMAT,
    Grown,
    OutcomesHead,
    Place,
    PlaceOutcomes,
    decode,
    describe,
    encode,
    relative_parameters,
)
from esper_simic.errors import ConfigError

HEAD = OutcomesHead(
    format=FORMAT,
    command="c",
    versions={"simic": "1"},
    germinated_at=4,
    environment={"max_epochs": 9},
    tasks={},
)


def place(**changed: Any) -> Place:
    whole = Place(
        task="digits",
        host="rescue",
        slot="r0c1",
        kind="image",
        channels=2,
        positions=16,
        block=1,
        blocks=3,
        behind_pool=True,
        host_parameters=77,
        classes=10,
        input_size=64,
        train_size=1347,
    )
    return msgspec.structs.replace(whole, **changed)


def grown(blueprint: str, *changes: float, parameters: int = 40) -> Grown:
    return Grown(
        blueprint=blueprint,
        parameters=parameters,
        accuracy_change=changes,
        loss_change=tuple(-change for change in changes),
        contribution=(None,) * len(changes),
        kept=(True,) * len(changes),
    )


def outcomes(*grown_ones: Grown, seeds: int = 2, **changed: Any) -> PlaceOutcomes:
    return PlaceOutcomes(
        place=place(**changed),
        seeds=tuple(range(seeds)),
        accuracy=tuple(20.0 + trial for trial in range(seeds)),
        loss=(2.0,) * seeds,
        grown=grown_ones,
    )


WRITTEN = encode(HEAD, [outcomes(grown("norm", 1.0, 2.0)), outcomes(grown("mlp", 3.0, 4.0), host="mlp")])


def test_what_was_written_is_read() -> None:
    head, read = decode(WRITTEN, "f")
    assert head == HEAD
    assert read == [outcomes(grown("norm", 1.0, 2.0)), outcomes(grown("mlp", 3.0, 4.0), host="mlp")]
    assert encode(head, read) == WRITTEN
    assert WRITTEN.count(b"\n") == 3, "one value a line"


def altered(line: int, **changed: Any) -> bytes:
    lines = WRITTEN.splitlines()
    lines[line] = json.dumps({**json.loads(lines[line]), **changed}).encode()
    return b"\n".join(lines)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "f is no file of outcomes"),
        (b"{}\n", "f is no file of outcomes"),
        (WRITTEN[:-40], "f is no file of outcomes"),
        (altered(0, format=FORMAT + 1), f"f has format {FORMAT + 1}, this version reads {FORMAT}"),
        (WRITTEN.splitlines()[0], "f holds no outcome"),
        (altered(1, seeds=[1, 2, 3]), "line 2 of f: every column needs one entry for each of its seeds"),
        (altered(1, loss=[1.0]), "line 2 of f: every column needs one entry for each of its seeds"),
        (
            altered(1, seeds=[], accuracy=[], loss=[], grown=[]),
            "line 2 of f: every column needs one entry for each of its seeds",
        ),
        (
            altered(2, grown=[msgspec.to_builtins(grown("noop", 1.0, 2.0))]),
            "line 3 of f: unknown blueprint 'noop'",
        ),
        (
            altered(2, grown=[msgspec.to_builtins(grown("mlp", 1.0))]),
            "line 3 of f: every column needs one entry for each of its seeds",
        ),
        (altered(2, place={**msgspec.to_builtins(place()), "kind": "smell"}), "line 3 of f: unknown kind"),
    ],
)
def test_what_is_no_such_file_is_refused_by_name(data: bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        decode(data, "f")


def test_a_host_in_numbers() -> None:
    """Every number, by its name, from its meaning."""
    one = outcomes(grown("norm", 1.0, 2.0, parameters=5), grown("conv_heavy", 0.0, 0.0, parameters=80))
    numbers = dict(zip(FEATURES, describe(one, 1).tolist(), strict=True))
    expected = dict.fromkeys(FEATURES, 0.0) | {
        "is image": 1.0,
        "ln channels": math.log(2) / 10,
        "ln positions": math.log(16) / 10,
        "share of the blocks before it": 2 / 3,
        "ln blocks": math.log(3) / 10,
        "behind a pool": 1.0,
        "ln host parameters": math.log(77) / 10,
        "ln classes": math.log(10) / 10,
        "ln input size": math.log(64) / 10,
        "ln training samples": math.log(1347) / 10,
        "accuracy": 0.21,
        "advantage over guessing": 0.11,
        "loss by that of guessing": 2 / math.log(10),
        "relative parameters of norm": math.log(1 + 5 / 200),
        "relative parameters of conv_heavy": math.log(1 + 80 / 200),
    }
    assert numbers == pytest.approx(expected)
    assert describe(one, 0).dtype == np.float32
    assert len(FEATURES) == len(set(FEATURES)) == 16 + len(BLUEPRINTS) - 1


def test_a_loss_beyond_all_bounds_stays_a_number_of_the_space() -> None:
    one = msgspec.structs.replace(outcomes(grown("norm", 1.0, 2.0)), loss=(1e9, 1.0))
    assert describe(one, 0)[FEATURES.index("loss by that of guessing")] == 10.0


def test_small_hosts_are_measured_by_a_least_size() -> None:
    assert relative_parameters(0, 10) == 0.0
    assert relative_parameters(200, 10) == pytest.approx(math.log(2))
    assert relative_parameters(600, 600) == pytest.approx(math.log(2))
    assert blueprint_outcomes.HOST_PARAMETERS_MIN == 200
