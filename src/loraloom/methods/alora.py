"""aLoRA: LoRA that works only from an invocation on, so that what stands before it is the base's own.

    y_t = x_t W^T + on_t * s (x_t A^T) B^T + bias
    on_t = 1 from the first token of the document's last invocation on, 0 before it and where there is none

The cache of keys and values of the text before the invocation is the base's, and can be used again by every
such adapter. The invocation is a run of token ids; the data must hold it, once in each example as a rule.
It cannot be merged: a merged weight works on every token.

source  Greenewald et al. 2025, arXiv:2504.12397, section 3
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from .base import option
from .lora import LoRA


@dataclass(frozen=True, kw_only=True)
class ALoRA(LoRA):
    r: int = option(32, "the rank; the paper's, which works with less only on easy tasks")
    alpha: float = option(64.0, "the scale's numerator")
    invocation: str | Sequence[int] = option((), "the text, or the token ids, that switches the adapter on")

    per_token: ClassVar[bool] = True
    rate_source: ClassVar[str] = "LoRA's"
    text_options: ClassVar[tuple[str, ...]] = ("invocation",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.invocation:
            raise UserError(
                "alora needs an invocation", hint="set method.invocation to a text of your prompts"
            )
        if not isinstance(self.invocation, str | list | tuple):
            raise UserError(f"invocation is {self.invocation!r}", hint="it is a text, or a list of token ids")
        if not isinstance(self.invocation, str):
            object.__setattr__(self, "invocation", tuple(self.invocation))

    def token_mask(self, ids_BT: Tensor, position_BT: Tensor | None) -> Tensor:
        """From the start of each document's last invocation to its end."""
        if isinstance(self.invocation, str):
            raise UserError(
                "method.invocation is text, and token ids are needed here", hint="encode it first"
            )
        doc_BT = torch.zeros_like(ids_BT)
        if position_BT is not None:
            doc_BT = (position_BT.expand_as(ids_BT) == 0).long().cumsum(1)
        start_BT = starts(ids_BT, doc_BT, self.invocation)
        count_BT = start_BT.long().cumsum(1)
        before_BT, at_end_BT = (torch.zeros_like(count_BT) for _ in range(2))
        before_BT.scatter_reduce_(1, doc_BT, count_BT - start_BT.long(), "amin", include_self=False)
        at_end_BT.scatter_reduce_(1, doc_BT, count_BT, "amax", include_self=False)
        before_BT, at_end_BT = before_BT.gather(1, doc_BT), at_end_BT.gather(1, doc_BT)
        return (count_BT > before_BT) & (count_BT == at_end_BT)

    def peft_config(self) -> dict[str, Any]:
        if isinstance(self.invocation, str):
            raise UserError("method.invocation is text, and a file holds token ids", hint="encode it first")
        return {"alora_invocation_tokens": list(self.invocation)}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        tokens = config.get("alora_invocation_tokens")
        return {"invocation": list(tokens)} if tokens else None


def starts(ids_BT: Tensor, doc_BT: Tensor, run: Sequence[int]) -> Tensor:
    """Where the run of ids begins, whole and within one document: (B, T) bool."""
    length, width = len(run), ids_BT.shape[1]
    found_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    places = width - length + 1
    if places <= 0:
        return found_BT
    hit = doc_BT[:, :places] == doc_BT[:, length - 1 :]
    for offset, token in enumerate(run):
        hit &= ids_BT[:, offset : offset + places] == token
    found_BT[:, :places] = hit
    return found_BT
