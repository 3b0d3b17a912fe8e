# mypy: allow-untyped-defs
"""The kernel of `block` that adds a low-rank part to a tensor, and another tensor with it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_tiles_triton import in_tile, out_tile, thin_tile

TILE: dict[str, Any] = {"BM": 64, "BN": 64, "num_warps": 4}  # the best of six at 7B shapes on an H100


def add_low(x: Tensor, y: Tensor | None, low: tuple[Tensor, Tensor], turned: bool, out: Tensor) -> None:
    z, m = low
    tokens, width = x.shape
    with torch.cuda.device_of(x):
        _add_low[(triton.cdiv(width, TILE["BN"]), triton.cdiv(tokens, TILE["BM"]))](
            *(x, x if y is None else y, z, m, out, tokens),
            N=width,
            R=z.shape[1],
            TWO=y is not None,
            TURNED=turned,
            **TILE,
        )


@triton.jit
def _add_low(
    x_ptr,
    y_ptr,
    z_ptr,
    m_ptr,
    out_ptr,
    tokens,
    N: tl.constexpr,
    R: tl.constexpr,
    TWO: tl.constexpr,
    TURNED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    rows = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    col = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = rows < tokens
    live = inside[:, None] & (col < N)[None, :]
    at = rows[:, None] * N + col[None, :]
    value = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    if TWO:
        value += tl.load(y_ptr + at, mask=live, other=0.0).to(tl.float32)
    z = thin_tile(z_ptr, rows, inside, R)
    if TURNED:
        value += tl.dot(z, in_tile(m_ptr, col, R, N), input_precision="ieee")
    else:
        value += tl.dot(z, out_tile(m_ptr, col, R, N), input_precision="ieee")
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=live)
