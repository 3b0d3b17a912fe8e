"""What a Llama-like decoder layer does between its matrix products, each pass over memory once.

    add_norm     x' = x + y;  n = x' rstd w, as it is and in 8 bits
    norm_grad    dx = rstd (g - x^ mean(g x^)) + dres,  g = dn w;  n again
    swiglu       g, u = halves of gu + z B^T;  h = act(g) u
    swiglu_grad  dh + dz A  ->  d(gu), over gu;  dB = d(gu)^T z, dA = dz^T h;  h again, over dh
    rope         q, k of qkv + z B^T turned by their positions;  rope_grad turns the gradients back
    add_low      x + y + z B^T

Low-rank parts of the wide tensors (gate, up; q, k, v) are added here, where the numbers pass through registers
anyway: one read and one write of each less. So are the gradients of their pairs, where a pass sees what they are
made of. Sums are float32; the definitions keep float64 for float64.

shapes  T tokens; K a layer's width; F the MLP's; z, dz (T, R); A (R, in), B (out, R) with the scale inside
source  LoRA, arXiv:2106.09685, equation 3; RMSNorm, arXiv:1910.07467; RoPE, arXiv:2104.09864; SwiGLU, arXiv:2002.05202
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .fp8 import Rows8, quantize_rows
from .products import mm32
from .twin import twin

Act = Literal["silu", "gelu_tanh"]
Pair = tuple[Tensor, Tensor]  # a thin factor (T, R) and the matrix that it is multiplied with
FUSED_RANKS = (16, 32, 64)  # widths that kernels take; others are multiplied apart
WIDEST = 2**14  # of a row that a norm's kernel holds in registers


@dataclass(frozen=True)
class Shown:
    """A tensor as it is, in 8 bits, or both."""

    dense: Tensor | None = None
    codes: Rows8 | None = None


@dataclass(frozen=True)
class Normed:
    x: Tensor  # the residual stream
    rstd: Tensor  # (T,) float32
    n: Shown


def precise(x: Tensor) -> torch.dtype:
    """The dtype that sums are taken in."""
    return torch.promote_types(x.dtype, torch.float32)


def room8(x: Tensor, wanted: bool) -> Rows8 | None:
    """Room for x in 8 bits."""
    if not wanted:
        return None
    scale = x.new_empty(x.shape[0], dtype=torch.float32)
    return Rows8(torch.empty_like(x, dtype=torch.float8_e4m3fn), scale)


def shown(x: Tensor, quantize: bool, keep: bool = True) -> Shown:
    """A tensor in the forms that are wanted."""
    return Shown(x if keep or not quantize else None, quantize_rows(x) if quantize else None)


def added(x: Tensor, low: Pair | None, *, turned: bool = False) -> Tensor:
    """x + z b^T (z a where turned), in the dtype of sums."""
    wide = x.to(precise(x))
    if low is None:
        return wide
    z, m = (part.to(wide.dtype) for part in low)
    return wide + z @ (m if turned else m.T)


def write8(value: Tensor, codes: Rows8 | None) -> None:
    if codes is not None:
        made = quantize_rows(value)
        codes.codes.copy_(made.codes)
        codes.scale.copy_(made.scale)


# ---- the residual stream and its norm -------------------------------------------------------------------------


def add_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    y: Tensor | None = None,
    quantize: bool = False,
    keep: bool = True,
) -> Normed:
    """The residual stream after an addition, and its norm in the forms that are wanted.

    weight  (K,) of the norm, as it multiplies
    """
    total = x if y is None else torch.empty_like(x)
    rstd = x.new_empty(x.shape[0], dtype=precise(x))
    n = torch.empty_like(x) if keep or not quantize else None
    codes = room8(x, quantize)
    if not x.is_meta:
        _add_norm(x, y, weight, eps, total, rstd, n, codes)
    return Normed(total, rstd, Shown(n, codes))


def _add_norm_reference(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    eps: float,
    total: Tensor,
    rstd: Tensor,
    n: Tensor | None,
    codes: Rows8 | None,
) -> None:
    if y is not None:
        torch.add(x, y, out=total)
    wide = total.to(precise(x))
    rstd.copy_((wide.square().mean(1) + eps).rsqrt())
    value = (wide * rstd[:, None] * weight.to(wide.dtype)).to(x.dtype)
    if n is not None:
        n.copy_(value)
    write8(value, codes)


@twin(_add_norm_reference)
def _add_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    eps: float,
    total: Tensor,
    rstd: Tensor,
    n: Tensor | None,
    codes: Rows8 | None,
) -> None:
    from .block_norm_triton import add_norm

    add_norm(x, y, weight, eps, total, rstd, n, codes)


def norm_grad(
    dn: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    *,
    dres: Tensor | None = None,
    quantize: bool = False,
    keep_n: bool = False,
) -> Shown:
    """dx of n = x rstd w, the stream's own gradient added; dn's memory then holds n if it is wanted."""
    dx = torch.empty_like(x)
    codes = room8(x, quantize)
    if not x.is_meta:
        _norm_grad(dn, x, rstd, weight, dres, keep_n, dx, codes)
    return Shown(dx, codes)


def _norm_grad_reference(
    dn: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dres: Tensor | None,
    keep_n: bool,
    dx: Tensor,
    codes: Rows8 | None,
) -> None:
    unit = x.to(precise(x)) * rstd[:, None]
    w = weight.to(unit.dtype)
    g = dn.to(unit.dtype) * w
    total = rstd[:, None] * (g - unit * (g * unit).mean(1, keepdim=True))
    if dres is not None:
        total = total + dres
    if keep_n:
        dn.copy_(unit * w)
    dx.copy_(total)
    write8(dx, codes)


@twin(_norm_grad_reference)
def _norm_grad(
    dn: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dres: Tensor | None,
    keep_n: bool,
    dx: Tensor,
    codes: Rows8 | None,
) -> None:
    from .block_norm_triton import norm_grad

    norm_grad(dn, x, rstd, weight, dres, keep_n, dx, codes)


# ---- the gated MLP ------------------------------------------------------------------------------------------------


def act_of(g: Tensor, act: Act) -> Tensor:
    return F.silu(g) if act == "silu" else F.gelu(g, approximate="tanh")


def slope_of(g: Tensor, act: Act) -> Tensor:
    """The derivative of the activation."""
    if act == "silu":
        sigmoid = g.sigmoid()
        return sigmoid * (1 + g * (1 - sigmoid))
    tanh = (0.7978845608028654 * (g + 0.044715 * g**3)).tanh()
    inner = 0.7978845608028654 * (1 + 3 * 0.044715 * g * g)
    return 0.5 * (1 + tanh) + 0.5 * g * (1 - tanh * tanh) * inner


def swiglu(gu: Tensor, act: Act, *, low: Pair | None = None) -> Tensor:
    """h = act(g) u of a merged product (T, 2F), low added to it on the way."""
    h = gu.new_empty(gu.shape[0], gu.shape[1] // 2)
    if not gu.is_meta:
        _swiglu(gu, act, low, h)
    return h


def _swiglu_reference(gu: Tensor, act: Act, low: Pair | None, h: Tensor) -> None:
    g, u = added(gu, low).chunk(2, dim=1)
    h.copy_(act_of(g, act) * u)


@twin(_swiglu_reference)
def _swiglu(gu: Tensor, act: Act, low: Pair | None, h: Tensor) -> None:
    from .block_mlp_triton import swiglu

    swiglu(gu, act, low, h)


@dataclass(frozen=True)
class Sums:
    """Gradients of the pairs that a pass adds, over all tokens: db (2F, R), da (R, F); None for a pair it has not."""

    db: Tensor | None
    da: Tensor | None


def span_of(tokens: int) -> int:
    """How many tokens one program walks through and adds up, a power of two: all processors have work in short lines
    too, and in long ones the parts of the sums are a tenth of what the pass reads."""
    eighth = max(1, -(-tokens // 8))
    return min(1024, max(64, 1 << (eighth - 1).bit_length()))


def swiglu_grad(
    gu: Tensor,
    act: Act,
    dh: Tensor,
    *,
    low: Pair | None = None,
    dlow: Pair | None = None,
    keep_h: bool = False,
) -> Sums:
    """The gradient of a merged product, written over it; dh's memory then holds h if it is wanted.

    dlow  (dz, a): dh + dz a is h's gradient
    """
    tokens, wide = gu.shape
    parts, kind = -(-tokens // span_of(tokens)), precise(gu)
    db = None if low is None else gu.new_empty(parts, wide, low[0].shape[1], dtype=kind)
    da = None if dlow is None else gu.new_empty(parts, dlow[0].shape[1], wide // 2, dtype=kind)
    if not gu.is_meta:
        _swiglu_grad(gu, act, dh, low, dlow, keep_h, db, da)
    return Sums(*(None if part is None else part.sum(0) for part in (db, da)))


def _swiglu_grad_reference(
    gu: Tensor,
    act: Act,
    dh: Tensor,
    low: Pair | None,
    dlow: Pair | None,
    keep_h: bool,
    db: Tensor | None,
    da: Tensor | None,
) -> None:
    g, u = added(gu, low).chunk(2, dim=1)
    wide = added(dh, dlow, turned=True)
    value = torch.cat([wide * u * slope_of(g, act), wide * act_of(g, act)], dim=1)
    h = (act_of(g, act) * u).to(dh.dtype)
    if keep_h:
        dh.copy_(h)
    gu.copy_(value)
    for parts, pair, made in ((db, low, lambda z: mm32(gu.T, z)), (da, dlow, lambda dz: mm32(dz.T, h))):
        if parts is not None and pair is not None:  # of the parts, the sum alone is defined
            parts.zero_()[:1] = made(pair[0])


@twin(_swiglu_grad_reference)
def _swiglu_grad(
    gu: Tensor,
    act: Act,
    dh: Tensor,
    low: Pair | None,
    dlow: Pair | None,
    keep_h: bool,
    db: Tensor | None,
    da: Tensor | None,
) -> None:
    from .block_mlp_triton import swiglu_grad

    swiglu_grad(gu, act, dh, low, dlow, keep_h, db, da)


# ---- positions ----------------------------------------------------------------------------------------------------


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int], *, low: Pair | None = None) -> None:
    """In place: q and k of a merged product (T, (H + 2 G) D), turned; v only gets its low-rank part.

    cos, sin  (T, E) with E <= D even, both halves of a row alike, as transformers has them
    heads     (H, G)
    """
    if not qkv.is_meta:
        _rope(qkv, cos, sin, heads, low)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (T, N, D) turned by their positions; what is beyond cos stays."""
    width = cos.shape[1]
    part, rest = x[..., :width], x[..., width:]
    first, second = part.chunk(2, dim=-1)
    half = torch.cat([-second, first], dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat([part * cos + half * sin, rest], dim=-1)


def _rope_reference(qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int], low: Pair | None) -> None:
    count, groups = heads
    value = added(qkv, low).unflatten(1, (count + 2 * groups, -1))
    many = count + groups
    value = torch.cat([turned(value[:, :many], cos, sin), value[:, many:]], dim=1)
    qkv.copy_(value.flatten(1))


@twin(_rope_reference)
def _rope(qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int], low: Pair | None) -> None:
    from .block_rope_triton import rope

    rope(qkv, cos, sin, heads, low)


def rope_grad(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of the merged product from those of turned q (T, H, D), k and of v (T, G, D)."""
    tokens, heads, dim = dq.shape
    dqkv = dq.new_empty(tokens, (heads + 2 * dk.shape[1]) * dim)
    if not dq.is_meta:
        _rope_grad(dq, dk, dv, cos, sin, dqkv)
    return dqkv


def _rope_grad_reference(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, dqkv: Tensor) -> None:
    wide = precise(dq)
    parts = [turned(dq.to(wide), cos, -sin), turned(dk.to(wide), cos, -sin), dv.to(wide)]
    dqkv.copy_(torch.cat(parts, dim=1).flatten(1))


@twin(_rope_grad_reference)
def _rope_grad(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, dqkv: Tensor) -> None:
    from .block_rope_triton import rope_grad

    rope_grad(dq, dk, dv, cos, sin, dqkv)


# ---- low-rank parts that stand alone ------------------------------------------------------------------------------


def add_low(
    x: Tensor, low: Pair, *, y: Tensor | None = None, turned: bool = False, over: bool = False
) -> Tensor:
    """x + y + z b^T (z a where turned), rounded once; over x where its memory may be had.

    x, y  contiguous; the rank one of FUSED_RANKS
    """
    assert x.is_contiguous()
    assert y is None or y.is_contiguous()
    out = x if over else torch.empty_like(x)
    if not x.is_meta:
        _add_low(x, y, low, turned, out)
    return out


def _add_low_reference(x: Tensor, y: Tensor | None, low: Pair, turned: bool, out: Tensor) -> None:
    total = added(x, low, turned=turned)
    out.copy_(total if y is None else total + y)


@twin(_add_low_reference)
def _add_low(x: Tensor, y: Tensor | None, low: Pair, turned: bool, out: Tensor) -> None:
    from .block_low_triton import add_low

    add_low(x, y, low, turned, out)
