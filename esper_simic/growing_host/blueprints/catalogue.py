"""The blueprints there are, by name, and the probe that each seed passes when it germinates.

With C channels; k = 9 taps on an image, 3 on a series; `h = max(8, C // 4)`:

| blueprint | kinds | what it computes | parameters |
|---|---|---|---|
| `norm` | image, series | `x + s (GroupNorm(x) - x)`, `s` starts at 0 | `2C + 1` |
| | tokens, vector | `x + s (LayerNorm(x) - x)`, over the channels of a position | `2C + 1` |
| `attention` | image, series | `x sigmoid(W2 relu(W1 pool(x)) + b)`, inner width `q = max(1, C // 4)` | `2Cq + C` |
| | tokens | `x +` causal multi-head self-attention | `4C^2 + 4C` |
| `flex_attention` | tokens | the same, each position looking back at most `sequence.WINDOW` positions | `4C^2 + 4C` |
| `conv_small` | image, series | 1x1, GroupNorm, ReLU | `C^2 + 2C` |
| `depthwise` | image, series | spatial kernel per channel, 1x1, GroupNorm, ReLU | `kC + C^2 + 2C` |
| `bottleneck` | image, series | `x + GroupNorm(1x1 relu(spatial relu(1x1 x)))` through h channels | `2Ch + kh^2 + 2C` |
| `conv_light` | image, series | spatial, GroupNorm, ReLU | `kC^2 + 2C` |
| `conv_heavy` | image, series | twice spatial, GroupNorm, ReLU | `2kC^2 + 4C` |
| `lora` | tokens, vector | `x + B A x`, rank 8, B starts at 0 | `16C` |
| `lora_large` | tokens, vector | the same, rank 32 | `64C` |
| `mlp_small` | tokens, vector | `x + W2 gelu(W1 x + b1) + b2`, hidden 2C | `4C^2 + 3C` |
| `mlp` | tokens, vector | the same, hidden 4C | `8C^2 + 5C` |

Sources: Wu & He 2018 (group normalisation); Ba, Kiros & Hinton 2016 (layer normalisation); Hu, Shen & Sun 2018
(squeeze-and-excitation); Swietojanski & Renals 2014 (the gate `2 sigmoid` of its correction); Howard et al. 2017
(depthwise); He et al. 2016 (bottleneck); Hu et al. 2022 (low rank); Vaswani et al. 2017 (attention, perceptron);
Beltagy, Peters & Cohan 2020 (local window); Hendrycks & Gimpel 2016 (gelu); Goyal et al. 2017 (a last normalisation
that starts at 0).
"""

from __future__ import annotations

import difflib
import functools
from types import MappingProxyType
from typing import Final

import torch

from esper_simic.config_environment import Kind
from esper_simic.errors import ConfigError, ContractError
from esper_simic.growing_host.blueprints import convolutional, sequence
from esper_simic.growing_host.blueprints.form import Blueprint, Form


def _pictures(image: Form, series: Form) -> dict[Kind, Form]:
    return {"image": image, "series": series}


def _points(form: Form) -> dict[Kind, Form]:
    return {"tokens": form, "vector": form}


def _made(name: str, *forms: dict[Kind, Form]) -> Blueprint:
    merged = {kind: form for some in forms for kind, form in some.items()}
    return Blueprint(name, MappingProxyType(merged))


def _all() -> tuple[Blueprint, ...]:
    pooled, normed, small = convolutional.attention(), convolutional.norm(), convolutional.small()
    light, heavy = (
        [convolutional.convolutions(kind, count) for kind in convolutional.KERNELS] for count in (1, 2)
    )
    return (
        _made("norm", _pictures(normed, normed), _points(sequence.norm())),
        _made("attention", _pictures(pooled, pooled), {"tokens": sequence.attention()}),
        _made("depthwise", _pictures(*(convolutional.depthwise(kind) for kind in convolutional.KERNELS))),
        _made("conv_light", _pictures(*light)),
        _made("conv_heavy", _pictures(*heavy)),
        _made("bottleneck", _pictures(*(convolutional.bottleneck(kind) for kind in convolutional.KERNELS))),
        _made("conv_small", _pictures(small, small)),
        _made("lora", _points(sequence.low_rank(8))),
        _made("lora_large", _points(sequence.low_rank(32))),
        _made("mlp_small", _points(sequence.perceptron(2))),
        _made("mlp", _points(sequence.perceptron(4))),
        _made("flex_attention", {"tokens": sequence.attention(sequence.WINDOW)}),
    )


CATALOGUE: Final[dict[str, Blueprint]] = {each.name: each for each in _all()}
"""Name to blueprint."""


def blueprint(name: str) -> Blueprint:
    """The blueprint of this name.

    Raises:
        ConfigError: There is none; an unknown blueprint never becomes an empty one.
    """
    found = CATALOGUE.get(name)
    if found is None:
        near = difflib.get_close_matches(name, CATALOGUE, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"unknown blueprint {name!r}{hint}; known: {', '.join(CATALOGUE)}", "environment.blueprints"
        )
    return found


PROBES_KEPT_MAX: Final = 256
"""Passed probes that are remembered; the one unused longest is forgotten first, and probed again when it is needed."""


@functools.lru_cache(maxsize=PROBES_KEPT_MAX)
def probe(blueprint: Blueprint, channels: int, height: int, width: int, kind: Kind = "image") -> None:
    """Run one seed once on one sample of zeros, before it germinates behind such features.

    Raises:
        ContractError: Features or correction have another shape than the input, or cannot be computed.
        ConfigError: The blueprint does not take features of this kind.
    """
    x = torch.zeros(1, channels, height, width, 1)
    row = torch.zeros(1, blueprint.parameter_count(channels, kind))
    for what, compute in (("features", blueprint.forward), ("correction", blueprint.correction)):
        try:
            with torch.no_grad():
                shape = compute(row, x, kind).shape
        except RuntimeError as error:
            raise ContractError(
                f"blueprint {blueprint.name!r} cannot compute its {what} behind {kind} features of shape "
                f"{list(x.shape[1:4])}: {error}"
            ) from error
        if shape != x.shape:
            raise ContractError(
                f"{what} of blueprint {blueprint.name!r} behind {kind} features of shape {list(x.shape[1:4])} have "
                f"shape {list(shape[1:4])}; a seed must keep the shape"
            )
