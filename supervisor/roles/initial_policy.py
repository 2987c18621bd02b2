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

from esper_simic.config import Config, TrainerConfig
from esper_simic.errors import ConfigError, ContractError, UnavailableError
from esper_simic.policies.adapter_state import AdapterState
from esper_simic.policies.lora import Adapters, base_weights, has_adapters, merged_weights
from esper_simic.updates.engine import POLICY, Engine
from supervisor import checkpoints
from supervisor.roles.adapters import adapters_in
from supervisor.roles.fold import STATE_FILE, config_of_other_run

KEY: Final = "simic_trainer.initial_policy"
ADAPTERS_KEY: Final = "simic_trainer.initial_adapters"

Weights = Mapping[str, Tensor]


class InitialPolicy(NamedTuple):
    """Where weights and adapters were read, and both as they are journaled: safetensors, adapters only if there are."""

    source: str
    adapters_source: str
    frames: tuple[bytes, ...]


def read_initial_policy(trainer: TrainerConfig, engine: Engine) -> InitialPolicy:
    """The weights to begin with, of the newest good checkpoint of a run or of a file, and adapters that fit them.

    Adapters that the weights have themselves are merged into them, unless those to begin with were trained without.

    Args:
        trainer: What is configured; names the source of the weights.
        engine: A fresh one of this configuration: what is read is tried on it.

    Raises:
        ConfigError: There are none, or they are another network's; names the first tensor that does not fit.
    """
    path, state, made_with = _weights_at(Path(str(trainer.initial_policy)), trainer)
    merged = _merged(state, made_with)
    _check(path, merged, _merged(engine.policy.state_dict(), trainer))
    if trainer.initial_adapters is None or engine.adapters is None:
        return InitialPolicy(str(path), "", (_file_of(merged),))
    source, adapters = _adapters_at(Path(trainer.initial_adapters))
    _check_finite(source, adapters.tensors, ADAPTERS_KEY)
    weights = _base_of(adapters, (merged, base_weights(state)), engine, engine.adapters)
    if weights is None:
        raise ConfigError(
            f"the adapters in {source} were trained on weights of digest {adapters.base_digest}, and {path} holds "
            f"others; name in {KEY} what they were trained on",
            ADAPTERS_KEY,
        )
    try:
        engine.begin_with(weights, adapters)
    except ContractError as error:
        raise ConfigError(f"{source}: {error}; take their rank, alpha and network", ADAPTERS_KEY) from error
    return InitialPolicy(str(path), str(source), (_file_of(weights), adapters.to_bytes()))


def _base_of(
    adapters: AdapterState, choices: tuple[Weights, ...], engine: Engine, own: Adapters
) -> Weights | None:
    """The weights that these adapters were trained on; None where it is none of them."""
    for weights in choices:
        engine.begin_with(weights)
        if own.base_digest() == adapters.base_digest:
            return weights
    return None


# -- where they stand --------------------------------------------------------------------------------------------------


def _weights_at(source: Path, trainer: TrainerConfig) -> tuple[Path, Weights, TrainerConfig]:
    """Where a policy's weights are, they by their own names, and how the adapters in them, if any, were made.

    A file has none: how they were made stands in the journal of their run.
    """
    if source.is_dir():
        path, tensors, config = _of_run(source, KEY)
        made_with = config.simic_trainer
    else:
        path, made_with = source, trainer
        try:
            tensors = safetensors.torch.load(_read(source, KEY))
        except safetensors.SafetensorError as error:
            raise ConfigError(f"{source} is no safetensors file: {error}", KEY) from error
        except KeyError as error:
            raise ConfigError(
                f"{source} holds numbers of a type that is not known here: {error}", KEY
            ) from error
        if has_adapters(tensors):
            raise ConfigError(
                f"{source} holds adapters, whose rank and alpha only its run knows; name that run's directory",
                KEY,
            )
    of_policy = {name.removeprefix(POLICY): t for name, t in tensors.items() if name.startswith(POLICY)}
    return path, of_policy or tensors, made_with


def _adapters_at(source: Path) -> tuple[Path, AdapterState]:
    path = source
    try:
        if not source.is_dir():
            return path, AdapterState.from_bytes(_read(source, ADAPTERS_KEY))
        path, tensors, config = _of_run(source, ADAPTERS_KEY)
        return path, adapters_in(tensors, config)
    except ContractError as error:
        raise ConfigError(f"{path}: {error}", ADAPTERS_KEY) from error


def _of_run(directory: Path, key: str) -> tuple[Path, Weights, Config]:
    """The newest good checkpoint of a run: where it is, its tensors, and the run's configuration."""
    config = config_of_other_run(directory, key)
    passed_over = []
    for listed in reversed(checkpoints.list_checkpoints(directory / "checkpoints")):
        try:
            _, files = checkpoints.load(listed.path)
            if STATE_FILE not in files:
                raise ContractError(f"it has no {STATE_FILE}")
            return listed.path, safetensors.torch.load(files[STATE_FILE]), config
        except (ContractError, UnavailableError, safetensors.SafetensorError) as error:
            passed_over.append(f"{listed.path.name}: {error}")
    reasons = f" ({'; '.join(passed_over)})" if passed_over else ""
    raise ConfigError(f"{directory} has no good checkpoint{reasons}; let that run make one first", key)


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"{path} is not there; name a run's directory or a .safetensors file", key
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", key) from error


def _merged(state: Weights, trainer: TrainerConfig) -> dict[str, Tensor]:
    """A policy's tensors by their own names, adapters merged."""
    return merged_weights(state, rank=max(1, trainer.lora_rank), alpha=trainer.lora_alpha)


def _file_of(weights: Weights) -> bytes:
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in weights.items()})


# -- whether they fit --------------------------------------------------------------------------------------------------


def _check(path: Path, found: Weights, wanted: Weights) -> None:
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
    _check_finite(path, found, KEY)


def _check_finite(path: Path, found: Weights, key: str) -> None:
    for name, tensor in found.items():
        if not bool(tensor.isfinite().all()):
            raise ConfigError(f"{path} holds {name} with numbers that are not finite", key)


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
