"""How far a measured number may be off, and whether two of them differ by more than that.

Examples are the units that are drawn: tokens of one example go together, so a loss per token is a ratio
of two sums over examples. Base and tuned are measured on the same examples, so their difference is taken
example by example, where most of the noise cancels.

source  Cochran, Sampling Techniques, 3rd edition, section 2.11 (ratio); Miller 2024, arXiv:2411.00640 (paired)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt

Z = 1.96  # the 95 % interval of a normal number
BETTER, WORSE, WITHIN = "better", "worse", "within noise"


def ratio_stderr(totals: Sequence[float], counts: Sequence[int]) -> float | None:
    """The standard error of sum(totals) / sum(counts) over examples; None for fewer than two."""
    return spread(influences(totals, counts))


def influences(totals: Sequence[float], counts: Sequence[int]) -> list[float]:
    """What each example moves sum(totals) / sum(counts) by, to first order; the sum is 0."""
    all_counts = sum(counts)
    mean = sum(totals) / all_counts
    return [(total - mean * count) / all_counts for total, count in zip(totals, counts, strict=True)]


def spread(shares: Sequence[float]) -> float | None:
    """The standard error of a sum to which each example brings a share whose mean is 0."""
    n = len(shares)
    return sqrt(n / (n - 1) * sum(share * share for share in shares)) if n > 1 else None


def share_stderr(share: float, count: int) -> float | None:
    """The standard error of a share of yes among `count` examples, binomial."""
    return sqrt(share * (1 - share) / count) if count else None


def verdict(change: float, stderr: float | None, *, lower_is_better: bool) -> str:
    """better, worse or within noise: by whether the change is beyond 1.96 standard errors."""
    if stderr is None or not abs(change) > Z * stderr:  # nor is what is no number a change
        return WITHIN
    return BETTER if (change < 0) == lower_is_better else WORSE


def share_verdict(base: Sequence[bool], tuned: Sequence[bool]) -> str:
    """The same for yes or no on each example, where more yes is better.

    Exact: of the examples that changed, as many would turn to the better as to the worse by chance. The normal
    rule fails here, for its standard error is 0 when all of a few examples change in one direction.

    source  McNemar's test in its exact form, p < 0.05 on both sides
    """
    gained = sum(after and not before for before, after in zip(base, tuned, strict=True))
    lost = sum(before and not after for before, after in zip(base, tuned, strict=True))
    changed = gained + lost
    tail = sum(comb(changed, k) for k in range(min(gained, lost) + 1)) / 2**changed
    if gained == lost or 2 * tail >= 0.05:
        return WITHIN
    return BETTER if gained > lost else WORSE
