"""The comparison on a page: the statistics are those of `comparison`, and the words say what the intervals say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esper_simic import seeding
from esper_simic.comparison import bootstrap_interval, interquartile_mean, mean_interval, paired
from supervisor.events import FIXED, PolicyEvaluated
from supervisor.report.figures import against_words, sentences
from supervisor.standings import Row, chance, compare

SEEDS = 24


def evaluated(policy: str, level: float, count: int = SEEDS, spread: float = 1.0) -> PolicyEvaluated:
    """Outcomes around a level; how hard a seed is, is the same for all."""
    hardness = np.random.default_rng(0).normal(0, 5, SEEDS)[:count]
    noise = np.random.default_rng(abs(hash_of(policy))).normal(0, spread, count)
    values = level + hardness + noise
    return PolicyEvaluated(
        at_s=1.0,
        policy=policy,
        returns=tuple(values.tolist()),
        accuracies=tuple((40 + values).tolist()),
        parameters=tuple(np.full(count, 10.0 * level).tolist()),
        summary={},
    )


def hash_of(text: str) -> int:
    return sum(map(ord, text))


def rows(**levels: float) -> dict[str, Row]:
    return {row.name: row for row in compare({n: evaluated(n, level) for n, level in levels.items()}, 7)}


def test_the_highest_return_stands_first() -> None:
    assert list(rows(learned=3.0, low=1.0, high=5.0)) == ["high", "learned", "low"]


def test_figures_are_those_of_the_episodes() -> None:
    values = evaluated("learned", 3.0).returns
    found = rows(learned=3.0)["learned"].figures["return"]
    assert found.mean == mean_interval(values)
    assert found.middle == bootstrap_interval([values], rng=chance(7))
    assert found.centre == interquartile_mean(values)


def test_differences_are_the_learned_ones_minus_the_others_seed_by_seed() -> None:
    found = rows(learned=3.0, other=1.0)
    ours, theirs = evaluated("learned", 3.0), evaluated("other", 1.0)
    assert found["other"].against["return"] == paired(ours.returns, theirs.returns, rng=chance(7))
    assert found["other"].against["return"].mean.sign() == 1
    assert found["learned"].against == {}


def test_the_chance_is_that_of_the_evaluators() -> None:
    """`evaluation` names its streams by the first held-out seed, so a page and an evaluator give the same interval."""
    first_held_out_seed = seeding.derive(7, "evaluation", 0)
    expected = seeding.generator(first_held_out_seed, "bootstrap").random(4)
    assert chance(7).random(4).tolist() == expected.tolist()


def test_more_episodes_keep_the_first_ones_so_the_shorter_list_decides() -> None:
    found = {
        row.name: row
        for row in compare(
            {"learned": evaluated("learned", 3.0), "other": evaluated("other", 1.0, count=10)}, 7
        )
    }
    assert found["other"].against["return"].seeds == 10
    assert found["learned"].episodes == SEEDS


def test_a_value_that_is_no_number_leaves_the_rest_standing() -> None:
    broken = evaluated("other", 1.0)
    returns = (math.nan, *broken.returns[1:])
    one = PolicyEvaluated(
        at_s=1.0,
        policy="other",
        returns=returns,
        accuracies=broken.accuracies,
        parameters=broken.parameters,
        summary={},
    )
    found = {row.name: row for row in compare({"learned": evaluated("learned", 3.0), "other": one}, 7)}
    assert found["other"].figures["return"].mean is None
    assert found["other"].figures["accuracy"].mean is not None
    assert found["other"].against["return"].seeds == SEEDS - 1


def test_one_episode_has_no_interval_and_none_has_no_value() -> None:
    found = {row.name: row for row in compare({"a": evaluated("a", 1.0, 1), "b": evaluated("b", 1.0, 0)}, 7)}
    assert found["a"].figures["return"].middle is None
    assert found["a"].figures["return"].centre == evaluated("a", 1.0, 1).returns[0]
    assert math.isnan(found["b"].figures["return"].centre)


def test_the_front_is_of_more_accuracy_with_fewer_parameters() -> None:
    found = rows(small=1.0, large=5.0)
    worse = evaluated("worse", 0.0)
    dear = PolicyEvaluated(
        at_s=1.0,
        policy="worse",
        returns=worse.returns,
        accuracies=worse.accuracies,
        parameters=tuple([900.0] * SEEDS),
        summary={},
    )
    all_three = compare(
        {"small": evaluated("small", 1.0), "large": evaluated("large", 5.0), "worse": dear}, 7
    )
    assert {row.name for row in all_three if row.is_on_front} == {"small", "large"}
    assert all(row.is_on_front for row in found.values())


def test_fixed_networks_stand_beside_the_front_and_earn_no_return() -> None:
    """They would dominate everything here, and take no one's place on the front of what growing can have."""
    best = evaluated(FIXED, 9.0)
    whole = PolicyEvaluated(
        at_s=1.0,
        policy=FIXED,
        returns=(),
        accuracies=best.accuracies,
        parameters=(0.0,) * SEEDS,
        summary={},
    )
    found = compare({"learned": evaluated("learned", 3.0), "small": evaluated("small", 1.0), FIXED: whole}, 7)
    assert [row.name for row in found] == ["learned", "small", FIXED], "who earns nothing stands last"
    assert [row.is_on_front for row in found] == [True, True, False]
    beside = found[-1]
    assert beside.episodes == SEEDS
    assert set(beside.against) == {"accuracy", "parameters"}
    said = sentences(found)
    assert any(
        sentence.startswith("learned against fixed-network, on the same 24 seeds: host accuracy lower")
        for sentence in said
    )
    assert said[-1].startswith("learned and small are on the front")
    assert not any("front" in sentence for sentence in sentences([beside, beside]))


@pytest.mark.parametrize(
    ("level", "words"),
    [(9.0, "return lower (−"), (-5.0, "return higher (+"), (3.0, "return not clearly different (")],
)
def test_the_words_follow_the_interval_of_the_difference(level: float, words: str) -> None:
    found = rows(learned=3.0, other=level)["other"]
    said = against_words(found)
    assert said.startswith(f"learned against other, on the same {SEEDS} seeds: {words}")
    assert said.endswith(").")


def test_what_is_said_names_the_best_the_rivals_and_the_front() -> None:
    said = sentences(list(rows(learned=3.0, other=9.0).values()))
    assert said[0].startswith("The highest interquartile mean return is that of other: ")
    assert said[1].startswith("learned against other")
    assert said[-1].startswith("other and learned are on the front")
    assert sentences([]) == []


def test_without_the_learned_policy_there_is_nothing_to_set_against() -> None:
    assert all(row.against == {} for row in rows(a=1.0, b=2.0).values())
