"""BASIC_PLUS, SPARSE, MINIMAL, SIMPLIFIED and the loss family, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.actions import Op
from esper_simic.errors import ContractError
from esper_simic.lifecycle import SeedStage
from esper_simic.rewards import PARTS, Rewards, fossil_bonus
from tests.rewards.steps import WEIGHTS, config, decided, held, parts, step

FOSSIL = {"stage_before": SeedStage.FOSSILIZED, "stage": SeedStage.FOSSILIZED}


def fossilised(contribution=2.0, progress=2.0, **changes):
    """BASIC_PLUS measures fossils, so what a seed is worth is known after its fossilisation too."""
    return decided(Op.FOSSILIZE, contribution=contribution, progress=progress, **changes)


class TestBasicPlus:
    def test_it_is_basic_but_for_the_bonus(self):
        outcome = fossilised(accuracy=42.0, terminated=True)
        plain, plus = parts("basic", outcome), parts("basic_plus", outcome)
        for name in ("shaping", "rent", "terminal_accuracy", "terminal_parameters"):
            assert plus[name] == plain[name]
        assert plain["fossil_bonus"] == pytest.approx(0.3 + 0.5 * 2.0)
        assert plus["fossil_bonus"] == pytest.approx(0.3 * 1.3)
        assert plus["drip"] == 0.0

    @pytest.mark.parametrize(
        ("now", "expected"),
        [
            (2.0, 0.7 * 1.3 / 20),  # 20 epochs are left, all that was promised is there
            (9.0, 0.7 * 1.3 / 20),
            (1.0, 0.7 * 1.3 / 40),
            (0.0, 0.0),
            (-2.0, -0.7 * 1.3 / 20),
            (-9.0, -0.7 * 1.3 / 20),
            (np.nan, 0.0),
        ],
    )
    def test_a_drip_follows_what_the_fossil_is_worth_now(self, now, expected):
        assert parts("basic_plus", fossilised(), held(**FOSSIL, contribution=now))["drip"] == pytest.approx(
            expected
        )

    @pytest.mark.parametrize(("now", "expected"), [(30.0, 0.1), (-30.0, -0.05)])
    def test_a_drip_is_bounded_and_its_negative_side_by_half(self, now, expected):
        """A bonus of 5, of which 3.5 drips in 20 epochs: 0.175 an epoch."""
        begun = fossilised(30.0, 30.0)
        assert parts("basic_plus", begun, held(**FOSSIL, contribution=now))["drip"] == pytest.approx(expected)

    def test_it_is_spread_over_five_epochs_at_least(self):
        late = fossilised(0.1, 0.1, epoch=39)
        outcome = held(**FOSSIL, contribution=0.1, epoch=40)
        assert parts("basic_plus", late, outcome)["drip"] == pytest.approx(0.7 * 0.35 / 5)

    def test_several_fossils_drip_each_for_itself(self):
        slots = {"stage": [SeedStage.FOSSILIZED] * 2, "stage_before": SeedStage.FOSSILIZED}
        rewards = Rewards(1, 2, config("basic_plus"), 0.99)
        rewards.parts(step(**slots, fossilized=[True, False], contribution=2.0, progress=2.0))
        rewards.parts(step(**slots, fossilized=[False, True], contribution=2.0, progress=2.0))
        dripped = rewards.parts(step(**slots, contribution=[2.0, -2.0]))["drip"]
        assert dripped == pytest.approx([0.0])

    @given(st.floats(0.01, 50), st.floats(0.01, 50), st.integers(1, 39), st.floats(0.01, 500))
    def test_drips_never_exceed_their_share_of_the_bonus(self, contribution, progress, epoch, now):
        rewards = Rewards(1, 1, config("basic_plus"), 0.99)
        paid = rewards.parts(fossilised(contribution, progress, epoch=epoch))["fossil_bonus"]
        for later in range(epoch + 1, 41):
            paid = paid + rewards.parts(held(**FOSSIL, contribution=now, epoch=later))["drip"]
        whole = fossil_bonus(np.array(contribution), np.array(progress), WEIGHTS)
        assert paid[0] <= whole + 1e-9

    def test_a_seed_without_a_bonus_drips_nothing(self):
        assert parts("basic_plus", fossilised(-2.0), held(**FOSSIL, contribution=5.0))["drip"] == 0.0


class TestSparse:
    def test_only_the_end_is_paid_and_only_for_what_is_committed(self):
        """25 % with the fossils alone, 90 % with the live seeds: 0.25 - 0.1 * 100 / 500000."""
        end = held(**FOSSIL, terminated=True, accuracy=90.0, committed_accuracy=25.0)
        assert parts("sparse", end) == pytest.approx(
            {"terminal_accuracy": 0.25, "terminal_parameters": -2e-5}
        )
        before = held(**FOSSIL, accuracy=90.0, committed_accuracy=25.0)
        assert parts("sparse", before) == {"terminal_accuracy": 0.0, "terminal_parameters": 0.0}

    def test_live_seeds_are_not_charged(self):
        assert parts("sparse", held(terminated=True, committed_accuracy=25.0))["terminal_parameters"] == 0.0

    def test_the_budget_can_be_the_host_itself(self):
        end = held(**FOSSIL, terminated=True, committed_accuracy=25.0)
        found = parts("sparse", end, sparse={"parameter_budget": None})
        assert found["terminal_parameters"] == pytest.approx(-0.1 * 100 / 1000)

    def test_it_is_bounded(self):
        end = held(**FOSSIL, terminated=True, committed_accuracy=25.0, seed_parameters=50_000_000)
        assert sum(parts("sparse", end).values()) == pytest.approx(-1.0)

    @pytest.mark.parametrize("mode", ["sparse", "minimal"])
    def test_without_a_committed_accuracy_there_is_no_reward(self, mode):
        assert sum(parts(mode, held()).values()) == 0.0
        with pytest.raises(ContractError, match="the committed accuracy of lane 0 is unknown"):
            parts(mode, held(terminated=True))

    @pytest.mark.parametrize(("age", "expected"), [(4, -0.1), (5, 0.0)])
    def test_minimal_charges_an_early_prune_that_happened(self, age, expected):
        assert parts("minimal", decided(Op.PRUNE, age_before=age))["early_prune"] == pytest.approx(expected)
        assert parts("minimal", held(op=Op.PRUNE, age_before=age))["early_prune"] == 0.0, "refused"
        gone = held(stage=SeedStage.PRUNED, age_before=age, auto_pruned=True, alpha=0.0, seed_parameters=0)
        assert parts("minimal", gone)["early_prune"] == 0.0, "by the environment"


class TestSimplified:
    def test_its_parts_by_hand(self):
        end = step(
            stage_before=SeedStage.HOLDING,
            stage=[SeedStage.FOSSILIZED, SeedStage.FOSSILIZED, SeedStage.HOLDING],
            contribution=[1.0, 0.9, 5.0],
            op=Op.SET_ALPHA_TARGET,
            accuracy=60.0,
            terminated=True,
        )
        found = parts("simplified", end)
        assert found == pytest.approx(
            {"shaping": -0.3 * 3 * 5.5, "action": -0.01, "terminal_accuracy": 1.8, "terminal_fossils": 2.0}
        )

    def test_waiting_is_free_and_nothing_else_is_paid_before_the_end(self):
        found = parts("simplified", held(**FOSSIL, contribution=9.0))
        assert (found["action"], found["terminal_accuracy"], found["terminal_fossils"]) == (0.0, 0.0, 0.0)


def loss_step(before, after, **changes):
    return step(**{"loss_before": before, "loss": after, "loss_scale": math.log(10)} | changes)


class TestLoss:
    @pytest.mark.parametrize(
        ("before", "after", "expected"),
        [
            (2.0, 1.9, 5.0),  # one deviation better
            (2.0, 2.1, -2.5),  # one worse, half
            (2.0, 1.0, 25.0),  # five at most
            (2.0, 9.0, -12.5),
            (2.0, 2.0, 0.0),
            (2.0, np.nan, -12.5),
            (2.0, np.inf, -12.5),
            (np.nan, np.nan, -12.5),
            (np.inf, 2.0, 25.0),
        ],
    )
    def test_a_falling_loss_is_paid_and_a_rising_one_costs(self, before, after, expected):
        assert parts("loss", loss_step(before, after))["loss"] == pytest.approx(expected)

    @given(st.floats(0, 20), st.floats(0, 20))
    def test_worse_is_negative(self, before, after):
        paid = parts("loss", loss_step(before, after))["loss"]
        assert np.sign(paid) == np.sign(before - after) or abs(before - after) < 1e-300

    def test_the_deviation_follows_the_changes_before(self):
        """0.1 at first; a change of -0.3 makes it sqrt(0.99 * 0.01 + 0.01 * 0.09)."""
        paid = parts("loss", loss_step(2.0, 1.7), loss_step(1.7, 1.6))["loss"]
        assert paid == pytest.approx(5 * 0.1 / math.sqrt(0.0108))

    def test_a_divergence_does_not_hush_what_follows(self):
        paid = parts("loss", loss_step(2.0, 1e9), loss_step(2.0, 1.9))["loss"]
        assert paid == pytest.approx(5 * 0.1 / math.sqrt(0.99 * 0.01 + 0.01 * 0.25))

    def test_a_loss_that_stands_still_for_ever_leaves_a_deviation(self):
        rewards = Rewards(1, 1, config("loss", loss={"deviation_ema": 0.0}), 0.99)
        rewards.parts(loss_step(2.0, 2.0))
        assert rewards.parts(loss_step(2.0, 2.0))["loss"].tolist() == [0.0]

    @pytest.mark.parametrize(("age", "expected"), [(2, 0.0), (3, -0.05 * math.log(1.1))])
    def test_rent_after_three_epochs_of_grace(self, age, expected):
        grown = loss_step(2.0, 2.0, stage=SeedStage.TRAINING, seed_parameters=100, age=age)
        assert parts("loss", grown)["rent"] == pytest.approx(expected)

    def test_shaping_has_its_own_weight(self):
        assert parts("loss", loss_step(2.0, 2.0, stage=SeedStage.GERMINATED))["shaping"] == pytest.approx(
            0.099
        )

    @pytest.mark.parametrize(
        ("after", "expected"),
        [(math.log(10) / 4, 0.75), (0.0, 1.0), (5.0, 0.0), (np.nan, 0.0), (np.inf, 0.0)],
    )
    def test_the_end_pays_the_share_of_the_loss_that_is_gone(self, after, expected):
        assert parts("loss", loss_step(2.0, after, terminated=True))["terminal_loss"] == pytest.approx(
            expected
        )
        assert parts("loss", loss_step(2.0, after))["terminal_loss"] == 0.0

    def test_it_must_know_the_scale(self):
        with pytest.raises(ContractError, match="loss_scale"):
            parts("loss", step(loss_before=2.0, loss=1.0))

    def test_a_zigzag_is_paid(self):
        """Why it is no default: a rise costs half of what the fall after it pays."""
        there, back = loss_step(2.0, 2.1), loss_step(2.1, 2.0)
        assert parts("loss", there)["loss"] + parts("loss", back)["loss"] > 0


@pytest.mark.parametrize("mode", list(PARTS))
def test_every_mode_names_its_parts_in_order(mode):
    rewards = Rewards(1, 1, config(mode), 0.99)
    found = rewards.parts(loss_step(2.0, 1.9, committed_accuracy=30.0))
    assert tuple(found) == rewards.names == PARTS[mode]
    assert all(part.shape == (1,) and part.dtype == np.float64 for part in found.values())
