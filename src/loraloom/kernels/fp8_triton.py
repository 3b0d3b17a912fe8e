# mypy: allow-untyped-defs
"""The kernels of `fp8`: each bit-equal to its definition there, which also has the equations.

A program holds one whole row, so that it is read once. What is not a number stays so, and is seen in the loss.

shapes  as in fp8
units   element numbers are int64: a matrix may have more than 2^31 elements
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp8 import OVER
from .scales8 import TINY

A_WARP = 1024  # elements of a row for each warp, 32 a lane; a schedule, no part of the arithmetic
ROWS, COLS = 64, 128
CARRY = tl.constexpr(OVER)


def quantize_rows(x_TK: Tensor, codes: Tensor, scale: Tensor, power: bool) -> None:
    tile = triton.next_power_of_2(x_TK.shape[1])
    warps = min(16, max(1, tile // A_WARP))
    with torch.cuda.device_of(x_TK):
        _quantize_rows[(len(x_TK),)](
            x_TK,
            codes,
            scale,
            x_TK.shape[1],
            *x_TK.stride(),
            TINY,
            POWER=power,
            TILE=tile,
            num_warps=warps,
            enable_fp_fusion=False,
        )


@triton.jit
def _quantize_rows(
    x_ptr,
    codes_ptr,
    scale_ptr,
    width,
    row_stride,
    col_stride,
    tiny,
    POWER: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, TILE)
    x = tl.load(x_ptr + row * row_stride + col * col_stride, mask=col < width, other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(x), 0)
    if POWER:
        exponent = ((amax.to(tl.int32, bitcast=True) + CARRY) >> 23) - 8
        scale = (tl.where(exponent < 1, 127, exponent) << 23).to(tl.float32, bitcast=True)
    else:
        quotient = tl.div_rn(amax, 448.0)
        scale = tl.where(quotient < tiny, 1.0, quotient)
    tl.store(scale_ptr + row, scale)
    unit = tl.maximum(x * tl.div_rn(1.0, scale), -448.0, propagate_nan=tl.PropagateNan.ALL)
    unit = tl.minimum(unit, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(codes_ptr + row * width + col, unit.to(codes_ptr.dtype.element_ty), mask=col < width)


def turn8(w8_NK: Tensor, scale_N: Tensor, scale_K: Tensor, out: Tensor) -> None:
    grid = (triton.cdiv(w8_NK.shape[0], ROWS), triton.cdiv(w8_NK.shape[1], COLS))
    args = (w8_NK, scale_N.contiguous(), scale_K.contiguous(), out)
    with torch.cuda.device_of(out):
        _turn8[grid](*args, *w8_NK.shape, w8_NK.stride(0), out.stride(0), R=ROWS, C=COLS)


@triton.jit
def _turn8(
    w_ptr,
    row_scale_ptr,
    col_scale_ptr,
    out_ptr,
    num_rows,
    num_cols,
    stride,
    out_stride,
    R: tl.constexpr,
    C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    col = tl.program_id(1).to(tl.int64) * C + tl.arange(0, C)
    inside = (row < num_rows)[:, None] & (col < num_cols)[None, :]
    w = tl.load(w_ptr + row[:, None] * stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    w *= tl.load(row_scale_ptr + row, mask=row < num_rows, other=1.0)[:, None]
    w *= tl.div_rn(1.0, tl.load(col_scale_ptr + col, mask=col < num_cols, other=1.0))[None, :]
    inside = (col < num_cols)[:, None] & (row < num_rows)[None, :]
    at = col[:, None] * out_stride + row[None, :]
    tl.store(out_ptr + at, tl.trans(w.to(out_ptr.dtype.element_ty)), mask=inside)
