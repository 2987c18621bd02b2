"""Trials: every blueprint that a place takes, really grown there, beside a twin that never grows.

All hosts of a place are lanes of one computation. Lanes of one trial have the same seed, so they start as the same host
and meet the same samples in the same order (`core`): until the seed germinates they are the same host, and what one of
them ends with more than the twin is what its blueprint did.

A seed's life follows a plain schedule: it germinates at a given epoch, goes on as soon as its gates allow, is
fossilised as soon as it may be, and the host trains on to its horizon. A host that breaks down is rolled back by the
governor and trains on without its seed: that is what growing there came to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_simic import seeding
from esper_simic.actions import BLUEPRINT, BLUEPRINTS, OP, Op
from esper_simic.blueprint_outcomes import Grown, Place, PlaceOutcomes
from esper_simic.config import BLUEPRINT_NAMES, EnvironmentConfig, parse
from esper_simic.errors import ConfigError
from esper_simic.growing_host.blueprints import blueprint
from esper_simic.growing_host.controllers import FixedSchedule
from esper_simic.growing_host.core import GrowingHosts
from esper_simic.growing_host.tasks import load_task
from esper_simic.growing_host.view import HostView
from esper_simic.lifecycle import BLENDED, SeedStage
from esper_simic.rewards import MODES_THAT_ABLATE_FOSSILS

DIGITS: Final = 4
"""Decimal places that are kept of what was measured."""

TWIN: Final = BLUEPRINTS.index("noop")

VALIDATION_LABELS_MAX: Final = 256
"""Held-out labels that a host is measured with; a text has several a sample, and is measured with 4 times as many."""

ABLATING: Final = min(MODES_THAT_ABLATE_FOSSILS)
"""A reward mode in which removal costs of fossilised seeds go on being measured."""


def trial_environment(
    task: str, host: str, slot: str, settings: Mapping[str, int | float | str]
) -> EnvironmentConfig:
    """The environment of a place's trials: every blueprint, removal costs of kept seeds, held-out samples as there are.

    Args:
        task: Name of the task.
        host: Name of the host.
        slot: Name of the slot.
        settings: Other keys of `environment`.

    Raises:
        ConfigError: A task or a key that is not known, or a value out of range.
    """
    labels = load_task(task).validation_labels
    positions = labels[0].size
    wanted = VALIDATION_LABELS_MAX if positions == 1 else -(-4 * VALIDATION_LABELS_MAX // positions)
    values = {
        "task": task,
        "host": host,
        "slots": [slot],
        "blueprints": list(BLUEPRINT_NAMES),
        "validation_samples": min(wanted, len(labels)),
        "reward": {"mode": ABLATING},
    }
    return parse("", base={"environment": values | dict(settings)}).environment


def fitting_blueprints(config: EnvironmentConfig) -> tuple[str, ...]:
    """The configured blueprints that the task's kind of samples allows, in the order of actions.

    Raises:
        ConfigError: There is none.
    """
    kind = load_task(config.task).kind
    fitting = tuple(
        name for name in BLUEPRINT_NAMES if name in config.blueprints and kind in blueprint(name).kinds
    )
    if not fitting:
        raise ConfigError(
            f"no blueprint of {', '.join(config.blueprints)} takes {kind}", "environment.blueprints"
        )
    return fitting


def try_blueprints(
    config: EnvironmentConfig,
    seeds: Sequence[int],
    *,
    germinated_at: int,
    gamma: float,
    observer: Callable[[], None] | None = None,
) -> PlaceOutcomes:
    """Grow every blueprint that fits into the one slot of a configuration, once for each seed.

    Args:
        config: Task, host and rules; exactly one slot. A reward that ablates fossils (`basic_plus`) lets removal
            costs of kept seeds be measured, too.
        seeds: Of the trials.
        germinated_at: Epoch after which seeds germinate, from 0.
        gamma: For the reward's shaping, which nobody reads here.
        observer: Told after every epoch that there was progress.

    Raises:
        ConfigError: More than one slot, seeds that could never be blended in, or a task or host that cannot be had.
    """
    if len(config.slots) != 1:
        raise ConfigError(f"a trial is of one slot, not of {', '.join(config.slots)}", "environment.slots")
    if germinated_at + config.training_epochs_min >= config.max_epochs:
        raise ConfigError(
            f"a seed that germinates at epoch {germinated_at} and trains {config.training_epochs_min} epochs is "
            f"never blended in within {config.max_epochs}",
            "environment.max_epochs",
        )
    names = fitting_blueprints(config)
    kinds = np.tile([TWIN, *(BLUEPRINTS.index(name) for name in names)], len(seeds))
    hosts = GrowingHosts(len(kinds), config, gamma=gamma)
    lane_seeds = np.repeat([seeding.derive("trial", seed) for seed in seeds], len(names) + 1).tolist()
    hosts.start(np.arange(len(kinds)), lane_seeds, [0] * len(kinds))
    schedule = _Grows(kinds, germinated_at)
    before = hosts.view()
    for epoch in range(config.max_epochs):
        if epoch == germinated_at:
            before = hosts.view()
        hosts.step(schedule.act(hosts.view()))
        if observer is not None:
            observer()
    return _outcomes(hosts, names, seeds, schedule.parameters(hosts), before)


class _Grows:
    """The blueprint of each lane at its epoch, once; then on, and kept, as soon as that is allowed."""

    def __init__(self, kinds: NDArray[np.int64], germinated_at: int) -> None:
        self._kinds, self._at = kinds, germinated_at
        self._schedule = FixedSchedule()
        self._chance = np.zeros((len(kinds), 1))

    def act(self, view: HostView) -> NDArray[np.int64]:
        actions = self._schedule.act(view, self._chance)
        is_due = (self._kinds != TWIN) & (view.epoch == self._at)
        actions[(actions[:, OP] == Op.GERMINATE) & ~is_due, OP] = Op.WAIT
        actions[is_due, BLUEPRINT] = self._kinds[is_due]
        return actions

    def parameters(self, hosts: GrowingHosts) -> NDArray[np.int64]:
        """`[E]` that each lane's blueprint adds."""
        channels, kind = hosts.bank.slot_channels[0], hosts.host_spec.kind
        return np.array(
            [
                0 if k == TWIN else blueprint(BLUEPRINTS[k]).parameter_count(channels, kind)
                for k in self._kinds
            ]
        )


def _outcomes(
    hosts: GrowingHosts,
    names: tuple[str, ...],
    seeds: Sequence[int],
    parameters: NDArray[np.int64],
    before: HostView,
) -> PlaceOutcomes:
    after = hosts.view()
    table = (len(seeds), len(names) + 1)
    accuracy, loss = after.accuracy[:, -1].reshape(table), after.loss[:, -1].reshape(table)
    stage = after.stage[:, 0].reshape(table)
    worth = np.where(BLENDED[stage], after.contribution[:, 0].reshape(table), np.nan)
    return PlaceOutcomes(
        place=_place(hosts),
        seeds=tuple(seeds),
        accuracy=_rounded(before.accuracy[:, -1].reshape(table)[:, 0]),
        loss=_rounded(before.loss[:, -1].reshape(table)[:, 0]),
        grown=tuple(
            Grown(
                blueprint=name,
                parameters=int(parameters[index]),
                accuracy_change=_rounded(accuracy[:, index] - accuracy[:, 0]),
                loss_change=_rounded(loss[:, index] - loss[:, 0]),
                contribution=tuple(
                    None if np.isnan(points) else round(points, DIGITS) for points in worth[:, index].tolist()
                ),
                kept=tuple((stage[:, index] == SeedStage.FOSSILIZED).tolist()),
            )
            for index, name in enumerate(names, start=1)
        ),
    )


def _place(hosts: GrowingHosts) -> Place:
    task, spec = load_task(hosts.config.task), hosts.host_spec
    place = hosts.bank.places[0]
    return Place(
        task=hosts.config.task,
        host=hosts.config.host,
        slot=place.name,
        kind=task.kind,
        channels=place.shape.channels,
        positions=place.shape.positions,
        block=place.block,
        blocks=len(spec.blocks),
        behind_pool=place.behind_pool,
        host_parameters=spec.parameter_count,
        classes=task.classes,
        input_size=int(np.prod(task.train_inputs.shape[1:])),
        train_size=len(task.train_labels),
    )


def _rounded(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(round(value, DIGITS) for value in values.tolist())
