"""Which attention kernel serves which documents of a batch: the calls that take the least time, as measured.

Three kinds of time: what a kernel takes for its documents, what each call costs, and what moving the numbers costs
where a batch is cut up or a document padded.

units   seconds, forward and backward together; rates in TFLOP/s; `size` is heads times features of a head
source  one H100, bf16, heads of 128 features, 8192 tokens and more: FlashAttention-2 as in torch 2.11, cuDNN's dense
        attention through scaled_dot_product_attention
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from math import log2

from .attention import CUDNN_MOST, INDEX, backward_room

LENGTHS = (128, 1024, 4096, 16384)
RATES = {
    "varlen": ((71, 220, 307, 344), (48, 196, 275, 317)),
    "dense": ((92, 447, 591, 573), (48, 297, 478, 519)),
}
CALL = 1e-4  # seconds that one more call costs, forward and backward
MOVED = 16 / 2.8e12  # seconds for each number of q to cut the batch up, or to pad a piece: copies of 16 bytes
GRAIN = 256  # a document in a mixed batch is padded to a multiple: cuDNN plans for each length anew


@dataclass(frozen=True)
class Piece:
    """Consecutive documents that one call serves."""

    kind: str  # dense or varlen
    documents: tuple[int, int]  # the first one, and the first one behind
    tokens: tuple[int, int]
    longest: int
    padded: int  # tokens of each of a dense piece's rows

    @property
    def count(self) -> int:
        return self.documents[1] - self.documents[0]


@lru_cache(maxsize=64)
def pieces(
    lengths: tuple[int, ...], heads: int, width: int, window: int | None, fast_dense: bool
) -> tuple[Piece, ...]:
    """The calls that serve a batch in the least time, as far as `RATES` tell.

    fast_dense  whether the device's dense kernel is faster than FlashAttention for the same rows
    """
    whole = tuple(varlen_pieces(lengths, 0, len(lengths), 0, heads, width))
    if not fast_dense or width % 8 or width > CUDNN_MOST:
        return whole
    cut = tuple(cut_out(lengths, heads, width, window))
    return min(whole, cut, key=lambda plan: sum_of_seconds(plan, lengths, heads * width))


def cut_out(lengths: tuple[int, ...], heads: int, width: int, window: int | None) -> Iterator[Piece]:
    """Runs of equal documents that are faster as rows of a dense batch, and what lies between them."""
    size, held, at, token = heads * width, 0, 0, 0  # `held`: the first document that no piece has yet
    alone = len(set(lengths)) == 1  # then nothing is cut up, and nothing need be padded
    for length, members in groupby(lengths):
        count = len(list(members))
        padded = length if alone else -(-length // GRAIN) * GRAIN
        piece = Piece("dense", (at, at + count), (token, token + count * length), length, padded)
        flash = seconds("varlen", length, count, size)
        dense = length >= LENGTHS[0] and (window is None or length <= window)
        if dense and seconds_of(piece, lengths, size) < flash:
            yield from varlen_pieces(lengths, held, at, token - sum(lengths[held:at]), heads, width)
            yield piece
            held = at + count
        at, token = at + count, token + count * length
    yield from varlen_pieces(lengths, held, at, token - sum(lengths[held:at]), heads, width)


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
    if piece.kind == "varlen":
        counted = groupby(sorted(lengths[slice(*piece.documents)]))
        return CALL + sum(seconds("varlen", length, len(list(same)), size) for length, same in counted)
    padding = MOVED * piece.count * piece.longest * size * (piece.padded > piece.longest)
    return CALL + padding + seconds("dense", piece.padded, piece.count, size)


def seconds(kind: str, length: int, count: int, size: int) -> float:
    """Forward and backward over `count` documents; size = H * D. The backward pass computes 2.5 times as much."""
    flops = 2 * count * length**2 * size
    forward, backward = (rate_at(length, rates) for rates in RATES[kind])
    return flops / forward + 2.5 * flops / backward


def rate_at(length: int, rates: Sequence[int]) -> float:
    """FLOP/s, a straight line between the logarithms of the lengths measured."""
    length = min(max(length, LENGTHS[0]), LENGTHS[-1])
    right = next(at for at in range(1, len(LENGTHS)) if length <= LENGTHS[at])
    share = log2(length / LENGTHS[right - 1]) / log2(LENGTHS[right] / LENGTHS[right - 1])
    return 1e12 * (rates[right - 1] + share * (rates[right] - rates[right - 1]))
