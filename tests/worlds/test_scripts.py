"""Scripted policies that act in training: how likely they say their doings were, against counts and densities."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from esper_simic.actions import HEADS, OP, RELEVANT_HEADS, Op
from esper_simic.config import EnvironmentConfig
from esper_simic.config_behaviour import GROWTH_SCRIPTS, RANDOM
from esper_simic.growing_host.controllers import RandomController, random_log_probs
from esper_simic.specs import Choices, Continuous
from esper_simic.worlds.growing import GrowingLanes, GrowingWorld
from esper_simic.worlds.gymnasium_world import GymnasiumWorld
from esper_simic.worlds.scripts import RandomScript

LANES = 3
CONFIG = EnvironmentConfig(
    max_epochs=8,
    training_epochs_min=2,
    train_batches=1,
    train_batch_size=4,
    validation_samples=20,
    alpha_control="full",
    prune_age_min=1,
)
NOTHING: dict[str, np.ndarray] = {}


def lanes_of(config: EnvironmentConfig = CONFIG, lanes: int = LANES) -> GrowingLanes:
    made = GrowingWorld(config, 0.99).lanes(list(range(lanes)), [0] * lanes, stagger=False)
    made.reset()
    return made


def test_choices_by_chance_are_as_likely_as_there_are_few_of_them() -> None:
    script = RandomScript(Choices(("a", "b"), (2, 5)))
    uniforms = np.random.default_rng(0).random((1000, 2))
    chosen = script.choose(NOTHING, np.zeros(1000, dtype=bool), uniforms)
    assert chosen.actions.dtype == np.int64
    assert {tuple(row) for row in chosen.actions.tolist()} == {(a, b) for a in range(2) for b in range(5)}
    assert chosen.log_probs == pytest.approx(np.full(1000, np.log(1 / 10)))


def test_numbers_by_chance_have_the_densities_of_their_distributions() -> None:
    script = RandomScript(Continuous((-np.inf, 0.0), (np.inf, 1.0)))
    uniforms = np.random.default_rng(0).random((500, 2))
    chosen = script.choose(NOTHING, np.zeros(500, dtype=bool), uniforms)
    normal, between = chosen.actions.T.astype(np.float64)
    truth = stats.norm.logpdf(normal) + stats.uniform.logpdf(between, -1, 2)
    assert np.isfinite(truth).all()
    assert chosen.log_probs == pytest.approx(truth, abs=1e-5)


def test_a_gymnasium_world_has_chance() -> None:
    world = GymnasiumWorld("CartPole-v1")
    chosen = world.script(RANDOM, None).choose(NOTHING, np.ones(2, dtype=bool), np.array([[0.2], [0.7]]))
    assert chosen.actions.tolist() == [[0], [1]]
    assert chosen.log_probs == pytest.approx(np.log([0.5, 0.5]))


def test_a_random_growth_is_as_likely_as_it_is_often() -> None:
    """In one state, over many draws: relative frequencies of what was relevant are the probabilities."""
    lanes = lanes_of()
    controller = RandomController()
    rng = np.random.default_rng(1)
    for _ in range(3):  # until there is something to prune and to advance
        lanes.step(controller.act(lanes.hosts.view(), rng.random((LANES, len(HEADS)))))
    view, draws = lanes.hosts.view(), 20_000
    counts: Counter[tuple[int, ...]] = Counter()
    said: dict[tuple[int, ...], float] = {}
    for _ in range(draws):
        actions = controller.act(view, rng.random((LANES, len(HEADS))))
        log_probs = random_log_probs(view, actions)
        relevant = RELEVANT_HEADS[Op(actions[0, OP])]
        doing = tuple(
            int(choice) if head in relevant else -1 for head, choice in zip(HEADS, actions[0], strict=True)
        )
        counts[doing] += 1
        said[doing] = float(log_probs[0])
    assert len({doing[OP] for doing in counts}) >= 2
    for op in {doing[OP] for doing in counts}:
        shares = sum(count for doing, count in counts.items() if doing[OP] == op) / draws
        of_op = [(doing, count) for doing, count in counts.items() if doing[OP] == op]
        # Rare ones are judged together with their like: all doings of an operation that are equally likely.
        for level in {round(said[doing], 9) for doing, _ in of_op}:
            likely = np.exp(level)
            seen = [count for doing, count in of_op if round(said[doing], 9) == level]
            assert np.mean(seen) / draws == pytest.approx(likely, rel=0.35), (op, shares)
    assert sum(np.exp(one) for one in said.values()) == pytest.approx(1, abs=0.25), (
        "all that can be done is seen"
    )


@pytest.mark.parametrize("name", [name for name in GROWTH_SCRIPTS if name != RANDOM])
def test_where_there_is_no_chance_each_doing_is_certain(name: str) -> None:
    lanes = lanes_of()
    script = GrowingWorld(CONFIG, 0.99).script(name, lanes)
    start = np.ones(LANES, dtype=bool)
    for _ in range(CONFIG.max_epochs):
        chosen = script.choose(NOTHING, start, np.full((LANES, len(HEADS)), 0.5))
        assert chosen.log_probs.tolist() == [0.0] * LANES
        _, _, terminated, truncated, _ = lanes.step(chosen.actions)
        start = terminated | truncated


def test_what_a_script_remembers_ends_with_the_episode() -> None:
    """The heuristic's rotation of blueprints begins anew: in each episode its first germination is the same."""
    config = EnvironmentConfig(
        max_epochs=14,
        training_epochs_min=2,
        train_batches=1,
        train_batch_size=4,
        validation_samples=20,
        host_lr=1e-9,
    )
    lanes = lanes_of(config, 1)
    script = GrowingWorld(config, 0.99).script("heuristic", lanes)
    start, episode = np.ones(1, dtype=bool), 0
    germinated: dict[int, list[int]] = {0: [], 1: []}
    for _ in range(2 * config.max_epochs):
        actions = script.choose(NOTHING, start, np.full((1, len(HEADS)), 0.5)).actions
        if actions[0, OP] == Op.GERMINATE:
            germinated[episode].append(int(actions[0, HEADS.index("blueprint")]))
        _, _, terminated, truncated, _ = lanes.step(actions)
        start = terminated | truncated
        episode += bool(start[0])
    assert len(germinated[0]) >= 2
    assert len(set(germinated[0])) >= 2, "the rotation moves on within an episode"
    assert germinated[1][0] == germinated[0][0]
