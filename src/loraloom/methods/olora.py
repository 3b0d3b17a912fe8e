"""OLoRA: start from an orthonormal B, taken from W by a QR decomposition.

    W = Q R        B0 = Q[:, :r],   A0 = R[:r]
    y = x W^T + s x (B A - B0 A0)^T + bias

W is never written (see PiSSA). As in PEFT nothing is divided by s, so that s B0 A0 is s times a part of W:
it cancels at the start, whatever alpha is. A0 and B0 come from a 4-bit base's dequantised numbers.

On a Conv1D PEFT decomposes the transpose and then has A and B the wrong way round: its forward pass fails, or
is not the base's if W is square. Here all layers start alike.

source  Buyukakyuz 2024, arXiv:2406.01775, section 3; not dividing by s is PEFT's convention
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..layers import Layer
from ._offset import Offset


@dataclass(frozen=True, kw_only=True)
class OLoRA(Offset):
    learning_rate: ClassVar[float] = 7.5e-5
    rate_source: ClassVar[str] = "PEFT's example of OLoRA, 3e-4 at s = 1/2; in proportion, s being 2 here"

    def start(self, layer: Layer, gen: torch.Generator) -> tuple[Tensor, Tensor]:
        b_OK, a_KI = torch.linalg.qr(layer.weight(torch.float32))
        return a_KI[: self.r], b_OK[:, : self.r]

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """A file of OLoRA on linear layers."""
        other = any(config.get(key) for key in ("use_rslora", "use_dora", "fan_in_fan_out"))
        return {} if not other and str(config.get("init_lora_weights")).lower() == "olora" else None
