"""The learner's facts: what its journal holds. Its state is the fold of these.

Facts are past tense and never change meaning; a new meaning is a new event. The journal's record kind is the class
name; the payload is the struct as a MessagePack map, followed by raw frames where the class says so.
"""

from __future__ import annotations

from typing import Any

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


class CheckpointSaved(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint of the state at this journal position is on disk, synced and verified."""

    step: int
    environment_steps: int
    directory: str
    state_digest: str
    files: dict[str, str]


LearnerEvent = ExperienceAdmitted | ExperienceRefused | LearnerStepped | CheckpointSaved | RunStarted
