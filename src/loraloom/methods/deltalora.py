"""Delta-LoRA: W moves too, by lambda times each change of s B A.

    y = x W_t^T + s (x A^T) B^T + bias
    W_t = W_t-1 + lambda s (B_t A_t - B_t-1 A_t-1)        after step t, once t > K

W needs no gradient and no moments for that. Here it does not move either: the changes add up to a difference
from (A_K, B_K), the pair right after the last step that moved no W, and the layer adds

    z + lambda (z' - z_K)        z = s B (A x), z' the same without gradients to A and B, z_K = s B_K (A_K x)

so that A and B have LoRA's gradient, x has that of the moved W, and a base in 4 bits, or one that others share,
will do. It costs a second thin pair. The sum is a pair of 2r rows,

    (1 + lambda) B A - lambda B_K A_K = [B + lambda (B - B_K), lambda B_K] [A; A - A_K]

of which the second part is exactly zero until K: up to there the output is LoRA's to the last bit.

source  Zi et al. 2023, arXiv:2309.02411; lambda = 2 and K = 500 are the main settings of the authors' code. The
        branch is ours: tests/test_step_methods.py compares it with a W that is moved in place
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import UserError
from ..layers import Layer
from .base import Pair, Site, Tensors, option
from .lora import LoRA


@dataclass(frozen=True, kw_only=True)
class DeltaLoRA(LoRA):
    lam: float = option(2.0, "lambda: how much of each change of s B A goes into W as well")
    start: int = option(500, "K: steps before W moves; a run of K steps or fewer is plain LoRA")

    rate_source: ClassVar[str] = "LoRA's; the paper tunes it per task"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lam >= 0:
            raise UserError(f"lam is {self.lam!r}", hint="it is zero or more; zero is plain LoRA")
        if not isinstance(self.start, int) or self.start < 0:
            raise UserError(f"start is {self.start!r}", hint="it is a number of steps, from 0 up")

    def init(self, layer: Layer, gen: torch.Generator) -> Tensors:
        p = super().init(layer, gen)
        return p | {"A_K": p["A"].detach().clone(), "B_K": p["B"].detach().clone()}

    def pair(self, layer: Layer, p: Tensors) -> Pair:
        a_RI, b_OR, lam = p["A"], p["B"], self.lam
        # (1 + lambda) B multiplies A, and A's gradient is to be that of B A
        a_RI = a_RI.detach() + (a_RI - a_RI.detach()) / (1 + lam)
        rows = torch.cat([a_RI, a_RI - p["A_K"]])
        columns = torch.cat([b_OR + lam * (b_OR.detach() - p["B_K"]), lam * p["B_K"]], dim=1)
        return Pair(rows, columns, self.scale)

    @torch.no_grad()
    def after_step(self, sites: Sequence[Site], step: int, num_steps: int) -> None:
        """Up to and with step K, take the pair along; from then on it stays."""
        if step < self.start:
            for site in sites:
                site.p["A_K"].copy_(site.p["A"])
                site.p["B_K"].copy_(site.p["B"])

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        return None
