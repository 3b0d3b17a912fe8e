"""The frozen layer and its update as one node, against the formula and torch's autograd."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loraloom.adapt import attach
from loraloom.incoming import quantize_model
from loraloom.kernels.lora_linear import Base, lora_linear
from loraloom.kernels.matmul_frozen import release_buffers, times
from loraloom.quant import dense, quantized

I, O, R = 48, 32, 5
E4M3 = torch.float8_e4m3fn


def operands(dtype: Any, *, vector: bool, masters: Any = None) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    x = random(2, 7, I)
    keep = (torch.rand(x.shape, generator=gen) > 0.3) / 0.7
    made = {
        "x": x,
        "a": random(R, I) / 7,
        "b": random(O, R) / 2,
        "bias": random(O),
        "keep": keep,
        "seed": random(2, 7, O),
    }
    made["e"] = random(R).abs() if vector else torch.tensor(2.5)
    wide = {"a", "b", "e"} if masters is not None else set()
    return {name: value.to(masters if name in wide else dtype) for name, value in made.items()}


def weights(dtype: Any) -> dict[str, tuple[Base, Tensor]]:
    """Bases, and W (O, I) as each of them stands for it."""
    w = (torch.randn(O, I, generator=torch.Generator().manual_seed(1)) * 0.2).to(dtype)
    plain, turned = quantized(w).data, quantized(w.T, flipped=True).data
    eight = quantized(w, table="fp8").data
    return {
        "dense": (Base(w), w),
        "Conv1D": (Base(w.T.contiguous(), turned=True), w),
        "nf4": (Base(plain.codes), dense(plain)),
        "nf4, Conv1D": (Base(turned.codes), dense(turned).T),
        "nf4, turned": (Base(quantized(w.T).data.codes, turned=True), dense(quantized(w.T).data).T),
        "fp8": (Base(eight.codes), dense(eight)),
    }


def ask(parts: dict[str, Any], names: str) -> list[Tensor]:
    wanted = [parts[name] for name in names.split()]
    for tensor in wanted:
        tensor.requires_grad_()
    return wanted


def formula(x: Tensor, w: Tensor, p: dict[str, Any], dropped: Tensor | None) -> Tensor:
    z = F.linear(x if dropped is None else dropped, p["a"].to(x.dtype)) * p["e"].to(x.dtype)
    return F.linear(x, w, p["bias"]) + F.linear(z, p["b"].to(x.dtype))


@pytest.mark.parametrize("kind", ["dense", "Conv1D", "nf4", "nf4, Conv1D", "nf4, turned", "fp8"])
@pytest.mark.parametrize(("vector", "drops"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("names", ["x a b bias", "a b", "x b", "x", "a"])
def test_numbers_and_gradients_are_the_formulas(kind: str, vector: bool, drops: bool, names: str) -> None:
    base, w = weights(torch.float64)[kind]
    p = operands(torch.float64, vector=vector)
    wanted = ask(p, names + (" e" if vector and "b" in names else ""))
    e = p["e"] if vector else float(p["e"])
    dropped = p["x"] * p["keep"] if drops else None
    y = lora_linear(p["x"], base, p["bias"], p["a"], p["b"], e, dropped)
    z = formula(p["x"], w, p, p["x"] * p["keep"] if drops else None)
    torch.testing.assert_close(y, z, rtol=0, atol=1e-12)
    for got, want in zip(
        torch.autograd.grad(y, wanted, p["seed"]), torch.autograd.grad(z, wanted, p["seed"])
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_gradients_against_finite_differences() -> None:
    base, _ = weights(torch.float64)["nf4"]
    p = operands(torch.float64, vector=True)
    x, a, b, e = ask(p, "x a b e")
    assert torch.autograd.gradcheck(lambda *t: lora_linear(t[0], base, None, *t[1:]), (x[:1, :2], a, b, e))


def test_bfloat16_is_no_further_from_the_truth_than_torchs_own_steps() -> None:
    base, w = weights(torch.bfloat16)["nf4"]
    p = operands(torch.bfloat16, vector=False, masters=torch.float32)
    wanted = ask(p, "x a b")
    exact = {name: value.detach().double() for name, value in p.items()}
    truth = ask(exact, "x a b")
    t = formula(exact["x"], w.double(), exact, None)
    wants = [t, *torch.autograd.grad(t, truth, exact["seed"])]
    found = []
    for y in (lora_linear(p["x"], base, p["bias"], p["a"], p["b"], 2.5), formula(p["x"], w, p, None)):
        found.append([y, *torch.autograd.grad(y, wanted, p["seed"])])
    assert [g.dtype for g in found[0]] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for ours, torchs, want in zip(*found, wants):
        off, theirs = ((one.double() - want).norm() / want.norm() for one in (ours, torchs))
        assert off <= 1.05 * theirs
        assert off < 0.01


def test_products_in_8_bits_are_those_of_the_base_both_ways() -> None:
    codes = quantized(
        torch.randn(O, I, generator=torch.Generator().manual_seed(1)) * 0.2
    ).data.codes.with_channels()
    p = operands(torch.float32, vector=False)
    wanted = ask(p, "x a b")
    y = lora_linear(p["x"], Base(codes, eight=True), p["bias"], p["a"], p["b"], 2.5)
    low = F.linear(F.linear(p["x"], p["a"]) * 2.5, p["b"])
    z = times(p["x"].detach(), codes, False, True) + p["bias"] + low
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
    dx, da, db = torch.autograd.grad(y, wanted, p["seed"])
    want = list(torch.autograd.grad(low, wanted, p["seed"]))
    want[0] = want[0] + times(p["seed"], codes, True, True)
    for got, other in zip((dx, da, db), want):
        torch.testing.assert_close(got, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", ["x a b", "x b", "a b"])
def test_what_is_kept_is_the_input_and_the_rows_of_a(names: str) -> None:
    base, _ = weights(torch.float32)["nf4"]
    p = operands(torch.float32, vector=False)
    ask(p, names)
    release_buffers()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(p["x"], base, p["bias"], p["a"], p["b"], 2.5)
    sizes = sorted(t.numel() for t in saved)
    kept = [14 * R, R * I, O * R] + ([14 * I] if "a" in names.split() else [])
    assert sizes == sorted(kept)


def test_under_checkpointing_and_on_meta() -> None:
    base, _ = weights(torch.float32)["nf4"]
    p = operands(torch.float32, vector=True)
    wanted = ask(p, "x a b e")

    def layer(x: Tensor) -> Tensor:
        return lora_linear(x, base, p["bias"], p["a"], p["b"], p["e"]).tanh()

    plain = torch.autograd.grad(layer(p["x"]), wanted, p["seed"])
    for again, once in zip(
        torch.autograd.grad(checkpoint(layer, p["x"], use_reentrant=False), wanted, p["seed"]), plain
    ):
        assert torch.equal(again, once)
    meta = {name: value.detach().to("meta") for name, value in p.items()}
    wanted = ask(meta, "x a b e")
    matrix: Any = base.matrix
    for eight in (False, True):
        codes = matrix.map(lambda t: t.to("meta"))
        codes = codes.with_channels() if eight else codes
        y = lora_linear(meta["x"], Base(codes, eight=eight), meta["bias"], meta["a"], meta["b"], meta["e"])
        assert (y.shape, y.device.type) == ((2, 7, O), "meta")
        grads = torch.autograd.grad(y, wanted, meta["seed"])
        assert [g.shape for g in grads] == [t.shape for t in wanted]


# ---- in a bank ----------------------------------------------------------------------------------------------


def node_of(model: nn.Module, x: Tensor) -> str:
    node = model(x).grad_fn
    assert node is not None
    return type(node).__name__


def test_a_bank_uses_the_node_where_one_pair_is_all_there_is() -> None:
    def made(**spec: Any) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(I, O))
        return model, attach(model, r=2, target_modules=["0"], **spec)

    x = torch.randn(3, 4, I)
    ours = "_LoraLinearBackward"
    for spec in ({}, {"dropout": 0.2}, {"method": "rslora"}, {"method": "lorafa"}):
        model, adapters = made(**spec)
        adapters.train()
        assert node_of(model, x) == ours, spec
    for spec in ({"method": "dora"}, {"method": "vera"}, {"bias": "all"}):
        assert node_of(made(**spec)[0], x) != ours, spec
    model, adapters = made()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert node_of(model, x) != ours
    with adapters.routed(["default", None, "default"]):
        assert node_of(model, x) != ours
    quantize_model(model)
    assert node_of(model, x) == ours
    model[0].forward = lambda x, own=model[0].forward: own(x)
    assert node_of(model, x) == ours, "whoever wraps the layer later is outside"


def test_a_wrapped_layer_is_left_to_its_wrapper() -> None:
    model = nn.Sequential(nn.Linear(I, O))
    own, calls = model[0].forward, []
    model[0].forward = lambda x: calls.append(1) or own(x)  # type: ignore[method-assign]
    attach(model, r=2, target_modules=["0"])
    model(torch.randn(3, I))
    assert calls
