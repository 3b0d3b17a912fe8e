"""Methods that start from a part of W, or of its gradient, without ever writing W.

The papers put W - s B0 A0 in W's place and train A, B from A0, B0. Here W stays, and the pair carries the
difference:

    s (B A - B0 A0) = s ([B - B0, B0] [A; A - A0])

The differences are taken in float32 before any cast, so that the update is exactly zero at the start; as two
pairs of their own, B A and - B0 A0, it would be lost to rounding in bfloat16.

shapes  A, A0 (r, I); B, B0 (O, r); the pair has 2r rows
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Layer
from .base import Pair, Tensors
from .lora import LoRA


@dataclass(frozen=True, kw_only=True)
class Offset(LoRA):
    """LoRA from (A0, B0) on, less what these are at the start."""

    def start(self, layer: Layer, gen: torch.Generator) -> tuple[Tensor, Tensor]:
        """A0 (r, I) and B0 (O, r), float32; plain LoRA's draw where data or gradients say more later."""
        plain = LoRA(r=self.r, alpha=self.alpha).init(layer, gen)
        return plain["A"].detach(), plain["B"].detach()

    def init(self, layer: Layer, gen: torch.Generator) -> Tensors:
        return offset_tensors(*self.start(layer, gen))

    def pair(self, layer: Layer, p: Tensors) -> Pair:
        rows = torch.cat([p["A"], p["A"] - p["A0"]])
        columns = torch.cat([p["B"] - p["B0"], p["B0"]], dim=1)
        return Pair(rows, columns, self.scale)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        return None


def offset_tensors(a_RI: Tensor, b_OR: Tensor) -> Tensors:
    """The four tensors of a site that starts from this pair."""
    a_RI, b_OR = a_RI.float().contiguous(), b_OR.float().contiguous()
    return {"A": nn.Parameter(a_RI), "B": nn.Parameter(b_OR), "A0": a_RI.clone(), "B0": b_OR.clone()}
