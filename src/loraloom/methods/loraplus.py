"""LoRA+: let B learn faster than A.

    lr_A = lr,   lr_B = lr_ratio * lr

Everything else is LoRA; `lr_ratio` is a setting of every method with A and B, and 16 here, the value the
authors found to work across models. Use about half of LoRA's rate when the ratio is large.

source  Hayou et al. 2024, arXiv:2402.12354
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import option
from .lora import LoRA


@dataclass(frozen=True, kw_only=True)
class LoRAPlus(LoRA):
    lr_ratio: float = option(16.0, "learning rate of B over that of A")

    learning_rate: ClassVar[float] = 1e-4
