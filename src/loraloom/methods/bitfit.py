"""BitFit: train every bias and nothing else.

    y = x W^T + bias'

Biases of norms count too. A model without biases (Llama and its like) has nothing to train; there `add_missing`
gives every linear layer a bias of zero, which is more than BitFit, and cannot be merged into such a model.

source  Ben Zaken et al. 2021, arXiv:2106.10199; the baseline of Hu et al. 2021, arXiv:2106.09685, section 5.1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..layers import Layer
from .base import Method, Tensors, option


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    add_missing: bool = option(False, "give linear layers without a bias one of zero, and train it")

    learning_rate: ClassVar[float] = 1e-3
    rate_source: ClassVar[str] = "the upper end of the range that the BitFit paper searches, 1e-4 to 1e-3"
    ranked: ClassVar[bool] = False
    own_places: ClassVar[bool] = True

    def auto_targets(self) -> tuple[str, ...]:
        return ("all-linear",) if self.add_missing else ()

    def at(self, layer: Layer) -> Method | None:
        return None if layer.bias() is not None else self

    def trains_whole(self) -> str:
        return "biases"

    @property
    def mergeable(self) -> bool:
        return not self.add_missing

    def init(self, layer: Layer, gen: torch.Generator) -> Tensors:
        return {"b": nn.Parameter(torch.zeros(layer.out_features))}

    def update(self, layer: Layer, p: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return p["b"].expand_as(y)
