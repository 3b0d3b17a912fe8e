"""A Llama-like decoder layer as two nodes of autograd with attention between them.

    Before   n = norm(x);  q, k, v = n W^T + low-rank, turned by their positions
    After    x' = x + o W_o^T;  n = norm(x');  h = act(n W_g^T) (n W_u^T);  x'' = x' + h W_d^T

What a layer saves is what its products cannot do without: x, q, k, v (attention keeps those, and its output), x',
gate and up before their low-rank part, and the thin s = x A^T. Norm outputs are made again in the backward
kernels, for dA alone; h in registers, where dA of down adds up, or over dh where it is needed whole. The gradient of
the residual stream passes through both nodes.

shapes  T tokens in one line; x (T, K); q (T, H, D), k and v (T, G, D); F the MLP's width
source  LoRA, arXiv:2106.09685; tests/test_fast.py: equal to the layer's own code in float64
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .group import Group, PairGrads, Wide, back, dlow, low, then_of, thin, thin_grad, times
from .kernels.block import (
    Act,
    Normed,
    add_norm,
    norm_grad,
    rope,
    rope_grad,
    shown,
    swiglu,
    swiglu_grad,
)

Backward = TypeVar("Backward", bound=Callable[..., Any])
Turn = Literal["only", "first", "second"]  # of the forward passes of a layer that is computed again


@dataclass
class Parts:
    """What a fused layer works with.

    norms      weights of the two norms, as they multiply, and their eps
    heads      (H, G) and D
    recompute  whether gate and up are multiplied again in the backward pass
    """

    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    norms: tuple[Tensor, Tensor]
    eps: tuple[float, float]
    act: Act
    heads: tuple[int, int]
    dim: int
    recompute: str = "none"

    def groups(self) -> Sequence[Group]:
        return self.qkv, self.o, self.gate_up, self.down


def normed(
    x: Tensor, weight: Tensor, eps: float, group: Group, wide: Wide | None, y: Tensor | None = None
) -> Normed:
    """The norm in the forms that a group reads."""
    fp8 = group.frozen.fp8
    return add_norm(x, weight, eps, y=y, quantize=fp8, keep=not fp8 or wide is not None)


def dtypes_of(tensors: Sequence[Tensor]) -> list[torch.dtype]:
    return [tensor.dtype for tensor in tensors]


def once(backward: Backward) -> Backward:
    """A backward pass that runs a single time, with the dropout of its forward pass.

    raises  RuntimeError in a second one: the first has written over what was saved
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        if getattr(ctx, "spent", False):
            raise RuntimeError(
                "a fused decoder layer's backward pass runs once: retain_graph is not supported"
            )
        ctx.spent = True
        with nullcontext() if ctx.then is None else ctx.then.again():
            return backward(ctx, *grads)

    return run  # type: ignore[return-value]


class Before(torch.autograd.Function):
    """(x, cos, sin, parts, wide, *pairs) -> q, k, v, x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, parts: Parts, wide: Wide | None, *pairs: Tensor
    ) -> tuple[Tensor, ...]:
        made = normed(x, parts.norms[0], parts.eps[0], parts.qkv, wide)
        qkv, s = times(parts.qkv, wide, made.n, kernel_adds=True)
        rope(qkv, cos, sin, parts.heads, low=low(wide, s))
        ctx.save_for_backward(x, cos, sin, made.rstd, s)
        ctx.parts, ctx.wide, ctx.dtypes = parts, wide, dtypes_of(pairs)
        ctx.then = then_of([wide])
        heads, groups = parts.heads
        q, k, v = qkv.unflatten(1, (-1, parts.dim)).split([heads, groups, groups], dim=1)
        return q, k, v, x

    @staticmethod
    @once_differentiable
    @once
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, dres: Tensor) -> tuple[Any, ...]:
        x, cos, sin, rstd, s = ctx.saved_tensors
        parts, wide, fp8 = ctx.parts, ctx.wide, ctx.parts.qkv.frozen.fp8
        weight, grads = parts.norms[0], PairGrads(wide, ctx.dtypes)
        dqkv = rope_grad(dq, dk, dv, cos, sin)
        ds = None if wide is None else thin_grad(wide, dqkv)
        grads.take_b(s, dqkv)
        if ctx.needs_input_grad[0]:
            seen = shown(dqkv, fp8, keep=not fp8)
            del dqkv
            n = back(parts.qkv, wide, seen, ds)
            dx = norm_grad(n, x, rstd, weight, dres=dres, keep_n=wide is not None).dense
            grads.take_a(n, ds)
            return dx, None, None, None, None, *grads
        # Nothing below trains: no gradient of x, and n is made for dA alone.
        grads.take_a(None if wide is None else add_norm(x, weight, parts.eps[0]).n.dense, ds)
        return None, None, None, None, None, *grads


class After(torch.autograd.Function):
    """(attention's output (T, H D), x, parts, wides of o, gate_up and down, turn, *pairs) -> the layer's output.

    A layer that the backward pass computes again is run in two turns. In the second nobody reads its output, so the
    last product and what it reads are left out; the backward pass has h and makes s of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        attn: Tensor,
        x: Tensor,
        parts: Parts,
        wides: Sequence[Wide | None],
        turn: Turn,
        *pairs: Tensor,
    ) -> Tensor:
        o, gate_up, down = wides
        fp8 = parts.o.frozen.fp8  # in 8 bits a product cannot add as it writes: the norm's kernel adds
        y, s_o = times(parts.o, o, shown(attn, fp8), onto=None if fp8 else x)
        x, more = (x, y) if fp8 else (y, None)
        made = normed(x, parts.norms[1], parts.eps[1], parts.gate_up, gate_up, more)
        x, rstd = made.x, made.rstd
        del y, more
        gu, s_gu = times(parts.gate_up, gate_up, made.n, kernel_adds=True)
        del made
        if turn == "second":
            out, s_d = torch.empty_like(x), None if down is None else x.new_empty(len(x), len(down.a))
        else:
            h = swiglu(gu, parts.act, low=low(gate_up, s_gu))
            out, s_d = times(parts.down, down, shown(h, parts.down.frozen.fp8), onto=x)
            del h
        kept = None if parts.recompute == "gate_up" else gu
        ctx.save_for_backward(attn, x, rstd, kept, s_o, s_gu, s_d)
        ctx.parts, ctx.wides, ctx.dtypes, ctx.turn = parts, wides, dtypes_of(pairs), turn
        ctx.then = then_of(wides)
        return out

    @staticmethod
    @once_differentiable
    @once
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        attn, x, rstd, gu, s_o, s_gu, s_d = ctx.saved_tensors
        parts, (o, gate_up, down) = ctx.parts, ctx.wides
        of_o, of_gate, of_down = map(PairGrads, ctx.wides, by_group(ctx.dtypes, ctx.wides))
        dout = dout.contiguous()
        if gu is None:
            made = normed(x, parts.norms[1], parts.eps[1], parts.gate_up, gate_up)
            gu, _ = times(parts.gate_up, gate_up, made.n, kernel_adds=True)
            del made

        ds = None if down is None else thin_grad(down, dout)
        dh = back(parts.down, down, shown(dout, parts.down.frozen.fp8), ds, kernel_adds=True)
        low_gu, low_d = low(gate_up, s_gu), dlow(down, ds)
        again = ctx.turn != "only"
        keep_h = down is not None and (again or low_d is None)
        sums = swiglu_grad(gu, parts.act, dh, low=low_gu, dlow=low_d, keep_h=keep_h)
        if again and down is not None:
            s_d = thin(down, dh)  # dh's memory holds h now
        of_down.take_b(s_d, dout)
        of_down.take_a(dh, ds, sums.da)
        of_gate.take_b(s_gu, gu, sums.db)
        del dh, sums, low_gu, low_d

        ds = None if gate_up is None else thin_grad(gate_up, gu)
        fp8 = parts.gate_up.frozen.fp8
        seen = shown(gu, fp8, keep=not fp8)
        del gu
        n = back(parts.gate_up, gate_up, seen, ds)
        del seen
        fp8 = parts.o.frozen.fp8
        dx = norm_grad(n, x, rstd, parts.norms[1], dres=dout, quantize=fp8, keep_n=gate_up is not None)
        of_gate.take_a(n, ds)
        del n

        assert dx.dense is not None
        ds = None if o is None else thin_grad(o, dx.dense)
        of_o.take_b(s_o, dx.dense)
        dattn = back(parts.o, o, dx, ds) if ctx.needs_input_grad[0] else None
        of_o.take_a(attn, ds)
        return dattn, dx.dense, None, None, None, *of_o, *of_gate, *of_down


def by_group(dtypes: Sequence[torch.dtype], wides: Sequence[Wide | None]) -> list[Sequence[torch.dtype]]:
    """The dtypes of the pairs of each group."""
    parts, start = [], 0
    for wide in wides:
        stop = start + (0 if wide is None else 2 * len(wide.parts))
        parts.append(dtypes[start:stop])
        start = stop
    return parts
