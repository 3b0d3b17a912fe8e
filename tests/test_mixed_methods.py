"""The least LoRA-like members of the family, three of them mixed in one batch.

Each method's truth is written here in dense float64 from its equation, with dropout masks computed in plain
Python integers; nothing is shared with the package but the tensors. Outputs, gradients of every tensor and of
x must agree to 1e-10: float64 leaves 1e-13, and sums are reordered.
"""

from __future__ import annotations

import itertools
import zlib

import pytest
import torch
from torch import nn

from loraloom.adapt import Adapters, AdapterSpec, attach
from loraloom.methods.base import NotMergeable

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
OPTIONS = {
    "alora": {"invocation": [7]},
    "deltalora": {"start": 0},
    "adapterh": {"activation": "relu"},
}
NAMES = ["lora", "vera", "dora", "adalora", "pissa", "deltalora", "alora", "adapterh"]
STEP, TOKEN = 5, 7
P_DROP = 0.3
IDS = torch.tensor([[1, 7, 2, 3, 4], [7, 1, 7, 5, 5], [1, 2, 3, 4, 5], [7, 7, 7, 7, 7]])


class Net(nn.Module):
    """Two dense layers over tokens, one with a bias and one without."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(10, 6)
        self.one = nn.Linear(6, 8)
        self.two = nn.Linear(8, 5, bias=False)

    def forward(self, input_ids, bump=0):
        return self.two(torch.tanh(self.one(self.emb(input_ids) + bump)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


def build(model, names, dropout=P_DROP) -> Adapters:
    """Adapters of these methods with every tensor moved away from its start, in float64."""
    adapters = None
    for i, name in enumerate(names):
        p = 0.0 if name in ("deltalora", "adapterh") else dropout  # they are refused with dropout
        settings = {
            "method": name,
            "r": 2 + i,
            "alpha": 3.0 + i,
            "dropout": p,
            "seed": i,
            "target_modules": ["one", "two"],
            "options": OPTIONS.get(name, {}),
        }
        if adapters is None:
            adapters = attach(model, name=f"{name}{i}", **settings)
        else:
            adapters.add(f"{name}{i}", AdapterSpec(**settings))
    gen = torch.Generator().manual_seed(1)
    seen = set()
    for adapter in adapters.adapters.values():
        for _, tensor in adapter.named_tensors():
            if id(tensor) not in seen:
                noise = torch.randn(tensor.shape, generator=gen, dtype=torch.float64) * 0.3
                moves = isinstance(tensor, nn.Parameter)
                tensor.data = tensor.data.double() + (noise if moves else 0)
                seen.add(id(tensor))
    adapters.train()
    return adapters


# ---- the truth ----------------------------------------------------------------------------------------------


def murmur(h: int) -> int:
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
    return h ^ (h >> 16)


def true_drop(x_TI, p, *, seed, group, tokens):
    """x' = x * keep / (1 - p) with the mask's hash in Python integers."""
    if p == 0:
        return x_TI
    keep = torch.zeros_like(x_TI)
    for t, token in enumerate(tokens):
        h = murmur(seed % 2**32)
        for part in (STEP, zlib.crc32(group.encode()), token % 2**32, token >> 32):
            h = murmur((h * 31 + part) % 2**32)
        for i in range(x_TI.shape[1]):
            keep[t, i] = murmur((h + i * 0x9E3779B1) % 2**32) >= p * 2**32
    return x_TI * keep / (1 - p)


def true_layer(kind, p, r, alpha, w, bias, x, xd, ids):
    """One layer's output for one row of tokens, from the method's equation."""
    base = x @ w.T + (0 if bias is None else bias)
    out, width = w.shape
    s = alpha / r
    match kind:
        case "lora":
            return base + s * (xd @ (p["B"] @ p["A"]).T)
        case "vera":
            inner = p["lambda_d"] * (xd @ p["A"][:, :width].T)
            return base + p["lambda_b"] * (inner @ p["B"][:out].T)
        case "dora":
            n = (w + s * p["B"] @ p["A"]).norm(dim=1).detach()
            plain = x @ w.T + s * (xd @ (p["B"] @ p["A"]).T)
            return plain * (p["m"] / n) + (0 if bias is None else bias)
        case "adalora":
            return base + alpha / (r + 1e-5) * (xd @ (p["B"] @ torch.diag(p["E"]) @ p["A"]).T)
        case "pissa":  # LoRA on W - s B0 A0
            return base - s * (xd @ (p["B0"] @ p["A0"]).T) + s * (xd @ (p["B"] @ p["A"]).T)
        case "deltalora":  # LoRA on a W that has moved
            moved = w + (2.0 * s * (p["B"] @ p["A"] - p["B_K"] @ p["A_K"])).detach()
            return x @ moved.T + (0 if bias is None else bias) + s * (x @ (p["B"] @ p["A"]).T)
        case "alora":
            places = [t for t, i in enumerate(ids.tolist()) if i == TOKEN]
            on = torch.tensor(
                [[float(bool(places) and t >= places[-1])] for t in range(len(ids))], dtype=w.dtype
            )
            return base + on * (s * (xd @ (p["B"] @ p["A"]).T))
        case "adapterh":
            return base + torch.relu(base @ p["W_down"].T + p["b_down"]) @ p["W_up"].T + p["b_up"]
    raise AssertionError(kind)


def true_forward(model, adapters, rows, x_in, tokens_BT, *, dropout=True):
    """The whole model, row by row."""
    outputs = []
    for b, name in enumerate(rows):
        h = x_in[b]
        for layer_name, layer in (("one", model.one), ("two", model.two)):
            w, bias = layer.weight, layer.bias
            if name is None:
                h_new = h @ w.T + (0 if bias is None else bias)
            else:
                adapter = adapters.adapters[name]
                p = adapter.sites[layer_name].p
                m = adapter.method
                rate = m.dropout if dropout else 0.0
                hd = true_drop(
                    h, rate, seed=adapters.flow.seeds[name], group=layer_name, tokens=tokens_BT[b].tolist()
                )
                h_new = true_layer(name[:-1], p, m.r, m.alpha, w, bias, h, hd, IDS[b])
            h = torch.tanh(h_new) if layer_name == "one" else h_new
        outputs.append(h)
    return torch.stack(outputs)


def gradients(adapters, loss, *extra):
    parameters = adapters.parameters()
    for tensor in (*parameters, *extra):
        tensor.grad = None
    loss()
    return {name: None if p.grad is None else p.grad.clone() for name, p in adapters.named_parameters()}, [
        t.grad.clone() for t in extra
    ]


def assert_same_gradients(ours, truth):
    assert ours.keys() == truth.keys()
    for name in truth:
        if truth[name] is None:
            assert ours[name] is None or not ours[name].any(), name
        else:
            torch.testing.assert_close(ours[name], truth[name], **TIGHT, msg=name)


# ---- the tests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trio", list(itertools.combinations(NAMES, 3)), ids="-".join)
def test_three_adapters_in_a_batch_with_dropout_equal_dense_float64(trio):
    model = net()
    adapters = build(model, trio)
    rows = [f"{name}{i}" for i, name in enumerate(trio)] + [None]
    tokens_BT = torch.arange(20).view(4, 5) * 3 + 2**33
    target = torch.randn(4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    bump = torch.zeros(4, 5, 6, dtype=torch.float64, requires_grad=True)

    def truth():
        y = true_forward(model, adapters, rows, model.emb(IDS) + bump, tokens_BT)
        results.append(y.detach())
        ((y - target) ** 2).sum().backward()

    results: list[torch.Tensor] = []
    live: list[torch.Tensor] = []

    def live_ours():
        with adapters.routed(rows), adapters.batch(step=STEP, token_BT=tokens_BT):
            y = model(input_ids=IDS, bump=bump)
        live.append(y.detach())
        ((y - target) ** 2).sum().backward()

    grads_live, [x_live] = gradients(adapters, live_ours, bump)
    grads_true, [x_true] = gradients(adapters, truth, bump)
    torch.testing.assert_close(live[0], results[0], **TIGHT)
    assert_same_gradients(grads_live, grads_true)
    torch.testing.assert_close(x_live, x_true, **TIGHT)

    grads_held, [x_held] = gradients(
        adapters, lambda: held(model, adapters, rows, tokens_BT, target, bump), bump
    )
    assert_same_gradients(grads_held, grads_true)
    torch.testing.assert_close(x_held, x_true, **TIGHT)


def held(model, adapters, rows, tokens_BT, target, bump):
    """Two passes over the same held rows, each with half of the loss."""
    with adapters.routed(rows), adapters.hold():
        for part in (0.25, 0.75):
            with adapters.batch(step=STEP, token_BT=tokens_BT):
                y = model(input_ids=IDS, bump=bump)
            (part * (y - target) ** 2).sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_one_adapter_equals_dense_float64(name):
    model = net()
    adapters = build(model, [name])
    tokens_BT = torch.arange(20).view(4, 5)
    with adapters.batch(step=STEP, token_BT=tokens_BT):
        y = model(input_ids=IDS)
    truth = true_forward(model, adapters, [f"{name}0"] * 4, model.emb(IDS), tokens_BT)
    torch.testing.assert_close(y, truth, **TIGHT)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_unchanged_at_the_start(name):
    model = net()
    before = model(IDS)
    adapters = attach(model, name, r=3, target_modules=["one", "two"], options=OPTIONS.get(name, {}))
    assert torch.equal(model(input_ids=IDS), before)
    with adapters.routed(["default", None, "default", None]):
        assert torch.equal(model(input_ids=IDS), before)


@pytest.mark.parametrize("name", NAMES)
def test_update_is_x_times_delta_and_merging_changes_nothing(name):
    model = net()
    adapters = build(model, [name], dropout=0.0)
    adapters.eval()
    if name in ("alora", "adapterh"):
        with pytest.raises(NotMergeable):
            adapters.merge()
        return
    for site in adapters.adapters[f"{name}0"].sites.values():
        x = torch.randn(7, site.layer.in_features, dtype=torch.float64)
        y = site.layer.module(x) * 0 + x @ site.layer.weight().T
        y = y if site.layer.bias() is None else y + site.layer.bias()
        update = site.method.update(site.layer, site.p, x, y)
        torch.testing.assert_close(update, x @ site.method.delta(site.layer, site.p).T, **TIGHT)
    before, bits = model(input_ids=IDS), model.one.weight.clone()
    adapters.merge()
    torch.testing.assert_close(model(input_ids=IDS), before, **TIGHT)
    adapters.unmerge()
    assert torch.equal(model.one.weight, bits)
    assert torch.equal(model(input_ids=IDS), before)


def test_frozen_bases_stand_once_in_memory():
    model = net()
    adapters = attach(model, "vera", r=3, target_modules=["one", "two"])
    one, two = adapters.adapters["default"].sites.values()
    assert one.p["A"] is two.p["A"]
    segment = adapters.banks["one"].build().segments[0]
    assert segment.A.data_ptr() == one.p["A"].data_ptr()
