"""Before it says READY, whoever grows hosts makes sure that it can, and says on which data."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper_simic.config import parse
from esper_simic.errors import ConfigError
from esper_simic.growing_host.spaces import observation_spec_of
from esper_simic.growing_host.tasks import load_task
from esper_simic.growing_host.vector import GrowingHostVectorEnv
from supervisor.protocol import Ready
from supervisor.roles import actor, evaluate
from supervisor.roles.data import examined_data
from tests.roles.bench import bench, make_config, spec_of
from tests.roles.pair import SMALL, Pair, control_line

OTHERS = (
    ("wine", "mlp", 30),
    ("mnist1d", "series", 30),
    ("synthetic:3x32x32:10:64", "deep_impaired", 10),
)

REFUSED = {
    "its files are not there": ("cifar10:nowhere", "rescue", 20, "environment.task: task 'cifar10'"),
    "another kind of samples": ("wine", "rescue", 20, "environment.host: .* 'wine' has 'vector': choose mlp"),
    "sides that do not halve": ("digits", "deep_impaired", 20, "environment.host: .* that 32 divides"),
    "too few held-out samples": (
        "wine",
        "mlp",
        256,
        "environment.validation_samples: .* 45 samples, not 256",
    ),
    "parameters that are none": ("synthetic:huge", "rescue", 20, "environment.task: .*'huge'"),
}


def settings(task: str, host: str, validation_samples: int) -> tuple[str, ...]:
    return (
        *(one for one in SMALL if "validation_samples" not in one),
        f"environment.task={task}",
        f"environment.host={host}",
        "environment.slots=[r0c0]",
        f"environment.validation_samples={validation_samples}",
    )


@pytest.mark.parametrize(("task", "host", "samples"), OTHERS)
def test_the_data_of_a_run_is_known_by_the_digest_of_its_task(task: str, host: str, samples: int) -> None:
    config = make_config(*settings(task, host, samples))
    assert examined_data(config) == load_task(task).digest
    assert len(load_task(task).digest) == 64


@pytest.mark.parametrize(("task", "host", "samples", "problem"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("main", [actor.main, evaluate.main])
def test_who_cannot_grow_hosts_ends_before_it_is_ready_and_asks_for_a_person(
    tmp_path: Path, main, task: str, host: str, samples: int, problem: str
) -> None:
    """A `ConfigError` is exit status 78 (`child.run_child`), which ends a run at the first death."""
    with control_line() as control:
        config = make_config(*settings(task, host, samples))
        endpoints = {"control": control.endpoint, "experience": "ipc://nobody"}
        with pytest.raises(ConfigError, match=problem):
            main(spec_of("actor", 0, tmp_path, config, endpoints))
        control.hear()
        assert control.heard == []


def test_an_actor_says_on_which_data_it_grows_hosts(tmp_path: Path) -> None:
    with bench(tmp_path, *SMALL) as held, control_line() as control:
        pair = Pair(held, control)
        child = pair.begin()
        pair.wait(lambda: control.said(Ready) != [], pair.turn)
        pair.stop(child)
        assert control.said(Ready)[0].data_digest == load_task("digits").digest


@pytest.mark.parametrize(
    ("task", "host"), [("digits", "rescue"), ("mnist1d", "series"), ("characters", "transformer")]
)
def test_the_shapes_that_a_journal_is_folded_with_need_no_data(task: str, host: str) -> None:
    """So a learner recovers, and a journal is replayed, where the task's data is not."""
    config = parse("", assignments=settings(task, host, 20)).environment
    grown = GrowingHostVectorEnv(1, config).spec_observation
    assert observation_spec_of(config) == grown
    absent = config.model_copy(update={"task": "cifar10:nowhere"})
    assert observation_spec_of(absent) == grown
