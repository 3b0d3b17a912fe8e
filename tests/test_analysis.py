"""The algebra of updates, against numpy in float64, definitions written out here, and published numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraloom import analysis
from loraloom.analysis import (
    Axes,
    Update,
    drawn_similarity,
    expected_similarity,
    frobenius,
    intruders,
    leading,
    projections,
    random_axes,
    right_axes,
    rounding,
    similarity,
    spectrum_of,
    thin_svd,
)

sizes = st.integers(2, 24)
ranks = st.integers(1, 8)
seeds = st.integers(0, 2**31)
quick = settings(max_examples=40, deadline=None)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def axes_of(size: int, count: int, seed: int) -> Tensor:
    return random_axes(size, count, torch.Generator().manual_seed(seed))


def with_values(s: list[float], rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix of these singular values, float64."""
    left, right = axes_of(rows, len(s), seed), axes_of(columns, len(s), seed + 1)
    return left @ torch.diag(torch.tensor(s, dtype=torch.float64)) @ right.T


# ---- the spectrum -------------------------------------------------------------------------------------------


@quick
@given(sizes, sizes, ranks, seeds)
def test_the_thin_svd_is_that_of_the_product(rows: int, columns: int, r: int, seed: int) -> None:
    b_OR, a_RI = drawn(rows, r, seed=seed), drawn(r, columns, seed=seed + 1)
    dense = b_OR.double().numpy() @ a_RI.double().numpy()
    truth = np.linalg.svd(dense, compute_uv=False)
    found = thin_svd(b_OR, a_RI)
    s = found.s.numpy()
    np.testing.assert_allclose(s, truth[: len(s)], atol=1e-12 * truth[0])
    assert np.all(truth[len(s) :] < 1e-12 * truth[0])
    np.testing.assert_allclose((found.U * found.s @ found.V.T).numpy(), dense, atol=1e-12 * truth[0])
    assert found.norm == pytest.approx(np.linalg.norm(dense), rel=1e-12)
    assert found.rank == np.linalg.matrix_rank(dense)


@pytest.mark.parametrize("shape", [(40, 17), (17, 40), (12, 12)])
def test_all_of_a_small_matrix_is_found(shape: tuple[int, int]) -> None:
    m_OI = drawn(*shape)
    u, s, vh = np.linalg.svd(m_OI.double().numpy(), full_matrices=False)
    found = spectrum_of(m_OI, 4)
    assert found.whole
    np.testing.assert_allclose(found.s.numpy(), s, rtol=1e-7)
    np.testing.assert_allclose(np.abs(np.sum(found.U.numpy() * u, axis=0)), 1, atol=1e-7)
    np.testing.assert_allclose(np.abs(np.sum(found.V.numpy() * vh.T, axis=0)), 1, atol=1e-7)


def test_the_first_of_a_large_matrix_are_found() -> None:
    values = [10 * 0.8**i for i in range(60)]
    m_OI = with_values(values, 90, 70)
    found = leading(m_OI.float(), 8)
    assert not found.whole
    assert found.effective_rank is None
    np.testing.assert_allclose(found.s.numpy(), values[:8], rtol=1e-5)
    truth = np.linalg.svd(m_OI.numpy())[0]
    np.testing.assert_allclose(np.abs(np.sum(found.U.numpy() * truth[:, :8], axis=0)), 1, atol=1e-5)
    assert found.norm == pytest.approx(np.linalg.norm(m_OI.numpy()), rel=1e-6)


def test_effective_and_stable_rank_of_known_spectra() -> None:
    for count in (1, 3, 8):
        even = spectrum_of(with_values([2.0] * count, 20, 12), 12)
        assert even.effective_rank == pytest.approx(count, rel=1e-9)
        assert even.stable_rank == pytest.approx(count, rel=1e-9)
    two = thin_svd(with_values([3.0, 1.0], 9, 2), torch.eye(2))
    p = np.array([0.9, 0.1])
    assert two.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-12)
    assert two.stable_rank == pytest.approx(10 / 9, rel=1e-12)


def test_an_update_of_zero_has_no_rank() -> None:
    found = thin_svd(torch.zeros(5, 2), drawn(2, 7))
    assert (found.norm, found.rank, found.effective_rank, found.stable_rank) == (0, 0, None, None)


def test_norms_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "CHUNK", 30)
    m = drawn(23, 7)
    assert frobenius(m) == pytest.approx(np.linalg.norm(m.double().numpy()), rel=1e-12)
    found = spectrum_of(m, 4)
    np.testing.assert_allclose(
        found.s.numpy(), np.linalg.svd(m.double().numpy(), compute_uv=False), rtol=1e-7
    )


# ---- in W: table 7 ------------------------------------------------------------------------------------------


def test_projections_of_a_constructed_pair() -> None:
    """W and dW share their directions, in another order: what the projections must be is known."""
    left, right = axes_of(30, 6, 1), axes_of(20, 6, 2)
    w = left @ torch.diag(torch.tensor([9.0, 7, 5, 3, 2, 1], dtype=torch.float64)) @ right.T
    update = Update(B=(left[:, 4:6] * torch.tensor([40.0, 30.0])), A=right[:, 4:6].T)  # of W's weakest two
    found = update.spectrum(2)
    got = projections(w, found, Axes.of(w), 2, torch.Generator().manual_seed(0))
    assert got["update"] == pytest.approx(math.hypot(2, 1), rel=1e-9)
    assert got["own"] == pytest.approx(math.hypot(9, 7), rel=1e-9)
    assert found.norm / got["update"] == pytest.approx(50 / math.hypot(2, 1), rel=1e-9)


@pytest.mark.parametrize(("r", "inside", "size", "printed"), [(4, 0.32, 6.91, 21.5), (64, 1.90, 3.57, 1.9)])
def test_the_amplification_of_table_7(r: int, inside: float, size: float, printed: float) -> None:
    """W of norm 61.95 that has the printed share along dW's directions: the paper's factor comes out."""
    d = 96
    u, v = axes_of(d, r, 3), axes_of(d, r, 4)
    noise = drawn(d, d, seed=5).double()
    outside = noise - u @ (u.T @ noise)  # nothing of it along U
    along = inside / math.sqrt(r) * u @ v.T
    w = along + outside * math.sqrt(61.95**2 - inside**2) / outside.norm()
    update = Update(B=u * (size / math.sqrt(r)) * torch.linspace(0.999, 1.001, r), A=v.T)
    found = update.spectrum(r)
    got = projections(w, found, Axes.of(w), r, torch.Generator().manual_seed(0))
    assert float(w.norm()) == pytest.approx(61.95, rel=1e-6)
    assert got["update"] == pytest.approx(inside, rel=1e-6)
    assert found.norm / got["update"] == pytest.approx(printed, rel=0.02)
    assert got["own"] > got["random"]


def test_random_directions_see_w_evenly() -> None:
    """E ||U^T W V||_F^2 = r^2 ||W||_F^2 / (O I), over draws."""
    w = with_values([5.0, 3.0, 1.0], 40, 25)
    gen, update = torch.Generator().manual_seed(0), Update(B=drawn(40, 3), A=drawn(3, 25))
    found, axes = update.spectrum(3), Axes.of(w)
    squares = [projections(w, found, axes, 3, gen)["random"] ** 2 for _ in range(400)]
    truth = 9 * 35 / (40 * 25)
    assert np.mean(squares) == pytest.approx(truth, abs=4 * np.std(squares) / math.sqrt(400))


# ---- intruder dimensions ------------------------------------------------------------------------------------


def peaks(w: Tensor, delta: Tensor, k: int) -> Any:
    """By the definition: numpy's SVDs of W and of W + dW."""
    base = np.linalg.svd(w.double().numpy(), full_matrices=False)[0]
    tuned = np.linalg.svd((w.double() + delta.double()).numpy(), full_matrices=False)[0]
    return np.abs(base.T @ tuned[:, :k]).max(axis=0)


@pytest.mark.parametrize("shape", [(30, 30), (48, 20), (20, 48)])
@pytest.mark.parametrize("size", [0.1, 40.0])
def test_cosines_are_those_of_the_definition(shape: tuple[int, int], size: float) -> None:
    w = drawn(*shape, seed=1)
    update = Update(B=drawn(shape[0], 2, seed=2) * size, A=drawn(2, shape[1], seed=3) / shape[1])
    got = intruders(w, update, update.spectrum(2), Axes.of(w), 6)
    truth = peaks(w, update.rows(slice(None)), 6)
    np.testing.assert_allclose(got.numpy(), truth, atol=1e-4)
    if size > 1 and shape == (30, 30):
        assert (truth < 0.6).any()  # else only what is no intruder was seen


def test_a_planted_intruder_is_found_and_w_alone_has_none() -> None:
    w = with_values([10 - 0.3 * i for i in range(20)], 40, 30).float()
    base = torch.linalg.svd(w.double())[0]
    y = base[:, 30:40].sum(1, keepdim=True) / math.sqrt(10)  # outside of W's columns, so no cosine is above 0
    update = Update(B=(y * 25).float(), A=axes_of(30, 1, 9).T.float())
    got = intruders(w, update, update.spectrum(1), Axes.of(w), 5)
    assert (got < 0.5).tolist() == [True, False, False, False, False]
    still = Update(B=torch.zeros(40, 1), A=torch.zeros(1, 30))
    np.testing.assert_allclose(intruders(w, still, still.spectrum(1), Axes.of(w), 5).numpy(), 1, atol=1e-5)


def test_above_the_exact_side_intruders_are_counted_against_the_leading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w = with_values([20 * 0.9**i for i in range(50)], 64, 56).float()
    update = Update(B=drawn(64, 2, seed=4) * 3, A=drawn(2, 56, seed=5) / 7)
    whole = intruders(w, update, update.spectrum(2), Axes.of(w), 4)
    monkeypatch.setattr(analysis, "EXACT_SIDE", 8)
    axes = Axes.of(w, 24)
    assert not axes.whole
    part = intruders(w, update, update.spectrum(2), axes, 4)
    assert bool((part <= whole + 1e-4).all())  # fewer directions to be near to
    np.testing.assert_allclose(part.numpy(), whole.numpy(), atol=0.02)


# ---- rounding -----------------------------------------------------------------------------------------------


def test_what_16_bits_keep_of_known_sums() -> None:
    """bfloat16 has 8 bits: next to 1 its steps are 1/128 above; half of one is lost, and more is not."""
    w = torch.ones(4, 4)
    lost = rounding(w, Update(whole=torch.full((4, 4), 2.0**-9)), torch.bfloat16)
    assert (lost.unchanged, lost.error) == (1.0, 1.0)
    kept = rounding(w, Update(whole=torch.full((4, 4), 2.0**-7)), torch.bfloat16)
    assert (kept.unchanged, kept.error) == (0.0, 0.0)
    half = torch.zeros(4, 4)
    half[:, :2] = 2.0**-9
    half[:, 2:] = 2.0**-7
    mixed = rounding(w, Update(whole=half), torch.bfloat16)
    assert mixed.unchanged == 0.5
    assert mixed.error == pytest.approx(2.0**-9 / math.hypot(2.0**-9, 2.0**-7), rel=1e-6)
    fine = rounding(w, Update(whole=torch.full((4, 4), 2.0**-9)), torch.float16)
    assert (fine.unchanged, fine.error) == (0.0, 0.0)


def test_entries_that_did_not_move_are_no_risk_and_overflow_is_told() -> None:
    delta = torch.zeros(3, 3)
    delta[0, 0] = 1.0
    assert rounding(torch.ones(3, 3), Update(whole=delta), torch.bfloat16).unchanged == 0
    assert rounding(torch.ones(3, 3), Update(whole=torch.zeros(3, 3)), torch.bfloat16).error == 0
    assert (
        rounding(torch.full((2, 2), 6e4), Update(whole=torch.full((2, 2), 6e4)), torch.float16).error
        == math.inf
    )


@quick
@given(sizes, sizes, seeds, st.sampled_from([torch.bfloat16, torch.float16]))
def test_rounding_is_that_of_the_whole_matrix(rows: int, columns: int, seed: int, dtype: torch.dtype) -> None:
    w = drawn(rows, columns, seed=seed).to(torch.bfloat16).float()
    update = Update(B=drawn(rows, 2, seed=seed + 1) / 50, A=drawn(2, columns, seed=seed + 2))
    total = w + update.rows(slice(None))
    saved = total.to(dtype)
    got = rounding(w, update, dtype)
    error = (saved.double() - total.double()).norm() / update.rows(slice(None)).double().norm()
    assert got.error == pytest.approx(float(error), rel=1e-6)
    assert got.unchanged == pytest.approx(float((saved == w.to(dtype)).double().mean()))


# ---- two updates --------------------------------------------------------------------------------------------


@quick
@given(st.integers(8, 24), ranks, ranks, seeds)
def test_phi_is_one_less_the_projection_metric(size: int, r: int, q: int, seed: int) -> None:
    """phi = 1 - d^2 / p with d^2 = p - sum of the squared cosines of the principal angles, p = min(i, j)."""
    a1, a2 = drawn(r, size, seed=seed), drawn(q, size, seed=seed + 1)
    phi = similarity(right_axes(a1), right_axes(a2)).numpy()
    v1 = np.linalg.svd(a1.double().numpy(), full_matrices=False)[2]
    v2 = np.linalg.svd(a2.double().numpy(), full_matrices=False)[2]
    for i in range(1, r + 1):
        for j in range(1, q + 1):
            cosines = np.linalg.svd(v1[:i] @ v2[:j].T, compute_uv=False)
            p = min(i, j)
            d2 = p - (cosines**2).sum()
            assert phi[i - 1, j - 1] == pytest.approx(1 - d2 / p, abs=1e-9)


@quick
@given(st.integers(8, 24), ranks, ranks, seeds, st.floats(1e-3, 1e3))
def test_phi_is_symmetric_within_bounds_and_blind_to_scale_and_turning(
    size: int, r: int, q: int, seed: int, scale: float
) -> None:
    a1, a2 = drawn(r, size, seed=seed).double(), drawn(q, size, seed=seed + 1).double()
    phi = similarity(right_axes(a1), right_axes(a2))
    assert bool(((phi >= 0) & (phi <= 1)).all())
    torch.testing.assert_close(phi, similarity(right_axes(a2), right_axes(a1)).T, rtol=0, atol=1e-9)
    torch.testing.assert_close(phi, similarity(right_axes(a1 * scale), right_axes(a2)), rtol=0, atol=1e-7)
    turn, spin = axes_of(size, size, seed + 2), axes_of(r, r, seed + 3)
    both = similarity(right_axes(a1 @ turn), right_axes(a2 @ turn))  # of the space that both live in
    torch.testing.assert_close(phi, both, rtol=0, atol=1e-6)
    inside = similarity(right_axes(spin @ a1), right_axes(a2))  # of A's own rows
    torch.testing.assert_close(phi, inside, rtol=0, atol=1e-6)


def test_phi_of_a_space_with_itself_and_with_what_holds_it() -> None:
    u = axes_of(30, 8, 0)
    phi = similarity(u, u)
    torch.testing.assert_close(phi.diagonal(), torch.ones(8, dtype=torch.float64))
    assert float(phi[2, 7]) == pytest.approx(1.0)  # the first three lie in all eight
    assert float(similarity(u[:, :4], u[:, 4:]).max()) == pytest.approx(0.0, abs=1e-12)


def test_what_two_random_spaces_share() -> None:
    gen, size, draws = torch.Generator().manual_seed(0), 60, 600
    stack = torch.stack([drawn_similarity(4, 9, size, gen) for _ in range(draws)])
    mean, spread = stack.mean(0), stack.std(0) / math.sqrt(draws)
    for i in range(1, 5):
        for j in range(1, 10):
            off = abs(float(mean[i - 1, j - 1]) - expected_similarity(i, j, size))
            assert off < 5 * float(spread[i - 1, j - 1])


def test_directions_of_a_deficient_matrix_are_left_out() -> None:
    a = torch.cat([drawn(2, 9), torch.zeros(3, 9)])
    assert right_axes(a).shape == (9, 2)
