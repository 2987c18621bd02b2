"""What actors, learner and algorithms know of a policy, whatever it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from esper_simic.policies.parts import HeadEvaluation, Normaliser
from esper_simic.specs import ExperienceSpec

__all__ = ["Decision", "Evaluation", "HeadEvaluation", "Policy"]


class Decision(NamedTuple):
    """What a policy does in B states.

    Attributes:
        actions: `[B, heads]` int64 or `[B, dimensions]` float32, as the spec's action is.
        log_probs: `[B]`, over the causally relevant heads.
        values: `[B]`.
        state: `[B, state]`, the recurrent state after the observations.
    """

    actions: Tensor
    log_probs: Tensor
    values: Tensor
    state: Tensor


class Evaluation(NamedTuple):
    """What a policy thinks of actions that were taken.

    Attributes:
        log_probs: `[T, B]`, over the causally relevant heads.
        entropy: `[T, B]`, see `HeadEvaluation`.
        values: `[T, B]`.
        state: `[B, state]`, the recurrent state after row T.
        heads: Head by head, `[T, B]` each; its sums are the two first fields.
    """

    log_probs: Tensor
    entropy: Tensor
    values: Tensor
    state: Tensor
    heads: HeadEvaluation


class Policy(Protocol):
    """Actor and critic; `ActorCritic` is the one there is."""

    @property
    def normaliser(self) -> Normaliser:
        """What brings numbers of observations to like size."""

    @property
    def spec(self) -> ExperienceSpec:
        """Shapes of observations and actions."""

    @property
    def state_size(self) -> int:
        """Width of the recurrent state; 0 for a policy without memory."""

    @property
    def chance(self) -> int:
        """Uniform numbers that one action takes."""

    def initial_state(self, batch: int) -> Tensor:
        """The recurrent state `[batch, state]` at the start of an episode."""

    def act(
        self, observations: Mapping[str, Tensor], episode_start: Tensor, state: Tensor, uniforms: Tensor
    ) -> Decision:
        """Choose an action in each of B states.

        Args:
            observations: Each `[B, …]`.
            episode_start: `[B]` bool; the recurrent state is cleared where true.
            state: `[B, state]`.
            uniforms: `[B, chance]` float64 in [0, 1): all of its chance.
        """

    def evaluate(
        self, observations: Mapping[str, Tensor], episode_start: Tensor, state: Tensor, actions: Tensor
    ) -> Evaluation:
        """Evaluate actions taken.

        Args:
            observations: Each `[T, B, …]`.
            episode_start: `[T, B]` bool; the recurrent state is cleared before the rows where true.
            state: `[B, state]`, before the first row.
            actions: `[T, B, …]`.
        """

    def free(self, observations: Mapping[str, Tensor]) -> Tensor:
        """1 where there was a choice, else 0: `[*lead]` float for observations `[*lead, …]`."""

    def policy_parameters(self) -> list[nn.Parameter]:
        """Parameters of trunk and policy heads that learn."""

    def value_parameters(self) -> list[nn.Parameter]:
        """Parameters of the value head that learn."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """See `torch.nn.Module.parameters`."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """See `torch.nn.Module.named_parameters`."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """See `torch.nn.Module.load_state_dict`."""

    # Last: its overloads hide the builtin from the annotations after it.
    def state_dict(self) -> dict[str, Any]:
        """See `torch.nn.Module.state_dict`."""
