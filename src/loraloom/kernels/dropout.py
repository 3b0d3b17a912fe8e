"""Dropout whose mask is a function of a key, not of a generator's state.

    keep[t, i] = hash(seed, step, input, token t, feature i) >= p,     x' = x * keep / (1 - p)

So the mask does not depend on how a step is split into micro-batches, on packing, on which other adapters
ride along, or on recomputation; and layers that read the same input share one mask, and with it x A^T.

shapes  x (..., I); token, seed and p (...) or scalars: each token's number, its adapter's seed and rate
units   the hash is 32 bits; p is a probability, rounded to 2^-32
source  murmur3's 32-bit finaliser, chained over the parts of the key
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from .twin import twin

MASK = 0xFFFFFFFF


Whole = TypeVar("Whole", int, Tensor)


def mix(h: Whole) -> Whole:
    """murmur3's finaliser on a whole number, or an int64 tensor, that holds 32 bits."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & MASK
    return h ^ (h >> 16)


def keep_mask(key: Tensor, features: int, p: Tensor | float) -> Tensor:
    """Which features stay, (..., features) bool, for the tokens' keys (...)."""
    feature = torch.arange(features, device=key.device)
    h = mix((key[..., None] + feature * 0x9E3779B1) & MASK)
    threshold = torch.as_tensor(p, dtype=torch.float64, device=key.device) * 2.0**32
    return h >= threshold[..., None]


def token_key(token: Tensor, *, seed: Tensor | int, step: int, group: int) -> Tensor:
    """One 32-bit key for each token, int64, in the shape of `token`."""
    start: Any = seed
    h = mix(start & MASK)  # numbers are mixed on the host, so that nothing is copied to the device
    for part in (step, group, token & MASK, token >> 32):
        h = mix((h * 31 + part) & MASK)
    return h


def keyed_dropout(x: Tensor, key: Tensor, p: Tensor | float) -> Tensor:
    """x with dropped features at zero and the others scaled by 1 / (1 - p); key and p fit x's leading shape."""
    if not isinstance(p, Tensor):
        p = torch.full((), p, dtype=torch.float64, device=x.device)
    rate = p.to(x.device, torch.float64)
    return _Dropout.apply(x, key, rate)


class _Dropout(torch.autograd.Function):
    """Linear in x: the gradient is dropped and scaled alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Tensor, rate: Tensor) -> Tensor:
        ctx.save_for_backward(key, rate)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        if not x.is_meta and x.numel():
            _keyed_dropout(x, key, rate, out)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        key, rate = ctx.saved_tensors
        return keyed_dropout(dy, key, rate), None, None


def _keyed_dropout_reference(x: Tensor, key: Tensor, rate: Tensor, out: Tensor) -> None:
    keep = keep_mask(key, x.shape[-1], rate)
    scale = (1.0 / (1.0 - rate))[..., None].to(x.dtype)
    torch.where(keep, x * scale, torch.zeros((), dtype=x.dtype, device=x.device), out=out)


@twin(_keyed_dropout_reference)
def _keyed_dropout(x: Tensor, key: Tensor, rate: Tensor, out: Tensor) -> None:
    from .dropout_triton import keyed_dropout

    threshold = (
        (rate * 2.0**32).ceil().to(torch.int64)
    )  # a whole number is not below it just if it is not below this
    scale = (1.0 / (1.0 - rate)).to(x.dtype)
    keyed_dropout(x.contiguous(), key.contiguous(), threshold.reshape(-1), scale.reshape(-1), out)
