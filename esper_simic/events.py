"""The learner's facts: what its journal holds. Its state is the fold of these.

Facts are past tense and never change meaning; a new meaning is a new event. The journal's record kind is the class
name; the payload is the struct as a MessagePack map, followed by raw frames where the class says so.
"""

from __future__ import annotations

from typing import Any, Final, get_args

import msgspec

from esper_simic.config_behaviour import POLICY
from esper_simic.curriculum_facts import CurriculumFact
from esper_simic.hardware import HardwareContext
from esper_simic.rate_facts import RateFact
from esper_simic.safety_facts import SafetyFact
from esper_simic.safety_step import StepInputs


class AdaptersBegun(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From here the policy's weights are frozen, and low-rank adapters of so many of its matrices learn."""

    rank: int
    alpha: float
    matrices: int


StepFact = SafetyFact | RateFact | AdaptersBegun
"""What may happen beside an update."""


class RunStarted(msgspec.Struct, frozen=True, kw_only=True):
    """First event of every journal: under which configuration and in which surroundings the run was made."""

    run_id: str
    config: dict[str, Any]
    fingerprint: dict[str, str]


class EpisodeFinished(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Outcome of one training episode, part of the unroll in which it ended.

    What a world does not know is None: a host has an accuracy, a pole has none. `success` is what the world calls one.
    `truncated`: it went on outside, so its last value counts. `cut`: it was not played to where it ends by the world's
    own rules, a time limit among them, so it says little about the policy (journals of before there was this have None,
    and what was truncated there was cut). `rolled_back`: it was cut because the governor undid what the policy had
    done, so it says what a failure says; one that was cut for staggering says nothing.
    """

    lane: int
    number: int
    episode_return: float
    length: int
    accuracy: float | None = None
    parameters_added: int | None = None
    fossils: int | None = None
    truncated: bool
    success: bool | None = None
    cut: bool | None = None
    rolled_back: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether it was played to its end."""
        return not (self.truncated if self.cut is None else self.cut)


class ExperienceAdmitted(msgspec.Struct, frozen=True, kw_only=True):
    """An unroll was taken in whole; its frames follow, as `trajectory.frame_layout` orders them.

    It counts `lanes` experiences of `length` steps. `sequence` numbers the unrolls of one incarnation of an actor;
    `policy_version` is the learner step whose weights acted; `episode_numbers` are the lanes' current episodes;
    `stage` is the stage of the curriculum in whose environment it was made, `hardware` the id of the `HardwareNoted` on
    which (journals of before there was such a thing have none). `behaviour` is who acted: the policy, or another (see
    `environment.behaviour`), of whose doings the policy of that version made nothing.
    """

    actor: int
    incarnation: int
    sequence: int
    policy_version: int
    length: int
    lanes: int
    episode_numbers: list[int]
    episodes: list[EpisodeFinished]
    stage: int = 0
    hardware: str = ""
    behaviour: str = POLICY


class HardwareNoted(msgspec.Struct, frozen=True, kw_only=True):
    """An actor greeted the learner from hardware that no actor had greeted it from before."""

    id: str
    hardware: HardwareContext


class PolicyImported(msgspec.Struct, frozen=True, kw_only=True):
    """The policy began with weights that were made elsewhere: a frame of safetensors follows, another one for adapters.

    `source` is where they were read, `digest` the XXH3-64 of the policy's parameters with them. It stands before every
    experience; optimisers, values of other learners and counts did not come with it. `adapters_source` is empty where
    there came none.
    """

    source: str
    digest: str
    adapters_source: str = ""


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
    learner state. `step` counts from 1 and is also the version of the weights it made. `inputs` is what came from
    outside with it (journals of before there was such a thing have none), `facts` what happened beside.
    """

    step: int
    environment_steps: int
    digest: str
    state_digest: str | None
    metrics: dict[str, float]
    inputs: StepInputs | None = None
    facts: list[StepFact] = []


class CurriculumJudged(msgspec.Struct, frozen=True, kw_only=True):
    """The curriculum was looked at, and something came of it: a stage was passed, or a round of it failed.

    `at_s` is the time by which it was judged, `stage` the index of the stage that is on from here. Where `consolidated`
    is not 0, what the stage that was passed needs is held from here (EWC), as estimated from so many experiences.
    """

    at_s: float
    stage: int
    facts: list[CurriculumFact]
    consolidated: int = 0


class StepFailed(msgspec.Struct, frozen=True, kw_only=True):
    """An update was tried and gave no new weights: something was not finite, or it did not fit into memory.

    What followed (`facts`, and with them the next updates' terms) is a function of the state and of this record.
    `moved`: weights or optimisers had moved when it failed, so that where memory was short the last good state came
    back (journals of before there was this say yes). `digest` is that of the parameters with which the training goes
    on.
    """

    step: int
    environment_steps: int
    digest: str
    state_digest: str | None
    reason: str
    out_of_memory: bool
    inputs: StepInputs
    moved: bool = True
    facts: list[StepFact] = []


class HaltLifted(msgspec.Struct, frozen=True, kw_only=True):
    """An operator let a training that had halted itself go on: on TD(0) first, its measures taken back.

    `order` is which takeover of the run by a supervisor it was that asked for it; each lifts one halt, whatever becomes
    of the learner's lives.
    """

    order: int
    facts: list[SafetyFact]


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
    | HardwareNoted
    | PolicyImported
    | ExperienceRefused
    | LearnerStepped
    | CurriculumJudged
    | StepFailed
    | HaltLifted
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
