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

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..layers import EmbeddingLayer, Layer
from .base import LowRank, Pair, Site, Tensors, option, unique


@dataclass(frozen=True, kw_only=True)
class LoRA(LowRank):
    lr_ratio: float = option(1.0, "learning rate of B over that of A; above 1 this is LoRA+")

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

    def init(self, layer: Layer, gen: torch.Generator) -> Tensors:
        """A (r, I) and B (O, r)."""
        a_RI, b_OR = torch.empty(self.r, layer.in_features), torch.empty(layer.out_features, self.r)
        if isinstance(layer, EmbeddingLayer):
            a_RI.zero_()
            b_OR.normal_(generator=gen)
        else:
            bound = layer.in_features**-0.5
            a_RI.uniform_(-bound, bound, generator=gen)
            b_OR.zero_()
        return {"A": nn.Parameter(a_RI), "B": nn.Parameter(b_OR)}

    def pair(self, layer: Layer, p: Tensors) -> Pair:
        return Pair(p["A"], p["B"], self.scale)

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
