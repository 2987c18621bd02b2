"""PPO: the loss written out in plain Python, its gradients, its identities, its targets and minibatches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper_simic.algorithms.entropy_floor import EntropyFloor
from esper_simic.algorithms.gae import gae
from esper_simic.algorithms.impala import impala_loss
from esper_simic.algorithms.ppo import (
    PpoHead,
    PpoLoss,
    PpoOptions,
    minibatches,
    normalise_advantages,
    ppo_loss,
    ppo_targets,
)
from esper_simic.algorithms.vtrace import vtrace

HEADS = ("op", "slot", "speed")
LENGTH, LANES = 5, 4
OPTIONS = PpoOptions(
    clip=0.2,
    value_clip=0.3,
    value_coefficient=0.5,
    entropy_coefficient=0.05,
    entropy_multipliers={"slot": 1.3},
    entropy_floors={"op": EntropyFloor(0.9, 0.3), "blueprint": EntropyFloor(0.9, 0.3)},
    entropy_floor_scale=1.5,
)


def random_batch(seed: int, *, length: int = LENGTH, lanes: int = LANES) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shape = (length, lanes)

    def tensor(array: Any) -> Tensor:
        return torch.from_numpy(np.asarray(array))

    heads = {}
    for head in HEADS:
        anchor = -rng.exponential(size=shape)
        relevance = rng.random(shape) < (0.9 if head == "op" else 0.5)
        heads[head] = PpoHead(
            log_probs=tensor(anchor + rng.normal(scale=0.3, size=shape)),
            anchor_log_probs=tensor(anchor),
            entropies=tensor(rng.random(shape)),
            relevance=tensor(relevance),
            availability=tensor(relevance | (rng.random(shape) < 0.3)),
        )
    return {
        "heads": heads,
        "advantages": tensor(rng.normal(size=shape)),
        "importance": tensor(np.minimum(1, rng.exponential(size=shape))),
        "values": tensor(rng.normal(size=shape)),
        "anchor_values": tensor(rng.normal(size=shape)),
        "value_targets": tensor(rng.normal(size=shape)),
        "policy_weights": tensor((rng.random(shape) < 0.8).astype(float)),
        "value_weights": tensor(rng.choice([0.2, 1.0], size=shape)),
    }


def mean(terms: list[tuple[float, float]]) -> float:
    """Of (value, weight)."""
    total = sum(weight for _, weight in terms)
    return sum(value * weight for value, weight in terms) / total if total else 0.0


def literal(batch: dict[str, Any], options: PpoOptions) -> dict[str, float]:
    """Every number of the loss, step by step, as the module's docstring has it."""
    heads = {
        name: {part: getattr(h, part).tolist() for part in h._fields} for name, h in batch["heads"].items()
    }
    plain = {name: tensor.tolist() for name, tensor in batch.items() if name != "heads"}
    length, lanes = batch["values"].shape
    worth, beyond, ratios_seen, kls, bonuses, squared = [], [], [], [], [], []
    head_kl: dict[str, list[tuple[float, float]]] = {name: [] for name in heads}
    head_entropy: dict[str, list[tuple[float, float]]] = {name: [] for name in heads}
    for t in range(length):
        for b in range(lanes):
            w, advantage, rho = (plain[k][t][b] for k in ("policy_weights", "advantages", "importance"))
            relevant = [name for name, head in heads.items() if head["relevance"][t][b]]
            moved = {
                name: heads[name]["log_probs"][t][b] - heads[name]["anchor_log_probs"][t][b]
                for name in relevant
            }
            ratios = [math.exp(x) for x in moved.values()]
            if not options.per_head:
                ratios = [math.exp(sum(moved.values()))] if moved else []
            for ratio in ratios:
                bounded = min(max(ratio, 1 - options.clip), 1 + options.clip)
                worth.append((rho * min(ratio * advantage, bounded * advantage), w))
                beyond.append((float(abs(ratio - 1) > options.clip), w))
                ratios_seen.append((ratio, w))
            k3 = {name: math.exp(x) - 1 - x for name, x in moved.items()}
            kls.append((sum(k3.values()), w))
            entropies = {name: heads[name]["entropies"][t][b] for name in relevant}
            bonuses.append(
                (sum(options.entropy_multipliers.get(n, 1.0) * e for n, e in entropies.items()), w)
            )
            for name in relevant:
                head_kl[name].append((k3[name], w))
                head_entropy[name].append((entropies[name], w))
            value, old, target = (plain[k][t][b] for k in ("values", "anchor_values", "value_targets"))
            error = (target - value) ** 2
            if options.value_clip is not None:
                near = old + min(max(value - old, -options.value_clip), options.value_clip)
                error = max(error, (target - near) ** 2)
            squared.append((error / 2, plain["value_weights"][t][b]))
    floors = 0.0
    for name, floor in options.entropy_floors.items():
        if name in heads:
            available = [
                (heads[name]["entropies"][t][b], plain["policy_weights"][t][b])
                for t in range(length)
                for b in range(lanes)
                if heads[name]["availability"][t][b]
            ]
            if sum(weight for _, weight in available):
                shortfall = max(0.0, floor.level - mean(available))
                floors += options.entropy_floor_scale * floor.coefficient * shortfall**2
    found = {
        "policy_loss": -mean(worth),
        "value_loss": mean(squared),
        "entropy": mean(bonuses),
        "entropy_floor_penalty": floors,
        "approx_kl": mean(kls),
        "clip_fraction": mean(beyond),
        "mean_ratio": mean(ratios_seen),
    }
    found |= {f"head_kl.{name}": mean(terms) for name, terms in head_kl.items()}
    found |= {f"head_entropy.{name}": mean(terms) for name, terms in head_entropy.items()}
    found["total"] = (
        found["policy_loss"]
        + options.value_coefficient * found["value_loss"]
        - options.entropy_coefficient * found["entropy"]
        + floors
    )
    return found


def loss_of(batch: dict[str, Any], options: PpoOptions = OPTIONS) -> PpoLoss:
    return ppo_loss(**batch, options=options)


def numbers(loss: PpoLoss) -> dict[str, float]:
    return {name: float(value) for name, value in loss.statistics().items()}


def changed(batch: dict[str, Any], head: str, **parts: Tensor) -> dict[str, Any]:
    return batch | {"heads": batch["heads"] | {head: batch["heads"][head]._replace(**parts)}}


@given(
    st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from((None, 0.1, 10.0)), st.sampled_from((1, 2, 5))
)
def test_every_number_equals_its_formula(
    seed: int, per_head: bool, value_clip: float | None, length: int
) -> None:
    batch = random_batch(seed, length=length)
    options = replace(OPTIONS, per_head=per_head, value_clip=value_clip)
    found = numbers(loss_of(batch, options))
    expected = literal(batch, options)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-7)


def test_what_else_is_watched() -> None:
    batch = random_batch(1)
    found = numbers(loss_of(batch))
    w = batch["policy_weights"]
    assert found["mean_importance"] == pytest.approx(float((w * batch["importance"]).sum() / w.sum()))
    assert found["mean_advantage"] == pytest.approx(float((w * batch["advantages"]).sum() / w.sum()))
    assert found["mean_value"] == pytest.approx(float(batch["values"].mean()))
    left = (batch["value_targets"] - batch["values"]).var(correction=0)
    expected = 1 - left / batch["value_targets"].var(correction=0)
    assert found["explained_variance"] == pytest.approx(float(expected), abs=1e-6)
    assert not any(value.requires_grad for value in loss_of(batch).statistics().values())


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("value_clip", [None, 0.3])
def test_gradients_equal_finite_differences(per_head: bool, value_clip: float | None) -> None:
    batch = random_batch(2)
    options = replace(OPTIONS, per_head=per_head, value_clip=value_clip)

    def total(values: Tensor, *parts: Tensor) -> Tensor:
        heads = {
            name: head._replace(log_probs=parts[2 * i], entropies=parts[2 * i + 1])
            for i, (name, head) in enumerate(batch["heads"].items())
        }
        return loss_of(batch | {"heads": heads, "values": values}, options).total

    leaves = [batch["values"]]
    for head in batch["heads"].values():
        leaves += [head.log_probs, head.entropies]
    assert torch.autograd.gradcheck(total, [leaf.clone().requires_grad_() for leaf in leaves])


def test_at_the_anchor_on_policy_it_is_the_policy_gradient() -> None:
    """r = 1 and rho = 1: the gradient of each relevant log-probability is -A, divided by how many there are."""
    batch = random_batch(3)
    batch["importance"].fill_(1.0)
    for name, head in list(batch["heads"].items()):
        batch = changed(batch, name, log_probs=head.anchor_log_probs.clone().requires_grad_())
    loss = loss_of(batch)
    loss.policy_loss.backward()
    assert (float(loss.mean_ratio), float(loss.clip_fraction), float(loss.approx_kl)) == (1, 0, 0)
    w = batch["policy_weights"]
    pairs = sum(float((w * head.relevance).sum()) for head in batch["heads"].values())
    for head in batch["heads"].values():
        expected = -batch["advantages"] * w * head.relevance / pairs
        assert torch.allclose(head.log_probs.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip_importance", [1.0, 0.7, None])
def test_appo_at_the_anchor_has_the_gradient_of_impala(clip_importance: float | None) -> None:
    """Importance in the loss and none in the advantages: together what V-trace's advantages carry."""
    rng = np.random.default_rng(4)
    shape = (6, 3)
    given_: dict[str, Any] = {
        name: torch.from_numpy(rng.normal(size=shape if name != "bootstrap_value" else 3))
        for name in ("rewards", "values", "bootstrap_value")
    }
    given_["discounts"] = torch.from_numpy(np.where(rng.random(shape) < 0.2, 0.0, 0.97))
    mu, pi = (torch.from_numpy(-rng.exponential(size=shape)) for _ in range(2))
    weights = torch.from_numpy((rng.random(shape) < 0.7).astype(float))
    nothing, everywhere = torch.zeros_like(pi), torch.ones_like(pi, dtype=torch.bool)

    targets = ppo_targets(
        advantages="vtrace",
        log_rhos=pi - mu,
        lambda_=0.9,
        clip_rho=1.2,
        clip_c=0.8,
        clip_importance=clip_importance,
        **given_,
    )
    appo_log_probs = pi.clone().requires_grad_()
    appo = ppo_loss(
        heads={"action": PpoHead(appo_log_probs, pi, nothing, everywhere, everywhere)},
        advantages=targets.advantages,
        importance=targets.importance,
        values=given_["values"],
        anchor_values=given_["values"],
        value_targets=targets.value_targets,
        policy_weights=weights,
        value_weights=weights,
        options=PpoOptions(per_head=False),
    )
    impala_log_probs = pi.clone().requires_grad_()
    impala = impala_loss(
        log_probs=impala_log_probs,
        behaviour_log_probs=mu,
        entropies=nothing,
        policy_weights=weights,
        value_weights=weights,
        clip_rho=1.2,
        clip_c=0.8,
        clip_pg_rho=clip_importance,
        lambda_=0.9,
        value_coefficient=0.5,
        entropy_coefficient=0.0,
        **given_,
    )
    appo.policy_loss.backward()
    impala.policy_loss.backward()
    assert appo_log_probs.grad is not None
    assert impala_log_probs.grad is not None
    assert torch.allclose(appo_log_probs.grad, impala_log_probs.grad, rtol=0, atol=1e-12)
    assert float(appo.value_loss) == pytest.approx(float(impala.value_loss), abs=1e-12)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "moves"), [(1, 0.5, 0), (1, -0.5, 1), (-1, -0.5, 0), (-1, 0.5, 1)]
)
def test_what_went_far_enough_is_pushed_no_further_but_may_come_back(
    advantage: float, log_ratio: float, moves: bool
) -> None:
    batch = random_batch(5)
    batch["advantages"].fill_(advantage)
    batch["policy_weights"].fill_(1.0)
    op = batch["heads"]["op"]
    log_probs = (op.anchor_log_probs + log_ratio).requires_grad_()
    batch = changed(batch, "op", log_probs=log_probs)
    loss_of(batch).policy_loss.backward()
    assert log_probs.grad is not None
    assert bool(log_probs.grad.any()) == bool(moves)


def test_a_head_that_moved_far_stops_the_others_only_when_they_share_a_ratio() -> None:
    batch = random_batch(6)
    batch["advantages"].fill_(1.0)
    batch["policy_weights"].fill_(1.0)
    op, slot = batch["heads"]["op"], batch["heads"]["slot"]
    everywhere = torch.ones_like(slot.relevance)
    moving = slot.anchor_log_probs.clone().requires_grad_()
    batch = changed(batch, "op", log_probs=op.anchor_log_probs + 1.0, relevance=everywhere)
    batch = changed(batch, "slot", log_probs=moving, relevance=everywhere)
    batch = changed(batch, "speed", relevance=~everywhere)
    for per_head in (True, False):
        (gradient,) = torch.autograd.grad(
            loss_of(batch, replace(OPTIONS, per_head=per_head)).policy_loss, moving
        )
        assert bool(gradient.any()) == per_head


@pytest.mark.parametrize("per_head", [True, False])
def test_an_irrelevant_head_has_no_part_even_at_probability_zero(per_head: bool) -> None:
    batch, options = random_batch(7), replace(OPTIONS, per_head=per_head)
    slot = batch["heads"]["slot"]
    before = numbers(loss_of(batch, options))
    hidden = torch.where(slot.relevance, slot.log_probs, -math.inf).requires_grad_()
    anchor = torch.where(slot.relevance, slot.anchor_log_probs, -math.inf)
    loss = loss_of(changed(batch, "slot", log_probs=hidden, anchor_log_probs=anchor), options)
    loss.total.backward()
    assert numbers(loss) == before
    assert hidden.grad is not None
    assert (hidden.grad[~slot.relevance] == 0).all()
    assert hidden.grad.isfinite().all()


def test_log_ratios_beyond_any_number_keep_the_loss_finite() -> None:
    batch = random_batch(8)
    op = batch["heads"]["op"]
    for sign in (1, -1):
        wild = changed(batch, "op", log_probs=op.anchor_log_probs + sign * 1e4)
        assert all(math.isfinite(number) for number in numbers(loss_of(wild)).values())


@pytest.mark.parametrize("per_head", [True, False])
def test_weights_of_zero_everywhere_give_zero_and_zero_gradients(per_head: bool) -> None:
    batch = random_batch(9)
    batch["policy_weights"].zero_()
    batch["value_weights"].zero_()
    op = batch["heads"]["op"]
    leaves = [op.log_probs.requires_grad_(), op.entropies.requires_grad_(), batch["values"].requires_grad_()]
    loss = loss_of(batch, replace(OPTIONS, per_head=per_head))
    loss.total.backward()
    assert loss.total == 0
    for leaf in leaves:
        assert leaf.grad is not None
        assert not leaf.grad.any()


@pytest.mark.parametrize("per_head", [True, False])
def test_the_size_of_the_loss_does_not_depend_on_the_size_of_the_batch(per_head: bool) -> None:
    batch, options = random_batch(10), replace(OPTIONS, per_head=per_head)
    twice = {name: torch.cat([t, t], dim=1) for name, t in batch.items() if name != "heads"}
    heads = {
        name: PpoHead(*(torch.cat([part, part], dim=1) for part in head))
        for name, head in batch["heads"].items()
    }
    assert numbers(loss_of(twice | {"heads": heads}, options)) == pytest.approx(
        numbers(loss_of(batch, options)), abs=1e-9
    )


@pytest.mark.parametrize("name", sorted(set(random_batch(0)) - {"heads", "advantages"}))
def test_a_wrong_shape_is_refused_by_name(name: str) -> None:
    batch = random_batch(11)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        loss_of(batch | {name: batch[name][:, :1]})


@pytest.mark.parametrize("part", PpoHead._fields)
def test_a_wrong_shape_of_a_head_is_refused_by_name(part: str) -> None:
    batch = random_batch(12)
    short = {part: getattr(batch["heads"]["slot"], part)[:, :1]}
    with pytest.raises(ValueError, match=f"^{part} of slot must be"):
        loss_of(changed(batch, "slot", **short))


def test_a_policy_without_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one head"):
        loss_of(random_batch(13) | {"heads": {}})


# -- targets -----------------------------------------------------------------------------------------------------------


def target_arguments(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    arrays = {
        "log_rhos": rng.normal(size=(7, 3)),
        "discounts": np.where(rng.random((7, 3)) < 0.25, 0.0, 0.97),
        "rewards": rng.normal(size=(7, 3)),
        "values": rng.normal(size=(7, 3)),
        "bootstrap_value": rng.normal(size=3),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def test_ppo_estimates_by_gae() -> None:
    arguments = target_arguments(1)
    found = ppo_targets(advantages="gae", lambda_=0.9, **arguments)
    expected = gae(**{n: t for n, t in arguments.items() if n != "log_rhos"}, lambda_=0.9)
    assert torch.equal(found.advantages, expected.advantages)
    assert torch.equal(found.value_targets, expected.returns)
    assert torch.equal(found.importance, arguments["log_rhos"].exp().clamp(max=1))


def test_appo_estimates_by_vtrace_without_the_weight_that_the_loss_has() -> None:
    arguments = target_arguments(2)
    found = ppo_targets(
        advantages="vtrace", lambda_=0.9, clip_rho=1.5, clip_c=0.8, clip_importance=None, **arguments
    )
    expected = vtrace(**arguments, clip_rho=1.5, clip_c=0.8, clip_pg_rho=None, lambda_=0.9)
    assert torch.equal(found.value_targets, expected.vs)
    assert torch.allclose(found.importance * found.advantages, expected.pg_advantages, rtol=0, atol=1e-12)


@pytest.mark.parametrize("advantages", ["gae", "vtrace"])
def test_on_policy_importance_is_exactly_one_and_both_estimates_agree_at_lambda_one(advantages: Any) -> None:
    arguments = target_arguments(3) | {"log_rhos": torch.zeros(7, 3, dtype=torch.float64)}
    found = ppo_targets(advantages=advantages, lambda_=1.0, **arguments)
    assert torch.equal(found.importance, torch.ones(7, 3, dtype=torch.float64))
    following = arguments["bootstrap_value"]
    for t in reversed(range(7)):
        following = arguments["rewards"][t] + arguments["discounts"][t] * following
        assert torch.allclose(found.value_targets[t], following, rtol=0, atol=1e-12)
        assert torch.allclose(found.advantages[t], following - arguments["values"][t], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["discounts", "rewards", "values", "bootstrap_value"])
def test_a_wrong_shape_of_a_target_is_refused_by_name(name: str) -> None:
    arguments = target_arguments(4)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        ppo_targets(advantages="gae", lambda_=0.9, **arguments | {name: arguments[name][..., :1]})


# -- normalisation -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_normalised_advantages_have_mean_zero_and_deviation_one_over_valid_steps(
    seed: int, some: bool
) -> None:
    rng = np.random.default_rng(seed)
    advantages = torch.from_numpy(3 + 5 * rng.normal(size=(6, 4)))
    valid = torch.from_numpy(rng.random((6, 4)) < 0.7)
    valid[0, :2] = True
    chosen = valid if some else torch.ones_like(valid)
    found = normalise_advantages(advantages, chosen if some else None)
    kept = [a for a, v in zip(advantages.flatten().tolist(), chosen.flatten().tolist(), strict=True) if v]
    mean_, deviation = np.mean(kept), max(0.1, np.std(kept))
    expected = [(a - mean_) / deviation for a in kept]
    assert found[chosen].tolist() == pytest.approx(expected, abs=1e-9)
    assert (found[~chosen] == 0).all()


def test_advantages_that_are_all_but_equal_are_not_blown_up() -> None:
    found = normalise_advantages(torch.tensor([[1.0, 1.01], [1.0, 1.01]], dtype=torch.float64))
    assert found.flatten().tolist() == pytest.approx([-0.05, 0.05, -0.05, 0.05])
    assert normalise_advantages(torch.tensor([[7.0]])).item() == 0
    assert not normalise_advantages(torch.rand(3, 2), torch.zeros(3, 2)).any()


def test_invalid_advantages_may_be_anything_and_shapes_must_agree() -> None:
    advantages, valid = torch.tensor([[1.0, math.nan], [3.0, math.inf]]), torch.tensor([[1, 0], [1, 0]])
    assert normalise_advantages(advantages, valid).tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    with pytest.raises(ValueError, match="^valid must be"):
        normalise_advantages(advantages, valid[:1])


# -- minibatches -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.data())
def test_each_epoch_sees_each_row_once(rows: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, rows))
    rng = np.random.default_rng(7)
    for _ in range(2):
        cut = minibatches(rows, count, rng)
        assert len(cut) == count
        assert sorted(np.concatenate(cut).tolist()) == list(range(rows))
        assert max(map(len, cut)) - min(map(len, cut)) <= 1


def test_each_epoch_draws_one_permutation_of_its_own() -> None:
    one, other = np.random.default_rng(1), np.random.default_rng(1)
    first = np.concatenate(minibatches(32, 4, one))
    assert first.tolist() == other.permutation(32).tolist()
    second = np.concatenate(minibatches(32, 4, one))
    assert second.tolist() == other.permutation(32).tolist()
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("count", [0, 5])
def test_more_minibatches_than_rows_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="4 rows cannot be cut"):
        minibatches(4, count, np.random.default_rng(0))
