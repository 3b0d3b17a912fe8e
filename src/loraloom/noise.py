"""How far a measured number may be off, and whether two of them differ by more than that.

Examples are the units that are drawn: tokens of one example go together, so a loss per token is a ratio
of two sums over examples. Base and tuned are measured on the same examples, so their difference is taken
example by example, where most of the noise cancels.

A standard error comes from the same few examples as the value, so what is within noise goes by Student's t, not by
the normal law: of 5 examples 2.78 errors are noise, of 1,000 it is 1.96.

source  Cochran, Sampling Techniques, 3rd edition, section 2.11 (ratio); Miller 2024, arXiv:2411.00640 (paired);
        Satterthwaite 1946, Biometrics Bulletin 2, 110-114 (errors of several samples)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import atan2, comb, cos, exp, fsum, isfinite, lgamma, pi, sqrt

RARE = 0.05  # chance alone does what is called a difference less often than this
WORDS = "noise: what chance alone does to such a change in 95 of 100 cases"
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


def verdict(change: float, stderr: float | None, freedom: float, *, lower_is_better: bool) -> str:
    """better, worse or within noise: by how often chance alone changes as much.

    freedom  degrees of it in the standard error: examples less one, or `satterthwaite`
    """
    if not beyond(change, stderr, freedom):
        return WITHIN
    return BETTER if (change < 0) == lower_is_better else WORSE


def beyond(change: float, stderr: float | None, freedom: float) -> bool:
    """Whether a change is more than noise; what is no number is not.

    Without any spread all examples moved alike, which coins do as often as fall on one side.
    """
    if stderr is None or not isfinite(stderr) or not abs(change) > 0:
        return False
    return (student(change / stderr, freedom) if stderr else 2.0**-freedom) < RARE


def satterthwaite(errors: Sequence[float], counts: Sequence[int]) -> float:
    """The degrees of freedom of the root of the sum of squared standard errors, each from so many examples."""
    total = sum(error**2 for error in errors)
    if not total:
        return sum(counts) - 1
    shares = [(error**2 / total) ** 2 / (count - 1) for error, count in zip(errors, counts) if error]
    return 1 / sum(shares)


def student(t: float, freedom: float) -> float:
    """P(|T| > |t|) of Student's t: with t = sqrt(n) tan(u) the density is cos(u)^(n - 1), summed by Simpson's rule."""
    n, count = freedom - 1, 2000
    end = atan2(abs(t), sqrt(freedom))
    if n > 0:
        end = min(end, 12 / sqrt(n))  # beyond it the density is below e^-72
    heights = [cos(end * i / count) ** n for i in range(count + 1)]
    inside = end / count / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1::2]) + 2 * sum(heights[2:-1:2]))
    whole = sqrt(pi) / 2 * exp(lgamma(freedom / 2) - lgamma((freedom + 1) / 2))
    return max(0.0, 1 - inside / whole)


def fisher(yes: tuple[int, int], counts: tuple[int, int]) -> float:
    """The two-sided p of Fisher's exact test: how often two shares of so many examples are as far apart by chance."""
    drawn, total = sum(yes), sum(counts)

    def logarithm(n: int, k: int) -> float:
        return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)

    def chance(k: int) -> float:
        return exp(logarithm(counts[0], k) + logarithm(counts[1], drawn - k) - logarithm(total, drawn))

    most = chance(yes[0]) * (1 + 1e-7)  # as likely counts the rounding of lgamma aside
    ways = (chance(k) for k in range(max(0, drawn - counts[1]), min(counts[0], drawn) + 1))
    return min(1.0, fsum(way for way in ways if way <= most))


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
    if gained == lost or 2 * tail >= RARE:
        return WITHIN
    return BETTER if gained > lost else WORSE
