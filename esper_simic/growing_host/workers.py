"""The trainer and the validator of a bank of hosts, with a task's samples in the bank's precision and place."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from esper_simic.config import EnvironmentConfig
from esper_simic.errors import ConfigError
from esper_simic.growing_host.parameters import ParameterBank
from esper_simic.growing_host.tasks import Task
from esper_simic.growing_host.training import Trainer
from esper_simic.growing_host.validation import Validator


def make_workers(bank: ParameterBank, task: Task, config: EnvironmentConfig) -> tuple[Trainer, Validator]:
    """Those who train and measure the hosts of a bank.

    Raises:
        ConfigError: The task holds out fewer samples than are to be measured.
    """
    if config.validation_samples > len(task.validation_labels):
        raise ConfigError(
            f"task {task.name!r} holds out {len(task.validation_labels)} samples, not {config.validation_samples}",
            "environment.validation_samples",
        )
    like = bank.parameters

    def inputs(values: NDArray[np.generic]) -> torch.Tensor:
        tokens = np.issubdtype(values.dtype, np.integer)
        return torch.tensor(values, dtype=torch.int64 if tokens else like.dtype, device=like.device)

    def labels(values: NDArray[np.int64]) -> torch.Tensor:
        return torch.tensor(values, device=like.device)

    samples = slice(0, config.validation_samples)
    trainer = Trainer(bank, inputs(task.train_inputs), labels(task.train_labels), config)
    validator = Validator(
        bank, inputs(task.validation_inputs[samples]), labels(task.validation_labels[samples])
    )
    return trainer, validator
