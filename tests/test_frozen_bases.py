"""VeRA and RandLoRA: frozen matrices that all layers share, against PEFT and against their equations.

Draws must be PEFT's bit for bit. Outputs and gradients are compared in float64 to 1e-10: both sum the same
products, in another order. `peft` is imported only in tests.
"""

from __future__ import annotations

import math
import warnings

import pytest
import tiny
import torch
from peft import RandLoraConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification
from transformers.pytorch_utils import Conv1D

from loraloom import methods
from loraloom.adapt import Adapters, attach
from loraloom.errors import UserError
from loraloom.shapes import published
from loraloom.skeleton import meta_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
CONFIGS = {"vera": VeraConfig, "randlora": RandLoraConfig}
VECTORS = {"vera": ("lambda_b", "lambda_d"), "randlora": ("lambda", "gamma")}
PREFIX = {"vera": "vera_", "randlora": "randlora_"}

# square, wide, tall and small layers; a rank that divides none of their sides
LLAMA = ("llama", ["q_proj", "k_proj", "up_proj", "down_proj"])
GPT2 = ("gpt2", ["c_attn", "c_fc", "c_proj"])
RUNS = {
    "vera-llama": ("vera", *LLAMA, {"r": 6}, {}),
    "vera-gpt2": ("vera", *GPT2, {"r": 6}, {}),
    "vera-seed": ("vera", *LLAMA, {"r": 40, "d_initial": 0.3}, {"seed": 7}),
    "randlora-llama": ("randlora", *LLAMA, {"r": 3}, {"alpha": 60}),
    "randlora-gpt2": ("randlora", *GPT2, {"r": 5}, {"alpha": 9}),
    "randlora-even": ("randlora", *LLAMA, {"r": 4}, {"alpha": 9, "seed": 3}),
    "randlora-one-base": ("randlora", *LLAMA, {"r": 32}, {"alpha": 640}),
    "randlora-sparse": ("randlora", *LLAMA, {"r": 3, "sparse": True}, {"alpha": 60}),
    "randlora-very-sparse": ("randlora", *GPT2, {"r": 5, "very_sparse": True}, {"alpha": 60, "seed": 2}),
}
every = pytest.mark.parametrize(("method", "kind", "targets", "same", "other"), RUNS.values(), ids=RUNS)


def theirs(method, model, targets, same, other):
    own = {"projection_prng_key": other.get("seed", 0)}
    own |= {"randlora_alpha": other["alpha"]} if "alpha" in other else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`")
        return get_peft_model(model, CONFIGS[method](target_modules=targets, **same, **own))


def ours(method, model, targets, same, other) -> Adapters:
    own = {"projection_seed": other.get("seed", 0)} | {k: v for k, v in other.items() if k == "alpha"}
    return attach(model, method, target_modules=targets, **same, **own)


def sites(adapters):
    return adapters.adapters["default"].sites


def widen(adapters):
    for site in sites(adapters).values():
        for tensor in site.p.values():
            tensor.data = tensor.data.double()


def their_tensors(method, peft, key) -> dict[str, torch.Tensor]:
    """PEFT's tensors of one layer by our names."""
    layer = peft.base_model.model.get_submodule(key)
    names = (*VECTORS[method], "A", "B")
    return {name: getattr(layer, PREFIX[method] + name)["default"] for name in names}


def logits(model):
    return model(tiny.ids()).logits


# ---- against PEFT -------------------------------------------------------------------------------------------


@every
def test_a_fresh_adapter_is_theirs_bit_for_bit(method, kind, targets, same, other):
    peft = theirs(method, tiny.build(kind), targets, same, other)
    adapters = ours(method, tiny.build(kind), targets, same, other)
    for key, site in sites(adapters).items():
        for name, tensor in their_tensors(method, peft, key).items():
            assert torch.equal(site.p[name], tensor), (key, name)
            assert isinstance(site.p[name], nn.Parameter) == tensor.requires_grad
    trained = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    assert sum(p.numel() for p in adapters.parameters()) == trained


@every
@pytest.mark.parametrize("giver", ["ours", "theirs"])
def test_the_same_tensors_give_their_outputs_gradients_and_deltas(method, kind, targets, same, other, giver):
    peft = theirs(method, tiny.build(kind).double(), targets, same, other).eval()
    model = tiny.build(kind).double()
    adapters = ours(method, model, targets, same, other)
    widen(adapters)
    gen = torch.Generator().manual_seed(1)
    seen = set()
    with torch.no_grad():
        for key, site in sites(adapters).items():
            for name, tensor in their_tensors(method, peft, key).items():
                target, source = (site.p[name], tensor) if giver == "theirs" else (tensor, site.p[name])
                if id(source) not in seen:
                    source += torch.randn(source.shape, generator=gen, dtype=source.dtype) * 0.3
                    seen.add(id(source))
                target.copy_(source)
    out = logits(model)
    torch.testing.assert_close(out, logits(peft), **TIGHT)
    assert (out - logits(tiny.build(kind).double())).abs().max() > 0.01
    for network in (model, peft):
        logits(network).square().mean().backward()
    for key, site in sites(adapters).items():
        for name, tensor in their_tensors(method, peft, key).items():
            if name in VECTORS[method]:
                assert tensor.grad.any(), (key, name)
                torch.testing.assert_close(site.p[name].grad, tensor.grad, **TIGHT)
        layer = peft.base_model.model.get_submodule(key)
        delta = site.layer.like_weight(site.method.delta(site.layer, site.p))
        torch.testing.assert_close(delta, layer.get_delta_weight("default"), **TIGHT)


def test_vera_in_float32_is_theirs_bit_for_bit():
    """The same products in the same order."""
    run = RUNS["vera-llama"][3:]
    peft = theirs("vera", tiny.build("llama"), LLAMA[1], *run).eval()
    model = tiny.build("llama")
    adapters = ours("vera", model, LLAMA[1], *run)
    tiny.stir(adapters)
    with torch.no_grad():
        for key, site in sites(adapters).items():
            for name, tensor in their_tensors("vera", peft, key).items():
                tensor.copy_(site.p[name])
    assert torch.equal(logits(model), logits(peft))


@pytest.mark.parametrize(
    ("method", "settings", "options"),
    [
        ("vera", {}, {}),
        ("vera", {"projection_prng_key": 4, "d_initial": 0.5}, {"projection_seed": 4, "d_initial": 0.5}),
        ("randlora", {}, {}),
        ("randlora", {"projection_prng_key": 4, "sparse": True}, {"projection_seed": 4, "sparse": True}),
        ("randlora", {"sparse": True, "very_sparse": True}, {"sparse": False, "very_sparse": True}),
    ],
)
def test_their_settings_are_ours_and_back(method, settings, options):
    config = CONFIGS[method](r=6, **settings).to_dict()
    kind = methods.find(method)
    own = methods.make(method, kind.from_peft(config) | {"r": 6})
    assert all(getattr(own, name) == value for name, value in options.items())
    again = CONFIGS[method](r=6, **own.peft_config()).to_dict()
    if config.get("very_sparse"):
        config["sparse"] = False  # which they do not heed then
    assert again == config
    assert kind.peft_type == config["peft_type"]
    assert kind().r == CONFIGS[method]().r
    if method == "randlora":
        assert kind().alpha == CONFIGS[method]().randlora_alpha


# ---- against the equations ----------------------------------------------------------------------------------


def true_vera(p, out, wide, scale):
    delta = torch.zeros(out, wide, dtype=torch.float64)
    for i in range(out):
        for j in range(wide):
            delta[i, j] = p["lambda_b"][i] * (p["B"][i] * p["lambda_d"] * p["A"][:, j]).sum()
    return delta


def true_randlora(p, out, wide, scale):
    """The sum over the columns of the large bases, each with a row of the scaled small one."""
    d, c, r = min(out, wide), max(out, wide), len(p["A"])
    n = math.ceil(d / r)
    delta = torch.zeros(c, d, dtype=torch.float64)
    for m in range(r * n):
        column = p["B"][:c, m // r, m % r]
        row = p["lambda"][m // n, m % n] * p["gamma"][m % n] * p["A"][m // n, 0, :d]
        delta += scale * torch.outer(column, row)
    return delta if d == wide else delta.T


@pytest.mark.parametrize(("method", "true"), [("vera", true_vera), ("randlora", true_randlora)])
def test_the_change_of_w_by_the_equation(method, true):
    """Square, wide and tall layers of one model; q and v of a fused projection; a convolution."""
    model = nn.ModuleDict({"wide": nn.Linear(11, 7), "tall": nn.Linear(4, 9), "square": nn.Linear(7, 7)})
    model.update({"c_attn": Conv1D(18, 6), "conv": nn.Conv2d(2, 5, (3, 2))})
    model.config = type("Config", (), {"model_type": "gpt2", "num_attention_heads": 2, "hidden_size": 6})()
    adapters = attach(
        model.double(), method, r=3, alpha=5.0, target_modules=["wide", "tall", "square", "q", "v", "conv"]
    )
    widen(adapters)
    tiny.stir(adapters, size=0.5)
    assert len(sites(adapters)) == 6
    for key, site in sites(adapters).items():
        p = {name: tensor.detach() for name, tensor in site.p.items()}
        out, wide = site.layer.weight().shape
        delta = site.method.delta(site.layer, site.p)
        torch.testing.assert_close(delta, true(p, out, wide, 5.0 / 3), **TIGHT, msg=key)
        assert delta.abs().max() > 0.01


def test_randlora_can_reach_full_rank():
    model = nn.ModuleDict({"layer": nn.Linear(24, 32)})
    adapters = attach(model, "randlora", r=4, target_modules=["layer"])
    tiny.stir(adapters, size=1.0)
    site = sites(adapters)["layer"]
    assert torch.linalg.matrix_rank(site.method.delta(site.layer, site.p)) == 24


def test_the_draws_have_their_published_spread():
    model = nn.ModuleDict({"one": nn.Linear(300, 200), "two": nn.Linear(100, 400)})
    p = sites(attach(model, "vera", r=64, target_modules=["one", "two"]))["one"].p
    assert p["A"].shape == (64, 300)
    assert p["B"].shape == (400, 64)
    assert math.sqrt(6 / 300) * 0.99 < p["A"].abs().max() <= math.sqrt(6 / 300)
    assert math.sqrt(6 / 64) * 0.99 < p["B"].abs().max() <= math.sqrt(6 / 64)
    for options, zeros in (({}, 0), ({"sparse": True}, 2 / 3), ({"very_sparse": True}, 1 - 1 / 300**0.5)):
        fresh = nn.ModuleDict({"one": nn.Linear(300, 200), "two": nn.Linear(100, 400)})
        p = sites(attach(fresh, "randlora", r=30, target_modules=["one", "two"], **options))["two"].p
        assert p["A"].shape == (30, 1, 300)
        assert p["B"].shape == (400, 10, 30)
        assert (p["lambda"].shape, p["gamma"].shape) == ((30, 4), (4, 100))
        assert (p["gamma"] == 1 / 100).all()
        for basis in (p["A"], p["B"]):
            assert abs(basis.std() - 1) < 0.01  # bfloat16 rounds at 0.4 %
            assert abs((basis == 0).float().mean() - zeros) < 0.02
            assert len(basis.unique()) == 3 or not options


# ---- published counts ---------------------------------------------------------------------------------------


def roberta(**shape):
    config = RobertaConfig(vocab_size=50265, **shape)
    with torch.device("meta"):
        return RobertaForSequenceClassification(config)


def llama(name):
    return meta_model(published(name), dtype=torch.bfloat16)


LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
PUBLISHED = {  # by VeRA's paper; the last two are those of PEFT's benchmark on MetaMathQA
    "roberta-base": (roberta, {}, ["query", "value"], "vera", 1024, 43_008),
    "roberta-large": (roberta, LARGE, ["query", "value"], "vera", 256, 61_440),
    "llama-2-7b": (llama, {"name": "llama2-7b"}, "all-linear", "vera", 1024, 1_589_248),
    "llama-2-7b-qv": (llama, {"name": "llama2-7b"}, ["q_proj", "v_proj"], "vera", 256, 278_528),
    "llama-3.2-3b-vera": (llama, {"name": "llama3.2-3b"}, ["q_proj", "v_proj"], "vera", 256, 129_024),
    "llama-3.2-3b": (llama, {"name": "llama3.2-3b"}, ["q_proj", "v_proj"], "randlora", 32, 9_289_728),
}


@pytest.mark.parametrize(
    ("model", "shape", "targets", "method", "r", "count"), PUBLISHED.values(), ids=PUBLISHED
)
def test_published_counts(model, shape, targets, method, r, count):
    adapters = attach(model(**shape), method, r=r, target_modules=targets)
    assert sum(p.numel() for p in adapters.parameters()) == count


# ---- memory -------------------------------------------------------------------------------------------------


def stack(layers, width, dtype):
    torch.manual_seed(0)
    sides = [(width, width - 16), (width - 16, width)]  # by turns narrow at the output and at the input
    return nn.Sequential(*(nn.Linear(*sides[i % 2]) for i in range(layers))).to(dtype)


def saved_bytes(method, layers, dtype, *, width=64) -> int:
    """What a forward pass keeps for backward beyond the base's weights and what grows with tokens."""
    model = stack(layers, width, dtype)
    adapters = attach(model, method, r=16, target_modules=[str(i) for i in range(layers)])
    base = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # held, so that no address is used twice

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in base:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(1, width, dtype=dtype, requires_grad=True)).sum().backward()
    assert all(p.grad is not None for p in adapters.parameters())
    return sum(t.untyped_storage().nbytes() for t in kept.values() if t.untyped_storage().nbytes() > 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "vectors"), [("vera", 0), ("randlora", 4 * 64)])
def test_what_backward_needs_does_not_grow_by_a_matrix_a_layer(method, vectors, dtype):
    """The frozen matrices are there once, cast once; RandLoRA's scaled ones are made again."""
    few, many = (saved_bytes(method, layers, dtype) for layers in (2, 7))
    size = 2 if dtype == torch.bfloat16 else 4
    shared = {"vera": 2 * 16 * 64, "randlora": 64 * 64 + 16 * 64}[method]
    small = 5 * vectors * size if vectors * size > 1000 else 0  # gamma
    assert few <= (shared + 2 * vectors) * size
    assert many - few <= small


@pytest.mark.parametrize("method", ["vera", "randlora"])
def test_the_matrices_are_one_tensor_in_all_layers(method):
    adapters = attach(stack(4, 24, torch.float32), method, r=4, target_modules=["0", "1", "2", "3"])
    for name in ("A", "B"):
        assert len({id(site.p[name]) for site in sites(adapters).values()}) == 1
        assert not any(isinstance(site.p[name], nn.Parameter) for site in sites(adapters).values())


@pytest.mark.parametrize("method", ["vera", "randlora"])
@pytest.mark.parametrize("how", ["copied", "replaced"])
def test_a_cast_follows_what_it_is_of(method, how):
    """A file's matrices, read after the first pass, are the ones that compute."""
    made = []
    for first in (True, False):
        model = stack(2, 24, torch.bfloat16)
        adapters = attach(model, method, r=4, target_modules=["0", "1"])
        tiny.stir(adapters)
        x = torch.linspace(-1, 1, 48).view(2, 24).bfloat16()
        if first:
            with torch.inference_mode():
                before = model(x)
        p = sites(adapters)["0"].p
        for name in ("A", "B"):
            new = p[name].flip(0)
            if how == "copied":
                p[name].copy_(new)
            else:
                p[name].data = new
        y = model(x)
        y.float().square().sum().backward()
        made.append([y, *(tensor.grad for tensor in adapters.parameters())])
    assert not torch.equal(before, made[0][0])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("method", ["vera", "randlora"])
def test_a_pass_in_inference_mode_leaves_nothing_that_training_cannot_use(method):
    model = stack(2, 24, torch.bfloat16)
    adapters = attach(model, method, r=4, target_modules=["0", "1"])
    x = torch.linspace(-1, 1, 48).view(2, 24).bfloat16()
    with torch.inference_mode():
        model(x)
    model(x).float().square().sum().backward()
    assert any(tensor.grad.any() for tensor in adapters.parameters())


# ---- settings that are none ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        ("vera", {"d_initial": 0}, "d_initial is 0"),
        ("vera", {"d_initial": float("nan")}, "method.d_initial is nan"),
        ("vera", {"projection_seed": 0.5}, "method.projection_seed is 0.5"),
        ("randlora", {"projection_seed": "one"}, "method.projection_seed is 'one'"),
        ("randlora", {"sparse": "yes"}, "method.sparse is 'yes'"),
        ("randlora", {"sparse": True, "very_sparse": True}, "sparse and very_sparse are both set"),
        ("randlora", {"target_modules": ["1"], "r": 1}, "RandLoRA's basis of shape (1, 1, 1) has the same"),
    ],
)
def test_wrong_settings(method, wrong, message):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    with pytest.raises(UserError) as caught:
        attach(model, method, **({"r": 2, "target_modules": ["0"]} | wrong))
    assert caught.value.message.startswith(message)
    assert "forward" not in model[0].__dict__
