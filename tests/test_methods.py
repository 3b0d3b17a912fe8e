"""What must hold for every method on every kind of layer: one table, found by file name.

A method that breaks an invariant by its nature stands in EXEMPT with the reason. Truths are dense and in
float64: the weight itself, moved by delta, in the module's own forward pass.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraloom import methods
from loraloom.adapt import Adapters, attach
from loraloom.adapter import AdapterSpec
from loraloom.adapter_files import FILES, read_record
from loraloom.adapter_io import load_adapter, save_adapter
from loraloom.dressing import dress, dress_prompts
from loraloom.errors import UserError
from loraloom.incoming import quantize_model
from loraloom.layers import EmbeddingLayer, view
from loraloom.methods.base import NotMergeable, Site
from loraloom.nll import nll_sum
from loraloom.packing import IGNORED, pack
from loraloom.quant import dense, quantized

METHODS = methods.names()
EXEMPT: dict[tuple[str, str], str] = {  # (method, invariant) -> why it does not hold
    ("dora", "gradcheck"): "the norm counts as a constant: test_dora_hira.py compares with that held fast",
    ("loraxs", "start"): "R starts at N(0, 1e-5^2), as in the paper",
    ("deltalora", "gradcheck"): "its gradients are those of a W that moves: see test_step_methods.py",
}
NO_MATRIX = "what it adds to y is not a change of W times x"
EXEMPT |= {(method, "update"): NO_MATRIX for method in ("adapterh", "adapterl", "alora", "bitfit")}
EXEMPT |= {(method, "update"): NO_MATRIX for method in ("prefix_embedding", "prefix_layer", "lora_prefix")}
INVARIANTS = ("start", "trains", "update", "merge", "detach", "gradcheck", "save", "learns", "bf16")
R = 3
SUM = {"rtol": 1e-10, "atol": 1e-10}  # float64: 1e-14 for each of some hundred terms, with room


# ---- the layers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One kind of layer: how it is made, what goes in, and which targets name it."""

    make: Callable[[], nn.Module]
    x: Callable[[torch.Generator], torch.Tensor]
    targets: tuple[str, ...] = ("layer",)
    sites: int = 1
    whole: bool = False  # a model, on which a method sits where it goes by itself
    dense: bool = True
    embedding: bool = False


def normal(*shape: int) -> Callable[[torch.Generator], torch.Tensor]:
    return lambda gen: torch.randn(*shape, generator=gen, dtype=torch.float64)


def conv1d() -> nn.Module:
    module = Conv1D(7, 5)  # from 5 to 7
    nn.init.normal_(module.bias)
    return module


def in_4_bits(module: nn.Module, **settings) -> nn.Module:
    module.weight = quantized(module.weight, flipped=isinstance(module, Conv1D), **settings)
    return module


def whole(kind: str, quantize: bool = False) -> Case:
    """A tiny model, called with ids."""

    def make() -> nn.Module:
        model = tiny.build(kind)
        if quantize:
            quantize_model(model, "nf4", block=64, double=True, keep=())
        return model

    def ids(gen: torch.Generator) -> torch.Tensor:
        drawn = torch.randint(8, tiny.VOCAB, (2, 6), generator=gen)
        drawn[:, 2] = TOKEN
        return drawn

    return Case(make, ids, whole=True, dense=not quantize)


def conv2d(**settings) -> Case:
    return Case(lambda: nn.Conv2d(3, 4, (3, 2), **settings), normal(2, 3, 7, 6))


CASES = {
    "linear": Case(lambda: nn.Linear(5, 7), normal(2, 4, 5)),
    "linear-without-bias": Case(lambda: nn.Linear(5, 7, bias=False), normal(6, 5)),
    "linear-of-a-vector": Case(lambda: nn.Linear(5, 7), normal(5)),
    "conv1d": Case(conv1d, normal(2, 4, 5)),
    "embedding": Case(
        lambda: nn.Embedding(11, 6, padding_idx=0),
        lambda gen: torch.randint(0, 11, (2, 5), generator=gen),
        embedding=True,
    ),
    "embedding-scaled": Case(
        lambda: Scaled(3.0), lambda gen: torch.randint(0, 11, (2, 5), generator=gen), embedding=True
    ),
    "embedding-scaled-by-a-buffer": Case(
        lambda: Scaled(torch.tensor(3.0)),
        lambda gen: torch.randint(0, 11, (2, 5), generator=gen),
        embedding=True,
    ),
    "conv2d": conv2d(),
    "conv2d-strided": conv2d(stride=2, padding=1, bias=False),
    "conv2d-dilated": conv2d(dilation=2, padding=(2, 1)),
    "conv2d-same": Case(lambda: nn.Conv2d(3, 4, 3, padding="same"), normal(2, 3, 5, 4)),
    "conv2d-reflect": conv2d(padding=1, padding_mode="reflect"),
    "conv2d-circular": conv2d(padding=(1, 1), padding_mode="circular", stride=2),
    "conv2d-replicate": conv2d(padding=2, padding_mode="replicate"),
    "conv2d-unbatched": Case(lambda: nn.Conv2d(3, 4, 3), normal(3, 6, 6)),
    "roles-of-conv1d": Case(lambda: Fused(Conv1D(18, 6)), normal(2, 4, 6), ("q", "v"), 2),
    "one-role": Case(lambda: Fused(Conv1D(18, 6)), normal(2, 4, 6), ("k",), 1),
    "linear-nf4": Case(lambda: in_4_bits(nn.Linear(5, 7)), normal(2, 4, 5), dense=False),
    "linear-fp4-without-bias": Case(
        lambda: in_4_bits(nn.Linear(70, 3, bias=False), table="fp4", double=False), normal(6, 70), dense=False
    ),
    "conv1d-nf4": Case(lambda: in_4_bits(conv1d(), block=32), normal(2, 4, 5), dense=False),
    "roles-of-conv1d-nf4": Case(
        lambda: Fused(in_4_bits(Conv1D(18, 6))), normal(2, 4, 6), ("q", "v"), 2, dense=False
    ),
    "gpt2": whole("gpt2"),
    "llama": whole("llama"),
    "llama-nf4": whole("llama", quantize=True),
}
WHOLE_ONLY = ("alora", "adapterl", "full", "bitfit", "prefix_embedding", "prefix_layer", "lora_prefix")
SEES_DATA = ("eva", "corda", "loraga", "loraone")
TOKEN = 7  # aLoRA's invocation
OPTIONS = {
    "alora": {"invocation": [TOKEN]},
    "bitfit": {"add_missing": True},
    "loradrop": {"kept": ["layer", "c_attn:q", "model.layers.0.mlp.up_proj", "transformer.h.0.attn.c_attn"]},
    "lora_prefix": {"prefix": 2, "infix": 1, "kind": "layer"},
    "prefix_embedding": {"prefix": 2, "infix": 1},
    "prefix_layer": {"prefix": 2, "infix": 1},
}


def refused(method: str, case: Case) -> str | None:
    """Words of the reason why a method cannot serve a case."""
    if case.whole:
        if method == "full" and not case.dense:
            return "codes of 4 bits take no small steps"
        return "there is no quantisation error" if method == "loftq" and case.dense else None
    if method == "lorafa" and case.embedding:
        return "its frozen A is zero"
    if method in SEES_DATA and case.embedding:
        return "its inputs are ids"
    if method == "loftq" and case.dense:
        return "there is no quantisation error"
    module = Host(case).module
    layer = view(module, "module")
    if method == "loraga" and not case.embedding and min(layer.in_features, layer.out_features) < 2 * R:
        return "different singular directions"
    return None


class Scaled(nn.Embedding):
    """An embedding that scales what it looks up, as Bart's (by a number) and Gemma's (by a buffer)."""

    def __init__(self, scale):
        super().__init__(11, 6)
        if isinstance(scale, torch.Tensor):
            self.register_buffer("embed_scale", scale, persistent=False)
        else:
            self.embed_scale = scale

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class Fused(nn.Module):
    """A fused projection with GPT-2's name and layout."""

    def __init__(self, module):
        super().__init__()
        self.c_attn = module
        nn.init.normal_(module.bias)

    def forward(self, x):
        return self.c_attn(x)


class Config:
    model_type, num_attention_heads, hidden_size = "gpt2", 2, 6


class Host(nn.Module):
    """A model with one layer of the case."""

    def __init__(self, case: Case, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.config = Config()
        self.layer = case.make()
        self.layer.to(dtype)

    def forward(self, x):
        return self.layer(x)

    @property
    def module(self) -> nn.Module:
        return getattr(self.layer, "c_attn", self.layer)


def host_of(case: Case, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model of a case: a whole one, or one around the layer."""
    return case.make().to(dtype) if case.whole else Host(case, dtype)


def output(host: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the host gives: logits of a whole model, called with the adapter's own tokens in the text."""
    if isinstance(host, Host):
        return host(x)
    return host(input_ids=torch.tensor(dress_prompts(host, x.tolist()))).logits


def settings(method: str, case: Case) -> dict:
    chosen = {"method": method, "r": R, "alpha": 5.0, "seed": 4, "options": OPTIONS.get(method, {})}
    return chosen if case.whole else chosen | {"target_modules": list(case.targets)}


def stirred(method: str, case: Case, dtype=torch.float64) -> tuple[Any, Adapters]:
    """A host whose adapter has left its start, in float64."""
    host = host_of(case, dtype)
    adapters = attach(host, **settings(method, case))
    for _, tensor in adapters.adapters["default"].named_tensors():
        tensor.data = tensor.data.to(torch.promote_types(dtype, torch.float32))
    tiny.stir(adapters, size=0.05 if case.whole else 0.5)
    return host, adapters


def x_of(case: Case) -> torch.Tensor:
    return case.x(torch.Generator().manual_seed(3))


def moved(host: Host, adapters: Adapters) -> nn.Module:
    """The layer itself with W + delta in its weight: the dense truth."""
    own = host.module.weight.dtype
    return widened(host, adapters, own)


def widened(host: Host, adapters: Adapters, dtype: torch.dtype) -> nn.Module:
    truth = copy.deepcopy(host.module)
    truth.__dict__.pop("forward", None)
    truth.weight = nn.Parameter(dense(truth.weight).clone())  # of a 4-bit weight, the numbers it stands for
    truth.to(dtype)
    with torch.no_grad():
        for site in adapters.adapters["default"].sites.values():
            rows = slice(None) if site.layer.rows is None else site.layer.rows
            flat = view(truth, "truth").matrix(truth.weight)
            flat[rows] += site.method.delta(site.layer, site.p).to(dtype)
            truth.weight.copy_(view(truth, "truth").like_weight(flat))
    return truth


def holds(method: str, invariant: str) -> None:
    if (method, invariant) in EXEMPT:
        pytest.skip(EXEMPT[method, invariant])


def pairs(wanted: Callable[[str, Case], bool]) -> pytest.MarkDecorator:
    """A parametrisation over the methods and the cases that they go with."""
    found = [
        pytest.param(method, case, id=f"{method}-{name}")
        for method in METHODS
        for name, case in CASES.items()
        if (case.whole or method not in WHOLE_ONLY) and wanted(method, case)
    ]
    return pytest.mark.parametrize(("method", "case"), found)


every = pairs(lambda method, case: refused(method, case) is None)
layers = pairs(lambda method, case: not case.whole and refused(method, case) is None)
family = pytest.mark.parametrize("method", METHODS)


def test_exemptions_name_what_exists():
    assert all(method in METHODS and invariant in INVARIANTS for method, invariant in EXEMPT)
    assert METHODS


@pairs(lambda method, case: refused(method, case) is not None)
def test_what_cannot_work_is_refused_with_the_reason(method, case):
    host = host_of(case)
    with pytest.raises(UserError, match=refused(method, case)):
        attach(host, **settings(method, case))
    assert all("forward" not in module.__dict__ for module in host.modules())


# ---- invariants ---------------------------------------------------------------------------------------------


@every
def test_the_layer_is_unchanged_at_the_start(method, case):
    holds(method, "start")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        host = host_of(case, dtype)
        x = x_of(case)
        x = x.to(dtype) if x.is_floating_point() else x
        before = output(host, x)
        attach(host, **settings(method, case))
        after = host(input_ids=x).logits if case.whole else host(x)  # without tokens of the adapter's own
        assert torch.equal(after, before), dtype
        assert after.dtype == before.dtype


@every
def test_what_trains_is_what_init_returned(method, case):
    holds(method, "trains")
    host = host_of(case)
    adapters = attach(host, **settings(method, case))
    adapter = adapters.adapters["default"]
    assert case.whole or len(adapter.sites) == case.sites
    inside = {
        id(p) for site in adapter.sites.values() for p in site.p.values() if isinstance(p, nn.Parameter)
    }
    inside |= {id(p) for _, p in adapters.overlaid("default")}
    assert {id(p) for p in adapters.parameters()} == inside
    assert {id(p) for group in adapters.groups(1e-3) for p in group["params"]} == inside
    assert not any(p.requires_grad for p in host.parameters())
    if method in ("lora", "loraplus", "rslora"):
        count = sum(R * (s.layer.in_features + s.layer.out_features) for s in adapter.sites.values())
        assert sum(p.numel() for p in adapters.parameters()) == count
    output(host, x_of(case)).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in adapters.parameters())
    assert all(p.grad is None for p in host.parameters())


@layers
def test_the_output_is_that_of_the_moved_weight(method, case):
    """update == x @ delta.T, in the words of every kind of layer."""
    holds(method, "update")
    host, adapters = stirred(method, case)
    x = x_of(case)
    torch.testing.assert_close(host(x), moved(host, adapters)(x), **SUM)
    for site in adapters.adapters["default"].sites.values():
        delta_OI = site.method.delta(site.layer, site.p)
        y = site.layer.last(host.module.__class__.forward(host.module, x))
        y = y if site.layer.rows is None else y[..., site.layer.rows]
        truth = patches(host.module, site, x) @ delta_OI.T
        torch.testing.assert_close(site.method.update(site.layer, site.p, x, y), truth, **SUM)


def patches(module: nn.Module, site: Site, x: torch.Tensor) -> torch.Tensor:
    """x as rows of W's inputs: itself, one-hot, or the windows of a convolution (..., I)."""
    if isinstance(site.layer, EmbeddingLayer):
        one_hot = nn.functional.one_hot(x, site.layer.in_features).double()
        return one_hot * getattr(module, "embed_scale", 1.0)
    if not isinstance(module, nn.Conv2d):
        return x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    batched = x if x.dim() == 4 else x[None]
    padded = nn.functional.pad(batched, module._reversed_padding_repeated_twice, mode=mode)
    windows = nn.functional.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)
    shape = module.__class__.forward(module, x).shape
    rows = windows.mT.reshape(len(batched), *shape[-2:], -1)
    return rows if x.dim() == 4 else rows[0]


@every
def test_merged_equals_unmerged_and_unmerging_restores_every_bit(method, case):
    holds(method, "merge")
    host, adapters = stirred(method, case)
    bits, own = tiny.digest(host), dict(host.named_parameters())
    x = x_of(case)
    before = output(host, x)
    if not adapters.adapters["default"].method.mergeable:
        with pytest.raises(NotMergeable, match=f"{method} cannot be merged: "):
            adapters.merge()
        assert torch.equal(output(host, x), before)
        return
    adapters.merge()
    assert all("forward" not in module.__dict__ for module in host.modules())
    torch.testing.assert_close(output(host, x), before, **SUM)
    adapters.unmerge()
    assert all(parameter is own[name] for name, parameter in host.named_parameters())
    assert tiny.digest(host) == bits
    assert torch.equal(output(host, x), before)


@every
def test_detaching_leaves_no_trace(method, case):
    holds(method, "detach")
    host = host_of(case)
    next(host.parameters()).requires_grad_(False)
    flags = {name: p.requires_grad for name, p in host.named_parameters()}
    bits, names = tiny.digest(host), list(host.state_dict())
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in host.modules()]
    adapters = attach(host, **settings(method, case))
    assert list(host.state_dict()) == names
    tiny.stir(adapters)
    output(host, x_of(case)).sum().backward()
    adapters.detach()
    assert tiny.digest(host) == bits
    assert {name: p.requires_grad for name, p in host.named_parameters()} == flags
    assert all("forward" not in module.__dict__ for module in host.modules())
    assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in host.modules()] == hooks


@every
def test_gradients_against_finite_differences(method, case):
    holds(method, "gradcheck")
    host, adapters = stirred(method, case)
    x = x_of(case)
    parameters = adapters.parameters()
    inputs = [x.requires_grad_()] if x.is_floating_point() else []

    def live(*_):
        return output(host, x)

    def held(*_):
        with adapters.hold():
            return output(host, x)

    # one random direction for each tensor; LoRA, whose path most methods share, in every direction
    wide = {"eps": 1e-4, "atol": 1e-2, "rtol": 1e-2} if case.whole else {}  # norms compute in float32
    fast = method != "lora" or case.whole
    assert torch.autograd.gradcheck(live, (*inputs, *parameters), fast_mode=fast, **wide)
    assert torch.equal(held(), live())


@every
def test_save_load_save_gives_the_same_bytes(method, case, tmp_path):
    holds(method, "save")
    host, adapters = stirred(method, case, torch.float32)
    x = x_of(case)
    x = x.float() if x.is_floating_point() else x
    before = output(host, x)
    save_adapter(adapters, tmp_path / "one")
    fresh = host_of(case, torch.float32)
    again = load_adapter(fresh, tmp_path / "one")
    assert torch.equal(output(fresh, x), before)
    save_adapter(again, tmp_path / "two")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(["loraloom.json", *FILES[read_record(tmp_path / "one").form]])
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@every
def test_twenty_steps_bring_the_loss_down(method, case):
    """The goal is what the same method can reach: a rank of three follows no random one."""
    holds(method, "learns")
    x = x_of(case)
    far, adapters = stirred(method, case)
    goal = output(far, x).detach()
    host = host_of(case)
    adapters = attach(host, **settings(method, case))
    kind = methods.find(method)
    rate = 100 * max(2e-4, kind.learning_rate)  # some methods' own is twenty times LoRA's
    if case.whole:
        rate = min(rate, 0.02) / getattr(kind, "lr_ratio", 1)
    optimizer = torch.optim.Adam(adapters.groups(rate))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (output(host, x) - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]


@every
def test_a_bfloat16_base_keeps_float32_masters(method, case):
    holds(method, "bf16")
    host, adapters = stirred(method, case, torch.bfloat16)
    x = x_of(case)
    x = x.bfloat16() if x.is_floating_point() else x
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    y = output(host, x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    trained = adapters.parameters()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in trained)
    assert any(p.grad is not None and p.grad.any() for p in trained)
    if case.whole or (method, "update") in EXEMPT:
        return  # the same layers, and no weight to compare with
    truth = moved_in_float64(host, adapters)(x.double() if x.is_floating_point() else x)
    scale = truth.abs().max()
    assert (y.double() - truth).abs().max() < 0.03 * scale  # bfloat16 rounds at 0.4 %, a few times over
    adapters.merge()
    assert host.module.weight.dtype == torch.bfloat16
    assert (host(x).double() - truth).abs().max() < 0.03 * scale


class Row:
    """An example: the last half of its tokens carries loss."""

    def __init__(self, length: int, seed: int):
        gen = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(8, tiny.VOCAB, (length,), generator=gen).tolist()
        self.ids[1] = TOKEN
        self.labels = [IGNORED] * (length - length // 2) + self.ids[length - length // 2 :]
        self.row, self.targets = "row", length // 2


@pairs(lambda method, case: case.whole and case.dense and refused(method, case) is None)
def test_a_step_does_not_depend_on_how_it_is_packed_and_split(method, case):
    """Eight examples packed into one batch, and one by one: the same loss and gradients."""
    host, adapters = stirred(method, case)
    rows = dress(host, [Row(length, seed) for seed, length in enumerate((6, 4, 9, 5, 7, 4, 8, 5))])
    found = []
    for packing, micro_tokens in ((True, 512), (False, 1)):
        batches = pack(rows, micro_tokens=micro_tokens, packing=packing, pad_id=0)
        assert len(batches) == (1 if packing else 8)
        for parameter in adapters.parameters():
            parameter.grad = None
        with adapters.hold():
            losses = [nll_sum(host, batch) for batch in batches]
            sum(losses).backward()
        found.append([sum(losses).detach(), *(p.grad for p in adapters.parameters())])
    for one, other in zip(*found):
        near = {"rtol": 1e-5, "atol": 1e-5}  # Llama's norms compute in float32
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **near)


def moved_in_float64(host: Host, adapters: Adapters) -> nn.Module:
    """The dense truth of a bfloat16 host: every tensor widened first."""
    return widened(host, adapters, torch.float64)


def test_a_view_of_some_rows_is_that_part_of_the_layer():
    module = CASES["roles-of-conv1d"].make().c_attn
    rows = torch.tensor([4, 0, 7])
    part = view(module, "part", rows)
    assert torch.equal(part.weight(), module.weight.T[rows])
    assert torch.equal(part.bias(), module.bias[rows])
    assert (part.out_features, part.whole_features, part.in_features) == (3, 18, 6)
    assert torch.equal(part.spread(torch.ones(3), 2.0)[rows], torch.ones(3))
    assert part.spread(torch.ones(3, 2)).sum() == 6


# ---- what single methods promise ----------------------------------------------------------------------------


def test_lora_by_its_equation():
    host, adapters = stirred("lora", CASES["linear"])
    p = adapters.adapters["default"].sites["layer"].p
    x = x_of(CASES["linear"])
    truth = x @ host.layer.weight.T + host.layer.bias + 5.0 / R * (x @ p["A"].T @ p["B"].T)
    torch.testing.assert_close(host(x), truth, **SUM)


def test_loras_start():
    """B is zero and A uniform within 1/sqrt(I); on an embedding A is zero and B normal."""
    big = nn.Sequential(nn.Linear(400, 300), nn.Embedding(300, 400))
    adapters = attach(big, r=64, target_modules=["0", "1"])
    linear, embedding = (adapters.adapters["default"].sites[name].p for name in ("0", "1"))
    assert not linear["B"].any()
    assert not embedding["A"].any()
    assert linear["A"].abs().max() <= 400**-0.5
    assert abs(linear["A"].detach().std().item() - (400 * 3) ** -0.5) < 1e-3
    assert abs(embedding["B"].detach().std().item() - 1) < 0.02


def test_a_start_depends_on_the_seed_and_the_layers_name_alone():
    def start(seed, targets):
        torch.manual_seed(1)
        model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
        return attach(model, r=2, seed=seed, target_modules=targets).adapters["default"].sites["two"].p["A"]

    assert torch.equal(start(0, ["one", "two"]), start(0, ["two"]))
    assert not torch.equal(start(0, ["two"]), start(1, ["two"]))


def test_rslora_takes_the_root_of_each_layers_own_rank():
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    adapters = attach(
        model, "rslora", r=16, alpha=8.0, target_modules=["one", "two"], rank_pattern={"two": 4}
    )
    sites = adapters.adapters["default"].sites
    assert sites["one"].method.scale == 8.0 / 4.0
    assert sites["two"].method.scale == 8.0 / 2.0
    assert sites["two"].p["A"].shape == (4, 4)


def test_alpha_as_a_multiple_follows_each_layers_own_rank():
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    spec = {"r": 16, "alpha": "2r", "target_modules": ["one", "two"], "rank_pattern": {"two": 4}}
    sites = attach(model, **spec).adapters["default"].sites
    assert [site.method.alpha for site in sites.values()] == [32.0, 8.0]


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_lora_plus_moves_b_in_proportion_and_a_not_at_all_from_zero(ratio):
    """One SGD step from B = 0: A's gradient is zero there, and B moves by lr * ratio * gradient."""
    host = Host(CASES["linear"])
    adapters = attach(host, "loraplus", r=R, lr_ratio=ratio, target_modules=["layer"])
    p = adapters.adapters["default"].sites["layer"].p
    a, b = p["A"].detach().clone(), p["B"].detach().clone()
    optimizer = torch.optim.SGD(adapters.groups(0.1))
    host(x_of(CASES["linear"])).square().sum().backward()
    optimizer.step()
    assert torch.equal(p["A"], a)
    torch.testing.assert_close(p["B"] - b, -0.1 * ratio * p["B"].grad)
    assert p["B"].grad.any()


def test_lora_plus_groups_by_role_and_not_by_shape():
    """Square tensors, a rank equal to the width, biases and an embedding: only B gets the ratio."""
    model = nn.ModuleDict({"square": nn.Linear(4, 4), "embed": nn.Embedding(4, 4)})
    adapters = attach(model, "loraplus", r=4, target_modules=["square", "embed"], bias="lora_only")
    by_rate = {}
    for group in adapters.groups(1e-3):
        for parameter in group["params"]:
            by_rate[id(parameter)] = group["lr"]
    sites = adapters.adapters["default"].sites
    for site in sites.values():
        assert by_rate[id(site.p["A"])] == 1e-3
        assert by_rate[id(site.p["B"])] == 16e-3
    [(_, bias)] = adapters.overlaid("default")
    assert by_rate[id(bias)] == 1e-3
    assert len(by_rate) == len(adapters.parameters()) == 5


def test_lr_ratio_is_a_setting_of_lora_too():
    adapters = attach(nn.Sequential(nn.Linear(4, 4)), r=2, lr_ratio=4, target_modules=["0"])
    assert [group["lr"] for group in adapters.groups(1e-3)] == [1e-3, 4e-3]
    adapters = attach(nn.Sequential(nn.Linear(4, 4)), r=2, options={"lr_ratio": "4.0"}, target_modules=["0"])
    assert adapters.adapters["default"].method.lr_ratio == 4.0


# ---- settings that are none ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "lore"}, "there is no method 'lore'; there are adalora, "),
        ({"rr": 3}, "method lora has no setting rr"),
        ({"lr_ratio": "high"}, "method.lr_ratio is 'high', which is not a number"),
        ({"lr_ratio": -1}, "lr_ratio is -1.0"),
        ({"options": {"r": 8}}, "method.r is no setting of a method"),
        ({"method": "eva", "options": {"whiten": "maybe"}}, "method.whiten is 'maybe'"),
        ({"method": "prefix_embedding", "options": {"prefix": 1.5}}, "method.prefix is 1.5"),
        ({"method": "loradrop", "options": {"samples": 0}}, "samples is 0"),
        ({"method": "alora", "options": {"invocation": 5}}, "invocation is 5"),
        ({"method": "alora", "options": {"invocation": [1]}, "bias": "all"}, "alora cannot go with bias"),
        (
            {"method": "adalora", "options": {"target_r": 40}},
            "adalora cannot go with a target_r above r",
        ),
        ({"r": 0}, "r is 0"),
        ({"r": 2.5}, "r is 2.5"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"alpha": "x"}, "alpha is 'x': use a number or a multiple of the rank, such as 2r"),
        ({"rank_pattern": {"0": -1}}, "rank_pattern: '0' is -1"),
        ({"rank_pattern": {"0": 0}}, "lora finds nothing to train in this Sequential"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: '(' is not a regular expression: "),
        ({"alpha_pattern": {"nine": 2}}, "alpha_pattern: 'nine' matches no layer with an adapter"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"modules_to_save": ["head"]}, "modules_to_save: 'head' is no module with weights"),
    ],
)
def test_wrong_settings_are_named_and_leave_the_model_alone(wrong, message):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UserError) as caught:
        attach(model, **({"target_modules": ["0"]} | wrong))
    assert caught.value.message.startswith(message)
    assert "forward" not in model[0].__dict__
    assert model[0].weight.requires_grad
    assert not model._forward_pre_hooks


@family
def test_every_setting_of_a_method_has_words(method):
    kind = methods.find(method)
    assert all(field.metadata.get("help") for field in dataclasses.fields(kind))
    assert methods.name_of(kind(**OPTIONS.get(method, {}))) == method
    assert AdapterSpec(method=method, options=OPTIONS.get(method, {})).make().r == kind.r
    assert kind.learning_rate > 0
    assert kind.rate_source
