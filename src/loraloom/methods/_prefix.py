"""Tokens that are in no vocabulary: trained vectors that stand in a text's prefix and before its answer.

    p_1 ... p_lp   prompt   i_1 ... i_li   answer

Their ids follow those of the vocabulary: V is the first prefix token. The text is dressed with them where it
enters the model (Adapters.dress); on a text without them the method does nothing.

shapes  P (lp + li, D): the prefix first
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import BlockLayer, EmbeddingLayer, Layer
from .base import Method, Tensors, option


@dataclass(frozen=True, kw_only=True)
class Prefix(Method):
    prefix: int = option(8, "l_p: trained tokens before the text")
    infix: int = option(0, "l_i: trained tokens between the prompt and its last answer")

    puts: ClassVar[bool] = True
    ranked: ClassVar[bool] = False
    own_places: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.prefix < 0 or self.infix < 0 or not self.prefix + self.infix:
            raise UserError(
                f"prefix is {self.prefix} and infix {self.infix}", hint="one of them must be above 0"
            )

    def inserts(self) -> tuple[int, int]:
        return self.prefix, self.infix

    def init(self, layer: Layer, gen: torch.Generator) -> Tensors:
        """Rows of the vocabulary's table, drawn at random; behind a block, where there is none, N(0, 0.02^2)."""
        count = self.prefix + self.infix
        if isinstance(layer, EmbeddingLayer):
            rows = torch.randint(layer.in_features, (count,), generator=gen)
            start = layer.whole_weight()[rows.to(layer.device)].float()
            return {"P": nn.Parameter(layer.scaled(start).clone())}
        return {"P": nn.Parameter(torch.empty(count, layer.out_features).normal_(std=0.02, generator=gen))}

    def enter(self, layer: Layer, x: Tensor) -> Tensor:
        """Any token that the table has, in place of ours."""
        return x if isinstance(layer, BlockLayer) else x.where(x < layer.in_features, 0)

    def put(self, layer: Layer, p: Tensors, x: Tensor, y: Tensor) -> Tensor:
        """P at our tokens, in place of what stands there."""
        if isinstance(layer, BlockLayer):
            x, vocab = layer.ids_of_pass(), layer.vocab
        else:
            vocab = layer.in_features
        place = (x - vocab).clamp(min=0)
        return torch.where((x >= vocab)[..., None], p["P"][place], y)
