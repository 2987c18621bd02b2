"""The moment before a step, in the hands of a person."""

from __future__ import annotations

import code
import copy
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from esper_simic.events import LearnerStepped, StepFailed, StepSkipped
from esper_simic.learner import Learner
from esper_simic.policies.policy import Policy
from esper_simic.replay import ReplaySample
from esper_simic.step_report import StepReport
from supervisor.journal import Record
from supervisor.playback.compare import metric_differences
from supervisor.roles.fold import Folded

BANNER = """
Before step {step}{where}. You have:

  learner   the whole state: learner.buffer, learner.learning_rates, learner.reward_scale, learner.state()
  policy    the network: policy.named_parameters()
  batch     the {size} experiences that the step takes (None where there are too few); nothing is consumed
  record    the journal's record of the step{absent}
  metrics   what it recorded: {metrics}
  step      {step}
  advance() make the step; tells digests and metrics, or why it failed, recorded and computed
  stop()    end the replay when you leave

Ctrl-D leaves, and the replay goes on to the next match.
"""


@dataclass(slots=True)
class Pause:
    """A replay that stands before a step.

    `make` folds the record, or makes the step that the journal does not hold; it is called once. `batch_size` is the
    step's own where the safety of the training had made it smaller.
    """

    learner: Learner
    step: int
    record: Record | None
    event: LearnerStepped | StepFailed | StepSkipped | None
    make: Callable[[], Folded | StepReport]
    batch_size: int | None = None
    made: Folded | None = None
    unrecorded: StepReport | None = None
    """What a step that the journal does not hold did."""
    is_made: bool = False
    is_stopped: bool = False

    @property
    def policy(self) -> Policy:
        """The network."""
        return self.learner.policy

    @property
    def metrics(self) -> dict[str, float]:
        """What the step recorded; nothing where it failed or was never finished."""
        return dict(self.event.metrics) if isinstance(self.event, LearnerStepped) else {}

    @property
    def report(self) -> StepReport | None:
        """What the step did; None before it is made."""
        return self.unrecorded if self.made is None else self.made.report

    @property
    def failure(self) -> str:
        """Why there are no new weights; empty where there are, or where that is not known yet."""
        if self.report is not None:
            return self.report.failure
        return self.event.reason if isinstance(self.event, StepFailed) else ""

    @property
    def batch(self) -> ReplaySample | None:
        """The sample that the step takes, without consuming it; None where there is too little experience."""
        is_enough = self.learner.can_step(self.batch_size)
        return self.learner.next_batch(self.batch_size) if is_enough else None

    def advance(self) -> dict[str, Any]:
        """Make the step.

        Returns:
            Digests and metrics, each recorded and computed. Of a step that failed, why; it is folded as it was
            recorded, and tried on a copy to see what is computed here, unless it was memory that it lacked. Of one
            that the journal does not hold, what was computed.

        Raises:
            InvariantViolation: It is one that a run of before there were failed steps died of, and it fails here too.
        """
        if self.is_made:
            return {"step": self.learner.steps_done, "made": "already"}
        self.is_made = True
        failure = self._tried()
        made = self.make()
        if isinstance(made, StepReport):
            self.unrecorded = made
            told = {"failure": made.failure} if made.failure else {"metrics": made.metrics}
            return {"step": made.step, "digest": made.digest} | told
        self.made = made
        event, report = made.event, made.report
        if report is None or not isinstance(event, LearnerStepped | StepFailed):
            return {"step": self.learner.steps_done}
        answer: dict[str, Any] = {
            "step": report.step,
            "digest": {"recorded": event.digest, "computed": report.digest},
        }
        if isinstance(event, StepFailed):
            return answer | {"failure": {"recorded": event.reason, "computed": failure}}
        return answer | {
            "metrics": report.metrics,
            "metrics_differing": metric_differences(event.metrics, report.metrics),
        }

    def _tried(self) -> str | None:
        """Why the update of a `StepFailed` fails here, empty if it does not; None if there is nothing to try."""
        if not isinstance(self.event, StepFailed) or self.event.out_of_memory:
            return None
        return copy.deepcopy(self.learner).step(self.event.inputs).failure

    def stop(self) -> None:
        """End the replay when the console is left."""
        self.is_stopped = True

    def names(self) -> dict[str, Any]:
        """What the console shows."""
        return {
            "learner": self.learner,
            "policy": self.policy,
            "batch": self.batch,
            "record": self.record,
            "metrics": self.metrics,
            "step": self.step,
            "advance": self.advance,
            "stop": self.stop,
        }

    def banner(self) -> str:
        """What the names are."""
        shown = ", ".join(f"{name}={value:.4g}" for name, value in list(self.metrics.items())[:4])
        return BANNER.format(
            step=self.step,
            where=f" (record {self.record.position})" if self.record else ", which the journal does not hold",
            size=0 if self.batch is None else len(self.batch.serials),
            absent="" if self.record else " (None: it was never finished)",
            metrics=f"{shown}, ..." if shown else f"nothing: {self._why_none()}",
        )

    def _why_none(self) -> str:
        match self.event:
            case StepFailed(reason=reason):
                return f"it failed: {reason}"
            case StepSkipped(reason=reason):
                return f"it was given up: {reason}"
            case _:
                return "it was never finished"


def console(pause: Pause) -> None:
    """Open an interactive console before a step: IPython where it is installed, else Python's own."""
    if importlib.util.find_spec("IPython") is not None:
        print(pause.banner())  # noqa: T201 - this is a conversation
        importlib.import_module("IPython").start_ipython(argv=["--no-banner"], user_ns=pause.names())
        return
    try:
        code.interact(banner=pause.banner(), local=pause.names(), exitmsg="")
    except SystemExit:  # exit() and quit() mean the program
        pause.stop()
