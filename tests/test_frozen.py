"""Frozen weights as one matrix: products, both ways, against each layer's own; memory joined and given back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraloom.frozen import Frozen
from loraloom.kernels.block import shown
from loraloom.kernels.matmul_frozen import release_buffers
from loraloom.quant import Weight4, dense, quantized

SIZES = [(64, 32, 32), (48, 48), (80,)]  # rows of q, k and v; of gate and up; of down
WIDTH = 32
FORMS = ["dense", "nf4", "fp4", "fp8"]
EIGHT = ["nf4", "fp8"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def layers(
    sizes: tuple[int, ...], form: str, *, bias: str = "none", dtype: torch.dtype = torch.float32
) -> list[nn.Linear]:
    """Linear layers whose weights differ in size by powers of ten; `bias` is none, all or the first's."""
    made = []
    for number, size in enumerate(sizes):
        one = nn.Linear(WIDTH, size, bias=bias == "all" or (bias == "first" and number == 0), dtype=dtype)
        with torch.no_grad():
            one.weight.copy_(draw(size, WIDTH, seed=number) * 0.1**number)
            if one.bias is not None:
                one.bias.copy_(draw(size, seed=9 + number))
        if form != "dense":
            one.weight = quantized(one.weight, table=form)
        made.append(one.requires_grad_(False))
    return made


def with_eight(modules: list[nn.Linear]) -> list[nn.Linear]:
    for one in modules:
        weight: Any = one.weight
        weight.codes = weight.codes.with_channels()
    return modules


def tensors(modules: list[nn.Linear]) -> list[Tensor]:
    """All that the weights keep."""
    found: list[Tensor] = []
    for one in modules:
        found += one.weight.codes.tensors() if isinstance(one.weight, Weight4) else [one.weight.detach()]
    return found


@pytest.mark.parametrize("bias", ["none", "all", "first"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_products_are_those_of_each_layer(form: str, sizes: tuple[int, ...], bias: str) -> None:
    modules = layers(sizes, form, bias=bias)
    x = draw(7, WIDTH)
    wanted = torch.cat([one(x) for one in modules], dim=1)
    whole = torch.cat([dense(one.weight, torch.float32) for one in modules])
    frozen = Frozen(modules)
    assert frozen.shape == (sum(sizes), WIDTH)
    torch.testing.assert_close(frozen.times(shown(x, False)), wanted)
    assert torch.equal(frozen.dense(), whole)
    torch.testing.assert_close(torch.cat([one(x) for one in modules], dim=1), wanted)
    low, onto = (draw(7, 16, seed=2), draw(sum(sizes), 16, seed=3)), draw(7, sum(sizes), seed=4)
    more = low[0] @ low[1].T
    torch.testing.assert_close(frozen.times(shown(x, False), low), wanted + more, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frozen.times(shown(x, False), onto=onto), wanted + onto, rtol=1e-4, atol=1e-5)
    both = frozen.times(shown(x, False), low, onto)
    torch.testing.assert_close(both, wanted + more + onto, rtol=1e-4, atol=1e-5)
    dy, thin = draw(7, sum(sizes), seed=5), (draw(7, 16, seed=6), draw(16, WIDTH, seed=7))
    torch.testing.assert_close(frozen.back(shown(dy, False)), dy @ whole, rtol=1e-4, atol=1e-5)
    wanted = dy @ whole + thin[0] @ thin[1]
    torch.testing.assert_close(frozen.back(shown(dy, False), thin), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_float64_is_decoded_too(form: str, sizes: tuple[int, ...]) -> None:
    modules = layers(sizes, form, dtype=torch.float64)
    whole = torch.cat([dense(one.weight, torch.float64) for one in modules])
    release_buffers()
    assert torch.equal(Frozen(modules).dense(), whole)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("form", EIGHT)
def test_products_in_8_bits_hold_each_layers_numbers(form: str, sizes: tuple[int, ...]) -> None:
    """W forward and W^T backward are, but for what underflows, one matrix: the codes by rows of either."""
    modules = with_eight(layers(sizes, form, bias="all"))
    whole = torch.cat([dense(one.weight, torch.float32) for one in modules])
    frozen = Frozen(modules)
    assert frozen.fp8
    for turned, matrix in ((False, whole), (True, whole.T)):
        codes, scale = frozen.codes(turned=turned)
        assert codes.shape == matrix.shape
        got = codes.float() * scale[:, None]
        limit = matrix.abs() / 16 + scale[:, None] * 2.0**-10
        assert bool(((got - matrix).abs() <= limit).all())
        if form == "fp8" and not turned:
            assert torch.equal(got, matrix)
    x, dy = draw(7, WIDTH), draw(7, sum(sizes), seed=5)
    bias = torch.cat([one.bias for one in modules])
    wanted = F.linear(shown(x, True).codes.dense(), whole, bias)  # type: ignore[union-attr]
    got = frozen.times(shown(x, True))
    assert float((got - wanted).norm() / wanted.norm()) < (0.002 if form == "fp8" else 0.05)
    low, onto = (draw(7, 16, seed=2), draw(sum(sizes), 16, seed=3)), draw(7, sum(sizes), seed=4)
    torch.testing.assert_close(frozen.times(shown(x, True), low, onto), got + onto + low[0] @ low[1].T)
    exact = dy @ whole
    back = frozen.back(shown(dy, True))
    assert float((back - exact).norm() / exact.norm()) < 0.05
    thin = draw(7, 16, seed=6), draw(16, WIDTH, seed=7)
    torch.testing.assert_close(frozen.back(shown(dy, True), thin), back + thin[0] @ thin[1])


def test_one_that_is_not_multiplied_in_8_bits_keeps_all_in_16() -> None:
    modules = layers(SIZES[0], "fp8")
    with_eight(modules[:2])
    frozen = Frozen(modules)
    assert not frozen.fp8
    assert torch.equal(frozen.dense(), torch.cat([dense(one.weight, torch.float32) for one in modules]))


@pytest.mark.parametrize(
    ("form", "eight"), [*((form, False) for form in FORMS), *((form, True) for form in EIGHT)]
)
def test_memory_is_shared_while_joined_and_given_back_bit_for_bit(form: str, eight: bool) -> None:
    modules = layers(SIZES[0], form)
    if eight:
        with_eight(modules)
    weights = [one.weight for one in modules]
    before = [tensor.clone() for tensor in tensors(modules)]
    rooms = [tensor.untyped_storage().nbytes() for tensor in tensors(modules)]
    frozen = Frozen(modules)
    if form in ("dense", "fp8"):
        firsts = [next(iter(tensors([one]))) for one in modules]
        assert len({first.untyped_storage().data_ptr() for first in firsts}) == 1
        assert firsts[0].untyped_storage().nbytes() == frozen.shape[0] * WIDTH * firsts[0].element_size()
    frozen.part()
    frozen.part()  # a second time is nothing
    assert all(one.weight is weight for one, weight in zip(modules, weights, strict=True))
    after = tensors(modules)
    for now, was in zip(after, before, strict=True):
        assert now.dtype == was.dtype
        assert now.is_contiguous()
        assert bool((now == was).all()) if now.dtype.itemsize == 1 else torch.equal(now, was)
    assert [tensor.untyped_storage().nbytes() for tensor in after] == rooms


def test_a_weight_that_was_moved_meanwhile_stays_where_it_is() -> None:
    modules = layers(SIZES[0], "dense")
    frozen = Frozen(modules)
    modules[1].double()
    moved = modules[1].weight.data_ptr()
    other = nn.Parameter(draw(32, WIDTH), requires_grad=False)
    kept, modules[2].weight = modules[2].weight, other  # such as a merged one
    frozen.part()
    assert modules[1].weight.dtype == torch.float64
    assert modules[1].weight.data_ptr() == moved
    assert modules[2].weight is other
    assert torch.equal(other, draw(32, WIDTH))
    assert kept.untyped_storage().nbytes() == kept.numel() * 4


@pytest.mark.parametrize("form", FORMS)
def test_shapes_alone(form: str) -> None:
    modules = [one.to("meta") for one in layers(SIZES[0], form)]
    frozen = Frozen(modules)
    x = torch.empty(5, WIDTH, device="meta")
    assert frozen.times(shown(x, False)).shape == (5, 128)
    assert frozen.back(shown(torch.empty(5, 128, device="meta"), False)).shape == (5, WIDTH)
    frozen.part()
