"""What every method with a pair A, B shares: their start, and LoRA+'s ratio of two learning rates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..layers import EmbeddingLayer, Layer
from .base import Method, Site, Tensors, option, unique


@dataclass(frozen=True, kw_only=True)
class AB(Method):
    """A method that trains A (r, I) and B (O, r), whatever it does with them."""

    lr_ratio: float = option(1.0, "learning rate of B over that of A; above 1 this is LoRA+")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lr_ratio > 0:
            raise UserError(f"lr_ratio is {self.lr_ratio!r}", hint="it is above 0; 1 is one rate for both")

    def init(self, layer: Layer, gen: torch.Generator) -> Tensors:
        """A from U(-1/sqrt(I), 1/sqrt(I)) and B zero; on an embedding A zero and B from N(0, 1)."""
        a_RI, b_OR = torch.empty(self.r, layer.in_features), torch.empty(layer.out_features, self.r)
        if isinstance(layer, EmbeddingLayer):
            a_RI.zero_()
            b_OR.normal_(generator=gen)
        else:
            bound = layer.in_features**-0.5
            a_RI.uniform_(-bound, bound, generator=gen)
            b_OR.zero_()
        return {"A": nn.Parameter(a_RI), "B": nn.Parameter(b_OR)}

    def groups(self, sites: Iterable[Site], lr: float) -> list[dict[str, Any]]:
        """A and everything else at `lr`, B at `lr * lr_ratio`: chosen by role, never by a tensor's shape.

        source  LoRA+, Hayou et al. 2024, arXiv:2402.12354
        """
        sites = list(sites)
        b = unique(tensor for site in sites for name, tensor in _trainable(site) if name == "B")
        rest = unique(tensor for site in sites for name, tensor in _trainable(site) if name != "B")
        groups = [{"params": rest, "lr": lr}, {"params": b, "lr": lr * self.lr_ratio}]
        return [group for group in groups if group["params"]]


def _trainable(site: Site) -> list[tuple[str, nn.Parameter]]:
    return [(name, tensor) for name, tensor in site.p.items() if isinstance(tensor, nn.Parameter)]
