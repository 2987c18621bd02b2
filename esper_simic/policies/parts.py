"""What a policy is made of: an encoder, a core, heads, and the normaliser before them.

    observations -> normaliser -> encoder -> core -> heads
                                     |         +---> value
                                     +-> value, where it has a trunk of its own

Every part sees N rows, time and lanes flattened, but for the core, which alone knows of time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Encoded(NamedTuple):
    """N observations as vectors.

    Attributes:
        whole: `[N, out]`, of the whole observation.
        slots: `[N, slots, node]`, of each slot; `[N, 0]` where there are none.
        inputs: `[N, in]`, what `whole` was made of: the input of a value trunk of its own.
    """

    whole: Tensor
    slots: Tensor
    inputs: Tensor


class Latent(NamedTuple):
    """What heads choose by.

    Attributes:
        core: `[N, core]`.
        slots: `[N, slots, node]`; `[N, 0]` where there are none.
        mask: `[N, mask]` int8, packed legal choices; `[N, 0]` where everything is legal.
    """

    core: Tensor
    slots: Tensor
    mask: Tensor


class HeadEvaluation(NamedTuple):
    """What actions were worth in log-probability, and how open the choice was; `[N]` each, or `[T, B]`.

    Heads are those of `Choices`; an action of real numbers is one head, `action`.

    Attributes:
        log_probs: Sum over relevant heads.
        entropy: Sum over relevant heads. Of a choice it is divided by the logarithm of the number of legal ones, so
            that it is a share of the largest possible; of real numbers it is the differential entropy in nats.
        head_log_probs: By head, whether it was relevant or not.
        head_entropies: By head, whether it was relevant or not; 0 where there is one legal choice.
        relevance: By head, bool: whether the action depended on it.
        available: By head, bool: whether the head, as it was evaluated, had more than one legal choice to act by. One
            that depends on choices made before it has none where those do not use it.
    """

    log_probs: Tensor
    entropy: Tensor
    head_log_probs: dict[str, Tensor]
    head_entropies: dict[str, Tensor]
    relevance: dict[str, Tensor]
    available: dict[str, Tensor]

    def reshaped(self, shape: tuple[int, ...]) -> HeadEvaluation:
        """The same with every `[N]` in another shape."""
        by_head = (self.head_log_probs, self.head_entropies, self.relevance, self.available)
        return HeadEvaluation(
            self.log_probs.reshape(shape),
            self.entropy.reshape(shape),
            *({head: tensor.reshape(shape) for head, tensor in part.items()} for part in by_head),
        )


class Normaliser(Protocol):
    """From an observation's numbers to numbers of like size; a part of the policy, so it travels with the weights."""

    def __call__(self, observations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The arrays of numbers, normalised, by key; shapes unchanged."""

    def update(self, observations: Mapping[str, Tensor]) -> None:
        """Learn from these observations, which may have any leading dimensions."""

    def state_dict(self) -> dict[str, Any]:
        """Its statistics by name."""


class Encoder(Protocol):
    """From N observations to vectors."""

    def __call__(self, observations: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> Encoded:
        """Encode.

        Args:
            observations: `[N, …]` as they came, for indices and masks.
            features: `[N, …]` of numbers, normalised.
        """


class Core(Protocol):
    """What a policy remembers."""

    @property
    def state_size(self) -> int:
        """Width of its state."""

    def unroll(self, inputs: Tensor, episode_start: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Go through T rows of B lanes.

        Args:
            inputs: `[T * B, in]`.
            episode_start: `[T, B]` bool; the state is cleared before the rows where true.
            state: `[B, state]`, before the first row.

        Returns:
            `[T * B, core]`, and the state after the last row.
        """


class Heads(Protocol):
    """The distribution of actions."""

    @property
    def last_layers(self) -> frozenset[str]:
        """Names of the weights that make logits or means; they start small, so that the first policy is unbiased."""

    def sample(self, latent: Latent, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Draw actions by inverting distribution functions.

        Args:
            latent: N rows.
            uniforms: `[N, chance]` float64 in [0, 1).

        Returns:
            Actions `[N, …]` and their log-probabilities `[N]`.
        """

    def evaluate(self, latent: Latent, actions: Tensor) -> HeadEvaluation:
        """Log-probabilities and entropies of given actions `[N, …]`."""

    def free(self, mask: Tensor) -> Tensor:
        """`[…]` float for masks `[…, mask]`: 1 where there is a choice, else 0."""
