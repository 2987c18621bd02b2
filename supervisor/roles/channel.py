"""A child's line to its supervisor: ready, progress, stop, farewell."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from esper_simic.curriculum_facts import CurriculumReply, CurriculumRequest
from esper_simic.errors import UnavailableError
from esper_simic.telemetry import HistogramCounts
from supervisor.bus import Client, Received
from supervisor.child import ChildSpec
from supervisor.protocol import (
    ACCEPTS,
    AskCurriculum,
    CurriculumSettled,
    Evaluate,
    FromChild,
    Message,
    Noted,
    Progress,
    Ready,
    Stop,
)

PROGRESS_INTERVAL_S: Final = 0.25
"""Between two reports; the live view and TensorBoard need no more."""

NOTED_TIMEOUT_MS: Final = 10_000
"""How long a leaving child waits for its last word to be synced; after that its checkpoint speaks for itself."""


class ControlChannel:
    """The control socket of one child."""

    def __init__(self, spec: ChildSpec, frame_bytes_max: int) -> None:
        self._who = spec.who
        self._client = Client(
            spec.endpoints["control"],
            spec.identity,
            run_id=spec.run_id,
            accepts=ACCEPTS["control_child"],
            frame_bytes_max=frame_bytes_max,
        )
        self._work = 0
        self._next_report_s = 0.0
        self._phase = ""
        self._stop: Stop | None = None
        self._tasks: list[Evaluate] = []
        self._requests: list[CurriculumRequest] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    @property
    def client(self) -> Client:
        """To be watched by a poller."""
        return self._client

    def ready(
        self,
        *,
        learner_step: int = 0,
        environment_steps: int = 0,
        data_digest: str = "",
        execution: str = "",
    ) -> None:
        """Say that imports are done and sockets are open.

        A learner says where it stands and how it computes, others on which data.
        """
        role, index, incarnation = self._who
        self._client.send(
            Ready(
                role=role,
                index=index,
                incarnation=incarnation,
                pid=os.getpid(),
                learner_step=learner_step,
                environment_steps=environment_steps,
                data_digest=data_digest,
                execution=execution,
            )
        )

    def stop_requested(self) -> Stop | None:
        """The stop message, once it came."""
        self._listen(0)
        return self._stop

    def next_task(self, timeout_ms: int) -> Evaluate | None:
        """The next evaluation task, waiting at most `timeout_ms`; None when none came."""
        if not self._tasks:
            self._listen(timeout_ms)
        return self._tasks.pop(0) if self._tasks else None

    def take_requests(self) -> list[CurriculumRequest]:
        """What was asked of the curriculum since this was called last."""
        taken, self._requests = self._requests, []
        return taken

    def answer(self, reply: CurriculumReply) -> None:
        """Answer one of them. Lost on the way, it is asked again, and gets the same answer."""
        role, index, incarnation = self._who
        self._client.send(CurriculumSettled(role=role, index=index, incarnation=incarnation, reply=reply))

    def worked(self) -> None:
        """Count a unit of this child's own work."""
        self._work += 1

    def report(
        self,
        *,
        learner_step: int = 0,
        environment_steps: int = 0,
        phase: str = "",
        waiting_for: str = "",
        metrics: dict[str, float] | None = None,
        histograms: dict[str, HistogramCounts] | None = None,
        notes: Sequence[str] = (),
        now: bool = False,
    ) -> None:
        """Report progress, at most every `PROGRESS_INTERVAL_S` unless `now` or the phase is another one.

        Whoever begins something long says so before it and may have no time to say it again.
        """
        at_s = time.monotonic()
        if at_s < self._next_report_s and not now and phase == self._phase:
            return
        self._phase = phase
        self._next_report_s = at_s + PROGRESS_INTERVAL_S
        role, index, incarnation = self._who
        self._client.send(
            Progress(
                role=role,
                index=index,
                incarnation=incarnation,
                work=self._work,
                learner_step=learner_step,
                environment_steps=environment_steps,
                phase=phase,
                waiting_for=waiting_for,
                metrics=metrics or {},
                histograms=histograms or {},
                notes=tuple(notes),
            )
        )

    def tell(self, message: FromChild) -> None:
        """Say something that the supervisor journals, and wait until it has.

        Raises:
            UnavailableError: No answer in `NOTED_TIMEOUT_MS`.
        """
        self._client.send(message)
        kind = type(message).__name__
        deadline_s = time.monotonic() + NOTED_TIMEOUT_MS / 1000
        while (left_s := deadline_s - time.monotonic()) > 0:
            received = self._take(int(left_s * 1000) + 1)
            if isinstance(received, Noted) and received.of == kind:
                return
        raise UnavailableError(f"the supervisor did not confirm {kind} within {NOTED_TIMEOUT_MS} ms")

    def _listen(self, timeout_ms: int) -> None:
        while self._take(timeout_ms) is not None:
            timeout_ms = 0

    def _take(self, timeout_ms: int) -> Message | None:
        received = self._client.receive(timeout_ms)
        if not isinstance(received, Received):
            return None
        message = received.message
        if isinstance(message, Stop):
            self._stop = message
        elif isinstance(message, Evaluate):
            self._tasks.append(message)
        elif isinstance(message, AskCurriculum):
            self._requests.append(message.request)
        return message
