# mypy: allow-untyped-defs
"""The kernels of `block` for the gated MLP: a program takes a tile of tokens and of the MLP's features."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_tiles_triton import in_tile, low_args, out_tile, thin_tile

TILE: dict[str, Any] = {
    "BM": 64,
    "BN": 64,
    "num_warps": 4,
}  # schedules, no part of the result: the best of ten
GRAD: dict[str, Any] = {"BM": 32, "BN": 128, "num_warps": 4}  # each at 7B shapes on an H100


def tiles(tokens: int, width: int, tile: dict[str, Any]) -> tuple[int, int]:
    return triton.cdiv(width, tile["BN"]), triton.cdiv(tokens, tile["BM"])


def swiglu(gu: Tensor, act: str, low: tuple[Tensor, Tensor] | None, h: Tensor) -> None:
    z, b, rank = low_args(low, gu)
    width = gu.shape[1] // 2
    with torch.cuda.device_of(gu):
        _swiglu[tiles(len(gu), width, TILE)](
            gu, z, b, h, len(gu), F=width, R=rank, SILU=act == "silu", **TILE
        )


def swiglu_grad(
    gu: Tensor,
    act: str,
    dh: Tensor,
    low: tuple[Tensor, Tensor] | None,
    dlow: tuple[Tensor, Tensor] | None,
    keep_h: bool,
) -> None:
    z, b, rank = low_args(low, gu)
    dz, a, drank = low_args(dlow, gu)
    width = gu.shape[1] // 2
    with torch.cuda.device_of(gu):
        _swiglu_grad[tiles(len(gu), width, GRAD)](
            *(gu, dh, z, b, dz, a, len(gu)),
            F=width,
            R=rank,
            RD=drank,
            SILU=act == "silu",
            KEEP=keep_h,
            **GRAD,
        )


@triton.jit
def _act(g, SILU: tl.constexpr):
    """The activation and its derivative."""
    if SILU:
        sigmoid = tl.sigmoid(g)
        return g * sigmoid, sigmoid * (1.0 + g * (1.0 - sigmoid))
    else:
        tanh = 2.0 * tl.sigmoid(2.0 * 0.7978845608028654 * (g + 0.044715 * g * g * g)) - 1.0
        slope = 0.5 * (1.0 + tanh)
        slope += 0.5 * g * (1.0 - tanh * tanh) * 0.7978845608028654 * (1.0 + 0.134145 * g * g)
        return 0.5 * g * (1.0 + tanh), slope


@triton.jit
def _halves(gu_ptr, z_ptr, b_ptr, rows, inside, col, live, F: tl.constexpr, R: tl.constexpr):
    """g and u of a tile, low-rank parts added."""
    at = rows[:, None] * (2 * F) + col[None, :]
    g = tl.load(gu_ptr + at, mask=live, other=0.0).to(tl.float32)
    u = tl.load(gu_ptr + at + F, mask=live, other=0.0).to(tl.float32)
    if R > 0:
        z = thin_tile(z_ptr, rows, inside, R)
        g += tl.dot(z, out_tile(b_ptr, col, R, F), input_precision="ieee")
        u += tl.dot(z, out_tile(b_ptr + F * R, col, R, F), input_precision="ieee")
    return g, u


@triton.jit
def _swiglu(
    gu_ptr,
    z_ptr,
    b_ptr,
    h_ptr,
    tokens,
    F: tl.constexpr,
    R: tl.constexpr,
    SILU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    rows = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    col = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = rows < tokens
    live = inside[:, None] & (col < F)[None, :]
    g, u = _halves(gu_ptr, z_ptr, b_ptr, rows, inside, col, live, F, R)
    value, _slope = _act(g, SILU)
    tl.store(h_ptr + rows[:, None] * F + col[None, :], (value * u).to(h_ptr.dtype.element_ty), mask=live)


@triton.jit
def _swiglu_grad(
    gu_ptr,
    dh_ptr,
    z_ptr,
    b_ptr,
    dz_ptr,
    a_ptr,
    tokens,
    F: tl.constexpr,
    R: tl.constexpr,
    RD: tl.constexpr,
    SILU: tl.constexpr,
    KEEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    rows = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    col = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = rows < tokens
    live = inside[:, None] & (col < F)[None, :]
    kind = gu_ptr.dtype.element_ty
    at = rows[:, None] * F + col[None, :]
    dh = tl.load(dh_ptr + at, mask=live, other=0.0).to(tl.float32)
    if RD > 0:
        dz = thin_tile(dz_ptr, rows, inside, RD)
        dh += tl.dot(dz, in_tile(a_ptr, col, RD, F), input_precision="ieee")
    g, u = _halves(gu_ptr, z_ptr, b_ptr, rows, inside, col, live, F, R)
    value, slope = _act(g, SILU)
    wide = rows[:, None] * (2 * F) + col[None, :]
    tl.store(gu_ptr + wide, (dh * u * slope).to(kind), mask=live)
    tl.store(gu_ptr + wide + F, (dh * value).to(kind), mask=live)
    if KEEP:
        tl.store(dh_ptr + at, (value * u).to(kind), mask=live)
