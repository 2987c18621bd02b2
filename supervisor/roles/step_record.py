"""What the learner role adds to an update: its record, and the fault point inside it."""

from __future__ import annotations

from esper_simic.events import LearnerStepped, StepFailed
from esper_simic.safety import StepInputs
from esper_simic.step_report import StepReport
from esper_simic.telemetry import NullObserver, Phase
from supervisor import faults


class FaultPoints(NullObserver):
    """Passes the one fault point that lies inside an update; its replay has none."""

    def passed(self, phase: Phase) -> None:
        """See `StepObserver`."""
        if phase is Phase.BACKWARD:
            faults.point("learner.update.half")


def step_fact(report: StepReport, inputs: StepInputs) -> LearnerStepped | StepFailed:
    """The record of an update, made or not."""
    if report.failure:
        return StepFailed(
            step=report.step,
            environment_steps=report.environment_steps,
            digest=report.digest,
            state_digest=report.state_digest,
            reason=report.failure,
            out_of_memory=report.out_of_memory,
            inputs=inputs,
            moved=report.moved,
            facts=list(report.facts),
        )
    return LearnerStepped(
        step=report.step,
        environment_steps=report.environment_steps,
        digest=report.digest,
        state_digest=report.state_digest,
        metrics=report.metrics,
        inputs=inputs,
        facts=list(report.facts),
    )
