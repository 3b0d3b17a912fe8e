"""HiRA: change W by its elementwise product with a low-rank matrix, which has a high rank.

    y = x (W + W * (B A))^T + bias

B is zero and A LoRA's at the start (on an embedding A is zero and B is drawn), so that the model is unchanged.
There is no alpha: W's own size is the scale, so that each weight moves in proportion to itself, and the rate
can be far above LoRA's.

W * (B A) has W's size and is needed in every forward pass, on a 4-bit base with W dequantised. It is not kept
for the backward pass but made again, so that layers hold nothing of that size between the two. A lookup needs
none of it: there x (W * (B A))^T = (x W^T) * (x (B A)^T), and x W^T is the layer's own output.

That also holds for tables that scale what they look up; PEFT leaves the scale out of the update, and takes
zeros for the padding of a convolution whatever its mode is.

source  Huang et al., ICLR 2025, https://openreview.net/forum?id=TwJrTz9cRS
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layers import EmbeddingLayer, Layer
from ._ab import AB
from .base import Tensors, option


@dataclass(frozen=True, kw_only=True)
class HiRA(AB):
    r: int = option(32, "the rank of BA")
    alpha: float = option(32.0, "not used: W's own size is the scale")

    learning_rate: ClassVar[float] = 4.5e-3
    rate_source: ClassVar[str] = "PEFT's MetaMathQA benchmark of Llama-3.2-3B, r = 32"

    peft_type: ClassVar[str | None] = "HIRA"
    peft_keys: ClassVar[Mapping[str, str]] = {"A": "hira_A", "B": "hira_B"}

    def update(self, layer: Layer, p: Tensors, x: Tensor, y: Tensor) -> Tensor:
        if isinstance(layer, EmbeddingLayer):  # y has the table's scale already
            return y * F.linear(F.embedding(x, p["A"].T), p["B"])
        updated: Tensor = _Hadamard.apply(
            x.to(p["A"].dtype), p["A"], p["B"], layer
        )  # autocast leaves x wider
        return updated

    def delta(self, layer: Layer, p: Tensors) -> Tensor:
        return weighted(layer, p["A"], p["B"])

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        return {}


def weighted(layer: Layer, a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """W * (B A), (O, I), in A's dtype."""
    ba_OI = b_OR @ a_RI
    return ba_OI.mul_(layer.weight(ba_OI.dtype).to(ba_OI.device))


class _Hadamard(torch.autograd.Function):
    """x (W * (B A))^T, which keeps x, A and B alone.

    With M = W * (B A):   dx = dy M,   dM = dy^T x,   dA = B^T (dM * W),   dB = (dM * W) A^T
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a_RI: Tensor, b_OR: Tensor, layer: Layer) -> Tensor:
        ctx.save_for_backward(x, a_RI, b_OR)
        ctx.layer = layer
        return layer.down(x, weighted(layer, a_RI, b_OR))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a_RI, b_OR = ctx.saved_tensors
        layer: Layer = ctx.layer
        dx, dm_OI = backward_of_down(layer, x, weighted(layer, a_RI, b_OR), dy, ctx.needs_input_grad[0])
        dm_OI = dm_OI * layer.weight(dm_OI.dtype)
        return dx, b_OR.T @ dm_OI, dm_OI @ a_RI.T, None


def backward_of_down(
    layer: Layer, x: Tensor, m_OI: Tensor, dy: Tensor, wants_dx: bool
) -> tuple[Tensor | None, Tensor]:
    """The gradients of x and M in `layer.down(x, M)`."""
    if type(layer).down is Layer.down:  # a product: autograd would have to take it once more
        dx = dy @ m_OI if wants_dx else None
        return dx, dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    with torch.enable_grad():
        x, m_OI = x.detach().requires_grad_(wants_dx), m_OI.requires_grad_()
        y = layer.down(x, m_OI)
    *dx_, dm_OI = torch.autograd.grad(y, [x, m_OI] if wants_dx else [m_OI], dy)
    return dx_[0] if dx_ else None, dm_OI
