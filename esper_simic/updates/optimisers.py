"""The optimisers of a learner, and the one way in which a loss becomes a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from esper_simic.learning_rates import GroupConfig, UnifiedLRController
from esper_simic.loss_scale import LossScale
from esper_simic.rate_facts import RateChanged, Tampered
from esper_simic.telemetry import NullObserver, Phase, StepObserver

ADAM_EPSILON: Final = 1e-5
"""Larger than Adam's own 1e-8: steps of parameters whose gradients are nearly always 0 stay small."""


UNWATCHED: Final = NullObserver()


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters of one optimiser and the schedule of their rate."""

    parameters: Sequence[nn.Parameter]
    schedule: GroupConfig


class Optimisers:
    """Adam over named groups of parameters, driven by one `UnifiedLRController`.

    Args:
        groups: By the optimiser's name.
        settings: Further keywords of `torch.optim.Adam`, such as `fused`.
        loss_scale: By what losses are multiplied first; None where gradients need none.
    """

    def __init__(
        self,
        groups: Mapping[str, Group],
        settings: Mapping[str, Any],
        loss_scale: LossScale | None = None,
    ) -> None:
        self.loss_scale = loss_scale
        """State: it follows each step."""
        self.overflows = 0
        """Steps that were left out because of it, ever."""
        self.rates = UnifiedLRController()
        self._by_name: dict[str, torch.optim.Optimizer] = {}
        self._parameters: list[nn.Parameter] = []
        for name, group in groups.items():
            schedule = group.schedule
            optimizer = torch.optim.Adam(group.parameters, lr=schedule.base_lr, eps=ADAM_EPSILON, **settings)
            self._by_name[name] = optimizer
            self._parameters.extend(group.parameters)
            self.rates.register_optimizer(name, optimizer, schedule)
        self.lr_factor = 1.0
        """Of those who are careful, on every scheduled rate."""
        self._moves_on = True
        """Whether the next step is the first of its update: schedules count updates."""
        self.moves = 0
        """Steps that were begun; one of them may have moved some parameters and not others."""
        self._changed: list[RateChanged] = []
        self._tampered: list[Tampered] = []

    def begin_update(self) -> None:
        """The next step is the first of an update; all of the update's steps have the rates of this one."""
        self._moves_on = True

    def minimise(self, loss: Tensor, *, max_norm: float, observer: StepObserver = UNWATCHED) -> float:
        """One step of every optimiser down the gradient of a loss, clipped to a global norm.

        Args:
            loss: A scalar.
            max_norm: What the gradient of all parameters together is scaled down to.
            observer: Told of the phases.

        Returns:
            The norm before it was clipped; 0 for a step that was left out because the scaled gradient overflowed.

        Raises:
            FloatingPointError: Loss or gradient is not finite, and no scale is to blame; nothing was changed.
        """
        for optimizer in self._by_name.values():
            optimizer.zero_grad(set_to_none=True)
        scale = self.loss_scale
        (loss if scale is None else loss * scale.scale).backward()  # type: ignore[no-untyped-call]
        if scale is not None:
            scale.unscale(self._parameters)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, max_norm)
        if scale is not None and self._has_overflowed(scale, loss, norm):
            observer.passed(Phase.BACKWARD)
            return 0.0
        if not bool(torch.isfinite(norm + loss.detach())):
            raise FloatingPointError(f"loss {float(loss.detach())}, gradient norm {float(norm)}")
        observer.passed(Phase.BACKWARD)
        self.moves += 1
        for name in self._by_name:
            step = self.rates.step(name, factor=self.lr_factor, moves_on=self._moves_on)
            self._changed += [step.changed] if step.changed is not None else []
            self._tampered += [step.tampered] if step.tampered is not None else []
        self._moves_on = False
        observer.passed(Phase.OPTIMIZER)
        return float(norm)

    def _has_overflowed(self, scale: LossScale, loss: Tensor, norm: Tensor) -> bool:
        """Whether the gradient was too large for its type because of the scale; the scale follows."""
        is_finite = bool(torch.isfinite(norm))
        if not is_finite and (scale.is_exhausted or not bool(torch.isfinite(loss.detach()))):
            return False
        self.loss_scale = scale.followed(is_finite)
        self.overflows += not is_finite
        return not is_finite

    def take_news(self) -> tuple[tuple[RateChanged, ...], tuple[Tampered, ...]]:
        """Changes of rates, and rates that somebody else had written, since this was asked last."""
        news = tuple(self._changed), tuple(self._tampered)
        self._changed, self._tampered = [], []
        return news

    def tensors(self) -> dict[str, Tensor]:
        """Moments and counts by `<optimiser>.<index of the parameter>.<field>`."""
        return {
            f"{name}.{index}.{field}": value
            for name, optimizer in self._by_name.items()
            for index, state in optimizer.state_dict()["state"].items()
            for field, value in sorted(state.items())
        }

    def go_on(self, before: Optimisers, name: str) -> None:
        """Let one optimiser, of the same parameters as in `before`, go on from there; for those that begin only now."""
        self.load_tensors({key: t for key, t in before.tensors().items() if key.startswith(f"{name}.")})
        self.rates.load_state_dict(self.rates.state_dict() | {name: before.rates.state_dict()[name]})

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Become what gave these `tensors`; they are copied.

        Raises:
            ValueError: They are those of other optimisers.
        """
        states: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in self._by_name}
        for key, tensor in tensors.items():
            name, index, field = key.rsplit(".", 2)
            if name not in states:
                raise ValueError(f"state of an optimiser {name!r}; there are {', '.join(states)}")
            # The optimiser takes them as its own and changes them in place.
            states[name].setdefault(int(index), {})[field] = tensor.clone()
        for name, optimizer in self._by_name.items():
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": states[name], "param_groups": groups})
