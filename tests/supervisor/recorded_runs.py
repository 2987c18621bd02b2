"""Run directories as a supervisor leaves them, written by hand: real journals, no processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from esper_simic.events import (
    CheckpointSaved,
    ExperienceAdmitted,
    ExperienceRefused,
    LearnerStepped,
    StepFailed,
)
from esper_simic.safety import StepInputs
from supervisor import files
from supervisor.bus import Poller, Received, Server, ipc_endpoint, runtime_directory
from supervisor.clock import ManualClock
from supervisor.events import AnyEvent, CommandReceived, ExitReason, SignalReceived
from supervisor.journal import Journal
from supervisor.protocol import ACCEPTS, Message
from tests.supervisor.worlds import LEARNER, World, actor, evaluator

STARTED_UNIX_S = 0.0
"""Of every `World`; the learner's records below are at seconds since then."""


def record(run_dir: Path, events: Iterable[AnyEvent]) -> Path:
    """Write a supervisor's journal."""
    directory = run_dir / "journal" / "supervisor"
    with Journal(directory, owner="supervisor", run_id="run-1", clock=ManualClock()) as journal:
        for event in events:
            journal.append(type(event).__name__, event)
        journal.sync()
    return run_dir


def record_learner(
    run_dir: Path,
    *events: tuple[
        float, LearnerStepped | StepFailed | ExperienceAdmitted | ExperienceRefused | CheckpointSaved
    ],
) -> None:
    """Write a learner's journal: each event with the wall clock's seconds."""
    clock = ManualClock()
    directory = run_dir / "journal" / "learner-0"
    with Journal(directory, owner="learner-0", run_id="run-1", clock=clock) as journal:
        for at_s, event in events:
            clock.set_now(at_s)
            journal.append(type(event).__name__, event)
            journal.sync()


def stepped(step: int, environment_steps: int) -> LearnerStepped:
    return LearnerStepped(
        step=step,
        environment_steps=environment_steps,
        digest="d",
        state_digest=None,
        metrics={"entropy": 1.5},
    )


def failed_step(step: int, environment_steps: int) -> StepFailed:
    return StepFailed(
        step=step,
        environment_steps=environment_steps,
        digest="d",
        state_digest=None,
        reason="not finite: loss nan",
        out_of_memory=False,
        inputs=StepInputs(at_s=float(step)),
    )


def admitted(length: int, lanes: int) -> ExperienceAdmitted:
    return ExperienceAdmitted(
        actor=0,
        incarnation=1,
        sequence=1,
        policy_version=0,
        length=length,
        lanes=lanes,
        episode_numbers=[],
        episodes=[],
    )


def refused(steps: int) -> ExperienceRefused:
    return ExperienceRefused(
        actor=0, incarnation=1, sequence=2, policy_version=0, steps=steps, reason="too_old"
    )


def training(**config: Any) -> World:
    """Everybody ready since 3 s."""
    world = World(max_seconds=60.0, **config)
    world.now_s = 3.0
    world.train()
    return world


def finished() -> World:
    """Trained for its 60 s, evaluated, ended."""
    world = training()
    world.wait(60.0, learner=63.0, actor=63.0)
    world.end_training()
    world.spawn()
    world.ready(evaluator(0), evaluator(1))
    for who, policy in ((evaluator(0), "learned"), (evaluator(1), "random"), (evaluator(0), "never-grow")):
        world.evaluated(who, policy)
    world.gone(evaluator(0))
    world.gone(evaluator(1))
    return world


def stopped() -> World:
    """Asked to stop by a signal; left a checkpoint."""
    world = training()
    world.now_s = 10.0
    world.tell(SignalReceived(name="SIGTERM"))
    world.end_training()
    return world


def failed() -> World:
    """The learner died so often that it was given up."""
    world = training(max_restarts=0)
    world.now_s = 10.0
    world.gone(LEARNER, ExitReason.ERROR, "exit status 1")
    for index in (0, 1):
        world.gone(actor(index))
    return world


def stop_command() -> CommandReceived:
    return CommandReceived(command_id="c", name="stop")


@contextmanager
def supervised(run_dir: Path, answer: Callable[[Message], Message | None]) -> Iterator[list[Message]]:
    """Hold a run directory as a living supervisor does and answer; yields what was heard."""
    heard: list[Message] = []
    is_over = threading.Event()
    with files.exclusive_lock(run_dir / "lock"), runtime_directory() as sockets:
        endpoint = ipc_endpoint(sockets, "control")
        with Server(endpoint, run_id="run-1", accepts=ACCEPTS["control"], frame_bytes_max=2**24) as server:
            address = {"pid": 1, "run_id": "run-1", "endpoint": endpoint}
            files.write_atomically(run_dir / "supervisor.json", msgspec.json.encode(address))

            def serve() -> None:
                poller = Poller()
                poller.add(server)
                while not is_over.is_set():
                    poller.wait(20)
                    received = server.receive()
                    if isinstance(received, Received):
                        heard.append(received.message)
                        reply = answer(received.message)
                        if reply is not None:
                            server.send(received.peer, reply)

            thread = threading.Thread(target=serve)
            thread.start()
            try:
                yield heard
            finally:
                is_over.set()
                thread.join()


def spoil(run_dir: Path) -> None:
    segment = next((run_dir / "journal" / "supervisor").glob("*.log"))
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
