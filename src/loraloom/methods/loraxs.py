"""LoRA-XS: train an r x r matrix between two frozen ones that come from W itself.

    W = U S V^T        A = S_r V_r^T,   B = U_r        y = x W^T + s x (B R A)^T + bias        s = alpha / r

         x_I --- A (r, I) --- R (r, r) --- s --- B (O, r) --- + y_O        A, B frozen

R is drawn from N(0, 1e-5^2): at the start the model is unchanged but for that. A layer trains r^2 numbers,
whatever its width.

which=top takes the largest singular values, as the paper; `bottom` the smallest. niter=0 decomposes W exactly;
niter=k takes k steps of a randomised method, seconds where the exact one takes minutes. The authors' code takes
10, and alpha equal to r. On a 4-bit base W is what it dequantises to. A singular vector's sign, and those of equal
values, depend on the machine: A and B belong to the adapter.

source  Balazy et al. 2024, arXiv:2405.17604, section 3; the start of R as in the authors' code
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..errors import UserError
from ..layers import Layer
from ._svd import bottom, decomposed, top
from .base import LowRank, Pair, Tensors, check, choose, option


@dataclass(frozen=True, kw_only=True)
class LoRAXS(LowRank):
    which: str = option("top", "the singular values that A and B come from: top or bottom")
    niter: int = option(0, "steps of the fast decomposition, such as 4 or 16; 0 is the exact one")

    learning_rate: ClassVar[float] = 4e-3
    rate_source: ClassVar[str] = "the authors' script for MetaMathQA with Mistral-7B, r = 64"

    @property
    def identity(self) -> bool:
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("which", self.which, ("top", "bottom"))
        check("niter", self.niter, whole=True, least=0)
        if self.which == "bottom" and self.niter:
            raise UserError(
                f"method.niter is {self.niter}, and the fast decomposition finds the largest values only",
                hint="set method.niter=0, or method.which=top",
            )

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.r

    def init(self, layer: Layer, gen: torch.Generator) -> Tensors:
        w_OI = layer.weight(torch.float32)
        found = decomposed(w_OI, self.r, self.niter, gen)
        u_OR, s_R, v_RI = (top if self.which == "top" else bottom)(found, self.r)
        start_RR = 1e-5 * torch.randn(len(s_R), len(s_R), generator=gen)
        a_RI = (s_R[:, None] * v_RI).contiguous()
        return {"A": a_RI, "B": u_OR.contiguous(), "R": nn.Parameter(start_RR)}

    def pair(self, layer: Layer, p: Tensors) -> Pair:
        return Pair(p["A"], p["B"] @ p["R"], self.scale)
