"""What a page needs of a run's past, folded record by record in bounded memory.

`SupervisorPast` and `LearnerPast` each take the records of one journal. A record that this version cannot read is
counted and passed over: a page with a gap is better than none.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from esper_simic import events as learned
from esper_simic.config_behaviour import POLICY
from esper_simic.curves import Curve, Thinned
from esper_simic.errors import ContractError
from supervisor.events import (
    AnyEvent,
    CheckpointReported,
    ChildAbandoned,
    ChildExited,
    ChildGivenUp,
    ChildScheduled,
    CommandRefused,
    EvaluationFinished,
    EvaluationStarted,
    ExitReason,
    PolicyEvaluated,
    RunConfigured,
    RunFailed,
    RunFinished,
    RunResumed,
    RunStarted,
    StopRequested,
    TrainingEnded,
    TrainingStarted,
    from_journal,
)
from supervisor.journal import Record
from supervisor.report.safety_words import AnyFact, fact_words
from supervisor.state import RunState, apply

MARKS_MAX: Final = 300
"""Marks of one lane that are drawn; of more, every k-th."""

REMEMBERED_MAX: Final = 200
"""Newest marks that are told in words."""

PHASES_MAX: Final = 2000
METRICS_MAX: Final = 96
EPISODES_MAX: Final = 1500
UNROLLS_MAX: Final = 4096
"""Newest unrolls of one actor whose places are remembered, whatever the configuration says."""

LANES: Final = ("run", "processes", "learner", "checkpoints", "evaluation")


class Mark(NamedTuple):
    """Something that happened at one moment, seconds since 1970-01-01 UTC."""

    at_s: float
    lane: str
    text: str
    is_trouble: bool


class Marks:
    """Marks of all lanes: thinned for the picture, the newest of them in words."""

    def __init__(self) -> None:
        self.lanes: dict[str, Thinned[Mark]] = {lane: Thinned(MARKS_MAX) for lane in LANES}
        self.newest: deque[Mark] = deque(maxlen=REMEMBERED_MAX)
        self.count = 0
        self.troubles = 0

    def add(self, at_s: float, lane: str, text: str, *, is_trouble: bool = False) -> None:
        """Note one."""
        mark = Mark(at_s, lane, text, is_trouble)
        self.lanes[lane].add(mark)
        self.newest.append(mark)
        self.count += 1
        self.troubles += is_trouble


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of time, seconds since 1970-01-01 UTC, and what the run did in it."""

    start_s: float
    stop_s: float
    phase: str


class SupervisorPast:
    """The process tree's story, and what the run is."""

    def __init__(self) -> None:
        self.state = RunState()
        self.configured: RunConfigured | None = None
        """The newest configuration."""
        self.marks = Marks()
        self.turns: deque[tuple[float, str]] = deque(maxlen=PHASES_MAX)
        """When each phase began."""
        self.resumed_s: deque[float] = deque(maxlen=PHASES_MAX)
        self.first_s = math.nan
        self.last_s = math.nan
        self.unread = 0

    def take(self, record: Record) -> None:
        """Move by one record."""
        at_s = record.time_ns / 1e9
        self.first_s = at_s if math.isnan(self.first_s) else self.first_s
        self.last_s = at_s
        try:
            event = from_journal(record.kind, record.header)
        except ContractError:
            self.unread += 1
            return
        before = self.state.phase
        self.state = apply(self.state, event)
        if isinstance(event, RunConfigured):
            self.configured = event
        if isinstance(event, RunResumed):
            self.resumed_s.append(at_s)
        if self.state.phase != before or isinstance(event, RunResumed):
            self.turns.append((at_s, self.state.phase))
        told = words(event)
        if told is not None:
            lane, text, is_trouble = told
            self.marks.add(at_s, lane, text, is_trouble=is_trouble)


def words(event: AnyEvent) -> tuple[str, str, bool] | None:  # noqa: C901, PLR0911, PLR0912 (a table)
    """Lane, words, and whether it is trouble; None for what goes without saying."""
    match event:
        case RunStarted():
            return "run", "the run began", False
        case RunResumed():
            return "run", f"a later supervisor went on with the run ({event.goes_on})", False
        case TrainingStarted():
            return "run", "training began", False
        case TrainingEnded():
            return "run", f"training ended: {event.reason}", False
        case StopRequested():
            return "run", f"asked to stop by {event.source}{', at once' if event.urgent else ''}", False
        case CommandRefused():
            return "run", f"a command was refused: {event.reason}", False
        case RunFailed():
            return "run", f"the run failed: {event.reason}", True
        case RunFinished():
            return "run", f"the run is over: {event.outcome}, {event.reason}", event.outcome == "failed"
        case ChildScheduled() if event.attempt > 0:
            delay_s = event.start_at_s - event.at_s
            text = f"{event.child.name} is started again (life {event.incarnation}) after {delay_s:.1f} s"
            return "processes", text, False
        case ChildExited() if event.reason is not ExitReason.CLEAN:
            detail = event.detail.partition("\n")[0]
            text = f"{event.child.name} (life {event.incarnation}) was gone: {event.reason}"
            return "processes", f"{text}, {detail}" if detail else text, True
        case ChildAbandoned():
            return "processes", f"{event.child.name} did not end and was left behind", True
        case ChildGivenUp():
            return "processes", f"{event.child.name} was given up: {event.reason}", True
        case CheckpointReported():
            return "checkpoints", f"last checkpoint, update {event.learner_step}: {event.path}", False
        case EvaluationStarted():
            return "evaluation", "evaluation began", False
        case PolicyEvaluated():
            return "evaluation", f"{event.policy} was measured", False
        case EvaluationFinished():
            return "evaluation", "every policy was measured", False
        case _:
            return None


class Finished(NamedTuple):
    """A whole training episode, as it is drawn."""

    environment_steps: int
    accuracy: float
    parameters: int


@dataclass(frozen=True, slots=True)
class UnrollAt:
    """Where an unroll stands in the journal, and what ended in it."""

    position: int
    incarnation: int
    sequence: int
    length: int
    lanes: int
    episodes: tuple[learned.EpisodeFinished, ...] = field(repr=False)


class LearnerPast:
    """What was learned from, what came of it, and what befell the learner.

    Args:
        resumed_s: When later supervisors took over, in order.
    """

    def __init__(self, resumed_s: Sequence[float] = ()) -> None:
        self.config: dict[str, Any] = {}
        self.run_id = ""
        self.fingerprint: dict[str, str] = {}
        self.kinds: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.curves: dict[str, Curve] = {}
        self.metrics_left_out = 0
        """Values of metrics beyond `METRICS_MAX`."""
        self.working = Curve()
        """Environment steps over the seconds in which a learner lived."""
        self.fossils = Curve()
        """Fossilised seeds of whole episodes over environment steps."""
        self.episodes: Thinned[Finished] = Thinned(EPISODES_MAX)
        self.whole_episodes = 0
        """Of any world; `episodes` are those of hosts."""
        self.cut_short = 0
        self.unrolls: dict[int, deque[UnrollAt]] = {}
        self.marks = Marks()
        self.recovered_at: Thinned[int] = Thinned(50)
        """Environment steps at which a learner came back."""
        self.pauses: deque[Stretch] = deque(maxlen=MARKS_MAX)
        self.step = 0
        self.environment_steps = 0
        self.first_s = math.nan
        self.last_s = math.nan
        self.unread = 0
        self._resumed_s = deque(resumed_s)
        self.last_before_resume_s: list[float] = []
        """For each resume, when the learner before it was heard last; NaN if never."""
        self._worked_s = 0.0
        self._stepped_s = math.nan
        self._paused_s = math.nan

    def take(self, record: Record) -> None:
        """Move by one record."""
        at_s = record.time_ns / 1e9
        while self._resumed_s and self._resumed_s[0] <= at_s:
            self._resumed_s.popleft()
            self.last_before_resume_s.append(self.last_s)
        self.first_s = at_s if math.isnan(self.first_s) else self.first_s
        self.last_s = at_s
        self.kinds[record.kind] += 1
        kind = learned.LEARNER_EVENTS.get(record.kind)
        if kind is None:
            self.unread += 1
            return
        try:
            event = record.header_as(kind)
        except ContractError:
            self.unread += 1
            return
        self._fold(event, record.position, at_s)

    def close(self) -> None:
        """The journal is read to its end."""
        for _ in self._resumed_s:
            self.last_before_resume_s.append(self.last_s)
        self._resumed_s.clear()
        if not math.isnan(self._paused_s):
            self.pauses.append(Stretch(self._paused_s, self.last_s, "admission paused"))
            self._paused_s = math.nan

    def _fold(self, event: learned.LearnerEvent, position: int, at_s: float) -> None:
        match event:
            case learned.RunStarted():
                self.config, self.run_id, self.fingerprint = event.config, event.run_id, event.fingerprint
                self._stepped_s = at_s
            case learned.ExperienceAdmitted():
                self._admit(event, position)
            case learned.ExperienceRefused():
                self.environment_steps += event.steps
                self.refused[event.reason] += 1
            case learned.LearnerStepped():
                self._step(event, at_s)
                self._tell_facts(event.facts, at_s)
            case learned.CurriculumJudged():
                self._tell_facts(event.facts, at_s)
            case learned.StepFailed():
                self._tell(event, at_s)
                self._tell_facts(event.facts, at_s)
            case learned.LearnerRecovered():
                # What passed since the last update is nobody's work.
                self._stepped_s = at_s
                self.recovered_at.add(event.environment_steps)
                self._tell(event, at_s)
            case learned.AdmissionPaused():
                self._paused_s = at_s
                self._tell(event, at_s)
            case learned.AdmissionResumed():
                if not math.isnan(self._paused_s):
                    self.pauses.append(Stretch(self._paused_s, at_s, "admission paused"))
                    self._paused_s = math.nan
                self._tell(event, at_s)
            case _:
                self._tell(event, at_s)

    def _admit(self, event: learned.ExperienceAdmitted, position: int) -> None:
        self.environment_steps += event.length * event.lanes
        if event.behaviour != POLICY:
            return  # episodes of another, or pieces of many: no growth that this training brought
        for episode in event.episodes:
            if not episode.is_whole:
                self.cut_short += 1
                continue
            self.whole_episodes += 1
            if episode.accuracy is None or episode.parameters_added is None:
                continue  # of no host
            self.episodes.add(Finished(self.environment_steps, episode.accuracy, episode.parameters_added))
            self.fossils.add(self.environment_steps, episode.fossils or 0)
        if event.actor not in self.unrolls:
            self.unrolls[event.actor] = deque(maxlen=self._unrolls_wanted())
        self.unrolls[event.actor].append(
            UnrollAt(
                position,
                event.incarnation,
                event.sequence,
                event.length,
                event.lanes,
                tuple(event.episodes),
            )
        )

    def _unrolls_wanted(self) -> int:
        """Enough for the newest whole episode, wherever in an unroll it began and ended, and one before it."""
        epochs = self.config.get("environment", {}).get("max_epochs", 60)
        length = self.config.get("simic_trainer", {}).get("unroll_length", 10)
        if not (isinstance(epochs, int) and isinstance(length, int)) or length < 1:
            return UNROLLS_MAX
        return min(UNROLLS_MAX, 2 * (math.ceil(epochs / length) + 1))

    def _step(self, event: learned.LearnerStepped, at_s: float) -> None:
        self.step = event.step
        if not math.isnan(self._stepped_s):
            self._worked_s += max(0.0, at_s - self._stepped_s)
        self._stepped_s = at_s
        self.working.add(self._worked_s, event.environment_steps)
        for name, value in event.metrics.items():
            if name not in self.curves:
                if len(self.curves) >= METRICS_MAX:
                    self.metrics_left_out += 1
                    continue
                self.curves[name] = Curve()
            self.curves[name].add(event.environment_steps, value)

    def _tell(self, event: learned.LearnerEvent, at_s: float) -> None:
        told = learner_words(event)
        if told is not None:
            lane, text, is_trouble = told
            self.marks.add(at_s, lane, text, is_trouble=is_trouble)

    def _tell_facts(self, facts: Sequence[AnyFact], at_s: float) -> None:
        for fact in facts:
            told = fact_words(fact)
            if told is not None:
                text, is_trouble = told
                self.marks.add(at_s, "learner", text, is_trouble=is_trouble)


def learner_words(event: learned.LearnerEvent) -> tuple[str, str, bool] | None:  # noqa: PLR0911 (a table)
    """Lane, words, and whether it is trouble; None for what goes without saying."""
    match event:
        case learned.PolicyImported():
            adapters = f" and the adapters of {event.adapters_source}" if event.adapters_source else ""
            return "learner", f"the policy began with the weights of {event.source}{adapters}", False
        case learned.CheckpointSaved():
            return "checkpoints", f"checkpoint {event.directory}, update {event.step}", False
        case learned.LearnerRecovered():
            source = event.checkpoint or "the start of the journal"
            text = (
                f"the learner came back (life {event.incarnation}) at update {event.step} from {source}, "
                f"{event.steps_redone} updates made again in {event.seconds:.1f} s"
            )
            return "learner", text if event.is_exact else f"{text}; not exactly", not event.is_exact
        case learned.RecordQuarantined():
            return "learner", f"record {event.position} was quarantined: {event.reason}", True
        case learned.StepFailed():
            return "learner", f"update {event.step} failed: {event.reason}", True
        case learned.HaltLifted():
            return "learner", "an operator let the training go on", False
        case learned.StepSkipped():
            return "learner", f"update {event.step} was given up: {event.reason}", True
        case learned.FingerprintChanged():
            return "learner", "the surroundings changed: digests begin anew", False
        case learned.AdmissionPaused():
            return "learner", f"no experience was taken in any more: {event.reason}", True
        case learned.AdmissionResumed():
            return "learner", "experience was taken in again", False
        case _:
            return None
