"""Tokenised examples with labels, one and many.

shapes  N tokens of n examples
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor


@dataclass(frozen=True)
class LabelledExample:
    """One example; types is empty where the model does not tell a pair's texts apart by them."""

    ids: list[int]
    types: list[int]
    label: float  # a class's number, or a number
    row: str


class LabelledExamples(Sequence[LabelledExample]):
    """Many examples in few tensors.

    shapes  ids (N,) int32 and types (N,) or (0,) uint8; offsets (n + 1,) int64; labels (n,) float64
    """

    def __init__(self, ids: Tensor, types: Tensor, offsets: Tensor, labels: Tensor, rows: list[str]) -> None:
        self.ids, self.types, self.offsets, self.labels, self.rows = ids, types, offsets, labels, rows

    @classmethod
    def build(cls, drafts: Iterable[Any]) -> LabelledExamples:
        ids, types, offsets, labels, names = array("i"), bytearray(), [0], [], []
        for draft in drafts:
            ids.extend(draft.ids)
            types += draft.types
            offsets.append(len(ids))
            labels.append(draft.label)
            names.append(draft.row)
        return cls(
            torch.tensor(ids, dtype=torch.int32),
            torch.tensor(list(types), dtype=torch.uint8),
            torch.tensor(offsets),
            torch.tensor(labels, dtype=torch.float64),
            names,
        )

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Everything that a run depends on."""
        return self.ids, self.types, self.offsets, self.labels

    @property
    def lengths(self) -> Tensor:
        return self.offsets[1:] - self.offsets[:-1]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> LabelledExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[LabelledExample]: ...
    def __getitem__(self, index: int | slice) -> LabelledExample | list[LabelledExample]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        span = slice(int(self.offsets[at]), int(self.offsets[at + 1]))
        return LabelledExample(
            self.ids[span].tolist(), self.types[span].tolist(), float(self.labels[at]), self.rows[at]
        )

    def __iter__(self) -> Iterator[LabelledExample]:
        return (self[at] for at in range(len(self)))
