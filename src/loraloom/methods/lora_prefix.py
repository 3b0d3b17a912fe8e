"""LoRA and a prefix together: LoRA+PE with trained embeddings, LoRA+PL with trained hidden states too.

    LoRA's parameters and D (l_p + l_i), or L D (l_p + l_i)

In the paper the embeddings add to LoRA on WikiSQL and not on MNLI, and the hidden states hurt.

source  Hu et al. 2021, arXiv:2106.09685, appendix E and table 15
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import UserError
from ..layers import BlockLayer, EmbeddingLayer, Layer
from ._prefix import Prefix
from .base import Method, option
from .lora import LoRA


@dataclass(frozen=True, kw_only=True)
class LoRAPrefix(LoRA):
    prefix: int = option(8, "l_p: trained tokens before the text")
    infix: int = option(4, "l_i: trained tokens between the prompt and its last answer")
    kind: str = option("embedding", "embedding (LoRA+PE), or layer (LoRA+PL)")

    own_places: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = None
    rate_source: ClassVar[str] = "LoRA's"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("embedding", "layer"):
            raise UserError(f"kind is {self.kind!r}", hint="it can be embedding or layer")
        self.tokens()

    def inserts(self) -> tuple[int, int]:
        return self.prefix, self.infix

    def tokens(self) -> Prefix:
        """The method of the places where the special tokens are."""
        return Prefix(prefix=self.prefix, infix=self.infix)

    def auto_targets(self) -> tuple[str, ...]:
        return ("all-linear", "embed", *(("inner-blocks",) if self.kind == "layer" else ()))

    def at(self, layer: Layer) -> Method | None:
        return self.tokens() if isinstance(layer, EmbeddingLayer | BlockLayer) else self
