"""What a replay found, as values; `wording` says it to people."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from supervisor.playback.compare import MetricDifference, TensorDifference, ValueDifference

SCHEMA: Final = 1

Outcome = Literal["equal", "within_tolerance", "drifted", "divergent", "incomplete", "damaged"]
"""All digests were equal; some steps were compared within the tolerance, and are; some are beyond it, where equal bits
are promised by nobody; the first step that is not equal was found; something could not be replayed; the journal is not
what was written."""


class EventLine(msgspec.Struct, frozen=True):
    """One record, for people."""

    position: int
    time_ns: int
    kind: str
    summary: str


class LargestDifference(msgspec.Struct, frozen=True):
    """The metric that differs most, relatively, of those that do not differ by next to nothing."""

    step: int
    metric: MetricDifference


class CheckpointComparison(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint on disk beside the state that was computed at its position."""

    name: str
    position: int
    step: int
    is_equal: bool
    """Whether every bit is; within the tolerance under another fingerprint."""
    tensors: int = 0
    tensor_differences: list[TensorDifference] = []
    value_differences: list[ValueDifference] = []
    error: str = ""
    """Why it cannot be compared."""


class Crossing(msgspec.Struct, frozen=True, kw_only=True):
    """A gap in what can be replayed: an inexact recovery, crossed through a checkpoint."""

    position: int
    step: int
    """The last step before."""
    reason: str
    checkpoint: str
    """Where the replay went on; empty where no checkpoint after the gap is on disk."""
    resumed_at: int | None
    resumed_step: int | None


class Divergence(msgspec.Struct, frozen=True, kw_only=True):
    """The first place where what was computed is not what was recorded."""

    position: int
    time_ns: int
    kind: str
    step: int
    what: Literal["parameters", "state", "metrics", "error"]
    recorded: str
    computed: str
    equal_position: int | None
    """Position of the last equal comparison; None where there was none."""
    since_equal: list[EventLine]
    events_left_out: int
    metrics: list[MetricDifference]
    fingerprint_recorded: dict[str, str]
    fingerprint_here: dict[str, str]
    checkpoint: CheckpointComparison | None = None
    note: str = ""
    """Why there is no comparison with a checkpoint."""


class Stopped(msgspec.Struct, frozen=True, kw_only=True):
    """Where `--until` or `--break` ended it."""

    position: int | None
    step: int
    is_before: bool
    """Whether this step is still to be made."""
    digest: str
    metrics: dict[str, float]
    failure: str = ""
    """Why it gave no new weights."""


class Damage(msgspec.Struct, frozen=True):
    """Where the journal is not what was written."""

    segment: str
    offset: int
    reason: str


class Audited(msgspec.Struct, frozen=True, kw_only=True):
    """What reading every byte of the journal showed."""

    records: int
    bytes: int
    segments: int
    torn_tail_bytes: int


class ReplayReport(msgspec.Struct, kw_only=True):
    """One replay."""

    schema: int = SCHEMA
    run_id: str
    journal: str
    origin: str
    """`start`, or the checkpoint it began from."""
    outcome: Outcome = "equal"
    first_position: int = 0
    next_position: int = 0
    first_step: int = 0
    """The step after which it began."""
    last_step: int = 0
    steps: int = 0
    """Replayed."""
    steps_failed: int = 0
    """Of them, those that gave no new weights, as recorded."""
    steps_by_digest: int = 0
    """Compared bit for bit, and equal."""
    steps_by_tolerance: int = 0
    """Compared within the tolerance, and near."""
    steps_beyond: int = 0
    """Beyond the tolerance, of a run whose way of computing promises no equal bits."""
    largest: LargestDifference | None = None
    """Among the steps with other digests."""
    inexact_way: str = ""
    """How it was recorded, where that way promises no equal bits; else empty."""
    states_equal: int = 0
    """Digests of the whole state that were equal."""
    seconds: float = 0.0
    run_seconds: float = 0.0
    """How long the run took for the same, without the time in which it stood still."""
    fingerprint_differences: dict[str, list[str]] = {}
    """Keys in which the first fingerprint met differs from the one here: `[recorded, here]`."""
    crossings: list[Crossing] = []
    checkpoints: list[CheckpointComparison] = []
    divergence: Divergence | None = None
    damage: list[Damage] = []
    audited: Audited | None = None
    stopped: Stopped | None = None
    notes: list[str] = []

    @property
    def is_good(self) -> bool:
        """Whether everything that was asked for was replayed and is what was recorded."""
        return self.outcome in ("equal", "within_tolerance")

    @property
    def times_as_fast(self) -> float | None:
        """The run's time over the replay's; None where one of them is not known."""
        return self.run_seconds / self.seconds if self.seconds > 0 and self.run_seconds > 0 else None

    def to_builtins(self) -> dict[str, Any]:
        """For machines: JSON types, with what is derived."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain | {"is_good": self.is_good, "times_as_fast": self.times_as_fast}
