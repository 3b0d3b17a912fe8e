"""Which attention kernel serves which documents of a batch: the calls that take the least time, as measured.

Three kinds of time: what a kernel takes for its documents, what each call costs, and what moving the numbers costs
where a batch is cut up or a document padded.

units   seconds, forward and backward together; rates in TFLOP/s; `size` is heads times features of a head
source  benchmarks/results/attention_kernels.json: one H100, bf16, 32 heads of 128 features, 16,384 tokens;
        FlashAttention-2 as in torch 2.11, cuDNN's dense attention through scaled_dot_product_attention, and
        kernels/attention_short.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from math import log2

from .attention import CUDNN_MOST, INDEX, backward_room

LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
RATES = {
    "varlen": ((11, 36, 72, 104, 148, 225, 294, 310, 338), (6, 22, 48, 89, 142, 197, 235, 270, 315)),
    "dense": ((12, 44, 92, 182, 349, 462, 545, 603, 662), (9, 23, 48, 95, 175, 297, 406, 486, 534)),
    "short": ((24, 47, 91, 158, 219, 264, 287, 276, 225), (19, 38, 72, 131, 197, 265, 300, 302, 295)),
}
LONG = 16384  # tokens of a document from which FlashAttention is the faster for lengths that only the device knows
CALL = 1e-4  # seconds that one more call costs, forward and backward
MOVED = 16 / 2.8e12  # seconds for each number of q to cut the batch up, or to pad a piece: copies of 16 bytes
GRAIN = 256  # a document in a mixed batch is padded to a multiple: cuDNN plans for each length anew


@dataclass(frozen=True)
class Piece:
    """Consecutive documents that one call serves."""

    kind: str  # dense, varlen or short
    documents: tuple[int, int]  # the first one, and the first one behind
    tokens: tuple[int, int]
    longest: int
    padded: int  # tokens of each of a dense piece's rows

    @property
    def count(self) -> int:
        return self.documents[1] - self.documents[0]


@lru_cache(maxsize=64)
def pieces(
    lengths: tuple[int, ...],
    heads: int,
    width: int,
    window: int | None,
    fast_dense: bool,
    takes_short: bool,
) -> tuple[Piece, ...]:
    """The calls that serve a batch in the least time, as far as `RATES` tell.

    fast_dense   whether the device's dense kernel is faster than FlashAttention for the same rows
    takes_short  whether the kernels for short documents serve the device and the heads
    """
    kinds = ("varlen", "short") if takes_short else ("varlen",)
    whole = tuple(rest(lengths, 0, len(lengths), 0, heads, width, kinds))
    if not fast_dense or width % 8 or width > CUDNN_MOST:
        return whole
    cut = tuple(cut_out(lengths, heads, width, window, kinds))
    return min(whole, cut, key=lambda plan: sum_of_seconds(plan, lengths, heads * width))


def cut_out(
    lengths: tuple[int, ...], heads: int, width: int, window: int | None, kinds: Sequence[str]
) -> Iterator[Piece]:
    """Runs of equal documents that are faster as rows of a dense batch, and what lies between them."""
    size, held, at, token = heads * width, 0, 0, 0  # `held`: the first document that no piece has yet
    alone = len(set(lengths)) == 1  # then nothing is cut up, and nothing need be padded
    for length, members in groupby(lengths):
        count = len(list(members))
        padded = length if alone else -(-length // GRAIN) * GRAIN
        piece = Piece("dense", (at, at + count), (token, token + count * length), length, padded)
        ragged = min(seconds(kind, length, count, size) for kind in kinds)
        dense = length >= LENGTHS[0] and (window is None or length <= window)
        if dense and seconds_of(piece, lengths, size) < ragged:
            yield from rest(lengths, held, at, token - sum(lengths[held:at]), heads, width, kinds)
            yield piece
            held = at + count
        at, token = at + count, token + count * length
    yield from rest(lengths, held, at, token - sum(lengths[held:at]), heads, width, kinds)


def rest(
    lengths: tuple[int, ...],
    first: int,
    behind: int,
    token: int,
    heads: int,
    width: int,
    kinds: Sequence[str],
) -> list[Piece]:
    """These documents as they lie in the line, by the faster of the kernels that take any lengths."""
    plans = [list(varlen_pieces(lengths, first, behind, token, heads, width))]
    if "short" in kinds and first < behind:
        own = lengths[first:behind]
        plans.append([Piece("short", (first, behind), (token, token + sum(own)), max(own), max(own))])
    return min(plans, key=lambda plan: sum(seconds_of(piece, lengths, heads * width) for piece in plan))


def varlen_pieces(
    lengths: tuple[int, ...], first: int, behind: int, token: int, heads: int, width: int
) -> Iterator[Piece]:
    """These documents in as few calls as FlashAttention's 32-bit counts allow."""
    start, tokens = first, 0
    for at in range(first, behind + 1):
        more = lengths[at] if at < behind else 0
        room = backward_room(tokens + more, at + 1 - start, heads, width)
        if at > start and (at == behind or room >= INDEX):
            longest = max(lengths[start:at])
            yield Piece("varlen", (start, at), (token, token + tokens), longest, longest)
            start, token, tokens = at, token + tokens, 0
        tokens += more


def sum_of_seconds(plan: Sequence[Piece], lengths: tuple[int, ...], size: int) -> float:
    cutting = MOVED * sum(lengths) * size if len(plan) > 1 else 0.0
    return cutting + sum(seconds_of(piece, lengths, size) for piece in plan)


def seconds_of(piece: Piece, lengths: tuple[int, ...], size: int) -> float:
    """Forward and backward of one piece, its call included."""
    if piece.kind != "dense":
        counted = groupby(sorted(lengths[slice(*piece.documents)]))
        return CALL + sum(seconds(piece.kind, length, len(list(same)), size) for length, same in counted)
    padding = MOVED * piece.count * piece.longest * size * (piece.padded > piece.longest)
    return CALL + padding + seconds("dense", piece.padded, piece.count, size)


def seconds(kind: str, length: int, count: int, size: int) -> float:
    """Forward and backward over `count` documents; size = H * D. The backward pass computes 2.5 times as much."""
    flops = 2 * count * length**2 * size
    forward, backward = (rate_at(length, rates) for rates in RATES[kind])
    return flops / forward + 2.5 * flops / backward


def rate_at(length: int, rates: Sequence[int]) -> float:
    """FLOP/s, a straight line between the logarithms of the lengths measured; below them a token takes one time."""
    share_of_least = min(1.0, max(1, length) / LENGTHS[0])
    length = min(max(length, LENGTHS[0]), LENGTHS[-1])
    right = next(at for at in range(1, len(LENGTHS)) if length <= LENGTHS[at])
    share = log2(length / LENGTHS[right - 1]) / log2(LENGTHS[right] / LENGTHS[right - 1])
    return share_of_least * 1e12 * (rates[right - 1] + share * (rates[right] - rates[right - 1]))
