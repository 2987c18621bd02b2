"""How forward passes and losses of an update are computed: on which device, in which precision, compiled, in parts.

**In parts** (`gradient_accumulation`). A gradient that is summed up part by part needs the memory of one part's
activations. The losses here are means over a whole batch, with denominators, advantages and importance weights of the
whole, so a part has no loss of its own. Therefore lanes, which have nothing to do with each other before the loss, are
cut in parts; their forward passes are made without activations being kept; the loss is that of the whole batch; and on
the way back each part's forward pass is made once more, and the loss's gradient by its results goes on through it. The
parts need not be equal, and the sum is the gradient of the whole but for rounding.

Source: Gao, Zhang, Han, Callan, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (2021), the
gradient cache; Chen, Xu, Zhang, Guestrin, Training Deep Nets with Sublinear Memory Cost (2016), the second pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from esper_simic.execution import CPU, Compiled, Execution, unheard
from esper_simic.policies.policy import Evaluation, Policy
from esper_simic.updates.batch import Batch

P = ParamSpec("P")
R = TypeVar("R")


class Computation:
    """Forward passes and losses of one engine.

    Args:
        execution: The way chosen.
        parts: In how many parts of its lanes a batch goes forward and back; one of fewer lanes in as many as those.
    """

    def __init__(self, execution: Execution = CPU, parts: int = 1) -> None:
        self.execution, self.parts = execution, parts
        self.notes: list[str] = []
        """What is not as it was chosen, for people; each is said once."""
        self.compiling: Callable[[], None] = unheard
        """Told before something may have to be compiled; for a process that somebody waits for."""
        self._evaluate = self._compiled(_evaluate, "the policy's evaluation")
        self._losses: dict[Callable[..., Any], Compiled[..., Any]] = {}

    def _compiled(self, function: Callable[P, R], name: str) -> Compiled[P, R]:
        return self.execution.compiled(function, name, self.notes.append, self._begin)

    def _begin(self) -> None:
        self.compiling()  # whoever listens by then

    def policy_changed(self) -> None:
        """The policy has parameters that it had not: what was compiled for it is compiled anew."""
        self._evaluate.begin_anew()

    def evaluate(self, batch: Batch, policy: Policy) -> Evaluation:
        """The policy's view of a batch, see `Batch.evaluate`; in float32 whatever it was computed in."""

        def run(part: Batch) -> Evaluation:
            found = part.evaluate(policy, self._evaluate)
            # The one tensor whose lanes come first; in parts they are joined along the second axis.
            return found._replace(state=found.state.unsqueeze(0))

        found = self.forward(run, batch)
        return found._replace(state=found.state.squeeze(0))

    def forward(self, run: Callable[[Batch], R], batch: Batch) -> R:
        """What a function of a batch gives, in parts where a gradient is wanted and there are to be parts.

        Args:
            run: Gives tensors, `[…, B, …]` with lanes along the second axis, in any structure of tuples, lists and
                dictionaries. A lane's results depend on that lane alone. It is called twice for each part.
            batch: `[T, B]`.
        """

        def in_precision(part: Batch) -> R:
            with self.execution.autocast():
                found = run(part)
            half = self.execution.autocast_dtype
            if half is None:
                return found
            return pytree.tree_map(lambda t: t.float() if t.dtype is half else t, found)  # type: ignore[no-any-return]

        count = min(self.parts, batch.lanes)
        if count == 1 or not torch.is_grad_enabled():
            return in_precision(batch)
        lanes = torch.arange(batch.lanes, device=batch.rewards.device).tensor_split(count)
        anchor = torch.zeros((), device=batch.rewards.device, requires_grad=True)
        parts = _Parts(in_precision, [batch.of_lanes(chosen) for chosen in lanes])
        joined = _InParts.apply(parts, anchor)
        return pytree.tree_unflatten(list(joined), parts.structure)  # type: ignore[no-any-return, arg-type]

    def loss(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """A loss, as this way computes it.

        Args:
            function: Pure, of tensors.
            *args: Its arguments.
            **kwargs: Its arguments.
        """
        if not self.execution.is_compiled:
            return function(*args, **kwargs)
        if function not in self._losses:
            self._losses[function] = self._compiled(function, "the loss")
        found: R = self._losses[function](*args, **kwargs)
        return found


def _evaluate(policy: Policy, *args: Any) -> Evaluation:
    """Not the policy's own method: who is copied must not compute with the weights of whom it was copied from."""
    return policy.evaluate(*args)


class _Parts:
    """The parts of a batch, what is computed of each, and the structure of its results once one was computed."""

    def __init__(self, run: Callable[[Batch], Any], batches: list[Batch]) -> None:
        self._run, self.batches = run, batches
        self.structure: pytree.TreeSpec | None = None

    def results(self, batch: Batch) -> list[Tensor]:
        leaves, self.structure = pytree.tree_flatten(self._run(batch))
        return leaves


class _InParts(torch.autograd.Function):
    """Results of all parts, joined; back, each part's are computed again. Gradients of parameters are added to them."""

    @staticmethod
    def forward(ctx: Any, parts: _Parts, anchor: Tensor) -> tuple[Tensor, ...]:
        """`anchor` is any tensor that wants a gradient: it is why there is a way back."""
        ctx.parts = parts
        ctx.set_materialize_grads(False)
        found = [parts.results(batch) for batch in parts.batches]
        joined = tuple(torch.cat(results, dim=1) for results in zip(*found, strict=True))
        ctx.mark_non_differentiable(*(tensor for tensor in joined if not tensor.is_floating_point()))
        return joined

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None]:
        begin = 0
        for batch in ctx.parts.batches:
            end = begin + batch.lanes
            with torch.enable_grad():
                results = ctx.parts.results(batch)
            wanted = [
                (result, gradient[:, begin:end])
                for result, gradient in zip(results, gradients, strict=True)
                if gradient is not None and result.requires_grad
            ]
            torch.autograd.backward([result for result, _ in wanted], [gradient for _, gradient in wanted])
            begin = end
        return None, None
