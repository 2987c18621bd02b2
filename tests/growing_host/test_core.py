"""The whole step: what rewards are told, what a rollback does, and that a host can be saved, drawn and gone on with."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import esper_simic  # noqa: F401 - registers the environments
from esper_simic.actions import BLUEPRINTS, HEADS, OP, SLOT, Op, Style
from esper_simic.config import EnvironmentConfig
from esper_simic.config_rewards import REWARD_FAMILIES
from esper_simic.errors import ConfigError, ContractError
from esper_simic.growing_host.compositions import gate_parameter_count
from esper_simic.growing_host.controllers import Farm, PatientController, RandomController, waiting
from esper_simic.growing_host.core import GrowingHosts
from esper_simic.growing_host.environment import GrowingHostEnv
from esper_simic.growing_host.picture import HEIGHT, WIDTH
from esper_simic.growing_host.vector import GrowingHostVectorEnv
from esper_simic.lifecycle import SeedStage
from esper_simic.rewards import PARTS, Outcome

LANES = 3
QUICK = EnvironmentConfig(
    max_epochs=14,
    training_epochs_min=1,
    train_batches=2,
    train_batch_size=16,
    validation_samples=40,
    prune_age_min=1,
    embargo_epochs=1,
    environments_per_actor=LANES,
    stagger=False,
)


def config(**changed: Any) -> EnvironmentConfig:
    return EnvironmentConfig(**(QUICK.model_dump() | changed))


def fresh(settings: EnvironmentConfig = QUICK, lanes: int = LANES, **options: Any) -> GrowingHosts:
    hosts = GrowingHosts(lanes, settings, gamma=0.99, **options)
    hosts.start(np.arange(lanes), list(range(lanes)), [0] * lanes)
    return hosts


def give(hosts: GrowingHosts, **choices: int) -> Any:
    actions = waiting(hosts.view())
    for head, choice in choices.items():
        actions[:, HEADS.index(head)] = choice
    return hosts.step(actions)


def play(hosts: GrowingHosts, epochs: int, controller: Any, seed: int = 0) -> list[Any]:
    chance = np.random.default_rng(seed)
    return [
        hosts.step(controller.act(hosts.view(), chance.random((hosts.lanes, len(HEADS)))))
        for _ in range(epochs)
    ]


# ---- what rewards are told -------------------------------------------------------------------------------------------


def test_rewards_are_told_everything_that_an_outcome_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that is left out is silently neutral; so none is."""
    told: list[dict[str, Any]] = []

    def noting(**given: Any) -> Outcome:
        told.append(given)
        return Outcome(**given)

    monkeypatch.setattr("esper_simic.growing_host.core.Outcome", noting)
    play(fresh(), 14, PatientController(holding_epochs=1))
    assert all(set(given) == {field.name for field in fields(Outcome)} for given in told)
    last = told[-1]
    assert np.isfinite(last["committed_accuracy"]).all()
    assert np.isfinite(last["improvement"]).all()
    assert last["loss_scale"] == pytest.approx(np.log(10))
    assert (last["epoch"] == 14).all()
    assert last["terminated"].all()
    assert any(np.isfinite(given["contribution_before"]).any() for given in told)
    assert any((given["age_before"] > 0).any() for given in told)


def test_what_was_before_is_not_what_is_after(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Outcome] = []

    def noting(**given: Any) -> Outcome:
        copies: dict[str, Any] = {name: np.copy(value) for name, value in given.items()}
        told.append(Outcome(**copies))
        return told[-1]

    monkeypatch.setattr("esper_simic.growing_host.core.Outcome", noting)
    play(fresh(), 10, PatientController())
    for earlier, later in pairwise(told):
        for before, after in (
            ("stage_before", "stage"),
            ("alpha_before", "alpha"),
            ("parameters_before", "seed_parameters"),
            ("contribution_before", "contribution"),
            ("loss_before", "loss"),
            ("improvement_before", "improvement"),
        ):
            np.testing.assert_array_equal(getattr(later, before), getattr(earlier, after), err_msg=before)


def test_rewards_are_told_which_action_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: a reward that is paid for what was asked, not for what happened."""
    told: list[Outcome] = []

    def noting(**given: Any) -> Outcome:
        told.append(Outcome(**given))
        return told[-1]

    monkeypatch.setattr("esper_simic.growing_host.core.Outcome", noting)
    hosts = fresh(config(mask_gates=False))
    for op in (Op.GERMINATE, Op.GERMINATE, Op.FOSSILIZE, Op.SET_ALPHA_TARGET, Op.ADVANCE, Op.WAIT):
        succeeded = give(hosts, op=op, slot=0).succeeded
        np.testing.assert_array_equal(told[-1].succeeded, succeeded)
    assert [outcome.succeeded.all() for outcome in told] == [True, False, False, False, True, True]


@pytest.mark.parametrize("mode", sorted(PARTS))
def test_every_mode_rewards_a_whole_episode(mode: str) -> None:
    family = next(family for family, modes in REWARD_FAMILIES.items() if mode in modes)
    hosts = fresh(config(reward={"mode": mode, "family": family}))
    for result in play(hosts, 14, PatientController(holding_epochs=1)):
        assert set(result.reward_parts) == {*PARTS[mode], "rollback"}  # type: ignore[index]
        np.testing.assert_allclose(np.sum(list(result.reward_parts.values()), axis=0), result.reward)
        assert np.isfinite(result.reward).all()


def test_shaped_pays_the_farm_and_basic_does_not() -> None:
    returns = {}
    for mode in ("shaped", "basic"):
        settings = config(
            max_epochs=40,
            train_batches=8,
            train_batch_size=32,
            training_epochs_min=4,
            validation_samples=256,
            reward={"mode": mode},
        )
        for controller in (Farm(), PatientController()):
            hosts = fresh(settings, lanes=8)
            results = play(hosts, 40, controller)
            returns[mode, type(controller)] = float(sum(result.reward.mean() for result in results))
    assert returns["shaped", Farm] > returns["shaped", PatientController]
    assert returns["basic", Farm] < returns["basic", PatientController]


def test_fossils_are_ablated_where_the_reward_asks_what_they_are_worth() -> None:
    worth = {}
    for mode in ("basic", "basic_plus"):
        hosts = fresh(config(max_epochs=30, reward={"mode": mode}))
        play(hosts, 20, PatientController(holding_epochs=1))
        fossils = hosts.slots.stage == SeedStage.FOSSILIZED
        assert fossils.any()
        worth[mode] = hosts.slots.epochs_since_contribution[fossils]
    assert (worth["basic_plus"] == 0).all(), "measured in every epoch"
    assert (worth["basic"] > 0).any()


def test_the_configuration_says_how_the_change_of_a_contribution_is_averaged() -> None:
    hosts = fresh(config(max_epochs=30, contribution_velocity_ema=0.5), lanes=6)
    controller, wait = PatientController(holding_epochs=6), np.zeros((6, len(HEADS)))
    worth, velocity, changes = np.nan, np.nan, 0
    for _ in range(16):
        hosts.step(controller.act(hosts.view(), wait))
        if hosts.slots.stage[0, 0] == SeedStage.FOSSILIZED:
            break
        if hosts.slots.epochs_since_contribution[0, 0] == 0:
            now = hosts.slots.contribution[0, 0]
            change = now - worth
            velocity = change if np.isnan(velocity) else 0.5 * velocity + 0.5 * change
            worth, changes = now, changes + (change != 0)
            np.testing.assert_allclose(hosts.slots.contribution_velocity[0, 0], velocity)
            seen = hosts.observe()["slot_nodes"][0, 0, 13]
            assert seen == pytest.approx(np.clip(np.nan_to_num(velocity) / 10, -1, 1))
    assert changes > 2


def test_the_configuration_says_how_gradient_ratios_are_averaged() -> None:
    """Permissive gates ask for no ratio, so the hosts grow alike whatever its average is made of."""
    seen = {}
    for ema in (0.0, 0.6):
        hosts, ratios = fresh(config(gradient_ema=ema)), []
        for op in (Op.GERMINATE, Op.ADVANCE, Op.WAIT, Op.WAIT):
            give(hosts, op=op, slot=2)
            ratios.append(hosts.slots.gradient_ratio[:, 2].copy())
        seen[ema] = ratios[1:]
    first, *others = seen[0.0]
    expected = [first]
    for ratio in others:
        expected.append(0.6 * expected[-1] + 0.4 * ratio)
    np.testing.assert_allclose(seen[0.6], expected)
    assert (np.abs(others[0] - first) > 1e-3).any()


# ---- rollback --------------------------------------------------------------------------------------------------------


def stage_of(hosts: GrowingHosts, lane: int, stage: SeedStage) -> Any:
    return hosts.slots.stage[lane] == stage


def broken(hosts: GrowingHosts, lane: int) -> None:
    hosts.bank.parameters[lane, 5] = float("nan")


def test_a_broken_host_is_put_back_without_its_live_seeds_and_its_episode_ends() -> None:
    hosts = fresh(config(max_epochs=40))
    controller, wait = PatientController(holding_epochs=1), np.zeros((LANES, len(HEADS)))
    while not (
        stage_of(hosts, 1, SeedStage.FOSSILIZED).any() and stage_of(hosts, 1, SeedStage.TRAINING).any()
    ):
        hosts.step(controller.act(hosts.view(), wait))
    fossils, live = stage_of(hosts, 1, SeedStage.FOSSILIZED), stage_of(hosts, 1, SeedStage.TRAINING)
    kept = hosts._keeper.state_dict()["parameters"][1]
    neighbour = fresh(config(max_epochs=40))
    neighbour.load_state_dict(hosts.state_dict())
    paid = hosts._paid.copy()
    broken(hosts, 1)
    result = give(hosts, op=Op.WAIT)
    untouched = give(neighbour, op=Op.WAIT)

    assert result.rolled_back.tolist() == [False, True, False]
    assert not result.terminated.any()
    assert result.reward[1] == pytest.approx(-10 - paid[1]), "the episode's return is the penalty"
    assert result.reward_parts["rollback"][1] == result.reward[1]
    np.testing.assert_array_equal(hosts.slots.stage[1] == SeedStage.FOSSILIZED, fossils)
    assert (hosts.slots.stage[1][live] == SeedStage.PRUNED).all()
    assert not hosts.bank.momentum[1].any()
    host = hosts.host_spec.parameter_count
    np.testing.assert_array_equal(hosts.bank.parameters[1, :host].numpy(), kept[:host])
    for slot in np.flatnonzero(~fossils):
        start, width = hosts.bank.slot_offsets[slot], hosts.bank.slot_widths[slot]
        assert not hosts.bank.parameters[1, start : start + width].any()
    observed = hosts.observe()
    assert np.isfinite(observed["globals"]).all()
    for lane in (0, 2):
        assert result.reward[lane] == untouched.reward[lane], "lanes share nothing"
        assert torch.equal(hosts.bank.parameters[lane], neighbour.bank.parameters[lane])


def test_a_rollback_is_a_truncation_and_the_next_episode_is_whole() -> None:
    env = GrowingHostVectorEnv(2, config(max_epochs=8))
    env.reset(seed=3)
    broken(env._hosts, 0)
    _, _, terminated, truncated, infos = env.step(waiting(env.view()))
    assert (terminated.tolist(), truncated.tolist()) == ([False, False], [True, False])
    assert infos["_final_obs"].tolist() == [True, False]
    assert infos["episode"]["r"][0] == pytest.approx(-10)
    assert infos["episode"]["rolled_back"].tolist() == [True, False]
    for _ in range(8):
        _, _, terminated, truncated, infos = env.step(waiting(env.view()))
    assert (terminated.tolist(), truncated.tolist()) == ([True, False], [False, False])
    assert infos["episode"]["r"][0] > 0


def test_after_a_rollback_the_scalar_environment_must_be_reset() -> None:
    env = GrowingHostEnv(QUICK)
    env.reset(seed=1)
    broken(env._hosts, 0)
    *_, terminated, truncated, info = env.step(waiting(env.view())[0])
    assert (terminated, truncated) == (False, True)
    assert info["reward_parts"]["rollback"] == pytest.approx(-10)
    with pytest.raises(ContractError, match="no episode is under way"):
        env.step(waiting(env.view())[0])


# ---- compositions ----------------------------------------------------------------------------------------------------


def test_a_retarget_to_a_gate_gives_the_seed_one_and_back_takes_it_away() -> None:
    hosts = fresh(config(max_epochs=60, alpha_control="full", mask_gates=False))
    plain = {"slot": 0, "blueprint": BLUEPRINTS.index("conv_light"), "style": Style.LINEAR_ADD}
    give(hosts, op=Op.GERMINATE, alpha_target=0, **plain)
    for _ in range(12):
        give(hosts, op=Op.ADVANCE, slot=0)
    still = (hosts.slots.stage[:, 0] == SeedStage.BLENDING) & ~hosts.slots.ramping[:, 0]
    assert still.any()
    before = hosts.slots.parameters[:, 0].copy()
    gate = gate_parameter_count(hosts.bank.slot_channels[0])
    for style, more in ((Style.GATED_GATE, gate), (Style.GATED_GATE, gate), (Style.LINEAR_ADD, 0)):
        result = give(hosts, op=Op.SET_ALPHA_TARGET, slot=0, style=style, alpha_target=1, alpha_speed=0)
        assert result.succeeded[still].all()
        np.testing.assert_array_equal(hosts.slots.parameters[still, 0], before[still] + more)
        start = hosts.bank.slot_offsets[0] + before[still][0]
        gates = hosts.bank.parameters[still][:, start : start + gate]
        assert bool(gates.any()) == (more > 0)


@pytest.mark.parametrize("style", list(Style))
def test_random_play_with_every_style_keeps_every_number_finite(style: Style) -> None:
    hosts = fresh(config(max_epochs=40, alpha_control="full"), lanes=6)
    controller, chance = RandomController(), np.random.default_rng(int(style))
    seen = set()
    for _ in range(40):
        actions = controller.act(hosts.view(), chance.random((6, len(HEADS))))
        legal = hosts._legal.choices["style"][:, style]
        actions[legal, HEADS.index("style")] = style
        hosts.step(actions)
        hosts.observe()
        seen |= set(hosts.slots.stage.ravel().tolist())
    assert {SeedStage.TRAINING, SeedStage.BLENDING} <= seen


# ---- every task, every kind of host ----------------------------------------------------------------------------------

KINDS = {
    ("digits", "rescue"): ("conv_light", "norm"),
    ("digits", "augment"): ("conv_light", "bottleneck"),
    ("digits32", "rescue"): ("depthwise", "conv_small"),
    ("wine", "mlp"): ("mlp_small", "lora"),
    ("mnist1d", "series"): ("conv_light", "attention"),
    ("characters", "transformer"): ("mlp", "flex_attention"),
    ("synthetic", "minimal"): ("attention", "conv_heavy"),
}


@pytest.mark.parametrize(("task", "host"), KINDS)
def test_every_kind_of_host_grows_and_is_simulated_again_exactly(task: str, host: str) -> None:
    settings = config(
        task=task,
        host=host,
        blueprints=KINDS[task, host],
        slots=("r0c0", "r0c1"),
        validation_samples=30,
        train_batch_size=8,
        train_batches=1,
    )
    first, again = fresh(settings, lanes=2), fresh(settings, lanes=2)
    for one, other in zip(
        play(first, 14, PatientController(1)), play(again, 14, PatientController(1)), strict=True
    ):
        np.testing.assert_array_equal(one.reward, other.reward)
    assert torch.equal(first.bank.parameters, again.bank.parameters)
    assert (first.slots.stage == SeedStage.FOSSILIZED).any()
    assert first.observe()["slot_nodes"].shape == (2, 2, 31)


def test_a_blueprint_that_the_host_cannot_take_is_masked() -> None:
    hosts = fresh(config(blueprints=("lora", "conv_light")))
    assert hosts._legal.choices["blueprint"][0].nonzero()[0].tolist() == [BLUEPRINTS.index("conv_light")]
    with pytest.raises(ConfigError, match="blueprint"):
        fresh(config(blueprints=("lora", "mlp")))


# ---- saved and drawn -------------------------------------------------------------------------------------------------


def test_a_saved_vector_goes_on_bit_for_bit() -> None:
    settings = config(alpha_control="full", reward={"mode": "escrow"}, stagger=True)
    env = GrowingHostVectorEnv(LANES, settings)
    env.reset(seed=5)
    controller, chance = RandomController(), np.random.default_rng(1)
    for _ in range(9):
        env.step(controller.act(env.view(), chance.random((LANES, len(HEADS)))))
    state = env.state_dict()
    later = np.random.default_rng(2).random((20, LANES, len(HEADS)))
    heard = [env.step(controller.act(env.view(), uniforms)) for uniforms in later]

    other = GrowingHostVectorEnv(LANES, settings)
    other.load_state_dict(state)
    for uniforms, (observed, reward, terminated, truncated, _) in zip(later, heard, strict=True):
        seen, paid, ended, cut, _ = other.step(controller.act(other.view(), uniforms))
        for key, array in observed.items():
            np.testing.assert_array_equal(seen[key], array, err_msg=key)
        np.testing.assert_array_equal(paid, reward)
        np.testing.assert_array_equal(ended, terminated)
        np.testing.assert_array_equal(cut, truncated)


def test_a_saved_state_is_a_copy_and_other_hosts_refuse_it() -> None:
    env = GrowingHostEnv(QUICK)
    env.reset(seed=2)
    state = env.state_dict()
    before = state["hosts"]["bank"]["parameters"].copy()
    env.step(waiting(env.view())[0])
    np.testing.assert_array_equal(state["hosts"]["bank"]["parameters"], before)
    env.load_state_dict(state)
    assert env._hosts.epoch[0] == 0
    with pytest.raises(ContractError, match="not one of 2 such hosts"):
        GrowingHostVectorEnv(2, QUICK)._hosts.load_state_dict(state["hosts"])


def test_gymnasium_draws_a_host() -> None:
    env = gymnasium.make("esper_simic/GrowingHost-v0", render_mode="rgb_array", max_epochs=12)
    with pytest.raises((ContractError, gymnasium.error.ResetNeeded)):
        env.render()
    env.reset(seed=0)
    frame = env.render()
    assert isinstance(frame, np.ndarray)
    assert frame.shape == (HEIGHT, WIDTH, 3)
    env.step(waiting(env.unwrapped.view())[0])  # type: ignore[attr-defined]
    later = env.render()
    assert (np.asarray(later) != frame).any()


def test_each_host_of_a_vector_is_drawn() -> None:
    env = gymnasium.make_vec(
        "esper_simic/GrowingHost-v0", num_envs=2, render_mode="ansi", max_epochs=12, stagger=False
    )
    env.reset(seed=0)
    view = env.unwrapped.view()  # type: ignore[attr-defined]
    actions = waiting(view)
    actions[0, OP], actions[0, SLOT] = Op.GERMINATE, 1
    env.step(actions)
    first, second = env.render()  # type: ignore[misc]
    assert "r0c1  conv_light     germinated" in first
    assert "r0c1  dormant" in second
    assert "epoch 1/12" in second
    with pytest.raises(ConfigError, match="no render mode 'human'"):
        GrowingHostVectorEnv(1, render_mode="human")
