"""Products with a frozen matrix: a dense one, or codes that are decoded into one reused buffer, both ways anew.

    y = x M^T + bias   (x M + bias where M is turned)        dx = dy M   (dy M^T)
    in 8 bits:  y = q(x) q(M)^T,  dx = q(dy) q(M^T)^T         q: e4m3, each row by its own scale (see `fp8`)

Nothing dense is saved between the two: the node keeps the codes, which are the model's own.

shapes  x (..., I), y (..., O); M (O, I) as coded
source  QLoRA, arXiv:2305.14314, section 3: W is dequantised in the forward pass and again in the backward pass
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fp8 import matmul8, quantize_rows


class Coded(Protocol):
    """A matrix (O, I) that is kept in codes."""

    @property
    def numel(self) -> int: ...

    def decode(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The dense matrix, written into the flat buffer `out` if there is one."""

    def eight(self, turned: bool, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The matrix, or its transpose, in 8-bit floats, and the scale of each row; in the shared buffer if it is
        not stored so and no `out` is given."""


_buffers: dict[tuple[Any, ...], Tensor] = {}


def buffer(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The flat buffer to decode into: one for each device, dtype and stream (thread, on a CPU).

    Whoever takes it next on that stream overwrites it, in the stream's order.
    """
    line = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else threading.get_ident()
    key = (device, dtype, line)
    held = _buffers.get(key)
    if held is None or held.numel() < numel:
        _buffers.pop(key, None)
        held = None  # the old one is freed before the new one is made
        with torch.inference_mode(False):  # training may use it next
            held = _buffers[key] = torch.empty(numel, dtype=dtype, device=device)
    return held


def release_buffers() -> None:
    """Give the buffers' memory back; the next product makes new ones."""
    _buffers.clear()


def times(x: Tensor, matrix: Tensor | Coded, turned: bool, eight: bool, bias: Tensor | None = None) -> Tensor:
    """x M^T + bias, or x M + bias if turned: a new tensor in x's dtype.

    eight  multiply in 8-bit floats
    """
    if eight:
        assert not isinstance(matrix, Tensor)
        w8, scale = matrix.eight(turned)
        y = matmul8(quantize_rows(x.reshape(-1, x.shape[-1])), w8, scale, x.dtype)
        y = y.view(*x.shape[:-1], len(w8))
        return y if bias is None else y.add_(bias)
    m = matrix
    if not isinstance(m, Tensor):
        m = m.decode(x.dtype, buffer(m.numel, x.dtype, x.device))
    return F.linear(x, m.t() if turned else m, bias)


def matmul_frozen(
    x: Tensor, matrix: Coded, turned: bool, bias: Tensor | None, *, eight: bool = False
) -> Tensor:
    """x M^T + bias, or x M + bias if turned."""
    return _Product.apply(x, bias, matrix, turned, eight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, matrix: Coded, turned: bool, eight: bool) -> Tensor:
        ctx.matrix, ctx.turned, ctx.eight, ctx.bias = matrix, turned, eight, bias is not None
        return times(x, matrix, turned, eight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = times(dy, ctx.matrix, not ctx.turned, ctx.eight)
        if ctx.bias and ctx.needs_input_grad[1]:
            db = dy.flatten(0, -2).sum(0)
        return dx, db, None, None, None
