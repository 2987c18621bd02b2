"""Child processes: made, known by what the kernel holds, ended for certain.

**Making.** Actors and evaluators are forked by a fork server that has imported the heavy modules once (32 of them are
ready in seconds and share its memory); the learner is spawned, because it may own a GPU and more threads. A request
to a fork server that still imports blocks until it is done, so requests run in one launcher thread that belongs to
this organ; the supervisor never waits for it and hears the outcome from `collect`.

**Knowing.** A child's identity is its pidfd, its death is the pidfd becoming readable. `exitcode` alone proves
nothing: it says 255 for children that still run when the fork server has died. It is asked only after the death, for
the reason.

**Ending.** The ladder (ask, wait, dump the stacks, kill, confirm) is planned in `decide`; here are its last rungs.
`close` leaves nobody behind whatever state the children are in. See `lifeline` for what holds when this process
itself is killed.

Signals of a terminal reach the whole group. They are blocked in a child from its first moment (a signal mask is
inherited, also through exec) until it can ignore them, so that Ctrl-C during the imports does not kill half a tree.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import select
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

import msgspec

from esper_simic.errors import InvariantViolation, UnavailableError
from supervisor import child
from supervisor.child import ChildSpec
from supervisor.events import ChildId, ExitReason, Role
from supervisor.forkserver_preload import LOG_VARIABLE

ONE_THREAD: Final = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""Environment of every child: no thread pool before a fork, and actors do not fight over cores."""

SPAWNED_ROLES: Final[frozenset[Role]] = frozenset({"learner"})
"""Roles that get a fresh interpreter; all others are forked."""

EXIT_CODE_WAIT_S: Final = 0.2
"""After a death is certain, the fork server needs a moment to pass the exit status on."""

CLOSE_CONFIRM_S: Final = 10.0
"""How long `close` waits for killed processes; one that stays longer sits in the kernel."""

LAUNCH_TIMEOUT_S: Final = 120.0
"""A fork server that has not answered for so long is killed; the request fails and the next one starts another."""

COMPLAINT: Final = "configuration: "
"""How the line begins in which a child says what only a person can mend."""

TAIL_LINES: Final = 12
TAIL_BYTES: Final = 4096


class Spawned(msgspec.Struct, frozen=True):
    """A child has a process."""

    who: ChildId
    pid: int


class Gone(msgspec.Struct, frozen=True):
    """A child's process has ended, or could not be made."""

    who: ChildId
    reason: ExitReason
    detail: str


class Placement(Protocol):
    """Where children run. No call blocks for longer than a system call."""

    def start(self, spec: ChildSpec) -> None:
        """Begin to make a process; a repeat for the same life does nothing."""
        ...

    def dump_stacks(self, who: ChildId) -> None:
        """Have a child write where its threads stand; nothing happens if it is gone."""
        ...

    def kill(self, who: ChildId) -> None:
        """Send a child SIGKILL; nothing happens if it is gone."""
        ...

    def collect(self) -> list[Spawned | Gone]:
        """Take what has happened since the last call."""
        ...

    @property
    def descriptors(self) -> frozenset[int]:
        """File descriptors that become readable when `collect` has something."""
        ...

    def close(self) -> None:
        """Kill what is left and confirm that it is gone."""
        ...


class _Live(msgspec.Struct):
    process: BaseProcess
    pidfd: int
    killed_by_us: bool
    log_offset_bytes: int


class LocalPlacement:
    """Children on this machine.

    It must be made and closed in the main thread: the kernel ends a child when the *thread* that forked it ends.

    Args:
        run_dir: Where `logs/` and `stacks/` are.
        roles: The main of each role, as `package.module:function`.
        preload: Modules the fork server imports. None of them may compute with tensors while it is imported.

    Raises:
        UnavailableError: The fork server cannot be started.
    """

    def __init__(self, run_dir: Path, roles: Mapping[Role, str], *, preload: Sequence[str] = ()) -> None:
        self._run_dir = run_dir
        self._roles = dict(roles)
        for name in ("logs", "stacks"):
            (run_dir / name).mkdir(parents=True, exist_ok=True)
        self._live: dict[ChildId, _Live] = {}
        self._known: set[ChildId] = set()
        self._offsets: dict[ChildId, int] = {}
        self._news: list[Spawned | Gone] = []
        self._orders: queue.SimpleQueue[ChildSpec | None] = queue.SimpleQueue()
        self._launched: queue.SimpleQueue[tuple[ChildId, BaseProcess | Exception]] = queue.SimpleQueue()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._oom_kills = _oom_kills()
        self._closing = False
        self._launching_since_s: float | None = None
        self._undo = contextlib.ExitStack()
        self._undo.enter_context(
            _environment({**ONE_THREAD, LOG_VARIABLE: str(run_dir / "logs" / "forkserver.log")})
        )
        self._undo.enter_context(_bare_main_module())
        _stop_fork_server()
        forkserver.set_forkserver_preload(["supervisor.forkserver_preload", "supervisor.child", *preload])
        with _signals_blocked():
            try:
                resource_tracker.ensure_running()
                forkserver.ensure_running()
            except OSError as error:
                self._undo.close()
                raise UnavailableError(f"the fork server cannot be started: {error}") from error
        self._launcher = threading.Thread(target=self._launch_orders, name="launcher", daemon=True)
        self._launcher.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def descriptors(self) -> frozenset[int]:
        """The launcher's wake-up and the pidfd of every child."""
        return frozenset((self._wake_fd, *(entry.pidfd for entry in self._live.values())))

    def start(self, spec: ChildSpec) -> None:
        """Begin to make a process; a repeat for the same life does nothing."""
        if spec.who in self._known:
            return
        self._known.add(spec.who)
        self._offsets[spec.who] = _size_bytes(child.log_path(self._run_dir, spec.who))
        if spec.who.role not in SPAWNED_ROLES:
            self._orders.put(spec)
            return
        with _signals_blocked():
            self._enlist(spec.who, self._launch(spec, "spawn"))

    def dump_stacks(self, who: ChildId) -> None:
        """Have a child write where its threads stand into `stacks/`."""
        self._send(who, child.DUMP_SIGNAL)

    def kill(self, who: ChildId) -> None:
        """Send a child SIGKILL."""
        if who in self._live:
            self._live[who].killed_by_us = True
        self._send(who, signal.SIGKILL)

    def collect(self) -> list[Spawned | Gone]:
        """Take what has happened since the last call: starts first, then ends."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        with contextlib.suppress(queue.Empty):
            while True:
                self._enlist(*self._launched.get_nowait())
        since_s = self._launching_since_s
        if since_s is not None and time.monotonic() - since_s > LAUNCH_TIMEOUT_S:
            _kill_fork_server()
        for who, entry in list(self._live.items()):
            if _readable(entry.pidfd):
                self._news.append(self._bury(who, entry))
        news, self._news = self._news, []
        return news

    def close(self) -> None:
        """Kill what is left and confirm that it is gone. A second call does nothing.

        Raises:
            InvariantViolation: A process survived SIGKILL; the message names it.
        """
        if self._closing:
            return
        self._closing = True
        self._orders.put(None)
        # A launcher that waits for the fork server is freed by that one's end; it may have begun a new one meanwhile.
        while self._launcher.is_alive():
            _stop_fork_server()
            self._launcher.join(0.1)
        _stop_fork_server()
        self.collect()
        for who in list(self._live):
            self.kill(who)
        deadline_s = time.monotonic() + CLOSE_CONFIRM_S
        while self._live and time.monotonic() < deadline_s:
            select.select([entry.pidfd for entry in self._live.values()], [], [], 0.1)
            self.collect()
        os.close(self._wake_fd)
        self._undo.close()
        if self._live:
            left = ", ".join(f"{who.name} (pid {entry.process.pid})" for who, entry in self._live.items())
            raise InvariantViolation(f"processes survived SIGKILL for {CLOSE_CONFIRM_S:g} s: {left}")

    def _launch(self, spec: ChildSpec, method: str) -> BaseProcess | Exception:
        context = multiprocessing.get_context(method)
        process: BaseProcess = context.Process(  # type: ignore[attr-defined]  # every context has it
            target=child.run_child, args=(self._roles[spec.who.role], spec), name=spec.identity
        )
        try:
            process.start()
        except (OSError, EOFError) as error:
            return error
        return process

    def _launch_orders(self) -> None:
        """The launcher thread: one fork request after the other until told to end."""
        signal.pthread_sigmask(signal.SIG_BLOCK, child.DEAF_TO)
        while (spec := self._orders.get()) is not None and not self._closing:
            self._launching_since_s = time.monotonic()
            launched = self._launch(spec, "forkserver")
            self._launching_since_s = None
            self._launched.put((spec.who, launched))
            with contextlib.suppress(OSError):  # closed meanwhile: nobody waits for news
                os.eventfd_write(self._wake_fd, 1)

    def _enlist(self, who: ChildId, launched: BaseProcess | Exception) -> None:
        if isinstance(launched, Exception):
            detail = f"{type(launched).__name__}: {launched}{self._tail(self._run_dir / 'logs' / 'forkserver.log', 0)}"
            self._news.append(Gone(who, ExitReason.NOT_STARTED, detail))
            return
        pid = launched.pid or 0
        self._news.append(Spawned(who, pid))
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._news.append(
                Gone(who, ExitReason.UNKNOWN, "it ended before it could be watched" + self._words(who))
            )
            return
        self._live[who] = _Live(launched, pidfd, False, self._offsets[who])

    def _bury(self, who: ChildId, entry: _Live) -> Gone:
        entry.process.join(EXIT_CODE_WAIT_S)
        reason, detail = _explain(entry.process.exitcode, entry.killed_by_us, _oom_kills() - self._oom_kills)
        self._oom_kills = _oom_kills()
        os.close(entry.pidfd)
        del self._live[who]
        if reason is ExitReason.CLEAN:
            return Gone(who, reason, detail)
        if reason is ExitReason.CONFIGURATION:
            return Gone(who, reason, self._complaint(who) or detail + self._words(who))
        return Gone(who, reason, detail + self._words(who))

    def _send(self, who: ChildId, number: signal.Signals) -> None:
        entry = self._live.get(who)
        if entry is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(entry.pidfd, number)

    def _words(self, who: ChildId) -> str:
        path = child.log_path(self._run_dir, who)
        return f"; log: {path}{self._tail(path, self._offsets[who])}"

    def _complaint(self, who: ChildId) -> str:
        """What a child said that only a person can mend, with the remedy; empty if it did not."""
        path = child.log_path(self._run_dir, who)
        lines = [line.strip() for line in self._tail(path, self._offsets[who]).splitlines()]
        said = [line for line in lines if line.startswith(COMPLAINT)]
        return f"{said[-1].removeprefix(COMPLAINT)}; log: {path}" if said else ""

    @staticmethod
    def _tail(path: Path, offset_bytes: int) -> str:
        """The last lines written after the offset, each on a line of its own."""
        size = _size_bytes(path)
        start = max(offset_bytes if offset_bytes <= size else 0, size - TAIL_BYTES)
        if size <= start:
            return ""
        with path.open("rb") as log:
            log.seek(start)
            text = log.read(TAIL_BYTES).decode("utf-8", "replace")
        return "".join(f"\n    {line}" for line in text.splitlines()[-TAIL_LINES:])


def _explain(  # noqa: PLR0911 (a table)
    exit_code: int | None, killed_by_us: bool, oom_kills: int
) -> tuple[ExitReason, str]:
    """Reason and evidence of an end. `oom_kills` is how often the kernel killed for memory since the last look."""
    if exit_code == 0:
        return ExitReason.CLEAN, ""
    if exit_code == child.CONFIGURATION_EXIT_CODE:
        return ExitReason.CONFIGURATION, f"exit status {exit_code}"
    if exit_code is None or exit_code == 255:
        return ExitReason.UNKNOWN, "its exit status was lost, as when the fork server dies"
    if exit_code > 0:
        return ExitReason.ERROR, f"exit status {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = "unnamed"
    detail = f"signal {-exit_code} ({name})"
    if -exit_code == signal.SIGKILL and killed_by_us:
        return ExitReason.SIGNAL, f"{detail}, sent by the supervisor"
    if -exit_code == signal.SIGKILL and oom_kills > 0:
        return (
            ExitReason.OUT_OF_MEMORY,
            f"{detail}; the kernel killed {oom_kills} process(es) for memory meanwhile",
        )
    return ExitReason.SIGNAL, detail


def _oom_kills() -> int:
    """How many processes this kernel has killed for want of memory since it started; 0 where it does not say."""
    try:
        text = Path("/proc/vmstat").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0)


def _size_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _readable(descriptor: int) -> bool:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(0))


def _stop_fork_server() -> None:
    """End the fork server of this process, if there is one, and forget it.

    The standard library keeps one for each process and has no public way to end it. Its own `_stop` waits until the
    last child has gone, so the server is killed first.
    """
    _kill_fork_server()
    with contextlib.suppress(ChildProcessError):
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # see above


def _kill_fork_server() -> None:
    """Kill the fork server; the next request starts another. It is reaped by whoever looks next, so its id is ours."""
    pid: int | None = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, child.DEAF_TO)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _bare_main_module() -> Iterator[None]:
    """Hide this process's main module from new children.

    They would import it again (the command line with all that it needs) before they begin; a role is named by its
    module and needs nothing of it.
    """
    before = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = before
