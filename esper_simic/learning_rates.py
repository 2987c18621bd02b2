"""UnifiedLRController: the only thing that changes a learning rate or makes an optimiser step.

Invariants:
    L1  Only this controller writes a learning rate. Nothing else in the program assigns `param_groups[...]["lr"]`, and
        there is no scheduler beside it.
    L2  Every optimiser is registered, under a name, before its first step, and every group of parameters that joins it
        later joins through here; the optimiser's memory of parameters that stay is kept bit for bit.
    L3  Before each step every rate is compared with the one last written. A difference means that somebody broke L1:
        the controller writes its own rate back, makes the step with it, and tells its caller (`Tampered`), who records
        it and becomes careful (`tampered` says so before the step). Nothing of the other rate reaches a parameter.

The rate of group g in the step after n steps is

    max(base · warm(n) · young(n − a_g) · factor · bound, min_lr)

with `warm`/cosine of `GroupConfig.rate`; `young` of `youth` for a group that joined at step a_g, 1 for those that were
there from the beginning; `factor` in (0, 1] from whoever is careful (conservative mode, the failure ladder); and
`bound = 1 / (1 + s)` under EWC_ADJUSTED, else 1. FROZEN is 0, and no step is made.
n counts steps of the schedule: an update that makes several optimiser steps (minibatches) makes all at one rate.

What may change the rate beside the schedule (`Causes`) is kept twice: as wanted now, and as it was in the last step.
Where they differ, the next step tells it (`RateChanged`) with the rate that this very step would have had. So a change
that is taken back before a step never was, and steps of a schedule are no news.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from esper_simic.errors import InvariantViolation
from esper_simic.rate_facts import RateChanged, Tampered

if TYPE_CHECKING:  # the facts are read where there is no torch
    import torch
    from torch import Tensor

RELATIVE_TOLERANCE: Final = 1e-6
ABSOLUTE_TOLERANCE: Final = 1e-12

YOUNG_SHARE: Final = 0.1
YOUNG_STEPS: Final = 10

HISTORY_MAX: Final = 1000


class LRPolicy(Enum):
    """What an optimiser's parameters are for, and with it the schedule of their rate."""

    POLICY_NETWORK = "policy_network"
    VALUE_NETWORK = "value_network"
    EWC_ADJUSTED = "ewc_adjusted"
    FROZEN = "frozen"


@dataclass(frozen=True, slots=True)
class GroupConfig:
    """How one registered optimiser is driven.

    Attributes:
        policy: The schedule; FROZEN keeps the rate at 0.
        base_lr: Rate after the warm-up, in [1e-6, 1e-2].
        warmup_steps: Steps over which the rate rises linearly: `base_lr * (n + 1) / warmup_steps`; 0 for none.
        min_lr: No rate below this, except FROZEN's 0.
        horizon_steps: Steps at whose end a cosine has brought the rate to `min_lr`, the warm-up's counted; None for
            a rate that stays at its base.
    """

    policy: LRPolicy
    base_lr: float
    warmup_steps: int
    min_lr: float
    horizon_steps: int | None = None

    def __post_init__(self) -> None:
        if self.horizon_steps is not None and self.horizon_steps <= self.warmup_steps:
            raise InvariantViolation(
                f"a cosine that ends after {self.horizon_steps} steps cannot follow a warm-up of {self.warmup_steps}"
            )

    def rate(self, steps_done: int) -> float:
        """The learning rate of the step after `steps_done` steps, before anything but the schedule.

        Linear warm-up w, then, with a horizon H, half a cosine:
        `min_lr + (base_lr - min_lr) (1 + cos(pi p)) / 2`, `p = min(1, (n - w) / (H - w))`.
        """
        if self.policy is LRPolicy.FROZEN:
            return 0.0
        if self.horizon_steps is None or steps_done < self.warmup_steps:
            warm = min(1.0, (steps_done + 1) / self.warmup_steps) if self.warmup_steps else 1.0
            return max(self.base_lr * warm, self.min_lr)
        progress = min(1.0, (steps_done - self.warmup_steps) / (self.horizon_steps - self.warmup_steps))
        span = self.base_lr - self.min_lr
        return max(self.min_lr + span * (1.0 + math.cos(math.pi * progress)) / 2, self.min_lr)


def youth(age: int) -> float:
    """Share of its optimiser's rate that a group of parameters gets in the step after `age` steps of its own.

    New parameters start at a tenth and rise linearly to the whole within 10 steps, whatever the optimiser's own
    schedule does meanwhile: their moments are empty, and the first steps of an adaptive optimiser are as long as its
    rate however small the gradient, beside parameters that were trained for long. (Staying at a tenth for good, the
    other reading of "10 % of the base rate", would train adapters, which begin at zero, ten times too slowly.)
    """
    return min(1.0, YOUNG_SHARE + (1.0 - YOUNG_SHARE) * age / YOUNG_STEPS)


class Causes(msgspec.Struct, frozen=True):
    """What may change an optimiser's rate beside its schedule.

    Attributes:
        policy: In place of the one it was registered with; None for that one.
        factor: Of those who are careful, in (0, 1].
        strength: How firmly old tasks hold these parameters, >= 0; see `set_strength`.
        joined: For each group that joined later, in order, the optimiser's steps by then.
    """

    policy: LRPolicy | None = None
    factor: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    strength: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    joined: list[Annotated[int, msgspec.Meta(ge=0)]] = []


BY_SCHEDULE: Final = Causes()
"""Nothing beside the schedule."""


@dataclass(frozen=True, slots=True)
class RateStep:
    """What one step of an optimiser was made with: the first group's rate, and what is worth telling."""

    rate: float
    changed: RateChanged | None
    tampered: Tampered | None


class _State(msgspec.Struct, frozen=True):
    """What decides an optimiser's coming rates; `used` is None where it equals `wanted`."""

    steps: Annotated[int, msgspec.Meta(ge=0)]
    wanted: Causes = BY_SCHEDULE
    used: Causes | None = None


@dataclass(slots=True)
class _Registered:
    optimizer: torch.optim.Optimizer
    config: GroupConfig
    first_groups: int
    written: list[float]
    steps_done: int = 0
    wanted: Causes = BY_SCHEDULE
    used: Causes = BY_SCHEDULE

    def rate(self, causes: Causes, steps_done: int, age: int | None = None) -> float:
        """Of a group that is `age` steps old, or of one that was there from the beginning."""
        config, policy = self.config, causes.policy or self.config.policy
        if policy is LRPolicy.FROZEN:
            return 0.0
        if policy is not config.policy:
            config = GroupConfig(
                policy, config.base_lr, config.warmup_steps, config.min_lr, config.horizon_steps
            )
        rate = config.rate(steps_done) * causes.factor
        if policy is LRPolicy.EWC_ADJUSTED:
            rate /= 1.0 + causes.strength
        if age is not None:
            rate *= youth(age)
        return max(rate, config.min_lr)

    def rates(self, causes: Causes, steps_done: int) -> list[float]:
        """Of every group that these causes know, in order."""
        first = self.rate(causes, steps_done)
        later = [self.rate(causes, steps_done, steps_done - joined) for joined in causes.joined]
        return [first] * self.first_groups + later


class UnifiedLRController:
    """Owns the learning rates of every registered optimiser.

    It keeps the newest `HISTORY_MAX` changes in `history`, for a look at a living process; the truth about changes is
    what its caller makes of each `RateStep`.
    """

    def __init__(self) -> None:
        self._registered: dict[str, _Registered] = {}
        self.history: deque[RateChanged | Tampered] = deque(maxlen=HISTORY_MAX)

    # -- what there is to drive ------------------------------------------------------------------------------------

    def register_optimizer(self, name: str, optimizer: torch.optim.Optimizer, config: GroupConfig) -> None:
        """Put an optimiser under this controller and write its first rate.

        Raises:
            InvariantViolation: The name is taken.
        """
        if name in self._registered:
            raise InvariantViolation(f"an optimiser named {name!r} is registered already")
        groups = len(optimizer.param_groups)
        entry = _Registered(optimizer, config, groups, [config.rate(0)] * groups)
        self._registered[name] = entry
        _write(entry)

    def forget(self, name: str) -> None:
        """Let go of an optimiser whose parameters are no more, such as adapters that were merged.

        Raises:
            InvariantViolation: It is not registered.
        """
        self._entry(name)
        del self._registered[name]

    def add_group(self, name: str, parameters: Iterable[Tensor]) -> int:
        """Let new parameters join an optimiser, with its own hyperparameters and a rate that `youth` lowers.

        Args:
            name: The optimiser.
            parameters: Leaves that no group of it has yet, each once, at least one.

        Returns:
            The index of their group.

        Raises:
            InvariantViolation: The optimiser is not registered, or has such a parameter already.
        """
        entry, joining = self._entry(name), list(parameters)
        known = _identities(entry.optimizer)
        if not joining or len({id(one) for one in joining} - known) < len(joining):
            raise InvariantViolation(
                f"{len(joining)} parameters cannot join {name!r}: there must be some, each once, and none that it has"
            )
        entry.wanted = msgspec.structs.replace(entry.wanted, joined=[*entry.wanted.joined, entry.steps_done])
        entry.written.append(entry.rate(entry.wanted, entry.steps_done, 0))
        entry.optimizer.add_param_group({"params": joining, "lr": entry.written[-1]})
        return len(entry.written) - 1

    def replace_parameters(self, name: str, replacements: Mapping[Tensor, Tensor | None]) -> None:
        """Follow a change of the architecture: other tensors stand where parameters stood, or none.

        The optimiser's memory of a parameter goes to its successor as it is, bit for bit; that of all others is not
        touched. New parameters come in by `add_group`.

        Args:
            name: The optimiser.
            replacements: For each parameter that is no more, its successor (same shape, type and device), or None.

        Raises:
            InvariantViolation: The optimiser is not registered or has no such parameter, or the successor is of
                another form or is there already. Nothing was changed then.
        """
        entry = self._entry(name)
        _check_successors(name, entry.optimizer, replacements)
        successors = {id(old): new for old, new in replacements.items()}
        for group in entry.optimizer.param_groups:
            kept = [successors.get(id(one), one) for one in group["params"]]
            group["params"] = [one for one in kept if one is not None]
        for old, new in replacements.items():
            state = entry.optimizer.state.pop(old, None)
            if new is not None and state is not None:
                entry.optimizer.state[new] = state

    # -- what may change a rate ------------------------------------------------------------------------------------

    def set_factor(self, name: str, factor: float) -> None:
        """Multiply an optimiser's rate from its next step on; 1 undoes it.

        Raises:
            InvariantViolation: It is not registered, or the factor is not in (0, 1]: the careful only lower a rate.
        """
        entry = self._entry(name)
        if not 0.0 < factor <= 1.0:
            raise InvariantViolation(f"factor {factor} of {name!r} is not in (0, 1]; to stop it, use FROZEN")
        entry.wanted = msgspec.structs.replace(entry.wanted, factor=float(factor))

    def set_policy(self, name: str, policy: LRPolicy) -> None:
        """Drive an optimiser by another policy from its next step on. Its schedule goes on counting meanwhile.

        Raises:
            InvariantViolation: It is not registered.
        """
        entry = self._entry(name)
        other = None if policy is entry.config.policy else policy
        entry.wanted = msgspec.structs.replace(entry.wanted, policy=other)

    def set_strength(self, name: str, strength: float) -> None:
        """Say how firmly old tasks hold an optimiser's parameters: under EWC_ADJUSTED its rate is divided by 1 + s.

        s = λ · mean of the diagonal Fisher over these parameters (λ comes in here, once, by the caller). The penalty
        `λ/2 · F (θ − θ*)²` has curvature λF, so `1 / (1 + s)` is the shortening that an implicit step of unit length
        on the mean parameter would have: rates fall as old tasks bind more, and never below `min_lr`.

        Raises:
            InvariantViolation: It is not registered, or s is negative or not finite.
        """
        entry = self._entry(name)
        if not (strength >= 0.0 and math.isfinite(strength)):
            raise InvariantViolation(
                f"strength {strength} of {name!r} is no consolidation: it must be finite, >= 0"
            )
        entry.wanted = msgspec.structs.replace(entry.wanted, strength=float(strength))

    # -- stepping --------------------------------------------------------------------------------------------------

    def step(
        self,
        name: str,
        *,
        factor: float | None = None,
        make: Callable[[torch.optim.Optimizer], object] | None = None,
        moves_on: bool = True,
    ) -> RateStep:
        """Verify, set the scheduled rates, then make one optimiser step; FROZEN makes none.

        Args:
            name: The optimiser.
            factor: As `set_factor`, which it calls; None leaves the factor as it is.
            make: How the step is made where not by the optimiser alone, such as `GradScaler.step`.
            moves_on: Whether it is the schedule's next step. An update of several optimiser steps is one of the
                schedule: its second one, and those after it, are that step again.

        Returns:
            The rate used, and what there is to tell.

        Raises:
            InvariantViolation: The optimiser is not registered, or has a group that is not (L2).
        """
        entry = self._entry(name)
        if factor is not None:
            self.set_factor(name, factor)
        if not moves_on:
            entry.steps_done = max(entry.steps_done - 1, 0)
        tampered = _verify(name, entry)
        changed = _changed(name, entry)
        entry.used = entry.wanted
        entry.written = entry.rates(entry.used, entry.steps_done)
        _write(entry)
        if (entry.used.policy or entry.config.policy) is not LRPolicy.FROZEN:
            if make is None:
                entry.optimizer.step()
            else:
                make(entry.optimizer)
        entry.steps_done += 1
        self.history.extend(fact for fact in (tampered, changed) if fact is not None)
        return RateStep(entry.written[0], changed, tampered)

    def tampered(self) -> int:
        """Optimisers of which somebody else has written a rate (L3); the next step of each tells more and mends it."""
        return sum(_verify(name, entry) is not None for name, entry in self._registered.items())

    def rates(self) -> dict[str, float]:
        """The rate last written to each optimiser's first group, by name."""
        return {name: entry.written[0] for name, entry in self._registered.items()}

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What decides the coming rates, by optimiser name; JSON types only.

        The number of its steps where an optimiser has followed its schedule alone (which is all that checkpoints had
        once); otherwise a mapping with `steps`, `wanted` and, until the next step, `used`.
        """
        return {name: _state_of(entry) for name, entry in self._registered.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, with the same optimisers registered and the same groups added.

        Raises:
            InvariantViolation: The names or groups differ from those registered.
            msgspec.ValidationError: It is not what `state_dict` gives. Nothing was changed then.
        """
        if set(state) != set(self._registered):
            raise InvariantViolation(
                f"state of {sorted(state)} cannot drive optimisers {sorted(self._registered)}"
            )
        parsed = {
            name: msgspec.convert({"steps": one} if isinstance(one, int) else one, _State)
            for name, one in state.items()
        }
        for name, one in parsed.items():
            groups = self._registered[name].first_groups + len(one.wanted.joined)
            if groups != len(self._registered[name].optimizer.param_groups):
                raise InvariantViolation(
                    f"state of {groups} groups cannot drive {name!r}, which has "
                    f"{len(self._registered[name].optimizer.param_groups)}: add_group before loading"
                )
        for name, one in parsed.items():
            _restore(self._registered[name], one)

    def _entry(self, name: str) -> _Registered:
        if name not in self._registered:
            raise InvariantViolation(
                f"no optimiser named {name!r} is registered; known: {sorted(self._registered)}"
            )
        return self._registered[name]


def _write(entry: _Registered) -> None:
    for group, rate in zip(entry.optimizer.param_groups, entry.written, strict=True):
        if isinstance(group["lr"], int | float):
            group["lr"] = rate
        else:
            group["lr"].fill_(rate)  # a tensor: a captured or compiled step reads this very one


def _verify(name: str, entry: _Registered) -> Tampered | None:
    groups = entry.optimizer.param_groups
    if len(groups) != len(entry.written):
        raise InvariantViolation(
            f"{name!r} has {len(groups)} groups, {len(entry.written)} are registered: only add_group may add one"
        )
    rates = [float(group["lr"]) for group in groups]
    # Negated, so that a rate that is no number counts as different.
    differing = [
        index
        for index, (found, written) in enumerate(zip(rates, entry.written, strict=True))
        if not abs(found - written) <= max(ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE * abs(written))
    ]
    if not differing:
        return None
    first = differing[0]
    return Tampered(
        name=name,
        step=entry.steps_done + 1,
        group=first,
        groups=len(differing),
        found=rates[first] if math.isfinite(rates[first]) else None,
        written=entry.written[first],
    )


def _changed(name: str, entry: _Registered) -> RateChanged | None:
    causes = [
        field
        for field in Causes.__struct_fields__
        if getattr(entry.wanted, field) != getattr(entry.used, field)
    ]
    if not causes:
        return None
    return RateChanged(
        name=name,
        step=entry.steps_done + 1,
        causes=causes,
        before=entry.rate(entry.used, entry.steps_done),
        after=entry.rate(entry.wanted, entry.steps_done),
    )


def _state_of(entry: _Registered) -> int | dict[str, Any]:
    if entry.used == entry.wanted == BY_SCHEDULE:
        return entry.steps_done
    state = {"steps": entry.steps_done, "wanted": msgspec.to_builtins(entry.wanted)}
    return state if entry.used == entry.wanted else state | {"used": msgspec.to_builtins(entry.used)}


def _restore(entry: _Registered, state: _State) -> None:
    entry.steps_done, entry.wanted = state.steps, state.wanted
    entry.used = state.wanted if state.used is None else state.used
    # As after the last step; a group that joined since has the rate that it was given then.
    entry.written = entry.rates(entry.used, max(state.steps - 1, 0))
    joined_since = state.wanted.joined[len(entry.used.joined) :]
    entry.written += [entry.rate(state.wanted, state.steps, 0) for _ in joined_since]
    _write(entry)


def _identities(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(one) for group in optimizer.param_groups for one in group["params"]}


def _check_successors(
    name: str, optimizer: torch.optim.Optimizer, replacements: Mapping[Tensor, Tensor | None]
) -> None:
    known, taken = _identities(optimizer), set[int]()
    for old, new in replacements.items():
        if id(old) not in known:
            raise InvariantViolation(f"{name!r} has no such parameter of shape {tuple(old.shape)} to replace")
        if new is None:
            continue
        if id(new) in known or id(new) in taken:
            raise InvariantViolation(f"{name!r} would have a parameter of shape {tuple(new.shape)} twice")
        if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
            raise InvariantViolation(
                f"{name!r}: {new.dtype} {tuple(new.shape)} on {new.device} cannot take over the optimiser's memory of "
                f"{old.dtype} {tuple(old.shape)} on {old.device}; drop that one and add_group this one"
            )
        taken.add(id(new))
