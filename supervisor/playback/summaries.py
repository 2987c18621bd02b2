"""One line about each of a learner's facts, for people who look for the one that mattered."""

from __future__ import annotations

from typing import assert_never

from esper_simic.config_behaviour import POLICY
from esper_simic.events import (
    AdmissionPaused,
    AdmissionResumed,
    CheckpointSaved,
    CheckpointStaged,
    CurriculumJudged,
    ExperienceAdmitted,
    ExperienceRefused,
    FingerprintChanged,
    HaltLifted,
    HardwareNoted,
    LearnerEvent,
    LearnerRecovered,
    LearnerStepped,
    PolicyImported,
    RecordQuarantined,
    RunStarted,
    StepFailed,
    StepSkipped,
)


def summary(event: LearnerEvent) -> str:  # noqa: C901, PLR0911, PLR0912 (a table)
    """What happened, in one line."""
    match event:
        case RunStarted():
            return f"run {event.run_id}"
        case ExperienceAdmitted():
            count = len(event.episodes)
            plural = "" if count == 1 else "s"
            episodes = f", {count} episode{plural} ended" if count else ""
            who = f"policy {event.policy_version}" if event.behaviour == POLICY else event.behaviour
            return f"{_sender(event)}: {event.length} steps of {event.lanes} lanes by {who}{episodes}"
        case PolicyImported():
            adapters = f" with adapters from {event.adapters_source}" if event.adapters_source else ""
            return f"weights from {event.source}{adapters}, digest {event.digest}"
        case ExperienceRefused():
            return f"{_sender(event)}: {event.steps} steps by policy {event.policy_version}: {event.reason}"
        case LearnerStepped():
            return (
                f"step {event.step} after {event.environment_steps} environment steps, digest {event.digest}"
            )
        case CurriculumJudged():
            return f"stage {event.stage}: {', '.join(type(fact).__name__ for fact in event.facts)}"
        case StepFailed():
            return f"step {event.step} failed: {event.reason}"
        case HardwareNoted():
            return f"{event.id} is {event.hardware.device_id}"
        case HaltLifted():
            return f"an operator let the training go on (takeover {event.order})"
        case StepSkipped():
            return f"step {event.step}: {event.reason}"
        case CheckpointStaged():
            return f"step {event.step}, state {event.state_digest}"
        case CheckpointSaved():
            return f"{event.directory}, state {event.state_digest}"
        case RecordQuarantined():
            return f"record {event.position} after {event.failures} failures: {event.reason}"
        case FingerprintChanged():
            return f"from {event.before} to {event.after}"
        case LearnerRecovered():
            return _recovered(event)
        case AdmissionPaused():
            return f"{event.free_bytes} bytes free: {event.reason}"
        case AdmissionResumed():
            return f"{event.free_bytes} bytes free"
        case _:
            assert_never(event)


def _sender(event: ExperienceAdmitted | ExperienceRefused) -> str:
    return f"actor {event.actor}, life {event.incarnation}, unroll {event.sequence}"


def _recovered(event: LearnerRecovered) -> str:
    origin = event.checkpoint or "the start of the journal"
    exactly = "exactly" if event.is_exact else "NOT exactly"
    return f"life {event.incarnation} {exactly} at step {event.step} from {origin}, {event.steps_redone} steps redone"
