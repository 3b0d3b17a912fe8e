"""LoftQ: start from what quantising took away, so that a 4-bit base begins nearer to the original.

    Q = the base's weight as 4 bits stand for it
    s B A = U_r S_r V_r^T,  the r largest singular values of W - Q        A = sqrt(S_r / s) V_r^T, B = U_r sqrt(S_r / s)
    y = x Q^T + s (x A^T) B^T + bias

||W - (Q + s B A)|| is what is left of the spectrum of W - Q. The layer is therefore not the quantised one at
the start but a better one, and it needs W as it was: the original files are read once, layer by layer.

One step of the paper's alternation. Its further steps quantise W - s B A in turn, which is another base, and
no method writes one. The rate is LoRA's, whose form this is after the start.

PEFT does not divide by s and so adds s (W - Q)'s top part: right if alpha = r, and at alpha = 2r as far from
W as without any correction.

source  Li et al. 2023, arXiv:2310.08659, algorithm 1 with T = 1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._svd import exact_svd, split, top
from .base import Site, Tensors
from .lora import LoRA


@dataclass(frozen=True, kw_only=True)
class LoftQ(LoRA):
    needs: ClassVar[str | None] = "originals"
    rate_source: ClassVar[str] = "LoRA's: the authors' scripts train both alike"

    @property
    def identity(self) -> bool:
        return False

    def from_original(self, site: Site, w_OI: Tensor) -> Tensors:
        q_OI = site.layer.weight(torch.float32)
        lost = top(exact_svd(w_OI.to(q_OI) - q_OI), self.r)
        a_RI, b_OR = split(lost, self.scale, (site.p["A"].detach(), site.p["B"].detach()))
        return {"A": nn.Parameter(a_RI), "B": nn.Parameter(b_OR)}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        return None  # its files are LoRA's, on a base that PEFT rewrote if they say `loftq`
