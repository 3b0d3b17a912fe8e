"""Dropout whose mask is a function of a key, not of a generator's state.

    keep[t, i] = hash(seed, step, input, token t, feature i) >= p,     x' = x * keep / (1 - p)

So the mask does not depend on how a step is split into micro-batches, on packing, on which other adapters
ride along, or on recomputation; and layers that read the same input share one mask, and with it x A^T.

shapes  x (..., I); token, seed and p (...) or scalars: each token's number, its adapter's seed and rate
units   the hash is 32 bits; p is a probability, rounded to 2^-32
source  murmur3's 32-bit finaliser, chained over the parts of the key
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def mix(h: Tensor) -> Tensor:
    """murmur3's finaliser on int64 tensors that hold 32 bits."""
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
    h = mix(torch.as_tensor(seed, dtype=torch.int64, device=token.device) & MASK)
    for part in (torch.tensor(step), torch.tensor(group), token & MASK, token >> 32):
        h = mix((h * 31 + part.to(token.device)) & MASK)
    return h


def keyed_dropout(x: Tensor, key: Tensor, p: Tensor | float) -> Tensor:
    """x with dropped features at zero and the others scaled by 1 / (1 - p); key and p fit x's leading shape."""
    keep = keep_mask(key, x.shape[-1], p)
    scale = 1.0 / (1.0 - torch.as_tensor(p, dtype=torch.float64, device=x.device))
    return torch.where(
        keep, x * scale[..., None].to(x.dtype), torch.zeros((), dtype=x.dtype, device=x.device)
    )
