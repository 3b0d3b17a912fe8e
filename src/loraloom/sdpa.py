"""What the fused attention kernels of a GPU take, on shapes: F.scaled_dot_product_attention as it would run there.

    forward     out as q;  lse (B, H, T) float32;  a bool mask becomes a number for each pair, as q
    backward    dq, dk, dv, and the kernel's own workspace

On the meta device torch would take the definition, which stores T x T scores for every head. The fused kernels save
q, k, v, the mask of numbers, out and lse.

shapes  B rows, T tokens, H heads, D features of a head
source  torch 2.11: convert_boolean_attn_mask in aten/native/transformers/attention.cpp; priority_order in
        cuda/sdp_utils.cpp; cuda/attention_backward.cu. Workspaces: benchmarks/plan_peak.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import HALF, planning


@dataclass(frozen=True)
class Kernel:
    """A fused attention and what its backward pass takes for itself, in float32 numbers.

    query       for each element of q: the sum of dq over blocks of keys
    row         for each row and head: delta = sum(dout * out), and what the softmax is normalised by
    shared      for each element of k and v spread over the query heads that share them, in q's dtype
    rows_first  whether out lies as (B, T, H, D) in any case, and not as q does
    """

    name: str
    query: float = 0.0
    row: float = 0.0
    shared: float = 0.0
    rows_first: bool = False


CUDNN = Kernel("cudnn", query=1.0, row=2.0)
FLASH = Kernel("flash", query=1.0, row=1.0, shared=1.0)  # dk_expanded, dv_expanded in flash_api.cpp
EFFICIENT = Kernel("efficient", query=1.0, row=1.0, rows_first=True)
CPU = Kernel("cpu")


def choose(q: Tensor, mask: Tensor | None, *, cudnn: bool) -> Kernel:
    """The kernel that torch takes on a GPU; `cudnn` where that comes first (Hopper and Blackwell)."""
    if q.dtype not in HALF:
        return EFFICIENT
    if cudnn and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128:
        return CUDNN
    return EFFICIENT if mask is not None else FLASH


@contextmanager
def fused_attention(*, cudnn: bool = True, kernel: Kernel | None = None) -> Iterator[None]:
    """Inside, scaled_dot_product_attention takes the memory of a fused kernel and computes nothing.

    What attention by documents takes is in kernels/attention.py; it chooses as a GPU with or without cuDNN would.

    kernel  which one; None: what torch would choose
    """

    own = F.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **more: Any
    ) -> Any:
        chosen = kernel or choose(query, attn_mask, cudnn=cudnn)
        if kernel is None and chosen is EFFICIENT and more.get("enable_gqa"):
            return own(query, key, value, attn_mask, *args, **more)  # no fused kernel shares keys in float32
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask.logical_not(), -math.inf, query.new_zeros(()))
        return _Attention.apply(query, key, value, attn_mask, chosen)

    # Not a TorchFunctionMode: that is off while `backward` runs, where layers may be computed again.
    F.scaled_dot_product_attention = attend
    try:
        with planning(cudnn=cudnn):
            yield
    finally:
        F.scaled_dot_product_attention = own


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: Kernel) -> Tensor:
        order = (0, 2, 1, 3) if kernel.rows_first else sorted(range(4), key=q.stride, reverse=True)
        size = (*q.shape[:3], v.shape[-1])
        out = torch.empty_permuted(size, order, dtype=q.dtype, device=q.device).zero_()
        lse = q.new_zeros(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.kernel = kernel
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, _, lse = ctx.saved_tensors
        kernel: Kernel = ctx.kernel
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        held = [lse.new_empty(int(kernel.query * q.numel() + kernel.row * lse.numel()))]
        if q.shape[1] != k.shape[1]:
            wide = int(kernel.shared * q.numel())
            held += [q.new_empty(wide), q.new_empty(wide)]
        del held
        return dq, dk, dv, None, None
