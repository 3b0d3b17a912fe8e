# mypy: allow-untyped-defs
"""The kernels of `block` on the residual stream: a program holds one row in registers, and reads and writes it once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp8 import Rows8
from .scales8 import TINY

LEAST = tl.constexpr(TINY)


def shape_of(width: int) -> dict[str, int]:
    """A row filled up to a power of two, 16 numbers or so a thread."""
    block = triton.next_power_of_2(width)
    return {"K": width, "BLOCK": block, "num_warps": max(1, min(16, block // 512))}


def add_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    eps: float,
    total: Tensor,
    rstd: Tensor,
    n: Tensor | None,
    codes: Rows8 | None,
) -> None:
    c8, scale = (x, x) if codes is None else (codes.codes, codes.scale)
    with torch.cuda.device_of(x):
        _add_norm[(len(x),)](
            *(x, x if y is None else y, weight, eps, total, rstd, x if n is None else n, c8, scale),
            ADD=y is not None,
            KEEP=n is not None,
            QUANT=codes is not None,
            **shape_of(x.shape[1]),
        )


def norm_grad(
    dn: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dres: Tensor | None,
    keep_n: bool,
    dx: Tensor,
    codes: Rows8 | None,
) -> None:
    c8, scale = (x, x) if codes is None else (codes.codes, codes.scale)
    with torch.cuda.device_of(x):
        _norm_grad[(len(x),)](
            *(dn, x, rstd, weight, x if dres is None else dres, dx, c8, scale),
            RES=dres is not None,
            KEEP=keep_n,
            QUANT=codes is not None,
            **shape_of(x.shape[1]),
        )


@triton.jit
def _write8(value, c8_ptr, scale_ptr, row, at, live):
    """A row in 8 bits, as `fp8.quantize_rows` does it."""
    scale = tl.div_rn(tl.max(tl.abs(value), 0), 448.0)
    scale = tl.where(scale < LEAST, 1.0, scale)
    tl.store(scale_ptr + row, scale)
    unit = tl.maximum(value * tl.div_rn(1.0, scale), -448.0, propagate_nan=tl.PropagateNan.ALL)
    unit = tl.minimum(unit, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(c8_ptr + at, unit.to(c8_ptr.dtype.element_ty), mask=live)


@triton.jit
def _add_norm(
    x_ptr,
    y_ptr,
    w_ptr,
    eps,
    total_ptr,
    rstd_ptr,
    n_ptr,
    c8_ptr,
    scale_ptr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    KEEP: tl.constexpr,
    QUANT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    live = col < K
    at = row * K + col
    kind = x_ptr.dtype.element_ty
    value = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    weight = tl.load(w_ptr + col, mask=live, other=0.0).to(tl.float32)
    if ADD:
        rounded = (value + tl.load(y_ptr + at, mask=live, other=0.0).to(tl.float32)).to(kind)
        tl.store(total_ptr + at, rounded, mask=live)
        value = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(value * value, 0) / K + eps)
    tl.store(rstd_ptr + row, rstd)
    n = (value * rstd * weight).to(kind)
    if KEEP:
        tl.store(n_ptr + at, n, mask=live)
    if QUANT:
        _write8(n.to(tl.float32), c8_ptr, scale_ptr, row, at, live)


@triton.jit
def _norm_grad(
    dn_ptr,
    x_ptr,
    rstd_ptr,
    w_ptr,
    dres_ptr,
    dx_ptr,
    c8_ptr,
    scale_ptr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    RES: tl.constexpr,
    KEEP: tl.constexpr,
    QUANT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    live = col < K
    at = row * K + col
    rstd = tl.load(rstd_ptr + row)
    unit = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32) * rstd
    weight = tl.load(w_ptr + col, mask=live, other=0.0).to(tl.float32)
    g = tl.load(dn_ptr + at, mask=live, other=0.0).to(tl.float32) * weight
    value = rstd * (g - unit * (tl.sum(g * unit, 0) / K))
    if RES:
        value += tl.load(dres_ptr + at, mask=live, other=0.0).to(tl.float32)
    dx = value.to(x_ptr.dtype.element_ty)
    tl.store(dx_ptr + at, dx, mask=live)
    if KEEP:
        tl.store(dn_ptr + at, (unit * weight).to(x_ptr.dtype.element_ty), mask=live)
    if QUANT:
        _write8(dx.to(tl.float32), c8_ptr, scale_ptr, row, at, live)
