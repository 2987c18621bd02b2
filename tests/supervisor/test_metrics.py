"""Scalars read back from the real event file with TensorBoard's own reader."""

from __future__ import annotations

import errno
import math
import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from esper_simic.errors import UnavailableError
from supervisor.metrics import TAGS, TensorBoardWriter

CLEANRL = {
    "charts/episodic_return",
    "charts/episodic_length",
    "charts/learning_rate",
    "charts/SPS",
    "losses/value_loss",
    "losses/policy_loss",
    "losses/entropy",
    "losses/approx_kl",
    "losses/clipfrac",
    "losses/explained_variance",
}


def scalars(directory: Path) -> dict[str, list[tuple[int, float, float]]]:
    reader = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    reader.Reload()
    return {
        tag: [(event.step, event.value, event.wall_time) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def test_values_stand_under_cleanrls_tags_at_their_environment_step(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "tensorboard"
    writer = TensorBoardWriter(directory)
    writer.write(640, {"episodic_return": 1.5, "policy_loss": -0.25, "steps_per_second": 300.0}, 1000.0)
    writer.write(1280, {"episodic_return": 2.5, "policy_loss": math.nan}, 1001.5)
    writer.close()
    read = scalars(directory)
    assert set(read) == {"charts/episodic_return", "losses/policy_loss", "charts/SPS"}
    assert read["charts/episodic_return"] == [(640, 1.5, 1000.0), (1280, 2.5, 1001.5)]
    assert read["charts/SPS"] == [(640, 300.0, 1000.0)]
    assert [(step, math.isnan(value)) for step, value, _ in read["losses/policy_loss"]] == [
        (640, False),
        (1280, True),
    ]


def test_every_metric_with_a_tag_has_its_own_and_cleanrls_are_among_them(tmp_path: Path) -> None:
    assert set(TAGS.values()) >= CLEANRL
    assert len(set(TAGS.values())) == len(TAGS)
    writer = TensorBoardWriter(tmp_path)
    writer.write(1, {name: float(number) for number, name in enumerate(TAGS)} | {"unheard_of": 1.0}, 0.0)
    writer.close()
    read = scalars(tmp_path)
    assert {tag: points[0][1] for tag, points in read.items()} == {
        tag: float(number) for number, tag in enumerate(TAGS.values())
    }


def test_no_step_stands_twice_and_x_only_grows(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    for step, value in ((0, 0.0), (32, 1.0), (32, 2.0), (16, 3.0), (64, 4.0)):
        writer.write(step, {"entropy": value}, 0.0)
    writer.close()
    assert [(step, value) for step, value, _ in scalars(tmp_path)["losses/entropy"]] == [
        (0, 0.0),
        (32, 1.0),
        (64, 4.0),
    ]


def points(directory: Path, tag: str = "losses/entropy") -> list[tuple[int, float]]:
    return [(step, value) for step, value, _ in scalars(directory)[tag]]


def drawn(directory: Path, *entropies: tuple[int, float]) -> None:
    """One invocation of a run."""
    writer = TensorBoardWriter(directory)
    for step, value in entropies:
        writer.write(step, {"entropy": value}, 0.0)
    writer.close()


def test_the_lives_of_a_run_are_one_curve(tmp_path: Path) -> None:
    drawn(tmp_path, (32, 1.0), (64, 2.0))
    drawn(tmp_path, (96, 3.0), (128, 4.0))
    drawn(tmp_path, (160, 5.0))
    assert points(tmp_path) == [(32, 1.0), (64, 2.0), (96, 3.0), (128, 4.0), (160, 5.0)]


def test_what_a_crash_took_back_is_not_shown_beside_what_came_of_it(tmp_path: Path) -> None:
    """The updates at 96 and 128 were drawn, and were not durable yet when the power went."""
    drawn(tmp_path, (32, 1.0), (64, 2.0), (96, 3.0), (128, 4.0))
    drawn(tmp_path, (80, 7.0), (112, 8.0))
    assert points(tmp_path) == [(32, 1.0), (64, 2.0), (80, 7.0), (112, 8.0)]


def test_a_step_that_was_drawn_before_is_not_drawn_twice(tmp_path: Path) -> None:
    drawn(tmp_path, (32, 1.0), (64, 2.0))
    drawn(tmp_path, (64, 2.5), (96, 3.0))
    assert points(tmp_path) == [(32, 1.0), (64, 2.5), (96, 3.0)]


def test_a_life_that_drew_nothing_takes_nothing_back(tmp_path: Path) -> None:
    drawn(tmp_path, (32, 1.0), (64, 2.0))
    drawn(tmp_path)
    assert points(tmp_path) == [(32, 1.0), (64, 2.0)]


def test_close_writes_what_was_buffered_ends_the_thread_and_may_come_twice(tmp_path: Path) -> None:
    before = threading.active_count()
    writer = TensorBoardWriter(tmp_path)
    assert threading.active_count() == before + 1
    for step in range(100):
        writer.write(step, {"entropy": float(step)}, 0.0)
    writer.close()
    writer.close()
    assert threading.active_count() == before
    assert [step for step, _, _ in scalars(tmp_path)["losses/entropy"]] == list(range(100))


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").touch()
    with pytest.raises(UnavailableError, match=r"cannot write scalars to .*/tensorboard"):
        TensorBoardWriter(tmp_path / "tensorboard")


def test_a_disk_that_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TensorBoardWriter(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer._writer, "add_event", refuse)
        with pytest.raises(UnavailableError, match="No space left"):
            writer.write(1, {"entropy": 1.0}, 0.0)
        patch.setattr(writer._writer, "close", refuse)
        with pytest.raises(UnavailableError, match="No space left"):
            writer.close()
    writer.close()
