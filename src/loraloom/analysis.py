"""What an update of a weight is made of: its spectrum, how it lies in W, and how alike two of them are.

    dW = U S V^T          of a low-rank pair B A from QR of B and of A^T and an SVD of R x R, in float64
    effective rank        exp(H(p)), p_i = s_i^2 / sum s^2
    stable rank           ||dW||_F^2 / s_1^2
    amplification         ||dW||_F / ||U_r^T W V_r||_F, with the first r singular vectors of dW
    phi(i, j)             ||U1_i^T U2_j||_F^2 / min(i, j), of the first i and j directions of two subspaces of R^d;
                          max(i, j) / d is expected of random ones
    intruder              one of the first k left singular vectors of W + dW whose cosine to every left singular
                          vector of W is below epsilon

shapes  O out, I in, R rows of the pair, K singular vectors; vectors stand in columns
source  LoRA, arXiv:2106.09685, section 7 and table 7; Shuttleworth et al. 2024, arXiv:2410.21228 (intruders);
        Halko et al. 2011, arXiv:0909.4061, algorithm 4.4 (leading singular vectors of a large matrix)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_SIDE = 2048  # of W: all singular values up to here, the leading ones above
LEADING = 256  # of them
SWEEPS = 6  # of the subspace iteration
CHUNK = 1 << 20  # numbers of a matrix that are in memory in float64 at once
TINY = 1e-6  # of s_1: what the square root of a Gram matrix still resolves

# ---- the update ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """A change of W, (O, I): a thin product B A, or a matrix where it is no such product."""

    B: Tensor | None = None
    A: Tensor | None = None
    whole: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        if self.whole is not None:
            return self.whole.shape[0], self.whole.shape[1]
        assert self.B is not None
        assert self.A is not None
        return self.B.shape[0], self.A.shape[1]

    @property
    def finite(self) -> bool:
        return all(bool(part.isfinite().all()) for part in (self.B, self.A, self.whole) if part is not None)

    def rows(self, chosen: slice) -> Tensor:
        """Some rows of it, float32."""
        if self.whole is not None:
            return self.whole[chosen].float()
        assert self.B is not None
        assert self.A is not None
        return self.B[chosen].float() @ self.A.float()

    def spectrum(self, count: int) -> Spectrum:
        """Its singular values and vectors: all of a thin product; of a large matrix the first `count`."""
        if self.whole is not None:
            return spectrum_of(self.whole, count)
        assert self.B is not None
        assert self.A is not None
        return thin_svd(self.B, self.A)


@dataclass(frozen=True)
class Spectrum:
    """Singular values, the largest first, and their vectors U (O, K), V (I, K), float64.

    norm   Frobenius, of the whole matrix, also where K values are not all of them
    whole  whether they are all
    """

    U: Tensor
    s: Tensor
    V: Tensor
    norm: float
    whole: bool = True

    @property
    def rank(self) -> int:
        """The number of singular values that float32 can tell from 0."""
        sides = max(len(self.U), len(self.V))
        floor = float(self.s[0]) * sides * torch.finfo(torch.float32).eps if len(self.s) else 0.0
        return int((self.s > floor).sum())

    @property
    def effective_rank(self) -> float | None:
        """exp of the entropy of s^2's shares; None where not all of s is known, or s is 0."""
        if not self.whole or not self.norm:
            return None
        share = self.s.square() / self.s.square().sum()
        share = share[share > 0]
        return math.exp(float(-(share * share.log()).sum()))

    @property
    def stable_rank(self) -> float | None:
        return self.norm**2 / float(self.s[0]) ** 2 if self.norm else None

    def first(self, count: int) -> Spectrum:
        return Spectrum(self.U[:, :count], self.s[:count], self.V[:, :count], self.norm, whole=False)


def thin_svd(b_OR: Tensor, a_RI: Tensor) -> Spectrum:
    """The SVD of B A; nothing is larger than B, A and R x R."""
    q_OR, x_RR = torch.linalg.qr(b_OR.double())
    p_IR, y_RR = torch.linalg.qr(a_RI.double().T)
    u, s, vh = torch.linalg.svd(x_RR @ y_RR.T, full_matrices=False)
    return Spectrum(q_OR @ u, s, p_IR @ vh.T, float(s.norm()))


def spectrum_of(m_OI: Tensor, count: int) -> Spectrum:
    """All of a matrix's singular values and vectors if its smaller side is at most EXACT_SIDE, else the first."""
    if min(m_OI.shape) > EXACT_SIDE:
        return leading(m_OI, count)
    gram = Axes.of(m_OI)
    kept = gram.s > TINY * gram.s[0] if len(gram.s) else gram.s > 0
    s, small = gram.s[kept], gram.small[:, kept]
    other = torch.cat([part @ small / s for part in long_parts(m_OI)])
    wide = m_OI.shape[0] <= m_OI.shape[1]
    return Spectrum(small if wide else other, s, other if wide else small, frobenius(m_OI))


def leading(m_OI: Tensor, count: int, start_OK: Tensor | None = None) -> Spectrum:
    """The first singular values and vectors of a large matrix, by subspace iteration in its own dtype.

    start_OK  left vectors to begin with, beside random ones
    """
    gen = torch.Generator().manual_seed(0)
    width = min(count + 32, *m_OI.shape)
    q_OK = torch.randn(m_OI.shape[0], width, generator=gen, dtype=m_OI.dtype).to(m_OI.device)
    if start_OK is not None:
        q_OK = torch.cat([start_OK.to(q_OK), q_OK], dim=1)[:, : max(width, start_OK.shape[1])]
    for _ in range(SWEEPS):
        p_IK = torch.linalg.qr(m_OI.T @ q_OK).Q
        q_OK = torch.linalg.qr(m_OI @ p_IK).Q
    u, s, vh = torch.linalg.svd((q_OK.T @ m_OI).double(), full_matrices=False)
    found = Spectrum(q_OK.double() @ u, s, vh.T, frobenius(m_OI), whole=False)
    return found.first(count)


# ---- W ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axes:
    """W's singular directions: the vectors of its smaller side, (S, S), from which the others follow.

    wide   whether these are the left ones
    whole  whether they are all; else the left ones are the leading ones that were found
    """

    s: Tensor
    small: Tensor
    wide: bool
    whole: bool = True

    @classmethod
    def of(cls, w_OI: Tensor, count: int = LEADING) -> Axes:
        """Of a matrix: all if its smaller side is at most EXACT_SIDE, by its Gram matrix in float64."""
        if min(w_OI.shape) > EXACT_SIDE:
            found = leading(w_OI, count)
            return cls(found.s, found.U, wide=True, whole=False)
        gram_SS = w_OI.new_zeros(min(w_OI.shape), min(w_OI.shape), dtype=torch.float64)
        for part in long_parts(w_OI):
            gram_SS.addmm_(part.T, part)
        squares, vectors = torch.linalg.eigh(gram_SS)
        return cls(squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1), w_OI.shape[0] <= w_OI.shape[1])

    def top(self, w_OI: Tensor, count: int) -> Tensor:
        """The first left singular vectors, (O, count)."""
        return self.small[:, :count] if self.wide else w_OI.double() @ self.small[:, :count] / self.s[:count]

    def cosines(self, w_OI: Tensor, y_OK: Tensor) -> Tensor:
        """The largest |cosine| of each column to any left singular vector of W that is known, (K,)."""
        if self.wide:
            return (self.small.T @ y_OK).abs().amax(0)
        kept = self.s > TINY * self.s[0]
        if not kept.any():  # W is zero: nothing of it is like anything
            return y_OK.new_zeros(y_OK.shape[1])
        inner = sum(part.T @ y for part, y in zip(row_parts(w_OI), row_parts(y_OK, len(w_OI[0]))))
        return (self.small[:, kept].T @ inner / self.s[kept, None]).abs().amax(0)

    def share(self, count: int) -> float:
        """||U_r^T W V_r||_F of W's own first r directions: the norm of its first r singular values."""
        return float(self.s[:count].norm())


def row_parts(m: Tensor, width: int | None = None) -> Iterator[Tensor]:
    """Some rows after the other in float64; `width`: cut as a matrix of that width is."""
    step = max(1, CHUNK // (width or m.shape[1]))
    yield from (m[at : at + step].double() for at in range(0, len(m), step))


def long_parts(m_OI: Tensor) -> Iterator[Tensor]:
    """Some lines after the other of the longer side, each as long as the shorter one."""
    return row_parts(m_OI.T if m_OI.shape[0] <= m_OI.shape[1] else m_OI)


def frobenius(m: Tensor) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in row_parts(m)))


def projection(w_OI: Tensor, u_OK: Tensor, v_IK: Tensor) -> float:
    """||U^T W V||_F."""
    rows = zip(row_parts(w_OI), row_parts(u_OK, len(w_OI[0])))
    parts = [u.T @ (w @ v_IK.double()) for w, u in rows]
    return float(torch.stack(parts).sum(0).norm())


def random_axes(size: int, count: int, gen: torch.Generator) -> Tensor:
    """Orthonormal columns of a random direction, (size, count)."""
    return torch.linalg.qr(torch.randn(size, count, generator=gen, dtype=torch.float64)).Q


def projections(
    w_OI: Tensor, found: Spectrum, axes: Axes, count: int, gen: torch.Generator
) -> dict[str, float]:
    """||U^T W V||_F with the first `count` directions of the update, of W, and with random ones: table 7."""
    near = found.first(count)
    sides = [random_axes(size, count, gen).to(w_OI.device) for size in w_OI.shape]
    return {
        "update": projection(w_OI, near.U, near.V),
        "own": axes.share(count),
        "random": projection(w_OI, *sides),
    }


def intruders(w_OI: Tensor, update: Update, found: Spectrum, axes: Axes, k: int) -> Tensor:
    """The largest |cosine| of each of the first k left singular vectors of W + dW to those of W, (k,)."""
    tuned_OI = w_OI.clone()
    step = max(1, CHUNK // w_OI.shape[1])
    for at in range(0, len(w_OI), step):
        tuned_OI[at : at + step] += update.rows(slice(at, at + step)).to(w_OI)
    k = min(k, *w_OI.shape)
    if axes.whole:
        y_OK = Axes.of(tuned_OI).top(tuned_OI, k)
    else:
        begin = torch.cat([axes.small[:, : 4 * k], found.U[:, : 4 * k]], dim=1)
        y_OK = leading(tuned_OI, k, begin).U
    return axes.cosines(w_OI, y_OK).clamp(max=1.0)


@dataclass(frozen=True)
class Rounding:
    """What W + dW keeps of dW in a number format.

    unchanged  the share of the entries with dW != 0 where W + dW is rounded to what W is rounded to
    error      ||round(W + dW) - (W + dW)||_F / ||dW||_F; infinite if an entry does not fit the format
    """

    unchanged: float
    error: float


def rounding(w_OI: Tensor, update: Update, dtype: torch.dtype) -> Rounding:
    """The sum is taken in float32 and rounded once, as merging does; some rows at a time."""
    step = max(1, CHUNK // w_OI.shape[1])
    moved = same = 0
    lost = size = 0.0
    for at in range(0, len(w_OI), step):
        w, delta = w_OI[at : at + step].float(), update.rows(slice(at, at + step))
        total = w + delta
        saved = total.to(dtype)
        touched = delta != 0
        moved += int(touched.sum())
        same += int((touched & (saved == w.to(dtype))).sum())
        lost += float((saved.double() - total.double()).square().sum())
        size += float(delta.double().square().sum())
    if not size:
        return Rounding(0.0, 0.0)
    return Rounding(same / moved, math.sqrt(lost / size) if math.isfinite(lost) else math.inf)


# ---- two updates --------------------------------------------------------------------------------------------


def right_axes(a_RI: Tensor) -> Tensor:
    """A's right singular vectors, the largest first, (I, rank), float64."""
    _, s, vh = torch.linalg.svd(a_RI.double(), full_matrices=False)
    floor = s[0] * max(a_RI.shape) * torch.finfo(torch.float32).eps
    return vh[s > floor].T


def similarity(u_DI: Tensor, v_DJ: Tensor) -> Tensor:
    """phi(i, j), (I, J), of orthonormal columns: entry [i - 1, j - 1] compares the first i with the first j."""
    overlap_IJ = (u_DI.T @ v_DJ).square().cumsum(0).cumsum(1)
    i_I, j_J = (torch.arange(1, size + 1, device=overlap_IJ.device) for size in overlap_IJ.shape)
    return (overlap_IJ / torch.minimum(i_I[:, None], j_J[None])).clamp(max=1.0)


def expected_similarity(i: int, j: int, size: int) -> float:
    """The mean of phi(i, j) over random subspaces of R^size."""
    return max(i, j) / size


def drawn_similarity(i: int, j: int, size: int, gen: torch.Generator) -> Tensor:
    """phi of two random Gaussian matrices, (i, j)."""
    return similarity(random_axes(size, i, gen), random_axes(size, j, gen))
