"""DoRA: split each row of W into a length and a direction, and learn both. On a 4-bit base this is QDoRA.

    y = g * (x W^T + s (x A^T) B^T) + bias        g = m / n,   n = ||W + s B A||, a length for each row

         x_I ---- W (O, I), frozen -------------- + --- * g --- + bias --- y_O
           \\                                     /
            A (R, I) --- z_R --- s --- B (O, R) -

A and B start as LoRA's and m as the lengths of W's rows, so that g is 1 and the model unchanged. The gradient
takes n for a constant. n is found in float32 without a matrix of W's size, on a 4-bit base too:

    n^2 = ||W||^2 + s rowsum((2 W A^T + s B (A A^T)) * B)

The bias is not scaled. Dropout is on the input of A alone, and x W^T is the layer's own. PEFT, while it drops,
adds (g - 1) x' W^T with the dropped-out x': its training then differs from ours, its trained files do not.

source  Liu et al. 2024, arXiv:2402.09353, equation 5; the constant n is of its section 4.3
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import Layer
from .base import Pair, Tensors, option
from .lora import LoRA


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    rslora: bool = option(False, "divide alpha by the root of r, as rsLoRA does")

    learning_rate: ClassVar[float] = 1e-4
    rate_source: ClassVar[str] = "the paper's commonsense runs of LLaMA at r = 32: 1e-4 to 2e-4, below LoRA's"

    peft_keys: ClassVar[Mapping[str, str]] = {**LoRA.peft_keys, "m": "lora_magnitude_vector"}

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def init(self, layer: Layer, gen: torch.Generator) -> Tensors:
        """A and B as in LoRA, m (O,) the lengths of W's rows.

        raises  UserError if a row of W is all zero: it has no direction
        """
        m_O = layer.squares(torch.float32).sqrt()
        if not m_O.is_meta and not m_O.all():
            raise UserError(
                f"{layer.name}: {int((m_O == 0).sum()):,} of {len(m_O):,} rows of its weight are all zero, and "
                "DoRA learns a length and a direction for each row",
                hint="leave the layer out of target_modules, or use lora",
            )
        return super().init(layer, gen) | {"m": nn.Parameter(m_O)}

    def pair(self, layer: Layer, p: Tensors) -> Pair:
        return Pair(p["A"], p["B"], self.scale, gain=p["m"] / self.lengths(layer, p))

    @torch.no_grad()
    def lengths(self, layer: Layer, p: Tensors) -> Tensor:
        """n, (O,), in float32 or wider.

        Sums over I are taken in place, which keeps autocast from taking them in 16 bits.
        """
        a_RI, b_OR = (p[name].to(torch.promote_types(p[name].dtype, torch.float32)) for name in "AB")
        wa_OR = layer.times(a_RI).to(b_OR.device)
        aa_RR = a_RI.new_zeros(self.r, self.r).addmm_(a_RI, a_RI.T)
        cross_O = (wa_OR.mul_(2).addmm_(b_OR, aa_RR, alpha=self.scale) * b_OR).sum(1)
        square_O = layer.squares(a_RI.dtype).to(b_OR.device) + self.scale * cross_O
        return square_O.clamp_(min=0).sqrt_()

    def peft_config(self) -> dict[str, Any]:
        return {"use_dora": True, "use_rslora": self.rslora}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        return {"rslora": bool(config.get("use_rslora"))} if config.get("use_dora") else None
