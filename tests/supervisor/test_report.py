"""`simic-supervisor report`: one page of any run, whole, harmless, and honest about what is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from esper_simic.events import LearnerStepped, RunStarted
from supervisor.events import FIXED, PolicyEvaluated, ProgressHeard, RunFinished
from supervisor.files import exclusive_lock
from supervisor.journal import Journal, read
from supervisor.report import gather, page
from tests.supervisor.doors import Door, open_door
from tests.supervisor.recorded_runs import failed, stopped, training
from tests.supervisor.report_runs import write_learner, write_supervisor
from tests.supervisor.worlds import LEARNER, World, begun

KEPT = Path(__file__).parents[1] / "replay" / "run"
VOID = {"meta", "br", "hr", "rect", "line", "path", "circle"}
HOSTILE = "\"><script>alert('x')</script><img src=x onerror=alert(1)>&amp;\u202e\x00\x1b[31m"


class Document(HTMLParser):
    """Reads a page as strictly as a person would wish it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.labels: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self._note(tag, attrs)

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"{tag} has an attribute twice: {names}"
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "svg":
            self.labels.append(dict(attrs).get("aria-label") or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"{tag} is closed and was not open"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def read_page(path: Path) -> Document:
    """The document, which needs nothing beside it and runs nothing."""
    text = path.read_text("utf-8")
    document = Document(text)
    assert text.startswith('<!doctype html>\n<html lang="en">')
    assert document.tags.keys().isdisjoint(
        {"script", "img", "link", "iframe", "object", "embed", "a", "form"}
    )
    for tag, name, value in document.attributes:
        assert not name.startswith("on"), f"{tag} {name}"
        assert name not in {"href", "src", "srcset", "style", "action"}
        assert value is None or "url(" not in value
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"url\(|@import|https?:", style)
    assert all(document.labels), "every picture says in words what it shows"
    for tag, name, value in document.attributes:
        if tag in {"rect", "line", "circle", "text"} and name not in {"class"}:
            assert value is not None
            assert re.fullmatch(r"-?[\d.]+", value), f"{tag} {name}={value}"
    return document


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Door:
    return open_door(monkeypatch, capsys, tmp_path / "cwd")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    shutil.copytree(KEPT, tmp_path / "run")
    return tmp_path / "run"


# A run that came to its end


def test_a_finished_run_has_every_section(door: Door, kept: Path) -> None:
    said = door("report", kept)
    assert (said.code, said.err) == (0, "")
    target = kept / "report.html"
    assert said.out == f"{target}: {target.stat().st_size:,} bytes, run finished\n"
    document = read_page(target)
    run_id = next(read(kept / "journal" / "supervisor")).header["run_id"]
    for words in (
        f"Run {run_id} finished",
        "the run is complete",
        "environment steps",
        "The highest interquartile mean return",
        "learned against heuristic, on the same 2 seeds",
        "The newest whole training episode",
        "learner-0 (life 1) was gone: signal",
        "the learner came back (life 2) at update 12",
        "3 unrolls were refused (too_old 3).",
    ):
        assert words in document.text, words
    assert not re.search(r"\bnan\b|\binf\b|None", document.text), "no value that is none"
    assert document.tags["svg"] >= 15
    assert document.labels[0].startswith("return over environment steps")


def test_the_curves_are_the_journals(kept: Path) -> None:
    steps = [
        r.header_as(LearnerStepped)
        for r in read(kept / "journal" / "learner-0")
        if r.kind == "LearnerStepped"
    ]
    gathered = gather(kept)
    for name in ("entropy", "episodic_return", "policy_lag"):
        points = gathered.learner.curves[name].points()
        expected = [(step.environment_steps, step.metrics[name]) for step in steps if name in step.metrics]
        assert [*zip(points.x.tolist(), points.y.tolist(), strict=True)] == expected


def test_the_same_journals_give_the_same_page(kept: Path) -> None:
    assert page(gather(kept), "no episode") == page(gather(kept), "no episode")


def test_the_page_can_be_written_elsewhere(door: Door, kept: Path, tmp_path: Path) -> None:
    said = door("report", kept, "--out", tmp_path / "a page.html", "--quick")
    assert said.code == 0
    assert not (kept / "report.html").exists()
    assert "Left out, as was asked" in read_page(tmp_path / "a page.html").text


def test_a_place_that_cannot_be_written_is_one_line_and_status_1(door: Door, kept: Path) -> None:
    said = door("report", kept, "--out", "nowhere/page.html", "--quick")
    assert (said.code, said.out) == (1, "")
    assert said.err == (
        "simic-supervisor: cannot write nowhere/page.html: No such file or directory; name another place with --out\n"
    )


# Other ends, and none


def halting() -> World:
    """Its training has halted itself; the supervisor died with it."""
    world = training()
    world.tell(ProgressHeard(child=LEARNER, learner_step=9, environment_steps=90, is_halted=True))
    return world


@pytest.mark.parametrize(
    ("world", "state", "words"),
    [
        (training, "died", "died before the run came to its end: simic-supervisor run --resume RUN goes on"),
        (halting, "died", "simic-supervisor run --resume RUN --train-on goes on"),
        (stopped, "stopped", "stopped by SIGTERM"),
        (failed, "failed", "every learner was given up"),
    ],
)
def test_a_run_that_ended_otherwise_says_so(
    door: Door, tmp_path: Path, world: Callable[[], World], state: str, words: str
) -> None:
    write_supervisor(tmp_path, world())
    said = door("report", tmp_path)
    assert said.code == 0
    assert said.out.endswith(f"run {state}\n")
    document = read_page(tmp_path / "report.html")
    assert f"Run run-1 {state}" in document.text
    assert words in document.text
    assert "The learner has made no update yet" in document.text
    assert "No policy has been measured: the run ended before its evaluation" in document.text
    assert "No whole episode has been finished yet." in document.text
    assert "No experience has been taken in yet" in document.text


def test_a_living_run_is_shown_as_it_is(door: Door, tmp_path: Path) -> None:
    write_supervisor(tmp_path, training())
    write_learner(
        tmp_path,
        (1.0, RunStarted(run_id="run-1", config={}, fingerprint={})),
        (
            4.0,
            LearnerStepped(
                step=1, environment_steps=40, digest="d", state_digest=None, metrics={"entropy": 1.5}
            ),
        ),
    )
    with exclusive_lock(tmp_path / "lock"):
        said = door("report", tmp_path)
    assert (said.code, said.out.rpartition(", ")[2]) == (0, "run training\n")
    document = read_page(tmp_path / "report.html")
    assert "No policy has been measured yet." in document.text
    assert "last 1.500" in document.text


def test_a_run_that_has_written_nothing_has_a_page_that_says_so(door: Door, tmp_path: Path) -> None:
    with Journal(tmp_path / "journal" / "supervisor", owner="supervisor", run_id="run-1"):
        pass
    said = door("report", tmp_path)
    assert said.code == 0
    document = read_page(tmp_path / "report.html")
    assert "holds no record: nobody wrote down how the run was begun" in document.text
    assert "Nothing is written down." in document.text


def test_where_there_is_no_run_nothing_is_known(door: Door, tmp_path: Path) -> None:
    said = door("report")
    assert (said.code, said.out) == (4, "")
    assert said.err.startswith("simic-supervisor: no run under runs/")
    (tmp_path / "empty").mkdir()
    said = door("report", tmp_path / "empty")
    assert (said.code, said.out) == (4, "")
    assert "holds no journal" in said.err
    assert door("report", tmp_path / "missing").code == 4


def test_what_is_no_usage_is_status_2(door: Door) -> None:
    assert door("report", "a", "b").code == 2
    said = door("report", "--help")
    assert (said.code, said.err) == (0, "")
    assert "Usage: simic-supervisor report" in said.out


@pytest.mark.parametrize("owner", ["supervisor", "learner-0"])
def test_before_a_damage_everything_is_shown_and_the_status_is_1(door: Door, kept: Path, owner: str) -> None:
    (segment,) = (kept / "journal" / owner).glob("*.log")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 0xFF
    segment.write_bytes(data)
    said = door("report", kept)
    assert said.code == 1
    assert "not all of it could be read: journal segment" in said.out
    document = read_page(kept / "report.html")
    assert "Not everything could be read: journal segment" in document.text
    assert document.labels, "what stands before it is drawn"


def test_an_episode_that_cannot_be_read_leaves_the_rest_standing(
    door: Door, kept: Path, tmp_path: Path
) -> None:
    target = tmp_path / "altered"
    with Journal(target / "journal" / "learner-0", owner="learner-0", run_id="run-1") as journal:
        for record in read(kept / "journal" / "learner-0"):
            journal.append(record.kind, record.header, [b"x"] * len(record.frames))
        journal.sync()
    said = door("report", target)
    assert said.code == 0
    document = read_page(target / "report.html")
    assert "The newest episode cannot be read: " in document.text
    assert document.labels[0].startswith("return over environment steps")


def test_fixed_networks_are_drawn_beside_the_front_of_what_grew(door: Door, tmp_path: Path) -> None:
    world = training()
    outcomes = {
        "learned": (60.0, 200.0),
        "never-grow": (20.0, 0.0),
        "random": (15.0, 50.0),
        FIXED: (90.0, 200.0),
    }
    world.events += [
        PolicyEvaluated(
            at_s=5.0,
            policy=name,
            returns=() if name == FIXED else (accuracy / 10,) * 3,
            accuracies=(accuracy,) * 3,
            parameters=(parameters,) * 3,
            summary={},
        )
        for name, (accuracy, parameters) in outcomes.items()
    ]
    write_supervisor(tmp_path, world)
    assert door("report", tmp_path).code == 0
    document = read_page(tmp_path / "report.html")
    classes = Counter(value for tag, name, value in document.attributes if (tag, name) == ("circle", "class"))
    assert classes["dot beside"] == 1
    assert "learned and never-grow are on the front" in document.text
    assert "hollow: fixed-network, what learned grew, trained whole from the start" in document.text
    assert "learned against fixed-network, on the same 3 seeds: host accuracy lower" in document.text
    labels = [label for label in document.labels if "return" in label]
    assert labels
    assert all(FIXED not in label for label in labels), "nobody acted"
    assert any(f"{FIXED} 90.0" in label for label in document.labels)


# Whoever wrote it


def test_a_hostile_run_is_a_run_with_an_odd_name(door: Door, tmp_path: Path) -> None:
    world = training()
    world.events[0] = msgspec.structs.replace(
        world.events[0],
        run_id=HOSTILE,
        preset=HOSTILE,
        config_text=HOSTILE,
        config={"environment": {"task": HOSTILE, "slots": [HOSTILE]}, "simic_trainer": {"seed": HOSTILE}},
        versions={HOSTILE: HOSTILE},
        fingerprint={HOSTILE: HOSTILE},
    )
    world.events += [
        PolicyEvaluated(
            at_s=5.0,
            policy=name,
            returns=(1.0, 2.0, 3.0),
            accuracies=(1.0, 2.0, 3.0),
            parameters=(1.0, 2.0, 3.0),
            summary={},
        )
        for name in (HOSTILE, "learned")
    ]
    world.events.append(RunFinished(at_s=6.0, exit_code=0, outcome="finished", reason=HOSTILE))
    write_supervisor(tmp_path, world)
    stepped = LearnerStepped(
        step=1, environment_steps=4, digest="d", state_digest=None, metrics={HOSTILE: 1.0}
    )
    write_learner(
        tmp_path, (1.0, RunStarted(run_id="r", config={}, fingerprint={HOSTILE: HOSTILE})), (2.0, stepped)
    )
    out = tmp_path / "<b>page.html"
    assert door("report", tmp_path, "--out", out).code == 0
    document = read_page(out)
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    assert document.text.count(shown) >= 8
    assert f"Run {shown} finished" in document.text
    assert f"learned against {shown}" in document.text


def test_numbers_that_are_none_draw_nothing(door: Door, tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    world = training()
    world.events.append(
        PolicyEvaluated(
            at_s=5.0, policy="learned", returns=(nan, inf), accuracies=(nan, 1.0), parameters=(), summary={}
        )
    )
    write_supervisor(tmp_path, world)
    steps = [
        (
            float(n),
            LearnerStepped(step=n, environment_steps=4 * n, digest="d", state_digest=None, metrics=metrics),
        )
        for n, metrics in enumerate(
            [{"entropy": nan}, {"entropy": inf, "loss": -inf}, {"entropy": 1.0}], start=1
        )
    ]
    write_learner(tmp_path, *steps)
    assert door("report", tmp_path).code == 0
    document = read_page(tmp_path / "report.html")
    assert "3 values were not finite" in document.text
    assert "no finite value" in document.text


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_however_short_a_run_is_it_can_be_drawn(door: Door, tmp_path: Path, count: int) -> None:
    write_supervisor(tmp_path, training())
    steps = [
        (
            float(n),
            LearnerStepped(
                step=n, environment_steps=40, digest="d", state_digest=None, metrics={"entropy": 1.0}
            ),
        )
        for n in range(1, count + 1)
    ]
    write_learner(tmp_path, *steps)
    assert door("report", tmp_path).code == 0
    read_page(tmp_path / "report.html")


def test_a_resumed_run_of_many_lives_is_one_picture(door: Door, tmp_path: Path) -> None:
    world = World(max_seconds=60.0)
    for _ in range(4):
        world.now_s += 3.0
        world.train()
        world.resume()
    write_supervisor(tmp_path, world)
    assert door("report", tmp_path).code == 0
    document = read_page(tmp_path / "report.html")
    assert "resumed4 times" in document.text.replace("\n", "")


# What it costs


def test_without_the_host_nothing_loads_torch(kept: Path) -> None:
    script = (
        "import sys\n"
        "from supervisor import cli\n"
        "sys.argv = ['simic-supervisor', 'report', sys.argv[1], '--quick']\n"
        "try:\n    cli.main()\n"
        "except SystemExit as ended:\n    assert ended.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done: Any = subprocess.run(
        [sys.executable, "-c", script, str(kept)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert read_page(kept / "report.html").labels


def test_begun_is_what_worlds_begin_with() -> None:
    """The hostile run above replaces the first event, which must be the one that names the run."""
    assert type(training().events[0]).__name__ == "RunStarted"
    assert begun().run_id == "run-1"
