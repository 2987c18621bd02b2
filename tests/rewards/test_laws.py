"""Laws: shaping telescopes in every mode, memory begins anew, what is remembered survives saving."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_simic.actions import Op
from esper_simic.errors import ContractError
from esper_simic.lifecycle import OCCUPIED, SeedStage
from esper_simic.rewards import PARTS, Outcome, Rewards
from esper_simic.rewards.outcome import PER_LANE, PER_SLOT
from tests.rewards.steps import config, held, step

SHAPED_MODES = [mode for mode, names in PARTS.items() if "shaping" in names]
STATES = st.lists(
    st.lists(st.tuples(st.sampled_from(list(SeedStage)), st.integers(0, 30)), min_size=2, max_size=2),
    min_size=1,
    max_size=25,
)


def journey(states, mode):
    """An episode of two slots through any states, from empty ones to the horizon; ages are the lifecycle's."""
    path = [[(SeedStage.DORMANT, 0)] * 2, *states]
    ages = [[0, 0]]
    for state in states:
        ages.append(
            [before + 1 if OCCUPIED[stage] else 0 for before, (stage, _) in zip(ages[-1], state, strict=True)]
        )
    steps = []
    for t, (before, after) in enumerate(itertools.pairwise(path)):
        steps.append(
            step(
                stage_before=[stage for stage, _ in before],
                epochs_before=[epochs for _, epochs in before],
                stage=[stage for stage, _ in after],
                epochs_in_stage=[epochs for _, epochs in after],
                age_before=ages[t],
                age=ages[t + 1],
                epoch=t + 1,
                horizon=len(states),
                terminated=t == len(states) - 1,
                committed_accuracy=30.0,
                loss=1.0,
                loss_before=1.0,
                loss_scale=2.3,
            )
        )
    return steps


@pytest.mark.parametrize("mode", SHAPED_MODES)
@settings(max_examples=50)
@given(states=STATES, gamma=st.floats(0.9, 0.999))
def test_an_episode_s_discounted_shaping_is_nothing_whatever_was_done(mode, states, gamma):
    """Potential 0 at the start and at the horizon; also where early germinations are discounted."""
    rewards = Rewards(1, 2, config(mode), gamma)
    total = sum(gamma**t * rewards.parts(one)["shaping"][0] for t, one in enumerate(journey(states, mode)))
    assert total == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("mode", SHAPED_MODES)
def test_an_episode_that_is_cut_from_outside_keeps_its_potential(mode):
    """The learner bootstraps there from a value that already counts the shaping to come."""
    cut = held(committed_accuracy=1.0, loss=1.0, loss_before=1.0, loss_scale=2.3)
    over = held(committed_accuracy=1.0, loss=1.0, loss_before=1.0, loss_scale=2.3, terminated=True)
    kept = Rewards(1, 1, config(mode), 0.99).parts(cut)["shaping"][0]
    taken = Rewards(1, 1, config(mode), 0.99).parts(over)["shaping"][0]
    weight = 0.1 if mode == "loss" else 0.3
    assert kept - taken == pytest.approx(weight * 0.99 * 5.8)


@pytest.mark.parametrize("mode", SHAPED_MODES)
def test_shaping_uses_the_learner_s_gamma(mode):
    outcome = held(loss=1.0, loss_before=1.0, loss_scale=2.3, epochs_before=50, epochs_in_stage=51)
    weight = 0.1 if mode == "loss" else 0.3
    for gamma in (0.9, 0.995):
        found = Rewards(1, 1, config(mode), gamma).parts(outcome)["shaping"][0]
        assert found == pytest.approx(weight * (gamma - 1) * 7.5)


def eventful(rng, slots=3, lanes=2):
    """A step in which much has happened; seeds that exist are in late stages."""
    stages = [SeedStage.DORMANT, SeedStage.BLENDING, SeedStage.HOLDING, SeedStage.FOSSILIZED]
    fossilized = rng.random((lanes, slots)) < 0.2
    stage = np.where(fossilized, SeedStage.FOSSILIZED, rng.choice(stages, (lanes, slots)))
    return step(
        stage_before=rng.choice(stages, (lanes, slots)),
        stage=stage,
        fossilized=fossilized,
        alpha=rng.random((lanes, slots)),
        seed_parameters=rng.integers(1, 100, (lanes, slots)),
        contribution=rng.normal(1, 3, (lanes, slots)),
        contribution_before=rng.normal(1, 3, (lanes, slots)),
        progress=rng.normal(3, 3, (lanes, slots)),
        progress_before=rng.normal(3, 3, (lanes, slots)),
        interaction=rng.normal(0, 2, (lanes, slots)),
        improvement=rng.normal(1, 1, lanes),
        improvement_before=rng.normal(1, 1, lanes),
        accuracy=rng.random(lanes) * 100,
        loss=rng.random(lanes) * 2,
        loss_before=rng.random(lanes) * 2,
        loss_scale=2.3,
        op=rng.choice([Op.WAIT, Op.SET_ALPHA_TARGET], lanes),
        succeeded=True,
    )


def same(left, right):
    return list(left) == list(right) and all(
        np.array_equal(left[name], right[name], equal_nan=True) for name in left
    )


@pytest.mark.parametrize("mode", list(PARTS))
def test_what_is_remembered_survives_saving(mode):
    rng = np.random.default_rng(3)
    past, future = [eventful(rng) for _ in range(6)], [eventful(rng) for _ in range(6)]
    rewards = Rewards(2, 3, config(mode), 0.99)
    for one in past:
        rewards.parts(one)
    saved = rewards.state_dict()
    copies = {name: array.copy() for name, array in saved.items()}
    expected = [rewards.parts(one) for one in future]
    restored = Rewards(2, 3, config(mode), 0.99)
    restored.load_state_dict(saved)
    assert same(restored.state_dict(), copies)
    assert all(same(restored.parts(one), parts) for one, parts in zip(future, expected, strict=True))
    restored.load_state_dict(saved)
    restored.reset(np.arange(2))
    assert same(saved, copies), (
        "a state that was saved, or loaded, does not change with what happens afterwards"
    )


def test_a_saved_state_is_a_copy():
    rewards = Rewards(2, 3, config("escrow"), 0.99)
    rewards.parts(eventful(np.random.default_rng(3)))
    saved = rewards.state_dict()
    copies = {name: array.copy() for name, array in saved.items()}
    rewards.reset(np.arange(2))
    assert same(saved, copies)


@pytest.mark.parametrize("mode", ["escrow", "basic_plus", "loss", "shaped"])
def test_an_episode_s_rewards_depend_on_the_episode_alone(mode):
    rng = np.random.default_rng(4)
    past, episode = [eventful(rng) for _ in range(8)], [eventful(rng) for _ in range(8)]
    fresh, used = (Rewards(2, 3, config(mode), 0.99) for _ in range(2))
    for one in past:
        used.parts(one)
    untouched = used.state_dict()
    used.reset(np.array([1]))
    assert all(
        np.array_equal(used.state_dict()[name][0], array[0], equal_nan=True)
        for name, array in untouched.items()
    )
    for one in episode:
        expected, found = fresh.parts(one), used.parts(one)
        assert all(found[name][1] == expected[name][1] for name in expected)


def test_a_state_of_another_shape_is_refused():
    other = Rewards(2, 2, config("escrow"), 0.99).state_dict()
    mine = Rewards(2, 3, config("escrow"), 0.99)
    with pytest.raises(ContractError, match="has the arrays"):
        mine.load_state_dict(other)
    with pytest.raises(ContractError, match="has the arrays"):
        mine.load_state_dict({})
    with pytest.raises(ContractError, match=r"an outcome of \[1, 1\] lanes and slots, not \[2, 3\]"):
        mine.parts(step())


def test_every_field_of_an_outcome_has_its_shape():
    outcome = step(stage=[[SeedStage.DORMANT] * 3] * 2)
    assert all(getattr(outcome, name).shape == (2, 3) for name in PER_SLOT)
    assert all(getattr(outcome, name).shape == (2,) for name in PER_LANE)
    assert {*PER_SLOT, *PER_LANE, "host_parameters"} == set(Outcome.__slots__)


@pytest.mark.parametrize(
    ("name", "value"), [("alpha", [0.1, 0.2]), ("op", [1, 2, 3]), ("age", [[1], [2], [3]])]
)
def test_a_field_of_another_shape_is_refused(name, value):
    with pytest.raises(ContractError, match=f"{name} of an outcome is"):
        Outcome(**{field: getattr(step(), field) for field in Outcome.__slots__} | {name: np.array(value)})
