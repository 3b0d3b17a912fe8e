"""Examples to micro-batches, and a run to optimizer steps.

Packing puts several examples in one row. They do not see each other: `position` restarts at 0 where a
document begins, and attention is masked by it. However a step is packed or split, the same tokens carry
loss; the trainer divides by the targets of the whole step, so the result is the same.

source  tests/test_packing.py
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import islice
from statistics import median
from typing import Protocol

import torch
from torch import Tensor

IGNORED = -100  # the label of a token that carries no loss
ROUND = 64  # a row's length is a multiple of this
LEAST = 256  # and at least this, so that short examples share rows
TRIM = 16  # rows that came out shorter are cut to a multiple of this
TOKENS = 1 << 20  # token numbers set aside for each example
DEFAULT_BATCH = 16  # examples per step if neither size is set


class Example(Protocol):
    """What is packed: data.Example, or anything like it."""

    @property
    def ids(self) -> list[int]: ...
    @property
    def labels(self) -> list[int]: ...
    @property
    def row(self) -> str: ...
    @property
    def targets(self) -> int: ...


@dataclass(frozen=True)
class Documents:
    """Where documents lie among the tokens of a batch, row after row in one line; no token is outside of one.

    known  False: `lengths` are upper bounds, `starts` alone tells, so that a pass can be replayed for others

    shapes  starts (D + 1,) int32: each document's first token, and the number of tokens behind them
            bounds (2, T) int32: the first token of each token's document, and the first one behind it
    """

    starts: Tensor
    lengths: tuple[int, ...]  # of each document; on the host, so that nothing waits for the device
    known: bool = True
    bounds: Tensor | None = None  # None: found each time they are asked for

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def equal(self) -> bool:
        """Whether all documents have one length, so that they are rows of a dense batch."""
        return self.known and min(self.lengths) == self.longest

    def bounds_of(self, tokens: int) -> Tensor:
        return bounds_of(self.starts, tokens) if self.bounds is None else self.bounds

    def each(self, change: Callable[[Tensor], Tensor]) -> Documents:
        bounds = None if self.bounds is None else change(self.bounds)
        return replace(self, starts=change(self.starts), bounds=bounds)

    def to(self, device: torch.device | str) -> Documents:
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))


def bounds_of(starts: Tensor, tokens: int) -> Tensor:
    """(2, T) int32: the first token of each token's document, and the first one behind it."""
    sizes = starts.diff()
    return torch.stack(
        [side.repeat_interleave(sizes, output_size=tokens) for side in (starts[:-1], starts[1:])]
    )


def documents_of(shape: Sequence[int], spans: Sequence[tuple[int, int, int]], packed: bool) -> Documents:
    """The documents of a batch (B, T); what is left of a packed row is one more, a padded row is one as a whole."""
    rows, length = shape
    if not packed:
        lengths = [length] * rows
    else:
        lengths, left = [], [length] * rows
        own: list[list[int]] = [[] for _ in range(rows)]
        for b, start, stop in spans:
            own[b].append(stop - start)
            left[b] -= stop - start
        for b in range(rows):
            lengths += own[b] + [left[b]] * (left[b] > 0)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Documents(starts, tuple(lengths), bounds=bounds_of(starts, rows * length))


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    shapes  ids, labels, position and token are (B, T) int64; target_at is (L,) int64
    """

    ids: Tensor
    labels: Tensor  # -100 where no loss is taken; not shifted
    position: Tensor | None  # restarts at 0 in each document, padding being one; None when not packed
    token: Tensor  # the example's number in the step * 2**20 + the place in it; 0 in padding
    targets: int  # labels that are not -100
    rows: list[str]  # Example.row of the members, in order
    spans: list[tuple[int, int, int]]  # (b, start, stop) of each member: batch.ids[b, start:stop]
    # Found on the host where they are not given, so that a step on a GPU need not wait for them:
    target_at: Tensor = None  # type: ignore[assignment]  # row * T + column of each label that is not -100
    documents: Documents = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.target_at is None:
            wanted_BT = self.labels != IGNORED  # type: ignore[unreachable]
            wanted_BT[:, 0] = False  # nothing stands before the first token of a row
            object.__setattr__(self, "target_at", wanted_BT.flatten().nonzero().squeeze(1))
        if self.documents is None:
            documents = documents_of(  # type: ignore[unreachable]
                self.ids.shape, self.spans, self.position is not None
            )
            object.__setattr__(self, "documents", documents.to(self.ids.device))

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor changed, such as copied."""
        return replace(
            self,
            ids=change(self.ids),
            labels=change(self.labels),
            position=None if self.position is None else change(self.position),
            token=change(self.token),
            target_at=change(self.target_at),
            documents=self.documents.each(change),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))


Member = tuple[int, Example]  # an example and its number in the step


def pack(
    examples: Sequence[Example],
    *,
    micro_tokens: int,
    packing: bool,
    pad_id: int,
    row_length: int | None = None,
) -> list[Batch]:
    """The micro-batches of one optimizer step.

    micro_tokens  most tokens of a batch, padding included; only a longer example may exceed it, on its own
    packing       several examples share a row of `row_length` tokens; else one each, padded on the right
    row_length    None: the longest example up to a multiple of 64, at least 256, at most micro_tokens

    raises  ValueError if an example is empty, longer than row_length, or has a label on its first token
    """
    if micro_tokens < 1:
        raise ValueError(f"micro_tokens is {micro_tokens}")
    members = list(enumerate(examples))
    for number, example in members:
        if not example.ids or len(example.ids) != len(example.labels) or example.labels[0] != IGNORED:
            raise ValueError(f"example {number} ({example.row}) is empty or its first token has a label")
    if not members:
        return []
    if not packing:
        return [batch([[member] for member in group], pad_id) for group in by_length(members, micro_tokens)]
    if row_length is not None and max(len(example.ids) for _, example in members) > row_length:
        raise ValueError(f"row_length is {row_length}, and an example is longer")
    alone = [member for member in members if len(member[1].ids) > micro_tokens]
    shared = [member for member in members if len(member[1].ids) <= micro_tokens]
    batches = [batch([[member]], pad_id, length=len(member[1].ids)) for member in alone]
    if shared:
        length = row_length or row_length_for(max(len(example.ids) for _, example in shared), micro_tokens)
        rows = best_fit(shared, length)
        rows = rows if row_length else level(shared, len(rows), length) or rows
        count = max(1, micro_tokens // length)
        for at in range(0, len(rows), count):
            part = rows[at : at + count]
            batches.append(
                batch(part, pad_id, length=row_length or min(length, rounded(max(map(tokens_of, part)))))
            )
    return batches


def row_length_for(longest: int, micro_tokens: int) -> int:
    """Tokens of a packed row."""
    return min(max(math.ceil(longest / ROUND) * ROUND, min(LEAST, micro_tokens)), micro_tokens)


def best_fit(members: Sequence[Member], length: int) -> list[list[Member]]:
    """Rows of at most `length` tokens: the longest first, each into the fullest row that still holds it."""
    rows: list[list[Member]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for member in sorted(members, key=lambda member: (-len(member[1].ids), member[0])):
        size = len(member[1].ids)
        place = bisect_left(free, (size, -1))
        if place == len(free):
            rows.append([])
            left, row = length, len(rows) - 1
        else:
            left, row = free.pop(place)
        rows[row].append(member)
        insort(free, (left - size, row))
    return rows


def level(members: Sequence[Member], count: int, length: int) -> list[list[Member]] | None:
    """The same members in `count` rows as even as can be, so that little is padded; None if one overflows.

    source  Graham 1969: the longest first, each into the emptiest row
    """
    rows: list[list[Member]] = [[] for _ in range(count)]
    heap = [(0, row) for row in range(count)]
    for member in sorted(members, key=lambda member: (-len(member[1].ids), member[0])):
        filled, row = heappop(heap)
        rows[row].append(member)
        heappush(heap, (filled + len(member[1].ids), row))
    return rows if max(heap)[0] <= length else None


def tokens_of(row: Sequence[Member]) -> int:
    return sum(len(example.ids) for _, example in row)


def rounded(tokens: int) -> int:
    """Up to a multiple of 16: tensors that hardware likes, and few different shapes."""
    return math.ceil(tokens / TRIM) * TRIM


def by_length(members: Sequence[Member], micro_tokens: int) -> list[list[Member]]:
    """Groups of similar length, each of which padded to its longest fits micro_tokens."""
    groups: list[list[Member]] = []
    for member in sorted(members, key=lambda member: (len(member[1].ids), member[0])):
        size = len(member[1].ids)  # the longest so far, since they are sorted
        if groups and (len(groups[-1]) + 1) * size <= micro_tokens:
            groups[-1].append(member)
        else:
            groups.append([member])
    return groups


def batch(rows: Sequence[Sequence[Member]], pad_id: int, *, length: int | None = None) -> Batch:
    """The tensors of some rows; with a `length` they are packed, else each row has one member."""
    width = length or max(len(example.ids) for row in rows for _, example in row)
    ids, labels, position, token = (array("q") for _ in range(4))
    names, spans, targets = [], [], 0
    for at, row in enumerate(rows):
        start = 0
        for number, example in row:
            size = len(example.ids)
            ids.extend(example.ids)
            labels.extend(example.labels)
            position.extend(range(size))
            token.extend(range(number * TOKENS, number * TOKENS + size))
            names.append(example.row)
            spans.append((at, start, start + size))
            targets += example.targets
            start += size
        rest = width - start
        ids.extend([pad_id] * rest)
        labels.extend([IGNORED] * rest)
        position.extend(range(rest) if length else range(start, width))
        token.extend([0] * rest)
    shape = (len(rows), width)
    ids_BT, labels_BT, token_BT, position_BT = (
        torch.frombuffer(item, dtype=torch.int64).view(shape) for item in (ids, labels, token, position)
    )
    return Batch(ids_BT, labels_BT, position_BT if length else None, token_BT, targets, names, spans)


class StepPlan:
    """Which examples each optimizer step takes: `plan[step]` is their indices, `len(plan)` the steps.

    Every epoch is a permutation of its own, made from (seed, epoch), so that resuming needs only the step's
    number. Steps do not run across epochs: the last of an epoch may be smaller. With `batch_tokens` a step
    takes examples in order until the next would exceed it, and at least one.

    lengths       tokens of each example
    epochs        passes over the examples; 1.5 ends in the middle of the second
    max_steps     steps, whatever `epochs` says; further epochs follow where it is more
    batch_size    examples per step; 16 if neither size is set
    batch_tokens  tokens per step

    raises  ValueError if there are no examples, or both sizes are set
    """

    def __init__(
        self,
        lengths: Sequence[int] | Tensor,
        *,
        epochs: float = 1,
        max_steps: int | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        self.lengths = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
        if not self.lengths:
            raise ValueError("there are no examples to plan for")
        if batch_size is not None and batch_tokens is not None:
            raise ValueError("batch_size and batch_tokens are two ways to say one thing")
        self.batch_size = batch_size or DEFAULT_BATCH
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.starts = [0]  # the first step of each epoch looked at, and of the next
        self.cached: tuple[int, list[list[int]]] = (-1, [])
        self.steps = max_steps if max_steps is not None else self.steps_in(epochs)

    @property
    def usual(self) -> int:
        """Tokens of the median of the first hundred steps."""
        return int(median(sum(self.lengths[i] for i in step) for step in islice(self, 100)))

    def steps_in(self, epochs: float) -> int:
        """Steps of so many epochs, of which the last may be a part; at least one."""
        whole = int(epochs)
        part = epochs - whole
        steps = self.start_of(whole)
        if part > 1e-9:
            steps += math.ceil(part * (self.start_of(whole + 1) - steps) - 1e-9)
        return max(1, steps)

    def start_of(self, epoch: int) -> int:
        """The first step of an epoch."""
        if self.batch_tokens is None:
            return epoch * math.ceil(len(self.lengths) / self.batch_size)
        while len(self.starts) <= epoch:
            self.starts.append(self.starts[-1] + len(self.epoch(len(self.starts) - 1)))
        return self.starts[epoch]

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that a step belongs to."""
        if self.batch_tokens is None:
            return step // math.ceil(len(self.lengths) / self.batch_size)
        while self.starts[-1] <= step:
            self.start_of(len(self.starts))
        # the last epoch that starts at or before the step
        return bisect_left(self.starts, step + 1) - 1

    def epoch(self, number: int) -> list[list[int]]:
        """The steps of one epoch; only the last one asked for is kept."""
        if self.cached[0] != number:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % (1 << 63))
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
            self.cached = (number, self.group(order))
        return self.cached[1]

    def group(self, order: Sequence[int]) -> list[list[int]]:
        if self.batch_tokens is None:
            return [list(order[at : at + self.batch_size]) for at in range(0, len(order), self.batch_size)]
        steps: list[list[int]] = []
        total = 0
        for index in order:
            total += self.lengths[index]
            if not steps or total > self.batch_tokens:
                steps.append([])
                total = self.lengths[index]
            steps[-1].append(index)
        return steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[int]:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        epoch = self.epoch_of(step)
        return self.epoch(epoch)[step - self.start_of(epoch)]

    def __iter__(self) -> Iterator[list[int]]:
        return (self[step] for step in range(self.steps))
