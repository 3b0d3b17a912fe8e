# mypy: allow-untyped-defs
"""What the kernels of `block` on wide tensors share: tiles of a thin factor and of the matrix it is multiplied with.

Products with thin factors ride along as `tl.dot` on tiles that are in registers anyway.

shapes  R is 16, 32 or 64: callers fill up
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor


def low_args(low: tuple[Tensor, Tensor] | None, like: Tensor) -> tuple[Tensor, Tensor, int]:
    """Thin factor, matrix and rank; something to point at and 0 where there is none."""
    return (like, like, 0) if low is None else (low[0], low[1], low[0].shape[1])


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a block of a GPU may have; AMD's do not say, and have 64 KB."""
    about = torch.cuda.get_device_properties(device)
    return int(getattr(about, "shared_memory_per_block_optin", 64 * 1024))


def roomy(x: Tensor) -> bool:
    """Whether a GPU has the shared memory that schedules with loads ahead take, as chosen on an H100: 82 KB at most in
    16 bits. GPUs since Ampere have it; with 32 bits only the largest do. Held by tests/kernel_room.py."""
    return not x.is_cuda or shared_memory(x.device) >= 48 * 1024 * x.element_size()


@triton.jit
def thin_tile(ptr, rows, inside, R: tl.constexpr):
    r = tl.arange(0, R)
    return tl.load(ptr + rows[:, None] * R + r[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def out_tile(ptr, col, R: tl.constexpr, N: tl.constexpr):
    """Columns `col` of the transpose (R, N) of a matrix (N, R)."""
    r = tl.arange(0, R)
    return tl.load(ptr + col[None, :] * R + r[:, None], mask=(col < N)[None, :], other=0.0)


@triton.jit
def in_tile(ptr, col, R: tl.constexpr, K: tl.constexpr):
    """Columns `col` of a matrix (R, K)."""
    r = tl.arange(0, R)
    return tl.load(ptr + r[:, None] * K + col[None, :], mask=(col < K)[None, :], other=0.0)
