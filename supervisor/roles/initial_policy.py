"""The weights that a policy begins with, where they were made elsewhere: by another run, or as a file.

They are read once, by the first life of a learner, which writes them into its journal: what comes after needs neither
run nor file any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from esper_simic.config import TrainerConfig
from esper_simic.errors import ConfigError, ContractError, UnavailableError
from esper_simic.policies.lora import merged_weights
from esper_simic.policies.policy import Policy
from esper_simic.updates.engine import POLICY
from supervisor import checkpoints
from supervisor.journal import JournalDamage
from supervisor.roles.fold import STATE_FILE, config_of_journal

KEY: Final = "simic_trainer.initial_policy"


class InitialPolicy(NamedTuple):
    """Weights as safetensors of a policy without adapters, and where they were read."""

    source: str
    weights: bytes


def read_initial_policy(source: Path, policy: Policy, trainer: TrainerConfig) -> InitialPolicy:
    """The weights in the newest good checkpoint of a run, or in a file.

    Args:
        source: The run's directory, or a .safetensors file of a policy or of a learner's whole state.
        policy: The one that shall begin with them.
        trainer: Its configuration.

    Raises:
        ConfigError: There are none, or they are another network's; names the first tensor that does not fit.
    """
    if source.is_dir():
        path, tensors, adapters_of = _of_run(source)
    elif source.is_file():
        path, tensors, adapters_of = source, _of_file(source), trainer
    else:
        raise ConfigError(f"{source} is not there; name a run's directory or a .safetensors file", KEY)
    found = _plain(tensors, adapters_of)
    _check(path, found, _plain(policy.state_dict(), trainer))
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in found.items()})
    return InitialPolicy(str(path), weights)


def _of_run(directory: Path) -> tuple[Path, Mapping[str, Tensor], TrainerConfig]:
    journal = directory / "journal" / "learner-0"
    try:
        trainer = config_of_journal(journal).simic_trainer
    except (ContractError, JournalDamage, UnavailableError) as error:
        raise ConfigError(f"{directory} is no run with a learner's journal: {error}", KEY) from error
    passed_over = []
    for listed in reversed(checkpoints.list_checkpoints(directory / "checkpoints")):
        try:
            _, files = checkpoints.load(listed.path)
            if STATE_FILE not in files:
                raise ContractError(f"it has no {STATE_FILE}")
            return listed.path, safetensors.torch.load(files[STATE_FILE]), trainer
        except (ContractError, UnavailableError, safetensors.SafetensorError) as error:
            passed_over.append(f"{listed.path.name}: {error}")
    reasons = f" ({'; '.join(passed_over)})" if passed_over else ""
    raise ConfigError(f"{directory} has no good checkpoint{reasons}; let that run make one first", KEY)


def _of_file(path: Path) -> Mapping[str, Tensor]:
    try:
        return safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", KEY) from error
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{path} is no safetensors file: {error}", KEY) from error


def _plain(tensors: Mapping[str, Tensor], trainer: TrainerConfig) -> dict[str, Tensor]:
    """A policy's tensors by their own names, adapters merged; `tensors` may be a learner's whole state."""
    of_policy = {name.removeprefix(POLICY): t for name, t in tensors.items() if name.startswith(POLICY)}
    return merged_weights(of_policy or tensors, rank=max(1, trainer.lora_rank), alpha=trainer.lora_alpha)


def _check(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    remedy = "take the network and the environment of the run that made them"
    for name in (*wanted, *sorted(found.keys() - wanted.keys())):
        if name not in found:
            raise ConfigError(f"{path} lacks {name}, which the configured policy has; {remedy}", KEY)
        if name not in wanted:
            raise ConfigError(f"{path} holds {name}, which the configured policy has not; {remedy}", KEY)
        if found[name].shape != wanted[name].shape or found[name].dtype != wanted[name].dtype:
            raise ConfigError(
                f"{path} holds {name} as {_described(found[name])}, the configured policy has it as "
                f"{_described(wanted[name])}; {remedy}",
                KEY,
            )
        if not bool(found[name].isfinite().all()):
            raise ConfigError(f"{path} holds {name} with numbers that are not finite", KEY)


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
