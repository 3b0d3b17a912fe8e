"""PiSSA: train the part of W that matters most to it, its r largest singular values.

    W = U S V^T        s B0 A0 = U_r S_r V_r^T        A0 = sqrt(S_r / s) V_r^T,   B0 = U_r sqrt(S_r / s)
    y = x W^T + s x (B A - B0 A0)^T + bias

A and B start from A0 and B0. The paper writes W - s B0 A0 in W's place; here W stays, and the difference is
the update, zero at the start to the last bit even in bfloat16, where the paper's sum loses W's rounding. The
division by s makes B0 A0 the true top part whatever alpha is. Under dropout, too, the layer starts as it was:
PEFT drops inputs of B A alone, and so of the part of W that it holds.

niter=0 decomposes W exactly. niter=k takes k steps of a randomised method, seconds where the exact one takes
minutes; by the paper 16 train like it. On a 4-bit base A0 and B0 come from its dequantised numbers. That is
not the paper's QPiSSA, which quantises W - s B0 A0: a base of its own.

A0 and B0 are large, and W moves several times as far as LoRA moves it in a step of the same rate. The paper
trains both at 2e-5, a tenth of LoRA's usual rate: compare them only after a search for the rate of each.

source  Meng et al. 2024, arXiv:2404.02948, section 3
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..layers import Layer
from ._offset import Offset
from ._svd import decomposed, split, top
from .base import check, option


@dataclass(frozen=True, kw_only=True)
class PiSSA(Offset):
    niter: int = option(0, "steps of the fast decomposition, such as 4 or 16; 0 is the exact one")

    learning_rate: ClassVar[float] = 2e-5
    rate_source: ClassVar[str] = "the PiSSA paper, its setup for language models (table 2)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check("niter", self.niter, whole=True, least=0)

    def start(self, layer: Layer, gen: torch.Generator) -> tuple[Tensor, Tensor]:
        w_OI = layer.weight(torch.float32)
        found = decomposed(w_OI, self.r, self.niter, gen)
        return split(top(found, self.r), self.scale, super().start(layer, gen))

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """A file of exact PiSSA; the start of `pissa_niter_k` was drawn at random and cannot be had again."""
        plain = not (config.get("use_rslora") or config.get("use_dora"))
        return {} if plain and config.get("init_lora_weights") == "pissa" else None
