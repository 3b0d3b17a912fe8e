"""Numbers in 8 bits by blocks, on the dynamic map; the scales of 4-bit blocks kept so (double quantisation).

    offset = mean(absmax)      code = nearest(map, (absmax - offset) / absmax2)
    absmax ~ map[code] * absmax2 + offset

The map has few steps near 1 and many near 0: seven decades, each with twice the entries of the one below.
Products and sums are rounded one by one in float32.

shapes  G scales; S = ceil(G / 256) blocks of them
units   absmax2 and offset in the units of what is coded; a map's entries lie in [-1, 1]
raises  ValueError if a tensor to code is empty
source  QLoRA, arXiv:2305.14314, section 3; the map is that of arXiv:1511.04561 as bitsandbytes builds it

Where bitsandbytes' own paths differ, this is its CUDA rule, the nearest entry (a tie goes down). The CPU library of
0.50 looks values up in 65,536 equal bins instead, which changes about one code in 700. A block of
zeros is coded as the map's zero; bitsandbytes gives code 0 there, which stands for the same number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .twin import path_of

BLOCK8 = 256  # scales that share an absmax2
TINY = 1e-38  # the least divisor, so that a block of zeros has a reciprocal


@dataclass(frozen=True)
class Scales8:
    """Double-quantised scales, equal to bitsandbytes' nested state.

    shapes  code_G (G,) uint8; absmax_S (S,) float32; offset () float32
    """

    code_G: Tensor
    absmax_S: Tensor
    offset: Tensor

    @property
    def groups(self) -> int:
        return self.code_G.numel()


def dynamic_map(signed: bool = True, device: torch.device | str = "cpu") -> Tensor:
    """The 256 entries of the dynamic 8-bit map, ascending, float32; the same tensor at each call."""
    return _dynamic_map(signed, torch.device(device))


@cache
def _dynamic_map(signed: bool, device: torch.device) -> Tensor:
    entries = [0.0, 1.0]
    for decade in range(7):
        steps = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32, device="cpu")
        middles = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        entries += middles.tolist() + ((-middles).tolist() if signed else [])
    return torch.tensor(sorted(entries), dtype=torch.float32, device=device)


def midpoints(map_256: Tensor) -> Tensor:
    """Where a value passes from one entry of a sorted map to the next."""
    return (map_256[:-1] + map_256[1:]) / 2


def unit_blocks(x_N: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Float32 values by their block's largest magnitude, in [-1, 1], and those magnitudes (G,).

    Full blocks are multiplied by the reciprocal; a short last one is divided, as bitsandbytes does on a CPU.
    """
    if x_N.is_cuda and path_of(x_N.device)[0] == "triton":
        return _unit_blocks_on_gpu(x_N, block)
    whole = x_N.numel() // block * block
    x_GB = x_N[:whole].view(-1, block)
    absmax_G = x_GB.abs().amax(1)
    unit_N = (x_GB * (1.0 / absmax_G.clamp(min=TINY))[:, None]).clamp_(-1, 1).view(-1)
    if whole == x_N.numel():
        return unit_N, absmax_G
    last = x_N[whole:].abs().amax().clamp(min=TINY)
    short = (x_N[whole:] / last).clamp_(-1, 1)
    return torch.cat([unit_N, short]), torch.cat([absmax_G, last[None]])


def _unit_blocks_on_gpu(x_N: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The same with the GPU's own reciprocal, for the short block too: what bitsandbytes' CUDA kernels compute."""
    from .quant4_triton import reciprocal

    groups = -(-x_N.numel() // block)
    x_GB = torch.zeros(groups * block, device=x_N.device)
    x_GB[: x_N.numel()] = x_N
    x_GB = x_GB.view(groups, block)
    absmax_G = x_GB.abs().amax(1)
    unit_GB = torch.where(absmax_G[:, None] == 0, 0.0, x_GB * reciprocal(absmax_G)[:, None])
    return unit_GB.view(-1)[: x_N.numel()], absmax_G


def quantize8(x_N: Tensor, map_256: Tensor, block: int = BLOCK8) -> tuple[Tensor, Tensor]:
    """The nearest entry's number for each value, uint8, and the magnitudes of the blocks, float32."""
    if x_N.numel() == 0:
        raise ValueError("there is nothing to code")
    unit_N, absmax_S = unit_blocks(x_N.float().contiguous().view(-1), block)
    return torch.bucketize(unit_N, midpoints(map_256), out_int32=True).to(torch.uint8), absmax_S


def dequantize8(code_N: Tensor, absmax_S: Tensor, map_256: Tensor, block: int = BLOCK8) -> Tensor:
    """What `quantize8` coded, float32."""
    x_N = map_256.index_select(0, code_N.int())
    whole = code_N.numel() // block * block
    x_N[:whole].view(-1, block).mul_(absmax_S[: whole // block, None])
    x_N[whole:].mul_(absmax_S[whole // block :])  # one scale, or none
    return x_N


def quantize_scales(absmax_G: Tensor) -> Scales8:
    """The scales of 4-bit blocks in 8 bits: 8.125 bits a block instead of 32."""
    if absmax_G.is_meta:
        blocks = -(-absmax_G.numel() // BLOCK8)
        code_G, absmax_S = torch.empty_like(absmax_G, dtype=torch.uint8), absmax_G.new_empty(blocks)
        return Scales8(code_G, absmax_S, absmax_G.new_empty(()))
    offset = absmax_G.mean()  # the sum's order is torch's, on each device its own
    code_G, absmax_S = quantize8(absmax_G - offset, dynamic_map(True, absmax_G.device))
    return Scales8(code_G, absmax_S, offset)


def dequantize_scales(scales: Scales8) -> Tensor:
    """The scales (G,) float32."""
    if scales.code_G.is_meta:
        return torch.empty_like(scales.code_G, dtype=torch.float32)
    wide_G = dequantize8(scales.code_G, scales.absmax_S, dynamic_map(True, scales.code_G.device))
    return wide_G.add_(scales.offset)


def dequantize_part(scales: Scales8, first: int, last: int) -> Tensor:
    """Scales `first` up to, but not, `last`, float32: their own blocks alone are touched."""
    low, high = first // BLOCK8, -(-last // BLOCK8)
    codes = scales.code_G[low * BLOCK8 : high * BLOCK8]
    part = dequantize_scales(Scales8(codes, scales.absmax_S[low:high], scales.offset))
    return part[first - low * BLOCK8 : last - low * BLOCK8]
