"""rsLoRA: divide by sqrt(r), so that the update keeps its size as r grows.

    s = alpha / sqrt(r)

With alpha/r the output shrinks as r grows, and a high rank behaves like a low one. Do not carry alpha over
from LoRA: alpha = 32 at r = 16 is s = 2 there and s = 8 here.

source  Kalajdzievski 2023, arXiv:2312.03732
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .lora import LoRA


@dataclass(frozen=True, kw_only=True)
class RsLoRA(LoRA):
    @staticmethod
    def denominator(r: int) -> float:
        return math.sqrt(r)

    def peft_config(self) -> dict[str, Any]:
        return {"use_rslora": True}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        return {} if config.get("use_rslora") and not config.get("use_dora") else None
