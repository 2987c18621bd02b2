"""The five families of error, and who handles each.

| error | handler |
|---|---|
| `ConfigError` | nobody: stop at start with exit status 78 and name the key |
| `ContractError` | the receiver refuses that message, counts it, goes on |
| `UnavailableError` | the organ that touched the world retries or opens its breaker |
| `BudgetExceeded` | the owner of the budget sheds by its stated policy |
| `InvariantViolation` | the process records it and exits; its supervisor starts a new one |

Every error is raised with facts: the thing, its value, the limit, and the remedy where there is one.
"""

from __future__ import annotations


class SimicError(Exception):
    """Root of the five families; never raised itself."""


class ConfigError(SimicError):
    """The configuration cannot be obeyed.

    Args:
        message: What is wrong and the remedy.
        key: Dotted path of the offending key, such as `simic_trainer.batch_size`; empty for a whole file.
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.key = key


class ContractError(SimicError):
    """Bytes or values from another process break the contract between them."""


class UnavailableError(SimicError):
    """Something outside the process (disk, socket, child) cannot serve now."""


class BudgetExceeded(SimicError):
    """A stated limit was reached and the work cannot be taken."""


class InvariantViolation(SimicError):
    """The program contradicts itself; going on would only spread the damage."""
