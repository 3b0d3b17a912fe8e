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

from .adamw8 import Operands, num_blocks
from .scales8 import BLOCK8, TINY

WARPS = 2  # four elements a thread
ZERO = tl.constexpr(127)  # the signed map's entry 0: behind the end, where nothing may reach the maximum
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def launch(operands: Sequence[Operands], maps: Sequence[Tensor], scalars: Sequence[float]) -> None:
    """Run the kernel over parameters of equal dtypes: a row of the table for each, addresses, size, first program."""
    rows, programs = [], 0
    for each in operands:
        n = each[0].numel()
        if n:
            rows.append([*(t.data_ptr() for t in each), n, programs])
            programs += num_blocks(n)
    if not rows:
        return
    p, grad = operands[0][:2]
    # From pinned memory the host need not wait for what is queued before.
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=p.is_cuda).to(p.device, non_blocking=True)
    form = {"DEPTH": len(rows).bit_length(), "P": DTYPES[p.dtype], "G": DTYPES[grad.dtype], "BLOCK": BLOCK8}
    with torch.cuda.device_of(p):
        _adamw8[(programs,)](
            table, *maps, *scalars, len(rows), TINY, **form, num_warps=WARPS, enable_fp_fusion=False
        )


@triton.jit
def _adamw8(
    table_ptr,
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
    num,
    tiny,
    DEPTH: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = tl.full((), 0, tl.int64)
    for power in tl.static_range(DEPTH):  # the last row whose first program is not behind this one
        further = row + (1 << (DEPTH - 1 - power))
        first = tl.load(table_ptr + further * 8 + 7, mask=further < num, other=1 << 62)
        row = tl.where(first <= program, further, row)
    entry = table_ptr + row * 8
    p_ptr = tl.load(entry).to(tl.pointer_type(P))
    grad_ptr = tl.load(entry + 1).to(tl.pointer_type(G))
    m_ptr = tl.load(entry + 2).to(tl.pointer_type(tl.uint8))
    v_ptr = tl.load(entry + 3).to(tl.pointer_type(tl.uint8))
    m_absmax_ptr = tl.load(entry + 4).to(tl.pointer_type(tl.float32))
    v_absmax_ptr = tl.load(entry + 5).to(tl.pointer_type(tl.float32))
    n = tl.load(entry + 6)
    block = program - tl.load(entry + 7)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    g = tl.load(grad_ptr + i, mask=inside, other=0.0).to(tl.float32)

    m_code = tl.load(m_ptr + i, mask=inside, other=ZERO).to(tl.int32)
    m = tl.load(map_s_ptr + m_code) * tl.load(m_absmax_ptr + block)
    m = m * beta1 + g * new1
    v_code = tl.load(v_ptr + i, mask=inside, other=0).to(tl.int32)
    v = tl.load(map_u_ptr + v_code) * tl.load(v_absmax_ptr + block)
    v = v * beta2 + (g * g) * new2

    move = tl.div_rn(m, tl.sqrt_rn(v) * correct + eps) * rate
    p = tl.load(p_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(p_ptr + i, (p * keep - move).to(P), mask=inside)

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
