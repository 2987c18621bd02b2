"""ESCROW: what is paid for a seed that does not become permanent is taken back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.actions import Op
from esper_simic.lifecycle import SeedStage
from esper_simic.rewards import Rewards
from tests.rewards.steps import config, decided, held


def follow(outcomes, **changes):
    """The part `escrow` of every step of an episode with one lane."""
    rewards = Rewards(1, 1, config("escrow", **changes), 0.99)
    return [float(rewards.parts(one)["escrow"][0]) for one in outcomes]


def worth(contribution, *, accuracy=50.0, progress=20.0, **changes):
    return held(**{"contribution": contribution, "progress": progress, "accuracy": accuracy} | changes)


def test_the_change_of_the_credit_is_paid():
    assert follow([worth(1.0), worth(2.5), worth(2.0), worth(2.0)]) == pytest.approx([1.0, 1.5, -0.5, 0.0])


def test_a_step_pays_and_takes_at_most_2():
    steps = [worth(5.0), worth(5.0), worth(5.0), worth(-9.0), worth(-9.0), worth(-9.0)]
    assert follow(steps) == pytest.approx([2.0, 2.0, 1.0, -2.0, -2.0, -1.0])


def test_the_credit_is_held_against_the_least_accuracy_of_three_epochs():
    """Accuracy leaps from 40 to 50: for two more steps only 10 of the 20 points of progress are believed."""
    steps = [worth(1.0, accuracy=40.0, progress=0.5), *[worth(30.0, progress=10.5)] * 4]
    mean = 2 * 0.5 * 30 / 30.5
    first = 2 * 0.5 * 1 / 1.5
    paid = follow(steps, escrow={"step_max": 100.0})
    lasting = 2 * 10.5 * 30 / 40.5
    assert paid == pytest.approx([first, mean - first, 0.0, lasting - mean, 0.0])


def test_a_ransom_lowers_the_credit():
    """c = 1.5 and d = 0: the penalty 0.3 * 1.5 / 10 comes off the credit, which never is negative."""
    assert follow([worth(1.5, improvement=0.0)]) == pytest.approx([1.5 - 0.045])
    assert follow([worth(-3.0, improvement=-5.0)]) == [0.0]


def test_a_seed_that_is_fossilised_keeps_its_credit():
    fossil = {"stage_before": SeedStage.FOSSILIZED, "stage": SeedStage.FOSSILIZED}
    steps = [worth(1.5), decided(Op.FOSSILIZE), held(**fossil), held(**fossil, terminated=True)]
    assert follow(steps) == pytest.approx([1.5, 0.0, 0.0, 0.0])
    assert follow([worth(1.5), decided(Op.FOSSILIZE, terminated=True)]) == pytest.approx([1.5, 0.0])


@pytest.mark.parametrize(
    "end",
    [
        worth(5.0, terminated=True),
        decided(Op.PRUNE, contribution_before=5.0, progress_before=20.0),
        held(stage=SeedStage.PRUNED, auto_pruned=True, alpha=0.0, seed_parameters=0),
    ],
    ids=["the horizon", "a prune", "a prune by the environment"],
)
def test_any_other_end_takes_it_back_whole(end):
    assert follow([worth(5.0), worth(5.0), end]) == pytest.approx([2.0, 2.0, -4.0])


def test_a_scheduled_prune_takes_the_credit_back_and_what_its_ramp_is_paid_too():
    leaving = {"stage": SeedStage.BLENDING, "stage_before": SeedStage.HOLDING, "alpha": 0.5}
    scheduled = decided(Op.PRUNE, **leaving | {"seed_parameters": 100, "age": 10})
    ramp = worth(1.0, **leaving | {"stage_before": SeedStage.BLENDING})
    landed = held(stage_before=SeedStage.BLENDING, stage=SeedStage.PRUNED)
    assert follow([worth(1.5), scheduled, ramp, landed]) == pytest.approx([1.5, -1.5, 1.0, -1.0])


def test_a_seed_that_waits_pays_for_indecision_while_it_has_a_credit():
    rewards = Rewards(1, 1, config("escrow"), 0.99)
    rewards.parts(worth(1.5, epochs_in_stage=8))
    assert rewards.parts(worth(1.5, epochs_in_stage=9))["indecision"][0] == pytest.approx(-0.3)
    assert rewards.parts(worth(-1.5, epochs_in_stage=10))["indecision"][0] == 0.0


@given(
    st.lists(st.tuples(st.floats(-20, 20), st.floats(-20, 20), st.floats(0, 100)), min_size=1, max_size=12),
    st.sampled_from(["fossilised", "pruned", "horizon"]),
)
def test_an_episode_s_escrow_is_what_its_fossils_were_credited(path, end):
    steps = [worth(c, progress=p, accuracy=a) for c, p, a in path]
    if end == "horizon":
        steps.append(worth(9.0, terminated=True))
    else:
        steps.append(decided(Op.FOSSILIZE if end == "fossilised" else Op.PRUNE))
    paid = follow(steps)
    if end == "fossilised":
        assert sum(paid) >= -1e-9
        assert sum(paid) == pytest.approx(sum(paid[:-1]))
    else:
        assert sum(paid) == pytest.approx(0.0, abs=1e-9)
    assert all(abs(one) <= 2.0 + 1e-9 for one in paid[:-1])


def test_an_episode_begins_without_credit_and_without_a_past():
    """The other lane remembers 10 %: one of its 41 points of progress lasted, 2 * 1 * 1.5 / 2.5."""
    both = {"stage": [[SeedStage.HOLDING]] * 2}
    rewards = Rewards(2, 1, config("escrow"), 0.99)
    rewards.parts(worth(1.5, accuracy=10.0, **both))
    rewards.reset(np.array([1]))
    paid = rewards.parts(worth(1.5, progress=41.0, **both))["escrow"]
    assert paid == pytest.approx([1.2 - 1.5, 1.5])
