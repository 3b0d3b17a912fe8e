"""The shapes that passes are padded to for CUDA graphs: few of them, and each a function of the batch alone.

    tokens     all rows in one line, up to a quarter of a power of two, long ones up to a 16th; what is added are
               documents without targets
    documents  one for each 32 tokens, at least 8, or twice as many until they are enough; those added are empty
    targets    half of the tokens, or as many; those added point at token 0, which has no label
    longest    256, 1024, 4096 ...: what attention is launched for
    even       documents of one length that fill the line stay as they are, and are known to attention

units   tokens
source  tests/test_graphs.py: padded or not, the same losses and gradients
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from .packing import IGNORED, Batch, Documents, bounds_of

SHORT = 2048  # tokens of a pass that is padded by a quarter at most; longer ones by a 16th
LEAST = 64
LONGEST = 256


class Shape(NamedTuple):
    """What all batches of one graph have in common."""

    tokens: int
    documents: int
    targets: int
    longest: int
    even: bool


def shape_of(batch: Batch) -> Shape:
    """The shape of a batch that `padded` made."""
    documents = batch.documents
    return Shape(
        batch.ids.numel(), len(documents.lengths), len(batch.target_at), documents.longest, documents.known
    )


def shape_for(batch: Batch) -> Shape:
    """The shape to pad a batch to."""
    tokens = rounded(batch.ids.numel())
    half = tokens // 2
    targets = half if len(batch.target_at) <= half else tokens
    if even(batch):
        return Shape(tokens, len(batch.documents.lengths), targets, batch.documents.longest, True)
    need = len(batch.documents.lengths) + len(tail(batch, tokens))
    documents = max(8, tokens // 32)
    while documents < need:
        documents *= 2
    longest = LONGEST
    while longest < batch.documents.longest:
        longest *= 4
    return Shape(tokens, documents, targets, min(longest, tokens), False)


def rounded(tokens: int) -> int:
    """Up to a quarter of the power of two below, so that at most a quarter is added; of a long pass, a 16th."""
    above = 1 << (tokens - 1).bit_length()
    grain = max(LEAST, above // (8 if tokens <= SHORT else 32))
    return -(-tokens // grain) * grain


def even(batch: Batch) -> bool:
    """Whether documents of one length fill a line that needs no padding: shapes say all of it."""
    tokens = batch.ids.numel()
    return batch.documents.equal and rounded(tokens) == tokens


def tail(batch: Batch, tokens: int) -> list[int]:
    """Lengths of the documents that fill a line up: none is longer than what the batch has, nor has later positions."""
    extra, piece = tokens - batch.ids.numel(), batch.documents.longest
    return [min(piece, extra - at) for at in range(0, extra, piece)]


def padded(batch: Batch, pad_id: int) -> Batch:
    """The same tokens, targets and documents in one row of the shape that suits them.

    raises  ValueError if the batch is not packed: its rows may be no documents to the model
    """
    if batch.position is None:
        raise ValueError("only packed batches can be put in one row")
    shape, (_, width) = shape_for(batch), batch.ids.shape
    more = tail(batch, shape.tokens)
    documents = batch.documents if shape.even else with_added(batch, shape, more)
    counts = [torch.arange(length) for length in more] or [torch.arange(0)]
    added = shape.tokens - batch.ids.numel()
    return replace(
        batch,
        ids=pad(batch.ids.view(1, -1), (0, added), value=pad_id),
        labels=pad(batch.labels.view(1, -1), (0, added), value=IGNORED),
        position=torch.cat([batch.position.view(-1), *counts])[None],
        token=pad(batch.token.view(1, -1), (0, added)),
        spans=[(0, b * width + start, b * width + stop) for b, start, stop in batch.spans],
        target_at=pad(batch.target_at, (0, shape.targets - len(batch.target_at))),
        documents=documents,
    )


def with_added(batch: Batch, shape: Shape, more: list[int]) -> Documents:
    """A batch's documents, those of so many tokens that fill it up, and empty ones; of known count alone."""
    own = batch.documents
    filling = own.starts.new_tensor(more).cumsum(0, dtype=torch.int32) + batch.ids.numel()
    empty = own.starts.new_full((shape.documents - len(own.lengths) - len(more),), shape.tokens)
    starts = torch.cat([own.starts, filling, empty])
    bounds = bounds_of(starts, shape.tokens)
    return Documents(starts, (shape.longest,) * shape.documents, known=False, bounds=bounds)
