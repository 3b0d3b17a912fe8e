"""Causal attention over many short documents in one line, where FlashAttention would launch a tile for each.

    out[t] = sum_j softmax_j(scale * q[t] . k[j]) v[j],      max(first[t], t - window + 1) <= j <= t

Tiles of tokens lie along the line whatever documents begin in them; what a tile reads begins at the first document in
it. Documents are known to the device alone, so one launch serves any of them, as a CUDA graph needs.

    lse[t] = log2 sum_j exp(scale * q[t] . k[j])         delta[t] = dout[t] . out[t]
    p = exp2(scale' s - lse),  ds = p (dout v^T - delta),  dq = scale ds k,  dk = scale ds^T q,  dv = p^T dout

shapes  T tokens, H query heads, G key heads (G divides H), D features of a head; bounds_2T int32: the first token of
        each token's document, and the first one behind it
units   scale: of q . k, None for 1 / sqrt(D); window: keys that a query sees, itself among them, None for all
source  Dao 2023, arXiv:2307.08691 (FlashAttention-2), algorithms 1 and 2; two backward passes, so no atomic sums
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention import HALF
from .twin import has_triton, path_of, twin

WIDEST = 128  # features of a head, for which tiles fit the registers


def takes_short(q: Tensor) -> bool:
    """Whether these kernels serve this device, dtype and head.

    Shapes of the meta device stand for the GPU that is here, or for one with Triton.
    """
    here = has_triton() or not torch.cuda.is_available()
    served = here if q.is_meta else path_of(q.device)[0] == "triton"
    return served and q.dtype in HALF and q.shape[-1] <= WIDEST


def short(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    bounds_2T: Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention within documents by these kernels, (T, H, D), differentiable. The last stride is 1."""
    scale = q_THD.shape[-1] ** -0.5 if scale is None else scale
    return _Short.apply(q_THD, k_TGD, v_TGD, bounds_2T, scale, window)


class _Short(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, window: int | None
    ) -> Tensor:
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
        if not q.is_meta:
            forward(q, k, v, bounds, out, lse, scale, window)
        ctx.scale, ctx.window = scale, window
        ctx.save_for_backward(q, k, v, bounds, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bounds, out, lse = ctx.saved_tensors
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        delta = torch.empty_like(lse)
        if not q.is_meta:
            dout = dout if dout.stride(-1) == 1 else dout.contiguous()
            gradients(dout, q, k, v, bounds, out, lse, delta, dq, dk, dv, ctx.scale, ctx.window)
        return dq, dk, dv, None, None, None


def _forward_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None,
) -> None:
    p_HTT, lse_HT = probabilities(q, k, bounds, scale, window)
    out.copy_(torch.einsum("hij,jhd->ihd", p_HTT, shared(v, q)))
    lse.copy_(lse_HT)


def _backward_reference(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    scale: float,
    window: int | None,
) -> None:
    p_HTT, _ = probabilities(q, k, bounds, scale, window)
    wide = dout.to(p_HTT.dtype)
    delta.copy_((wide * out).sum(-1).T)
    ds_HTT = p_HTT * (torch.einsum("ihd,jhd->hij", wide, shared(v, q)) - delta[:, :, None])
    dq.copy_(scale * torch.einsum("hij,jhd->ihd", ds_HTT, shared(k, q)))
    for into, grad in (
        (dk, scale * torch.einsum("hij,ihd->jhd", ds_HTT, q.to(p_HTT.dtype))),
        (dv, torch.einsum("hij,ihd->jhd", p_HTT, wide)),
    ):
        into.copy_(grad.unflatten(1, (k.shape[1], -1)).sum(2))


def probabilities(
    q: Tensor, k: Tensor, bounds: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """softmax of the scores (H, T, T), and the logarithm to base 2 of its divisor, (H, T), in float32 or more."""
    at = torch.arange(len(q), device=q.device)
    seen = (at[None, :] <= at[:, None]) & (at[None, :] >= bounds[0][:, None])
    if window is not None:
        seen &= at[None, :] > at[:, None] - window
    precise = q.to(torch.promote_types(q.dtype, torch.float32))
    s_HTT = scale * torch.einsum("ihd,jhd->hij", precise, shared(k, q))
    s_HTT = s_HTT.masked_fill(~seen, -torch.inf)
    return s_HTT.softmax(-1), s_HTT.logsumexp(-1) / torch.log(s_HTT.new_tensor(2.0))


def shared(x_TGD: Tensor, q_THD: Tensor) -> Tensor:
    """Keys or values for every query head, in float32 or more."""
    wide = x_TGD.to(torch.promote_types(x_TGD.dtype, torch.float32))
    return wide.repeat_interleave(q_THD.shape[1] // x_TGD.shape[1], dim=1)


@twin(_forward_reference)
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None,
) -> None:
    from . import attention_short_triton

    attention_short_triton.forward(q, k, v, bounds, out, lse, scale, window)


@twin(_backward_reference)
def gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    scale: float,
    window: int | None,
) -> None:
    from . import attention_short_triton

    attention_short_triton.gradients(dout, q, k, v, bounds, out, lse, delta, dq, dk, dv, scale, window)
