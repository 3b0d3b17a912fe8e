"""Rows with labels to micro-batches: each padded on the right to the longest, with a mask.

The same rows give the same loss however they are split: it is summed over rows and divided by those of the whole step.

source  tests/test_classify.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .packing import TOKENS, by_length


@dataclass(frozen=True)
class Padded:
    """One micro-batch.

    shapes  ids, mask, token and types are (B, T) int64; label is (B,) float64
    """

    ids: Tensor
    mask: Tensor  # 1 where a token is, 0 in padding
    types: Tensor | None  # which text of a pair a token belongs to; None where the model is not told
    token: Tensor  # the example's number in the step * 2**20 + the place in it; 0 in padding
    label: Tensor  # a class's number, or a number
    targets: int  # rows
    rows: list[str]
    spans: list[tuple[int, int, int]]  # (b, start, stop) of each row's tokens
    members: list[int]  # the number of each row among those that were given

    def each(self, change: Callable[[Tensor], Tensor]) -> Padded:
        """The same batch with every tensor changed, such as copied."""
        return replace(
            self,
            ids=change(self.ids),
            mask=change(self.mask),
            types=None if self.types is None else change(self.types),
            token=change(self.token),
            label=change(self.label),
        )

    def to(self, device: torch.device | str) -> Padded:
        """The same batch on a device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with."""
        given = {"input_ids": self.ids, "attention_mask": self.mask}
        return given if self.types is None else given | {"token_type_ids": self.types}

    def alone(self) -> Iterator[Padded]:
        """Each row as a batch of its own, without padding."""
        for b, _, size in self.spans:

            def own(tensor: Tensor, b: int = b, size: int = size) -> Tensor:
                return tensor[b : b + 1] if tensor.dim() == 1 else tensor[b : b + 1, :size]

            one = replace(
                self.each(own),
                targets=1,
                rows=[self.rows[b]],
                spans=[(0, 0, size)],
                members=[self.members[b]],
            )
            yield one


def pad_rows(examples: Sequence[Any], *, micro_tokens: int, pad_id: int) -> list[Padded]:
    """The micro-batches of some labelled examples, rows of similar length together.

    micro_tokens  most tokens of a batch, padding included; only a longer example may exceed it, on its own
    """
    if micro_tokens < 1:
        raise ValueError(f"micro_tokens is {micro_tokens}")
    return [padded(group, pad_id) for group in by_length(list(enumerate(examples)), micro_tokens)]


def padded(members: Sequence[tuple[int, Any]], pad_id: int) -> Padded:
    """The tensors of some examples, each with its number."""
    width = max(len(example.ids) for _, example in members)
    ids = torch.full((len(members), width), pad_id)
    mask, types, token = (torch.zeros_like(ids) for _ in range(3))
    for b, (number, example) in enumerate(members):
        size = len(example.ids)
        ids[b, :size] = torch.tensor(example.ids)
        mask[b, :size] = 1
        token[b, :size] = torch.arange(number * TOKENS, number * TOKENS + size)
        if example.types:
            types[b, :size] = torch.tensor(example.types)
    told = any(example.types for _, example in members)
    return Padded(
        ids,
        mask,
        types if told else None,
        token,
        torch.tensor([example.label for _, example in members], dtype=torch.float64),
        len(members),
        [example.row for _, example in members],
        [(b, 0, len(example.ids)) for b, (_, example) in enumerate(members)],
        [number for number, _ in members],
    )
