"""Scalars read back with TensorBoard's own reader, Prometheus's page with its own parser, over a real socket."""

from __future__ import annotations

import contextlib
import errno
import http.client
import math
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from esper_simic.errors import UnavailableError
from esper_simic.telemetry import HistogramCounts, StepHistograms
from supervisor.metrics.endpoint import CONNECTIONS_MAX, RETRY_INTERVAL_S, HttpEndpoint, Page
from supervisor.metrics.prometheus import PrometheusExporter
from supervisor.metrics.tensorboard import TAGS, TensorBoardWriter

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

KEPT = {
    "episodic_return": "charts/episodic_return",
    "episodic_length": "charts/episodic_length",
    "episodic_accuracy": "charts/episodic_accuracy",
    "episodic_parameters": "charts/episodic_parameters_added",
    "steps_per_second": "charts/SPS",
    "learning_rate.policy": "charts/learning_rate",
    "learning_rate.value": "charts/learning_rate_value",
    "entropy_coefficient": "charts/entropy_coefficient",
    "policy_lag": "charts/policy_lag",
    "replay_age": "charts/replay_age",
    "reward_deviation": "charts/reward_deviation",
    "value_loss": "losses/value_loss",
    "policy_loss": "losses/policy_loss",
    "entropy": "losses/entropy",
    "approx_kl": "losses/approx_kl",
    "explained_variance": "losses/explained_variance",
    "grad_norm": "losses/grad_norm",
    "clip_fraction": "losses/clipfrac",
}
"""Curves that runs have drawn before; a tag that changed would break them in two."""


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
    assert KEPT.items() <= TAGS.items()
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


# -- the catalogue behind both ----------------------------------------------------------------------------------------


def test_a_metric_with_a_label_has_a_tag_of_its_own(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    writer.write(1, {"head_entropy.op": 0.5, "head_entropy.slot": 0.25, "refused.too_old": 3.0}, 0.0)
    writer.close()
    assert {tag: points[0][1] for tag, points in scalars(tmp_path).items()} == {
        "losses/entropy_op": 0.5,
        "losses/entropy_slot": 0.25,
    }


def test_the_package_brings_tensorboard_only_when_asked() -> None:
    code = (
        "import sys, supervisor.metrics.prometheus, supervisor.metrics.endpoint as e; "
        "bad = {'tensorboard', 'torch'} & set(sys.modules); assert not bad, bad; "
        "import supervisor.metrics.tensorboard; assert 'tensorboard' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# -- Prometheus -------------------------------------------------------------------------------------------------------


def shown(
    exporter: PrometheusExporter, accept: str = ""
) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """What a reader of the page finds: (name, labels) -> value."""
    text = exporter.page(accept).body.decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def histogram(*values: float) -> dict[str, HistogramCounts]:
    counts = StepHistograms()
    for value in values:
        counts = counts.followed({"training_time_ms": value})
    return counts.by_source


def test_values_stand_under_their_prometheus_names_in_base_units() -> None:
    exporter = PrometheusExporter({"run_id": "r1", "preset": "digits"})
    exporter.show(
        {
            "policy_loss": -0.25,
            "value_loss": math.nan,
            "buffer_bytes": 3_000_001.0,
            "sampling_time_ms": 350.0,
            "conservative_mode": 1.0,
            "conservative_entries": 2.0,
            "refused.too_old": 4.0,
            'refused.frame."x"': 1.0,
            "head_entropy.op": 1.5,
            "learning_rate.value": 1e-3,
            "memory_bytes.actor-0": 1e8,
            "unheard_of": 1.0,
        },
        {},
    )
    found = shown(exporter)
    assert math.isnan(found.pop(("simic_trainer_value_loss", ())))
    assert found == {
        ("simic_run_info", (("preset", "digits"), ("run_id", "r1"))): 1.0,
        ("simic_trainer_policy_loss", ()): -0.25,
        ("simic_buffer_memory_bytes", ()): 3_000_001.0,
        ("simic_sampling_batch_duration_seconds", ()): 0.35,
        ("simic_trainer_conservative_mode_active", ()): 1.0,
        ("simic_trainer_conservative_mode_total", ()): 2.0,
        ("simic_trainer_refusals_total", (("cause", "too_old"),)): 4.0,
        ("simic_trainer_refusals_total", (("cause", 'frame."x"'),)): 1.0,
        ("simic_trainer_head_entropy", (("head", "op"),)): 1.5,
        ("simic_trainer_learning_rate", (("optimizer", "value"),)): 1e-3,
        ("simic_process_memory_bytes", (("process", "actor-0"),)): 1e8,
    }


def test_a_histogram_counts_each_bucket_together_with_all_below_it() -> None:
    exporter = PrometheusExporter({})
    exporter.show({"grad_norm": 3.0}, histogram(0.5, 400.0, 500.0, 501.0, 9000.0, math.nan))
    found = shown(exporter)
    name = "simic_trainer_training_duration_seconds"
    buckets = {
        float(dict(labels)["le"]): value
        for (sample, labels), value in found.items()
        if sample == f"{name}_bucket"
    }
    assert list(buckets.values()) == sorted(buckets.values())
    assert {bound: buckets[bound] for bound in (0.001, 0.35, 0.5, 0.75, 5.0, math.inf)} == {
        0.001: 1,
        0.35: 1,
        0.5: 3,
        0.75: 4,
        5.0: 4,
        math.inf: 5,
    }
    assert found[f"{name}_count", ()] == 5
    assert found[f"{name}_sum", ()] == pytest.approx(10.4015)
    lost = ("simic_telemetry_not_finite_values_total", (("metric", "simic.trainer.training_time_ms"),))
    assert found[lost] == 1
    # A histogram is never shown as the gauge of its newest value.
    assert ("simic_trainer_grad_norm", ()) not in found


def test_kinds_are_said_and_a_metric_without_a_value_is_not_there() -> None:
    exporter = PrometheusExporter({})
    assert "simic_trainer_policy_loss" not in exporter.page("").body.decode()
    exporter.show({"policy_loss": 1.0, "refused.x": 1.0}, histogram(1.0))
    lines = exporter.page("").body.decode().splitlines()
    assert "# TYPE simic_trainer_policy_loss gauge" in lines
    assert "# TYPE simic_trainer_refusals_total counter" in lines
    assert "# TYPE simic_trainer_training_duration_seconds histogram" in lines
    assert "# HELP simic_trainer_policy_loss Loss of the policy." in lines


def test_a_page_shows_the_newest_values_and_nothing_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = PrometheusExporter({})
    given = {"policy_loss": 1.0}
    exporter.show(given, {})
    given["policy_loss"] = 5.0
    assert shown(exporter)["simic_trainer_policy_loss", ()] == 1.0
    exporter.show(given, {})
    assert shown(exporter)["simic_trainer_policy_loss", ()] == 5.0
    assert all(name.startswith("simic_") for name, _ in shown(exporter))


def test_openmetrics_is_spoken_to_who_asks_for_it() -> None:
    exporter = PrometheusExporter({"run_id": "r1"})
    exporter.show({"policy_loss": 1.0, "refused.x": 2.0}, histogram(1.0))
    page = exporter.page("application/openmetrics-text; version=1.0.0")
    assert page.content_type.startswith("application/openmetrics-text")
    assert page.body.endswith(b"# EOF\n")
    assert b'simic_trainer_refusals_total{cause="x"} 2.0' in page.body


# -- over HTTP --------------------------------------------------------------------------------------------------------


def ask(port: int, path: str = "/metrics", method: str = "GET") -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, headers={"Accept": "text/plain"})
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read()
    finally:
        connection.close()


def page(accept: str) -> Page:
    return Page("text/plain", b"accepts " + accept.encode())


def endpoint(port: int = 0, **pages: Callable[[str], Page]) -> HttpEndpoint:
    return HttpEndpoint("127.0.0.1", port, {f"/{name}": answer for name, answer in pages.items()})


def test_a_page_is_served_where_it_is_asked_for() -> None:
    exporter = PrometheusExporter({})
    exporter.show({"policy_loss": 0.5}, {})
    with endpoint(metrics=exporter.page, other=page) as served:
        served.start()
        status, content_type, body = ask(served.port)
        assert (status, content_type.split(";")[0]) == (200, "text/plain")
        assert b"simic_trainer_policy_loss 0.5\n" in body
        assert ask(served.port, "/other?x=1") == (200, "text/plain", b"accepts text/plain")
        assert ask(served.port, "/other", "HEAD") == (200, "text/plain", b"")
        assert ask(served.port, "/nothing")[0] == 404
        assert ask(served.port, "/other", "POST")[0] == 501


def test_a_port_that_is_taken_is_named_and_taken_over_once_it_is_free() -> None:
    with endpoint(metrics=page) as first:
        first.start()
        with endpoint(first.port, metrics=page) as second:
            with pytest.raises(
                UnavailableError, match=rf"127\.0\.0\.1:{first.port} .*supervisor\.metrics_port"
            ):
                second.start()
            second.attend(100.0)
            assert str(first.port) in second.note
            port = first.port
            first.close()
            second.attend(100.0 + RETRY_INTERVAL_S - 0.1)
            assert second.note != ""
            second.attend(100.0 + RETRY_INTERVAL_S)
            assert (second.note, second.port) == ("", port)
            assert ask(port)[0] == 200
            second.attend(1000.0)
            assert ask(port)[0] == 200


def test_a_host_that_is_none_of_this_machine_is_named() -> None:
    with (
        HttpEndpoint("192.0.2.1", 9092, {}) as served,
        pytest.raises(UnavailableError, match=r"192\.0\.2\.1:9092.*metrics_port=null serves none"),
    ):
        served.start()


def test_close_ends_the_thread_frees_the_port_and_may_come_twice() -> None:
    before = threading.active_count()
    served = endpoint(metrics=page)
    served.start()
    served.start()
    assert threading.active_count() == before + 1
    port = served.port
    served.close()
    served.close()
    assert threading.active_count() == before
    with endpoint(port, metrics=page) as next_one:
        next_one.start()
        assert ask(port)[0] == 200


def test_a_reader_that_hangs_keeps_nobody_else_waiting_and_too_many_are_closed() -> None:
    with endpoint(metrics=page) as served, contextlib.ExitStack() as stack:
        served.start()
        hanging = [
            stack.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=20))
            for _ in range(CONNECTIONS_MAX - 1)
        ]
        assert ask(served.port)[0] == 200
        # The place of the one just answered is given back a moment after its reader has the answer.
        deadline_s = time.monotonic() + 20
        while served.shed == 0 and time.monotonic() < deadline_s:
            hanging.append(
                stack.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=20))
            )
            ready, _, _ = select.select([hanging[-1]], [], [], 0.2)
            assert not ready or hanging[-1].recv(1) == b""
        assert served.shed >= 1


def test_every_request_gives_its_place_back() -> None:
    answered, deadline_s = 0, time.monotonic() + 30
    with endpoint(metrics=page) as served:
        served.start()
        while answered < 3 * CONNECTIONS_MAX and time.monotonic() < deadline_s:
            # A place is given back a moment after its reader has the answer.
            with contextlib.suppress(http.client.RemoteDisconnected, ConnectionResetError):
                answered += ask(served.port)[0] == 200
    assert answered == 3 * CONNECTIONS_MAX


def test_a_page_that_breaks_is_said_and_the_next_one_is_served(capfd: pytest.CaptureFixture[str]) -> None:
    def broken(accept: str) -> Page:
        raise RuntimeError("this page is broken")

    with endpoint(metrics=page, broken=broken) as served:
        served.start()
        with pytest.raises(http.client.RemoteDisconnected):
            ask(served.port, "/broken")
        assert ask(served.port)[0] == 200
    assert "this page is broken" in capfd.readouterr().err


def test_a_reader_that_goes_away_is_no_news(capfd: pytest.CaptureFixture[str]) -> None:
    asked = threading.Event()
    gone = threading.Event()

    def large(accept: str) -> Page:
        asked.set()
        gone.wait(20)
        return Page("text/plain", b"x" * 50_000_000)

    before = threading.active_count()
    with endpoint(metrics=page, large=large) as served:
        served.start()
        reader = socket.create_connection(("127.0.0.1", served.port), timeout=20)
        reader.sendall(b"GET /large HTTP/1.0\r\n\r\n")
        assert asked.wait(20)
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reader.close()
        gone.set()
        deadline_s = time.monotonic() + 20
        while threading.active_count() > before + 1 and time.monotonic() < deadline_s:
            threading.Event().wait(0.01)
        assert threading.active_count() == before + 1
        assert ask(served.port)[0] == 200
    assert capfd.readouterr().err == ""
