"""`simic_trainer`: what the policy's network is made of."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from esper_simic.config_section import Section


class NetworkKeys(Section):
    """The keys of `simic_trainer` that shape networks."""

    initial_policy: str | None = Field(
        None,
        description="Weights to begin with: the directory of a run, whose newest good checkpoint is taken, or a "
        ".safetensors file. The policy with its normaliser, nothing of optimisers. Unset: fresh weights.",
    )

    network: Literal["auto", "graph", "mlp", "lstm"] = Field(
        "auto",
        description="graph: message passing and an LSTM, for graph observations; mlp: no memory; lstm: an MLP before "
        "an LSTM. auto: graph for graph observations, mlp for vectors.",
    )
    hidden_size: int = Field(128, ge=8, le=2048, description="Width of hidden layers, LSTM and heads.")
    graph_layers: int = Field(2, ge=1, le=8, description="Message-passing layers of the graph encoder.")
    hidden_layers: int = Field(2, ge=1, le=8, description="Hidden layers of the trunk of mlp and lstm.")
    activation: Literal["tanh", "relu"] = Field(
        "tanh", description="Non-linearity of the trunk of mlp and lstm."
    )
    layer_norm: bool = Field(
        False, description="LayerNorm in every hidden layer of the trunk of mlp and lstm."
    )
    shared_trunk: bool = Field(
        False,
        description="Of mlp: values come from the policy's trunk; else from a trunk of their own, as large. Graph and "
        "lstm always share.",
    )
    normalise_observations: bool = Field(
        True,
        description="Numbers of observations are brought to mean 0 and deviation 1 by running statistics.",
    )
