"""The engine: one update of any algorithm, and the last good state, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esper_simic.actions import HEADS
from esper_simic.errors import ConfigError
from esper_simic.safety import StepMode
from esper_simic.updates.batch import Batch
from esper_simic.updates.engine import Engine, check_heads
from esper_simic.updates.update import Terms, Updated
from tests.updates.ground import SPECS, Ground, copied, trainer, weights

ALGORITHMS = ("IMPALA", "PPO", "APPO", "BC", "IQL")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_good_state_comes_back_as_it_was(algorithm: str) -> None:
    ground = Ground(algorithm, "one")
    engine = ground.engine
    beginning = copied(engine.tensors())
    ground.update()
    ground.update()
    engine.restore_good()
    assert copied(engine.tensors()) == beginning, "of which nothing was kept is the beginning"
    ground.update()
    kept = copied(engine._living())
    engine.keep_good()
    for _ in range(2):
        ground.update()
        assert copied(engine._living()) != kept
        engine.restore_good()
        assert copied(engine._living()) == kept, "and it stays good, however often it is gone back to"
    ground.update()
    once = copied(engine._living())
    engine.restore_good()
    ground.update()
    assert {name: held for name, held in copied(engine._living()).items() if "normaliser" not in name} == {
        name: held for name, held in once.items() if "normaliser" not in name
    }, "and goes on as it did"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_another_engine_becomes_the_same(algorithm: str) -> None:
    one, two = Ground(algorithm, "one"), Ground(algorithm, "one")
    one.update()
    one.engine.keep_good()
    one.update()
    tensors = {name: tensor.clone() for name, tensor in one.engine.tensors().items()}
    two.engine.load_tensors(tensors)
    rates = one.engine.optimisers.rates.state_dict()
    two.engine.optimisers.rates.load_state_dict(rates)
    assert copied(two.engine.tensors()) == copied(one.engine.tensors())
    assert any(name.startswith("good.") for name in tensors)
    for ground in (one, two):
        ground.update(chance=3)
    assert copied(two.engine.tensors()) == copied(one.engine.tensors()) != copied(tensors)
    for ground in (one, two):
        ground.engine.restore_good()
    assert copied(two.engine.tensors()) == copied(one.engine.tensors())


def test_without_a_good_state_none_is_loaded() -> None:
    ground, other = Ground(), Ground()
    ground.update()
    other.engine.keep_good()
    other.engine.load_tensors({name: tensor.clone() for name, tensor in ground.engine.tensors().items()})
    assert not any(name.startswith("good.") for name in other.engine.tensors())


def test_what_is_kept_is_a_copy() -> None:
    ground = Ground()
    ground.engine.keep_good()
    kept = {n: t for n, t in ground.engine.tensors().items() if n.startswith("good.policy")}
    before = copied(kept)
    ground.update()
    assert copied(kept) == before


def test_tensors_of_another_shape_are_refused() -> None:
    other = Ground(hidden_size=32).engine.tensors()
    with pytest.raises(RuntimeError, match="size mismatch"):
        Ground().engine.load_tensors(other)


@pytest.mark.parametrize("algorithm", ["IMPALA", "IQL"])
@pytest.mark.parametrize("where", ["policy", "critics"])
def test_weights_that_are_not_finite_after_an_update_are_named(algorithm: str, where: str) -> None:
    ground = Ground(algorithm)
    engine, update = ground.engine, ground.engine._update
    if where == "critics" and engine._iql is None:
        assert not any(name.startswith("critics.") for name in engine.tensors())
        return

    def spoiling(batch: Batch, terms: Terms) -> Updated:
        updated = update(batch, terms)
        learned = engine._iql.critics if where == "critics" and engine._iql is not None else terms.policy
        with torch.no_grad():
            next(iter(learned.parameters())).view(-1)[-1] = torch.inf
        return updated

    engine._update = spoiling
    acting = copied(engine._acting_normaliser)
    with pytest.raises(FloatingPointError, match=r"weights of .* are not finite after the update") as caught:
        ground.update()
    assert ("critics." in str(caught.value)) == (where == "critics")
    assert copied(engine._acting_normaliser) == acting


def test_actors_get_the_normaliser_of_the_last_update() -> None:
    ground = Ground()
    engine = ground.engine
    before = copied(engine.acting_weights())
    seen = {key: tensor[:-1] for key, tensor in ground.trajectory.observations.items()}
    engine.policy.normaliser.update(seen)
    assert copied(engine.acting_weights()) == before
    ground.update()
    after = copied(engine.acting_weights())
    names = [name for name in before if name.startswith("normaliser.")]
    assert names
    assert any(after[name] != before[name] for name in names)


def test_rates_follow_the_modes_factor_and_tell_it() -> None:
    ground = Ground("IQL", value_lr=2e-3)
    ground.update()
    assert ground.engine.take_news() == ((), ())
    assert ground.engine.optimisers.rates.rates() == {"policy": 1e-3, "value": 2e-3, "critics": 2e-3}
    ground.update(StepMode(lr_factor=0.5))
    changed, tampered = ground.engine.take_news()
    assert [fact.name for fact in changed] == ["policy", "value", "critics"]
    assert tampered == ()
    assert ground.engine.optimisers.rates.rates() == {"policy": 5e-4, "value": 1e-3, "critics": 1e-3}


def test_optimisers_whose_parameters_stay_go_on_where_adapters_begin() -> None:
    """Critics have none: neither their moments nor their warm-up begin anew with the policy's."""
    ground = Ground("IQL", lora_start_step=2, lora_rank=2, warmup_epochs=8)
    for _ in range(2):
        ground.update()
    optimisers = ground.engine.optimisers
    of_critics = {name: t.clone() for name, t in optimisers.tensors().items() if name.startswith("critics.")}
    assert of_critics
    ground.engine.adapters_at(2)
    begun = ground.engine.optimisers
    assert copied(begun.tensors()) == copied(of_critics), "and those of adapters have none yet"
    assert begun.rates.state_dict() == {"policy": 0, "value": 0, "critics": 2}
    ground.update()
    rates = begun.rates.rates()
    assert rates["critics"] == pytest.approx(3 * rates["policy"])


def test_an_engine_is_a_function_of_its_configuration() -> None:
    one, two = Ground("IQL", seed=0), Ground("IQL", seed=1)
    assert copied(one.engine.tensors()) == copied(two.engine.tensors())
    seeded = Engine(one.trainer.model_copy(update={"seed": 1}), SPECS["one"])
    for prefix in ("policy.", "critics."):
        names = [name for name in one.engine.tensors() if name.startswith(prefix)]
        assert any(not torch.equal(one.engine.tensors()[name], seeded.tensors()[name]) for name in names), (
            prefix
        )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_equal_updates_give_equal_bits(algorithm: str) -> None:
    one, two = Ground(algorithm, "graph"), Ground(algorithm, "graph")
    first, second = one.update(), two.update()
    assert first == second
    assert copied(weights(one.engine)) == copied(weights(two.engine))
    assert np.isfinite(list(first.metrics.values())).all()


@pytest.mark.parametrize(
    ("spec", "heads"),
    [("one", ("action",)), ("numbers", ("action",)), ("masked", ("a", "b", "c")), ("flat", HEADS)],
)
def test_numbers_of_heads_that_the_world_lacks_are_refused_with_those_it_has(
    spec: str, heads: tuple[str, ...]
) -> None:
    own = heads[0]
    check_heads(trainer("PPO", entropy_floors={own: 0.2}, entropy_floor_coefficients={own: 0.1}), SPECS[spec])
    for settings in (
        {"entropy_floors": {"leap": 0.2}, "entropy_floor_coefficients": {own: 0.1, "leap": 0.1}},
        {"entropy_floors": {}, "entropy_floor_coefficients": {own: 0.1, "leap": 0.1}},
        {"entropy_multipliers": {own: 2.0, "leap": 0.1}},
    ):
        with pytest.raises(ConfigError, match=f"names leap, and this world's heads are {', '.join(heads)};"):
            check_heads(trainer("PPO", **settings), SPECS[spec])


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_known_by_default_of_growing_hosts_harms_no_other_world(spec: str) -> None:
    for algorithm in ALGORITHMS:
        check_heads(trainer(algorithm), SPECS[spec])
