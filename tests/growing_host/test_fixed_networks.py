"""Fixed networks: the grown one, whole from its first epoch, against one ordinary torch network after another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from esper_simic import seeding
from esper_simic.actions import BLUEPRINTS, HEADS
from esper_simic.config import EnvironmentConfig
from esper_simic.errors import ContractError
from esper_simic.growing_host.alpha import Composition
from esper_simic.growing_host.blueprints import blueprint
from esper_simic.growing_host.compositions import initial_gate
from esper_simic.growing_host.fixed_networks import Contents, final_contents, train_fixed_networks
from esper_simic.growing_host.grafts import NO_SEED
from esper_simic.growing_host.hosts import build_host
from esper_simic.growing_host.samples import SampleOrders
from esper_simic.growing_host.tasks import load_task
from esper_simic.growing_host.vector import GrowingHostVectorEnv
from esper_simic.lifecycle import SeedStage
from tests.growing_host.literal_hosts import LiteralHost, LiteralSeed

CONFIG = EnvironmentConfig(
    train_batches=4,
    train_batch_size=8,
    host_lr=0.05,
    seed_lr=0.04,
    max_epochs=5,
    training_epochs_min=4,
    environments_per_actor=3,
    validation_samples=64,
)
GROWN: list[tuple[str | None, ...]] = [
    ("conv_light", None, "norm"),
    (None, None, None),
    ("attention", "conv_heavy", "depthwise"),
    (None, "conv_light", None),
]
# A MULTIPLY seed starts as the identity, so equal pixels tie in the max-pool behind it, and a block in front of which
# all features have died normalises rounding errors: under other seeds, rounding decides where a gradient goes.
SEEDS, EPISODES = [21, 22, 23, 24], [0, 3, 1, 0]


def contents(grown=GROWN, composition=Composition.ADD):
    index = [[NO_SEED if name is None else BLUEPRINTS.index(name) for name in lane] for lane in grown]
    return Contents(np.array(index), np.full(np.shape(index), composition))


class JointHost(LiteralHost):
    """One ordinary network: seeds wholly blended in, and gradients go where they please."""

    def grow(self, slot: str, x: Tensor, keep: set[str] | None) -> Tensor:
        if slot not in self.seeds:
            return x
        seed, channels = self.seeds[slot], x.shape[1]
        count = seed.blueprint.parameter_count(channels)
        row, gate_row, laid = seed.row[:count], seed.row[count:], x.permute(1, 2, 3, 0)[None].contiguous()
        if seed.composition is Composition.MULTIPLY:
            return x * (1 + torch.tanh(seed.blueprint.correction(row[None], laid)[0].permute(3, 0, 1, 2)))
        grown = seed.blueprint.forward(row[None], laid)[0].permute(3, 0, 1, 2)
        if seed.composition is Composition.ADD:
            return grown
        hidden = max(8, channels // 4)
        weight, bias, last_weight, last_bias = gate_row.split([hidden * channels, hidden, hidden, 1])
        inner = torch.relu(x.mean((2, 3)) @ weight.view(hidden, channels).t() + bias)
        opened = torch.sigmoid(inner @ last_weight + last_bias)[:, None, None, None]
        return x + opened * (grown - x)


def literal(lane, epochs, composition):
    """Accuracy and loss of one fixed network, trained by itself."""
    task = load_task(CONFIG.task)
    spec = build_host(CONFIG.host, task)
    chance = seeding.generator(SEEDS[lane], EPISODES[lane])
    host = JointHost(
        spec,
        spec.initial_parameters(chance),
        lr=CONFIG.host_lr,
        seed_lr=CONFIG.seed_lr,
        momentum=CONFIG.momentum,
        clip=CONFIG.max_grad_norm,
    )
    seed_chance = seeding.generator(SEEDS[lane], EPISODES[lane], "seeds")
    for place, name in zip(spec.places(CONFIG.slots), GROWN[lane], strict=True):
        if name is not None:
            found, channels = blueprint(name), place.shape.channels
            multiply = composition is Composition.MULTIPLY
            values = found.initial_parameters(channels, seed_chance, starts_at_zero=multiply)
            if composition is Composition.GATE:
                values = np.concatenate((values, initial_gate(channels, seed_chance)))
            row = torch.tensor(values)
            host.seeds[place.name] = LiteralSeed(
                found, row, SeedStage.FOSSILIZED, 1.0, composition, False, torch.zeros_like(row)
            )
    orders = SampleOrders(1, len(task.train_labels), CONFIG.train_batches, CONFIG.train_batch_size)
    inputs = torch.tensor(task.train_inputs, dtype=torch.float64)
    for _ in range(epochs):
        for batch in orders.next_epoch([chance])[:, 0]:
            host.train_batch(inputs[batch], torch.tensor(task.train_labels[batch]))
    held_out = slice(0, CONFIG.validation_samples)
    return host.measure(
        torch.tensor(task.validation_inputs[held_out], dtype=torch.float64),
        torch.tensor(task.validation_labels[held_out]),
    )


@pytest.mark.parametrize("composition", Composition)
def test_fixed_networks_are_ordinary_networks_trained_jointly_from_the_start(composition):
    """Two chunks of lanes at once, in double precision; in front of a seed only a joint gradient trains the host."""
    mixed = contents(composition=composition)
    got = train_fixed_networks(mixed, CONFIG, SEEDS, EPISODES, epochs=3, dtype=torch.float64)
    for lane in range(len(GROWN)):
        accuracy, loss = literal(lane, 3, composition)
        assert got.accuracy[lane] == pytest.approx(accuracy)
        assert got.loss[lane] == pytest.approx(loss, abs=1e-9)


def test_a_network_that_grew_nothing_is_the_episode_of_a_controller_that_never_grows():
    env = GrowingHostVectorEnv(3, CONFIG, gamma=0.99)
    env.reset(seed=[*SEEDS[:3]], options={"stagger": False})
    waiting = np.zeros((3, len(HEADS)), dtype=np.int64)
    infos = [env.step(waiting)[4] for _ in range(CONFIG.max_epochs)][-1]
    nothing = contents([(None, None, None)] * 3)
    got = train_fixed_networks(nothing, CONFIG, SEEDS[:3], [0, 0, 0])
    np.testing.assert_array_equal(got.accuracy, infos["episode"]["accuracy"])
    assert got.parameters_added.tolist() == [0, 0, 0]


def test_parameters_are_those_of_the_seeds():
    """Behind 1, 2 and 4 channels: 11 for conv_light, 9 for norm; 3, 80 and 60 for the third; 40 for the fourth."""
    got = train_fixed_networks(contents(), CONFIG, SEEDS, EPISODES, epochs=0)
    assert got.parameters_added.tolist() == [20, 0, 143, 40]


def test_a_gate_counts_with_its_seed():
    """Of width 8 behind so few channels: `8 C + 17` numbers more in each of the two slots filled."""
    gated = contents([("conv_light", None, "norm")], Composition.GATE)
    got = train_fixed_networks(gated, CONFIG, SEEDS[:1], EPISODES[:1], epochs=0)
    assert got.parameters_added.tolist() == [20 + 25 + 49]


def test_seeds_of_the_environment_differ_by_lane_and_by_episode():
    same = contents([("conv_light", None, None)] * 3)
    got = train_fixed_networks(same, CONFIG, [1, 1, 2], [0, 1, 0], epochs=1)
    assert len(set(got.loss.tolist())) == 3
    again = train_fixed_networks(same, CONFIG, [1, 1, 2], [0, 1, 0], epochs=1)
    np.testing.assert_array_equal(again.loss, got.loss)


def test_progress_is_told_once_an_epoch_of_each_chunk():
    told = []
    train_fixed_networks(contents(), CONFIG, SEEDS, EPISODES, observer=lambda: told.append(1))
    assert len(told) == 2 * CONFIG.max_epochs


def test_only_blended_and_fossilised_seeds_are_part_of_what_was_grown():
    stage = np.array([[SeedStage.BLENDING, SeedStage.TRAINING, SeedStage.FOSSILIZED]])
    stage = np.vstack([stage, [[SeedStage.HOLDING, SeedStage.EMBARGOED, SeedStage.DORMANT]]])
    kind = np.array([[1, 2, 3], [4, 5, 6]])
    made = final_contents(stage, kind, np.array([[0, 1, 2], [1, 1, 1]]))
    assert made.blueprint.tolist() == [[1, NO_SEED, 3], [4, NO_SEED, NO_SEED]]
    assert made.composition.tolist() == [[0, 0, 2], [1, 0, 0]]


def test_contents_that_do_not_belong_together_are_refused():
    with pytest.raises(ContractError, match="4 networks with 3 seeds"):
        train_fixed_networks(contents(), CONFIG, SEEDS[:3], EPISODES)
    with pytest.raises(ContractError, match="contents of 3 slots"):
        train_fixed_networks(
            contents(), CONFIG.model_copy(update={"slots": ("r0c0",)}), SEEDS, EPISODES, epochs=0
        )
