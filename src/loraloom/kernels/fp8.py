"""Products of rows kept in 8-bit floats, e4m3: activations by token, frozen weights by channel.

    scale[t] = max_k |x[t, k]| / 448          codes[t, k] = e4m3(x[t, k] * (1 / scale[t])), cut off at 448
    y[t, n] = (sum_k codes[t, k] w8[n, k]) * scale[t] * w_scale[n]

A row of zeros, or of next to nothing, has the scale 1. Quotients are correctly rounded in float32 and taken once a
row; each element is multiplied by the reciprocal. So the kernel and the definition agree bit for bit. A weight's
scales are powers of two: W and W^T then hold the same numbers, but for those that underflow (below 2^-14 of a
channel's largest digits are lost, below 2^-18 all of them).

shapes  x (T, K), w8 (N, K), y (T, N); K and N multiples of 16 on a GPU
units   scales in units of x and of the weights, float32
raises  ValueError if shapes, strides or dtypes do not fit
source  OCP 8-bit floating point specification 1.0 (e4m3: 448 is the largest, no infinity)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .scales8 import TINY
from .twin import twin

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
MULTIPLE = 16  # what the GPU's instructions take of K and N
OVER = 0x800000 - 0x600001  # carries into the exponent what lies above 1.75
LEAST = (8, 9)  # compute capability with 8-bit products; 9.0 is what is tested
WIDEST = 2**16  # of a row to quantise: it stays in one program's registers


@dataclass(frozen=True)
class Rows8:
    """A matrix in 8-bit floats with one scale a row.

    shapes  codes (T, K) float8_e4m3fn, contiguous; scale (T,) float32
    """

    codes: Tensor
    scale: Tensor

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers."""
        return (self.codes.float() * self.scale[:, None]).to(dtype)


def fp8_reason(device: torch.device) -> str | None:
    """Why a device has no 8-bit products, in words; None if it has them."""
    if device.type == "cpu":
        return "a CPU computes them no faster"
    if device.type != "cuda" or torch.version.hip is not None:
        return "they need an NVIDIA GPU"
    held = torch.cuda.get_device_capability(device)
    if held < LEAST:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {held[0]}.{held[1]}; 8.9 is needed (Ada, Hopper)"
    return None


def width_reason(*widths: int) -> str | None:
    """Why matrices of these widths have no 8-bit products; None if they have."""
    odd = [width for width in widths if width % MULTIPLE]
    return f"{odd[0]:,} is no multiple of {MULTIPLE}" if odd else None


def power_of_two(amax: Tensor) -> Tensor:
    """The least power of two, float32, that amax / 448 does not exceed; 1 where it would be no normal number.

    In whole numbers, on the bits: 448 is 1.75 * 2^8, so the exponent is amax's less 8, one more above 1.75.
    """
    exponent = ((amax.float().view(torch.int32) + OVER) >> 23) - 8
    return torch.where(exponent < 1, 127, exponent).bitwise_left_shift(23).view(torch.float32)


def quantize_rows(x_TK: Tensor, *, power: bool = False) -> Rows8:
    """A matrix of any strides in 8-bit floats, each row by its own largest magnitude.

    power  scales are powers of two, as a weight's are
    """
    if x_TK.dim() != 2 or not x_TK.is_floating_point() or not 0 < x_TK.shape[1] <= WIDEST:
        raise ValueError(
            f"rows of 1 to {WIDEST:,} numbers are quantised, not {list(x_TK.shape)} of {x_TK.dtype}"
        )
    codes = torch.empty(x_TK.shape, dtype=E4M3, device=x_TK.device)
    scale = torch.empty(len(x_TK), dtype=torch.float32, device=x_TK.device)
    if not x_TK.is_meta and len(x_TK):
        _quantize_rows(x_TK, codes, scale, power=power)
    return Rows8(codes, scale)


def _quantize_rows_reference(x_TK: Tensor, codes: Tensor, scale: Tensor, *, power: bool) -> None:
    x = x_TK.float()
    amax = x.abs().amax(1)
    quotient = amax / torch.full_like(amax, E4M3_MAX)  # a GPU would multiply by a number's reciprocal
    plain = torch.where(quotient < TINY, 1.0, quotient)  # below it the reciprocal would not be finite
    scale.copy_(power_of_two(amax) if power else plain)
    codes.copy_((x * (1.0 / scale)[:, None]).clamp_(-E4M3_MAX, E4M3_MAX))


@twin(_quantize_rows_reference)
def _quantize_rows(x_TK: Tensor, codes: Tensor, scale: Tensor, *, power: bool) -> None:
    from . import fp8_triton

    fp8_triton.quantize_rows(x_TK, codes, scale, power)


def turn8(w8_NK: Tensor, scale_N: Tensor, scale_K: Tensor, out: Tensor | None = None) -> Tensor:
    """The transpose (K, N) of a weight's codes, over the input channels' scales in place of the output channels'.

    Both are powers of two: nothing is rounded but what underflows.

    out  a flat buffer with room for it, or a matrix (K, N) with whole rows, such as some columns of a wider one
    """
    turned = _room8(w8_NK, out)
    if not turned.is_meta:
        _turn8(w8_NK, scale_N, scale_K, turned)
    return turned


def _room8(w8_NK: Tensor, out: Tensor | None) -> Tensor:
    n, k = w8_NK.shape
    if out is None:
        return torch.empty(k, n, dtype=E4M3, device=w8_NK.device)
    if out.dtype == E4M3 and out.device == w8_NK.device:
        if out.dim() == 1 and out.is_contiguous() and out.numel() >= n * k:
            return out[: n * k].view(k, n)
        if out.shape == (k, n) and out.stride(1) == 1:
            return out
    raise ValueError(f"`out` has no room for [{k}, {n}] of {E4M3}: it is {list(out.shape)} of {out.dtype}")


def _turn8_reference(w8_NK: Tensor, scale_N: Tensor, scale_K: Tensor, out: Tensor) -> None:
    w = w8_NK.float().mul_(scale_N[:, None]).mul_(1.0 / scale_K)
    out.copy_(w.T)


@twin(_turn8_reference)
def _turn8(w8_NK: Tensor, scale_N: Tensor, scale_K: Tensor, out: Tensor) -> None:
    from . import fp8_triton

    fp8_triton.turn8(w8_NK, scale_N, scale_K, out)


def matmul8(
    x: Rows8, w8_NK: Tensor, w_scale_N: Tensor, out_dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """y (T, N) = x w^T in `out_dtype`; in `out`, contiguous, if it is given.

    On a GPU sums are kept in the instruction's own precision (fast accumulation), elsewhere in float32.
    """
    tokens, outputs = len(x.codes), len(w8_NK)
    check8(x, w8_NK, w_scale_N)
    if out is None:
        out = torch.empty(tokens, outputs, dtype=out_dtype, device=w8_NK.device)
    elif out.shape != (tokens, outputs) or out.dtype != out_dtype or not out.is_contiguous():
        raise ValueError(
            f"`out` must be contiguous, [{tokens}, {outputs}] of {out_dtype}; it is {list(out.shape)} of {out.dtype}"
        )
    if out.is_meta or not tokens:
        return out
    if not out.is_cuda:
        return matmul8_reference(x, w8_NK, w_scale_N, out)
    if (odd := width_reason(*w8_NK.shape)) is not None:
        raise ValueError(f"a GPU's 8-bit product takes a weight of {list(w8_NK.shape)} not: {odd}")
    if out_dtype == torch.bfloat16:  # the one dtype that row-wise scales come with everywhere
        torch._scaled_mm(
            x.codes,
            w8_NK.t(),
            scale_a=x.scale[:, None],
            scale_b=w_scale_N[None, :],
            out_dtype=out_dtype,
            use_fast_accum=True,
            out=out,
        )
        return out
    one = torch.ones((), dtype=torch.float32, device=out.device)
    y = torch._scaled_mm(
        x.codes, w8_NK.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True
    )
    return out.copy_(y.mul_(x.scale[:, None]).mul_(w_scale_N))


def matmul8_reference(x: Rows8, w8_NK: Tensor, w_scale_N: Tensor, out: Tensor) -> Tensor:
    """The definition, summed in float32."""
    y = x.codes.float() @ w8_NK.float().T
    return out.copy_(y.mul_(x.scale[:, None]).mul_(w_scale_N))


def check8(x: Rows8, w8_NK: Tensor, w_scale_N: Tensor) -> None:
    """raises  ValueError if the operands of a product do not fit"""
    same = w8_NK.dim() == 2 and x.codes.shape[1] == w8_NK.shape[1] and w_scale_N.shape == (len(w8_NK),)
    dtypes = (x.codes.dtype, w8_NK.dtype, w_scale_N.dtype) == (E4M3, E4M3, torch.float32)
    if not (same and dtypes and x.codes.is_contiguous() and w8_NK.is_contiguous()):
        raise ValueError(
            f"rows {list(x.codes.shape)} of {x.codes.dtype} and a weight {list(w8_NK.shape)} of {w8_NK.dtype} with "
            f"{list(w_scale_N.shape)} scales of {w_scale_N.dtype} have no product in 8 bits: both are contiguous "
            f"and {E4M3}, with as many columns and a float32 scale a row"
        )
