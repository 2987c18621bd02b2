"""The growth controller: graph encoder, recurrent core, factored heads, value head.

`act` (actors) and `evaluate` (learner) run the same `forward`; they agree within 1e-5, and bit for bit at equal batch
shapes (a matrix product of one row may round otherwise than the same row in a larger one).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from esper_simic.config import TrainerConfig
from esper_simic.graphs import OBSERVATION_KEYS, ObservationSpec
from esper_simic.policies.encoder import GraphEncoder
from esper_simic.policies.heads import FactoredHeads, HeadEvaluation
from esper_simic.policies.normaliser import RunningNormaliser


class Decision(NamedTuple):
    """Actions `[B, heads]` int64 in `HEADS` order, log-probabilities `[B]`, values `[B]`, next state `[B, state]`."""

    actions: Tensor
    log_probs: Tensor
    values: Tensor
    state: Tensor


class Evaluation(NamedTuple):
    """Log-probabilities, entropies (normalised, over relevant heads) and values, `[T, B]`; the state after row T.

    `head_entropies` holds each head's own entropy `[T, B]`, whether it was relevant or not.
    """

    log_probs: Tensor
    entropy: Tensor
    values: Tensor
    state: Tensor
    head_entropies: dict[str, Tensor]


class _Core(NamedTuple):
    core: Tensor
    slots: Tensor
    values: Tensor
    state: Tensor


def observations_from_numpy(observation: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
    """The arrays of an observation as tensors that share their memory."""
    return {key: torch.from_numpy(np.ascontiguousarray(observation[key])) for key in OBSERVATION_KEYS}


class GraphPolicy(nn.Module):
    """Actor and critic over graph observations.

    Args:
        spec: Shapes of one observation.
        config: Widths and depth.
        rng: Initial weights are drawn from it alone.

    Initial weights are orthogonal, with gain √2 in the trunk, 0.01 in the last layer of the policy heads and 1 in that
    of the value head; the forget gate starts open (bias 1).
    """

    def __init__(self, spec: ObservationSpec, config: TrainerConfig, rng: np.random.Generator) -> None:
        super().__init__()
        hidden, node = config.hidden_size, config.hidden_size // 2
        self.spec = spec
        self._hidden = hidden
        # Layers draw initial weights from torch's global generator; these are replaced below, so it is put back.
        with torch.random.fork_rng(devices=[]):
            self.normaliser = RunningNormaliser(spec)
            self.encoder = GraphEncoder(spec, node, hidden, config.graph_layers)
            self.recurrent = nn.LSTMCell(hidden, hidden)
            self.heads = FactoredHeads(hidden, node, spec.mask_layout)
            self.value = nn.Sequential(
                nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, 1)
            )
        self._initialise(rng)

    @property
    def state_size(self) -> int:
        """Width of the recurrent state: output and cell."""
        return 2 * self._hidden

    def initial_state(self, batch: int) -> Tensor:
        """`[batch, state]` of zeros."""
        return torch.zeros(batch, self.state_size)

    def policy_parameters(self) -> list[nn.Parameter]:
        """Parameters of trunk and policy heads."""
        own = {id(parameter) for parameter in self.value.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in own]

    def value_parameters(self) -> list[nn.Parameter]:
        """Parameters of the value head."""
        return list(self.value.parameters())

    @torch.no_grad()
    def act(
        self, observations: Mapping[str, Tensor], episode_start: Tensor, state: Tensor, uniforms: Tensor
    ) -> Decision:
        """Choose an action in each of B states.

        Args:
            observations: Each `[B, …]`.
            episode_start: `[B]` bool; the recurrent state is cleared where true.
            state: `[B, state]`.
            uniforms: `[B, heads]` float64 in [0, 1): all of its chance.

        Raises:
            InvariantViolation: A state without any legal operation.
        """
        rows = {key: tensor.unsqueeze(0) for key, tensor in observations.items()}
        core = self.forward(rows, episode_start.unsqueeze(0), state)
        mask = observations["action_mask"]
        actions, evaluated = self.heads.sample(core.core[0], core.slots[0], mask, uniforms)
        return Decision(actions, evaluated.log_probs, core.values[0], core.state)

    def evaluate(
        self, observations: Mapping[str, Tensor], episode_start: Tensor, state: Tensor, actions: Tensor
    ) -> Evaluation:
        """Evaluate actions taken, `[T, B, heads]`; other arguments as in `act` with a leading T, but the state."""
        core = self.forward(observations, episode_start, state)
        shape = core.values.shape
        evaluated: HeadEvaluation = self.heads.evaluate(
            core.core.flatten(0, 1),
            core.slots.flatten(0, 1),
            observations["action_mask"].flatten(0, 1),
            actions.flatten(0, 1),
        )
        return Evaluation(
            evaluated.log_probs.reshape(shape),
            evaluated.entropy.reshape(shape),
            core.values,
            core.state,
            {head: entropy.reshape(shape) for head, entropy in evaluated.head_entropies.items()},
        )

    def forward(self, observations: Mapping[str, Tensor], episode_start: Tensor, state: Tensor) -> _Core:
        """Core output `[T, B, hidden]`, slots `[T, B, slots, node]`, values `[T, B]`; the state after the last row."""
        length, batch = episode_start.shape
        flat = {key: tensor.flatten(0, 1) for key, tensor in observations.items()}
        encoded = self.encoder(flat, self.normaliser(flat))
        inputs = encoded.graph.reshape(length, batch, -1)
        output, cell = state.chunk(2, dim=-1)
        goes_on = (~episode_start).to(inputs.dtype).unsqueeze(-1)
        outputs = []
        for t in range(length):
            output, cell = self.recurrent(inputs[t], (output * goes_on[t], cell * goes_on[t]))
            outputs.append(output)
        core = torch.stack(outputs)
        values = self.value(core).squeeze(-1)
        slots = encoded.slots.reshape(length, batch, *encoded.slots.shape[1:])
        return _Core(core, slots, values, torch.cat([output, cell], dim=-1))

    @torch.no_grad()
    def _initialise(self, rng: np.random.Generator) -> None:
        small = {"heads.op.weight", "heads.slot_out.weight", "heads.choice_out.weight"}
        last = {f"value.{len(self.value) - 1}.weight"}
        for name, parameter in self.named_parameters():
            if "norm" in name or isinstance(self._owner(name), nn.LayerNorm):
                continue
            if parameter.dim() < 2:
                parameter.zero_()
            else:
                gain = 0.01 if name in small else 1.0 if name in last else math.sqrt(2)
                parameter.copy_(torch.from_numpy(_orthogonal(parameter.shape, gain, rng)))
        forget = slice(self._hidden, 2 * self._hidden)
        self.recurrent.bias_ih[forget] = 1.0

    def _owner(self, parameter_name: str) -> nn.Module:
        return self.get_submodule(parameter_name.rpartition(".")[0])


def _orthogonal(shape: torch.Size, gain: float, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """A matrix with orthonormal rows or columns, times gain.

    Source: Saxe, McClelland, Ganguli, Exact solutions to the nonlinear dynamics of learning (2014).
    """
    rows, columns = shape[0], math.prod(shape[1:])
    drawn = rng.normal(size=(max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(drawn)
    q = q * np.sign(np.diag(r))
    matrix = q if rows >= columns else q.T
    return (gain * matrix).reshape(shape).astype(np.float32)
