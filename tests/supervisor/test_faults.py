"""Fault points: the table is the truth about the sources, and an armed point ends the process where it says."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from esper_simic.errors import ConfigError
from supervisor import faults
from supervisor.faults import DIRECTORY_VARIABLE, FAULTS_VARIABLE, POINTS, Fault, fired, parse

ROOT = Path(__file__).parents[2]


# ---- the table -------------------------------------------------------------------------------------------------------


def passages_in_the_sources() -> Counter[str]:
    """The name in every `faults.point(...)` of the package."""
    names: Counter[str] = Counter()
    for path in sorted((ROOT / "supervisor").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) != "faults.point":
                continue
            name = node.args[0]
            assert isinstance(name, ast.Constant), f"{path}:{node.lineno} hides the name of a fault point"
            names[str(name.value)] += 1
    return names


def test_every_point_of_the_table_is_passed_at_one_place_and_no_other_is_passed_anywhere() -> None:
    assert passages_in_the_sources() == dict.fromkeys(POINTS, 1)


def test_the_table_says_who_passes_and_when() -> None:
    for name, place in POINTS.items():
        assert place.roles <= {"learner", "actor", "supervisor"}, name
        assert place.roles, name
        assert place.description, name
        owner = name.partition(".")[0]
        assert owner in {*place.roles, "journal", "checkpoint", "recovery"}, name


# ---- reading the plan ------------------------------------------------------------------------------------------------


def test_a_plan_is_read_and_written() -> None:
    text = "learner:journal.sync.before:3;actor:actor.send.after:1"
    planned = parse(text)
    assert planned == [Fault("learner", "journal.sync.before", 3), Fault("actor", "actor.send.after", 1)]
    assert ";".join(fault.text for fault in planned) == text
    assert parse("") == parse(";") == []


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("learner:journal.sync.before", "takes role:point:passage;…, not 'learner:journal.sync.before'"),
        ("learner:journal.sync.before:0", "takes role:point:passage"),
        ("learner:journal.sync.before:x", "takes role:point:passage"),
        (":journal.sync.before:1", "takes role:point:passage"),
        ("learner:learner.update.half:1:sneeze", "takes role:point:passage"),
        ("learner:learner.step.after:1:memory", "memory cannot be made to run out at learner.step.after"),
        ("learner::1", "takes role:point:passage"),
        (
            "learner:journal.snyc.before:1",
            "'journal.snyc.before', which is no fault point; near are journal.sync.before",
        ),
        ("learner:zzz:1", "no fault point; near are actor.acknowledged.after, .*supervisor.resume.before"),
        (
            "actor:journal.sync.before:1",
            "no 'actor' ever passes journal.sync.before, only learner and supervisor",
        ),
    ],
)
def test_a_plan_that_would_never_be_carried_out_is_refused(text: str, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        parse(text)


def test_arming_needs_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, "learner:journal.sync.before:1")
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    for directory in (None, "", str(tmp_path / "missing")):
        if directory is not None:
            monkeypatch.setenv(DIRECTORY_VARIABLE, directory)
        with pytest.raises(
            ConfigError, match=f"{FAULTS_VARIABLE} needs {DIRECTORY_VARIABLE} to name a directory"
        ):
            faults.arm("learner")


def test_unarmed_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FAULTS_VARIABLE, raising=False)
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    acts: list[str] = []
    faults.arm("learner")
    faults.point("journal.write.half", lambda: acts.append("torn"))
    faults.witness("promise")
    assert acts == []


# ---- real deaths -----------------------------------------------------------------------------------------------------


def live(directory: Path, plan: str, body: str, role: str = "learner") -> tuple[int, str]:
    """One life of a process of a role; its return code and what it has said."""
    script = f"import threading\nfrom supervisor import faults\nfaults.arm({role!r})\n{body}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {FAULTS_VARIABLE: plan, DIRECTORY_VARIABLE: str(directory)},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


PASSES_FIVE = """
for number in range(1, 6):
    print(number, flush=True)
    faults.point("learner.step.before")
    faults.point("learner.step.after")
"""


@pytest.mark.processes
def test_a_fault_fires_at_its_passage_once_whatever_lives_come_after(tmp_path: Path) -> None:
    plan = "learner:learner.step.before:3"
    assert live(tmp_path, plan, PASSES_FIVE) == (-signal.SIGKILL, "1\n2\n3\n")
    assert fired(tmp_path, 0).exists()
    assert live(tmp_path, plan, PASSES_FIVE) == (0, "1\n2\n3\n4\n5\n")


RUNS_SHORT = """
from esper_simic.step_report import attempt
for number in range(1, 5):
    tried = attempt(lambda: faults.point("learner.update.half"), lambda: 0)
    print(number, tried.out_of_memory, flush=True)
"""


@pytest.mark.processes
def test_memory_runs_out_once_as_torch_would_say_it_and_the_process_goes_on(tmp_path: Path) -> None:
    plan = "learner:learner.update.half:2:memory;learner:learner.update.half:1"
    assert [fault.text for fault in parse(plan)] == plan.split(";")
    assert live(tmp_path, plan, RUNS_SHORT) == (-signal.SIGKILL, "1 False\n2 True\n")
    assert [fired(tmp_path, number).exists() for number in range(2)] == [True, True]
    assert live(tmp_path, plan, RUNS_SHORT)[1] == "1 False\n2 False\n3 False\n4 False\n"


@pytest.mark.processes
def test_a_list_is_counted_in_order_and_every_role_has_its_own(tmp_path: Path) -> None:
    plan = "learner:learner.step.after:2;actor:actor.send.after:1;learner:learner.step.before:2"
    assert live(tmp_path, plan, PASSES_FIVE)[1] == "1\n2\n"
    assert [fired(tmp_path, number).exists() for number in range(3)] == [True, False, False]
    assert live(tmp_path, plan, PASSES_FIVE) == (-signal.SIGKILL, "1\n2\n")
    assert [fired(tmp_path, number).exists() for number in range(3)] == [True, False, True]
    assert live(tmp_path, plan, PASSES_FIVE)[0] == 0
    sends = "faults.point('actor.send.after')"
    assert live(tmp_path, plan, sends, role="actor")[0] == -signal.SIGKILL
    assert live(tmp_path, plan, sends, role="actor")[0] == 0


@pytest.mark.processes
def test_a_mark_that_another_process_left_meanwhile_disarms_the_fault_and_arms_the_next(
    tmp_path: Path,
) -> None:
    body = f"open({str(fired(tmp_path, 0))!r}, 'x').close()\n{PASSES_FIVE}"
    plan = "learner:learner.step.before:2;learner:learner.step.after:2"
    assert live(tmp_path, plan, body) == (-signal.SIGKILL, "1\n2\n3\n")
    assert fired(tmp_path, 1).exists()


@pytest.mark.processes
@pytest.mark.parametrize("raises", [False, True])
def test_the_last_act_is_the_last(tmp_path: Path, raises: bool) -> None:
    body = f"""
def act():
    print("torn", flush=True)
    if {raises}:
        raise OSError("the disk is full")
for _ in range(3):
    faults.point("journal.write.half", act)
print("not reached")
"""
    assert live(tmp_path, "learner:journal.write.half:2", body) == (-signal.SIGKILL, "torn\n")


THREADS = """
def passes():
    for _ in range(2000):
        faults.point("journal.sync.before")
threads = [threading.Thread(target=passes) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("all passed", flush=True)
"""


@pytest.mark.processes
@pytest.mark.parametrize(("passage", "ends"), [(8000, True), (8001, False)])
def test_passages_of_several_threads_are_counted_exactly(tmp_path: Path, passage: int, ends: bool) -> None:
    code, said = live(tmp_path, f"learner:journal.sync.before:{passage}", THREADS)
    assert (code, said) == ((-signal.SIGKILL, "") if ends else (0, "all passed\n"))


DURING_THE_LAST_ACT = """
dying, at_the_point, went_on = threading.Event(), threading.Event(), threading.Event()

def act():
    dying.set()
    at_the_point.wait(30)
    went_on.wait(0.5)  # for as long as the other thread is held back

def pass_too():
    dying.wait(30)
    at_the_point.set()
    faults.point("journal.write.half")
    print("went on", flush=True)
    went_on.set()

threading.Thread(target=pass_too, daemon=True).start()
faults.point("journal.write.half", act)
"""


@pytest.mark.processes
def test_nobody_passes_while_the_process_dies(tmp_path: Path) -> None:
    assert live(tmp_path, "learner:journal.write.half:1", DURING_THE_LAST_ACT) == (-signal.SIGKILL, "")


@pytest.mark.processes
def test_what_was_promised_outlives_the_process(tmp_path: Path) -> None:
    body = """
faults.witness("acknowledged 0 1 7 12")
faults.witness("version 3")
faults.point("learner.step.after")
"""
    assert live(tmp_path, "learner:learner.step.after:1", body)[0] == -signal.SIGKILL
    (notes,) = tmp_path.glob("witness-*.txt")
    assert notes.read_text("utf-8") == "acknowledged 0 1 7 12\nversion 3\n"
