"""Products with a frozen matrix kept in 4 bits: dequantised into one reused buffer, forward and again backward.

    y = x M^T + bias   (M^T of codes (O, I); M where the codes are of the transpose)        dx = dy M

Nothing dense is saved between the two: the node keeps the packed codes, which are the model's own.

shapes  x (..., I), y (..., O); M (O, I) as coded
source  QLoRA, arXiv:2305.14314, section 3: W is dequantised in the forward pass and again in the backward pass
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Decode = Callable[
    [torch.dtype, Tensor | None], Tensor
]  # a dense matrix in a dtype, in a flat buffer if given

_buffers: dict[tuple[Any, ...], Tensor] = {}


def buffer(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The flat buffer to dequantise into: one for each device, dtype and stream (thread, on a CPU).

    Whoever takes it next on that stream overwrites it, in the stream's order.
    """
    line = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else threading.get_ident()
    key = (device, dtype, line)
    held = _buffers.get(key)
    if held is None or held.numel() < numel:
        _buffers.pop(key, None)
        held = None  # the old one is freed before the new one is made
        held = _buffers[key] = torch.empty(numel, dtype=dtype, device=device)
    return held


def release_buffers() -> None:
    """Give the buffers' memory back; the next product makes new ones."""
    _buffers.clear()


def matmul_frozen(x: Tensor, decode: Decode, numel: int, flipped: bool, bias: Tensor | None) -> Tensor:
    """x M^T + bias, or x M + bias if flipped.

    decode  gives M in a dtype, written into the flat buffer that it is handed
    """
    return _Product.apply(x, bias, decode, numel, flipped)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, decode: Decode, numel: int, flipped: bool
    ) -> Tensor:
        ctx.decode, ctx.numel, ctx.flipped, ctx.bias = decode, numel, flipped, bias is not None
        m = decode(x.dtype, buffer(numel, x.dtype, x.device))
        return F.linear(x, m.T if flipped else m, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = db = None
        if ctx.needs_input_grad[0]:
            m = ctx.decode(dy.dtype, buffer(ctx.numel, dy.dtype, dy.device))
            dx = torch.matmul(dy, m.T if ctx.flipped else m)
        if ctx.bias and ctx.needs_input_grad[1]:
            db = dy.flatten(0, -2).sum(0)
        return dx, db, None, None, None
