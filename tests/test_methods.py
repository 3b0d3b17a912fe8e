"""What must hold for every method on every kind of layer: one table, found by file name.

A method that breaks an invariant by its nature stands in EXEMPT with the reason. Truths are dense and in
float64: the weight itself, moved by delta, in the module's own forward pass.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraloom import methods
from loraloom.adapt import Adapters, attach
from loraloom.adapter import AdapterSpec
from loraloom.adapter_io import load_adapter, save_adapter
from loraloom.errors import UserError
from loraloom.layers import EmbeddingLayer, view
from loraloom.methods.base import Site
from loraloom.quant import dense, quantized

METHODS = methods.names()
EXEMPT: dict[tuple[str, str], str] = {}  # (method, invariant) -> why it does not hold
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


def normal(*shape: int) -> Callable[[torch.Generator], torch.Tensor]:
    return lambda gen: torch.randn(*shape, generator=gen, dtype=torch.float64)


def conv1d() -> nn.Module:
    module = Conv1D(7, 5)  # from 5 to 7
    nn.init.normal_(module.bias)
    return module


def in_4_bits(module: nn.Module, **settings) -> nn.Module:
    module.weight = quantized(module.weight, flipped=isinstance(module, Conv1D), **settings)
    return module


def conv2d(**settings) -> Case:
    return Case(lambda: nn.Conv2d(3, 4, (3, 2), **settings), normal(2, 3, 7, 6))


CASES = {
    "linear": Case(lambda: nn.Linear(5, 7), normal(2, 4, 5)),
    "linear-without-bias": Case(lambda: nn.Linear(5, 7, bias=False), normal(6, 5)),
    "linear-of-a-vector": Case(lambda: nn.Linear(5, 7), normal(5)),
    "conv1d": Case(conv1d, normal(2, 4, 5)),
    "embedding": Case(
        lambda: nn.Embedding(11, 6, padding_idx=0), lambda gen: torch.randint(0, 11, (2, 5), generator=gen)
    ),
    "embedding-scaled": Case(lambda: Scaled(3.0), lambda gen: torch.randint(0, 11, (2, 5), generator=gen)),
    "embedding-scaled-by-a-buffer": Case(
        lambda: Scaled(torch.tensor(3.0)), lambda gen: torch.randint(0, 11, (2, 5), generator=gen)
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
    "linear-nf4": Case(lambda: in_4_bits(nn.Linear(5, 7)), normal(2, 4, 5)),
    "linear-fp4-without-bias": Case(
        lambda: in_4_bits(nn.Linear(70, 3, bias=False), table="fp4", double=False), normal(6, 70)
    ),
    "conv1d-nf4": Case(lambda: in_4_bits(conv1d(), block=32), normal(2, 4, 5)),
    "roles-of-conv1d-nf4": Case(lambda: Fused(in_4_bits(Conv1D(18, 6))), normal(2, 4, 6), ("q", "v"), 2),
}


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


def settings(method: str) -> dict:
    return {"method": method, "r": R, "alpha": 5.0, "seed": 4}


def stirred(method: str, case: Case, dtype=torch.float64) -> tuple[Host, Adapters]:
    """A host whose adapter has left its start, in float64."""
    host = Host(case, dtype)
    adapters = attach(host, target_modules=list(case.targets), **settings(method))
    for _, tensor in adapters.adapters["default"].named_tensors():
        tensor.data = tensor.data.to(torch.promote_types(dtype, torch.float32))
    tiny.stir(adapters, size=0.5)
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


every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
family = pytest.mark.parametrize("method", METHODS)


def test_exemptions_name_what_exists():
    assert all(method in METHODS and invariant in INVARIANTS for method, invariant in EXEMPT)
    assert METHODS


# ---- invariants ---------------------------------------------------------------------------------------------


@every
@family
def test_the_layer_is_unchanged_at_the_start(method, case):
    holds(method, "start")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        host = Host(case, dtype)
        x = x_of(case)
        x = x.to(dtype) if x.is_floating_point() else x
        before = host(x)
        attach(host, target_modules=list(case.targets), **settings(method))
        assert torch.equal(host(x), before), dtype
        assert host(x).dtype == before.dtype


@every
@family
def test_what_trains_is_what_init_returned(method, case):
    holds(method, "trains")
    host = Host(case)
    adapters = attach(host, target_modules=list(case.targets), **settings(method))
    sites = adapters.adapters["default"].sites.values()
    assert len(sites) == case.sites
    inside = {id(p) for site in sites for p in site.p.values() if isinstance(p, nn.Parameter)}
    assert {id(p) for p in adapters.parameters()} == inside
    assert {id(p) for group in adapters.groups(1e-3) for p in group["params"]} == inside
    assert not any(p.requires_grad for p in host.parameters())
    if method in ("lora", "loraplus", "rslora"):
        count = sum(R * (site.layer.in_features + site.layer.out_features) for site in sites)
        assert sum(p.numel() for p in adapters.parameters()) == count
    x = x_of(case)
    host(x).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in adapters.parameters())
    assert all(p.grad is None for p in host.parameters())


@every
@family
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
@family
def test_merged_equals_unmerged_and_unmerging_restores_every_bit(method, case):
    holds(method, "merge")
    host, adapters = stirred(method, case)
    own, bits = host.module.weight, tiny.digest(host)
    x = x_of(case)
    before = host(x)
    adapters.merge()
    assert "forward" not in host.module.__dict__
    torch.testing.assert_close(host(x), before, **SUM)
    adapters.unmerge()
    assert host.module.weight is own
    assert tiny.digest(host) == bits
    assert torch.equal(host(x), before)


@every
@family
def test_detaching_leaves_no_trace(method, case):
    holds(method, "detach")
    host = Host(case)
    host.module.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in host.named_parameters()}
    bits, names = tiny.digest(host), list(host.state_dict())
    adapters = attach(host, target_modules=list(case.targets), **settings(method))
    assert list(host.state_dict()) == names
    tiny.stir(adapters)
    host(x_of(case)).sum().backward()
    adapters.detach()
    assert tiny.digest(host) == bits
    assert {name: p.requires_grad for name, p in host.named_parameters()} == flags
    for module in host.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


@every
@family
def test_gradients_against_finite_differences(method, case):
    holds(method, "gradcheck")
    host, adapters = stirred(method, case)
    x = x_of(case)
    parameters = adapters.parameters()
    inputs = [x.requires_grad_()] if x.is_floating_point() else []

    def output(*_):
        return host(x)

    def held(*_):
        with adapters.hold():
            return host(x)

    assert torch.autograd.gradcheck(output, (*inputs, *parameters))
    assert torch.equal(held(), output())


@every
@family
def test_save_load_save_gives_the_same_bytes(method, case, tmp_path):
    holds(method, "save")
    host, adapters = stirred(method, case, torch.float32)
    x = x_of(case)
    x = x.float() if x.is_floating_point() else x
    before = host(x)
    save_adapter(adapters, tmp_path / "one")
    fresh = Host(case, torch.float32)
    again = load_adapter(fresh, tmp_path / "one")
    assert torch.equal(fresh(x), before)
    save_adapter(again, tmp_path / "two")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "loraloom.json"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@every
@family
def test_twenty_steps_bring_the_loss_down(method, case):
    holds(method, "learns")
    host = Host(case)
    x = x_of(case)
    adapters = attach(host, target_modules=list(case.targets), **settings(method))
    gen = torch.Generator().manual_seed(8)
    goal = host(x).detach()
    goal = goal + torch.randn(goal.shape, generator=gen, dtype=goal.dtype)
    optimizer = torch.optim.Adam(adapters.groups(0.02))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (host(x) - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]


@every
@family
def test_a_bfloat16_base_keeps_float32_masters(method, case):
    holds(method, "bf16")
    host, adapters = stirred(method, case, torch.bfloat16)
    x = x_of(case)
    x = x.bfloat16() if x.is_floating_point() else x
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    y = host(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters.parameters())
    truth = moved_in_float64(host, adapters)(x.double() if x.is_floating_point() else x)
    scale = truth.abs().max()
    assert (y.double() - truth).abs().max() < 0.03 * scale  # bfloat16 rounds at 0.4 %, a few times over
    adapters.merge()
    assert host.module.weight.dtype == torch.bfloat16
    assert (host(x).double() - truth).abs().max() < 0.03 * scale


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
        ({"method": "lore"}, "there is no method 'lore'; there are lora, loraplus, rslora"),
        ({"rr": 3}, "method lora has no setting rr"),
        ({"lr_ratio": "high"}, "method.lr_ratio is 'high', which is not a number"),
        ({"r": 0}, "r is 0"),
        ({"r": 2.5}, "r is 2.5"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"alpha": "x"}, "alpha is 'x': use a number or a multiple of the rank, such as 2r"),
        ({"rank_pattern": {"0": 0}}, "rank_pattern: '0' is 0"),
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
    assert methods.name_of(kind()) == method
    assert AdapterSpec(method=method).make().r == 16
