"""The learner at work: journal first, then the fold; answers, credits and versions once they are durable.

What came from the world goes into the journal and into `Learner` in the same order, so the journal alone gives the
same weights. Three debts wait for the disk and are paid when the journal's durable position has passed what they rest
on: acknowledgements, credits, and the announcement of a version.

Whom it serves is known by greetings alone (`senders`), so a later life of the learner begins with the fold and an empty
list of actors, and they find it by greeting it again.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from functools import partial

import msgspec

from esper_simic.config import Config
from esper_simic.config_behaviour import POLICY
from esper_simic.curriculum_facts import CurriculumReply, CurriculumRequest
from esper_simic.errors import BudgetExceeded, ContractError, UnavailableError
from esper_simic.events import (
    CurriculumJudged,
    ExperienceRefused,
    HardwareNoted,
)
from esper_simic.hardware import HardwareContext
from esper_simic.learner import Learner
from esper_simic.ledger import NOT_LIVING
from esper_simic.rate_facts import Tampered
from esper_simic.safety import StepInputs
from esper_simic.step_report import StepReport
from esper_simic.telemetry import (
    Observers,
    StepHistograms,
    StepObserver,
    TimingObserver,
)
from esper_simic.updates.optimisers import UNWATCHED
from supervisor import faults
from supervisor.bus import Poller, Received, Server
from supervisor.child import ChildSpec
from supervisor.journal import Journal
from supervisor.protocol import (
    BREAKER,
    Acknowledged,
    Credit,
    Hello,
    Message,
    PullWeights,
    Refused,
    Unroll,
    Weights,
    Welcome,
)
from supervisor.roles.admission import admitted, check, decode_unroll, shape_of_run
from supervisor.roles.attempts import Attempts, Work
from supervisor.roles.rounds import Arrived, Rounds
from supervisor.roles.senders import REPEATED, Answer, Greeting, Senders
from supervisor.roles.step_record import FaultPoints, step_fact
from supervisor.roles.surroundings import Surroundings


class LearnerLoop:
    """The learner's shell: journal, socket, and the debts between them.

    Args:
        spec: Who this is.
        config: The run's configuration.
        learner: The state, as the journal's fold gave it.
        journal: Its journal.
        server: Where actors come.
        attempts: Where it notes what it is about to do.
        surroundings: What is read of the outside for each update.
        observer: Told how each update goes on.
    """

    def __init__(
        self,
        spec: ChildSpec,
        config: Config,
        learner: Learner,
        journal: Journal,
        server: Server,
        attempts: Attempts,
        surroundings: Surroundings,
        observer: StepObserver = UNWATCHED,
    ) -> None:
        self._surroundings = surroundings
        surroundings.go_on_from(learner.safety.clock.reading_s, learner.curriculum.breaker.clock.reading_s)
        self._spec, self._config, self._learner = spec, config, learner
        self._journal, self._server, self._attempts = journal, server, attempts
        self._owed: deque[tuple[int, Callable[[], None]]] = deque()
        self._published: tuple[int, bytes] = (learner.steps_done, learner.weights())
        self._stage = learner.stage
        limits = config.supervisor
        self._credits_each = 1 if limits.lockstep else limits.unrolls_in_flight
        self._senders = Senders(limits.num_actors, self._credits_each)
        self._rounds = Rounds(limits.num_actors, learner.ledger.unrolls) if limits.lockstep else None
        if self._rounds is None:
            self._senders.restore((unroll.position, unroll.actor) for unroll in learner.ledger.unconsumed())
        else:
            # Their credits come back with the end of the round; any ticket will do that no position can be.
            self._senders.restore((-1 - actor, actor) for actor in self._rounds.admitted())
        self._refused: Counter[str] = Counter()
        self._facts: Counter[str] = Counter()
        self.metrics: dict[str, float] = {}
        self.histograms = StepHistograms()
        self._tampered = 0
        self._hardware: dict[int, str] = {}
        self._asked: deque[tuple[CurriculumRequest, Callable[[CurriculumReply], None]]] = deque()
        self._timing = TimingObserver(surroundings.monotonic_s)
        self._observer: StepObserver = Observers(self._timing, observer, FaultPoints())

    @property
    def learner(self) -> Learner:
        """The state this loop folds."""
        return self._learner

    # -- what comes in ---------------------------------------------------------------------------------------------

    def take_messages(self) -> None:
        """Handle every message that is there."""
        while (received := self._server.receive()) is not None:
            if not isinstance(received, Received):
                continue
            match received.message:
                case Hello():
                    self._greet(received.peer, received.message)
                case PullWeights(have_version=have):
                    version, weights = self._published
                    frames = [weights] if version > have else []
                    self._send(received.peer, Weights(version=version, stage=self._stage), frames)
                case Unroll():
                    self._take_unroll(received.peer, received.message, received.frames)
                case _:
                    pass

    def _greet(self, peer: str, hello: Hello) -> None:
        """A new life gets the credits that its predecessor does not still hold, once all that it is told is durable."""
        actor = hello.actor
        settled = self._learner.ledger.settled(actor, hello.incarnation)
        greeting = self._senders.greet(
            peer, actor, hello.incarnation, settled=settled, unacknowledged=hello.unacknowledged
        )
        if greeting is Greeting.REFUSED:
            self._count("greeting")
            return
        if hello.hardware is not None:
            self._note(actor, hello.hardware)
        if greeting is Greeting.BEGUN and self._rounds is not None:
            self._rounds.forget(actor)
        welcome = Welcome(
            learner=self._spec.who.incarnation,
            answers=hello.number,
            first_episodes=self._first_episodes(actor),
            settled=settled,
            unrolls=self._learner.ledger.unrolls(actor),
        )

        def tell() -> None:
            self._send(peer, welcome)
            self._senders.welcomed(actor, hello.incarnation)

        self._owe(self._journal.next_position - 1, tell)
        if greeting is Greeting.BEGUN:
            self._owe_credit(self._journal.next_position - 1, actor, self._credits_each)

    def _note(self, actor: int, hardware: HardwareContext) -> None:
        """Journal on what an actor acts, where no actor did before; its unrolls name it."""
        self._hardware[actor] = hardware.id
        if hardware.id not in self._learner.ledger.hardware:
            self._append(HardwareNoted(id=hardware.id, hardware=hardware))
            self._learner.ledger.hardware.add(hardware.id)

    def _first_episodes(self, actor: int) -> list[int]:
        if self._rounds is None:
            return self._learner.ledger.next_episodes(actor)
        return [0] * self._config.environment.environments_per_actor

    def _take_unroll(self, peer: str, message: Unroll, frames: tuple[bytes, ...]) -> None:
        if not self._is_in_order(peer, message):
            return
        lockstep = self._rounds is not None
        try:
            self._check(message)
            if not lockstep and self._is_too_old(message.policy_version):
                self._refuse(peer, message, "too_old")
                return
            trajectory = decode_unroll(frames, message, self._learner.policy, lockstep=lockstep)
        except ContractError as error:
            self._refuse(peer, message, "malformed", str(error))
            return
        if self._rounds is None:
            self._admit(Arrived(peer, message, frames, trajectory))
            return
        self._rounds.offer(Arrived(peer, message, frames, trajectory))
        while (unroll := self._rounds.take()) is not None:
            self._admit(unroll)

    def _is_in_order(self, peer: str, message: Unroll) -> bool:
        """Whether its sender may send it now; if not, that is counted and answered here."""
        actor, sequence = message.actor, message.sequence
        if self._senders.is_unknown(actor, message.incarnation):
            self._count("before_greeting")
            return False
        if not self._senders.is_living(peer, actor, message.incarnation):
            self._refuse(peer, message, NOT_LIVING, is_credit_back=False)
            return False
        answer = self._senders.answered(actor, sequence)
        if answer is not None:
            self._count(REPEATED)
            self._owe_answer(peer, sequence, answer)
            return False
        if not self._senders.has_room(actor):
            self._refuse(peer, message, "no_credit", is_credit_back=False)
            return False
        return True

    def _check(self, message: Unroll) -> None:
        check(message, self._config, self._published[0])
        due = self._learner.ledger.unrolls(message.actor) + 1
        if self._rounds is not None and message.sequence != due:
            raise ContractError(f"round {due} of actor {message.actor} is due, this is {message.sequence}")

    def _admit(self, unroll: Arrived) -> None:
        faults.point("learner.admit.before")
        message = unroll.message
        event = admitted(message, self._hardware.get(message.actor, ""))
        position = self._append(event, unroll.frames)
        self._senders.admitted(message.actor, message.sequence, position)
        self._surroundings.happened(experiences=message.lanes)
        self._owe_answer(unroll.peer, message.sequence, Answer(position, ""))
        self._attempts.begin(Work.RECORD, position)
        consumed = self._learner.admit(position, event, unroll.trajectory)
        self._attempts.end()
        if self._rounds is None:
            self._return_credits(position, consumed)
            self._look_at_curriculum()
        faults.point("learner.admit.after")

    def ask(self, request: CurriculumRequest, answer: Callable[[CurriculumReply], None]) -> None:
        """Take a request about the curriculum; the answer is given once it is durable."""
        self._asked.append((request, answer))

    def answer_requests(self) -> None:
        """Answer what was asked, in lockstep between two rounds only: all unrolls of a round are made in one stage."""
        while self._asked and (self._rounds is None or not self._rounds.is_open):
            request, answer = self._asked.popleft()
            reply, judged = self._learner.stages.asked(request, self._now_s())
            if judged is not None:
                self._judge(judged)
            self._owe(self._journal.next_position - 1, partial(answer, reply))

    def _look_at_curriculum(self) -> None:
        verdict = self._learner.verdict(self._now_s())
        if verdict is not None:
            self._judge(verdict)

    def _judge(self, verdict: CurriculumJudged) -> None:
        """Journal what came of a look or a request, and send actors to another stage once that is durable."""
        faults.point("learner.judge.before")
        position = self._append(verdict)
        self._attempts.begin(Work.RECORD, position)
        self._learner.judge(verdict)
        self._attempts.end()
        self._facts.update(type(fact).__name__ for fact in verdict.facts)

        def announce() -> None:
            faults.point("learner.stage.before")
            self._stage = verdict.stage

        self._owe(position, announce)
        faults.point("learner.judge.after")

    def _is_too_old(self, policy_version: int) -> bool:
        """What another behaviour did is of no version, so of no age."""
        if self._config.environment.behaviour != POLICY:
            return False
        return self._learner.lag(policy_version) >= self._config.simic_trainer.max_policy_lag

    def _refuse(
        self, peer: str, message: Unroll, reason: str, detail: str = "", *, is_credit_back: bool = True
    ) -> None:
        """Refuse an unroll; one of another shape is not believed to be any steps at all."""
        shape = shape_of_run(self._config)
        event = ExperienceRefused(
            actor=message.actor,
            incarnation=message.incarnation,
            sequence=message.sequence,
            policy_version=message.policy_version,
            steps=math.prod(shape) if (message.steps, message.lanes) == shape else 0,
            reason=f"{reason}: {detail}" if detail else reason,
        )
        self._count(reason)
        # One that is merely old was neither malformed nor lost: nothing went wrong.
        self._surroundings.happened(failed=reason == "malformed")
        position = self._append(event)
        self._learner.refuse(event)
        self._owe_answer(peer, message.sequence, Answer(position, reason))
        actor = message.actor
        if self._senders.is_living(peer, actor, message.incarnation):
            self._senders.refused(actor, message.sequence, position, reason, is_credit_back=is_credit_back)
        if is_credit_back:
            self._owe_credit(position, actor, 1)

    # -- steps -----------------------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether the last update of the run was made."""
        limit = self._config.supervisor.max_updates
        return limit is not None and self._learner.steps_done >= limit

    @property
    def may_step(self) -> bool:
        """Whether an update is to be made now."""
        is_between_rounds = self._rounds is None or not self._rounds.is_open
        if not is_between_rounds or self.is_over:
            return False
        mode = self._learner.mode(self._now_s())
        return mode.may_step and self._learner.can_step(
            mode.batch_size(self._config.simic_trainer.batch_size)
        )

    @property
    def waiting_for(self) -> str:
        """What the next update lacks: time, where a breaker is open; else experience."""
        mode = self._learner.mode(self._now_s())
        return "experience" if mode.may_step or mode.is_halted else BREAKER

    def idle(self, poller: Poller, wait_ms: float) -> None:
        """Wait for something to happen."""
        self._surroundings.wait(poller, wait_ms)

    def lift_halt(self, order: int) -> None:
        """Let a training that has halted itself go on, if this order of an operator was not obeyed before."""
        lifted = self._learner.lifted(order)
        if lifted is not None:
            self._append(lifted)
            self._learner.lift(lifted)
            self._facts.update(type(fact).__name__ for fact in lifted.facts)

    def begin(self) -> None:
        """In lockstep: finish the round that the journal ends with, as far as it is complete."""
        while self._rounds is not None and self.may_step:
            self.step()
        self.open_round()

    def step(self) -> None:
        """Make one update, journal it, and announce its weights once that is durable."""
        faults.point("learner.step.before")
        self._attempts.begin(Work.STEP, self._learner.steps_done + 1)
        inputs = self._inputs()
        report = self._learner.step(inputs, self._observer)
        self._surroundings.after_step()
        self._attempts.end()
        faults.point("learner.step.after")
        if report.facts:
            faults.point("learner.facts.before")
        position = self._append(step_fact(report, inputs))
        if report.facts:
            faults.point("learner.facts.after")
        # Found by an update's own check and not before it: that counts with the next one.
        found = sum(isinstance(fact, Tampered) for fact in report.facts)
        self._tampered = max(0, found - inputs.rates_tampered)
        if not report.failure:
            # How long things took is no part of the record: it comes out otherwise each time.
            self.metrics = (
                report.metrics
                | self._timing.milliseconds()
                | self._learner.safety_figures()
                | {
                    "memory_fraction": inputs.memory_fraction,
                    "buffer_bytes": float(self._learner.buffer.bytes),
                }
            )
            self.histograms = self.histograms.followed(self.metrics)
        self._facts.update(type(fact).__name__ for fact in report.facts)
        if report.failure:
            self._facts["StepFailed"] += 1
        self._announce_when_durable(position, report)
        if self._rounds is None:
            self._return_credits(position, report.unrolls_consumed)

    def _now_s(self) -> float:
        """The time by which the safety of the training is measured; in lockstep its own, which is no clock's."""
        return self._surroundings.now_s() if self._rounds is None else self._learner.lockstep_time_s()

    def _inputs(self) -> StepInputs:
        """In lockstep nothing from outside has a part in an update: the run is a function of its seed.

        But for rates that somebody has written: no run has such a thing by itself.
        """
        inputs = self._surroundings.before_step()
        if self._rounds is not None:
            inputs = StepInputs(at_s=self._learner.lockstep_time_s(), experiences_since=None)
        tampered = self._learner.learning_rates.tampered() + self._tampered
        # The buffer's size follows from the configuration alone, so it has its part in lockstep, too.
        held_bytes = float(self._learner.buffer.bytes)
        return msgspec.structs.replace(inputs, rates_tampered=tampered, buffer_bytes=held_bytes)

    def open_round(self) -> None:
        """In lockstep, when a round is complete and no update can be made: one credit for each actor."""
        if self._rounds is None or self._rounds.is_open or self.may_step or self.is_over:
            return
        if self._learner.is_halted:
            return  # what the next round brought would never be consumed
        # In lockstep between two rounds only, so that all unrolls of a round are made in one stage.
        self._look_at_curriculum()
        self._rounds.open()
        for actor in range(self._config.supervisor.num_actors):
            self._senders.release(actor)
            self._owe_credit(self._journal.next_position - 1, actor, 1)

    def _announce_when_durable(self, position: int, report: StepReport) -> None:
        weights = self._learner.weights()

        def announce() -> None:
            faults.point("learner.announce.before")
            self._published = (report.step, weights)
            faults.point("learner.announce.after")

        self._owe(position, announce)

    # -- debts -----------------------------------------------------------------------------------------------------

    def pay(self) -> int:
        """Pay every debt whose ground is durable; the durable position."""
        durable = self._journal.poll_durable()
        while self._owed and self._owed[0][0] < durable:
            self._owed.popleft()[1]()
        return durable

    def _owe(self, position: int, debt: Callable[[], None]) -> None:
        self._owed.append((position, debt))

    def _return_credits(self, position: int, consumed: tuple[int, ...]) -> None:
        for unroll in consumed:
            actor = self._senders.consumed(unroll)
            self._owe_credit(position, actor, 1)

    def _owe_credit(self, position: int, actor: int, count: int) -> None:
        self._owe(position, lambda: self._give_credit(actor, count))

    def _give_credit(self, actor: int, count: int) -> None:
        """Give credits to the actor's present life, never more than it may have in all; in lockstep only in a round."""
        if self._rounds is not None and not self._rounds.is_open:
            return
        granted = self._senders.grant(actor, count)
        if granted > 0:
            faults.point("learner.credit.before")
            self._send(self._senders.peer_of(actor), Credit(count=granted, policy_version=self._published[0]))
            faults.point("learner.credit.after")

    def _owe_answer(self, peer: str, sequence: int, answer: Answer) -> None:
        """Say what became of an unroll once that is durable; a repeated one is told the first answer."""
        said = (
            Refused(sequence=sequence, reason=answer.refusal)
            if answer.refusal
            else Acknowledged(sequence=sequence, position=answer.position)
        )

        def tell() -> None:
            faults.point("learner.acknowledge.before")
            self._send(peer, said)
            faults.point("learner.acknowledge.after")

        self._owe(answer.position, tell)

    def _send(self, peer: str, message: Message, frames: list[bytes] | None = None) -> None:
        # A dead actor takes nothing more; its next incarnation says Hello.
        try:
            self._server.send(peer, message, frames or [])
        except (UnavailableError, BudgetExceeded):
            self._count("undeliverable")

    def _count(self, cause: str) -> None:
        self._refused[cause] += 1

    def _append(self, event: msgspec.Struct, frames: tuple[bytes, ...] = ()) -> int:
        return self._journal.append(type(event).__name__, event, frames)

    def counters(self) -> dict[str, float]:
        """Refusals by cause, of unrolls and of frames, and what happened beside updates, by kind."""
        counts = {f"refused.{cause}": float(count) for cause, count in self._refused.items()}
        counts |= {f"facts.{kind}": float(count) for kind, count in self._facts.items()}
        counts |= {f"refused.frame.{cause}": float(count) for cause, count in self._server.refused.items()}
        return counts
