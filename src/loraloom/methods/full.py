"""Full fine-tuning: every weight of the model trains, in a float32 copy beside the frozen base.

    y = x (W')^T + bias'        W' starts as W

The base stays as it is, as for every method; so the memory is that of the base (2 bytes a weight in 16 bits) and
of the copies, their gradients and AdamW's moments in float32 (16 bytes a weight).

source  the baseline FT of Hu et al. 2021, arXiv:2106.09685, section 5.1; the learning rate is a tenth of
        LoRA's, the ratio of "LoRA Without Regret", Schulman et al. 2025
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Method


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    learning_rate: ClassVar[float] = 2e-5
    rate_source: ClassVar[str] = "a tenth of LoRA's: Schulman et al. 2025, LoRA Without Regret"
    ranked: ClassVar[bool] = False
    own_places: ClassVar[bool] = True

    def auto_targets(self) -> tuple[str, ...]:
        return ()

    def trains_whole(self) -> str:
        return "everything"
