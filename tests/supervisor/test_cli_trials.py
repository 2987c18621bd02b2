"""`simic-supervisor try-blueprints`: blueprints really grown, and a file of what came of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper_simic.actions import BLUEPRINTS
from esper_simic.blueprint_outcomes import decode
from esper_simic.worlds.blueprint_choice import BlueprintChoiceVectorEnv
from supervisor.cli_common import FAILED, USAGE
from supervisor.cli_trials import HOSTS
from tests.supervisor.doors import Door, open_door

QUICK = (
    "--host",
    "wine/mlp",
    "--seeds",
    "3",
    "--epochs",
    "6",
    "--training-epochs",
    "1",
    "--germinate-at",
    "1",
)


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Door:
    return open_door(monkeypatch, capsys, tmp_path / "cwd")


def test_it_grows_them_and_writes_what_karn_can_learn_from(door: Door, tmp_path: Path) -> None:
    out = tmp_path / "wine.jsonl"
    said = door("try-blueprints", "--out", out, *QUICK)
    assert said.code == 0, said.err
    assert "wine mlp r0c0: " in said.out
    assert f"{out}: 3 places, {out.stat().st_size:,} bytes" in said.out
    head, outcomes = decode(out.read_bytes(), "it")
    assert head.command == f"simic-supervisor try-blueprints --out {out} {' '.join(QUICK)}"
    assert (head.germinated_at, head.environment) == (1, {"max_epochs": 6, "training_epochs_min": 1})
    assert set(head.tasks) == {"wine"}
    assert len(head.tasks["wine"]) == 64
    assert {"simic", "torch"} < set(head.versions)
    assert [one.place.slot for one in outcomes] == ["r0c0", "r0c1", "r0c2"]
    assert {one.seeds for one in outcomes} == {(0, 1, 2)}
    envs = BlueprintChoiceVectorEnv(table=str(out), held_out_trials=1)
    assert len(envs.cases.place) == 6
    offered = {BLUEPRINTS[choice] for choice in range(13) if envs.cases.mask[0, choice]}
    assert offered == {"noop", "norm", "lora", "lora_large", "mlp_small", "mlp"}


def test_slots_behind_pools_are_tried_where_that_is_asked(door: Door, tmp_path: Path) -> None:
    out = tmp_path / "f"
    rescue = (
        "--host",
        "synthetic:1x8x8:2:64/rescue",
        "--seeds",
        "1",
        "--epochs",
        "5",
        "--training-epochs",
        "1",
    )
    assert door("try-blueprints", "--out", out, *rescue, "--germinate-at", "1").code == 0
    assert {one.place.behind_pool for one in decode(out.read_bytes(), "it")[1]} == {False}
    assert door("try-blueprints", "--out", out, *rescue, "--germinate-at", "1", "--behind-pools").code == 0
    places = [one.place for one in decode(out.read_bytes(), "it")[1]]
    assert [(one.slot, one.behind_pool) for one in places] == [
        (f"r{row}c{block}", bool(row)) for block in range(3) for row in range(2)
    ]


@pytest.mark.parametrize("host", ["rescue", "digits/oak", "/rescue"])
def test_what_is_no_host_is_a_usage_error(door: Door, tmp_path: Path, host: str) -> None:
    said = door("try-blueprints", "--out", tmp_path / "f", "--host", host)
    assert said.code == USAGE
    assert "--host takes TASK/HOST with one of rescue, minimal" in said.err
    assert f"not {host!r}" in said.err


def test_a_place_that_cannot_be_written_to_is_named(door: Door, tmp_path: Path) -> None:
    out = tmp_path / "none" / "f"
    said = door("try-blueprints", "--out", out, *QUICK)
    assert said.code == FAILED
    assert f"cannot write {out}: No such file or directory; name another place with --out" in said.err


def test_the_hosts_that_are_tried_by_default_are_named_once() -> None:
    assert len(set(HOSTS)) == len(HOSTS) == 16
