"""Compositions: gates and joins against ordinary modules and automatic differentiation, and laws to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper_simic.errors import InvariantViolation
from esper_simic.growing_host import compositions
from esper_simic.growing_host.alpha import Composition
from esper_simic.growing_host.blueprints import CATALOGUE, blueprint
from esper_simic.growing_host.compositions import (
    Grown,
    Join,
    Joins,
    compose,
    gate,
    gate_parameter_count,
    grow,
    initial_gate,
    initial_seed,
    seed_parameter_count,
)
from tests.growing_host import literal_blueprints as literal

ADD, MULTIPLY, GATE = Composition.ADD, Composition.MULTIPLY, Composition.GATE
FORMS = [(name, kind) for name, found in CATALOGUE.items() for kind in sorted(found.kinds)]
SHAPES = {"image": (4, 4), "series": (1, 6), "vector": (1, 1), "tokens": (1, 5)}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def bits(x: Tensor) -> bytes:
    return x.detach().contiguous().numpy().tobytes()


# ---- gates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "count"), [(1, 8 + 8 + 8 + 1), (8, 81), (32, 273), (64, 64 * 16 + 33)])
def test_gate_parameter_count(channels, count):
    assert gate_parameter_count(channels) == count == len(initial_gate(channels, np.random.default_rng(0)))


@pytest.mark.parametrize("channels", [1, 3, 48])
@pytest.mark.parametrize("kind", literal.KINDS)
def test_a_gate_is_an_ordinary_module(kind, channels):
    rng = np.random.default_rng(1)
    rows = torch.from_numpy(rng.normal(0, 0.5, (3, gate_parameter_count(channels)))).requires_grad_()
    x = random(3, channels, *SHAPES[kind], 4).requires_grad_()
    ours = gate(rows, x, kind)
    weights = random(*ours.shape, seed=1)
    g_rows, g_x = torch.autograd.grad((ours * weights).sum(), [rows, x])
    for row in range(3):
        made = literal.Gate(channels).double()
        literal.load(made, rows[row])
        own = x[row].detach().requires_grad_()
        expected = made(literal.to_torch(own, kind), kind)
        shown = ours[row, 0, 0]
        torch.testing.assert_close(
            shown, expected.t() if kind == "tokens" else expected[None], atol=1e-10, rtol=0
        )
        weighed = weights[row, 0, 0]
        total = (expected * (weighed.t() if kind == "tokens" else weighed[0])).sum()
        g_row, g_own = literal.gradient_row(total, made, own)
        torch.testing.assert_close(g_rows[row], g_row, atol=1e-10, rtol=0)
        torch.testing.assert_close(g_x[row], g_own, atol=1e-10, rtol=0)


def test_a_gate_of_a_text_does_not_see_what_follows():
    row = torch.from_numpy(initial_gate(4, np.random.default_rng(0)))[None]
    x = random(1, 4, 1, 6, 2)
    other = x.clone()
    other[..., 3, :] += 1
    assert torch.equal(gate(row, x, "tokens")[..., :3, :], gate(row, other, "tokens")[..., :3, :])
    assert not torch.isclose(gate(row, x, "tokens")[..., 3:, :], gate(row, other, "tokens")[..., 3:, :]).any()


def test_gates_start_half_open():
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(np.stack([initial_gate(8, rng) for _ in range(64)]))
    opened = gate(rows, random(64, 8, 2, 2, 8))
    assert float((opened - 0.5).abs().max()) < 0.25
    assert float(opened.mean()) == pytest.approx(0.5, abs=0.02)


# ---- joins against the formulas ----------------------------------------------------------------------------


def literal_row(composition, host, seed, opened, alpha, alone):
    """One row, by the formula of its composition; torch differentiates it."""
    if alone:
        return host + (seed - seed.detach())
    if composition is ADD:
        return (1 - alpha) * host + alpha * seed
    if composition is MULTIPLY:
        return host * (1 + alpha * torch.tanh(seed))
    return (1 - alpha * opened) * host + alpha * opened * seed


class Scene:
    """Five host rows; joins of any composition on some of them."""

    def __init__(self, layout, *, rows=5, shape=(2, 3, 4), samples=3, seed=0, per_position=False):
        self.host = random(rows, *shape[:1], *shape[1:], samples, seed=seed).requires_grad_()
        self.joins, self.grown, self.layout = [], [], layout
        for index, (composition, chosen, alphas, isolated) in enumerate(layout):
            n = rows if chosen is None else len(chosen)
            seeds = random(n, *shape, samples, seed=10 + index).requires_grad_()
            gates = None
            if composition is GATE:
                width = shape[2] if per_position else 1
                gates = torch.sigmoid(random(n, 1, 1, width, samples, seed=20 + index)).requires_grad_()
            alone = isolated if isinstance(isolated, bool) else torch.tensor(isolated)
            where = None if chosen is None else torch.tensor(chosen)
            self.joins.append(Join(composition, where, torch.tensor(alphas, dtype=torch.float64), alone))
            self.grown.append(Grown(seeds, gates))

    def expected(self):
        rows = list(self.host)
        for (composition, chosen, alphas, isolated), each in zip(self.layout, self.grown, strict=True):
            for position, row in enumerate(range(len(rows)) if chosen is None else chosen):
                alone = isolated if isinstance(isolated, bool) else isolated[position]
                opened = None if each.gates is None else each.gates[position]
                rows[row] = literal_row(
                    composition, rows[row], each.seeds[position], opened, alphas[position], alone
                )
        return torch.stack(rows)

    def leaves(self):
        return [self.host, *(t for each in self.grown for t in (each.seeds, each.gates) if t is not None)]


LAYOUTS = {
    "one added": [(ADD, [2], [0.3], False)],
    "all added": [(ADD, None, [0.0, 0.2, 0.5, 0.9, 1.0], False)],
    "all multiplied": [(MULTIPLY, None, [0.0, 0.2, 0.5, 0.9, 1.0], False)],
    "all gated": [(GATE, None, [0.0, 0.2, 0.5, 0.9, 1.0], False)],
    "all isolated": [(MULTIPLY, None, [0.3] * 5, True)],
    "some isolated": [(MULTIPLY, [4, 0], [0.6, 0.6], True)],
    "added, one of them isolated": [
        (ADD, None, [0.3, 0.0, 0.5, 0.9, 1.0], [False, True, False, False, False])
    ],
    "gated, one of them isolated": [(GATE, [3, 1], [0.3, 0.4], [False, True])],
    "each its own way": [
        (ADD, [3], [0.4], False),
        (MULTIPLY, [0, 4], [0.7, 0.1], [False, True]),
        (GATE, [2], [0.5], False),
        (ADD, [1], [0.0], True),
    ],
    "neighbours added": [
        (ADD, [3], [0.4], False),
        (ADD, [0, 4], [0.7, 0.1], [False, True]),
        (ADD, [2], [0.5], True),
        (ADD, [1], [0.6], False),
    ],
    "neighbours multiplied": [(MULTIPLY, [3, 0], [0.4, 0.9], [True, False]), (MULTIPLY, [1], [0.7], False)],
    "neighbours gated": [
        (ADD, [1], [0.7], False),
        (GATE, [3, 0], [0.4, 0.9], False),
        (GATE, [4, 2], [0.7, 0.2], [False, True]),
    ],
}


@pytest.fixture(params=[0, 2**40], ids=["joined one by one", "neighbours merged"])
def merging(request, monkeypatch):
    monkeypatch.setattr(compositions, "MERGED_ELEMENTS_MAX", request.param)


@pytest.mark.usefixtures("merging")
@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_joins_are_their_formulas(layout, per_position):
    scene = Scene(layout, per_position=per_position)
    ours, expected = compose(scene.host, Joins.of(scene.joins), scene.grown), scene.expected()
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)
    weights = random(*ours.shape, seed=99)
    got = torch.autograd.grad((ours * weights).sum(), scene.leaves(), allow_unused=True)
    wanted = torch.autograd.grad((expected * weights).sum(), scene.leaves(), allow_unused=True)
    for a, b, leaf in zip(got, wanted, scene.leaves(), strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, atol=1e-10, rtol=0)


def test_neighbours_of_one_composition_are_merged_but_for_isolated_ones():
    scene = Scene(LAYOUTS["neighbours added"])
    assert Joins.of(scene.joins).members == ((0, 2), (2, 3), (3, 4))
    scene = Scene(LAYOUTS["neighbours gated"])
    assert Joins.of(scene.joins).members == ((0, 1), (1, 3))


def test_seeds_that_do_not_learn_need_no_gradient():
    for composition in Composition:
        scene = Scene([(composition, [1, 3], [0.4, 0.6], False)])
        still = [
            Grown(each.seeds.detach(), None if each.gates is None else each.gates.detach())
            for each in scene.grown
        ]
        weights = random(*scene.host.shape, seed=5)
        got = torch.autograd.grad(
            (compose(scene.host, Joins.of(scene.joins), still) * weights).sum(), scene.host
        )
        wanted = torch.autograd.grad((scene.expected() * weights).sum(), scene.host)
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)


def test_a_slot_without_seeds_is_its_host():
    host = random(2, 1, 1, 1, 1)
    assert compose(host, Joins.of(()), ()) is host


def test_the_host_is_not_overwritten():
    for layout in LAYOUTS.values():
        scene = Scene(layout)
        before, seeds = bits(scene.host), [bits(each.seeds) for each in scene.grown]
        weights = random(*scene.host.shape, seed=5)
        kept = bits(weights)
        torch.autograd.grad(
            compose(scene.host, Joins.of(scene.joins), scene.grown),
            scene.leaves(),
            weights,
            allow_unused=True,
        )
        assert (bits(scene.host), [bits(each.seeds) for each in scene.grown], bits(weights)) == (
            before,
            seeds,
            kept,
        )


def test_a_join_of_all_rows_stands_alone():
    scene = Scene([(ADD, None, [0.5] * 5, False), (ADD, [1], [0.5], False)])
    with pytest.raises(InvariantViolation, match="all rows beside 1 others"):
        compose(scene.host, Joins.of(scene.joins), scene.grown)


def test_gates_belong_to_the_composition_gate():
    gated, added = Scene([(GATE, [1], [0.5], False)]), Scene([(ADD, [1], [0.5], False)])
    with pytest.raises(InvariantViolation, match="by GATE without gates"):
        compose(gated.host, Joins.of(gated.joins), added.grown)
    with pytest.raises(InvariantViolation, match="by ADD with gates"):
        compose(added.host, Joins.of(added.joins), gated.grown)


# ---- laws to the bit ---------------------------------------------------------------------------------------

WILD = st.sampled_from([0.0, -0.0, 1.0, -1e-45, 3e38, -3e38, float("inf"), float("-inf"), float("nan"), 1e-3])
ROWS = 4


def wild(draw, *shape):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    for _ in range(draw(st.integers(0, 4))):
        values.view(-1)[draw(st.integers(0, values.numel() - 1))] = draw(WILD)
    return values


@st.composite
def scenes(draw):
    """A host, joins with isolated and (perhaps) blended seeds, and an output gradient, all float32."""
    shape = (2, 2, 2, 3)
    host, gradient = wild(draw, ROWS, *shape), wild(draw, ROWS, *shape)
    order = draw(st.permutations(range(ROWS)))
    cuts = sorted(draw(st.sets(st.integers(1, ROWS), min_size=1, max_size=3)))
    everywhere = cuts == [ROWS] and draw(st.booleans())
    joins, grown, alone = [], [], []
    for first, last in zip([0, *cuts], cuts, strict=False):
        count = last - first
        rows = list(range(ROWS)) if everywhere else order[first:last]
        isolated = draw(
            st.sampled_from([[True] * count, [False] * count])
            | st.lists(st.booleans(), min_size=count, max_size=count)
        )
        composition = draw(st.sampled_from(Composition))
        gates = torch.sigmoid(wild(draw, count, 1, 1, 1, 3)) if composition is GATE else None
        alpha = torch.tensor(draw(st.lists(st.floats(0, 1, width=32), min_size=count, max_size=count)))
        same = all(isolated) or not any(isolated)
        apart = isolated[0] if same and draw(st.booleans()) else torch.tensor(isolated)
        joins.append(Join(composition, None if everywhere else torch.tensor(rows), alpha, apart))
        grown.append(Grown(wild(draw, count, *shape), gates))
        alone.append([(i, row) for i, (row, single) in enumerate(zip(rows, isolated, strict=True)) if single])
    untouched = [] if everywhere else order[cuts[-1] :]
    return host, gradient, joins, grown, alone, untouched


@pytest.mark.usefixtures("merging")
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scenes())
def test_a_seed_in_isolation_touches_no_bit_of_its_host_and_gets_every_bit_of_the_gradient(scene):
    host, gradient, joins, grown, alone, untouched = scene
    leaves = [host.requires_grad_(), *(each.seeds.requires_grad_() for each in grown)]
    gates = [each.gates.requires_grad_() for each in grown if each.gates is not None]
    out = compose(host, Joins.of(joins), grown)
    g_host, *others = torch.autograd.grad(out, [*leaves, *gates], gradient, allow_unused=True)
    for row in [*untouched, *(row for each in alone for _, row in each)]:
        assert bits(out[row]) == bits(host[row])
        assert bits(g_host[row]) == bits(gradient[row])
    g_gates = iter(others[len(grown) :])
    for g_seeds, each, positions in zip(others, grown, alone, strict=False):
        door = next(g_gates) if each.gates is not None else None
        for position, row in positions:
            assert bits(g_seeds[position]) == bits(gradient[row])
            assert door is None or bits(door[position]) == bits(torch.zeros_like(door[position]))


@pytest.mark.parametrize("composition", Composition)
@given(seed=st.integers(0, 999))
def test_at_alpha_zero_a_blended_seed_changes_no_number(composition, seed):
    scene = Scene([(composition, [2, 0], [0.0, 0.0], False)], seed=seed)
    assert torch.equal(compose(scene.host, Joins.of(scene.joins), scene.grown), scene.host)


@pytest.mark.parametrize(("name", "kind"), FORMS)
@given(alpha=st.floats(0, 1, width=32), seed=st.integers(0, 999))
@settings(max_examples=10)
def test_a_multiplied_seed_starts_as_the_identity_whatever_alpha(name, kind, alpha, seed):
    found, rng = blueprint(name), np.random.default_rng(seed)
    row = torch.from_numpy(initial_seed(found, MULTIPLY, 8, rng, kind)).float()[None]
    host = random(1, 8, *SHAPES[kind], 4, seed=seed, dtype=torch.float32)
    grown = grow(found, MULTIPLY, row, host, kind)
    out = compose(host, Joins.of([Join(MULTIPLY, None, torch.tensor([alpha]))]), [grown])
    assert bits(out) == bits(host)


@pytest.mark.parametrize("composition", Composition)
@pytest.mark.parametrize(("name", "kind"), FORMS)
def test_every_blueprint_in_every_composition_is_the_formula(name, kind, composition):
    found, rng, channels = blueprint(name), np.random.default_rng(4), 8
    count = seed_parameter_count(found, composition, channels, kind)
    rows = torch.from_numpy(
        np.stack([initial_seed(found, composition, channels, rng, kind) for _ in range(2)])
        + rng.normal(0, 0.1, (2, count))
    ).requires_grad_()
    host = random(2, channels, *SHAPES[kind], 3).requires_grad_()
    alpha = torch.tensor([0.3, 0.8], dtype=torch.float64)
    ours = compose(
        host, Joins.of([Join(composition, None, alpha)]), [grow(found, composition, rows, host, kind)]
    )
    weights = random(*ours.shape, seed=8)
    g_rows, g_host = torch.autograd.grad((ours * weights).sum(), [rows, host])
    own_count = found.parameter_count(channels, kind)
    for row in range(2):
        made, door = literal.module(name, kind, channels), literal.Gate(channels).double()
        literal.load(made, rows[row, :own_count])
        modules = torch.nn.ModuleList([made])
        own = host[row].detach().requires_grad_()
        x = literal.to_torch(own, kind)
        if composition is MULTIPLY:
            blended = x * (1 + alpha[row] * torch.tanh(x + made.correction(x) - x))
        else:
            weight = alpha[row]
            if composition is GATE:
                literal.load(door, rows[row, own_count:])
                modules.append(door)
                opened = door(x, kind)
                weight = weight * (
                    opened[..., None] if kind == "tokens" else opened.view(-1, *[1] * (x.dim() - 1))
                )
            blended = (1 - weight) * x + weight * made(x)
        expected = literal.from_torch(blended, kind)
        torch.testing.assert_close(ours[row], expected, atol=1e-10, rtol=0)
        g_row, g_own = literal.gradient_row((expected * weights[row]).sum(), modules, own)
        torch.testing.assert_close(g_rows[row], g_row, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(g_host[row], g_own, atol=1e-10, rtol=1e-10)


def test_a_gated_row_is_the_blueprint_and_then_a_gate():
    found = blueprint("lora")
    plain = initial_seed(found, ADD, 8, np.random.default_rng(2), "vector")
    gated = initial_seed(found, GATE, 8, np.random.default_rng(2), "vector")
    np.testing.assert_array_equal(gated[: len(plain)], plain)
    assert len(gated) - len(plain) == gate_parameter_count(8) == 81
    assert seed_parameter_count(found, GATE, 8, "vector") == len(gated)


def test_an_isolated_gated_seed_trains_the_blueprint_but_not_its_gate():
    found = blueprint("conv_light")
    row = torch.from_numpy(initial_seed(found, GATE, 4, np.random.default_rng(2)))[None].requires_grad_()
    host = random(1, 4, 3, 3, 2)
    grown = grow(found, GATE, row, host, isolated=True)
    assert grown.gates is None
    out = compose(host, Joins.of([Join(GATE, None, torch.zeros(1, dtype=torch.float64), True)]), [grown])
    (gradient,) = torch.autograd.grad(out, row, random(*out.shape, seed=3))
    assert float(gradient[:, : found.parameter_count(4)].norm()) > 0.1
    assert not gradient[:, found.parameter_count(4) :].any()
