"""CorDA: train the part of W that matters most, or least, to inputs of the kind it is shown.

    C = mean over batches of X^T X, each batch divided by its largest value
    W C = U S V^T        s B0 A0 = U_r S_r V_r^T C^-1
    A0 = sqrt(S_r / s) V_r^T C^-1,   B0 = U_r sqrt(S_r / s)
    y = x W^T + s x (B A - B0 A0)^T + bias

mode=ipm takes the r largest singular values, with data of the task to be learnt: the directions the task uses.
mode=kpm takes the r smallest, with data of what is to be kept: the rest of W, which that knowledge lives in,
stays as it is.

C may be close to singular, so C + d mean(diag C) I stands for it, where d is 0.01 doubled until C C^-1 is
within 0.05 of the identity. 256 samples of 2,048 tokens are enough for 4,096 inputs. As in PiSSA the paper
writes W - s B0 A0 in W's place, and here W stays; the same numbers as PEFT's otherwise, which takes no 4-bit base.

source  Yang et al. 2024, arXiv:2406.05223, section 3; scaling and damping are those of the authors' code
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import NonFinite
from ._data import SeesData
from ._offset import Offset, offset_tensors
from ._svd import bottom, exact_svd, split, top
from .base import Site, Tensors, choose, option

DAMPING = 0.01
INVERSE_ERROR = 0.05  # the Frobenius norm of C C^-1 - I


@dataclass(frozen=True, kw_only=True)
class CorDA(SeesData, Offset):
    mode: str = option("ipm", "ipm trains what the data uses most, kpm what it uses least")

    learning_rate: ClassVar[float] = 2e-5
    rate_source: ClassVar[str] = "PEFT's CorDA example, examples/corda_finetuning, as PiSSA's"
    needs: ClassVar[str | None] = "inputs"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("mode", self.mode, ("ipm", "kpm"))

    def observe(
        self, site: Site, store: Tensors, x_TI: Tensor, g_TO: Tensor | None, labelled_T: Tensor
    ) -> None:
        if not len(x_TI):
            return
        x_TI = x_TI.float()
        largest = (
            x_TI.max().abs()
        )  # the size of the largest, as the authors have it, and not the largest size
        if not largest:
            return
        x_TI = x_TI / largest
        if not store:
            store |= {"C": x_TI.new_zeros(x_TI.shape[1], x_TI.shape[1]), "batches": x_TI.new_zeros(())}
        store["C"] += x_TI.T @ x_TI
        store["batches"] += 1

    def found(self, site: Site, store: Tensors) -> Tensors:
        if not store:
            return {}
        c_II, inverse_II = damped(store["C"] / store["batches"], site.layer.key)
        w_OI = site.layer.weight(torch.float32).to(c_II.device)
        u_OK, s_K, v_KI = (top if self.mode == "ipm" else bottom)(exact_svd(w_OI @ c_II), site.method.r)
        assert isinstance(site.method, CorDA)
        spare = (site.p["A"].detach(), site.p["B"].detach())
        return offset_tensors(*split((u_OK, s_K, v_KI @ inverse_II), site.method.scale, spare))


def damped(c_II: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """C made regular, and its inverse.

    raises  NonFinite if C is not finite
    """
    if not bool(c_II.isfinite().all()):
        raise NonFinite(
            f"{name}: its inputs are not finite", hint="look at the data, or use a wider model.dtype"
        )
    eye_II = torch.eye(len(c_II), device=c_II.device)
    size, damping = c_II.diagonal().mean(), DAMPING
    while True:
        regular_II = c_II + damping * size * eye_II
        inverse_II = torch.linalg.inv(regular_II)
        if float(torch.dist(regular_II @ inverse_II, eye_II)) < INVERSE_ERROR:
            return regular_II, inverse_II
        damping *= 2
