"""PreLayer: at special tokens, trained vectors stand in place of the hidden states that every block reads.

    L D (l_p + l_i) parameters: the embeddings, and what the first L - 1 blocks give on

The last block's output is left: it would only replace what the head reads, and behind the infix the first
word of every answer would be the same. This is not PEFT's prefix tuning, which trains keys and values.

source  the baseline PreLayer of Hu et al. 2021, arXiv:2106.09685, section 5.1 and its |Theta|; Li and Liang
        2021, arXiv:2101.00190
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ._prefix import Prefix


@dataclass(frozen=True, kw_only=True)
class PrefixLayer(Prefix):
    learning_rate: ClassVar[float] = 2e-3
    rate_source: ClassVar[str] = (
        "10 times LoRA's, unpublished; the LoRA paper calls the method sensitive to it"
    )

    def auto_targets(self) -> tuple[str, ...]:
        return ("embed", "inner-blocks")
