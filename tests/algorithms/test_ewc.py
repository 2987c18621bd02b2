"""Elastic weight consolidation: the Fisher against its definition, the penalty, merging, choosing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from esper_simic.algorithms.ewc import Consolidation, choose_parameters, consolidate, estimate_fisher

Named = dict[str, Tensor]


def linear_policy(seed: int) -> Named:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in (("weight", (4, 3)), ("bias", (4,)), ("unused", (2,)))
    }


def log_policy(parameters: Named, x: Tensor) -> Tensor:
    return (x @ parameters["weight"].T + parameters["bias"]).log_softmax(-1)


def sampler(parameters: Named, rng: np.random.Generator) -> Callable[[Tensor], Tensor]:
    def log_prob_of_samples(x: Tensor) -> Tensor:
        log_probs = log_policy(parameters, x)
        chances = log_probs.detach().exp().numpy()
        labels = torch.tensor([rng.choice(len(p), p=p / p.sum()) for p in chances])
        return log_probs.gather(1, labels.unsqueeze(1)).squeeze(1)

    return log_prob_of_samples


def by_finite_differences(parameters: Named, log_prob: Callable[[], Tensor], name: str) -> Tensor:
    """d log_prob / d theta, one number of theta after the other."""
    flat = parameters[name].detach().view(-1)
    found = []
    for i in range(flat.numel()):
        ends = []
        for step in (1e-6, -2e-6):
            flat[i] += step
            ends.append(float(log_prob().detach()))
        flat[i] += 1e-6
        found.append((ends[0] - ends[1]) / 2e-6)
    return torch.tensor(found, dtype=torch.float64).view(parameters[name].shape)


def test_it_is_the_mean_of_squared_gradients_of_single_samples() -> None:
    parameters = linear_policy(1)
    batches = [torch.randn(n, 3, dtype=torch.float64) for n in (3, 1, 2)]
    labels = iter([0, 3, 1, 2, 2, 0])

    def log_prob_of_samples(x: Tensor) -> Tensor:
        chosen = torch.tensor([next(labels) for _ in x])
        return log_policy(parameters, x).gather(1, chosen.unsqueeze(1)).squeeze(1)

    found = estimate_fisher(log_prob_of_samples, batches, parameters)
    assert found.samples == 6

    def chance_of(x: Tensor, label: int) -> Callable[[], Tensor]:
        return lambda: log_policy(parameters, x.unsqueeze(0))[0, label]

    for name in parameters:
        labels_again = iter([0, 3, 1, 2, 2, 0])
        total = torch.zeros_like(parameters[name])
        for x in torch.cat(batches):
            label = next(labels_again)
            total += by_finite_differences(parameters, chance_of(x, label), name) ** 2
        assert torch.allclose(found.diagonal[name], total / 6, rtol=1e-6, atol=1e-8), name
    assert not found.diagonal["unused"].any()
    assert all(parameter.grad is None for parameter in parameters.values())


def test_with_sampled_labels_it_is_the_curvature_of_the_divergence() -> None:
    """And with the most probable label it would not be: the estimate meets the truth that argmax misses."""
    parameters = linear_policy(2)
    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    here = log_policy(parameters, x).detach()

    def divergence(weight: Tensor) -> Tensor:
        return (here.exp() * (here - log_policy(parameters | {"weight": weight}, x))).sum()

    hessian = torch.autograd.functional.hessian(divergence, parameters["weight"].detach())
    curvature = hessian.reshape(12, 12).diagonal().reshape(4, 3)
    rng = np.random.default_rng(3)
    batches = (x.expand(8, 3) for _ in range(250))
    found = estimate_fisher(sampler(parameters, rng), batches, parameters, names=["weight"])
    assert found.samples == 2000
    assert torch.allclose(found.diagonal["weight"], curvature, rtol=0.15, atol=0.01)
    certain = estimate_fisher(lambda x: log_policy(parameters, x).amax(-1), [x], parameters, names=["weight"])
    assert not torch.allclose(certain.diagonal["weight"], curvature, rtol=0.15, atol=0.01)


def test_the_sum_over_a_sequence_estimates_the_sum_of_its_decisions() -> None:
    """Labels independent given what was observed: products of different steps vanish in the mean."""
    parameters = linear_policy(4)
    rng = np.random.default_rng(5)
    steps = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draw = sampler(parameters, rng)
    each = estimate_fisher(draw, (steps for _ in range(800)), parameters, names=["bias"])
    whole = estimate_fisher(
        lambda x: draw(x).sum(0, keepdim=True) / 3**0.5,
        (steps for _ in range(2400)),
        parameters,
        names=["bias"],
    )
    assert torch.allclose(whole.diagonal["bias"], each.diagonal["bias"], rtol=0.15, atol=0.005)


def test_a_recurrent_policy_needs_nothing_more() -> None:
    torch.manual_seed(6)
    core, head = nn.LSTM(3, 4).double(), nn.Linear(4, 2).double()
    parameters = dict(core.named_parameters()) | {f"head.{n}": p for n, p in head.named_parameters()}
    sequences = torch.randn(5, 2, 3, dtype=torch.float64)
    labels = torch.randint(2, (5, 2))

    def log_prob_of_samples(x: Tensor) -> Tensor:
        log_probs: Tensor = head(core(x)[0]).log_softmax(-1)
        return log_probs.gather(2, labels[:, : x.shape[1], None]).squeeze(2).sum(0)

    found = estimate_fisher(log_prob_of_samples, [sequences], parameters)
    for name, parameter in parameters.items():
        gradients = [
            torch.autograd.grad(log_prob_of_samples(sequences)[lane], parameter)[0] for lane in range(2)
        ]
        expected = (gradients[0] ** 2 + gradients[1] ** 2) / 2
        assert torch.allclose(found.diagonal[name], expected, rtol=1e-12, atol=1e-15)


def test_it_stops_at_the_number_asked_for_and_takes_no_more_batches() -> None:
    parameters = linear_policy(7)
    taken = []

    def batches() -> Iterable[Tensor]:
        for index in range(10):
            taken.append(index)
            yield torch.ones(4, 3, dtype=torch.float64)

    draw = sampler(parameters, np.random.default_rng(8))
    assert estimate_fisher(draw, batches(), parameters, samples_max=10).samples == 10
    assert taken == [0, 1, 2]
    assert estimate_fisher(draw, batches(), parameters, samples_max=8).samples == 8
    assert taken == [0, 1, 2, 0, 1]
    assert estimate_fisher(draw, [torch.ones(3, 3).double()], parameters, samples_max=200).samples == 3


def test_a_subset_is_what_all_would_have_given() -> None:
    parameters = linear_policy(9)
    x = torch.randn(4, 3, dtype=torch.float64)
    whole, part = (
        estimate_fisher(sampler(parameters, np.random.default_rng(1)), [x], parameters, names=names).diagonal
        for names in (None, {"bias"})
    )
    assert list(part) == ["bias"]
    assert torch.equal(part["bias"], whole["bias"])


def test_estimates_without_sense_are_refused() -> None:
    parameters = linear_policy(10)
    draw = sampler(parameters, np.random.default_rng(1))
    x = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="no sample"):
        estimate_fisher(draw, [], parameters)
    with pytest.raises(ValueError, match="no parameter wait; there are: weight, bias, unused"):
        estimate_fisher(draw, [x], parameters, names=["wait", "bias"])
    with pytest.raises(ValueError, match="samples_max"):
        estimate_fisher(draw, [x], parameters, samples_max=0)
    for wrong in (lambda x: draw(x).sum(), lambda x: draw(x).detach()):
        with pytest.raises(ValueError, match="must give .N. with gradient"):
            estimate_fisher(wrong, [x], parameters)


# -- penalty -----------------------------------------------------------------------------------------------------------


def random_consolidation(seed: int) -> tuple[Consolidation, Named]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes: dict[str, tuple[int, ...]] = {"weight": (4, 3), "bias": (4,), "scale": ()}
    held = Consolidation(
        {name: normal(*shape) for name, shape in shapes.items()},
        {name: normal(*shape).square() for name, shape in shapes.items()},
    )
    return held, {name: normal(*shape).requires_grad_() for name, shape in shapes.items()}


@given(st.integers(0, 2**31))
def test_the_penalty_is_half_the_weighted_square_of_the_distance(seed: int) -> None:
    held, parameters = random_consolidation(seed)
    expected = 0.0
    for name, anchor in held.anchors.items():
        rows = zip(
            held.fisher[name].flatten().tolist(),
            parameters[name].flatten().tolist(),
            anchor.flatten().tolist(),
            strict=True,
        )
        expected += sum(f * (theta - a) ** 2 / 2 for f, theta, a in rows)
    found = held.penalty(parameters | {"another": torch.ones(9)}).detach()
    assert float(found) == pytest.approx(expected, rel=1e-12)
    assert found >= 0


def test_its_gradient_equals_finite_differences_and_pulls_to_the_anchors() -> None:
    held, parameters = random_consolidation(1)
    names = list(parameters)
    assert torch.autograd.gradcheck(
        lambda *thetas: held.penalty(dict(zip(names, thetas, strict=True))), tuple(parameters.values())
    )
    (0.25 * held.penalty(parameters)).backward()
    for name, parameter in parameters.items():
        expected = 0.25 * held.fisher[name] * (parameter.detach() - held.anchors[name])
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected, rtol=0, atol=1e-14)


def test_at_the_anchors_penalty_and_gradient_are_exactly_zero() -> None:
    held, _ = random_consolidation(2)
    there = {name: anchor.clone().requires_grad_() for name, anchor in held.anchors.items()}
    penalty = held.penalty(there)
    penalty.backward()
    assert penalty == 0
    assert all(t.grad is not None and not t.grad.any() for t in there.values())
    with torch.no_grad():
        assert held.penalty(there) == 0


def test_it_is_the_second_order_of_the_divergence_from_the_policy_at_the_anchors() -> None:
    """What consolidation is for: lambda = 1 and one parameter moved, the penalty is KL(pi* || pi) to second order."""
    parameters = linear_policy(11)
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rng = np.random.default_rng(12)
    fisher = estimate_fisher(sampler(parameters, rng), (x for _ in range(150)), parameters, names=["bias"])
    held = consolidate(None, fisher.diagonal, parameters)
    before = log_policy(parameters, x).detach()
    moved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    moved["bias"][1] += 0.05
    divergence = (before.exp() * (before - log_policy(moved, x))).sum(-1).mean()
    assert float(held.penalty(moved)) == pytest.approx(float(divergence), rel=0.15)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"weight": torch.zeros(3, 3).double()}, "^weight must be"),
        ({"weight": torch.zeros(4, 3)}, "^weight must be .*float64, it is .*float32"),
    ],
)
def test_other_parameters_are_refused_by_name(wrong: Named, says: str) -> None:
    held, parameters = random_consolidation(3)
    with pytest.raises(ValueError, match=says):
        held.penalty(parameters | wrong)
    with pytest.raises(ValueError, match="parameter weight is held"):
        held.penalty({name: t for name, t in parameters.items() if name != "weight"})


@pytest.mark.parametrize(
    ("anchors", "fisher", "says"),
    [
        ({}, {}, "at least one"),
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}, r"anchors alone: \['a'\], fisher alone: \['b'\]"),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, "^fisher of a must be"),
        ({"a": torch.zeros(2)}, {"a": torch.tensor([1.0, -1.0])}, "^fisher of a must be >= 0"),
        ({"a": torch.zeros(1)}, {"a": torch.tensor([float("nan")])}, "^fisher of a must be >= 0 and finite"),
    ],
)
def test_consolidations_without_sense_are_refused(anchors: Named, fisher: Named, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Consolidation(anchors, fisher)


# -- tasks one after the other -----------------------------------------------------------------------------------------


def test_fishers_add_up_and_anchors_are_the_newest() -> None:
    first = consolidate(None, {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([5.0, 6.0])})
    now = {"a": torch.tensor([7.0, 8.0]), "b": torch.tensor([9.0])}
    second = consolidate(first, {"a": torch.tensor([10.0, 20.0]), "b": torch.tensor([3.0])}, now, decay=0.5)
    assert {name: f.tolist() for name, f in second.fisher.items()} == {"a": [10.5, 21.0], "b": [3.0]}
    assert {name: f.tolist() for name, f in second.anchors.items()} == {"a": [7.0, 8.0], "b": [9.0]}
    third = consolidate(second, {"b": torch.tensor([1.0])}, now)
    assert {name: f.tolist() for name, f in third.fisher.items()} == {"a": [10.5, 21.0], "b": [4.0]}


def test_a_consolidation_does_not_follow_the_parameters_it_was_made_of() -> None:
    parameters, fisher = {"a": torch.ones(2, requires_grad=True)}, {"a": torch.ones(2)}
    held = consolidate(None, fisher, parameters)
    with torch.no_grad():
        parameters["a"] += 1
    fisher["a"] += 1
    assert held.anchors["a"].tolist() == [1, 1]
    assert held.fisher["a"].tolist() == [1, 1]
    assert not held.anchors["a"].requires_grad


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        consolidate(None, {"a": torch.ones(1)}, {"a": torch.ones(1)}, decay=decay)


def test_parameters_that_are_held_must_be_there() -> None:
    held = consolidate(None, {"a": torch.ones(1)}, {"a": torch.ones(1)})
    with pytest.raises(ValueError, match="parameters must have a, b"):
        consolidate(held, {"b": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="^fisher of a must be"):
        consolidate(held, {"a": torch.ones(2)}, {"a": torch.ones(1)})


def test_it_survives_as_tensors() -> None:
    held, _ = random_consolidation(4)
    tensors = held.tensors()
    assert sorted(tensors) == sorted(f"{kind}.{n}" for kind in ("anchor", "fisher") for n in held.anchors)
    again = Consolidation.from_tensors(tensors)
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="not a consolidation's: weight"):
        Consolidation.from_tensors(tensors | {"weight": torch.zeros(1)})


@pytest.mark.parametrize("seed", range(4))
def test_the_order_in_which_a_file_gives_its_tensors_is_nothing_to_it(seed: int) -> None:
    """A checkpoint's are in no order that was chosen; and some of these are of the same shape."""
    rng = np.random.default_rng(seed)
    shapes = {"c": (3,), "a": (3,), "d": (2, 2), "b": (3,), "e": (4, 1)}

    def drawn() -> Named:
        return {
            name: torch.from_numpy(rng.random(shape).astype(np.float32)) for name, shape in shapes.items()
        }

    held, parameters = Consolidation(drawn(), drawn()), drawn()
    tensors = held.tensors()
    order = [list(tensors)[index] for index in rng.permutation(len(tensors))]
    again = Consolidation.from_tensors({name: tensors[name] for name in order})
    assert torch.equal(again.penalty(parameters), held.penalty(parameters))
    expected = sum((held.fisher[n] * (parameters[n] - held.anchors[n]).square()).sum() / 2 for n in shapes)
    torch.testing.assert_close(again.penalty(parameters), expected)
    assert list(again.anchors) == list(again.fisher) == list(held.anchors) == list(held.fisher)


# -- subsets -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.floats(0.001, 1), st.lists(st.integers(1, 50), min_size=1, max_size=12))
def test_chosen_parameters_hold_the_fraction_and_no_more_than_one_too_many(
    seed: int, fraction: float, sizes: list[int]
) -> None:
    parameters = {f"p{index}": torch.zeros(size) for index, size in enumerate(sizes)}
    chosen = choose_parameters(parameters, fraction, np.random.default_rng(seed))
    held = [parameters[name].numel() for name in chosen]
    assert sum(held) >= fraction * sum(sizes) - 1e-9
    assert sum(held) - max(held) < fraction * sum(sizes)
    assert list(chosen) == [name for name in parameters if name in chosen]
    assert chosen == choose_parameters(parameters, fraction, np.random.default_rng(seed))


def test_all_are_chosen_at_one_and_each_has_its_chance() -> None:
    parameters: dict[str, Any] = {name: torch.zeros(3) for name in "abcd"}
    assert choose_parameters(parameters, 1.0, np.random.default_rng(0)) == ("a", "b", "c", "d")
    seen = {choose_parameters(parameters, 0.25, np.random.default_rng(seed)) for seed in range(60)}
    assert seen == {("a",), ("b",), ("c",), ("d",)}


@pytest.mark.parametrize(("parameters", "fraction"), [({"a": torch.zeros(1)}, 0.0), ({}, 0.5)])
def test_no_fraction_and_no_parameters_are_refused(parameters: Named, fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        choose_parameters(parameters, fraction, np.random.default_rng(0))
