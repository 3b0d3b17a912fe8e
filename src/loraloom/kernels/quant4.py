"""Weights in 4 bits by blocks, one float32 scale each:

    quantise     code[i] = nearest(table, w[i] / absmax[i // block])       absmax = max |w| over the block
    dequantise   w[i] = table[code[i]] * absmax[i // block]
    to fp8       w8[o, i] = e4m3(w[o, i] * (1 / scale)),    scale = 2^ceil(log2(amax |w| / 448)) of a channel

Two codes share a byte, the first in its high half. Products are taken in float32 and rounded once to the
dtype asked for, in both twins, so they agree bit for bit. A tie goes to the lower value. Scales of fp8 are powers of
two: over output channels or over input channels, the same numbers come out, but for those that underflow.

shapes  N weights in row-major order, H = ceil(N / 2) bytes, G = ceil(N / block) scales; fp8 takes (O, I)
units   scales in weight units, float32, or double-quantised (`Scales8`)
raises  ValueError if buffers and shape do not fit, the table or block is unknown, or weights are not finite
source  QLoRA, arXiv:2305.14314, section 3; the layout is bitsandbytes'; e2m1 is the OCP MX format's element

Where bitsandbytes' own paths differ, so do ours, device by device, so that a model quantised on either gets the same
bits from both: on a CPU thresholds are the float32 midpoints of the table and a short last block is divided; on a GPU
the thresholds are `CUDA_BOUNDS` and every block is multiplied by the GPU's own reciprocal, which the definition cannot
take: a weight that stands on a threshold to the last bit may get the neighbouring code. A weight that rounds to zero
keeps its sign in the fp4 code, as in CUDA; on a CPU bitsandbytes gives code 0 to the negative, 8 to the positive.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from .fp8 import E4M3, E4M3_MAX, power_of_two
from .scales8 import BLOCK8, unit_blocks
from .scales8 import Scales8 as Scales8
from .scales8 import dequantize_scales as dequantize_scales
from .scales8 import quantize_scales as quantize_scales
from .twin import twin

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TABLES = ("nf4", "fp4", "e2m1")
CHUNK = 2**18  # weights at a time on a CPU: what is in between stays in its cache
Scales = Tensor | Scales8  # one float32 a block, or the same in 8 bits

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # of 12; the code's fourth bit is the sign
BELOW_ZERO = -torch.finfo(torch.float32).tiny  # what rounds to zero keeps its sign
# Digits of bitsandbytes' CUDA kernels, which lie up to 1e-6 beside the midpoints.
CUDA_BOUNDS = {
    "nf4": (
        *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544),
        *(-0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767),
        *(0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683),
        *(0.5016634166240692, 0.6427869200706482, 0.8614784181118011),
    ),
    "fp4": (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333),
}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of 6; likewise


def table(name: str, device: torch.device | str = "cpu") -> Tensor:
    """The value of each of the 16 codes, float32; the same tensor at each call."""
    return _table(name, torch.device(device))


@cache
def _table(name: str, device: torch.device) -> Tensor:
    if name == "nf4":
        return torch.tensor(NF4, dtype=torch.float32, device=device)
    if name not in TABLES:
        raise ValueError(f"there is no 4-bit table {name!r}: it can be {', '.join(TABLES)}")
    magnitudes = torch.tensor(FP4 if name == "fp4" else E2M1, dtype=torch.float32, device="cpu")
    magnitudes /= magnitudes.max()
    return torch.cat([magnitudes, -magnitudes]).to(device)


def ascending(name: str) -> list[int]:
    """The codes in the order of their values, -0 before 0."""
    values = table(name).tolist()
    return sorted(range(16), key=lambda code: (values[code], math.copysign(1, values[code])))


@cache
def _order(name: str, device: torch.device) -> Tensor:
    return torch.tensor(ascending(name), dtype=torch.uint8, device=device)


def thresholds(name: str, device: torch.device | str = "cpu") -> Tensor:
    """The 15 values above which the next code in ascending order is nearer, float32."""
    return _thresholds(name, torch.device(device))


@cache
def _thresholds(name: str, device: torch.device) -> Tensor:
    if device.type == "cuda" and name in CUDA_BOUNDS:
        bounds = torch.tensor(CUDA_BOUNDS[name], dtype=torch.float32, device="cpu")
        if name == "fp4":  # of |x|: a tie goes to the smaller magnitude, which below zero is the upper code
            minus = torch.nextafter(-bounds.flip(0), torch.tensor(-torch.inf, device="cpu"))
            bounds = torch.cat([minus, minus.new_tensor([BELOW_ZERO]), bounds])
        return bounds.to(device)
    value = table(name)[torch.tensor(ascending(name), device="cpu")]
    middle = (value[:-1] + value[1:]) / 2
    middle = torch.where(value[:-1] == value[1:], BELOW_ZERO, middle)
    return middle.to(device)


@cache
def _pairs(name: str, device: torch.device) -> Tensor:
    """For each byte its two values, as one 64-bit number: one look-up serves two weights."""
    value = table(name)
    pairs = torch.stack([value.repeat_interleave(16), value.repeat(16)], dim=1)
    return pairs.view(torch.int64).view(-1).to(device)


def quantize4(w: Tensor, *, table: str, block: int = 64) -> tuple[Tensor, Tensor]:
    """(packed_H uint8, absmax_G float32) of a weight of any shape and floating dtype.

    raises  ValueError naming how many weights are not finite
    """
    check_format(table, block)
    n = w.numel()
    if not w.is_floating_point() or n == 0:
        raise ValueError(f"{list(w.shape)} of {w.dtype} cannot be coded: floating numbers can")
    packed_H = torch.empty(-(-n // 2), dtype=torch.uint8, device=w.device)
    absmax_G = torch.empty(-(-n // block), dtype=torch.float32, device=w.device)
    if not w.is_meta:
        w_N = w.detach().reshape(-1)
        w_N = w_N.float() if w_N.dtype.itemsize in (1, 8) else w_N
        if not torch.stack(torch.aminmax(w_N)).isfinite().all():
            raise ValueError(f"{int((~w_N.isfinite()).sum()):,} of {n:,} weights are not finite")
        _quantize4(w_N, packed_H, absmax_G, table=table, block=block)
    return packed_H, absmax_G


def _quantize4_reference(w_N: Tensor, packed_H: Tensor, absmax_G: Tensor, *, table: str, block: int) -> None:
    bounds = thresholds(table).tolist()
    order = _order(table, w_N.device)
    for start, stop in _chunks(len(w_N)):
        unit, absmax = unit_blocks(w_N[start:stop].float(), block)
        absmax_G[start // block : -(-stop // block)] = absmax
        unit = torch.cat([unit, unit.new_zeros(1)]) if len(unit) % 2 else unit
        rank = torch.zeros_like(unit, dtype=torch.uint8)
        for bound in bounds:  # fifteen sweeps take less than half the time of torch.bucketize
            rank += (unit > bound).view(torch.uint8)
        code = order.index_select(0, rank.int())
        packed_H[start // 2 : (stop + 1) // 2] = (code[::2] << 4) | code[1::2]


@twin(_quantize4_reference)
def _quantize4(w_N: Tensor, packed_H: Tensor, absmax_G: Tensor, *, table: str, block: int) -> None:
    from . import quant4_triton

    bounds, order = _thresholds(table, w_N.device), _order(table, w_N.device)
    quant4_triton.quantize4(w_N, packed_H, absmax_G, bounds, order, block)


def dequantize4(
    packed_H: Tensor,
    scales: Scales,
    *,
    table: str,
    shape: Sequence[int],
    block: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The weights in `shape` and `dtype` (float32, bfloat16 or float16).

    out  a flat buffer of that dtype with room for them, of which the result is a view; or a matrix of that shape
         with whole rows, such as some columns of a wider one
    """
    check4(packed_H, scales, table=table, shape=shape, block=block)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"weights come out in float32, bfloat16 or float16, not in {dtype}")
    w = _room(packed_H, shape, dtype, out)
    if not packed_H.is_meta:
        _dequantize4(packed_H, scales, w, table=table, block=block)
    return w


def _dequantize4_reference(packed_H: Tensor, scales: Scales, w: Tensor, *, table: str, block: int) -> None:
    w_N = w.view(-1) if w.is_contiguous() else w.new_empty(w.numel())
    pairs = _pairs(table, packed_H.device)
    absmax_G = scales if isinstance(scales, Tensor) else dequantize_scales(scales)
    for start, stop in _chunks(len(w_N)):
        pair = pairs.index_select(0, packed_H[start // 2 : (stop + 1) // 2].int())
        part, whole = pair.view(torch.float32)[: stop - start], (stop - start) // block * block
        absmax = absmax_G[start // block : -(-stop // block)]
        part[:whole].view(-1, block).mul_(absmax[: whole // block, None])
        part[whole:].mul_(absmax[whole // block :])  # a short last block: one scale, or none
        w_N[start:stop] = part
    if not w.is_contiguous():
        w.copy_(w_N.view(w.shape))


@twin(_dequantize4_reference)
def _dequantize4(packed_H: Tensor, scales: Scales, w: Tensor, *, table: str, block: int) -> None:
    from . import quant4_triton

    quant4_triton.dequantize4(packed_H, scales, None, w, _table(table, w.device), block)


def channel_scale(
    packed_H: Tensor, scales: Scales, *, table: str, shape: Sequence[int], block: int, dim: int
) -> Tensor:
    """The least power of two that brings each output channel (dim 0: (O,)) or input channel (dim 1: (I,)) within 448.

    1 where all weights are zero, or so small that the reciprocal would not be finite: they come out as zeros.
    """
    if len(shape) != 2 or dim not in (0, 1):
        raise ValueError(f"a matrix has channels along 0 and 1, asked was {dim} of {list(shape)}")
    check4(packed_H, scales, table=table, shape=shape, block=block)
    if packed_H.is_meta:
        return packed_H.new_empty(shape[dim], dtype=torch.float32)
    amax = _channel_amax(packed_H, scales, table=table, shape=shape, block=block, dim=dim)
    return power_of_two(amax)


def _channel_amax_reference(
    packed_H: Tensor, scales: Scales, *, table: str, shape: Sequence[int], block: int, dim: int
) -> Tensor:
    w_N = torch.empty(math.prod(shape), dtype=torch.float32, device=packed_H.device)
    _dequantize4_reference(packed_H, scales, w_N, table=table, block=block)
    return w_N.view(*shape).abs_().amax(1 - dim)


@twin(_channel_amax_reference)
def _channel_amax(
    packed_H: Tensor, scales: Scales, *, table: str, shape: Sequence[int], block: int, dim: int
) -> Tensor:
    from . import quant4_triton

    return quant4_triton.channel_amax(packed_H, scales, _table(table, packed_H.device), shape, block, dim)


def dequantize4_fp8(
    packed_H: Tensor,
    scales: Scales,
    scale: Tensor,
    *,
    table: str,
    shape: Sequence[int],
    block: int,
    transposed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """A matrix (O, I) over its channels' scale, in float8_e4m3fn; transposed, (I, O).

    scale  of `channel_scale`: (O,) of the output channels; transposed, (I,) of the input channels
    out    as in `dequantize4`; transposed, three weights of one input side by side are three blocks of columns
    """
    check4(packed_H, scales, table=table, shape=shape, block=block)
    if len(shape) != 2 or scale.shape != (shape[transposed],) or scale.dtype != torch.float32:
        got = f"{list(scale.shape)} scales of {scale.dtype}"
        raise ValueError(f"{got} for {list(shape)}, transposed: {transposed}")
    w8 = _room(packed_H, shape[::-1] if transposed else shape, E4M3, out)
    if not packed_H.is_meta:
        _dequantize4_fp8(packed_H, scales, scale, w8, table=table, block=block, transposed=transposed)
    return w8


def _dequantize4_fp8_reference(
    packed_H: Tensor, scales: Scales, scale: Tensor, w8: Tensor, *, table: str, block: int, transposed: bool
) -> None:
    w_N = torch.empty(w8.numel(), dtype=torch.float32, device=w8.device)
    _dequantize4_reference(packed_H, scales, w_N, table=table, block=block)
    w = w_N.view(*reversed(w8.shape)).T if transposed else w_N.view(*w8.shape)
    w8.copy_((w * (1.0 / scale)[:, None]).clamp_(-E4M3_MAX, E4M3_MAX))


@twin(_dequantize4_fp8_reference)
def _dequantize4_fp8(
    packed_H: Tensor, scales: Scales, scale: Tensor, w8: Tensor, *, table: str, block: int, transposed: bool
) -> None:
    from . import quant4_triton

    values = _table(table, w8.device)
    quant4_triton.dequantize4_fp8(packed_H, scales, scale, w8, values, block, transposed)


def check_format(table: str, block: int) -> None:
    """raises  ValueError for a table or block that there is not"""
    if table not in TABLES or block not in BLOCKS:
        raise ValueError(
            f"there is no 4-bit format {table!r} in blocks of {block}: tables are {', '.join(TABLES)}, "
            f"blocks {', '.join(map(str, BLOCKS))}"
        )


def check4(packed_H: Tensor, scales: Scales, *, table: str, shape: Sequence[int], block: int) -> None:
    """raises  ValueError if the buffers are not those of weights in this shape"""
    check_format(table, block)
    n = math.prod(shape)
    need = (-(-n // 2), -(-n // block), -(-n // (block * BLOCK8)))
    held = (scales,) if isinstance(scales, Tensor) else (scales.code_G, scales.absmax_S)
    dtypes = {1: (torch.float32,), 2: (torch.uint8, torch.float32)}[len(held)]
    parts = [(part.dtype, tuple(part.shape)) for part in (packed_H, *held)]
    if n == 0 or parts != [(dtype, (k,)) for dtype, k in zip((torch.uint8, *dtypes), need)]:
        got = ", ".join(f"{dtype} {list(size)}" for dtype, size in parts)
        raise ValueError(
            f"{n:,} weights in blocks of {block} need {need[0]:,} bytes and {need[1]:,} scales in float32, "
            f"or in 8 bits with {need[2]:,} in float32; got {got}"
        )


def _room(packed_H: Tensor, shape: Sequence[int], dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """A tensor to write: a new one, the beginning of the flat buffer `out`, or `out` itself."""
    n = math.prod(shape)
    if out is None:
        return torch.empty(tuple(shape), dtype=dtype, device=packed_H.device)
    if out.dtype == dtype and out.device == packed_H.device:
        if out.dim() == 1 and out.is_contiguous() and out.numel() >= n:
            return out[:n].view(*shape)
        if out.dim() == 2 and out.shape == tuple(shape) and out.stride(1) == 1:
            return out
    raise ValueError(
        f"`out` must be flat, with room for {n:,} of {dtype} on {packed_H.device}, or {list(shape)} with whole rows; "
        f"it is {list(out.shape)} of {out.dtype} on {out.device}"
    )


def _chunks(n: int) -> Iterator[tuple[int, int]]:
    return pairwise([*range(0, n, CHUNK), n])
