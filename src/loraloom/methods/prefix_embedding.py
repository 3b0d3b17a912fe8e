"""PreEmbed: embeddings of special tokens in the prefix, and before the answer, are all that trains.

    D (l_p + l_i) parameters

It is PEFT's prompt tuning when there is no infix. It takes up l_p + l_i places of the context.

source  the baseline PreEmbed of Hu et al. 2021, arXiv:2106.09685, section 5.1; Lester et al. 2021,
        arXiv:2104.08691
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ._prefix import Prefix


@dataclass(frozen=True, kw_only=True)
class PrefixEmbedding(Prefix):
    learning_rate: ClassVar[float] = 5e-3
    rate_source: ClassVar[str] = "25 times LoRA's, unpublished: few vectors must move far; search it"

    def auto_targets(self) -> tuple[str, ...]:
        return ("embed",)
