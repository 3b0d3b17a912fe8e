"""LoRA-FA: freeze A at its random start and train B alone.

    y = x W^T + s (x A^T) B^T + bias        s = alpha / r, A frozen
    g_B <- g_B (A A^T + 1e-8 I)^-1 / s^2    before the optimizer's step

Half of LoRA's parameters on a square layer. B's gradient needs z = x A^T, of width r, and not x: a layer's whole
input need not be kept for it. The correction makes B's step the one whose s B A comes nearest to the step of
full fine-tuning; `corrected=false` is LoRA-FA as first published. A A^T never changes, so it is inverted once.

PEFT has the correction in its LoraFAOptimizer: it inverts in every step and, where bfloat16 is at hand, rounds
the product to it; here it stays in float32. A file is LoRA's and does not say that A was frozen.

source  Zhang et al. 2023, arXiv:2308.03303; the correction and its 1e-8 by PEFT's LoraFAOptimizer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..layers import Layer
from .base import Site, Tensors, option
from .lora import LoRA


@dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
    corrected: bool = option(True, "whether B's gradient is made to match full fine-tuning's")

    rate_source: ClassVar[str] = "LoRA's, as are all settings of the paper"
    working: ClassVar[frozenset[str]] = frozenset({"inverse"})

    def init(self, layer: Layer, gen: torch.Generator) -> Tensors:
        p = super().init(layer, gen)
        a_RI = p["A"].detach()
        return {"A": a_RI, "B": p["B"]} | ({"inverse": gram_inverse(a_RI)} if self.corrected else {})

    @torch.no_grad()
    def before_step(self, sites: Sequence[Site], step: int) -> None:
        if not self.corrected:
            return
        for site in sites:
            inverse, grad = site.p["inverse"], site.p["B"].grad
            if step == 0:  # A may be another since init, such as a file's
                inverse.copy_(gram_inverse(site.p["A"]))
            if grad is not None:
                grad.copy_(grad @ inverse / site.method.scale**2)  # type: ignore[attr-defined]

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        return None  # its files are LoRA's


def gram_inverse(a_RI: Tensor) -> Tensor:
    """(A A^T + 1e-8 I)^-1, (r, r); of directions that A lacks, where r is above I, nothing."""
    return torch.linalg.pinv(
        a_RI @ a_RI.T + 1e-8 * torch.eye(len(a_RI), dtype=a_RI.dtype, device=a_RI.device)
    )
