"""LoRA: learn a low-rank change of a frozen weight.

    y = x W^T + s (x A^T) B^T + bias        s = alpha / r

         x_I ---- W (O, I), frozen -------------- + --- y_O
           \\                                     /
            A (R, I) --- z_R --- s --- B (O, R) -

A is drawn from U(-1/sqrt(I), 1/sqrt(I)) and B is zero, so that the model is unchanged at the start. On an
embedding the parts change: A is zero and B is drawn from N(0, 1).

source  Hu et al. 2021, arXiv:2106.09685, section 4.1; the draw of A is that of the authors' code
        (kaiming_uniform with a = sqrt(5)), where the paper says Gaussian
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..layers import Layer
from ._ab import AB
from .base import LowRank, Pair, Tensors


@dataclass(frozen=True, kw_only=True)
class LoRA(AB, LowRank):
    peft_type: ClassVar[str | None] = "LORA"
    peft_keys: ClassVar[Mapping[str, str]] = {"A": "lora_A.weight", "B": "lora_B.weight"}

    @staticmethod
    def denominator(r: int) -> float:
        """What alpha is divided by."""
        return float(r)

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.denominator(self.r)

    def pair(self, layer: Layer, p: Tensors) -> Pair:
        return Pair(p["A"], p["B"], self.scale)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        return {}  # the plainest of its peft_type: asked last
