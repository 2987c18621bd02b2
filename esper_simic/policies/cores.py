"""What a policy remembers from one observation to the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RecurrentCore(nn.LSTMCell):
    """An LSTM that forgets at the start of each episode; its state is output and cell, side by side.

    Source: Hochreiter, Schmidhuber, Long Short-Term Memory (1997).
    """

    @property
    def state_size(self) -> int:
        """Width of output and cell."""
        return 2 * self.hidden_size

    def unroll(self, inputs: Tensor, episode_start: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `parts.Core`."""
        # Read once: a weight that is made of others (an adapter's) would be made again at every step.
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        steps = inputs.reshape(*episode_start.shape, inputs.shape[-1])
        goes_on = (~episode_start).to(inputs.dtype).unsqueeze(-1)
        output, cell = state.chunk(2, dim=-1)
        outputs = []
        for row, kept in zip(steps, goes_on, strict=True):
            output, cell = torch.lstm_cell(row, (output * kept, cell * kept), *weights)
            outputs.append(output)
        return torch.cat(outputs), torch.cat([output, cell], dim=-1)

    @torch.no_grad()
    def open_forget_gate(self) -> None:
        """Let the cell remember at first: bias 1 of the forget gate.

        Source: Jozefowicz, Zaremba, Sutskever, An Empirical Exploration of Recurrent Network Architectures (2015).
        """
        self.bias_ih[self.hidden_size : 2 * self.hidden_size] = 1.0


class FeedForward(nn.Module):
    """No memory: what comes in goes out, and there is nothing to clear."""

    @property
    def state_size(self) -> int:
        """Nothing."""
        return 0

    def unroll(self, inputs: Tensor, episode_start: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `parts.Core`."""
        return inputs, state
