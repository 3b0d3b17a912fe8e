"""AdapterL: Lin's bottleneck adapter, one after each block, behind a LayerNorm of its own.

    h' = block(h)        h' + W_up f(W_down LayerNorm(h') + b_down) + b_up

2 D r + r + D parameters a block, and 2 D of its LayerNorm.

source  Lin et al. 2020, arXiv:2004.03829, section 3.3; the count of Hu et al. 2021, arXiv:2106.09685, 5.1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Layer
from ._bottleneck import Bottleneck
from .base import Tensors, option


@dataclass(frozen=True, kw_only=True)
class AdapterL(Bottleneck):
    activation: str = option("relu", "the nonlinearity: relu or gelu")

    own_places: ClassVar[bool] = True

    def auto_targets(self) -> tuple[str, ...]:
        return ("blocks",)

    def init(self, layer: Layer, gen: torch.Generator) -> Tensors:
        width = layer.out_features
        norm = {"norm.w": nn.Parameter(torch.ones(width)), "norm.b": nn.Parameter(torch.zeros(width))}
        return super().init(layer, gen) | norm

    def normed(self, p: Tensors, y: Tensor) -> Tensor:
        return F.layer_norm(y, y.shape[-1:], p["norm.w"], p["norm.b"])
