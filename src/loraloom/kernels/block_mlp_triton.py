# mypy: allow-untyped-defs
"""The kernels of `block` for the gated MLP: a program keeps some of the MLP's features, with what low-rank matrices
have for them, and walks through its span of tokens. So those matrices are read once, the next tokens come while the
last are worked on, and gradients of the matrices add up in registers.

Each program writes what it has added up; the caller adds the parts. No atomics: the same numbers every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block import span_of
from .block_tiles_triton import in_tile, low_args, out_tile, roomy, thin_tile

# Schedules, no part of the result: the best of some twenty each at 7B shapes on an H100.
FORWARD: dict[str, Any] = {"BM": 32, "BN": 64, "STAGES": 2, "num_warps": 4}
GRAD: dict[str, Any] = {"BM": 16, "BN": 128, "STAGES": 3, "num_warps": 4}
GRAD_64: dict[str, Any] = {"BM": 32, "BN": 64, "STAGES": 3, "num_warps": 4}  # their sums fill the registers
SMALL: dict[str, Any] = {"BM": 16, "BN": 32, "STAGES": 1, "num_warps": 4}  # 39 KB, the most that it takes
PLAIN: dict[str, Any] = {"BM": 32, "BN": 128, "STAGES": 1, "num_warps": 4}  # no pair: a program has one tile


def schedule(gu: Tensor, rank: int, tile: dict[str, Any]) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid, and what a program walks through."""
    tokens, width = len(gu), gu.shape[1] // 2
    tile = PLAIN if not rank else tile if roomy(gu) else SMALL
    span = span_of(tokens) if rank else tile["BM"]
    grid = triton.cdiv(width, tile["BN"]), triton.cdiv(tokens, span)
    return grid, {"STEPS": span // tile["BM"], **tile}


def swiglu(gu: Tensor, act: str, low: tuple[Tensor, Tensor] | None, h: Tensor) -> None:
    z, b, rank = low_args(low, gu)
    grid, walk = schedule(gu, rank, FORWARD)
    with torch.cuda.device_of(gu):
        _swiglu[grid](gu, z, b, h, len(h), F=h.shape[1], R=rank, SILU=act == "silu", **walk)


def swiglu_grad(
    gu: Tensor,
    act: str,
    dh: Tensor,
    low: tuple[Tensor, Tensor] | None,
    dlow: tuple[Tensor, Tensor] | None,
    keep_h: bool,
    db: Tensor | None,
    da: Tensor | None,
) -> None:
    z, b, rank = low_args(low, gu)
    dz, a, drank = low_args(dlow, gu)
    most = max(rank, drank)
    grid, walk = schedule(gu, most, GRAD if most < 64 else GRAD_64)
    with torch.cuda.device_of(gu):
        _swiglu_grad[grid](
            *(gu, dh, z, b, dz, a, gu if db is None else db, gu if da is None else da, len(dh)),
            F=dh.shape[1],
            R=rank,
            RD=drank,
            SILU=act == "silu",
            KEEP=keep_h,
            **walk,
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
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    col = tl.program_id(0) * BN + tl.arange(0, BN)
    if R > 0:
        b_g = out_tile(b_ptr, col, R, F)
        b_u = out_tile(b_ptr + F * R, col, R, F)
    top = tl.program_id(1).to(tl.int64) * (STEPS * BM)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        rows = top + step * BM + tl.arange(0, BM)
        inside = rows < tokens
        live = inside[:, None] & (col < F)[None, :]
        at = rows[:, None] * (2 * F) + col[None, :]
        g = tl.load(gu_ptr + at, mask=live, other=0.0).to(tl.float32)
        u = tl.load(gu_ptr + at + F, mask=live, other=0.0).to(tl.float32)
        if R > 0:
            z = thin_tile(z_ptr, rows, inside, R)
            g += tl.dot(z, b_g, input_precision="ieee")
            u += tl.dot(z, b_u, input_precision="ieee")
        value, _slope = _act(g, SILU)
        h = (value * u).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows[:, None] * F + col[None, :], h, mask=live)


@triton.jit
def _write(ptr, sums, col, F: tl.constexpr, R: tl.constexpr, BY_COL: tl.constexpr, BY_RANK: tl.constexpr):
    """What was added up for features `col`, at a stride for features and one for ranks."""
    at = col[:, None] * BY_COL + tl.arange(0, R)[None, :] * BY_RANK
    tl.store(ptr + at, sums, mask=(col < F)[:, None])


@triton.jit
def _swiglu_grad(
    gu_ptr,
    dh_ptr,
    z_ptr,
    b_ptr,
    dz_ptr,
    a_ptr,
    db_ptr,
    da_ptr,
    tokens,
    F: tl.constexpr,
    R: tl.constexpr,
    RD: tl.constexpr,
    SILU: tl.constexpr,
    KEEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    col = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1).to(tl.int64)
    kind = gu_ptr.dtype.element_ty
    if R > 0:
        b_g = out_tile(b_ptr, col, R, F)
        b_u = out_tile(b_ptr + F * R, col, R, F)
        db_g = tl.zeros((BN, R), tl.float32)
        db_u = tl.zeros((BN, R), tl.float32)
    if RD > 0:
        a = in_tile(a_ptr, col, RD, F)
        da = tl.zeros((BN, RD), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        rows = part * (STEPS * BM) + step * BM + tl.arange(0, BM)
        inside = rows < tokens
        live = inside[:, None] & (col < F)[None, :]
        at = rows[:, None] * F + col[None, :]
        wide = rows[:, None] * (2 * F) + col[None, :]
        dh = tl.load(dh_ptr + at, mask=live, other=0.0).to(tl.float32)
        g = tl.load(gu_ptr + wide, mask=live, other=0.0).to(tl.float32)
        u = tl.load(gu_ptr + wide + F, mask=live, other=0.0).to(tl.float32)
        if R > 0:
            z = thin_tile(z_ptr, rows, inside, R)
            g += tl.dot(z, b_g, input_precision="ieee")
            u += tl.dot(z, b_u, input_precision="ieee")
        if RD > 0:
            dz = thin_tile(dz_ptr, rows, inside, RD)
            dh += tl.dot(dz, a, input_precision="ieee")
        value, slope = _act(g, SILU)
        dg = (dh * u * slope).to(kind)
        du = (dh * value).to(kind)
        h = (value * u).to(kind)
        tl.store(gu_ptr + wide, dg, mask=live)
        tl.store(gu_ptr + wide + F, du, mask=live)
        if KEEP:
            tl.store(dh_ptr + at, h, mask=live)
        if R > 0:
            db_g += tl.dot(tl.trans(dg), z, input_precision="ieee")
            db_u += tl.dot(tl.trans(du), z, input_precision="ieee")
        if RD > 0:
            da += tl.dot(tl.trans(h), dz, input_precision="ieee")
    if R > 0:
        to = db_ptr + part * (2 * F * R)
        _write(to, db_g, col, F, R, R, 1)
        _write(to + F * R, db_u, col, F, R, R, 1)
    if RD > 0:
        _write(da_ptr + part * (RD * F), da, col, F, RD, 1, F)
