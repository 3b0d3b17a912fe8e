"""PreEmbed: embeddings of special tokens in the prefix, and before the answer, are all that trains.

    D (l_p + l_i) parameters

It is PEFT's prompt tuning when there is no infix. It takes up l_p + l_i places of the context.

source  the baseline PreEmbed of Hu et al. 2021, arXiv:2106.09685, section 5.1; Lester et al. 2021,
        arXiv:2104.08691
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ._prefix import Prefix


@dataclass(frozen=True, kw_only=True)
class PrefixEmbedding(Prefix):
    learning_rate: ClassVar[float] = 5e-3
    rate_source: ClassVar[str] = "25 times LoRA's, unpublished: few vectors must move far; search it"

    peft_type: ClassVar[str | None] = "PROMPT_TUNING"

    @property
    def peft_shared(self) -> Mapping[str, str]:  # type: ignore[override]
        return {} if self.infix else {"P": "prompt_embeddings"}  # PEFT has no infix

    def auto_targets(self) -> tuple[str, ...]:
        return ("embed",)

    def peft_config(self) -> dict[str, Any]:
        return {"num_virtual_tokens": self.prefix}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        count = config.get("num_virtual_tokens")
        return {"prefix": count} if count else None
