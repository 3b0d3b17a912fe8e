"""A frozen linear layer with a low-rank update, forward and backward as one node.

    s = x' A^T        y = x W^T + bias + (e s) B^T            x' is x, or x with dropped features
    ds = e (dy B)     dx = dy W + ds A      dA = ds^T x'      dB = dy^T (e s)       de = sum_t (dy B) s

Kept for the backward pass: x' and s, and W as the model keeps it, be it dense or in codes. What x' alone needs is
left out where A is frozen. Sums go in place into the node's own tensors, and A and B may be in float32: they
are rounded to x's dtype for the products, and their gradients come out in float32, on a GPU without being rounded.

shapes  x (..., I), y (..., O); A (R, I), B (O, R), e a number or (R,); W (O, I)
source  LoRA, arXiv:2106.09685, section 4.1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .matmul_frozen import Coded, times


@dataclass(frozen=True)
class Base:
    """The frozen layer: y = x M^T + bias, or x M + bias where it is turned; eight: in 8-bit floats."""

    matrix: Tensor | Coded
    turned: bool = False
    eight: bool = False


def lora_linear(
    x: Tensor,
    base: Base,
    bias: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    e: float | Tensor,
    dropped: Tensor | None = None,
) -> Tensor:
    """x W^T + bias + e (x' A^T) B^T, (..., O), in x's dtype.

    dropped  x' where it is not x
    """
    return _LoraLinear.apply(x, dropped, bias, a_RI, b_OR, e, base)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        bias: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        e: float | Tensor,
        base: Base,
    ) -> Tensor:
        rows = flat(x if dropped is None else dropped)
        y_TO = times(flat(x), base.matrix, base.turned, base.eight, bias)
        s = rows @ a_RI.to(x.dtype).t()
        y_TO.addmm_(scaled(s, e), b_OR.to(x.dtype).t())
        _, _, _, wants_a, wants_b, wants_e, _ = ctx.needs_input_grad
        tensors = isinstance(e, Tensor)
        ctx.save_for_backward(
            rows if wants_a else None, s if wants_b or wants_e else None, a_RI, b_OR, e if tensors else None
        )
        ctx.base, ctx.shape, ctx.apart = base, x.shape, dropped is not None
        ctx.e = None if tensors else e
        return y_TO.view(*x.shape[:-1], len(b_OR))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, s, a_RI, b_OR, e = ctx.saved_tensors
        e = ctx.e if e is None else e
        wants_x, wants_dropped, wants_bias, wants_a, wants_b, wants_e, _ = ctx.needs_input_grad
        dx = ddropped = da = db = de = None
        dy_TO = flat(dy)
        if wants_x:
            dx = times(dy_TO, ctx.base.matrix, not ctx.base.turned, ctx.base.eight)
        if wants_x or wants_dropped or wants_a or wants_e:
            dz = dy_TO @ b_OR.to(dy.dtype)
            ds = scaled(dz, e)
            if wants_dropped:
                ddropped = (ds @ a_RI.to(dy.dtype)).view(ctx.shape)
            elif dx is not None and not ctx.apart:
                dx.addmm_(ds, a_RI.to(dy.dtype))
            da = product(ds, rows, a_RI.dtype) if wants_a else None
            de = (dz * s).sum(0, dtype=e.dtype) if wants_e else None
        if wants_b:
            db = product(dy_TO, scaled(s, e), b_OR.dtype)
        dbias = dy_TO.sum(0) if wants_bias else None
        return None if dx is None else dx.view(ctx.shape), ddropped, dbias, da, db, de, None


def flat(x: Tensor) -> Tensor:
    """Features last, tokens before: a view where x is contiguous."""
    return x.reshape(-1, x.shape[-1])


def scaled(z: Tensor, e: float | Tensor) -> Tensor:
    if isinstance(e, Tensor):
        return z * e.to(z.dtype)
    return z if e == 1.0 else z * e


def product(left_TN: Tensor, right_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """left^T right, (N, K), in a parameter's dtype: from 16 bits to float32 without rounding between, on a GPU."""
    if left_TN.is_cuda and dtype == torch.float32 and left_TN.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left_TN.t(), right_TK, out_dtype=torch.float32)
    return (left_TN.t() @ right_TK).to(dtype)
