"""CIFAR-10: through torchvision where it is, and a plain word about what is missing where it is not."""

from __future__ import annotations

import hashlib
import pickle
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from esper_simic.errors import ConfigError, UnavailableError
from esper_simic.growing_host.tasks import check_task, load_task
from esper_simic.growing_host.tasks.cifar10 import cifar10

TRAIN, HELD_OUT = 60, 40


def photographs(count: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """`[N, 32, 32, 3]` uint8 and labels, each class equally often, in no order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 10)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), labels.tolist()


def check(task) -> None:
    """The task is made of `photographs(TRAIN, 0)` and `photographs(HELD_OUT, 1)`."""
    check_task("cifar10", task)
    images, labels = photographs(TRAIN, 0)
    assert (task.kind, task.classes, task.train_inputs.shape) == ("image", 10, (TRAIN, 3, 32, 32))
    assert task.train_labels.tolist() == labels
    mean, deviation = images.mean(axis=(0, 1, 2)), images.std(axis=(0, 1, 2))
    expected = ((images - mean) / deviation).transpose(0, 3, 1, 2)
    assert task.train_inputs == pytest.approx(expected, abs=1e-5)
    held_out, held_out_labels = photographs(HELD_OUT, 1)
    assert sorted(task.validation_labels.tolist()) == sorted(held_out_labels)
    for turn in range(HELD_OUT // 10):
        assert sorted(task.validation_labels[10 * turn : 10 * turn + 10]) == list(range(10))
    wanted = ((held_out - mean) / deviation).transpose(0, 3, 1, 2)
    for sample, label in zip(task.validation_inputs, task.validation_labels, strict=True):
        match = np.abs(wanted - sample).max(axis=(1, 2, 3)).argmin()
        assert sample == pytest.approx(wanted[match], abs=1e-5)
        assert label == held_out_labels[match]


@pytest.fixture
def stand_in(monkeypatch):
    """A torchvision that answers as the real one does, and remembers what it was asked."""
    asked = []

    class CIFAR10:
        def __init__(self, root, train, download):
            asked.append((root, train, download))
            if root == "empty":
                raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
            self.data, self.targets = photographs(TRAIN, 0) if train else photographs(HELD_OUT, 1)

    datasets = ModuleType("torchvision.datasets")
    vars(datasets).update(CIFAR10=CIFAR10)
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    return SimpleNamespace(asked=asked)


def test_the_photographs_become_a_task(stand_in):
    check(cifar10())
    check(cifar10("/srv/data"))
    assert stand_in.asked == [
        ("data", True, False),
        ("data", False, False),
        ("/srv/data", True, False),
        ("/srv/data", False, False),
    ]


def test_missing_files_are_named_with_their_place(stand_in):
    with pytest.raises(
        ConfigError,
        match=r"environment.task: .* no intact cifar-10-batches-py in the folder 'empty' .*cifar10:FOLDER",
    ):
        load_task("cifar10:empty")


def test_a_missing_torchvision_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ConfigError, match=r"task 'cifar10' needs torchvision.*pip install torchvision"):
        load_task("cifar10:nowhere")


def test_torchvision_itself_reads_files_of_that_layout(tmp_path, monkeypatch):
    reason = "torchvision is not installed: its own CIFAR-10 loader is not tried, only a stand-in"
    datasets = pytest.importorskip("torchvision.datasets", reason=reason)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def written(name: str, content: object) -> list[str]:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return [name, hashlib.md5(raw, usedforsecurity=False).hexdigest()]

    def batch(name: str, pixels: np.ndarray, labels: list[int]) -> list[str]:
        rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
        return written(name, {"data": rows, "labels": labels})

    images, labels = photographs(TRAIN, 0)
    parts = [slice(12 * part, 12 * part + 12) for part in range(5)]
    train = [batch(f"data_batch_{1 + i}", images[part], labels[part]) for i, part in enumerate(parts)]
    test = [batch("test_batch", *photographs(HELD_OUT, 1))]
    names = written("batches.meta", {"label_names": [f"class {label}" for label in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", test)
    meta = {"filename": names[0], "key": "label_names", "md5": names[1]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    check(cifar10(str(tmp_path)))
    (folder / "data_batch_3").write_bytes(b"not what was published")
    with pytest.raises(UnavailableError, match="no intact cifar-10-batches-py"):
        cifar10(str(tmp_path))
