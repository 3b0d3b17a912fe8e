# mypy: allow-untyped-defs
"""The kernel of `dropout`: a hash for each element, in 32 bits, and one read and write of x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def keyed_dropout(x: Tensor, key: Tensor, threshold: Tensor, scale: Tensor, out: Tensor) -> None:
    features = x.shape[-1]
    with torch.cuda.device_of(x):
        _keyed_dropout[(x.numel() // features, triton.cdiv(features, BLOCK))](
            x, key, threshold, scale, out, features, len(threshold) > 1, BLOCK=BLOCK
        )


@triton.jit
def _mix(h):
    h = (h ^ (h >> 16)) * tl.full((), 0x85EBCA6B, tl.uint32)
    h = (h ^ (h >> 13)) * tl.full((), 0xC2B2AE35, tl.uint32)
    return h ^ (h >> 16)


@triton.jit
def _keyed_dropout(
    x_ptr, key_ptr, threshold_ptr, scale_ptr, out_ptr, features, EACH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < features
    which = row if EACH else 0
    h = _mix(
        tl.load(key_ptr + row).to(tl.uint32) + feature.to(tl.uint32) * tl.full((), 0x9E3779B1, tl.uint32)
    )
    keep = h.to(tl.int64) >= tl.load(threshold_ptr + which)
    x = tl.load(x_ptr + row * features + feature, mask=inside, other=0.0)
    scaled = x * tl.load(scale_ptr + which).to(x.dtype)
    tl.store(out_ptr + row * features + feature, tl.where(keep, scaled, 0.0).to(x.dtype), mask=inside)
