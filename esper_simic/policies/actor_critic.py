"""Actor and critic: the one class behind every policy.

`act` (actors) and `evaluate` (learner) read observations by the same code; they agree within 1e-5, and bit for bit at
equal batch shapes (a matrix product of one row may round otherwise than the same row in a larger one).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from esper_simic.errors import InvariantViolation
from esper_simic.policies.cores import FeedForward, RecurrentCore
from esper_simic.policies.initialisation import initialise
from esper_simic.policies.parts import Core, Encoder, Heads, Latent, Normaliser
from esper_simic.policies.policy import Decision, Evaluation
from esper_simic.specs import ExperienceSpec, check_shapes

MASK: Final = "action_mask"


@dataclass(frozen=True, slots=True)
class Parts:
    """What an `ActorCritic` is made of; each is a module of its own.

    Attributes:
        normaliser: Over all numbers of an observation.
        encoder: Observation to vectors.
        recurrent: What is remembered.
        heads: Distribution of actions.
        value: `[N, in]` to `[N, 1]`; its last module is linear.
        value_sees_core: Whether the value reads the core's output, or the encoder's inputs by a trunk of its own.
    """

    normaliser: nn.Module
    encoder: nn.Module
    recurrent: RecurrentCore | FeedForward
    heads: nn.Module
    value: nn.Sequential
    value_sees_core: bool


class _Read(NamedTuple):
    """N rows as heads see them, values `[N]`, the state after the last row."""

    latent: Latent
    values: Tensor
    state: Tensor


class ActorCritic(nn.Module):
    """A policy made of parts; see `Policy` for its public methods.

    Args:
        spec: Shapes of observations and actions.
        parts: What it is made of. Weights are drawn anew: orthogonal, with gain √2 in the trunk, 0.01 in the last
            layer of the policy heads and 1 in that of the value head; a forget gate starts open (bias 1).
        rng: Initial weights are drawn from it alone.
    """

    normaliser: Normaliser
    encoder: Encoder
    recurrent: Core
    heads: Heads
    value: nn.Sequential

    def __init__(self, spec: ExperienceSpec, parts: Parts, rng: np.random.Generator) -> None:
        super().__init__()
        self.spec = spec
        self._shapes = spec.shapes()
        self._first_key = next(iter(self._shapes))
        self._lead_of_first = len(self._shapes[self._first_key][0])
        self._masked = MASK in self._shapes
        self._value_sees_core = parts.value_sees_core
        # The order of registration is the order in which weights are drawn.
        for name in ("normaliser", "encoder", "recurrent", "heads", "value"):
            self.add_module(name, getattr(parts, name))
        small = {f"heads.{name}" for name in self.heads.last_layers}
        initialise(self, rng, small=small, unit={f"value.{len(parts.value) - 1}.weight"})
        if isinstance(parts.recurrent, RecurrentCore):
            parts.recurrent.open_forget_gate()

    @property
    def state_size(self) -> int:
        """Width of the recurrent state; 0 for a policy without memory."""
        return self.recurrent.state_size

    @property
    def chance(self) -> int:
        """Uniform numbers that one action takes."""
        return self.spec.action.chance

    def initial_state(self, batch: int) -> Tensor:
        """`[batch, state]` of zeros, in dtype and on device of the weights."""
        weight = next(self.value.parameters())
        return torch.zeros(batch, self.state_size, dtype=weight.dtype, device=weight.device)

    def policy_parameters(self) -> list[nn.Parameter]:
        """Parameters of trunk and policy heads that learn."""
        own = {id(parameter) for parameter in self.value.parameters()}
        return [
            parameter
            for parameter in self.parameters()
            if id(parameter) not in own and parameter.requires_grad
        ]

    def value_parameters(self) -> list[nn.Parameter]:
        """Parameters of the value head, and of its trunk where it has its own, that learn."""
        return [parameter for parameter in self.value.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def act(
        self, observations: Mapping[str, Tensor], episode_start: Tensor, state: Tensor, uniforms: Tensor
    ) -> Decision:
        """Choose an action in each of B states.

        Args:
            observations: Each `[B, …]`.
            episode_start: `[B]` bool; the recurrent state is cleared where true.
            state: `[B, state]`.
            uniforms: `[B, chance]` float64 in [0, 1): all of its chance.

        Raises:
            ValueError: A tensor of another shape or dtype; the message names it.
            InvariantViolation: A state without any legal operation, or log-probabilities or values that are not
                finite, because an observation or a weight is not.
        """
        batch = len(episode_start)
        self._check(observations, episode_start, state, (batch,))
        _require("uniforms", uniforms, (batch, self.chance), torch.float64)
        read = self._read(observations, episode_start.unsqueeze(0), state)
        actions, log_probs = self.heads.sample(read.latent, uniforms)
        if not math.isfinite((log_probs + read.values).sum().item()):
            raise InvariantViolation(
                "log-probabilities or values are not finite: an observation or a weight is not, "
                "or a mask leaves no legal choice"
            )
        return Decision(actions, log_probs, read.values, read.state)

    def evaluate(
        self, observations: Mapping[str, Tensor], episode_start: Tensor, state: Tensor, actions: Tensor
    ) -> Evaluation:
        """Evaluate actions taken.

        Args:
            observations: Each `[T, B, …]`.
            episode_start: `[T, B]` bool; the recurrent state is cleared before the rows where true.
            state: `[B, state]`, before the first row.
            actions: `[T, B, heads]` int64 or `[T, B, dimensions]`, as the spec's action is.

        Raises:
            ValueError: A tensor of another shape or dtype; the message names it.
            InvariantViolation: A state without any legal operation.
        """
        shape = (int(episode_start.shape[0]), int(episode_start.shape[1]))
        self._check(observations, episode_start, state, shape)
        wanted = (*shape, *self.spec.action.shape)
        if actions.shape != wanted:
            raise ValueError(f"actions must be {list(wanted)}, it is {list(actions.shape)}")
        rows = {key: observations[key].flatten(0, 1) for key in self._shapes}
        read = self._read(rows, episode_start, state)
        heads = self.heads.evaluate(read.latent, actions.flatten(0, 1)).reshaped(shape)
        return Evaluation(heads.log_probs, heads.entropy, read.values.reshape(shape), read.state, heads)

    def free(self, observations: Mapping[str, Tensor]) -> Tensor:
        """1 where there was a choice, else 0: `[*lead]` float32 for observations `[*lead, …]`."""
        if self._masked:
            return self.heads.free(observations[MASK])
        first = observations[self._first_key]
        lead = first.shape[: first.dim() - self._lead_of_first]
        return self.heads.free(first.new_empty((*lead, 0)))

    def _read(self, rows: Mapping[str, Tensor], episode_start: Tensor, state: Tensor) -> _Read:
        """Read N = T * B rows, `[N, …]`; `episode_start` is `[T, B]`."""
        encoded = self.encoder(rows, self.normaliser(rows))
        core, after = self.recurrent.unroll(encoded.whole, episode_start, state)
        values = self.value(core if self._value_sees_core else encoded.inputs).squeeze(-1)
        mask = rows[MASK] if self._masked else core[:, :0]
        return _Read(Latent(core, encoded.slots, mask), values, after)

    def _check(
        self, observations: Mapping[str, Tensor], episode_start: Tensor, state: Tensor, lead: tuple[int, ...]
    ) -> None:
        """The door: broadcasting would hide a wrong shape."""
        check_shapes(self._shapes, observations, lead)
        _require("episode_start", episode_start, lead, torch.bool)
        _require("state", state, (lead[-1], self.recurrent.state_size), state.dtype)


def _require(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        found = f"{list(tensor.shape)} {tensor.dtype}"
        raise ValueError(f"{name} must be {list(shape)} {dtype}, it is {found}")


def tensors_of(shapes: Mapping[str, Any], observation: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
    """The arrays of an observation under these keys as tensors that share their memory."""
    return {key: torch.from_numpy(np.ascontiguousarray(observation[key])) for key in shapes}
