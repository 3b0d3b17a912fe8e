"""Tokenised examples, one and many."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

IGNORED = -100  # the label of a token that carries no loss


@dataclass(frozen=True)
class Example:
    """One tokenised example. labels[t] is ids[t] where that token carries loss, else -100; not shifted."""

    ids: list[int]
    labels: list[int]
    row: str  # where it came from: "file.jsonl:17"
    answer: tuple[int, int] | None = None  # the last answer's tokens, without its end token

    @property
    def targets(self) -> int:
        """How many tokens carry loss."""
        return len(self.labels) - self.labels.count(IGNORED)

    @property
    def prompt_ids(self) -> list[int]:
        """The ids before the last answer."""
        return self.ids[: self.answer_span[0]]

    @property
    def answer_ids(self) -> list[int]:
        """The last answer's ids, without its end token."""
        start, stop = self.answer_span
        return self.ids[start:stop]

    @property
    def answer_span(self) -> tuple[int, int]:
        """The last answer: as the data says, else the last run of trained tokens."""
        if self.answer is not None:
            return self.answer
        stop = len(self.labels)
        while stop and self.labels[stop - 1] == IGNORED:
            stop -= 1
        start = stop
        while start and self.labels[start - 1] != IGNORED:
            start -= 1
        return start, stop


@dataclass
class Draft:
    """An example while it is sorted out: compact, and it may still be cut or dropped."""

    ids: array[int]  # of C ints
    trained: bytearray  # 1 where the token carries loss
    row: str
    answer: tuple[int, int]
    source: int = 0
    document: bool = False
    ended: bool = True  # its last token is an end token that carries loss
    first: bool = True  # the whole of its row, or the row's first part

    @property
    def targets(self) -> int:
        return self.trained.count(1)

    def cut(self, start: int, stop: int, row: str | None = None) -> Draft:
        """The tokens [start, stop) as a draft of their own; its first token carries no loss."""
        trained = self.trained[start:stop]
        trained[0] = 0
        ended = self.ended and stop >= len(self.ids)
        place = (min(max(self.answer[0], start), stop) - start, min(max(self.answer[1], start), stop) - start)
        ids = self.ids[start:stop]
        return Draft(
            ids, trained, row or self.row, place, self.source, self.document, ended, first=start == 0
        )


class Examples(Sequence[Example]):
    """Many examples in few tensors: about five bytes a token.

    shapes  ids (N,) int32 and trained (N,) bool over all tokens; offsets (n + 1,) int64: example i has the
            tokens [offsets[i], offsets[i + 1]); answers (n, 2) int32, counted within the example
    """

    def __init__(
        self, ids: Tensor, trained: Tensor, offsets: Tensor, answers: Tensor, rows: list[str]
    ) -> None:
        self.ids = ids
        self.trained = trained
        self.offsets = offsets
        self.answers = answers
        self.rows = rows

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], rows: list[str]) -> Examples:
        return cls(tensors["ids"], tensors["trained"], tensors["offsets"], tensors["answers"], rows)

    @classmethod
    def build(cls, drafts: Iterable[Draft]) -> Examples:
        ids, trained = array("i"), bytearray()
        offsets, answers, rows = [0], array("i"), []
        for draft in drafts:
            ids.extend(draft.ids)
            trained += draft.trained
            offsets.append(len(ids))
            answers.extend(draft.answer)
            rows.append(draft.row)
        return cls(
            torch.frombuffer(ids, dtype=torch.int32).clone() if ids else torch.zeros(0, dtype=torch.int32),
            torch.frombuffer(trained, dtype=torch.bool).clone()
            if trained
            else torch.zeros(0, dtype=torch.bool),
            torch.tensor(offsets),
            torch.frombuffer(answers, dtype=torch.int32).clone().view(-1, 2)
            if answers
            else torch.zeros(0, 2, dtype=torch.int32),
            rows,
        )

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Everything that a run depends on: every token, and which carry loss."""
        return self.ids, self.trained, self.offsets

    @property
    def lengths(self) -> Tensor:
        """Tokens of each example: (n,) int64."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def targets(self) -> Tensor:
        """Tokens of each example that carry loss: (n,) int64."""
        sums = torch.cat([torch.zeros(1, dtype=torch.int64), self.trained.cumsum(0)])
        return sums[self.offsets[1:]] - sums[self.offsets[:-1]]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start, stop = int(self.offsets[at]), int(self.offsets[at + 1])
        ids = self.ids[start:stop]
        labels = ids.masked_fill(~self.trained[start:stop], IGNORED)
        answer = self.answers[at].tolist()
        return Example(ids.tolist(), labels.tolist(), self.rows[at], (answer[0], answer[1]))

    def __iter__(self) -> Iterator[Example]:
        return (self[at] for at in range(len(self)))

    def __repr__(self) -> str:
        return f"Examples({len(self):,} examples, {self.ids.numel():,} tokens)"
