"""Cross-entropy of rows of logits, and its gradient written over them.

    x = cap tanh(scale l / cap), or scale l without a cap          nll = log sum_v exp(x_v) - x_label
    d(sum of weight nll)/dl_v = weight (softmax(x)_v - [v = label]) dx_v/dl_v

All is computed in float32, in float64 for float64 logits, and rounded once. A row whose label is -100 has no
loss and no gradient, whatever its logits are.

shapes  C rows of a chunk, V vocabulary; L rows of a matrix of width h that belong to places among N rows
raises  ValueError for tensors that do not fit; a label outside of the vocabulary is an error of torch in the
        definition and gives NaN in the kernel
source  Liger-Kernel, arXiv:2410.10989, section 3.2: the gradient in the forward pass, in place of the logits
"""

from __future__ import annotations

import torch
from torch import Tensor

from .twin import twin

IGNORED = -100
BLOCK = 2**18  # elements that the definition works on at once: a megabyte of a cache


def cross_entropy(
    logits_CV: Tensor,
    label_C: Tensor,
    *,
    scale: float = 1.0,
    cap: float | None = None,
    weight_C: Tensor | None = None,
    grad_CV: Tensor | None = None,
) -> Tensor:
    """nll_C, not weighted; the gradient of its weighted sum goes to `grad_CV`, which may be the logits themselves.

    shapes  label_C int64; weight_C and nll_C float32, float64 for float64 logits; grad_CV like the logits
    """
    precise = torch.promote_types(logits_CV.dtype, torch.float32)
    check(logits_CV, label_C, weight_C, grad_CV, precise)
    nll_C = torch.empty(len(logits_CV), dtype=precise, device=logits_CV.device)
    if not logits_CV.is_meta and len(logits_CV):
        _cross_entropy(logits_CV, label_C, weight_C, nll_C, grad_CV, scale, cap)
    return nll_C


def _cross_entropy_reference(
    logits_CV: Tensor,
    label_C: Tensor,
    weight_C: Tensor | None,
    nll_C: Tensor,
    grad_CV: Tensor | None,
    scale: float,
    cap: float | None,
) -> None:
    many, vocabulary = logits_CV.shape
    step = max(1, BLOCK // vocabulary)
    for rows in (slice(start, start + step) for start in range(0, many, step)):
        ignored_C = label_C[rows] == IGNORED
        at_C1 = label_C[rows].masked_fill(ignored_C, 0)[:, None]
        weight = None if weight_C is None else weight_C[rows, None]
        if grad_CV is None or grad_CV.dtype != nll_C.dtype:
            g_CV = logits_CV[rows].to(nll_C.dtype, copy=True)
        else:
            g_CV = grad_CV[rows] if grad_CV is logits_CV else grad_CV[rows].copy_(logits_CV[rows])
        nll_C[rows] = _into_gradient(g_CV, at_C1, weight, scale, cap).masked_fill_(ignored_C, 0.0)
        if grad_CV is not None:
            grad_CV[rows] = g_CV.masked_fill_(ignored_C[:, None], 0.0)


def _into_gradient(
    x_CV: Tensor, at_C1: Tensor, weight_C1: Tensor | None, scale: float, cap: float | None
) -> Tensor:
    """nll_C of logits that turn into their gradient in place, so that a chunk stands in memory once."""
    if scale != 1.0:
        x_CV.mul_(scale)
    if cap is not None:
        slope_CV = 1 - x_CV.div_(cap).tanh_().square()
        x_CV.mul_(cap)
    aim_C, most_C1 = x_CV.gather(1, at_C1)[:, 0], x_CV.amax(1, keepdim=True)
    sum_C1 = x_CV.sub_(most_C1).exp_().sum(1, keepdim=True)
    nll_C = (sum_C1.log() + most_C1)[:, 0] - aim_C
    x_CV.div_(sum_C1).scatter_add_(1, at_C1, x_CV.new_full(at_C1.shape, -1.0))
    if cap is not None:
        x_CV.mul_(slope_CV)
    if weight_C1 is not None or scale != 1.0:
        x_CV.mul_(scale if weight_C1 is None else weight_C1 * scale)
    return nll_C


@twin(_cross_entropy_reference)
def _cross_entropy(
    logits_CV: Tensor,
    label_C: Tensor,
    weight_C: Tensor | None,
    nll_C: Tensor,
    grad_CV: Tensor | None,
    scale: float,
    cap: float | None,
) -> None:
    from . import cross_entropy_triton

    cross_entropy_triton.cross_entropy(logits_CV, label_C, weight_C, nll_C, grad_CV, scale, cap)


def bent(l: Tensor, scale: float, cap: float | None) -> Tensor:
    """The logits that the loss is taken of."""
    x = l if scale == 1.0 else l * scale
    return x if cap is None else (x / cap).tanh() * cap


def check(
    logits_CV: Tensor,
    label_C: Tensor,
    weight_C: Tensor | None,
    grad_CV: Tensor | None,
    precise: torch.dtype,
) -> None:
    """raises  ValueError for tensors that do not fit"""
    if logits_CV.dim() != 2 or not logits_CV.is_floating_point() or 0 in logits_CV.shape[1:]:
        raise ValueError(f"logits are rows of floats, not {list(logits_CV.shape)} of {logits_CV.dtype}")
    if label_C.shape != logits_CV.shape[:1] or label_C.dtype != torch.int64:
        raise ValueError(
            f"{len(logits_CV)} rows need as many labels of int64, got {list(label_C.shape)} of {label_C.dtype}"
        )
    if weight_C is not None and (weight_C.shape != label_C.shape or weight_C.dtype != precise):
        raise ValueError(
            f"{len(logits_CV)} rows need as many weights of {precise}, got {list(weight_C.shape)} of {weight_C.dtype}"
        )
    if grad_CV is not None and (grad_CV.shape, grad_CV.dtype) != (logits_CV.shape, logits_CV.dtype):
        raise ValueError(f"the gradient has the logits' form, not {list(grad_CV.shape)} of {grad_CV.dtype}")


def place_rows(d_Lh: Tensor, place_L: Tensor, factor: Tensor, num_rows: int) -> Tensor:
    """Rows times a number, each at its place among `num_rows` rows that are zero elsewhere.

    The product is taken in float32 (float64) and rounded once, which a product with a tensor of one number is not.

    place_L  int64, no place twice; what is num_rows or more is left out
    factor   one number on the rows' device
    """
    if place_L.shape != d_Lh.shape[:1] or place_L.dtype != torch.int64 or factor.numel() != 1:
        raise ValueError(f"{len(d_Lh)} rows need as many places of int64, and one factor")
    d_Nh = d_Lh.new_zeros(num_rows, d_Lh.shape[1])
    if not d_Lh.is_meta and d_Lh.numel():
        _place_rows(d_Lh, place_L, factor, d_Nh)
    return d_Nh


def _place_rows_reference(d_Lh: Tensor, place_L: Tensor, factor: Tensor, d_Nh: Tensor) -> None:
    kept_L = place_L < len(d_Nh)
    step = max(1, BLOCK // d_Lh.shape[1])
    for start in range(0, len(d_Lh), step):
        rows = slice(start, start + step)
        wide = d_Lh[rows][kept_L[rows]].to(torch.promote_types(d_Lh.dtype, torch.float32))
        d_Nh[place_L[rows][kept_L[rows]]] = (wide * factor.to(wide.dtype)).to(d_Nh.dtype)


@twin(_place_rows_reference)
def _place_rows(d_Lh: Tensor, place_L: Tensor, factor: Tensor, d_Nh: Tensor) -> None:
    from . import cross_entropy_triton

    cross_entropy_triton.place_rows(d_Lh, place_L, factor, d_Nh)
