"""Products of 16-bit matrices whose sums are kept in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def mm32(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, float64 for float64: the sums over many tokens are not rounded to 16 bits."""
    if a.dtype.itemsize >= 4:
        return a @ b
    if a.is_cuda or a.is_meta:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
