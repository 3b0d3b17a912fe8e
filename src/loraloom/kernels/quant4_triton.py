# mypy: allow-untyped-defs
"""The kernels of `quant4`: each bit-equal to its definition there, which also has the equations.

A program takes a tile of R rows and C columns; a flat weight is cut into rows of one tile. Where a row's length is
a multiple of 8 and the bytes are aligned, one element of a tile is a word of 8 weights with one scale, and words are
read and written side by side; otherwise a byte is read for each weight. These kernels are bound by instructions as
soon as a weight takes about 15: so the 16 values lie in shared memory, one in each bank (`tl.gather`), numbers of
elements are 32-bit within a tile, and the scale of a channel joins that of the block, once a word. It is a power of
two, so the result is the same wherever weights are normal numbers.

shapes  as in quant4; a matrix (O, I), tiles (R, C)
units   where a tile begins is int64: a weight may have more than 2^31 elements
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scales8 import BLOCK8, TINY, Scales8, dynamic_map

# Weights a program where rows do not matter; tile sizes and warps are a schedule, no part of the arithmetic.
FLAT, WARPS = 4096, 4
LINE = 1024  # of them in one row at most: few of a row's last tile lie outside
ROWS, COLS, TURNING = 64, 128, 4
EXACT = {"enable_fp_fusion": False}  # map * absmax2 + offset is rounded twice, as in torch
INNER = tl.constexpr(BLOCK8)


def quantize4(
    w_N: Tensor, packed_H: Tensor, absmax_G: Tensor, bounds: Tensor, order: Tensor, block: int
) -> None:
    groups = max(2, FLAT // block)
    args = (w_N.contiguous(), packed_H, absmax_G, bounds, order, len(w_N), len(packed_H), len(absmax_G), TINY)
    grid, fast = (triton.cdiv(len(absmax_G), groups),), w_N.is_cuda
    with torch.cuda.device_of(w_N):
        _quantize4[grid](*args, BLOCK=block, GROUPS=groups, FAST=fast, **EXACT)


def reciprocal(x_N: Tensor) -> Tensor:
    """1 / x as the GPU's own instruction gives it, a last bit beside the nearest now and then; 0 gives infinity."""
    y_N = torch.empty_like(x_N)
    with torch.cuda.device_of(x_N):
        _reciprocal[(triton.cdiv(x_N.numel(), 1024),)](x_N, y_N, x_N.numel(), TILE=1024)
    return y_N


def dequantize4(
    packed_H: Tensor,
    scales: Tensor | Scales8,
    channel: Tensor | None,
    w: Tensor,
    values: Tensor,
    block: int,
) -> None:
    """Write w: flat, or a matrix whose rows lie apart, or over the scale of each row."""
    flat = channel is None and w.is_contiguous()
    cols = w.numel() if flat else w.shape[1]
    source, form = _source(packed_H, scales, values, cols, block)
    wide = FLAT if flat else min(LINE, triton.next_power_of_2(max(cols, 8)))
    rows, cols, stride = (triton.cdiv(cols, wide), wide, wide) if flat else (*w.shape, w.stride(0))
    grid = (triton.cdiv(rows, FLAT // wide), triton.cdiv(cols, wide))
    held = values if channel is None else channel.contiguous()
    form.update(R=FLAT // wide, C=wide, LINEAR=flat, SCALED=channel is not None, num_warps=WARPS)
    with torch.cuda.device_of(w):
        _dequantize4[grid](*source, held, w, rows, cols, w.numel(), stride, **form)


def channel_amax(
    packed_H: Tensor, scales: Tensor | Scales8, values: Tensor, shape: Sequence[int], block: int, dim: int
) -> Tensor:
    source, form = _source(packed_H, scales, values, shape[1], block)
    grid = (triton.cdiv(shape[0], ROWS), triton.cdiv(shape[1], COLS))
    part = torch.empty(grid[1 - dim], shape[dim], dtype=torch.float32, device=packed_H.device)
    with torch.cuda.device_of(part):
        _channel_amax[grid](*source, part, *shape, DIM=dim, R=ROWS, C=COLS, **form)
    return part.amax(0)


def dequantize4_fp8(
    packed_H: Tensor,
    scales: Tensor | Scales8,
    scale: Tensor,
    w8: Tensor,
    values: Tensor,
    block: int,
    transposed: bool,
) -> None:
    if not transposed:
        dequantize4(packed_H, scales, scale, w8, values, block)
        return
    cols, rows = w8.shape
    source, form = _source(packed_H, scales, values, cols, block)
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(cols, COLS))
    form.update(R=ROWS, C=COLS, num_warps=TURNING)
    with torch.cuda.device_of(w8):
        _turn4_fp8[grid](*source, scale.contiguous(), w8, rows, cols, w8.stride(0), **form)


def _source(
    packed_H: Tensor, scales: Tensor | Scales8, values: Tensor, cols: int, block: int
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """What `_weights` reads, and the constants that tell it how. Without double quantisation three go unread."""
    words = cols % 8 == 0 and packed_H.storage_offset() % 4 == 0 and packed_H.data_ptr() % 4 == 0
    packed = packed_H.contiguous().view(torch.int32) if words else packed_H.contiguous()
    form = {"LOG": block.bit_length() - 1, "WORDS": words, "NESTED": isinstance(scales, Scales8), **EXACT}
    if isinstance(scales, Tensor):
        return (packed, values, scales.contiguous(), values, values, values), form
    map_256 = dynamic_map(True, packed_H.device)
    return (packed, values, scales.code_G.contiguous(), scales.absmax_S, map_256, scales.offset), form


@triton.jit
def _quantize4(
    w_ptr,
    packed_ptr,
    absmax_ptr,
    bounds_ptr,
    order_ptr,
    num_weights,
    num_bytes,
    num_groups,
    tiny,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    FAST: tl.constexpr,  # the GPU's own reciprocal, as in bitsandbytes' CUDA kernels: their bits, in 16-bit fp4 too
):
    first = tl.program_id(0).to(tl.int64) * GROUPS
    group = first + tl.arange(0, GROUPS)
    n = group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    w = tl.load(w_ptr + n, mask=n < num_weights, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(w), 1)
    divisor = tl.maximum(absmax, tl.full((GROUPS,), tiny, tl.float32))
    if FAST:
        tl.store(absmax_ptr + group, absmax, mask=group < num_groups)
        unit = tl.where((absmax == 0.0)[:, None], 0.0, w * _inverse(absmax)[:, None])
    else:
        short = (group + 1) * BLOCK > num_weights
        tl.store(absmax_ptr + group, tl.where(short, divisor, absmax), mask=group < num_groups)
        # div_rn: a plain quotient of float32 is not the nearest on a GPU
        quotient = tl.div_rn(w, tl.broadcast_to(divisor[:, None], (GROUPS, BLOCK)))
        unit = tl.where(short[:, None], quotient, w * tl.div_rn(1.0, divisor)[:, None])
        unit = tl.minimum(tl.maximum(unit, -1.0), 1.0)
    rank = tl.zeros((GROUPS, BLOCK), tl.int32)
    for i in tl.static_range(15):
        rank += (unit > tl.load(bounds_ptr + i)).to(tl.int32)
    code = tl.reshape(tl.load(order_ptr + rank), (GROUPS * BLOCK // 2, 2))
    high, low = tl.split(code)
    at = first * (BLOCK // 2) + tl.arange(0, GROUPS * BLOCK // 2)
    tl.store(packed_ptr + at, (high << 4) | low, mask=at < num_bytes)


@triton.jit
def _inverse(x):
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _reciprocal(x_ptr, y_ptr, n, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(y_ptr + i, _inverse(tl.load(x_ptr + i, mask=i < n, other=1.0)), mask=i < n)


@triton.jit
def _places(R: tl.constexpr, C: tl.constexpr, WORDS: tl.constexpr):
    """Rows and columns in a tile, in one line, so that neighbouring lanes read neighbouring bytes."""
    STEP: tl.constexpr = 8 if WORDS else 1  # weights an element
    at = tl.arange(0, R * C // STEP)
    return at // (C // STEP), at % (C // STEP) * STEP


@triton.jit
def _weights(
    packed_ptr,
    values_ptr,
    group_ptr,
    absmax_ptr,
    map_ptr,
    offset_ptr,
    first,
    off,
    inside,
    factor,
    SIZE: tl.constexpr,
    LOG: tl.constexpr,
    WORDS: tl.constexpr,
    NESTED: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Float32 weights at `off` (L,) behind the number `first`, times `factor` (L,): (L, 8) of words, else (L, 1).

    Where `inside` is false, any number. LOG is of the block.
    """
    group = ((first & ((1 << LOG) - 1)).to(tl.int32) + off) >> LOG
    first_group = first >> LOG
    if NESTED:
        code = tl.load(group_ptr + first_group + group, mask=inside, other=0).to(tl.int32)
        outer = ((first_group & (INNER - 1)).to(tl.int32) + group) // INNER
        absmax = tl.load(absmax_ptr + first_group // INNER + outer, mask=inside, other=0.0)
        scale = tl.load(map_ptr + code) * absmax + tl.load(offset_ptr)
    else:
        scale = tl.load(group_ptr + first_group + group, mask=inside, other=0.0)
    if SCALED:
        scale *= factor
    if WORDS:
        word = tl.load(packed_ptr + (first >> 3) + (off >> 3), mask=inside, other=0)
        shift = (tl.arange(0, 8) ^ 1) * 4  # of two codes the first is in the high half
        code = (word[:, None] >> shift[None, :]) & 15
    else:
        n = (first & 1).to(tl.int32) + off
        byte = tl.load(packed_ptr + (first >> 1) + (n >> 1), mask=inside, other=0).to(tl.int32)
        code = ((byte >> ((n & 1) ^ 1) * 4) & 15)[:, None]
    values = tl.load(values_ptr + tl.arange(0, 16))
    w = tl.reshape(tl.gather(values, tl.reshape(code, (SIZE,)), 0), code.shape)
    return w * scale[:, None]


@triton.jit
def _dequantize4(
    packed_ptr,
    values_ptr,
    group_ptr,
    absmax_ptr,
    map_ptr,
    offset_ptr,
    scale_ptr,
    out_ptr,
    num_rows,
    num_cols,
    num_weights,
    stride,
    R: tl.constexpr,
    C: tl.constexpr,
    LOG: tl.constexpr,
    WORDS: tl.constexpr,
    NESTED: tl.constexpr,
    SCALED: tl.constexpr,
    LINEAR: tl.constexpr,  # rows are pieces of a flat weight, the last of them short
):
    """Words are written as they are read, eight weights a lane, and never turned into rows first."""
    first_row = tl.program_id(0).to(tl.int64) * R
    first_col = tl.program_id(1) * C
    first = first_row * num_cols + first_col
    row, col = _places(R, C, WORDS)
    if LINEAR:
        inside = col < tl.minimum(num_weights - first, C).to(tl.int32)
    else:
        inside = (first_row + row < num_rows) & (first_col + col < num_cols)
    factor = 1.0
    if SCALED:
        factor = _inverse_power(tl.load(scale_ptr + first_row + row, mask=inside, other=1.0))
    # fmt: off
    w = _weights(packed_ptr, values_ptr, group_ptr, absmax_ptr, map_ptr, offset_ptr,
                 first, row * num_cols + col, inside, factor, R * C, LOG, WORDS, NESTED, SCALED)
    # fmt: on
    at = (row * stride + col)[:, None] + tl.arange(0, w.shape[1])[None, :]
    out = out_ptr + first_row * stride + first_col
    tl.store(out + at, w.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _inverse_power(scale):
    """1 / scale of powers of two: the exponent's distance from 127 the other way."""
    return (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _channel_amax(
    packed_ptr,
    values_ptr,
    group_ptr,
    absmax_ptr,
    map_ptr,
    offset_ptr,
    part_ptr,
    num_rows,
    num_cols,
    DIM: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    LOG: tl.constexpr,
    WORDS: tl.constexpr,
    NESTED: tl.constexpr,
):
    """One row of parts for each tile across the channels; a maximum does not depend on the order."""
    first_row = tl.program_id(0).to(tl.int64) * R
    first_col = tl.program_id(1).to(tl.int64) * C
    row, col = _places(R, C, WORDS)
    inside = (first_row + row < num_rows) & (first_col + col < num_cols)
    # fmt: off
    w = _weights(packed_ptr, values_ptr, group_ptr, absmax_ptr, map_ptr, offset_ptr,
                 first_row * num_cols + first_col, row * num_cols + col, inside, 1.0,
                 R * C, LOG, WORDS, NESTED, False)
    # fmt: on
    row, col = first_row + tl.arange(0, R), first_col + tl.arange(0, C)
    w = tl.reshape(w, (R, C))
    w = tl.where((row < num_rows)[:, None] & (col < num_cols)[None, :], tl.abs(w), 0.0)
    if DIM == 0:
        tl.store(part_ptr + tl.program_id(1) * num_rows + row, tl.max(w, 1), mask=row < num_rows)
    else:
        tl.store(part_ptr + tl.program_id(0) * num_cols + col, tl.max(w, 0), mask=col < num_cols)


@triton.jit
def _turn4_fp8(
    packed_ptr,
    values_ptr,
    group_ptr,
    absmax_ptr,
    map_ptr,
    offset_ptr,
    scale_ptr,
    out_ptr,
    num_rows,
    num_cols,
    stride,
    R: tl.constexpr,
    C: tl.constexpr,
    LOG: tl.constexpr,
    WORDS: tl.constexpr,
    NESTED: tl.constexpr,
):
    """The transpose: turned in one byte a weight, so that whole rows of the result are written."""
    first_row = tl.program_id(0).to(tl.int64) * R
    first_col = tl.program_id(1) * C
    row, col = _places(R, C, WORDS)
    inside = (first_row + row < num_rows) & (first_col + col < num_cols)
    # fmt: off
    w = _weights(packed_ptr, values_ptr, group_ptr, absmax_ptr, map_ptr, offset_ptr,
                 first_row * num_cols + first_col, row * num_cols + col, inside, 1.0,
                 R * C, LOG, WORDS, NESTED, False)
    # fmt: on
    row, col = tl.arange(0, R), tl.arange(0, C)
    live_col = first_col + col < num_cols
    inverse = _inverse_power(tl.load(scale_ptr + first_col + col, mask=live_col, other=1.0))
    w = (tl.reshape(w, (R, C)) * inverse[None, :]).to(out_ptr.dtype.element_ty)
    at = col[:, None] * stride + row[None, :]
    out = out_ptr + first_col.to(tl.int64) * stride + first_row
    tl.store(out + at, tl.trans(w), mask=live_col[:, None] & (first_row + row < num_rows)[None, :])


def cases(device: torch.device | str) -> Iterator[tuple[Tensor, str, int, bool]]:
    """Matrices (O, I), and table, block and double quantisation: what the twin test runs.

    One weight, odd and ragged ends, several tiles each way, rows that start inside a byte or a block, zeros.
    """
    shapes = [(1, 1), (1, 7), (3, 21), (5, 64), (70, 136), (129, 263), (2, 4160), (131, 256)]
    formats = [("nf4", 64), ("fp4", 32), ("e2m1", 128), ("nf4", 4096)]
    generator = torch.Generator(device).manual_seed(0)
    for number, shape in enumerate(shapes):
        for at, (name, block) in enumerate(formats):
            w_OI = torch.randn(shape, device=device, generator=generator) * 0.02
            w_OI.view(-1)[block : 2 * block] = 0.0
            yield w_OI, name, block, (number + at) % 2 == 0
