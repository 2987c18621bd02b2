"""Whoever grows blueprints to see what comes of it: place by place, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from esper_simic.blueprint_outcomes import PlaceOutcomes
from esper_simic.config import slot_names
from esper_simic.growing_host.tasks import load_task
from esper_simic.growing_host.trials import trial_environment, try_blueprints


class Trials(NamedTuple):
    """What is to be tried.

    Attributes:
        hosts: Pairs of task and host.
        seeds: Of the trials of every place.
        germinated_at: Epoch after which seeds germinate.
        settings: Keys of `environment` beside task, host and slot.
        behind_pools: Whether slots behind a pool are tried, too.
        gamma: Discount of the hosts' reward, which nobody reads here.
    """

    hosts: Sequence[tuple[str, str]]
    seeds: Sequence[int]
    germinated_at: int
    settings: Mapping[str, int | float | str]
    behind_pools: bool
    gamma: float


def task_digests(tasks: Iterable[str]) -> dict[str, str]:
    """The digest of each task's data.

    Raises:
        ConfigError: A task cannot be had here.
    """
    return {name: load_task(name).digest for name in sorted(set(tasks))}


def grow(trials: Trials, threads: int, observer: Callable[[], None]) -> Iterator[PlaceOutcomes]:
    """The outcomes of every place, one after the other.

    Args:
        trials: What is to be tried.
        threads: Of the computation.
        observer: Told after every epoch of a place.

    Raises:
        ConfigError: A task, host or key that is not known or cannot be had here.
    """
    torch.set_num_threads(threads)
    for task, host in trials.hosts:
        for slot in slot_names(host):
            environment = trial_environment(task, host, slot, trials.settings)
            if _is_behind_pool(slot) and not trials.behind_pools:
                continue
            yield try_blueprints(
                environment,
                trials.seeds,
                germinated_at=trials.germinated_at,
                gamma=trials.gamma,
                observer=observer,
            )


def _is_behind_pool(slot: str) -> bool:
    return slot.startswith("r1")
