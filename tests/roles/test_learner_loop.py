"""The learner's shell: persist, then tell; credits that never exceed their number; refusals that stop nobody."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import zmq

from esper_simic.events import ExperienceAdmitted, ExperienceRefused, LearnerStepped
from supervisor.bus import Client, Received
from supervisor.protocol import ACCEPTS, Acknowledged, Credit, Hello, PullWeights, Refused, Weights, Welcome
from supervisor.roles import senders
from supervisor.roles.fold import LearnerFold
from tests.roles.bench import LANES, Actor, Bench, T, bench, credits_in, episode

IN_FLIGHT = 2


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Bench]:
    """A loop whose journal becomes durable only when a test says so."""
    with bench(tmp_path) as made:
        yield made


def fill(held: Bench, actor: Actor, unrolls: int = 2) -> None:
    """Admit unrolls and have them acknowledged; the first two are the buffer's minimum and are consumed at once."""
    for _ in range(unrolls):
        held.send(actor, held.loop.learner.steps_done)
    held.make_durable()
    actor.heard.clear()


# -- persist, then tell ------------------------------------------------------------------------------------------------


def test_a_greeting_is_answered_with_where_to_begin_and_with_credits(held: Bench) -> None:
    actor = held.actor()
    assert actor.heard == [
        Welcome(learner=1, answers=1, first_episodes=[0] * LANES, settled=0, unrolls=0),
        Credit(count=IN_FLIGHT, policy_version=0),
    ]


def test_a_greeting_is_answered_once_all_that_it_tells_is_durable(held: Bench) -> None:
    old = held.actor()
    held.send(old, episode_numbers=[5] * LANES)
    new = held.stranger(incarnation=2).hello()
    held.settle(new)
    held.pay()
    assert new.heard == [], "the episodes that it is told of are admitted, and not durable"
    held.make_durable()
    assert new.heard == [
        Welcome(learner=1, answers=1, first_episodes=[6] * LANES, settled=0, unrolls=1),
        Credit(count=IN_FLIGHT, policy_version=0),
    ], "what only filled the buffer was consumed at once"


def test_a_new_life_begins_behind_every_episode_that_was_admitted(held: Bench) -> None:
    old = held.actor()
    held.send(old, episode_numbers=[3, 0, 0, 0], episodes=[episode(lane=1, number=6)])
    new = held.actor(incarnation=2)
    assert new.take(Welcome) == [
        Welcome(learner=1, answers=1, first_episodes=[4, 8, 1, 1], settled=0, unrolls=1)
    ]
    other = held.actor(1)
    assert other.take(Welcome) == [Welcome(learner=1, answers=1, first_episodes=[0] * LANES)]


def test_nothing_is_acknowledged_before_the_journal_has_it(held: Bench) -> None:
    actor = held.actor()
    before = held.journal.durable_position
    frames = held.frames(7)
    message = held.send(actor, frames=frames, episodes=[episode(lane=2)], episode_numbers=[3, 1, 4, 1])
    held.pay()
    assert held.journal.durable_position == before, "the flusher is held"
    assert actor.take(Acknowledged) == []
    assert held.loop.learner.buffer.inserted == LANES, (
        "admitted all the same: the fold does not wait for the disk"
    )

    held.make_durable()
    (acknowledged,) = actor.take(Acknowledged)
    assert acknowledged == Acknowledged(sequence=message.sequence, position=before)
    (record,) = held.records("ExperienceAdmitted")
    assert record.position == acknowledged.position
    assert [bytes(frame) for frame in record.frames] == frames
    event = record.header_as(ExperienceAdmitted)
    assert (event.actor, event.incarnation, event.sequence, event.length, event.lanes) == (0, 1, 1, T, LANES)
    assert (event.episode_numbers, event.episodes) == ([3, 1, 4, 1], [episode(lane=2)])


def test_every_debt_waits_for_its_own_position(held: Bench) -> None:
    actor = held.actor()
    held.send(actor)
    held.journal.sync()
    held.send(actor)
    held.pay()
    assert [told.sequence for told in actor.take(Acknowledged)] == [1], "the second one is not durable yet"
    held.make_durable()
    assert [told.sequence for told in actor.take(Acknowledged)] == [2]


def test_a_refusal_too_is_told_only_when_it_is_durable(held: Bench) -> None:
    actor = held.actor()
    held.send(actor, frames=[b"nonsense"])
    held.pay()
    assert actor.take(Refused) == []
    held.make_durable()
    assert [told.reason for told in actor.take(Refused)] == ["malformed"]


def test_weights_are_announced_only_when_their_step_is_durable(held: Bench) -> None:
    actor = held.actor()
    fill(held, actor, 4)
    held.loop.step()
    held.pay()
    assert pull(held, actor, have=-1)[0] == 0, "the step is made, and not durable"
    held.make_durable()
    version, weights = pull(held, actor, have=0)
    assert version == 1
    assert weights is not None
    assert held.records("LearnerStepped")[0].header_as(LearnerStepped).step == 1
    told = safetensors.torch.load(weights)
    learned = held.loop.learner.policy.state_dict()
    assert told.keys() == learned.keys()
    assert all(told[name].equal(learned[name]) for name in learned)


def test_who_has_the_newest_weights_gets_no_frame(held: Bench) -> None:
    actor = held.actor()
    assert pull(held, actor, have=0) == (0, None)
    assert pull(held, actor, have=-1) == (0, held.loop.learner.weights())


def pull(held: Bench, actor: Actor, have: int) -> tuple[int, bytes | None]:
    """The answer to a question for weights."""
    actor.weights.clear()
    actor.client.send(PullWeights(have_version=have))
    received = None
    for _ in range(500):
        held.loop.take_messages()
        received = actor.client.receive(20)
        if received is not None:
            break
    assert isinstance(received, Received)
    assert isinstance(received.message, Weights)
    return received.message.version, received.frames[0] if received.frames else None


# -- credits -----------------------------------------------------------------------------------------------------------


def test_a_credit_comes_back_when_the_unroll_is_consumed_and_not_when_it_is_stored(held: Bench) -> None:
    actor = held.actor()
    fill(held, actor)
    for _ in range(IN_FLIGHT):
        held.send(actor)
    held.make_durable()
    assert len(actor.take(Acknowledged)) == IN_FLIGHT
    assert credits_in(actor) == 0, "stored, acknowledged, and not consumed"
    held.loop.step()
    held.pay()
    assert credits_in(actor) == 0, "consumed, and the step is not durable"
    held.make_durable()
    assert credits_in(actor) == 1, "6 of 8 fresh experiences consumed: one whole unroll"


def test_what_only_fills_the_buffer_gives_its_credit_back_with_the_acknowledgement(held: Bench) -> None:
    actor = held.actor()
    actor.heard.clear()
    held.send(actor)
    held.make_durable()
    assert actor.heard == [Acknowledged(sequence=1, position=1), Credit(count=1, policy_version=0)]


def test_a_new_life_gets_the_credits_that_its_predecessor_does_not_hold(held: Bench) -> None:
    old = held.actor()
    fill(held, old)
    held.send(old)
    new = held.actor(incarnation=2)
    assert credits_in(new) == IN_FLIGHT - 1
    held.send(new)
    held.make_durable()
    assert credits_in(new) == 0
    assert held.step_all() == 1
    held.make_durable()
    assert (credits_in(new), credits_in(old)) == (1, 0), "what the dead one held goes to the living one"


def test_a_greeting_said_twice_gives_nothing_twice(held: Bench) -> None:
    actor = held.actor()
    assert credits_in(actor) == IN_FLIGHT
    first = actor.take(Welcome)
    actor.hello()
    held.settle(actor)
    held.make_durable()
    assert credits_in(actor) == 0
    assert actor.take(Welcome) == first, "it is answered all the same: the first answer may have been lost"


def test_a_greeting_of_an_earlier_life_does_not_unseat_the_living_one(held: Bench) -> None:
    new = held.actor(incarnation=2)
    old = held.actor(incarnation=1)
    assert credits_in(old) == 0
    held.send(new)
    held.make_durable()
    assert len(new.take(Acknowledged)) == 1


@pytest.mark.parametrize("index", [2, -1, 2**40])
def test_an_actor_that_the_run_does_not_have_is_not_greeted(held: Bench, index: int) -> None:
    stranger = held.stranger(0)
    stranger.client.send(Hello(actor=index, incarnation=1))
    held.settle(stranger)
    held.make_durable()
    assert stranger.heard == []
    assert held.loop.counters()["refused.greeting"] == 1


def test_an_unroll_without_a_credit_is_refused_and_breaks_nothing(held: Bench) -> None:
    actor = held.actor()
    fill(held, actor)
    for _ in range(9):  # the buffer would hold seven more
        held.send(actor)
    held.make_durable()
    assert len(actor.take(Acknowledged)) == IN_FLIGHT
    assert [told.reason for told in actor.take(Refused)] == ["no_credit"] * 7
    assert credits_in(actor) == 0, "no credit was spent, none comes back"
    assert held.loop.counters()["refused.no_credit"] == 7


@pytest.mark.parametrize("seed", range(4))
def test_credits_never_exceed_their_number_over_any_lives(held: Bench, seed: int) -> None:
    """What the living life may send and what the loop still holds of any life stay within the limit; none is lost."""
    rng = np.random.default_rng(seed)
    lives = [held.actor(index) for index in range(2)]
    purse = [credits_in(actor) for actor in lives]
    for _ in range(40):
        index = int(rng.integers(2))
        match rng.choice(["send", "send", "send", "bad", "step", "sync", "die"]):
            case "send" if purse[index]:
                purse[index] -= 1
                held.send(
                    lives[index], int(rng.integers(held.loop.learner.steps_done + 1)) if seed % 2 else 0
                )
            case "bad" if purse[index]:
                purse[index] -= 1
                held.send(lives[index], frames=[b"nonsense"])
            case "step":
                held.step_all()
            case "sync":
                held.make_durable()
            case "die":
                lives[index] = held.actor(index, lives[index].incarnation + 1)
                purse[index] = 0
            case _:
                pass
        purse = [count + credits_in(actor) for count, actor in zip(purse, lives, strict=True)]
        assert all(count <= IN_FLIGHT for count in purse)
        fresh_lanes_max = sum(IN_FLIGHT - count for count in purse) * LANES
        assert held.loop.learner.buffer.fresh <= fresh_lanes_max
    held.make_durable()
    for _ in range(6):  # nobody starves: whatever happened, everybody can go on
        for index, actor in enumerate(lives):
            purse[index] += credits_in(actor)
            if purse[index]:
                purse[index] -= 1
                held.send(actor, held.loop.learner.steps_done)
        held.make_durable()
        held.step_all()
        held.make_durable()
    purse = [count + credits_in(actor) for count, actor in zip(purse, lives, strict=True)]
    assert sum(purse) >= 2 * IN_FLIGHT - 2, "all but what waits for a whole batch came back"


# -- refusals ----------------------------------------------------------------------------------------------------------


def refusals(held: Bench) -> list[ExperienceRefused]:
    return [record.header_as(ExperienceRefused) for record in held.records("ExperienceRefused")]


def test_an_unroll_of_too_old_a_policy_is_refused_journaled_counted_and_gives_its_credit_back(
    tmp_path: Path,
) -> None:
    with bench(tmp_path, "simic_trainer.max_policy_lag=1") as held:
        actor = held.actor()
        fill(held, actor, 4)
        held.loop.step()
        held.make_durable()
        actor.heard.clear()
        steps_before = held.loop.learner.environment_steps
        message = held.send(actor, version=0)
        held.make_durable()
        assert actor.take(Refused) == [Refused(sequence=message.sequence, reason="too_old")]
        assert credits_in(actor) == 1
        (event,) = refusals(held)
        assert (event.actor, event.incarnation, event.sequence) == (0, 1, message.sequence)
        assert (event.policy_version, event.steps, event.reason) == (0, T * LANES, "too_old")
        assert held.loop.counters() == {"refused.too_old": 1.0}
        assert held.loop.learner.environment_steps == steps_before + T * LANES, "its steps were made"
        held.send(actor, version=1)
        held.make_durable()
        assert len(actor.take(Acknowledged)) == 1


def not_finite(held: Bench) -> list[bytes]:
    frames = held.frames(1)
    rewards = np.frombuffer(frames[-3], dtype="<f4").copy()
    rewards[0] = math.nan
    return [*frames[:-3], rewards.tobytes(), *frames[-2:]]


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "no frames": ({"frames": lambda held: []}, "frames"),
    "a frame missing": ({"frames": lambda held: held.frames(1)[:-1]}, "frames"),
    "a frame cut": ({"frames": lambda held: [held.frames(1)[0][:-4], *held.frames(1)[1:]]}, "bytes"),
    "not a number": ({"frames": not_finite}, "not finite"),
    "other steps": ({"frames": lambda held: held.frames(1, length=2), "steps": 2}, "steps, lanes"),
    "other lanes": ({"frames": lambda held: held.frames(1, lanes=2), "lanes": 2}, "steps, lanes"),
    "absurd steps": ({"steps": 2**62, "lanes": 2**62}, "steps, lanes"),
    "negative steps": ({"steps": -T, "lanes": -LANES}, "steps, lanes"),
    "a version never made": ({"version": 1}, "never announced"),
    "a negative version": ({"version": -1}, "never announced"),
    "a very negative version": ({"version": -(2**60)}, "never announced"),
    "an episode number missing": ({"episode_numbers": [0]}, "episode numbers"),
    "a negative episode number": ({"episode_numbers": [0, 0, -1, 0]}, "episode number"),
    "an absurd episode number": ({"episodes": [episode(number=2**63)]}, "episode number"),
    "an episode of no lane": ({"episodes": [episode(lane=LANES)]}, "lane 4"),
    "an infinite return": ({"episodes": [episode(episode_return=math.inf)]}, "not finite"),
    "a return that is no number": ({"episodes": [episode(accuracy=math.nan)]}, "not finite"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_unroll_is_refused_with_its_reason_and_the_loop_goes_on(held: Bench, case: str) -> None:
    changed, said = MALFORMED[case]
    changed = dict(changed)
    make_frames = changed.pop("frames", lambda held: held.frames(1))
    actor = held.actor()
    actor.heard.clear()
    message = held.send(actor, frames=make_frames(held), **changed)
    held.make_durable()
    assert actor.take(Refused) == [Refused(sequence=message.sequence, reason="malformed")]
    assert credits_in(actor) == 1
    (event,) = refusals(held)
    assert event.reason.startswith("malformed: ")
    assert said in event.reason
    is_shape_right = (message.steps, message.lanes) == (T, LANES)
    assert event.steps == (T * LANES if is_shape_right else 0), "a wrong number of steps is not believed"
    assert held.loop.learner.environment_steps == event.steps
    assert held.loop.learner.buffer.inserted == 0
    held.send(actor)
    held.make_durable()
    assert len(actor.take(Acknowledged)) == 1


def test_an_unroll_of_a_dead_life_is_refused_and_gives_nobody_a_credit(held: Bench) -> None:
    old, new = held.actor(), held.actor(incarnation=2)
    old.heard.clear()
    new.heard.clear()
    held.send(old)
    held.make_durable()
    assert [told.reason for told in old.take(Refused)] == ["not_the_living_incarnation"]
    assert (credits_in(old), credits_in(new)) == (0, 0)
    assert [(event.incarnation, event.reason) for event in refusals(held)] == [
        (1, "not_the_living_incarnation")
    ]
    assert held.loop.counters()["refused.not_the_living_incarnation"] == 1


def test_nobody_speaks_for_another_life(held: Bench) -> None:
    actor, impostor = held.actor(incarnation=2), held.stranger(1, incarnation=2)
    held.send(actor, incarnation=1)
    impostor.index, index = 0, impostor.index
    held.send(impostor)
    impostor.index = index
    held.make_durable()
    assert [told.reason for told in actor.take(Refused)] == ["not_the_living_incarnation"]
    assert [told.reason for told in impostor.take(Refused)] == ["not_the_living_incarnation"]
    assert held.records("ExperienceAdmitted") == []
    learner = held.loop.learner
    assert (learner.ledger.settled(0, 2), learner.ledger.settled(0, 1)) == (0, 0), (
        "what others say settles nothing of a life's own"
    )


def test_what_comes_before_its_greeting_is_counted_and_not_answered(held: Bench) -> None:
    """Its sender says Hello to this life of the learner and sends it again; an answer now would settle it."""
    stranger, actor = held.stranger(1), held.actor()
    before = held.journal.next_position
    held.send(stranger)
    held.send(actor, incarnation=2)
    held.make_durable()
    assert stranger.heard == []
    assert [message for message in actor.heard if isinstance(message, (Acknowledged, Refused))] == []
    assert held.journal.next_position == before
    assert held.loop.counters() == {"refused.before_greeting": 2.0}
    stranger.hello((1,))
    held.settle(stranger)
    stranger.sequence = 0
    held.send(stranger)
    held.make_durable()
    assert [told.sequence for told in stranger.take(Acknowledged)] == [1]


def test_what_is_no_message_at_all_is_counted_and_stops_nobody(held: Bench) -> None:
    actor = held.actor()
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(held.endpoint)
    socket.send_multipart([b"garbage", b"more of it"])
    alien = Client(
        held.endpoint, "actor-0-9", run_id="another", accepts=ACCEPTS["actor"], frame_bytes_max=2**20
    )
    alien.send(Hello(actor=0, incarnation=9))
    for _ in range(500):
        held.settle(actor)
        if sum(held.loop.counters().values()) == 2:
            break
    socket.close(linger=0)
    context.term()
    alien.close()
    assert held.loop.counters() == {"refused.frame.checksum": 1.0, "refused.frame.wrong_run": 1.0}
    held.send(actor)
    held.make_durable()
    assert len(actor.take(Acknowledged)) == 1


# -- repeats -----------------------------------------------------------------------------------------------------------


def test_a_repeated_unroll_is_acknowledged_with_the_first_position_and_not_taken_twice(held: Bench) -> None:
    actor = held.actor()
    fill(held, actor)
    first = held.send(actor)
    actor.sequence -= 1
    held.send(actor)
    held.pay()
    assert actor.take(Acknowledged) == [], "a repeat does not make anything durable"
    held.make_durable()
    told = actor.take(Acknowledged)
    assert told == [Acknowledged(sequence=first.sequence, position=3)] * 2
    assert [record.header["sequence"] for record in held.records("ExperienceAdmitted")] == [1, 2, 3]
    assert held.loop.learner.buffer.inserted == 3 * LANES
    assert held.loop.learner.environment_steps == 3 * T * LANES
    assert credits_in(actor) == 0
    assert held.loop.counters() == {"refused.repeated": 1.0}


def test_a_repeated_refusal_is_told_again_and_counted_once(held: Bench) -> None:
    actor = held.actor()
    for _ in range(3):
        actor.sequence = 0
        held.send(actor, frames=[b"nonsense"])
    held.make_durable()
    assert actor.take(Refused) == [Refused(sequence=1, reason="malformed")] * 3
    assert len(refusals(held)) == 1
    assert credits_in(actor) == IN_FLIGHT + 1, "the greeting's and the one that was spent"


def test_a_repeat_from_long_ago_is_not_taken_either(held: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(senders, "ANSWERS_KEPT", 4)
    actor = held.actor()
    for _ in range(12):
        held.send(actor, held.loop.learner.steps_done)
        held.make_durable()
        held.step_all()
        held.make_durable()
    inserted = held.loop.learner.buffer.inserted
    actor.heard.clear()
    actor.sequence = 0
    held.send(actor)
    held.make_durable()
    assert actor.take(Acknowledged) == []
    assert actor.take(Refused) == [Refused(sequence=1, reason="repeated")]
    assert held.loop.learner.buffer.inserted == inserted
    assert refusals(held) == [], "it was counted when it came first"


def test_a_gap_in_the_sequence_is_no_fault_and_a_new_life_counts_anew(held: Bench) -> None:
    actor = held.actor()
    held.send(actor)
    actor.sequence = 7
    held.send(actor)
    new = held.actor(incarnation=2)
    held.send(new)
    held.make_durable()
    admitted = [record.header for record in held.records("ExperienceAdmitted")]
    assert [(event["incarnation"], event["sequence"]) for event in admitted] == [(1, 1), (1, 8), (2, 1)]


def test_who_is_gone_before_it_is_answered_stops_nobody(held: Bench) -> None:
    gone, actor = held.actor(0), held.actor(1)
    held.send(gone)
    gone.client.close()
    held.actors.remove(gone)
    for _ in range(500):  # until the server has noticed
        held.settle(actor)
        held.loop._send("actor-0-1", Acknowledged(sequence=0, position=0))
        if "refused.undeliverable" in held.loop.counters():
            break
    before = held.loop.counters()["refused.undeliverable"]
    held.make_durable()
    assert held.loop.counters()["refused.undeliverable"] == before + 2, "an acknowledgement and a credit"
    held.send(actor)
    held.make_durable()
    assert len(actor.take(Acknowledged)) == 1


# -- the journal is the truth ------------------------------------------------------------------------------------------


def test_the_journal_alone_gives_the_same_digests(tmp_path: Path) -> None:
    with bench(tmp_path, "simic_trainer.max_policy_lag=2", "simic_trainer.digest_every_steps=2") as held:
        actors = [held.actor(0), held.actor(1)]
        for round_ in range(8):
            for actor in actors:
                version = 0 if round_ == 5 else held.loop.learner.steps_done
                held.send(actor, version, episodes=[episode(episode_return=float(round_))])
            held.step_all()
            held.make_durable()
        made = held.loop.learner
        assert made.steps_done >= 4
        assert held.loop.counters()["refused.too_old"] >= 1
        fold = LearnerFold(held.config, held.journal.directory, held.directory / "checkpoints")
        state_digests = 0
        for record in held.records():
            folded = fold.take(record)
            if isinstance(folded.event, LearnerStepped):
                report, stepped = folded.report, folded.event
                assert report is not None
                assert (report.digest, report.state_digest) == (stepped.digest, stepped.state_digest)
                assert report.environment_steps == stepped.environment_steps
                assert report.metrics == stepped.metrics
                state_digests += stepped.state_digest is not None
        assert state_digests == made.steps_done // 2
        assert fold.learner.state().digest == made.state().digest
        assert fold.learner.state().addresses == made.state().addresses
