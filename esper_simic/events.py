"""The learner's facts: what its journal holds. Its state is the fold of these.

Facts are past tense and never change meaning; a new meaning is a new event. The journal's record kind is the class
name; the payload is the struct as a MessagePack map, followed by raw frames where the class says so.
"""

from __future__ import annotations

from typing import Any, Final, get_args

import msgspec


class RunStarted(msgspec.Struct, frozen=True, kw_only=True):
    """First event of every journal: under which configuration and in which surroundings the run was made."""

    run_id: str
    config: dict[str, Any]
    fingerprint: dict[str, str]


class EpisodeFinished(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of one training episode, part of the unroll in which it ended."""

    lane: int
    number: int
    episode_return: float
    length: int
    accuracy: float
    parameters_added: int
    fossils: int
    truncated: bool


class ExperienceAdmitted(msgspec.Struct, frozen=True, kw_only=True):
    """An unroll was taken in whole; its frames follow, as `trajectory.frame_layout` orders them.

    It counts `lanes` experiences of `length` steps. `sequence` numbers the unrolls of one incarnation of an actor;
    `policy_version` is the learner step whose weights acted; `episode_numbers` are the lanes' current episodes.
    """

    actor: int
    incarnation: int
    sequence: int
    policy_version: int
    length: int
    lanes: int
    episode_numbers: list[int]
    episodes: list[EpisodeFinished]


class ExperienceRefused(msgspec.Struct, frozen=True, kw_only=True):
    """An unroll was not taken; its steps count as made, its contents are gone."""

    actor: int
    incarnation: int
    sequence: int
    policy_version: int
    steps: int
    reason: str


class LearnerStepped(msgspec.Struct, frozen=True, kw_only=True):
    """One update was made from what stood in the journal before it.

    `digest` is the XXH3-64 of the parameters after the update; `state_digest`, on every k-th step, that of the whole
    learner state. `step` counts from 1 and is also the version of the weights it made.
    """

    step: int
    environment_steps: int
    digest: str
    state_digest: str | None
    metrics: dict[str, float]


class StepSkipped(msgspec.Struct, frozen=True, kw_only=True):
    """An update that could not be made, time and again, was given up: its batch was consumed, nothing was learned."""

    step: int
    reason: str


class CheckpointStaged(msgspec.Struct, frozen=True, kw_only=True):
    """The whole state at this position was copied, to be written as a checkpoint beside the training.

    `state_digest` covers all of it; `score` is the mean return of the recent training episodes, None before the first.
    """

    step: int
    environment_steps: int
    state_digest: str
    score: float | None


class CheckpointSaved(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint is on disk, synced and verified: the state that was staged at `staged_at`.

    Journals of before there was `CheckpointStaged` have -1 there: the state at the event's own position.
    """

    step: int
    environment_steps: int
    directory: str
    state_digest: str
    files: dict[str, str]
    staged_at: int = -1


class RecordQuarantined(msgspec.Struct, frozen=True, kw_only=True):
    """A record that recovery failed at, time and again: later folds pass it over."""

    position: int
    failures: int
    reason: str


class FingerprintChanged(msgspec.Struct, frozen=True, kw_only=True):
    """A learner recovered under another fingerprint than that of the updates before: digests begin anew from here."""

    before: dict[str, str]
    after: dict[str, str]


class LearnerRecovered(msgspec.Struct, frozen=True, kw_only=True):
    """A later life of the learner has folded this journal up to here, and goes on.

    `checkpoint` is the directory it began from, empty for the start of the journal; `passed_over` names newer ones that
    were not good, each with the reason. `steps_redone` updates were made again. If not `is_exact`, the state is not the
    fold of all that stands before (see `RecordQuarantined`, `FingerprintChanged`): a checkpoint follows, and every
    later fold goes on from that.
    """

    incarnation: int
    checkpoint: str
    passed_over: dict[str, str]
    records_folded: int
    steps_redone: int
    step: int
    environment_steps: int
    state_digest: str
    is_exact: bool
    seconds: float


class AdmissionPaused(msgspec.Struct, frozen=True, kw_only=True):
    """The disk is full: what the reserve still allows is kept for last words, and no unroll is taken in."""

    free_bytes: int
    reason: str


class AdmissionResumed(msgspec.Struct, frozen=True, kw_only=True):
    """There is room on the disk again."""

    free_bytes: int


LearnerEvent = (
    ExperienceAdmitted
    | ExperienceRefused
    | LearnerStepped
    | StepSkipped
    | CheckpointStaged
    | CheckpointSaved
    | RecordQuarantined
    | FingerprintChanged
    | LearnerRecovered
    | AdmissionPaused
    | AdmissionResumed
    | RunStarted
)
"""Everything that can stand in a learner's journal; the record's kind is the class name."""

LEARNER_EVENTS: Final[dict[str, type[LearnerEvent]]] = {
    kind.__name__: kind for kind in get_args(LearnerEvent)
}
"""The event of each kind of record."""
