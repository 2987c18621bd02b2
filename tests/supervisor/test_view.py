"""What a person sees, on a terminal and elsewhere."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from supervisor.events import CheckpointReported
from supervisor.outcome import RunOutcome
from supervisor.view import (
    LiveView,
    RateMeter,
    SteadyConsole,
    line,
    picture,
    processes,
    report,
    show,
    status_page,
    tell,
    time_left_s,
)
from supervisor.vitals import EnvironmentView, LearnerView, ProcessView, Snapshot

MIB = 2**20
METRICS = {
    "episodic_return": 3.456,
    "episodic_accuracy": 71.25,
    "episodic_parameters": 120.4,
    "policy_loss": -0.0123,
    "value_loss": 0.5,
    "entropy": 1.25,
    "approx_kl": 0.0031,
    "explained_variance": 0.61,
    "policy_lag": 2.5,
    "grad_norm": 0.75,
}


def process(role: str = "actor", index: int = 0, **changes: Any) -> ProcessView:
    view = ProcessView(
        role=role,
        index=index,
        incarnation=1,
        pid=4000 + index,
        state="ready",
        memory_bytes=100 * MIB,
        restarts=0,
    )
    return msgspec.structs.replace(view, **changes)


def snapshot(**changes: Any) -> Snapshot:
    shot = Snapshot(
        run_id="run-1",
        preset="digits",
        run_dir="/somewhere/run[a]",
        state="training",
        elapsed_s=42.0,
        training_elapsed_s=40.0,
        max_seconds=200.0,
        max_steps=None,
        learner=LearnerView(step=17, metrics=METRICS),
        environment=EnvironmentView(steps=12_800),
        processes=[
            process("learner", memory_bytes=350 * MIB),
            process(),
            process(index=1, waiting_for="credit"),
        ],
        evaluated=[],
        to_evaluate=["learned", "random"],
        refused_messages={},
        checkpoint="",
        reason="",
    )
    return msgspec.structs.replace(shot, **changes)


def at(elapsed_s: float, steps: int, **changes: Any) -> Snapshot:
    environment = EnvironmentView(steps=steps)
    return snapshot(elapsed_s=elapsed_s + 2, training_elapsed_s=elapsed_s, environment=environment, **changes)


def terminal(width: int = 100) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(force_terminal=True, file=out, width=width, height=40, _environ={"TERM": "xterm"}), out


def pipe(width: int = 80) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(force_terminal=False, file=out, width=width), out


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


# Rates and times


def test_the_rate_is_over_the_last_ten_seconds() -> None:
    meter = RateMeter()
    assert meter.observe(at(0.0, 0)) == 0.0
    assert meter.observe(at(5.0, 500)) == 100.0
    assert meter.observe(at(10.0, 1500)) == 150.0
    # The window now begins at 5 s: (3500 - 500) / (15 - 5).
    assert meter.observe(at(15.0, 3500)) == 300.0
    # At 18 s the last point that is ten seconds old is still that of 5 s: 3000 / 13.
    assert meter.observe(at(18.0, 3500)) == pytest.approx(3000 / 13)


def test_the_rate_survives_a_gap_and_stands_still_after_the_training() -> None:
    meter = RateMeter()
    meter.observe(at(0.0, 0))
    assert meter.observe(at(100.0, 1000)) == 10.0
    assert meter.observe(at(100.0, 1000, state="evaluating")) == 10.0
    assert meter.observe(at(110.0, 1000)) == 0.0


@pytest.mark.parametrize(
    ("changes", "rate", "left_s"),
    [
        ({}, 100.0, 160.0),
        ({"state": "evaluating"}, 100.0, None),
        ({"max_seconds": None}, 100.0, None),
        ({"max_seconds": None, "max_steps": 14_800}, 100.0, 20.0),
        ({"max_seconds": None, "max_steps": 14_800}, 0.0, None),
        ({"max_steps": 14_800}, 100.0, 20.0),
        ({"max_steps": 1_000_000}, 100.0, 160.0),
        ({"max_seconds": 30.0}, 100.0, 0.0),
        ({"max_steps": 100}, 100.0, 0.0),
    ],
)
def test_the_time_left_is_that_of_the_nearer_limit(
    changes: dict[str, Any], rate: float, left_s: float | None
) -> None:
    assert time_left_s(snapshot(**changes), rate) == left_s


# Lines


def test_off_a_terminal_there_is_a_line_for_every_state_and_every_ten_seconds() -> None:
    console, out = pipe()
    view = LiveView(console)
    for elapsed_s, state in (
        (0, "starting"),
        (1, "starting"),
        (3, "training"),
        (9, "training"),
        (13, "training"),
    ):
        view.show(snapshot(elapsed_s=float(elapsed_s), state=state), 100.0)
    for elapsed_s, state in ((14, "training"), (15, "stopping"), (26, "stopping")):
        view.show(snapshot(elapsed_s=float(elapsed_s), state=state), 100.0)
    view.close()
    lines = out.getvalue().splitlines()
    assert [re.match(r"\[ *([\d.]+) s\] (\w+)", text).groups() for text in lines] == [  # type: ignore[union-attr]
        ("0.0", "starting"),
        ("3.0", "training"),
        ("13.0", "training"),
        ("15.0", "stopping"),
        ("26.0", "stopping"),
    ]


def test_a_line_tells_steps_rate_return_losses_lag_memory_and_time_left() -> None:
    assert line(snapshot(), 321.4) == (
        "[  42.0 s] training  steps 12800  321 steps/s  updates 17  return 3.46  host accuracy % 71.2  "
        "parameters added 120  policy loss -0.0123  value loss 0.5000  entropy 1.250  policy lag 2.5  "
        "memory 550 MiB  160 s left"
    )
    young = snapshot(learner=LearnerView(), max_seconds=None, state="starting", processes=[])
    assert line(young, 0.0) == "[  42.0 s] starting  steps 12800  0 steps/s  updates 0  memory 0 MiB"
    measuring = snapshot(state="evaluating", evaluated=["learned"])
    assert line(measuring, 0.0) == "[  42.0 s] evaluating  1 of 2 policies measured"


@pytest.mark.parametrize("width", [20, 80])
def test_off_a_terminal_nothing_is_coloured_cut_wrapped_or_beyond_ascii(width: int) -> None:
    console, out = pipe(width)
    LiveView(console).show(snapshot(), 1.0)
    show(console, status_page(snapshot(reason="a long reason " * 20, checkpoint="/a/[b]/c")))
    report(console, Path("/runs/a b"), OUTCOME, "run --seed 1")
    tell(console, "[bold]x[/bold] " * 30)
    text = out.getvalue()
    assert text.isascii()
    assert "\x1b" not in text
    assert line(snapshot(), 1.0) in text.splitlines()
    assert "[bold]x[/bold] " * 30 in text.splitlines()
    assert text.count("a long reason ") == 20
    assert "reason      " + "a long reason " * 20 in text
    assert "/a/[b]/c" in text


# A run that went on


RECOVERY = {"recovery.done": 61.0, "recovery.total": 170.0, "recovery.seconds_left": 3.2}


def recovering(**changes: Any) -> Snapshot:
    return snapshot(learner=LearnerView(step=17, metrics=METRICS | RECOVERY), **changes)


def test_how_far_a_recovery_has_come_is_shown_everywhere() -> None:
    words = "recovering 61 of 170 records, 3 s left"
    assert words in line(recovering(), 0.0)
    console, out = terminal()
    console.print(picture(recovering(max_seconds=None), 0.0))
    assert words in plain(out.getvalue())
    console, out = pipe()
    show(console, status_page(recovering()))
    assert f"learner     {words}\n" in out.getvalue()
    assert "recovering" not in line(snapshot(), 0.0)


def test_off_a_terminal_a_recovery_begins_and_ends_with_a_line() -> None:
    console, out = pipe()
    view = LiveView(console)
    for elapsed_s, shot in ((1.0, snapshot()), (2.0, recovering()), (3.0, recovering()), (4.0, snapshot())):
        view.show(msgspec.structs.replace(shot, elapsed_s=elapsed_s), 0.0)
    assert [text[:8] for text in out.getvalue().splitlines()] == ["[   1.0 ", "[   2.0 ", "[   4.0 "]


def test_the_last_checkpoint_and_the_resumes_are_shown() -> None:
    metrics = METRICS | {"checkpoint.step": 12.0, "checkpoint.age_s": 35.4}
    console, out = pipe()
    show(console, status_page(snapshot(learner=LearnerView(step=17, metrics=metrics), resumes=2)))
    text = " ".join(out.getvalue().split())
    assert "last checkpoint update 12, 35 s old" in text
    assert "resumed 2 times" in text
    console, out = pipe()
    show(console, status_page(snapshot()))
    assert "checkpoint" not in out.getvalue()
    assert "resumed" not in out.getvalue()


def test_troubles_and_notes_are_shown_until_they_are_over() -> None:
    shot = snapshot(troubles=["the disk is full: nothing is taken in"], notes=["not exact"])
    assert line(shot, 0.0).endswith("  ! the disk is full: nothing is taken in")
    for page in (status_page(shot), picture(shot, 0.0)):
        console, out = pipe()
        show(console, page)
        assert "trouble     the disk is full: nothing is taken in\n" in out.getvalue()
        assert "note        not exact\n" in out.getvalue()


def test_how_the_learner_computes_is_shown_once_it_is_known() -> None:
    for page in (status_page, lambda shot: picture(shot, 0.0)):
        for said in ("", "cpu: adam fused, compile none"):
            console, out = pipe()
            show(console, page(snapshot(execution=said)))
            assert ("computes    cpu: adam fused, compile none\n" in out.getvalue()) == bool(said)


def test_limits_are_those_of_this_invocation_and_updates_those_of_the_run() -> None:
    gone_on = EnvironmentView(steps=12_800, before=12_000)
    shot = snapshot(environment=gone_on, max_seconds=None, max_steps=1_000)
    assert time_left_s(shot, 100.0) == 2.0
    console, out = terminal()
    console.print(picture(shot, 100.0))
    assert "80% of the training" in plain(out.getvalue())
    # 17 updates took 1,700 steps: another 17 take 17 s at 100 steps/s.
    shot = snapshot(environment=EnvironmentView(steps=1_700), max_seconds=None, max_updates=34)
    assert time_left_s(shot, 100.0) == 17.0
    assert time_left_s(msgspec.structs.replace(shot, learner=LearnerView()), 100.0) is None
    console, out = terminal()
    console.print(picture(shot, 100.0))
    assert "50% of the training" in plain(out.getvalue())


def test_the_mean_rate_of_the_status_page_is_that_of_this_invocation() -> None:
    console, out = pipe()
    show(console, status_page(snapshot(environment=EnvironmentView(steps=12_800, before=12_000))))
    assert re.search(r"steps/s +20 ", out.getvalue()), "800 steps in 40 s"


def test_the_rate_of_a_run_that_goes_on_does_not_count_what_was_there() -> None:
    meter = RateMeter()
    assert meter.observe(at(0.0, 0)) == 0.0
    assert meter.observe(at(0.0, 90_000)) == 0.0, "now the learner has said where it stands"
    assert meter.observe(at(1.0, 90_100)) == 100.0


def test_steps_that_were_taken_back_are_no_negative_rate() -> None:
    meter = RateMeter()
    meter.observe(at(0.0, 1000))
    assert meter.observe(at(1.0, 900)) == 0.0


# The moving picture


def test_on_a_terminal_the_picture_moves_and_goes_away() -> None:
    console, out = terminal()
    view = LiveView(console)
    view.show(snapshot(), 321.4)
    first = out.getvalue()
    view.show(snapshot(learner=LearnerView(step=18)), 321.4)
    assert "\x1b[" in first
    assert "18" in plain(out.getvalue()[len(first) :])
    view.close()
    assert "\x1b[?25h" in out.getvalue(), "the cursor is back"
    view.close()


def test_the_picture_tells_steps_rate_return_losses_lag_memory_and_time_left() -> None:
    console, out = terminal()
    console.print(picture(snapshot(), 321.4))
    text = " ".join(plain(out.getvalue()).split())
    for words in (
        "simic digits training /somewhere/run[a]",
        "environment steps 12,800",
        "steps/s 321",
        "updates 17",
        "return 3.46",
        "host accuracy % 71.2",
        "parameters added 120",
        "policy loss -0.0123",
        "value loss 0.5000",
        "entropy 1.250",
        "approx. KL 0.0031",
        "explained variance 0.61",
        "policy lag 2.5",
        "gradient norm 0.75",
        "training left about 160 s",
        "20% of the training",
        "learner-0 4000 ready 350 0",
        "actor-1 4001 ready 100 0 credit",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state": "evaluating", "evaluated": ["random"]}, "1 of 2 policies measured on held-out episodes"),
        ({"state": "evaluating", "to_evaluate": []}, "0 of 0 policies measured"),
        ({"max_steps": 16_000}, "80% of the training"),
        ({"max_seconds": 20.0}, "100% of the training"),
        ({"max_seconds": None}, "no limit set; stop with Ctrl-C"),
    ],
)
def test_the_bar_follows_what_ends_the_phase(changes: dict[str, Any], words: str) -> None:
    console, out = terminal()
    console.print(picture(snapshot(**changes), 1.0))
    assert words in plain(out.getvalue())


def test_what_a_process_is_at_that_is_not_its_usual_work_is_shown() -> None:
    shown = [
        process("learner", phase="consolidating"),
        process(state="started", phase="surveying"),
        process(index=1),
    ]
    console, out = pipe()
    show(console, processes(snapshot(processes=shown)))
    for row, state in zip(
        out.getvalue().splitlines()[1:], ("ready, consolidating", "started, surveying", "ready"), strict=True
    ):
        assert re.fullmatch(rf"\s+\S+\s+\d+\s+{state}\s+100\s+0\s*", row)


def test_many_processes_are_summed_up_and_none_is_lost() -> None:
    actors = [process(index=index, restarts=index % 2) for index in range(40)]
    console, out = terminal()
    console.print(processes(snapshot(processes=actors), rows_max=12))
    rows = out.getvalue().splitlines()
    assert len(rows) == 1 + 12
    assert plain(rows[-1]).split() == ["and", "29", "more", "2900", "15"]
    console, out = terminal()
    console.print(processes(snapshot(processes=actors[:12]), rows_max=12))
    assert "more" not in out.getvalue()
    assert len(out.getvalue().splitlines()) == 1 + 12


def test_a_process_that_is_not_there_has_neither_id_nor_memory() -> None:
    console, out = pipe()
    show(
        console,
        processes(snapshot(processes=[process(pid=0, state="scheduled", memory_bytes=0, restarts=2)])),
    )
    assert out.getvalue().splitlines()[1].split() == ["actor-0", "-", "scheduled", "-", "2"]


def test_a_dumb_terminal_gets_lines() -> None:
    out = io.StringIO()
    console = Console(force_terminal=True, file=out, _environ={"TERM": "dumb"}, color_system=None)
    LiveView(console).show(snapshot(), 1.0)
    assert out.getvalue() == line(snapshot(), 1.0) + "\n"


# The end


OUTCOME = RunOutcome(
    run_id="run-1",
    exit_code=0,
    outcome="finished",
    reason="max_seconds",
    evaluations={},
    checkpoint=CheckpointReported(
        at_s=1.0, path="/runs/a b/checkpoints/step-7", learner_step=7, environment_steps=70, digest="abc"
    ),
)


def test_the_report_names_outcome_checkpoint_and_what_to_do_next() -> None:
    console, out = pipe()
    report(console, Path("/runs/a b"), OUTCOME, "run --preset digits --seed 8")
    lines = out.getvalue().splitlines()
    assert lines[lines.index("run run-1 finished: max_seconds") :] == [
        "run run-1 finished: max_seconds",
        "checkpoint: /runs/a b/checkpoints/step-7 (update 7, 70 environment steps, state digest abc)",
        "next:",
        "  simic-supervisor report '/runs/a b'",
        "  simic-supervisor status '/runs/a b'",
        "  simic-supervisor log verify '/runs/a b' --owner learner-0",
        "  tensorboard --logdir '/runs/a b/tensorboard'",
        "  simic-supervisor run --preset digits --seed 8",
    ]


def test_the_report_of_a_failed_run_names_the_logs_and_shows_no_table() -> None:
    failed = msgspec.structs.replace(
        OUTCOME, outcome="failed", exit_code=1, reason="the learner died", evaluations={}, checkpoint=None
    )
    console, out = pipe()
    report(console, Path("/runs/a"), failed, "run")
    assert out.getvalue().splitlines()[1:3] == [
        "run run-1 failed: the learner died",
        "logs of the processes: /runs/a/logs",
    ]


def test_the_report_of_a_run_that_could_not_obey_its_configuration_says_what_can_change() -> None:
    failed = msgspec.structs.replace(
        OUTCOME, outcome="failed", exit_code=78, reason="no device", checkpoint=None
    )
    console, out = pipe()
    report(console, Path("/runs/a"), failed, "")
    lines = out.getvalue().splitlines()
    assert "under other keys begin in another --run-dir" in lines[3]
    assert lines[-1] == "  tensorboard --logdir /runs/a/tensorboard", (
        "nothing is named that would be no such run"
    )


@pytest.mark.parametrize("outcome", ["stopped", "failed"])
def test_the_report_of_a_run_that_can_go_on_says_how_first(outcome: Any) -> None:
    console, out = pipe()
    report(console, Path("/runs/a b"), msgspec.structs.replace(OUTCOME, outcome=outcome), "run")
    lines = out.getvalue().splitlines()
    assert lines[lines.index("next:") + 1] == "  simic-supervisor run --resume '/runs/a b'"


@pytest.mark.parametrize("outcome", ["finished", "stopped", "failed"])
def test_the_report_of_a_run_that_goes_on_by_an_order_alone_gives_that_order(outcome: Any) -> None:
    console, out = pipe()
    over = msgspec.structs.replace(OUTCOME, outcome=outcome, needs_order=True)
    report(console, Path("/runs/a b"), over, "run")
    lines = out.getvalue().splitlines()
    assert lines[lines.index("next:") + 1] == "  simic-supervisor run --resume '/runs/a b' --train-on"
    assert out.getvalue().count("--resume") == 1


# The status page


def test_the_status_page_says_whose_controller_it_is() -> None:
    console, out = pipe()
    show(console, status_page(snapshot(controller="karn")))
    assert "controller  karn\n" in out.getvalue()


def test_the_status_page_has_the_mean_rate_the_reason_and_the_checkpoint() -> None:
    console, out = pipe()
    ended = snapshot(
        state="stopped", reason="requested", checkpoint="/runs/a/checkpoints/step-7", evaluated=["random"]
    )
    show(console, status_page(ended))
    text = out.getvalue()
    assert re.search(r"steps/s +320 ", text), "12800 steps in 40 s"
    assert "reason      requested\n" in text
    assert "checkpoint  /runs/a/checkpoints/step-7\n" in text
    assert "evaluation  1 of 2 policies measured\n" in text
    assert "controller" not in text, "older runs do not say"
    assert "left" not in text


def test_the_status_page_of_a_run_that_has_not_trained_yet() -> None:
    console, out = pipe()
    show(console, status_page(snapshot(state="starting", training_elapsed_s=0.0, learner=LearnerView())))
    assert re.search(r"steps/s +0 ", out.getvalue())
    assert "evaluation" not in out.getvalue()


# A reader that goes away


def test_a_run_outlives_whoever_reads_its_output() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as file:
        console = SteadyConsole(file=file)
        view = LiveView(console)
        view.show(snapshot(), 1.0)
        assert os.read(reader, 2**16).startswith(b"[  42.0 s] training")
        os.close(reader)
        view.show(snapshot(state="stopping"), 1.0)
        view.show(snapshot(state="evaluating"), 1.0)
        tell(console, "and more")
        assert console.quiet
