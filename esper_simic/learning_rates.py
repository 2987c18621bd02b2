"""UnifiedLRController: the only thing that changes a learning rate or makes an optimiser step.

Invariants:
    L1  Only `step` writes a learning rate. Nothing else in the program assigns `param_groups[...]["lr"]`.
    L2  Every optimiser is registered, under a name, before its first step.
    L3  Before each step every learning rate is compared with the one last written; a difference means that somebody
        broke L1.

First form: a linear warm-up to the base rate, then constant, never below the minimum. Its state is the number of
steps of each optimiser, so it is rebuilt exactly from a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

import torch

from esper_simic.errors import InvariantViolation

RELATIVE_TOLERANCE: Final = 1e-6
ABSOLUTE_TOLERANCE: Final = 1e-12


class LRPolicy(Enum):
    """What an optimiser's parameters are for, and with it the schedule of their rate."""

    POLICY_NETWORK = "policy_network"
    VALUE_NETWORK = "value_network"
    FROZEN = "frozen"


@dataclass(frozen=True, slots=True)
class GroupConfig:
    """How one registered optimiser is driven.

    Attributes:
        policy: The schedule; FROZEN keeps the rate at 0.
        base_lr: Rate after the warm-up, in [1e-6, 1e-2].
        warmup_steps: Steps over which the rate rises linearly: `base_lr * (n + 1) / warmup_steps`; 0 for none.
        min_lr: No rate below this, except FROZEN's 0.
    """

    policy: LRPolicy
    base_lr: float
    warmup_steps: int
    min_lr: float

    def rate(self, steps_done: int) -> float:
        """The learning rate of the step after `steps_done` steps."""
        if self.policy is LRPolicy.FROZEN:
            return 0.0
        warm = min(1.0, (steps_done + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return max(self.base_lr * warm, self.min_lr)


@dataclass(slots=True)
class _Registered:
    optimizer: torch.optim.Optimizer
    config: GroupConfig
    written_lr: float
    steps_done: int = 0


class UnifiedLRController:
    """Owns the learning rates of every registered optimiser."""

    def __init__(self) -> None:
        self._registered: dict[str, _Registered] = {}

    def register_optimizer(self, name: str, optimizer: torch.optim.Optimizer, config: GroupConfig) -> None:
        """Put an optimiser under this controller and write its first rate.

        Raises:
            InvariantViolation: The name is taken.
        """
        if name in self._registered:
            raise InvariantViolation(f"an optimiser named {name!r} is registered already")
        self._registered[name] = _Registered(optimizer, config, config.rate(0))
        self._write(self._registered[name])

    def step(self, name: str) -> float:
        """Set the scheduled rate, then make one optimiser step.

        Returns:
            The learning rate used.

        Raises:
            InvariantViolation: The optimiser is not registered (L2), or its rate was changed by somebody else (L3).
        """
        if name not in self._registered:
            raise InvariantViolation(
                f"no optimiser named {name!r} is registered; known: {sorted(self._registered)}"
            )
        entry = self._registered[name]
        self._verify(name, entry)
        entry.written_lr = entry.config.rate(entry.steps_done)
        self._write(entry)
        entry.optimizer.step()
        entry.steps_done += 1
        return entry.written_lr

    def rates(self) -> dict[str, float]:
        """The rate last written, by optimiser name."""
        return {name: entry.written_lr for name, entry in self._registered.items()}

    def state_dict(self) -> dict[str, int]:
        """Steps done, by optimiser name."""
        return {name: entry.steps_done for name, entry in self._registered.items()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            InvariantViolation: The names differ from those registered.
        """
        if set(state) != set(self._registered):
            raise InvariantViolation(
                f"state of {sorted(state)} cannot drive optimisers {sorted(self._registered)}"
            )
        for name, steps_done in state.items():
            entry = self._registered[name]
            entry.steps_done = steps_done
            entry.written_lr = entry.config.rate(max(steps_done - 1, 0))
            self._write(entry)

    @staticmethod
    def _write(entry: _Registered) -> None:
        for group in entry.optimizer.param_groups:
            group["lr"] = entry.written_lr

    @staticmethod
    def _verify(name: str, entry: _Registered) -> None:
        for index, group in enumerate(entry.optimizer.param_groups):
            found = float(group["lr"])
            if abs(found - entry.written_lr) > max(
                ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE * abs(entry.written_lr)
            ):
                raise InvariantViolation(
                    f"learning rate of {name!r} group {index} is {found}, the controller wrote {entry.written_lr}: "
                    f"only UnifiedLRController.step may change it"
                )
