"""Gymnasium worlds through the roles: what an actor sends is taken in, folded, measured; what fits not is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import esper_simic  # noqa: F401 - registers the known answers
from esper_simic import seeding
from esper_simic.config import Config
from esper_simic.config_behaviour import RANDOM
from esper_simic.errors import ContractError
from esper_simic.evaluation import LEARNED, PolicyActing, held_out_seeds
from esper_simic.events import ExperienceAdmitted, LearnerStepped
from esper_simic.policies.build import build_policy
from esper_simic.trajectory import encode
from esper_simic.unroll import begin, unroll
from esper_simic.worlds.play import RandomActing, play
from esper_simic.worlds.rivals import BEST_POSSIBLE, BEST_SINGLE, rivals
from esper_simic.worlds.world import held_out_world_of, world_of
from supervisor.protocol import Evaluate, Unroll
from supervisor.roles import evaluate as role
from supervisor.roles.admission import check, decode_unroll
from supervisor.roles.channel import ControlChannel
from supervisor.roles.evaluate import load_policy, measure
from supervisor.roles.fold import LearnerFold, config_of_journal
from tests.roles.bench import LANES, Bench, T, bench, make_config
from tests.roles.pair import Pair, control_line

EPISODES = 5
WORLDS = {
    "choices": ("environment.id=CartPole-v1",),
    "real numbers": ("environment.id=esper_simic/Target-v0",),
    "memory": ("environment.id=esper_simic/Recall-v0", "simic_trainer.network=lstm"),
    "one at a time": ("environment.id=MountainCar-v0", "environment.vectorised=never"),
}
worlds = pytest.mark.parametrize("assignments", WORLDS.values(), ids=WORLDS)
CART_POLE, REAL, MEMORY = (WORLDS[name] for name in ("choices", "real numbers", "memory"))


@contextmanager
def acted(directory: Path, *assignments: str, unrolls: int = 4) -> Iterator[Bench]:
    """A learner that has taken in some unrolls of an actor and made the updates that they allow."""
    with bench(directory, *assignments) as held, control_line() as control:
        pair = Pair(held, control)
        child = pair.begin()
        pair.until(min(unrolls, 4))
        while held.loop.learner.buffer.inserted < unrolls * LANES or not held.loop.learner.steps_done:
            pair.step_turn()
        pair.stop(child)
        yield held


def message(**changed: Any) -> Unroll:
    fields: dict[str, Any] = {
        "actor": 0,
        "incarnation": 1,
        "sequence": 1,
        "policy_version": 0,
        "lanes": LANES,
        "steps": T,
        "episode_numbers": [0] * LANES,
        "episodes": [],
    }
    return Unroll(**fields | changed)


def made_alone(config: Config, count: int) -> list[tuple[list[bytes], list[int], list[Any]]]:
    """What actor 0 sends at first, from its seeds and the weights that everybody begins with."""
    trainer = config.simic_trainer
    world = world_of(config.environment, trainer.gamma)
    policy = build_policy(world.spec, trainer, seeding.generator(trainer.seed, "policy"))
    seeds = [seeding.derive(trainer.seed, "actor", 0, lane) for lane in range(LANES)]
    lanes = world.lanes(seeds, [0] * LANES, stagger=config.environment.stagger)
    observation, _ = lanes.reset()
    carry = begin(policy, observation, seeds, np.zeros(LANES, dtype=np.int64))
    made = []
    for _ in range(count):
        numbers = carry.episode_numbers.tolist()
        trajectory, finished = unroll(policy, lanes, carry, T)
        made.append((encode(trajectory), numbers, finished))
    lanes.close()
    return made


# -- actor and admission -----------------------------------------------------------------------------------------------


@worlds
def test_what_an_actor_sends_is_what_its_seeds_and_weights_give(
    tmp_path: Path, assignments: tuple[str, ...]
) -> None:
    with acted(tmp_path, *assignments) as held:
        records = held.records("ExperienceAdmitted")
        config = held.config
    of_first_version = [record for record in records if record.header["policy_version"] == 0]
    assert len(of_first_version) >= 3
    alone = made_alone(config, len(of_first_version))
    for record, (frames, numbers, finished) in zip(of_first_version, alone, strict=True):
        event = record.header_as(ExperienceAdmitted)
        assert [bytes(frame) for frame in record.frames] == frames
        assert (event.episode_numbers, event.episodes) == (numbers, finished)


def test_in_lockstep_a_later_life_stands_where_the_first_one_stood(tmp_path: Path) -> None:
    """Episodes of six steps, unrolls of three: the memory of the cue must come over, too."""

    def history(directory: Path, *, dies: bool) -> list[list[bytes]]:
        with (
            bench(directory, *MEMORY, "supervisor.lockstep=true", "supervisor.num_actors=1") as held,
            control_line() as control,
        ):
            pair, life = Pair(held, control), 1
            child = pair.begin()
            ledger = held.loop.learner.ledger
            pair.wait(lambda: ledger.unrolls(0) >= 3, pair.step_turn)
            if dies:
                pair.stop(child)
                life = 2
                child = pair.begin(incarnation=life)
            pair.wait(lambda: ledger.unrolls(0) >= 6, pair.step_turn)
            pair.stop(child, incarnation=life)
            return [
                [bytes(frame) for frame in record.frames] for record in held.records("ExperienceAdmitted")
            ][:6]

    assert history(tmp_path / "killed", dies=True) == history(tmp_path / "whole", dies=False)


@worlds
def test_an_unroll_is_read_as_it_was_written(assignments: tuple[str, ...]) -> None:
    config = make_config(*assignments)
    ((frames, _, _),) = made_alone(config, 1)
    world = world_of(config.environment, config.simic_trainer.gamma)
    policy = build_policy(world.spec, config.simic_trainer, np.random.default_rng(0))
    check(message(), config, 0)
    trajectory = decode_unroll(frames, message(), policy, lockstep=False)
    assert encode(trajectory) == frames
    assert trajectory.actions.shape == (T, LANES, *world.spec.action.shape)
    assert trajectory.initial_state.shape == (LANES, policy.state_size)


@pytest.mark.parametrize("other", [REAL, MEMORY], ids=["real numbers", "memory"])
def test_an_unroll_of_another_world_is_refused(other: tuple[str, ...]) -> None:
    ((frames, _, _),) = made_alone(make_config(*other), 1)
    config = make_config(*CART_POLE)
    world = world_of(config.environment, config.simic_trainer.gamma)
    policy = build_policy(world.spec, config.simic_trainer, np.random.default_rng(0))
    with pytest.raises(ContractError):
        decode_unroll(frames, message(), policy, lockstep=False)


def test_an_unroll_with_a_choice_that_there_is_not_is_refused() -> None:
    config = make_config(*CART_POLE)
    ((frames, _, _),) = made_alone(config, 1)
    world = world_of(config.environment, config.simic_trainer.gamma)
    policy = build_policy(world.spec, config.simic_trainer, np.random.default_rng(0))
    sound = decode_unroll(frames, message(), policy, lockstep=False)
    sound.actions[1, 2] = 2
    with pytest.raises(ContractError, match="action"):
        decode_unroll(encode(sound), message(), policy, lockstep=False)


# -- fold --------------------------------------------------------------------------------------------------------------


@worlds
def test_the_journal_alone_gives_every_update_again(tmp_path: Path, assignments: tuple[str, ...]) -> None:
    with acted(tmp_path, *assignments, unrolls=8) as held:
        records, state = held.records(), held.loop.learner.state()
        journal = held.journal.directory
        config = config_of_journal(journal)
        assert config == held.config
        fold = LearnerFold(config, journal, tmp_path / "checkpoints")
        steps = 0
        for record in records:
            folded = fold.take(record)
            if isinstance(folded.event, LearnerStepped):
                assert folded.report is not None
                assert folded.report.digest == folded.event.digest
                assert folded.report.metrics == folded.event.metrics
                steps += 1
        assert steps >= 2
        assert fold.learner.state().digest == state.digest
        saved = held.checkpointer.save(held.loop.learner)
        resumed = LearnerFold(config, journal, tmp_path / "checkpoints")
        resumed.restore(Path(saved.path))
        assert resumed.learner.state().digest == state.digest


# -- evaluate ----------------------------------------------------------------------------------------------------------


class Control:
    """The line of an evaluator, as far as `measure` speaks on it."""

    def __init__(self) -> None:
        self.work = 0

    def worked(self) -> None:
        self.work += 1

    def report(self) -> None:
        """Nobody listens."""


def measured(config: Config, policy: str, checkpoint: str = "") -> tuple[role.Measured, int]:
    control = Control()
    task = Evaluate(policy=policy, episodes=EPISODES, checkpoint=checkpoint)
    return measure(config, task, cast(ControlChannel, control)), control.work


@worlds
def test_the_learned_policy_plays_the_held_out_episodes(tmp_path: Path, assignments: tuple[str, ...]) -> None:
    with acted(tmp_path, *assignments) as held:
        saved = held.checkpointer.save(held.loop.learner)
        found, work = measured(held.config, LEARNED, saved.path)
        world = world_of(held.config.environment, held.config.simic_trainer.gamma)
        seeds = held_out_seeds(held.config.simic_trainer.seed, EPISODES)
        policy = held.loop.learner.policy
        expected = play(world, seeds, lambda lanes: PolicyActing(policy, lanes), lanes_max=LANES)
    assert found.returns == tuple(episode.episode_return for episode in expected)
    assert (found.accuracies, found.parameters) == ((), ())
    assert {name.partition("_")[0] for name in found.summary} == {"return"}
    assert found.summary["return_mean"] == pytest.approx(np.mean(found.returns))
    assert found.summary["return_iqm_low"] <= found.summary["return_iqm"] <= found.summary["return_iqm_high"]
    assert work >= max(episode.length for episode in expected), "progress is told with every step"


def test_the_random_policy_needs_no_checkpoint() -> None:
    config = make_config(*REAL)
    found, _ = measured(config, RANDOM)
    world = world_of(config.environment, config.simic_trainer.gamma)
    seeds = held_out_seeds(config.simic_trainer.seed, EPISODES)
    expected = play(world, seeds, lambda lanes: RandomActing(world.spec.action), lanes_max=LANES)
    assert found.returns == tuple(episode.episode_return for episode in expected)


KARN = (
    "environment.id=esper_simic/BlueprintChoice-v0",
    "environment.kwargs={held_out_hosts: [digits/augment, wine/mlp]}",
)


@pytest.mark.parametrize("rival", [RANDOM, BEST_POSSIBLE, BEST_SINGLE])
def test_rivals_choose_for_hosts_that_were_not_trained_on(rival: str) -> None:
    config = make_config(*REAL, *KARN)
    found, _ = measured(config, rival)
    world = held_out_world_of(config.environment, config.simic_trainer.gamma)
    seeds = held_out_seeds(config.simic_trainer.seed, EPISODES)
    make = rivals(config.environment, world.spec.action)[rival]
    expected = play(world, seeds, lambda lanes: make(), lanes_max=LANES)
    assert found.returns == tuple(episode.episode_return for episode in expected)
    known = play(
        world_of(config.environment, 0.99),
        seeds,
        lambda lanes: RandomActing(world.spec.action),
        lanes_max=LANES,
    )
    assert found.returns != tuple(episode.episode_return for episode in known)


def test_controllers_of_hosts_have_nothing_to_do_elsewhere() -> None:
    with pytest.raises(ContractError, match=r"'heuristic' cannot be measured in CartPole-v1"):
        measured(make_config(*CART_POLE), "heuristic")


@pytest.mark.parametrize(
    "other",
    [
        ("environment.id=Acrobot-v1",),
        (*CART_POLE, "simic_trainer.hidden_size=32"),
        (*CART_POLE, "simic_trainer.network=lstm"),
        (*CART_POLE, "simic_trainer.normalise_observations=false"),
        (),
    ],
    ids=["another world", "wider", "with memory", "without normaliser", "a host"],
)
def test_a_policy_of_another_shape_is_refused(tmp_path: Path, other: tuple[str, ...]) -> None:
    with bench(tmp_path, *CART_POLE) as held:
        saved = held.checkpointer.save(held.loop.learner)
        assert load_policy(held.config, Path(saved.path)).spec == held.loop.learner.policy.spec
        with pytest.raises(ContractError, match="another network than this configuration makes"):
            measured(make_config(*other), LEARNED, saved.path)
