"""The adapters in a learner's checkpoint, without all the rest: small enough to be handed on."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from esper_simic.config import Config
from esper_simic.errors import ContractError
from esper_simic.policies.adapter_state import AdapterState
from esper_simic.updates.engine import Engine
from esper_simic.worlds.world import world_of


def adapters_in(tensors: Mapping[str, Tensor], config: Config) -> AdapterState:
    """The adapters in a learner's state, and the digest of the weights under them.

    Args:
        tensors: Of the whole state, as a checkpoint has them.
        config: Of the run that made it.

    Raises:
        ContractError: There are none, or it is the state of another configuration.
    """
    engine = Engine(config.simic_trainer, world_of(config.environment, config.simic_trainer.gamma).spec)
    try:
        engine.load_tensors(tensors)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ContractError(f"its state is not one of a learner of its run: {error!r}") from error
    if engine.adapters is None:
        raise ContractError(
            "it has no adapters; they begin with the update that simic_trainer.lora_start_step names"
        )
    return engine.adapters.adapter_state()
