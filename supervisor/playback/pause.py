"""The moment before a step, in the hands of a person."""

from __future__ import annotations

import code
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from esper_simic.events import LearnerStepped, StepSkipped
from esper_simic.learner import Learner
from esper_simic.policies.graph_policy import GraphPolicy
from esper_simic.replay import ReplaySample
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
  advance() make the step; tells digests and metrics, recorded and computed
  stop()    end the replay when you leave

Ctrl-D leaves, and the replay goes on to the next match.
"""


@dataclass(slots=True)
class Pause:
    """A replay that stands before a step.

    `make` folds the record, or makes the step that the run died of; it is called once.
    """

    learner: Learner
    step: int
    record: Record | None
    event: LearnerStepped | StepSkipped | None
    make: Callable[[], Folded | None]
    made: Folded | None = None
    is_made: bool = False
    is_stopped: bool = False

    @property
    def policy(self) -> GraphPolicy:
        """The network."""
        return self.learner.policy

    @property
    def metrics(self) -> dict[str, float]:
        """What the step recorded; nothing where it was never finished."""
        return dict(self.event.metrics) if isinstance(self.event, LearnerStepped) else {}

    @property
    def batch(self) -> ReplaySample | None:
        """The sample that the step takes, without consuming it; None where there is too little experience."""
        return self.learner.next_batch() if self.learner.can_step() else None

    def advance(self) -> dict[str, Any]:
        """Make the step.

        Returns:
            Digests and metrics, each recorded and computed.
        """
        if self.is_made:
            return {"step": self.learner.steps_done, "made": "already"}
        self.is_made = True
        self.made = self.make()
        folded = self.made
        if folded is None or folded.report is None or not isinstance(folded.event, LearnerStepped):
            return {"step": self.learner.steps_done}
        event, report = folded.event, folded.report
        return {
            "step": report.step,
            "digest": {"recorded": event.digest, "computed": report.digest},
            "metrics": report.metrics,
            "metrics_differing": metric_differences(event.metrics, report.metrics),
        }

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
            metrics=f"{shown}, ..." if shown else "nothing: it was never finished",
        )


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
