"""Real children: they become ready, their deaths are known with reasons, and none outlives its supervisor."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import psutil
import pytest

from esper_simic.errors import UnavailableError
from supervisor import processes
from supervisor.bus import Poller, Received, Server, ipc_endpoint, runtime_directory
from supervisor.child import DEAF_TO, ChildSpec, log_path, stacks_path
from supervisor.events import ChildId, ExitReason
from supervisor.processes import Gone, LocalPlacement, Spawned
from supervisor.protocol import ACCEPTS, Message, Ready, Stop

CHILDREN = "tests.supervisor.children"
DEADLINE_S = 20.0

pytestmark = pytest.mark.processes


def lives(pid: int) -> bool:
    """Whether a process runs; a dead one that nobody has asked for its exit status does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Stage:
    """A placement, a control socket, and what was heard from both."""

    def __init__(self, run_dir: Path, sockets: Path, **mains: str) -> None:
        roles = {role: f"{CHILDREN}:{name}" for role, name in mains.items()}
        self.run_dir = run_dir
        self.endpoint = ipc_endpoint(sockets, "control")
        self.server = Server(self.endpoint, run_id="run-1", accepts=ACCEPTS["control"], frame_bytes_max=2**20)
        self.placement = LocalPlacement(run_dir, roles)  # type: ignore[arg-type]
        self.messages: list[Message] = []
        self.news: list[Spawned | Gone] = []

    def start(self, who: ChildId) -> None:
        endpoints = {"control": self.endpoint}
        self.placement.start(
            ChildSpec(who=who, run_id="run-1", run_dir=str(self.run_dir), endpoints=endpoints, config_text="")
        )

    def until(self, condition: Callable[[], object]) -> None:
        """Listen until the condition holds."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline_s, (
                f"waited in vain; news {self.news}, messages {self.messages}"
            )
            poller = Poller()
            poller.add(self.server)
            for descriptor in self.placement.descriptors:
                poller.add(descriptor)
            poller.wait(100)
            self.news += self.placement.collect()
            while (heard := self.server.receive()) is not None:
                if isinstance(heard, Received):
                    self.messages.append(heard.message)

    def ready(self, who: ChildId) -> int:
        """Wait for a child's READY; its pid."""
        self.until(lambda: self._ready_pids(who))
        return self._ready_pids(who)[0]

    def gone(self, who: ChildId) -> Gone:
        """Wait for a child's end."""
        self.until(lambda: self._ends(who))
        return self._ends(who)[0]

    def _ready_pids(self, who: ChildId) -> list[int]:
        return [
            message.pid
            for message in self.messages
            if isinstance(message, Ready) and (message.role, message.index, message.incarnation) == who
        ]

    def _ends(self, who: ChildId) -> list[Gone]:
        return [news for news in self.news if isinstance(news, Gone) and news.who == who]


@pytest.fixture
def sockets() -> Iterator[Path]:
    with runtime_directory() as directory:
        yield directory


def staged(run_dir: Path, sockets: Path, **mains: str) -> Iterator[Stage]:
    stage = Stage(run_dir, sockets, **mains)
    try:
        yield stage
    finally:
        stage.placement.close()
        stage.server.close()


@pytest.fixture
def stage(request: pytest.FixtureRequest, tmp_path: Path, sockets: Path) -> Iterator[Stage]:
    yield from staged(tmp_path, sockets, **getattr(request, "param", {"learner": "echo", "actor": "echo"}))


def role(name: str) -> pytest.MarkDecorator:
    """The stage's actors run this main."""
    return pytest.mark.parametrize("stage", [{"actor": name, "learner": "echo"}], indirect=True)


ACTOR = ChildId("actor", 0, 1)
LEARNER = ChildId("learner", 0, 1)


def test_forked_and_spawned_children_become_ready_and_leave_when_asked(stage: Stage) -> None:
    for who in (LEARNER, ACTOR, ChildId("actor", 1, 1)):
        stage.start(who)
    pids = {who: stage.ready(who) for who in (LEARNER, ACTOR, ChildId("actor", 1, 1))}
    assert {news.who: news.pid for news in stage.news if isinstance(news, Spawned)} == pids
    parents = {who: psutil.Process(pid).ppid() for who, pid in pids.items()}
    assert parents[LEARNER] == os.getpid(), "the learner is spawned"
    assert parents[ACTOR] == parents[ChildId("actor", 1, 1)] != os.getpid(), "actors share a fork server"
    stage.server.send("actor-0-1", Stop(reason="test"))
    # The child waits for its last words to be noted; nobody notes them here.
    stage.until(lambda: any(type(message).__name__ == "Stopped" for message in stage.messages))


def test_starting_the_same_life_twice_makes_one_process(stage: Stage) -> None:
    stage.start(ACTOR)
    stage.start(ACTOR)
    stage.ready(ACTOR)
    stage.start(ACTOR)
    second = ChildId("actor", 0, 2)
    stage.start(second)
    stage.ready(second)
    assert [news.who for news in stage.news] == [ACTOR, second]


def test_a_killed_child_is_known_by_its_signal(stage: Stage) -> None:
    stage.start(ACTOR)
    os.kill(stage.ready(ACTOR), signal.SIGKILL)
    end = stage.gone(ACTOR)
    assert end.reason is ExitReason.SIGNAL
    assert end.detail.startswith("signal 9 (SIGKILL); log: ")


def test_a_kill_by_the_supervisor_says_so(stage: Stage) -> None:
    stage.start(LEARNER)
    stage.ready(LEARNER)
    stage.placement.kill(LEARNER)
    assert "sent by the supervisor" in stage.gone(LEARNER).detail
    stage.placement.kill(LEARNER)  # gone already: nothing happens


@role("die")
def test_an_error_ends_with_its_last_words(stage: Stage) -> None:
    stage.start(ACTOR)
    end = stage.gone(ACTOR)
    assert end.reason is ExitReason.ERROR
    assert end.detail.startswith(f"exit status 1; log: {log_path(stage.run_dir, ACTOR)}")
    assert "the disk is a teapot" in end.detail
    assert "about to fail" in end.detail


@role("leave_silently")
def test_last_words_are_those_of_this_life(stage: Stage) -> None:
    log_path(stage.run_dir, ACTOR).write_text("an earlier life's complaint\n")
    stage.start(ACTOR)
    assert "an earlier life's complaint" not in stage.gone(ACTOR).detail


@role("leave_silently")
def test_an_exit_status_is_passed_on(stage: Stage) -> None:
    stage.start(ACTOR)
    end = stage.gone(ACTOR)
    assert (end.reason, end.detail.split(";")[0]) == (ExitReason.ERROR, "exit status 3")


@role("misconfigured")
def test_a_configuration_error_has_its_own_reason(stage: Stage) -> None:
    stage.start(ACTOR)
    end = stage.gone(ACTOR)
    assert end.reason is ExitReason.CONFIGURATION
    assert end.detail == f"environment.host: no such host; log: {log_path(stage.run_dir, ACTOR)}"


@role("misconfigured_once")
def test_a_person_reads_the_words_of_this_life_and_where_there_are_none_the_log(stage: Stage) -> None:
    log = log_path(stage.run_dir, ACTOR)
    for life, expected in ((1, "the last word"), (2, f"exit status 78; log: {log}")):
        stage.start(ChildId("actor", 0, life))
        end = stage.gone(ChildId("actor", 0, life))
        assert end.reason is ExitReason.CONFIGURATION
        assert end.detail.startswith(expected)
        assert "an earlier word" not in end.detail


@role("nothing_of_that_name")
def test_a_role_without_a_main_says_so(stage: Stage) -> None:
    stage.start(ACTOR)
    assert "names none" in stage.gone(ACTOR).detail


@role("record_signals")
def test_a_child_is_deaf_to_the_signals_of_a_terminal(stage: Stage) -> None:
    stage.start(ACTOR)
    assert psutil.Process(stage.ready(ACTOR)).is_running()


def signals_in(pid: int, mask: str) -> set[signal.Signals]:
    """The termination signals in one of the masks the kernel shows of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    bits = next(int(line.split()[1], 16) for line in lines if line.startswith(mask + ":"))
    return {number for number in DEAF_TO if bits & (1 << (number - 1))}


def test_from_their_first_moment_no_terminal_signal_reaches_fork_server_or_children(stage: Stage) -> None:
    server = getattr(forkserver._forkserver, "_forkserver_pid")  # noqa: B009 (private, see processes)
    assert signals_in(server, "SigBlk") == set(DEAF_TO), "also while it imports"
    for who in (ACTOR, LEARNER):
        stage.start(who)
        pid = stage.ready(who)
        assert signals_in(pid, "SigIgn") == set(DEAF_TO)
        assert signals_in(pid, "SigBlk") == set()


@role("hang_in_a_named_place")
def test_a_hung_child_tells_where_it_stands_before_it_is_killed(stage: Stage) -> None:
    stage.start(ACTOR)
    stage.ready(ACTOR)
    stacks = stacks_path(stage.run_dir, ACTOR)

    def tells() -> bool:  # READY is said a moment before it comes there
        stage.placement.dump_stacks(ACTOR)
        return "wait_for_nobody" in stacks.read_text()

    stage.until(tells)
    stage.placement.kill(ACTOR)
    assert stage.gone(ACTOR).reason is ExitReason.SIGNAL


def test_a_dead_fork_server_takes_its_children_along_and_the_next_start_makes_another(stage: Stage) -> None:
    stage.start(ACTOR)
    server = psutil.Process(stage.ready(ACTOR)).ppid()
    os.kill(server, signal.SIGKILL)
    assert stage.gone(ACTOR).reason is ExitReason.UNKNOWN
    second = ChildId("actor", 0, 2)
    stage.start(second)
    assert psutil.Process(stage.ready(second)).ppid() not in (server, os.getpid())


def test_a_dead_resource_tracker_keeps_nobody_from_being_started(stage: Stage) -> None:
    stage.start(ACTOR)
    stage.ready(ACTOR)
    tracker = getattr(resource_tracker._resource_tracker, "_pid")  # noqa: B009 (private, as above)
    os.kill(tracker, signal.SIGKILL)
    stage.until(lambda: not lives(tracker))
    with pytest.warns(UserWarning, match="resource_tracker: process died unexpectedly, relaunching"):
        stage.start(LEARNER)
    assert {stage.ready(who) > 0 for who in (LEARNER, ACTOR)} == {True}
    second = ChildId("actor", 1, 1)
    stage.start(second)
    assert lives(stage.ready(second))


def test_closing_leaves_nobody_whatever_they_do(tmp_path: Path, sockets: Path) -> None:
    stage = Stage(tmp_path, sockets, learner="ignore_stop", actor="ignore_stop")
    stage.start(LEARNER)
    stage.start(ACTOR)
    pids = [stage.ready(LEARNER), stage.ready(ACTOR)]
    stage.placement.start(
        ChildSpec(who=ChildId("actor", 1, 1), run_id="", run_dir=str(tmp_path), endpoints={}, config_text="")
    )
    stage.placement.close()
    stage.placement.close()
    stage.server.close()
    assert not [pid for pid in pids if lives(pid)]
    assert getattr(forkserver._forkserver, "_forkserver_pid") is None  # noqa: B009 (private, see processes)


def test_a_placement_gives_the_process_back_as_it_found_it(tmp_path: Path) -> None:
    before, main = dict(os.environ), sys.modules["__main__"]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with LocalPlacement(tmp_path, {}):
        assert os.environ["OMP_NUM_THREADS"] == "1"
    assert dict(os.environ) == before
    assert sys.modules["__main__"] is main
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


SUPERVISOR_SCRIPT = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from supervisor.child import ChildSpec
    from supervisor.events import ChildId
    from supervisor.processes import LocalPlacement
    run_dir, endpoint, main = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    placement = LocalPlacement(run_dir, {"learner": main, "actor": main})
    for who in (ChildId("learner", 0, 1), ChildId("actor", 0, 1), ChildId("actor", 1, 1)):
        spec = ChildSpec(
            who=who, run_id="run-1", run_dir=str(run_dir), endpoints={"control": endpoint}, config_text=""
        )
        placement.start(spec)
    while True:
        placement.collect()
        time.sleep(0.05)
    """
)


@pytest.mark.parametrize("main", ["echo", "hang_in_a_named_place"])
def test_when_the_supervisor_is_killed_every_child_is_gone_within_five_seconds(
    tmp_path: Path, sockets: Path, main: str
) -> None:
    endpoint = ipc_endpoint(sockets, "control")
    with Server(endpoint, run_id="run-1", accepts=ACCEPTS["control"], frame_bytes_max=2**20) as server:
        command = [sys.executable, "-c", SUPERVISOR_SCRIPT, str(tmp_path), endpoint, f"{CHILDREN}:{main}"]
        supervisor = subprocess.Popen(command, cwd=Path(__file__).parents[2])
        try:
            pids: set[int] = set()
            deadline_s = time.monotonic() + DEADLINE_S
            poller = Poller()
            poller.add(server)
            while len(pids) < 3:
                assert time.monotonic() < deadline_s, f"only {pids} became ready"
                poller.wait(100)
                while (heard := server.receive()) is not None:
                    if isinstance(heard, Received) and isinstance(heard.message, Ready):
                        pids.add(heard.message.pid)
            tree = psutil.Process(supervisor.pid).children(recursive=True)
            assert pids <= {process.pid for process in tree}
        finally:
            supervisor.kill()
            supervisor.wait()
        _, left = psutil.wait_procs(tree, timeout=5.0)
        assert [process for process in left if lives(process.pid)] == []


def test_a_fork_server_that_cannot_be_started_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(forkserver, "ensure_running", refuse)
    before = dict(os.environ)
    with pytest.raises(UnavailableError, match="no more processes"):
        LocalPlacement(tmp_path, {})
    assert dict(os.environ) == before


def test_a_fork_server_that_never_answers_is_ended_and_the_start_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LAUNCH_TIMEOUT_S", 0.2)
    with LocalPlacement(
        tmp_path, {"actor": "nobody:main"}, preload=["tests.supervisor.never_imported"]
    ) as placement:
        placement.start(ChildSpec(who=ACTOR, run_id="", run_dir=str(tmp_path), endpoints={}, config_text=""))
        news: list[Spawned | Gone] = []
        deadline_s = time.monotonic() + DEADLINE_S
        while not news:
            assert time.monotonic() < deadline_s
            select.select(list(placement.descriptors), [], [], 0.1)
            news = placement.collect()
    assert [(type(item), item.who) for item in news] == [(Gone, ACTOR)]
    assert isinstance(news[0], Gone)
    assert news[0].reason is ExitReason.NOT_STARTED


def test_closing_does_not_wait_for_a_fork_server_that_never_answers(tmp_path: Path) -> None:
    with LocalPlacement(
        tmp_path, {"actor": "nobody:main"}, preload=["tests.supervisor.never_imported"]
    ) as placement:
        placement.start(ChildSpec(who=ACTOR, run_id="", run_dir=str(tmp_path), endpoints={}, config_text=""))
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 5.0


@pytest.mark.parametrize(
    ("exit_code", "killed_by_us", "oom_kills", "expected"),
    [
        (0, False, 0, (ExitReason.CLEAN, "")),
        (78, False, 0, (ExitReason.CONFIGURATION, "exit status 78")),
        (1, False, 3, (ExitReason.ERROR, "exit status 1")),
        (-11, False, 1, (ExitReason.SIGNAL, "signal 11 (SIGSEGV)")),
        (-9, True, 1, (ExitReason.SIGNAL, "signal 9 (SIGKILL), sent by the supervisor")),
        (-9, False, 0, (ExitReason.SIGNAL, "signal 9 (SIGKILL)")),
        (
            -9,
            False,
            1,
            (
                ExitReason.OUT_OF_MEMORY,
                "signal 9 (SIGKILL); the kernel killed 1 process(es) for memory meanwhile",
            ),
        ),
        (-40, False, 0, (ExitReason.SIGNAL, "signal 40 (unnamed)")),
        (None, False, 0, (ExitReason.UNKNOWN, "its exit status was lost, as when the fork server dies")),
    ],
)
def test_an_end_is_explained_by_its_evidence(
    exit_code: int | None, killed_by_us: bool, oom_kills: int, expected: tuple[ExitReason, str]
) -> None:
    assert processes._explain(exit_code, killed_by_us, oom_kills) == expected
