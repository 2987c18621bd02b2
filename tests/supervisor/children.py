"""Small real roles for tests with real processes: they speak, obey, die or hang, and compute nothing."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from esper_simic.curriculum_facts import CurriculumReply
from supervisor.bus import Client, Received
from supervisor.child import ChildSpec
from supervisor.protocol import (
    ACCEPTS,
    AskCurriculum,
    Checkpoint,
    CurriculumSettled,
    Evaluate,
    Evaluated,
    Message,
    Noted,
    Progress,
    Ready,
    Stop,
    Stopped,
)


class Line:
    """The control line of a test child."""

    def __init__(self, spec: ChildSpec) -> None:
        self.who = {"role": spec.who.role, "index": spec.who.index, "incarnation": spec.who.incarnation}
        self.client = Client(
            spec.endpoints["control"],
            spec.identity,
            run_id=spec.run_id,
            accepts=ACCEPTS["control_child"],
            frame_bytes_max=2**20,
        )
        self.client.send(Ready(**self.who, pid=os.getpid()))  # type: ignore[arg-type]

    def hear(self, timeout_ms: int) -> Message | None:
        heard = self.client.receive(timeout_ms)
        return heard.message if isinstance(heard, Received) else None

    def progress(self, work: int) -> None:
        steps = 10 * work
        self.client.send(Progress(**self.who, work=work, learner_step=work, environment_steps=steps))  # type: ignore[arg-type]

    def tell(self, message: Message) -> None:
        """Say it and wait until it is noted."""
        self.client.send(message)
        while not isinstance(self.hear(10_000), Noted):
            pass


def echo(spec: ChildSpec) -> None:
    """Ready, progress, and out when asked; a learner leaves a checkpoint."""
    line = Line(spec)
    work = 1  # what a learner finds in its journal
    line.progress(work)
    while not isinstance(line.hear(20), Stop):
        work += 1
        line.progress(work)
    checkpoint = None
    if spec.who.role == "learner":
        checkpoint = Checkpoint(
            path="checkpoints/last", learner_step=work, environment_steps=10 * work, digest="d"
        )
    line.tell(Stopped(**line.who, checkpoint=checkpoint))  # type: ignore[arg-type]
    line.client.close()


def answer_requests(spec: ChildSpec) -> None:
    """As `echo`, but a learner obeys what is asked of its curriculum, unless the stage is called `nowhere`."""
    line = Line(spec)
    work = 1
    while not isinstance(message := line.hear(20), Stop):
        work += 1
        line.progress(work)
        if isinstance(message, AskCurriculum):
            asked = message.request
            reply = CurriculumReply(
                request_id=asked.request_id,
                correlation_id=asked.correlation_id,
                stage=asked.stage,
                episodes=0,
                success_rate=0.0,
                advanced=True,
                refusal="there is none" if asked.stage == "nowhere" else "",
            )
            line.client.send(CurriculumSettled(**line.who, reply=reply))  # type: ignore[arg-type]
    checkpoint = Checkpoint(path="checkpoints/last", learner_step=work, environment_steps=1, digest="d")
    line.tell(Stopped(**line.who, checkpoint=checkpoint))  # type: ignore[arg-type]
    line.client.close()


def evaluate(spec: ChildSpec) -> None:
    """Give every policy its name's length as return."""
    line = Line(spec)
    while not isinstance(message := line.hear(1000), Stop):
        if isinstance(message, Evaluate):
            value = float(len(message.policy))
            line.tell(
                Evaluated(
                    **line.who,  # type: ignore[arg-type]
                    policy=message.policy,
                    returns=(value,) * message.episodes,
                    accuracies=(1.0,) * message.episodes,
                    parameters=(2.0,) * message.episodes,
                    summary={"return_mean": value},
                )
            )
    line.client.close()


def evaluate_one_and_die(spec: ChildSpec) -> None:
    """Measure one policy in all lives, then be no more."""
    line = Line(spec)
    while not isinstance(message := line.hear(1000), Evaluate):
        pass
    line.tell(
        Evaluated(
            **line.who,  # type: ignore[arg-type]
            policy=message.policy,
            returns=(7.0,) * message.episodes,
            accuracies=(1.0,) * message.episodes,
            parameters=(2.0,) * message.episodes,
            summary={"return_mean": 7.0},
        )
    )
    os._exit(3)


def leave_slowly(spec: ChildSpec) -> None:
    """As `echo`, but a second passes between the stop and the farewell."""
    line = Line(spec)
    work = 0
    while not isinstance(line.hear(20), Stop):
        work += 1
        line.progress(work)
    line.hear(1000)
    line.tell(Stopped(**line.who))  # type: ignore[arg-type]
    line.client.close()


def die(spec: ChildSpec) -> None:
    """Ready, then an error."""
    Line(spec)
    sys.stderr.write("about to fail\n")
    raise RuntimeError("the disk is a teapot")


def leave_silently(spec: ChildSpec) -> None:
    """Gone before a word."""
    os._exit(3)


def misconfigured(spec: ChildSpec) -> None:
    """The configuration cannot be obeyed."""
    from esper_simic.errors import ConfigError

    raise ConfigError("no such host", "environment.host")


def misconfigured_once(spec: ChildSpec) -> None:
    """The first life says why it needs a person, later ones only leave with that status."""
    if spec.who.incarnation > 1:
        os._exit(78)
    sys.stderr.write("configuration: an earlier word\n")
    from esper_simic.errors import ConfigError

    raise ConfigError("the last word")


def hang_in_a_named_place(spec: ChildSpec) -> None:
    """Ready, and then deaf in `wait_for_nobody`."""
    line = Line(spec)
    wait_for_nobody()
    line.client.close()


def wait_for_nobody() -> None:
    threading.Event().wait()


def ignore_stop(spec: ChildSpec) -> None:
    """Progress for ever, whatever is said."""
    line = Line(spec)
    work = 0
    while True:
        work += 1
        line.progress(work)
        time.sleep(0.02)


def record_signals(spec: ChildSpec) -> None:
    """Send itself what a terminal would send; alive afterwards, it is ready."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), number)
    echo(spec)
