# mypy: allow-untyped-defs
"""The Triton kernel of `adamw8`: a program reads, moves and writes one block of 256 elements.

A code is found by eight steps of binary search over 255 midpoints; both tables are small enough to stay in the
first cache. Multiplication and addition are kept apart (`enable_fp_fusion=False`) and root and quotient are the
correctly rounded ones, because the torch definition rounds each by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adamw8 import num_blocks
from .scales8 import BLOCK8, TINY

WARPS = 2  # four elements a thread


def launch(tensors: Sequence[Tensor], maps: Sequence[Tensor], scalars: Sequence[float]) -> None:
    """Run the kernel on (p, grad, m, v, m_absmax, v_absmax), the four tables, and the factors."""
    n = tensors[0].numel()
    if n:
        form = {"BLOCK": BLOCK8, "num_warps": WARPS, "enable_fp_fusion": False}
        with torch.cuda.device_of(tensors[0]):
            _adamw8[(num_blocks(n),)](*tensors, *maps, *scalars, n, TINY, **form)


@triton.jit
def _adamw8(
    p_ptr,
    grad_ptr,
    m_ptr,
    v_ptr,
    m_absmax_ptr,
    v_absmax_ptr,
    map_s_ptr,
    middle_s_ptr,
    map_u_ptr,
    middle_u_ptr,
    beta1,
    new1,
    beta2,
    new2,
    keep,
    rate,
    correct,
    eps,
    n,
    tiny,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    g = tl.load(grad_ptr + i, mask=inside, other=0.0).to(tl.float32)

    m_code = tl.load(m_ptr + i, mask=inside, other=0).to(tl.int32)
    m = tl.load(map_s_ptr + m_code) * tl.load(m_absmax_ptr + block)
    m = tl.where(inside, m * beta1 + g * new1, 0.0)  # what lies behind the end must not reach the maximum
    v_code = tl.load(v_ptr + i, mask=inside, other=0).to(tl.int32)
    v = tl.load(map_u_ptr + v_code) * tl.load(v_absmax_ptr + block)
    v = tl.where(inside, v * beta2 + (g * g) * new2, 0.0)

    move = tl.div_rn(m, tl.sqrt_rn(v) * correct + eps) * rate
    p = tl.load(p_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(p_ptr + i, (p * keep - move).to(p_ptr.dtype.element_ty), mask=inside)

    short = (block + 1) * BLOCK > n
    code, absmax = _quantize8(m, middle_s_ptr, short, tiny, BLOCK)
    tl.store(m_ptr + i, code, mask=inside)
    tl.store(m_absmax_ptr + block, absmax)
    code, absmax = _quantize8(v, middle_u_ptr, short, tiny, BLOCK)
    tl.store(v_ptr + i, code, mask=inside)
    tl.store(v_absmax_ptr + block, absmax)


@triton.jit
def _quantize8(value, middle_ptr, short, tiny, BLOCK: tl.constexpr):
    """The number of midpoints below value / absmax, and absmax; as `scales8` rounds them."""
    absmax = tl.full((BLOCK,), 0.0, tl.float32) + tl.max(tl.abs(value))
    divisor = tl.maximum(absmax, tl.full((BLOCK,), tiny, tl.float32))
    unit = tl.where(
        short, tl.div_rn(value, divisor), value * tl.div_rn(tl.full((BLOCK,), 1.0, tl.float32), divisor)
    )
    unit = tl.minimum(tl.maximum(unit, -1.0), 1.0)
    code = tl.zeros((BLOCK,), tl.int32)
    for power in tl.static_range(8):
        further = code + (128 >> power)
        below = tl.load(middle_ptr + further - 1) < unit
        code = tl.where(below, further, code)
    return code.to(tl.uint8), tl.max(tl.where(short, divisor, absmax))
