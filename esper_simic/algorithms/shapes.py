"""The checks at the door of every algorithm here: one layout, one dtype."""

from __future__ import annotations

from torch import Tensor


def check_unrolls(**tensors: Tensor) -> None:
    """Refuse tensors that do not belong to the same unrolls.

    Args:
        **tensors: By the caller's argument names. The first one sets the layout `[T, B]`, T >= 1, and the dtype;
            `bootstrap_value` is `[B]`, every other one like the first.

    Raises:
        ValueError: Shapes or dtypes do not agree; the message names the argument.
    """
    (first, like), *others = tensors.items()
    if like.dim() != 2 or like.shape[0] < 1 or not like.is_floating_point():
        raise ValueError(f"{first} must be [T, B] floating point with T >= 1, not {_describe(like)}")
    for name, tensor in others:
        expected = like.shape[1:] if name == "bootstrap_value" else like.shape
        if tensor.shape != expected or tensor.dtype != like.dtype:
            raise ValueError(
                f"{name} must be {list(expected)} {like.dtype} like {first}, it is {_describe(tensor)}"
            )


def check_masks(like: Tensor, **masks: Tensor) -> None:
    """Refuse masks of another shape than `like`; any dtype will do, 0 or False means no.

    Raises:
        ValueError: The message names the mask.
    """
    for name, mask in masks.items():
        if mask.shape != like.shape:
            raise ValueError(f"{name} must be {list(like.shape)}, it is {_describe(mask)}")


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"
