"""Tasks of others: found by entry point or registered, and refused where they break the contract."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from esper_simic.config import parse
from esper_simic.config_environment import REGISTERED_TASKS, TASK_NAMES, EnvironmentConfig, task_names
from esper_simic.errors import ConfigError, ContractError, UnavailableError
from esper_simic.growing_host.tasks import Loader, Task, check_task, load_task, register_task

MODULE = """
from __future__ import annotations

import numpy as np

from esper_simic.growing_host.tasks import Task, split_task


def spirals() -> Task:
    turns = np.linspace(0, 3, 100)
    labels = np.arange(100) % 2
    points = np.stack([turns * np.cos(turns + labels), turns * np.sin(turns + labels)], axis=1)
    return split_task("spirals", "vector", points[:, :, None, None], labels)


not_a_loader = 3
"""


@pytest.fixture(autouse=True)
def _fresh():
    """Each test starts and leaves without registered or remembered tasks."""
    load_task.cache_clear()
    yield
    REGISTERED_TASKS.clear()
    load_task.cache_clear()


def install(folder: Path, package: str, entries: str) -> None:
    """Put a distribution of this name and its module into a folder, as an installer does."""
    (folder / f"{package}_tasks.py").write_text(MODULE)
    facts = folder / f"{package}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[esper_simic.tasks]\n{entries}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.endswith("_tasks")]:
        if Path(str(sys.modules[name].__file__)).parent == tmp_path:
            del sys.modules[name]


def vector_task(**changes) -> Task:
    inputs = np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3, 1, 1)
    labels = np.arange(8, dtype=np.int64) % 2
    task = Task("mine", 2, "vector", inputs, labels, inputs[:4], labels[:4])
    return dataclasses.replace(task, **changes)


def token_task(**changes) -> Task:
    tokens = np.arange(20, dtype=np.int64).reshape(4, 5) % 3
    return dataclasses.replace(Task("mine", 3, "tokens", tokens, tokens, tokens[:2], tokens[:2]), **changes)


def test_the_task_of_an_installed_package_is_found(site):
    with pytest.raises(ConfigError, match="unknown task 'spirals'"):
        load_task("spirals")
    install(site, "whirl", "spirals = whirl_tasks:spirals")
    assert task_names() == (*TASK_NAMES, "spirals")
    task = load_task("spirals")
    assert (task.kind, task.channels, task.classes) == ("vector", 2, 2)
    assert parse("environment: {task: spirals}").environment.task == "spirals"


def test_another_process_finds_it_too(site):
    install(site, "whirl", "spirals = whirl_tasks:spirals")
    script = (
        "from esper_simic.growing_host.tasks import load_task\n"
        "from esper_simic.config import parse\n"
        "print(load_task(parse('environment: {task: spirals}').environment.task).digest)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": f"{site}:{Path(__file__).parents[2]}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == load_task("spirals").digest


def test_two_packages_may_not_claim_one_name(site):
    install(site, "whirl", "spirals = whirl_tasks:spirals")
    install(site, "eddy", "spirals = eddy_tasks:spirals")
    with pytest.raises(ConfigError, match=r"two tasks are named 'spirals': .*uninstall one") as refusal:
        load_task("spirals")
    assert "whirl" in str(refusal.value)
    assert "eddy" in str(refusal.value)


def test_no_package_takes_the_place_of_a_built_in_task(site):
    before = load_task("digits").digest
    install(site, "whirl", "digits = whirl_tasks:spirals")
    load_task.cache_clear()
    assert load_task("digits").digest == before
    with pytest.raises(ConfigError, match="of whirl .* takes the name of the built-in task 'digits'"):
        load_task("spirals")


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("Spirals = whirl_tasks:spirals", "'Spirals' is no name for a task"),
        ("spirals = whirl_tasks:spiral", "'spirals' of whirl .* cannot be loaded"),
        ("spirals = whirled_tasks:spirals", "cannot be loaded: No module named 'whirled_tasks'"),
        ("spirals = whirl_tasks:not_a_loader", "is a int, not a loader"),
        ("other = whirl_tasks:spirals", "task 'other': name is 'spirals'"),
    ],
)
def test_broken_entry_points_are_refused_by_name(site, entry, problem):
    install(site, "whirl", entry)
    with pytest.raises(ConfigError, match=problem):
        load_task(entry.partition(" ")[0].lower())


def test_a_process_may_register_a_task_of_its_own():
    register_task("mine", vector_task)
    assert EnvironmentConfig(task="mine").task == "mine"
    task = load_task("mine")
    assert task.digest == vector_task().digest
    with pytest.raises(ValueError, match="read-only"):
        task.train_inputs[0] = 0


def test_nobody_can_write_to_a_loaded_task_through_another_array():
    whole = np.zeros((8, 3, 1, 1), dtype=np.float32)
    register_task("mine", lambda: vector_task(train_inputs=whole[:], validation_inputs=whole[:4]))
    task = load_task("mine")
    whole[:] = 9
    assert (task.train_inputs == 0).all()
    assert (task.validation_inputs == 0).all()


def test_names_are_unique_and_plain(site):
    install(site, "whirl", "spirals = whirl_tasks:spirals")
    register_task("mine", vector_task)
    for taken in ("mine", "digits", "spirals"):
        with pytest.raises(ConfigError, match=f"there is a task '{taken}' already"):
            register_task(taken, vector_task)
    for bad in ("", "Mine", "my task", "mine:1", "9mine", "m" * 65):
        with pytest.raises(ConfigError, match="is no name for a task"):
            register_task(bad, vector_task)
    assert list(REGISTERED_TASKS) == ["mine"]


def test_what_stands_behind_the_colon_reaches_the_loader_and_nothing_else_does():
    heard = []

    def loader(parameters="none"):
        heard.append(parameters)
        return vector_task()

    register_task("mine", loader)
    load_task("mine")
    load_task("mine:a:b")
    assert heard == ["none", "a:b"]
    with pytest.raises(ConfigError, match=r"task 'wine' takes no parameters .*given: 'wine:3'"):
        load_task("wine:3")
    register_task("needy", lambda parameters: vector_task(name="needy"))
    with pytest.raises(ConfigError, match="task 'needy' takes parameters behind its name"):
        load_task("needy")


def test_the_configuration_knows_the_tasks():
    assert EnvironmentConfig(task="synthetic:1x8x8:10").task == "synthetic:1x8x8:10"
    with pytest.raises(ConfigError, match="environment.task: unknown task 'digit'; did you mean 'digits'"):
        parse("environment: {task: digit}")


def test_a_proper_task_passes():
    for task in (vector_task(), token_task(), vector_task(name="mine:small")):
        assert check_task("mine", task) is task


FLOATS = np.zeros((8, 3, 1, 1), dtype=np.float32)
LABELS = np.zeros(8, dtype=np.int64)


def holed(value: float) -> np.ndarray:
    inputs = FLOATS.copy()
    inputs[5, 1] = value
    return inputs


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("name", "other", "is 'other'"),
        ("name", None, "is None"),
        ("classes", 1, "is 1; it must be an int of at least 2"),
        ("classes", 2.0, "is 2.0; it must be an int"),
        ("kind", "sound", "is 'sound'; it must be one of image, series, vector, tokens"),
        ("train_inputs", [[1.0]], "is a list, not a NumPy array"),
        ("train_inputs", FLOATS.astype(np.float64), "is float64; it must be float32"),
        ("validation_inputs", FLOATS[:4].astype(np.int64), "is int64; it must be float32"),
        ("train_inputs", holed(np.nan), "has numbers that are not finite"),
        ("validation_inputs", holed(np.inf)[4:], "has numbers that are not finite"),
        (
            "train_inputs",
            FLOATS[:, :, 0],
            r"has shape \(8, 3, 1\); for kind 'vector' it must be \[N, C, 1, 1\]",
        ),
        ("train_inputs", FLOATS[:, :0], r"has shape \(8, 0, 1, 1\)"),
        ("train_inputs", FLOATS.reshape(8, 1, 1, 3), r"has shape .* for kind 'vector'"),
        ("validation_inputs", FLOATS[:0], "holds no sample"),
        ("train_inputs", FLOATS[:0], "holds no sample"),
        (
            "validation_inputs",
            FLOATS[:4, :2],
            r"has samples of shape \(2, 1, 1\), train_inputs of \(3, 1, 1\)",
        ),
        ("train_labels", LABELS.astype(np.int32), "is int32; it must be int64"),
        ("train_labels", LABELS[:7], r"has shape \(7,\); its inputs ask for \(8,\)"),
        ("train_labels", LABELS + 2, "reaches from 2 to 2; with 2 classes"),
        ("validation_labels", LABELS[:4] - 1, "reaches from -1 to -1"),
    ],
)
def test_each_broken_field_is_refused_by_name(field, value, problem):
    register_task("mine", lambda: vector_task(**{field: value}))
    with pytest.raises(ConfigError, match=f"environment.task: task 'mine': {field} {problem}"):
        load_task("mine")


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("train_inputs", np.zeros((4, 5), dtype=np.float32), "is float32; it must be int64"),
        ("train_inputs", np.full((4, 5), 3, dtype=np.int64), "reaches from 3 to 3; with 3 classes"),
        ("validation_labels", np.zeros(2, dtype=np.int64), r"has shape \(2,\); its inputs ask for \(2, 5\)"),
        ("train_inputs", np.zeros((4, 5, 1), dtype=np.int64), r"has shape .* must be \[N, L\]"),
    ],
)
def test_each_broken_field_of_tokens_is_refused_by_name(field, value, problem):
    with pytest.raises(ContractError, match=f"task 'mine': {field} {problem}"):
        check_task("mine", token_task(**{field: value}))


def test_a_series_has_a_height_of_one():
    inputs = np.zeros((8, 1, 2, 4), dtype=np.float32)
    with pytest.raises(ContractError, match=r"train_inputs .* for kind 'series' it must be \[N, C, 1, W\]"):
        check_task("mine", vector_task(kind="series", train_inputs=inputs, validation_inputs=inputs[:4]))


def test_what_is_no_task_at_all_is_refused():
    register_task("mine", cast("Loader", dict))
    with pytest.raises(ConfigError, match="task 'mine': its loader returned a dict, not a Task"):
        load_task("mine")


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (
            UnavailableError("task 'mine' needs a disk: put one in"),
            "environment.task: task 'mine' needs a disk",
        ),
        (FileNotFoundError(2, "No such file", "mine.npz"), "'mine:big' .* FileNotFoundError: .*mine.npz"),
        (ModuleNotFoundError("No module named 'sound'"), "'mine:big' cannot be loaded: .* named 'sound'"),
    ],
)
def test_what_a_loader_lacks_is_a_matter_of_configuration(error, problem):
    """A run ends at once of it, with status 78; any other error is a bug of the loader, and its trace is wanted."""

    def loader(parameters):
        raise error

    register_task("mine", loader)
    with pytest.raises(ConfigError, match=problem) as caught:
        load_task("mine:big")
    assert caught.value.key == "environment.task"
    error = KeyError("a bug")
    with pytest.raises(KeyError):
        load_task("mine:big")
