"""VeRA: random matrices that all layers share, and two trained vectors for each layer.

    y = x W^T + lambda_b * (B (lambda_d * (A x))) + bias

         x_I --- A[:, :I] --- * lambda_d --- B[:O] --- * lambda_b --- + y_O        A, B frozen

A (r, I max) and B (O max, r) are as large as the largest layer and drawn from U(-b, b), b = sqrt(6 / columns):
Kaiming's rule for a ReLU. lambda_d starts at `d_initial` and lambda_b at zero, so that the model is unchanged
at the start. There is no alpha: the learning rate does its work, about ten times LoRA's. A layer trains O + r
numbers; what it costs in time is LoRA's at the same, large, r.

One A and B, so one r for all layers: `rank_pattern` and `alpha_pattern` have nothing to change.
On a bfloat16 base PEFT rounds A and B to it for good; here they stay float32 and are cast to compute.

source  Kopiczko et al. 2023, arXiv:2310.11454; r as in its runs of RoBERTa-large, d_initial by its table 6.
        A and B by PEFT's rule, bit for bit
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import UserError
from ..layers import Layer
from ._frozen import Frozen
from .base import LowRank, Pair, Tensors, option


@dataclass(frozen=True, kw_only=True)
class VeRA(Frozen, LowRank):
    r: int = option(256, "the rank of the frozen pair")
    alpha: float = option(32.0, "not used: lambda_b takes its place")
    d_initial: float = option(0.1, "where lambda_d starts")

    learning_rate: ClassVar[float] = 4e-3
    rate_source: ClassVar[str] = "the paper's instruction tuning of Llama, ten times its LoRA's"

    peft_type: ClassVar[str | None] = "VERA"
    peft_keys: ClassVar[Mapping[str, str]] = {"lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"}
    peft_shared: ClassVar[Mapping[str, str]] = {"A": "vera_A", "B": "vera_B"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.d_initial) or self.d_initial == 0:
            raise UserError(
                f"d_initial is {self.d_initial!r}",
                hint="with lambda_b at zero too, nothing would ever move: use a small number, such as 0.1",
            )

    def bases(self, layers: Sequence[Layer], gen: torch.Generator) -> Tensors:
        wide_I, wide_O = (max(getattr(x, side) for x in layers) for side in ("in_features", "out_features"))
        a_RI = nn.init.kaiming_uniform_(torch.empty(self.r, wide_I), generator=gen)
        b_OR = nn.init.kaiming_uniform_(torch.empty(wide_O, self.r), generator=gen)
        return {"A": a_RI, "B": b_OR}

    def vectors(self, layer: Layer) -> Tensors:
        return {
            "lambda_d": nn.Parameter(torch.full((self.r,), float(self.d_initial))),
            "lambda_b": nn.Parameter(torch.zeros(layer.out_features)),
        }

    def pair(self, layer: Layer, p: Tensors) -> Pair:
        a_RI, b_OR = p["A"][:, : layer.in_features], p["B"][: layer.out_features]
        return Pair(a_RI, b_OR, p["lambda_d"], out=p["lambda_b"], shared=True)

    def peft_config(self) -> dict[str, Any]:
        return {
            "projection_prng_key": self.projection_seed,
            "save_projection": True,
            "d_initial": self.d_initial,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        return {
            "projection_seed": config.get("projection_prng_key", 0),
            "d_initial": config.get("d_initial", 0.1),
        }
