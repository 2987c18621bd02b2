"""The one loop: observe, decide, persist, apply, then tell.

Everything that can happen comes in through one poll: messages, deaths and starts of children, signals. Each becomes an
input; `decide` says what follows; the events are appended and synced before the state changes and before anybody
hears of them; `plan` says what is owed, and the organs carry it out. No branch here judges: what to do when something
dies, hangs or ends is in `decide`, which is tested without a process.

What the loop itself keeps is volatile: who said what last (`vitals`), memory, and which debts were already carried
out, so that a stop is not asked for ten times a second.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from esper_simic.config import Config
from esper_simic.errors import BudgetExceeded, UnavailableError
from supervisor import faults, files
from supervisor.bus import Poller, Received, Server, ipc_endpoint
from supervisor.child import ChildSpec
from supervisor.clock import Clock
from supervisor.decide import decide, plan
from supervisor.events import (
    AnyEffect,
    AnyInput,
    AskStop,
    ChildGone,
    ChildId,
    ChildSaidReady,
    ChildSpawned,
    CommandReceived,
    CurriculumHeard,
    DumpStacks,
    EvaluationHeard,
    KillChild,
    LearnerReported,
    ProgressHeard,
    RunBegun,
    SendCurriculumRequest,
    SendEvaluationTask,
    SignalReceived,
    StartChild,
    Tick,
)
from supervisor.journal import Journal
from supervisor.memory import resident_bytes
from supervisor.notify import Notifier
from supervisor.outcome import RunOutcome, outcome_of, run_id_of
from supervisor.processes import Placement, Spawned
from supervisor.protocol import (
    ACCEPTS,
    HALTED,
    AskCurriculum,
    Command,
    CommandReply,
    CurriculumSettled,
    Evaluate,
    Evaluated,
    FromChild,
    Message,
    Noted,
    Progress,
    Ready,
    StatusReply,
    StatusRequest,
    Stop,
    Stopped,
)
from supervisor.signals import SignalInbox
from supervisor.state import LIVE, TERMINAL, Phase, RunState, Status, apply, check
from supervisor.vitals import Snapshot, Vitals

TICK_S: Final = 0.1
"""Longest wait of the loop; deadlines are kept to within it."""

OBSERVE_INTERVAL_S: Final = 0.5
MEMORY_INTERVAL_S: Final = 1.0
RESERVE_INTERVAL_S: Final = 5.0
RESERVE_BYTES: Final = 4 * 2**20
"""Kept back on the disk for the supervisor's own last words: its events are small."""

PATIENCE_INTERVAL_S: Final = 5.0
"""How often the service manager is asked for patience; each time for six times as long."""

Observer = Callable[[Snapshot], None]


class RunFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is written down about a run before anything happens.

    `fingerprint` and `versions` say on what its numbers depend, as far as it is known without importing the heavy
    libraries; the learner's journal completes the fingerprint. `evaluation_policies` are measured in this order.
    `is_extended` says that limits of the training were named for this invocation, not left to preset or file,
    `trains_on` that one which halted itself, or met its timeout, is to go on.
    """

    preset: str
    config_text: str
    evaluation_policies: tuple[str, ...]
    fingerprint: dict[str, str] = {}
    versions: dict[str, str] = {}
    is_extended: bool = False
    trains_on: bool = False


class Supervisor:
    """The loop and its organs, for one invocation."""

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        past: RunState,
        *,
        clock: Clock,
        placement: Placement,
        inbox: SignalInbox,
        sockets: Path,
        observer: Observer | None,
    ) -> None:
        self._run_dir, self._config, self._clock = run_dir, config, clock
        self._limits = config.supervisor
        self._placement, self._inbox, self._observer = placement, inbox, observer
        self._began_s = clock.monotonic_s()
        self._run_id = run_id_of(run_dir) or uuid.uuid4().hex[:12]
        self._endpoints = {name: ipc_endpoint(sockets, name) for name in ("control", "experience")}
        self._state = past
        self._vitals = Vitals()
        self._carried_out: set[AnyEffect] = set()
        self._askers: dict[str, str] = {}
        self._memory_bytes: dict[int, int] = {}
        self._due_s: dict[str, float] = {}
        self._position = -1
        self._config_text = ""
        self._organs = contextlib.ExitStack()
        self._notifier = self._organs.enter_context(Notifier(os.environ))
        self._server = self._organs.enter_context(
            Server(
                self._endpoints["control"],
                run_id=self._run_id,
                accepts=ACCEPTS["control"],
                frame_bytes_max=self._limits.frame_bytes_max,
            )
        )
        self._journal = self._organs.enter_context(
            Journal(
                run_dir / "journal" / "supervisor",
                owner="supervisor",
                run_id=self._run_id,
                reserve=files.Reserve(run_dir / "supervisor.reserve", RESERVE_BYTES),
            )
        )
        self._poller = Poller()
        self._poller.add(self._server)
        self._poller.add(inbox.descriptor)
        self._watched: frozenset[int] = frozenset()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        (self._run_dir / "supervisor.json").unlink(missing_ok=True)
        self._organs.close()

    @property
    def now_s(self) -> float:
        """Seconds since this supervisor started."""
        return self._clock.monotonic_s() - self._began_s

    def run(self, facts: RunFacts) -> RunOutcome:
        """Run to the end."""
        self._config_text = facts.config_text
        self._publish_address()
        faults.point("supervisor.resume.before")
        self._take(
            RunBegun(
                run_id=self._run_id,
                preset=facts.preset,
                config_text=facts.config_text,
                config=self._config.model_dump(mode="json"),
                fingerprint=facts.fingerprint,
                versions=facts.versions,
                started_unix_s=self._clock.now_s(),
                evaluation_policies=facts.evaluation_policies,
                is_extended=facts.is_extended,
                trains_on=facts.trains_on,
                controller=self._config.controller,
            )
        )
        faults.point("supervisor.resume.after")
        while self._state.phase not in TERMINAL:
            self._carry_out()
            self._wait()
            # Starts before messages: a child's READY presupposes its start.
            self._hear_of_processes()
            self._hear_signals()
            self._hear_messages()
            expected = [who for who in self._state.children if self._is_expected(who)]
            self._take(Tick(progressed_at_s=self._vitals.progressed_at_s(self.now_s, expected)))
            self._answer_askers()
            self._tell_observers()
        self._notifier.stopping()
        self._observe()
        return outcome_of(self._state)

    def _publish_address(self) -> None:
        """Write down where operators find this supervisor."""
        path = self._run_dir / "supervisor.json"
        address = {"pid": os.getpid(), "run_id": self._run_id, "endpoint": self._endpoints["control"]}
        try:
            files.write_atomically(path, msgspec.json.encode(address))
        except OSError as error:
            raise UnavailableError(f"cannot write {path}: {error}") from error

    def _take(self, observed: AnyInput) -> None:
        """Decide, persist, apply. Nobody hears of an event before it is synced."""
        events = decide(self._state, observed, self.now_s, self._limits)
        for event in events:
            self._position = self._journal.append(type(event).__name__, event)
        if events:
            self._journal.sync()
            faults.point("supervisor.apply.before")
        for event in events:
            before = self._state.phase
            self._state = apply(self._state, event)
            check(self._state)
            self._entered(before)

    def _entered(self, before: Phase) -> None:
        """Tell the service manager about a new phase."""
        phase = self._state.phase
        if phase is before:
            return
        if phase is Phase.TRAINING:
            self._notifier.ready()
        if phase is Phase.STOPPING and (self._state.stop is not None or self._state.failure):
            self._notifier.stopping()

    # What is owed

    def _carry_out(self) -> None:
        owed = plan(self._state, self.now_s, self._limits)
        self._carried_out.intersection_update(owed)
        for effect in owed:
            if effect not in self._carried_out and self._done(effect):
                self._carried_out.add(effect)

    def _done(self, effect: AnyEffect) -> bool:
        """Carry out one effect; whether that succeeded, else it stays owed and is tried again."""
        faults.point("supervisor.effect.before")
        done = self._carried(effect)
        faults.point("supervisor.effect.after")
        return done

    def _carried(self, effect: AnyEffect) -> bool:
        match effect:
            case StartChild():
                self._placement.start(self._spec(effect.child))
                return True
            case DumpStacks():
                self._placement.dump_stacks(effect.child)
                return True
            case KillChild():
                self._placement.kill(effect.child)
                return True
            case AskStop():
                return self._sent(effect.child, Stop(reason=effect.reason))
            case SendEvaluationTask():
                episodes = self._limits.evaluation_episodes
                task = Evaluate(policy=effect.policy, episodes=episodes, checkpoint=self._checkpoint())
                return self._sent(effect.child, task)
            case SendCurriculumRequest():
                return self._sent(effect.child, AskCurriculum(request=effect.request))

    def _spec(self, who: ChildId) -> ChildSpec:
        return ChildSpec(
            who=who,
            run_id=self._run_id,
            run_dir=str(self._run_dir),
            endpoints=self._endpoints,
            config_text=self._config_text,
            checkpoint=self._checkpoint(),
            lift=self._state.lift,
        )

    def _checkpoint(self) -> str:
        """Where the last checkpoint lies; the run's directory may have been moved since it was made."""
        if self._state.checkpoint is None:
            return ""
        return str(self._run_dir / "checkpoints" / Path(self._state.checkpoint.path).name)

    def _sent(self, who: ChildId, message: Message) -> bool:
        return self._send(f"{who.name}-{who.incarnation}", message)

    def _send(self, peer: str, message: Message) -> bool:
        """Send; false when the peer is not there or does not take it, which its end or its clock will settle."""
        try:
            self._server.send(peer, message)
        except (UnavailableError, BudgetExceeded):
            return False
        return True

    # What is observed

    def _is_expected(self, who: ChildId) -> bool:
        """Whether this child is there or on its way."""
        child = self._state.children.get(who)
        return child is not None and (child.status in LIVE or child.status is Status.SCHEDULED)

    def _wait(self) -> None:
        watched = self._placement.descriptors
        for descriptor in watched - self._watched:
            self._poller.add(descriptor)
        for descriptor in self._watched - watched:
            self._poller.remove(descriptor)
        self._watched = watched
        self._poller.wait(TICK_S * 1000)

    def _hear_of_processes(self) -> None:
        for news in self._placement.collect():
            if isinstance(news, Spawned):
                self._take(ChildSpawned(child=news.who, pid=news.pid))
            else:
                self._take(ChildGone(child=news.who, reason=news.reason, detail=news.detail))
                self._vitals.forget(news.who)

    def _hear_signals(self) -> None:
        for number in self._inbox.take():
            self._take(SignalReceived(name=number.name))

    def _hear_messages(self) -> None:
        while (heard := self._server.receive()) is not None:
            if not isinstance(heard, Received):
                continue
            message = heard.message
            if isinstance(message, FromChild):
                self._hear_child(heard.peer, message)
            elif isinstance(message, Command):
                self._answer(heard.peer, message)
            elif isinstance(message, StatusRequest):
                self._send(heard.peer, StatusReply(snapshot=msgspec.to_builtins(self.snapshot())))

    def _hear_child(self, peer: str, message: FromChild) -> None:
        who = ChildId(message.role, message.index, message.incarnation)
        match message:
            case Ready():
                self._hear_ready(who, message)
            case Progress():
                # What an earlier life said last may come after its end.
                if self._is_expected(who):
                    self._vitals.heard(message, self.now_s)
                steps = message.environment_steps
                self._take(
                    ProgressHeard(
                        child=who,
                        learner_step=message.learner_step,
                        environment_steps=steps,
                        is_halted=message.phase == HALTED,
                    )
                )
            case Stopped():
                self._hear_last_words(who, message)
                faults.point("supervisor.noted.before")
                self._send(peer, Noted(of="Stopped"))
            case Evaluated():
                self._take(
                    EvaluationHeard(
                        child=who,
                        policy=message.policy,
                        returns=message.returns,
                        accuracies=message.accuracies,
                        parameters=message.parameters,
                        summary=message.summary,
                    )
                )
                self._send(peer, Noted(of="Evaluated"))
            case CurriculumSettled():
                self._take(CurriculumHeard(child=who, reply=message.reply))
            case _:
                pass

    def _hear_ready(self, who: ChildId, message: Ready) -> None:
        step, steps = message.learner_step, message.environment_steps
        self._take(
            ChildSaidReady(
                child=who,
                pid=message.pid,
                learner_step=step,
                environment_steps=steps,
                data_digest=message.data_digest,
                execution=message.execution,
            )
        )
        if who.role == "learner" and who in self._state.live:
            self._vitals.learner_stands_at(step, steps)

    def _hear_last_words(self, who: ChildId, message: Stopped) -> None:
        checkpoint = message.checkpoint
        if checkpoint is not None:
            self._take(
                LearnerReported(
                    child=who,
                    path=checkpoint.path,
                    learner_step=checkpoint.learner_step,
                    environment_steps=checkpoint.environment_steps,
                    digest=checkpoint.digest,
                )
            )

    def _answer(self, peer: str, command: Command) -> None:
        command_id = command.command_id
        self._take(CommandReceived(command_id=command_id, name=command.name, request=command.request))
        self._askers[peer] = command_id
        self._answer_askers()

    def _answer_askers(self) -> None:
        """Tell those whose commands have their answer; of the others some wait for the learner's."""
        for peer, command_id in list(self._askers.items()):
            if command_id in self._state.asked:
                continue
            del self._askers[peer]
            refusal = self._state.commands.get(command_id, "the run is over")
            self._send(
                peer,
                CommandReply(
                    command_id=command_id,
                    accepted=not refusal,
                    reason=refusal,
                    position=self._position,
                    reply=self._state.replies.get(command_id),
                ),
            )

    # What others see

    def snapshot(self) -> Snapshot:
        """The run at this moment."""
        return self._vitals.snapshot(
            self._state,
            now_s=self.now_s,
            run_dir=str(self._run_dir),
            config=self._limits,
            memory_bytes=self._memory_bytes,
            refused=self._server.refused,
            is_disk_full=self._journal.is_on_reserve,
        )

    def _tell_observers(self) -> None:
        if self._due("memory", MEMORY_INTERVAL_S):
            pids = [child.pid for child in self._state.live.values()]
            self._memory_bytes = {pid: resident_bytes(pid) for pid in pids}
        if self._due("observe", OBSERVE_INTERVAL_S):
            self._observe()
        if self._due("reserve", RESERVE_INTERVAL_S):
            self._journal.hold_reserve()
        watchdog_s = self._notifier.watchdog_interval_s
        if watchdog_s is not None and self._due("watchdog", watchdog_s):
            self._notifier.alive()
        if self._state.phase in (Phase.STARTING, Phase.STOPPING) and self._due(
            "patience", PATIENCE_INTERVAL_S
        ):
            self._notifier.extend_timeout(6 * PATIENCE_INTERVAL_S)

    def _observe(self) -> None:
        snapshot = self.snapshot()
        self._notifier.status(
            f"{snapshot.state}: learner step {snapshot.learner.step}, {snapshot.environment.steps} environment steps"
        )
        if self._observer is not None:
            self._observer(snapshot)

    def _due(self, what: str, interval_s: float) -> bool:
        now_s = self.now_s
        if now_s < self._due_s.get(what, 0.0):
            return False
        self._due_s[what] = now_s + interval_s
        return True
