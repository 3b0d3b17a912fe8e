"""Attention over short documents in one line: kernels against the definition, both against float64 softmaxes.

On a CPU the kernels run under Triton's interpreter, which has no bfloat16.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import both_ways, definition, merged
from torch import Tensor

from loraloom.kernels import attention_short
from loraloom.kernels.attention_short import short
from loraloom.kernels.twin import forced
from loraloom.packing import bounds_of

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
LENGTHS = {
    "mixed": (5, 1, 12, 1, 1, 3, 40),
    "across tiles": (100, 60, 7, 150),
    "one": (170,),
    "of one token": (1,) * 9,
    "empty among": (0, 30, 0, 0, 50, 0),
}
SHAPES = [(2, 2, 16), (4, 1, 16), (6, 2, 24)]  # query heads, key heads, features


@pytest.fixture(autouse=True)
def ranges_in_the_interpreter(monkeypatch):
    """Triton's interpreter makes a Python number of an array of one element, which numpy 2.4 refuses."""
    if GPU:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def bounds(lengths: tuple[int, ...]) -> Tensor:
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return bounds_of(starts, sum(lengths)).to(DEVICE)


def test_bounds_are_each_tokens_document():
    assert bounds((0, 2, 0, 3)).tolist() == [[0, 0, 2, 2, 2], [2, 2, 5, 5, 5]]


@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_the_definition_is_each_documents_softmax(lengths, window):
    whole, (q, k, v) = merged(sum(lengths), 4, 2, 8, dtype=torch.float64)
    with forced("torch"):
        shown = both_ways(short(q, k, v, bounds(lengths).cpu(), 0.3, window), whole)
    wanted = both_ways(definition(q, k, v, lengths, 0.3, window), whole)
    for got, want in zip(shown, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # lse and delta are kept in float32


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_the_kernels_are_the_definition(lengths, shape, window):
    dtype = torch.bfloat16 if GPU else torch.float32
    whole, (q, k, v) = merged(sum(lengths), *shape, dtype=dtype, device=DEVICE)
    results = []
    for path in ("triton", "torch"):
        with forced(path):
            results.append(both_ways(short(q, k, v, bounds(lengths), 0.3, window), whole))
    within = 2e-2 if GPU else 1e-5  # p and ds are rounded to the tensors' precision for their products
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=within, atol=within * float(want.abs().max()))


@settings(
    max_examples=60 if GPU else 12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # it patches nothing that an example changes
)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=9).filter(any), st.none() | st.integers(1, 80))
def test_any_documents_and_any_window(lengths, window):
    dtype = torch.bfloat16 if GPU else torch.float32
    whole, (q, k, v) = merged(sum(lengths), 2, 1, 16, dtype=dtype, device=DEVICE)
    with forced("triton"):
        shown = both_ways(short(q, k, v, bounds(tuple(lengths)), 0.25, window), whole)
    wanted = both_ways(definition(q, k, v, tuple(lengths), 0.25, window), whole)
    within = 2e-2 if GPU else 1e-5
    for got, want in zip(shown, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=within, atol=within * float(want.abs().max()))


def test_the_same_numbers_every_time():
    """No sum is taken by whoever comes first."""
    whole, (q, k, v) = merged(300, 4, 2, 16, dtype=torch.float16, device=DEVICE)
    with forced("triton"):
        runs = [both_ways(short(q, k, v, bounds((120, 30, 150)), 0.3, None), whole) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_large_scores_do_not_overflow():
    whole, (q, k, v) = merged(50, 2, 2, 16, dtype=torch.float16, device=DEVICE)
    with forced("triton"):
        out, grad = both_ways(short(60 * q, 60 * k, v, bounds((20, 30)), 1.0, None), whole)
    assert out.isfinite().all()
    assert grad.isfinite().all()


def test_who_is_served():
    assert attention_short.takes_short(torch.empty(1, 1, 128, dtype=torch.bfloat16, device="meta"))
    assert not attention_short.takes_short(torch.empty(1, 1, 256, dtype=torch.bfloat16, device="meta"))
    assert not attention_short.takes_short(torch.empty(1, 1, 64, dtype=torch.float32, device="meta"))
    assert not attention_short.takes_short(torch.empty(1, 1, 64, dtype=torch.bfloat16))
