"""MiLoRA: train the part of W that matters least to it, its r smallest singular values.

    W = U S V^T, S falling        s B0 A0 = the last r terms of  sum_i S_i u_i v_i^T
    y = x W^T + s x (B A - B0 A0)^T + bias

PiSSA with the other end of the spectrum: what W has learnt stays, and what is tuned is its noise. W is never
written (see PiSSA), and A0 and B0 come from a 4-bit base's dequantised numbers. PEFT does not have it: its
adapters leave as plain LoRA of rank 2r.

A0 and B0 are about as large as LoRA's A, so its rate is LoRA's.

source  Wang et al. 2024, arXiv:2406.09044, section 3
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..layers import Layer
from ._offset import Offset
from ._svd import bottom, exact_svd, split


@dataclass(frozen=True, kw_only=True)
class MiLoRA(Offset):
    rate_source: ClassVar[str] = "LoRA's: the start is of about its size"

    def start(self, layer: Layer, gen: torch.Generator) -> tuple[Tensor, Tensor]:
        least = bottom(exact_svd(layer.weight(torch.float32)), self.r)
        return split(least, self.scale, super().start(layer, gen))
