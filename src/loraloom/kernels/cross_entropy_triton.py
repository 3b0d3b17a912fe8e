# mypy: allow-untyped-defs
"""The kernels of `cross_entropy`, which has the equations.

A program takes one row: a first walk over its vocabulary in blocks finds the maximum and the sum, a second one, from
the end, where the cache still has the row, writes the gradient. A gradient that stands where the logits stood is
safe: a block is read before it is written, and the label's logit before both.

shapes  as in cross_entropy
units   row numbers are int64: a chunk may have more than 2^31 logits
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS, WARPS = 8192, 8  # of the vocabulary at once; a schedule, no part of the arithmetic
COLS = 1024
WIDE = {torch.float64: tl.float64}  # all others compute in float32


def cross_entropy(
    logits_CV: Tensor,
    label_C: Tensor,
    weight_C: Tensor | None,
    nll_C: Tensor,
    grad_CV: Tensor | None,
    scale: float,
    cap: float | None,
) -> None:
    many, vocabulary = logits_CV.shape
    if logits_CV.stride(1) != 1 or (grad_CV is not None and grad_CV.stride(1) != 1):
        raise ValueError("the logits of a row must lie side by side")
    grad, weight = (nll_C if one is None else one for one in (grad_CV, weight_C))  # unread, if None
    with torch.cuda.device_of(logits_CV):
        _cross_entropy[(many,)](
            logits_CV,
            label_C.contiguous(),
            weight.contiguous(),
            nll_C,
            grad,
            logits_CV.stride(0),
            grad.stride(0),
            vocabulary,
            SCALE=float(scale),
            CAP=0.0 if cap is None else float(cap),
            WEIGHTED=weight_C is not None,
            GRAD=grad_CV is not None,
            WIDE=WIDE.get(nll_C.dtype, tl.float32),
            V=min(WORDS, triton.next_power_of_2(vocabulary)),
            num_warps=WARPS,
        )


def place_rows(d_Lh: Tensor, place_L: Tensor, factor: Tensor, d_Nh: Tensor) -> None:
    many, width = d_Lh.shape
    wide = torch.promote_types(d_Lh.dtype, torch.float32)
    with torch.cuda.device_of(d_Lh):
        _place_rows[(many, triton.cdiv(width, COLS))](
            d_Lh.contiguous(), place_L.contiguous(), factor.to(wide), d_Nh, len(d_Nh), width,
            WIDE=WIDE.get(wide, tl.float32), C=COLS,
        )  # fmt: skip


@triton.jit
def _bent(l, SCALE: tl.constexpr, CAP: tl.constexpr):
    """x, and tanh on the way to it where there is a cap."""
    x = l if SCALE == 1.0 else l * SCALE
    t = x
    if CAP != 0.0:
        # tanh by its exponential; infinity gives 1
        t = 1.0 - 2.0 / (tl.exp(x * (2.0 / CAP)) + 1.0)
        x = t * CAP
    return x, t


@triton.jit
def _cross_entropy(
    logits_ptr,
    label_ptr,
    weight_ptr,
    nll_ptr,
    grad_ptr,
    logits_stride,
    grad_stride,
    vocabulary: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GRAD: tl.constexpr,
    WIDE: tl.constexpr,
    V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    grad_ptr += row * grad_stride
    label = tl.load(label_ptr + row)
    lane = tl.arange(0, V)
    COUNT: tl.constexpr = (vocabulary + V - 1) // V
    if label == -100:
        tl.store(nll_ptr + row, tl.zeros((), WIDE))
        if GRAD:
            for start in range(0, vocabulary, V):
                v = start + lane
                tl.store(grad_ptr + v, tl.zeros((V,), grad_ptr.dtype.element_ty), mask=v < vocabulary)
    else:
        inside = (label >= 0) & (label < vocabulary)
        aim, _aim_slope = _bent(
            tl.load(logits_ptr + label, mask=inside, other=float("nan")).to(WIDE), SCALE, CAP
        )
        most = tl.full((), -float("inf"), WIDE)
        total = tl.zeros((), WIDE)
        for start in range(0, vocabulary, V):
            v = start + lane
            l = tl.load(logits_ptr + v, mask=v < vocabulary, other=-float("inf")).to(WIDE)
            x, _slope = _bent(l, SCALE, CAP)
            x = tl.where(v < vocabulary, x, -float("inf"))
            higher = tl.maximum(most, tl.max(x, 0))
            base = tl.where(higher == -float("inf"), 0.0, higher)  # a block may hold nothing but -inf
            total = total * tl.exp(most - base) + tl.sum(tl.exp(x - base), 0)
            most = higher
        log_sum = most + tl.log(total)
        tl.store(nll_ptr + row, log_sum - aim)
        if GRAD:
            factor = tl.full((), SCALE, WIDE)
            if WEIGHTED:
                factor *= tl.load(weight_ptr + row)
            for back in range(COUNT):
                v = (COUNT - 1 - back) * V + lane
                l = tl.load(logits_ptr + v, mask=v < vocabulary, other=0.0).to(WIDE)
                x, t = _bent(l, SCALE, CAP)
                g = tl.exp(x - log_sum) - tl.where(v == label.to(tl.int32), 1.0, 0.0)
                if CAP != 0.0:
                    g *= 1.0 - t * t
                tl.store(grad_ptr + v, (g * factor).to(grad_ptr.dtype.element_ty), mask=v < vocabulary)


@triton.jit
def _place_rows(d_ptr, place_ptr, factor_ptr, out_ptr, num_rows, width, WIDE: tl.constexpr, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(place_ptr + row)
    col = tl.program_id(1) * C + tl.arange(0, C)
    d = tl.load(d_ptr + row * width + col, mask=col < width, other=0.0).to(WIDE) * tl.load(factor_ptr)
    if place < num_rows:
        tl.store(out_ptr + place * width + col, d.to(out_ptr.dtype.element_ty), mask=col < width)


def cases(device: torch.device | str) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """Logits, labels and settings: what the twin test runs.

    One word, ragged ends, several blocks, rows that are ignored, words that are masked, caps and scales.
    """
    generator = torch.Generator(device).manual_seed(0)
    settings: list[dict[str, Any]] = [{}, {"scale": 0.125}, {"cap": 30.0}, {"scale": 3.7, "cap": 5.0}]
    for number, (many, vocabulary) in enumerate([(1, 1), (3, 7), (5, 1000), (4, WORDS), (3, 2 * WORDS + 11)]):
        for at, one in enumerate(settings):
            logits = 4 * torch.randn(many, vocabulary, device=device, generator=generator)
            label = torch.randint(vocabulary, (many,), device=device, generator=generator)
            if many > 1:
                label[number % many] = -100
            if vocabulary > 2 * WORDS and at % 2 == 0 and "cap" not in one:
                logits[:, :WORDS] = -float("inf")
                label[label >= 0] = vocabulary - 1
            if (number + at) % 2:
                weight = torch.rand(many, device=device, generator=generator)
                one = {**one, "weight_C": weight}
            yield logits, label, one
