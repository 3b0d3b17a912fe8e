"""A pair from a singular value decomposition, each singular value shared out evenly between A and B.

    s B A = U diag(S) V        A = sqrt(S / s) V,   B = U sqrt(S / s)

shapes  w (O, I), float32; U (O, K), S (K,), V (K, I) with K at most the smaller side of w
"""

from __future__ import annotations

import torch
from torch import Tensor

SVD = tuple[Tensor, Tensor, Tensor]  # U, S falling, V by rows


def split(svd: SVD, scale: float, spare: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A (r, I) and B (O, r) from r singular values, on the device of `svd`.

    spare  LoRA's own start, for values of zero: no gradient moves A or B where both are zero
    """
    u_OR, s_R, v_RI = svd
    a_RI, b_OR = (part.to(u_OR.device) for part in spare)
    root_R = (s_R / scale).sqrt()
    rows = torch.where(root_R[:, None] > 0, root_R[:, None] * v_RI, a_RI)
    return rows, torch.where(root_R > 0, u_OR * root_R, b_OR)


def exact_svd(w_OI: Tensor) -> SVD:
    return torch.linalg.svd(w_OI, full_matrices=False)


def top(svd: SVD, r: int) -> SVD:
    """The r largest values."""
    u_OK, s_K, v_KI = svd
    return u_OK[:, :r], s_K[:r], v_KI[:r]


def bottom(svd: SVD, r: int) -> SVD:
    """The r smallest values."""
    u_OK, s_K, v_KI = svd
    return u_OK[:, -r:], s_K[-r:], v_KI[-r:]


def fast_svd(w_OI: Tensor, r: int, iterations: int, gen: torch.Generator) -> SVD:
    """About the r largest values, from a random subspace that is turned towards them.

    torch.svd_lowrank does the same, with a draw that depends on the device and cannot be given a generator.

    source  Halko, Martinsson and Tropp 2009, arXiv:0909.4061, algorithms 4.4 and 5.1
    """
    tall = w_OI if w_OI.shape[0] >= w_OI.shape[1] else w_OI.T
    draw = torch.randn(tall.shape[1], min(r, tall.shape[1]), generator=gen)
    q = torch.linalg.qr(tall @ draw.to(tall)).Q
    for _ in range(iterations):
        q = torch.linalg.qr(tall.T @ q).Q
        q = torch.linalg.qr(tall @ q).Q
    u, s, v = exact_svd(q.T @ tall)
    return (q @ u, s, v) if tall is w_OI else (v.T, s, (q @ u).T)


def decomposed(w_OI: Tensor, r: int, niter: int, gen: torch.Generator) -> SVD:
    """At least the r largest values: all of them exactly if niter is 0, else by so many steps of the fast way."""
    return fast_svd(w_OI, r, niter, gen) if niter else exact_svd(w_OI)
