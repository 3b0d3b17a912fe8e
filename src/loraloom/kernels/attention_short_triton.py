# mypy: allow-untyped-defs
"""The kernels of `attention_short`: a program takes one head of a tile of queries, or of keys, and walks along the
other ones that its documents hold."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles of queries (BM) and of keys (BN), measured by benchmarks/attention_kernels.py
FORWARD: dict[str, Any] = {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 3}
QUERIES: dict[str, Any] = {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 3}
KEYS: dict[str, Any] = {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 3}
LOG2E = 1.4426950408889634
ALL = 2**30  # a window that nothing is longer than


def forward(q, k, v, bounds, out, lse, scale, window) -> None:
    tokens, heads, _ = q.shape
    with torch.cuda.device_of(q):
        _forward[(heads, triton.cdiv(tokens, FORWARD["BM"]))](
            *(q, k, v, bounds, out, lse, *strides(q, k, v, out)),
            *(tokens, scale * LOG2E, window or ALL),
            **head_of(q, k),
            **FORWARD,
        )


def gradients(dout, q, k, v, bounds, out, lse, delta, dq, dk, dv, scale, window) -> None:
    tokens, heads, _ = q.shape
    with torch.cuda.device_of(q):
        _queries[(heads, triton.cdiv(tokens, QUERIES["BM"]))](
            *(q, k, v, bounds, out, dout, lse, delta, dq, *strides(q, k, v, out, dout, dq)),
            *(tokens, scale, scale * LOG2E, window or ALL),
            **head_of(q, k),
            **QUERIES,
        )
        _keys[(k.shape[1], triton.cdiv(tokens, KEYS["BN"]))](
            *(q, k, v, bounds, dout, lse, delta, dk, dv, *strides(q, k, v, dout, dk, dv)),
            *(tokens, scale, scale * LOG2E, window or ALL),
            **head_of(q, k),
            **KEYS,
        )


def strides(*tensors: Tensor) -> list[int]:
    return [step for tensor in tensors for step in tensor.stride()[:2]]


def head_of(q: Tensor, k: Tensor) -> dict[str, int]:
    """Query heads that share a key head, and a head's features with their power of two."""
    width = q.shape[2]
    return {"SHARE": q.shape[1] // k.shape[1], "D": width, "P": max(16, triton.next_power_of_2(width))}


@triton.jit
def tile(ptr, rows, row_stride, tokens, D: tl.constexpr, P: tl.constexpr):
    """Rows of one head, (rows, P), zero outside."""
    d = tl.arange(0, P)
    at = rows.to(tl.int64)[:, None] * row_stride + d[None, :]
    return tl.load(ptr + at, mask=(rows < tokens)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def put(ptr, x, rows, row_stride, tokens, D: tl.constexpr, P: tl.constexpr):
    d = tl.arange(0, P)
    at = rows.to(tl.int64)[:, None] * row_stride + d[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=(rows < tokens)[:, None] & (d < D)[None, :])


@triton.jit
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    bounds_ptr,
    out_ptr,
    lse_ptr,
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    o_t,
    o_h,
    tokens,
    scale2,
    window,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    top = tl.program_id(1) * BM
    rows = top + tl.arange(0, BM)
    least = tl.maximum(tl.load(bounds_ptr + rows, mask=rows < tokens, other=0), rows - window + 1)
    q = tile(q_ptr + head * q_h, rows, q_t, tokens, D, P)
    k_ptr += head // SHARE * k_h
    v_ptr += head // SHARE * v_h
    most = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, P], tl.float32)
    start = tl.maximum(tl.load(bounds_ptr + top), top - window + 1)
    for left in range(start, tl.minimum(top + BM, tokens), BN):
        cols = left + tl.arange(0, BN)
        k = tile(k_ptr, cols, k_t, tokens, D, P)
        s = tl.dot(q, tl.trans(k)) * scale2
        seen = (cols[None, :] <= rows[:, None]) & (cols[None, :] >= least[:, None])
        s = tl.where(seen, s, -1e30)
        above = tl.maximum(most, tl.max(s, 1))
        p = tl.exp2(s - above[:, None])  # 1 where a row has seen nothing yet: its next maximum takes that out
        shrink = tl.exp2(most - above)
        total = total * shrink + tl.sum(p, 1)
        v = tile(v_ptr, cols, v_t, tokens, D, P)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        most = above
    put(out_ptr + head * o_h, acc / total[:, None], rows, o_t, tokens, D, P)
    tl.store(lse_ptr + head * tokens + rows, most + tl.log2(total), mask=rows < tokens)


@triton.jit
def _queries(
    q_ptr,
    k_ptr,
    v_ptr,
    bounds_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    o_t,
    o_h,
    do_t,
    do_h,
    dq_t,
    dq_h,
    tokens,
    scale,
    scale2,
    window,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dq of a tile of queries, and their delta."""
    head = tl.program_id(0).to(tl.int64)
    top = tl.program_id(1) * BM
    rows = top + tl.arange(0, BM)
    inside = rows < tokens
    least = tl.maximum(tl.load(bounds_ptr + rows, mask=inside, other=0), rows - window + 1)
    q = tile(q_ptr + head * q_h, rows, q_t, tokens, D, P)
    dout = tile(dout_ptr + head * do_h, rows, do_t, tokens, D, P)
    out = tile(out_ptr + head * o_h, rows, o_t, tokens, D, P)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + head * tokens + rows, delta, mask=inside)
    lse = tl.load(lse_ptr + head * tokens + rows, mask=inside, other=0.0)
    k_ptr += head // SHARE * k_h
    v_ptr += head // SHARE * v_h
    dq = tl.zeros([BM, P], tl.float32)
    start = tl.maximum(tl.load(bounds_ptr + top), top - window + 1)
    for left in range(start, tl.minimum(top + BM, tokens), BN):
        cols = left + tl.arange(0, BN)
        k = tile(k_ptr, cols, k_t, tokens, D, P)
        v = tile(v_ptr, cols, v_t, tokens, D, P)
        s = tl.dot(q, tl.trans(k)) * scale2
        seen = (cols[None, :] <= rows[:, None]) & (cols[None, :] >= least[:, None])
        p = tl.exp2(tl.where(seen, s - lse[:, None], -1e30))
        ds = p * (tl.dot(dout, tl.trans(v)) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    put(dq_ptr + head * dq_h, dq * scale, rows, dq_t, tokens, D, P)


@triton.jit
def _keys(
    q_ptr,
    k_ptr,
    v_ptr,
    bounds_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    do_t,
    do_h,
    dk_t,
    dk_h,
    dv_t,
    dv_h,
    tokens,
    scale,
    scale2,
    window,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dk and dv of a tile of keys, from all queries that see one of them, head after head."""
    group = tl.program_id(0).to(tl.int64)
    top = tl.program_id(1) * BN
    cols = top + tl.arange(0, BN)
    bound = tl.load(bounds_ptr + tokens + cols, mask=cols < tokens, other=0)
    behind = tl.minimum(bound, cols + window)
    k = tile(k_ptr + group * k_h, cols, k_t, tokens, D, P)
    v = tile(v_ptr + group * v_h, cols, v_t, tokens, D, P)
    dk = tl.zeros([BN, P], tl.float32)
    dv = tl.zeros([BN, P], tl.float32)
    last = tl.minimum(top + BN, tokens) - 1
    stop = tl.minimum(tl.load(bounds_ptr + tokens + last), last + window)
    for share in range(SHARE):
        head = group * SHARE + share
        for upper in range(top, stop, BM):
            rows = upper + tl.arange(0, BM)
            inside = rows < tokens
            q = tile(q_ptr + head * q_h, rows, q_t, tokens, D, P)
            dout = tile(dout_ptr + head * do_h, rows, do_t, tokens, D, P)
            lse = tl.load(lse_ptr + head * tokens + rows, mask=inside, other=0.0)
            delta = tl.load(delta_ptr + head * tokens + rows, mask=inside, other=0.0)
            s = tl.dot(k, tl.trans(q)) * scale2
            seen = (rows[None, :] >= cols[:, None]) & (rows[None, :] < behind[:, None])
            p = tl.exp2(tl.where(seen, s - lse[None, :], -1e30))
            dv = tl.dot(p.to(dout.dtype), dout, dv)
            ds = p * (tl.dot(v, tl.trans(dout)) - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk)
    put(dk_ptr + group * dk_h, dk * scale, cols, dk_t, tokens, D, P)
    put(dv_ptr + group * dv_h, dv, cols, dv_t, tokens, D, P)
