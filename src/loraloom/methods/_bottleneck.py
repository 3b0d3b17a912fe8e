"""Bottleneck adapters: a small network on a layer's output, in a residual of its own.

    y + W_up f(W_down n(y) + b_down) + b_up        n: nothing, or a LayerNorm

W_up and b_up start at zero, so that the model is unchanged; the papers start near zero instead.

shapes  D features, r the bottleneck; W_down (r, D), W_up (D, r)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..layers import Layer
from .base import Method, Tensors, option

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    activation: str = option("gelu", "the nonlinearity: relu or gelu")

    rate_source: ClassVar[str] = "LoRA's; the adapter papers search 3e-5 to 3e-3"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation is {self.activation!r}", hint="it can be relu or gelu")

    @property
    def mergeable(self) -> bool:
        return False

    def init(self, layer: Layer, gen: torch.Generator) -> Tensors:
        width = layer.out_features
        bound = width**-0.5
        w_down = torch.empty(self.r, width).uniform_(-bound, bound, generator=gen)
        return {
            "W_down": nn.Parameter(w_down),
            "b_down": nn.Parameter(torch.zeros(self.r)),
            "W_up": nn.Parameter(torch.zeros(width, self.r)),
            "b_up": nn.Parameter(torch.zeros(width)),
        }

    def normed(self, p: Tensors, y: Tensor) -> Tensor:
        """What goes into the bottleneck."""
        return y

    def update(self, layer: Layer, p: Tensors, x: Tensor, y: Tensor) -> Tensor:
        z = ACTIVATIONS[self.activation](F.linear(self.normed(p, y), p["W_down"], p["b_down"]))
        return F.linear(z, p["W_up"], p["b_up"])
