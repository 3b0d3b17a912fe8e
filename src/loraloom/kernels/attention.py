"""Causal attention over tokens in one line: for documents of any lengths, of one length, and as it is defined.

    out[t] = sum_j softmax_j(scale * q[t] . k[j]) v[j],      j <= t in t's own document, and t - j < window

Each serves query heads in groups that share a key head, takes views with any strides whose last one is 1, and gives
gradients for q, k and v.

shapes  T tokens, H query heads, G key heads (G divides H), D features of a head; starts (documents + 1,) int32
units   scale: of q . k, None for 1 / sqrt(D); window: keys that a query sees, itself among them, None for all
source  FlashAttention-2: Dao 2023, arXiv:2307.08691, as torch builds it in (aten _flash_attention_forward: the
        function torch.nn.attention.varlen, which takes grouped heads only from torch 2.12 on, the operation always)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

HALF = (torch.bfloat16, torch.float16)
FLASH_MOST = 256  # features of a head
CUDNN_MOST = 128
PADDED = 128  # rows that FlashAttention's backward pass adds for each document
INDEX = 2**31  # it counts elements of that room with 32 bits, and faults beyond
# cuDNN's is the faster by 1.3 to 1.9 from 1,024 tokens on; where it refuses, such as under deterministic algorithms:
DENSE = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def takes_flash(q: Tensor) -> bool:
    """Whether FlashAttention serves this device, dtype and head; shapes of the meta device stand for a GPU's."""
    width = q.shape[-1]
    return q.device.type in ("cuda", "meta") and q.dtype in HALF and width % 8 == 0 and width <= FLASH_MOST


def backward_room(tokens: int, documents: int, heads: int, width: int) -> int:
    """Elements of the sum of dq that FlashAttention's backward pass takes for itself in float32."""
    step = 32 if width <= 128 else 64
    return (tokens + PADDED * documents) * heads * (-(-width // step) * step)


def varlen(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    starts: Tensor,
    longest: int,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """FlashAttention over documents of any lengths, (T, H, D).

    longest  tokens of a document at most
    raises   ValueError if its backward pass would count beyond 32 bits
    """
    tokens, heads, width = q_THD.shape
    if backward_room(tokens, len(starts) - 1, heads, width) >= INDEX:
        raise ValueError(
            f"{tokens:,} tokens in {len(starts) - 1:,} documents and {heads} heads of {width} are too many for one "
            "call of FlashAttention, whose backward pass counts with 32 bits"
        )
    return _Flash.apply(q_THD, k_TGD, v_TGD, starts, longest, scale, window)


class _Flash(torch.autograd.Function):
    """The two operations of torch by hand: its own registration of them differs between versions."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: Tensor,
        longest: int,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        ctx.longest, ctx.how = longest, options(scale, window)
        if q.is_meta:
            out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
            seed, unused = q.new_empty(2, dtype=torch.int64), q.new_empty((), dtype=torch.int64)
        else:
            out, lse, seed, unused, _ = torch.ops.aten._flash_attention_forward(
                *(q, k, v, starts, starts, longest, longest, 0.0, window is None, False), **ctx.how
            )
        ctx.causal = window is None
        ctx.save_for_backward(q, k, v, starts, out, lse, seed, unused)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, starts, out, lse, seed, unused = ctx.saved_tensors
        if q.is_meta:
            grads = flash_room(q, k, v, len(starts) - 1)
        else:
            longest = ctx.longest
            grads = torch.ops.aten._flash_attention_backward(
                *(dout, q, k, v, out, lse, starts, starts, longest, longest, 0.0, ctx.causal, seed, unused),
                **ctx.how,
            )
        return *grads, None, None, None, None


def options(scale: float | None, window: int | None) -> dict[str, Any]:
    """To the left a window counts the keys before the query, to the right none is seen."""
    left = -1 if window is None else window - 1
    return {"scale": scale, "window_size_left": left, "window_size_right": 0}


def flash_room(q: Tensor, k: Tensor, v: Tensor, documents: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of shapes, made while the backward pass's own workspace is held."""
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    tokens, heads, width = q.shape
    held = [
        q.new_empty(backward_room(tokens, documents, heads, width), dtype=torch.float32),
        q.new_empty(heads, tokens + PADDED * documents, dtype=torch.float32),  # sum of dout * out
    ]
    if heads != k.shape[1]:  # dk and dv of each query head, before they are added up
        held += [q.new_empty(tokens, heads, width), q.new_empty(tokens, heads, width)]
    del held
    return grads


def dense(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    count: int,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The tokens as `count` rows of one length, by torch's scaled_dot_product_attention, (T, H, D)."""
    length = len(q_THD) // count
    mask = None if window is None or window >= length else band(length, window, q_THD.device)
    q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q_THD, k_TGD, v_TGD))
    fused = q.is_cuda and q.dtype in HALF and mask is None and q.shape[-1] <= CUDNN_MOST
    with sdpa_kernel(DENSE, set_priority=True) if fused else nullcontext():
        out = F.scaled_dot_product_attention(
            *(q, k, v, mask), is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(1, 2).flatten(0, 1)


def band(length: int, window: int, device: torch.device) -> Tensor:
    """Which key (columns) a query (rows) sees: itself and the window - 1 before it."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device)
    return seen.tril_().triu_(1 - window)


def one_by_one(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    lengths: Sequence[int],
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The definition: each document by itself, in any dtype on any device."""
    lengths = [length for length in lengths if length]
    if len(set(lengths)) == 1:
        return dense(q_THD, k_TGD, v_TGD, len(lengths), scale, window)
    parts = zip(*(x.split(lengths) for x in (q_THD, k_TGD, v_TGD)), strict=True)
    return torch.cat([dense(q, k, v, 1, scale, window) for q, k, v in parts])
