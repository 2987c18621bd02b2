"""Held-out episodes: paired by seed, the same each time, however they are chunked, and whole."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from esper_simic import seeding
from esper_simic.comparison import bootstrap_interval, interquartile_mean, mean_interval, paired
from esper_simic.config import EnvironmentConfig, TrainerConfig
from esper_simic.config_environment import GovernorConfig
from esper_simic.evaluation import (
    FIXED,
    LEARNED,
    EpisodeOutcome,
    Grown,
    PolicyActing,
    PolicyOutcome,
    baseline_names,
    compare,
    evaluate,
    held_out_seeds,
)
from esper_simic.growing_host import controllers
from esper_simic.growing_host.blueprints import blueprint
from esper_simic.growing_host.core import GrowingHosts
from esper_simic.growing_host.spaces import observation_spec_of
from esper_simic.growing_host.vector import GrowingHostVectorEnv
from esper_simic.policies.build import build_policy
from esper_simic.policies.graph_policy import GraphPolicy
from esper_simic.worlds.growing import GrowingWorld
from esper_simic.worlds.play import play

HORIZON, GAMMA = 12, 0.99
CONFIG = EnvironmentConfig(
    environments_per_actor=3,
    max_epochs=HORIZON,
    training_epochs_min=3,
    train_batches=2,
    train_batch_size=8,
    validation_samples=40,
)
SEEDS = held_out_seeds(5, 5)


def make_policy(seed: int = 0) -> GraphPolicy:
    trainer = TrainerConfig(hidden_size=16, graph_layers=1)
    return GraphPolicy(observation_spec_of(CONFIG), trainer, np.random.default_rng(seed))


def run(name: str, config: EnvironmentConfig = CONFIG, seeds: list[int] = SEEDS) -> PolicyOutcome:
    return evaluate(name, config, seeds, gamma=GAMMA, policy=make_policy() if name == LEARNED else None)


def returns(outcome: PolicyOutcome) -> list[float]:
    return [one.episode_return for one in outcome.episodes if one.episode_return is not None]


def width(lanes: int) -> EnvironmentConfig:
    return CONFIG.model_copy(update={"environments_per_actor": lanes})


def test_held_out_seeds_are_distinct_named_by_the_run_and_grow_at_their_end() -> None:
    seeds = held_out_seeds(5, 50)
    assert len(set(seeds)) == 50
    assert seeds[:5] == SEEDS, "more episodes keep the first ones"
    assert set(seeds).isdisjoint(held_out_seeds(6, 50))


@pytest.mark.parametrize("name", [LEARNED, *baseline_names()])
def test_every_controller_sees_the_same_seeds_and_the_same_outcome_twice(name: str) -> None:
    first, second = run(name), run(name)
    assert first == second
    assert first.name == name
    assert [episode.seed for episode in first.episodes] == SEEDS


def test_the_same_seed_means_the_same_host_and_data_for_every_controller() -> None:
    """Who does the same thing on the same seeds comes to the same outcome, so differences are the controllers' own."""

    class WaitingInDisguise(controllers.NeverGrow):
        pass

    grown = run("never-grow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(controllers.CONTROLLERS, "disguised", lambda lanes: WaitingInDisguise())
        assert run("disguised").episodes == grown.episodes
    assert len({episode.accuracy for episode in grown.episodes}) > 1, "seeds make episodes differ"


@pytest.mark.parametrize("name", baseline_names())
@pytest.mark.parametrize("lanes", [1, 2, 5, 8])
def test_how_episodes_are_chunked_does_not_change_them(name: str, lanes: int) -> None:
    chunked, whole = run(name, width(lanes)), run(name)
    for one, other in zip(chunked.episodes, whole.episodes, strict=True):
        assert (one.seed, one.parameters_added, one.fossils) == (
            other.seed,
            other.parameters_added,
            other.fossils,
        )
        assert one.episode_return == pytest.approx(other.episode_return, abs=1e-6)
        assert one.accuracy == pytest.approx(other.accuracy, abs=1e-6)


def test_a_seed_gives_its_episode_whatever_stands_beside_it() -> None:
    whole = {episode.seed: episode for episode in run("random").episodes}
    for episode in run("random", seeds=SEEDS[::-2]).episodes:
        assert episode.episode_return == pytest.approx(whole[episode.seed].episode_return, abs=1e-6)


def test_episodes_are_whole_even_where_training_cuts_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    step = GrowingHostVectorEnv.step

    def noted_step(self, actions):
        result = step(self, actions)
        _, _, terminated, truncated, infos = result
        assert not truncated.any(), "nothing is cut"
        lengths.extend(infos["episode"]["l"][terminated].tolist() if terminated.any() else [])
        return result

    monkeypatch.setattr(GrowingHostVectorEnv, "step", noted_step)
    assert CONFIG.stagger
    run("patient")
    assert lengths == [HORIZON] * len(SEEDS)


def test_an_episode_that_the_governor_ended_counts_and_not_what_its_lane_played_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The host of the second seed breaks in its fourth epoch, and the next one of that lane three epochs later."""
    config = CONFIG.model_copy(update={"governor": GovernorConfig(forfeit=False)})
    sound = returns(run("random", config, SEEDS[:3]))
    rewards: list[np.ndarray] = []
    step = GrowingHosts.step

    def breaking_step(self, actions):
        if len(rewards) in (3, 6):
            self.bank.parameters[1, 5] = float("nan")
        result = step(self, actions)
        rewards.append(result.reward)
        return result

    monkeypatch.setattr(GrowingHosts, "step", breaking_step)
    found = returns(run("random", config, SEEDS[:3]))
    assert len(rewards) == HORIZON
    first, second = (sum(row[1] for row in rewards[start:stop]) for start, stop in ((0, 4), (4, 7)))
    assert first != pytest.approx(second)
    assert first < -config.governor.penalty / 2
    assert found == pytest.approx([sound[0], first, sound[2]])


def test_progress_is_told_after_every_epoch_of_every_chunk() -> None:
    told: list[None] = []
    evaluate("never-grow", CONFIG, SEEDS, gamma=GAMMA, observer=lambda: told.append(None))
    assert len(told) == 2 * HORIZON, "five episodes in vectors of three"


def test_never_growing_adds_nothing_and_patience_does() -> None:
    assert {episode.parameters_added for episode in run("never-grow").episodes} == {0}
    assert {episode.fossils for episode in run("never-grow").episodes} == {0}
    longer = CONFIG.model_copy(update={"max_epochs": 40})
    assert any(episode.parameters_added > 0 for episode in run("patient", longer).episodes)


def test_of_the_schedules_only_farming_keeps_nothing() -> None:
    longer = CONFIG.model_copy(update={"max_epochs": 40})
    fossils = {
        name: sum(episode.fossils for episode in run(name, longer).episodes)
        for name in ("fixed-schedule", "patient", "farm")
    }
    assert fossils["farm"] == 0
    assert min(fossils["fixed-schedule"], fossils["patient"]) > 0


# Fixed networks

GROWING = CONFIG.model_copy(update={"max_epochs": 13})


@cache
def schedule() -> PolicyOutcome:
    return run("farm", GROWING)


def fixed(
    reference: list[EpisodeOutcome], config: EnvironmentConfig = GROWING, seeds: list[int] = SEEDS
) -> PolicyOutcome:
    return evaluate(FIXED, config, seeds, gamma=GAMMA, reference=reference)


def test_an_episode_tells_what_it_grew() -> None:
    """Of a schedule: `conv_light`, added, in the slots whose seeds are blended in; the parameters are theirs."""
    grown = [episode.grown for episode in schedule().episodes]
    light = Grown("conv_light", "ADD")
    assert {slot for slots in grown for slot in slots} == {light, None}
    assert {len(slots) for slots in grown} == {len(CONFIG.slots)}
    for episode in schedule().episodes:
        # Behind 1, 2 and 4 channels.
        counts = [blueprint("conv_light").parameter_count(channels) for channels in (1, 2, 4)]
        held = [count for count, slot in zip(counts, episode.grown, strict=True) if slot is not None]
        assert episode.parameters_added == sum(held)
    assert {episode.grown for episode in run("never-grow").episodes} == {(None, None, None)}


def test_fixed_networks_have_what_the_reference_grew_on_its_seeds_and_earn_nothing() -> None:
    reference = run("random", GROWING.model_copy(update={"alpha_control": "full"})).episodes
    assert len({slot.composition for episode in reference for slot in episode.grown if slot}) > 1
    found = fixed(reference)
    assert found.name == FIXED
    assert [episode.seed for episode in found.episodes] == SEEDS
    for ours, theirs in zip(found.episodes, reference, strict=True):
        assert (ours.grown, ours.parameters_added) == (theirs.grown, theirs.parameters_added)
        assert ours.fossils == sum(slot is not None for slot in theirs.grown)
        assert ours.episode_return is None
    assert (found.episode_return, found.episode_return_middle) == (None, None)
    assert found.accuracy == mean_interval([episode.accuracy for episode in found.episodes])
    assert found == fixed(reference)


def test_a_fixed_network_of_nothing_is_the_host_that_never_grew() -> None:
    never = run("never-grow", GROWING).episodes
    assert [one.accuracy for one in fixed(never).episodes] == [one.accuracy for one in never]


def test_what_was_grown_decides_what_is_trained() -> None:
    never = run("never-grow", GROWING).episodes
    assert fixed(schedule().episodes).accuracy != fixed(never).accuracy


def test_against_fixed_networks_accuracy_and_parameters_are_compared_and_no_return() -> None:
    ours = schedule()
    theirs = fixed(ours.episodes)
    found = compare(ours, theirs)
    assert found.episode_return is None
    assert found.parameters_added.mean.value == 0
    assert found.accuracy.mean.value == pytest.approx(ours.accuracy.mean - theirs.accuracy.mean)
    assert compare(theirs, ours).episode_return is None


@pytest.mark.parametrize("reference", [None, [], "reversed"])
def test_fixed_networks_need_a_reference_on_their_seeds(reference) -> None:
    episodes = run("never-grow").episodes[::-1] if reference == "reversed" else reference
    with pytest.raises(ValueError, match="'fixed-network' needs the reference episodes"):
        fixed(episodes, CONFIG)


def test_progress_of_fixed_networks_is_told_as_that_of_episodes() -> None:
    told: list[None] = []
    reference = run("never-grow").episodes
    evaluate(FIXED, CONFIG, SEEDS, gamma=GAMMA, reference=reference, observer=lambda: told.append(None))
    assert len(told) == 2 * HORIZON, "five networks in vectors of three"


def test_the_intervals_are_those_of_the_episodes() -> None:
    outcome = run("heuristic")
    assert outcome.episode_return == mean_interval(returns(outcome))
    assert outcome.accuracy == mean_interval([episode.accuracy for episode in outcome.episodes])
    assert outcome.parameters_added == mean_interval([float(e.parameters_added) for e in outcome.episodes])
    assert all(0 <= episode.accuracy <= 100 for episode in outcome.episodes)
    for middle, values in (
        (outcome.episode_return_middle, returns(outcome)),
        (outcome.accuracy_middle, [episode.accuracy for episode in outcome.episodes]),
        (outcome.parameters_added_middle, [float(e.parameters_added) for e in outcome.episodes]),
    ):
        assert middle is not None
        assert middle.value == interquartile_mean(values)
        assert middle == bootstrap_interval([values], rng=seeding.generator(SEEDS[0], "bootstrap"))


def test_two_controllers_are_compared_seed_by_seed() -> None:
    ours, theirs = run("heuristic"), run("random")
    found = compare(ours, theirs)
    assert (found.name, found.against) == ("heuristic", "random")
    pairs = [
        (one.accuracy, other.accuracy) for one, other in zip(ours.episodes, theirs.episodes, strict=True)
    ]
    first, second = [list(side) for side in zip(*pairs, strict=True)]
    assert found.accuracy == paired(first, second, rng=seeding.generator(SEEDS[0], "bootstrap"))
    assert found.episode_return is not None
    mean = np.mean(returns(ours)) - np.mean(returns(theirs))
    assert found.episode_return.mean.value == pytest.approx(mean)
    same = compare(ours, ours)
    for figure in (same.episode_return, same.accuracy, same.parameters_added):
        assert figure is not None
        assert (figure.seeds, figure.mean.sign(), figure.probability.value) == (len(SEEDS), 0, 0.5)


def test_other_seeds_are_no_comparison() -> None:
    with pytest.raises(ValueError, match="different seeds"):
        compare(run("random"), run("random", seeds=SEEDS[::-1]))


def test_another_policy_learns_another_outcome_and_evaluation_changes_no_weights() -> None:
    one, other = make_policy(0), make_policy(1)
    with_one = evaluate(LEARNED, CONFIG, SEEDS, gamma=GAMMA, policy=one)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    for layer in (other.heads.op, other.heads.slot_out, other.heads.choice_out):
        layer.weight.data.mul_(50.0)
        before |= {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with_other = evaluate(LEARNED, CONFIG, SEEDS, gamma=GAMMA, policy=other)
    assert with_one.episodes != with_other.episodes
    assert all(tensor.equal(before[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("network", ["mlp", "lstm"])
def test_a_policy_of_vectors_sees_here_what_it_sees_in_its_world(network: str) -> None:
    config = CONFIG.model_copy(update={"observation": "flat"})
    trainer = TrainerConfig.model_validate({"hidden_size": 16, "network": network})
    world = GrowingWorld(config, GAMMA)
    policy = build_policy(world.spec, trainer, np.random.default_rng(3))
    here = evaluate(LEARNED, config, SEEDS, gamma=GAMMA, policy=policy)
    there = play(world, SEEDS, lambda lanes: PolicyActing(policy, lanes), lanes_max=3)
    assert returns(here) == [episode.episode_return for episode in there]
    assert len(set(returns(here))) > 1


def test_the_learned_policy_needs_a_policy() -> None:
    with pytest.raises(ValueError, match="needs a policy"):
        evaluate(LEARNED, CONFIG, SEEDS, gamma=GAMMA)


def test_an_unknown_controller_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown controller 'greedy'; known: learned, heuristic, patient"):
        evaluate("greedy", CONFIG, SEEDS, gamma=GAMMA)


def test_one_episode_gives_no_interval() -> None:
    with pytest.raises(ValueError, match="at least two"):
        run("never-grow", seeds=SEEDS[:1])
