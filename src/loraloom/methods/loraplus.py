"""LoRA+: let B learn faster than A.

    lr_A = lr,   lr_B = lr_ratio * lr

Everything else is LoRA; `lr_ratio` is a setting of every method with A and B, and 16 here, the value the
authors found to work across models. Use about half of LoRA's rate when the ratio is large.

source  Hayou et al. 2024, arXiv:2402.12354
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .base import option
from .lora import LoRA


@dataclass(frozen=True, kw_only=True)
class LoRAPlus(LoRA):
    lr_ratio: float = option(16.0, "learning rate of B over that of A")

    learning_rate: ClassVar[float] = 1e-4
    rate_source: ClassVar[str] = "half of LoRA's, as PEFT's guide to LoRA+ advises for a large ratio"

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        return None  # its files are LoRA's
