"""The least time that a training step can take on a card: operations by shape over what the card sustains.

    linears, head, R  (4 P + 4 P_h + 6 R) T operations; with recomputation (6 P + 4 P_h + 8 R) T
    attention         3.5 * 2 L S q T operations, causal, documents of S tokens; 4.5 with recomputation
    dequantisation    two passes over 4-bit weights, or three: read once and written once in each

Nothing elementwise is counted. P linears, P_h head (of labelled tokens), R adapters, T tokens, q heads * head_dim.

units   seconds, operations, bytes
source  ceilings measured on one H100 80GB HBM3, real shapes, 6 s sustained; benchmarks/peers/roofline.py for others
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

BF16, FP8 = 685e12, 1300e12  # products a second
DEQUANTISE = 2.78e12  # bytes a second, read and written
CODED = 0.516  # bytes a weight of NF4 with double quantisation
# documents' length: forward and backward operations a second
VARLEN = {128: (71, 48), 1024: (220, 196), 4096: (307, 275), 16384: (344, 317)}
CUDNN = {128: (92, 48), 1024: (447, 297), 4096: (591, 478), 16384: (573, 519)}


@dataclass(frozen=True)
class Work:
    """A step of T tokens in documents of S on a Llama."""

    hidden: int
    inter: int
    layers: int
    heads: int
    kv: int
    vocab: int
    rank: int
    targets: str  # qv, qkvo or all
    tokens: int
    length: int
    labelled: float = 1.0
    recompute: bool = False

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """In and out of each linear layer of a decoder layer."""
        h, f, k = self.hidden, self.inter, self.hidden // self.heads * self.kv
        sizes = {"q": (h, h), "k": (h, k), "v": (h, k), "o": (h, h)}
        return sizes | {"gate": (h, f), "up": (h, f), "down": (f, h)}

    @property
    def linears(self) -> int:
        return self.layers * sum(i * o for i, o in self.widths.values())

    @property
    def head(self) -> int:
        return self.hidden * self.vocab

    @property
    def adapters(self) -> int:
        names = {"qv": "q v", "qkvo": "q k v o", "all": "q k v o gate up down"}[self.targets].split()
        return self.rank * self.layers * sum(sum(self.widths[name]) for name in names)


def operations(w: Work) -> dict[str, float]:
    """Of a whole step, by what they are for."""
    attention = 2 * w.layers * w.length * w.hidden * w.tokens
    passes = 3 if w.recompute else 2
    return {
        "linears": 2 * passes * w.linears * w.tokens,
        "head": 4 * w.head * w.tokens * w.labelled,
        "adapters": 2 * (passes + 1) * w.adapters * w.tokens,
        "attention forward": attention * (passes - 1),
        "attention backward": 2.5 * attention,
    }


def between(table: dict[int, tuple[int, int]], length: int) -> tuple[float, float]:
    """Measured rates at a length, on a line between the lengths that were measured."""
    keys = sorted(table)
    at = bisect_left(keys, length)
    if at == 0 or at == len(keys):
        ahead, back = table[keys[min(at, len(keys) - 1)]]
        return 1e12 * ahead, 1e12 * back
    low, high = keys[at - 1], keys[at]
    share = (length - low) / (high - low)
    ahead, back = (x + share * (y - x) for x, y in zip(table[low], table[high]))
    return 1e12 * ahead, 1e12 * back


def floor(w: Work, *, quant: str, fp8: bool, cudnn: bool) -> dict[str, float]:
    """Least milliseconds of each part.

    quant  none, nf4 or fp8: how the base is kept
    fp8    whether its products run in fp8
    cudnn  attention of equal documents by cuDNN, else by FlashAttention-2 over packed ones
    """
    o = operations(w)
    ahead, back = between(CUDNN if cudnn else VARLEN, w.length)
    passes = 3 if w.recompute else 2
    written = CODED + (1 if fp8 else 2)
    seconds = {
        "frozen products": o["linears"] / (FP8 if fp8 else BF16),
        "head and loss": o["head"] / BF16,
        "low-rank products": o["adapters"] / BF16,
        "attention": o["attention forward"] / ahead + o["attention backward"] / back,
        "dequantisation": passes * w.linears * written / DEQUANTISE if quant == "nf4" else 0.0,
    }
    return {key: 1e3 * value for key, value in seconds.items()}


def of_run(a: Any, r: Any, recompute: str, labelled: float = 1.0, length: int | None = None) -> Work:
    """The work of a run of benchmarks/peers."""
    g = a.geom
    return Work(
        g.hidden,
        g.inter,
        g.layers,
        g.heads,
        g.kv,
        g.vocab,
        a.rank,
        a.targets,
        r.batch * r.seq,
        length or r.seq,
        labelled,
        recompute in ("full", "offload"),
    )
