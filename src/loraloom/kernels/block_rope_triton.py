# mypy: allow-untyped-defs
"""The kernels of `block` that turn q and k by their positions, and their gradients back: a program takes some
tokens, forward several heads of them, one after the other, and backward one."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_tiles_triton import low_args, out_tile, roomy, thin_tile

FORWARD: dict[str, Any] = {"BM": 32, "STAGES": 3, "num_warps": 4}  # the best of twenty
MOST = 8  # heads
BACK: dict[str, Any] = {"BM": 128, "num_warps": 4}


def rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int], low: tuple[Tensor, Tensor] | None
) -> None:
    z, b, rank = low_args(low, qkv)
    count, groups = heads
    width = qkv.shape[1] // (count + 2 * groups)
    blocks = count + (2 if rank else 1) * groups  # v only where something is added to it
    each = max(n for n in range(1, MOST + 1) if blocks % n == 0)  # heads that a program takes
    shape = head_shape(width, cos.shape[1])
    ahead = roomy(qkv) and shape["P2"] + shape["PR"] <= 64  # B's rows of the next heads fill shared memory
    with torch.cuda.device_of(qkv):
        _rope[(blocks // each, triton.cdiv(len(qkv), FORWARD["BM"]))](
            *(qkv, cos, sin, z, b, len(qkv), qkv.stride(0), cos.stride(0)),
            HEADS=each,
            TURNED=count + groups,
            R=rank,
            **shape,
            **(FORWARD if ahead else FORWARD | {"STAGES": 1}),
        )


def rope_grad(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, dqkv: Tensor) -> None:
    dq, dk, dv = (part if part.stride(2) == 1 else part.contiguous() for part in (dq, dk, dv))
    heads, groups = dq.shape[1], dk.shape[1]
    with torch.cuda.device_of(dq):
        _rope_grad[(heads + 2 * groups, triton.cdiv(len(dq), BACK["BM"]))](
            *(dq, dk, dv, *dq.stride()[:2], *dk.stride()[:2], *dv.stride()[:2], cos, sin, cos.stride(0)),
            *(dqkv, len(dq)),
            H=heads,
            G=groups,
            **head_shape(dq.shape[2], cos.shape[1]),
            **BACK,
        )


def head_shape(width: int, turned: int) -> dict[str, int]:
    """A head of D features, of which E are turned in two halves of E2; tiles are powers of two."""
    rest = width - turned
    return {
        "D": width,
        "E2": turned // 2,
        "P2": max(16, triton.next_power_of_2(turned // 2)),
        "PR": max(16, triton.next_power_of_2(rest)) if rest else 0,
    }


@triton.jit
def _rope(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    z_ptr,
    b_ptr,
    tokens,
    stride,
    cos_stride,
    TURNED: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    E2: tl.constexpr,
    P2: tl.constexpr,
    PR: tl.constexpr,
    BM: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    kind = qkv_ptr.dtype.element_ty
    rows = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    inside = rows < tokens
    d = tl.arange(0, P2)
    live = inside[:, None] & (d < E2)[None, :]
    angle = rows[:, None] * cos_stride + d[None, :]
    cos = tl.load(cos_ptr + angle, mask=live, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=live, other=0.0).to(tl.float32)
    if R > 0:
        z = thin_tile(z_ptr, rows, inside, R)
    for count in tl.range(0, HEADS, num_stages=STAGES):
        head = tl.program_id(0) * HEADS + count
        at = rows[:, None] * stride + head * D + d[None, :]
        own = b_ptr + head * D * R
        first = tl.load(qkv_ptr + at, mask=live, other=0.0).to(tl.float32)
        second = tl.load(qkv_ptr + at + E2, mask=live, other=0.0).to(tl.float32)
        if R > 0:
            first += tl.dot(z, out_tile(own, d, R, E2), input_precision="ieee")
            second += tl.dot(z, out_tile(own + E2 * R, d, R, E2), input_precision="ieee")
        turned = tl.where(head < TURNED, first * cos - second * sin, first)
        second = tl.where(head < TURNED, second * cos + first * sin, second)
        tl.store(qkv_ptr + at, turned.to(kind), mask=live)
        tl.store(qkv_ptr + at + E2, second.to(kind), mask=live)
        if PR > 0 and R > 0:
            more = 2 * E2 + tl.arange(0, PR)
            there = inside[:, None] & (more < D)[None, :]
            at = rows[:, None] * stride + head * D + more[None, :]
            rest = tl.load(qkv_ptr + at, mask=there, other=0.0).to(tl.float32)
            rest += tl.dot(z, out_tile(own, more, R, D), input_precision="ieee")
            tl.store(qkv_ptr + at, rest.to(kind), mask=there)


@triton.jit
def _rope_grad(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    cos_ptr,
    sin_ptr,
    cos_stride,
    out_ptr,
    tokens,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    E2: tl.constexpr,
    P2: tl.constexpr,
    PR: tl.constexpr,
    BM: tl.constexpr,
):
    head = tl.program_id(0)
    rows = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    inside = rows < tokens
    d = tl.arange(0, P2)
    live = inside[:, None] & (d < E2)[None, :]
    kind = out_ptr.dtype.element_ty
    if head < H:
        start = dq_ptr + rows * q_t + head * q_h
    elif head < H + G:
        start = dk_ptr + rows * k_t + (head - H) * k_h
    else:
        start = dv_ptr + rows * v_t + (head - H - G) * v_h
    src = start[:, None] + d[None, :]
    first = tl.load(src, mask=live, other=0.0).to(tl.float32)
    second = tl.load(src + E2, mask=live, other=0.0).to(tl.float32)
    if head < H + G:
        angle = rows[:, None] * cos_stride + d[None, :]
        cos = tl.load(cos_ptr + angle, mask=live, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=live, other=0.0).to(tl.float32)
        turned = first * cos + second * sin
        second = second * cos - first * sin
        first = turned
    to = out_ptr + rows[:, None] * ((H + 2 * G) * D) + head * D + d[None, :]
    tl.store(to, first.to(kind), mask=live)
    tl.store(to + E2, second.to(kind), mask=live)
    if PR > 0:
        more = 2 * E2 + tl.arange(0, PR)
        there = inside[:, None] & (more < D)[None, :]
        rest = tl.load(start[:, None] + more[None, :], mask=there, other=0.0)
        tl.store(out_ptr + rows[:, None] * ((H + 2 * G) * D) + head * D + more[None, :], rest, mask=there)
