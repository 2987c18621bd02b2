"""Implicit Q-learning: one gradient step of policy, values and critics on recorded transitions; then the slow copies.

Values are the policy's own value head; critics read observations anew and remember nothing.

The conservative term wants `log sum_a exp Q(x, a)` over all actions. There are too many of them to be listed where an
action has several heads, but Q is a sum of one term a head, so the sum over actions is a product over heads:

    log sum_a exp Q(x, a) = sum_h log sum_c exp q_h(x, c)

and in growth control, where the operation decides which other heads count, the same within each operation. Illegal
choices are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esper_simic.actions import HEADS, OP, RELEVANT_HEADS, MaskLayout, Op
from esper_simic.algorithms.iql import IqlOptions, iql_loss, soft_update
from esper_simic.config import TrainerConfig
from esper_simic.errors import ConfigError
from esper_simic.graphs import FlatGrowthSpec, ObservationSpec
from esper_simic.policies.value_networks import ChoiceQ, TwinQ
from esper_simic.specs import Choices, ExperienceSpec
from esper_simic.telemetry import Phase
from esper_simic.updates.batch import Batch
from esper_simic.updates.update import Terms, Updated, judged_likelihood

KEY: Final = "simic_trainer.iql_cql_alpha"


class _Worth(NamedTuple):
    """What critics think of a batch: of each `[T, B]`, its slow copy's, and `[T, B, 1]` of all actions together."""

    q_values: list[Tensor]
    target_q_values: list[Tensor]
    action_values: tuple[Tensor, ...]


class IqlUpdate:
    """The algorithm with its critics.

    Args:
        spec: Shapes of observations and actions.
        trainer: The configuration.
        rng: Initial weights of the critics are drawn from it alone.

    Raises:
        ConfigError: A conservative term, and actions of real numbers.
    """

    def __init__(self, spec: ExperienceSpec, trainer: TrainerConfig, rng: np.random.Generator) -> None:
        if trainer.iql_cql_alpha > 0 and not isinstance(spec.action, Choices):
            raise ConfigError("a conservative term needs discrete actions; take 0", KEY)
        self._spec = spec
        self.critics = TwinQ(spec, trainer, rng)
        self.slow = copy.deepcopy(self.critics).requires_grad_(False)

    def to(self, device: torch.device) -> None:
        """Have the critics on a device."""
        self.critics.to(device)
        self.slow.to(device)

    def __call__(self, batch: Batch, terms: Terms) -> Updated:
        """Make one update; see `Update`."""
        trainer, length = terms.trainer, batch.length
        evaluation = terms.evaluate(batch)
        worth = terms.computation.forward(lambda part: self._worth(part, terms), batch)
        loss = terms.loss(
            iql_loss,
            log_probs=evaluation.log_probs[:length],
            q_values=worth.q_values,
            target_q_values=worth.target_q_values,
            values=evaluation.values[:length],
            next_values=evaluation.values[1:].detach(),
            rewards=batch.rewards,
            discounts=batch.discounts,
            weights=torch.ones_like(batch.rewards),
            options=IqlOptions(
                expectile=trainer.iql_expectile,
                beta=trainer.iql_beta,
                weight_max=trainer.iql_weight_max,
                cql_alpha=trainer.iql_cql_alpha,
            ),
            action_values=worth.action_values,
        )
        terms.observer.passed(Phase.FORWARD)
        norm = terms.minimise(loss.total)
        self._follow(trainer.iql_target_rate)
        metrics = {name: float(value) for name, value in loss.statistics().items()}
        return Updated(
            loss=metrics["total"],
            policy_loss=judged_likelihood(metrics["policy_loss"]),
            value_loss=metrics["value_loss"],
            grad_norm=norm,
            ratios=None,
            metrics=metrics,
        )

    def _worth(self, batch: Batch, terms: Terms) -> _Worth:
        trajectory, shape = batch.trajectory, (batch.length, batch.lanes)
        rows = {key: tensor[: batch.length].flatten(0, 1) for key, tensor in trajectory.observations.items()}
        features = terms.policy.normaliser(rows)
        actions = trajectory.actions.flatten(0, 1)
        with torch.no_grad():
            slow = [q.reshape(shape) for q in self.slow(rows, features, actions)]
        return _Worth(
            [q.reshape(shape) for q in self.critics(rows, features, actions)],
            slow,
            self._sums(rows, features, shape) if terms.trainer.iql_cql_alpha > 0 else (),
        )

    def _sums(
        self, rows: dict[str, Tensor], features: dict[str, Tensor], shape: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        """Of each critic `[T, B, 1]`: one action that is worth as much as all together."""
        return tuple(
            log_sum_of_actions(critic.every(rows, features), self._spec, rows).reshape(*shape, 1)
            for critic in (self.critics.first, self.critics.second)
            if isinstance(critic, ChoiceQ)
        )

    @torch.no_grad()
    def _follow(self, rate: float) -> None:
        slow = list(self.slow.parameters())
        for parameter, moved in zip(
            slow, soft_update(slow, list(self.critics.parameters()), rate), strict=True
        ):
            parameter.copy_(moved)


def log_sum_of_actions(
    terms: Sequence[Tensor], spec: ExperienceSpec, observations: Mapping[str, Tensor]
) -> Tensor:
    """`log sum_a exp Q(x, a)` over all legal actions, `[N]`.

    Args:
        terms: Of each head, in the spec's order, the terms of all its choices, `[N, size]`.
        spec: Shapes of observations and actions.
        observations: `[N, …]`.
    """
    mask = observations["action_mask"].bool() if "action_mask" in observations else None
    if isinstance(spec, ObservationSpec | FlatGrowthSpec) and mask is not None:
        return _log_sum_of_growth(terms, spec.mask_layout, mask)
    sums, start = terms[0].new_zeros(len(terms[0])), 0
    for term in terms:
        size = term.shape[-1]
        sums = sums + _log_sum(term, None if mask is None else mask[:, start : start + size])
        start += size
    return sums


def _log_sum_of_growth(terms: Sequence[Tensor], layout: MaskLayout, mask: Tensor) -> Tensor:
    slots = mask[:, layout.op_slot].reshape(len(mask), len(Op), layout.slots)
    sums = []
    for op in Op:
        total = terms[OP][:, op]
        for head in sorted(RELEVANT_HEADS[op] - {HEADS[OP]}):
            legal = slots[:, op] if head == "slot" else mask[:, layout.choices(head)]
            # Of an operation that is illegal this may be nothing; what is computed then is thrown away below.
            legal = legal | ~legal.any(dim=-1, keepdim=True)
            total = total + _log_sum(terms[HEADS.index(head)], legal)
        sums.append(total)
    return _log_sum(torch.stack(sums, dim=-1), mask[:, layout.op])


def _log_sum(terms: Tensor, legal: Tensor | None) -> Tensor:
    return (terms if legal is None else terms.masked_fill(~legal, -torch.inf)).logsumexp(dim=-1)
