"""DoRA, HiRA and LoRA-XS: against PEFT where it has them, else against their equations in dense float64.

Outputs and gradients in float32 are compared to 1e-5: the same products, summed in another order. In float64
truths are dense and written from the equations: 1e-10 leaves room over 1e-14 a term.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import test_methods as table
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from loraloom import quant
from loraloom.adapt import Adapters, attach
from loraloom.adapter import AdapterSpec
from loraloom.adapter_io import load_adapter, save_adapter
from loraloom.config import TrainConfig
from loraloom.errors import UserError
from loraloom.layers import EmbeddingLayer, view
from loraloom.methods.dora import DoRA
from loraloom.methods.hira import HiRA
from loraloom.methods.rslora import RsLoRA
from loraloom.optim import make_optimizer
from loraloom.quant import dense, pieces, quantized

# of transformers to PEFT, about a name that PEFT still asks for
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


# ---- against PEFT -------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A table, convolutions and linear layers, some with biases."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 6)
        self.conv = nn.Conv2d(1, 4, 3, padding=1, stride=2)
        self.round = nn.Conv2d(4, 4, 2, bias=False)
        self.lin = nn.Linear(16, 5)

    def forward(self, ids):
        return self.lin(self.round(torch.relu(self.conv(self.table(ids)[:, None]))).flatten(1))


IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
NET = ["table", "conv", "round", "lin"]
MODELS = {
    "llama": (lambda: tiny.build("llama"), ["q_proj", "v_proj", "down_proj"], lambda m: m(tiny.ids()).logits),
    "llama-tables": (
        lambda: tiny.build("llama"),
        ["q_proj", "embed_tokens", "lm_head"],
        lambda m: m(tiny.ids()).logits,
    ),
    "gpt2": (lambda: tiny.build("gpt2"), ["c_attn", "c_fc", "wpe"], lambda m: m(tiny.ids()).logits),
    "net": (Net, NET, lambda m: m(IDS)),
}
CONFIGS = {
    "dora": lambda targets: LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=targets),
    "dora-rslora": lambda targets: LoraConfig(
        r=4, lora_alpha=6, use_dora=True, use_rslora=True, target_modules=targets
    ),
    "hira": lambda targets: HiraConfig(r=4, target_modules=targets),
}


def theirs(model, config):
    """PEFT's adapter on a model, moved away from its start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for fan_in_fan_out, and sets it itself
        wrapped = get_peft_model(model, config)
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=gen) * 0.1)
    return wrapped


def their_tensors(wrapped, key, kind="lora"):
    """PEFT's parameters of one layer, by our names."""
    module = wrapped.base_model.model.get_submodule(key)
    found = {}
    for name in "AB":
        for prefix in (f"{kind}_{name}", f"{kind}_embedding_{name}"):
            if "default" in getattr(module, prefix):
                held = getattr(module, prefix)["default"]
                found[name] = getattr(held, "weight", held)
    if getattr(module, "lora_magnitude_vector", None):
        found["m"] = module.lora_magnitude_vector["default"].weight
    return found


def same_as(wrapped, adapters, kind="lora"):
    """Give our adapter PEFT's numbers."""
    sites = adapters.adapters["default"].sites
    for key, site in sites.items():
        tensors = their_tensors(wrapped, key, kind)
        assert tensors.keys() == site.p.keys()
        for name, tensor in site.p.items():
            tensor.data = tensors[name].detach().reshape(tensor.shape).clone()
    return sites


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("config", CONFIGS)
def test_outputs_and_gradients_are_pefts(model, config):
    make, targets, run = MODELS[model]
    kind = "hira" if config == "hira" else "lora"
    wrapped = theirs(make(), CONFIGS[config](targets))
    own = make()
    options = {"rslora": True} if config == "dora-rslora" else {}
    adapters = attach(own, config.split("-")[0], r=4, alpha=6.0, target_modules=targets, **options)
    sites = same_as(wrapped, adapters, kind)
    y, truth = run(own), run(wrapped)
    torch.testing.assert_close(y, truth, **CLOSE)
    assert not torch.allclose(y, run(make()), atol=1e-2)  # it does something
    y.square().mean().backward()
    truth.square().mean().backward()
    for key, site in sites.items():
        for name, tensor in their_tensors(wrapped, key, kind).items():
            torch.testing.assert_close(site.p[name].grad, tensor.grad.reshape(site.p[name].shape), **CLOSE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = wrapped.merge_and_unload()
    adapters.merge()
    for key in sites:
        torch.testing.assert_close(
            own.get_submodule(key).weight, merged.get_submodule(key).weight, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("config", CONFIGS)
def test_the_start_is_pefts_shape_for_shape(config):
    """m is the length of W's rows; PEFT finds it through W + 0, to the last bits."""
    for make, targets, _ in MODELS.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(make(), CONFIGS[config](targets))
        adapters = attach(make(), config.split("-")[0], r=4, target_modules=targets)
        for key, site in adapters.adapters["default"].sites.items():
            tensors = their_tensors(wrapped, key, "hira" if config == "hira" else "lora")
            assert tensors.keys() == site.p.keys()
            for name, tensor in tensors.items():
                assert tensor.numel() == site.p[name].numel()
                assert tensor.any() == site.p[name].any()
            if "m" in tensors:
                torch.testing.assert_close(site.p["m"], tensors["m"].flatten(), rtol=1e-6, atol=0)


def test_pefts_keys_are_ours():
    for config, method in (("dora", DoRA), ("hira", HiRA)):
        wrapped = theirs(Net(), CONFIGS[config](["lin"]))
        names = [name for name, p in wrapped.named_parameters() if p.requires_grad]
        suffixes = {n.removeprefix("base_model.model.lin.").replace(".default", "") for n in names}
        keys = set(method.peft_keys.values())
        # only the magnitude is written without the .weight that it has in memory
        assert {s.replace("vector.weight", "vector") for s in suffixes} == keys


def test_pefts_settings_are_read():
    assert DoRA.from_peft({"use_dora": True, "use_rslora": False}) == {"rslora": False}
    assert DoRA.from_peft({"use_dora": True, "use_rslora": True}) == {"rslora": True}
    assert DoRA.from_peft({"use_dora": False, "use_rslora": True}) is None
    assert RsLoRA.from_peft({"use_dora": True, "use_rslora": True}) is None
    for rslora in (False, True):
        method = DoRA(r=4, alpha=6.0, rslora=rslora)
        assert DoRA(r=4, alpha=6.0, **DoRA.from_peft(method.peft_config())) == method
        assert method.scale == (3.0 if rslora else 1.5)
    assert HiRA.from_peft({"r": 4}) == {}


FOLDERS = {
    "dora": ("dora", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}}),
    "dora-rslora": ("dora", {"rslora": True, "rank_pattern": {"q_proj": 2}}),
    "dora-tables": ("dora", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "hira": ("hira", {"dropout": 0.25}),
    "hira-tables": ("hira", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "loraxs": ("loraxs", {}),  # as the plain LoRA that it is
}


@pytest.mark.parametrize(("method", "options"), FOLDERS.values(), ids=FOLDERS)
def test_folders_both_ways(method, options, tmp_path):
    """Ours in PEFT, the same without our own file in it, and PEFT's copy of it here again."""
    model = tiny.build("llama")
    adapters = attach(model, method, **{"r": 4, "target_modules": ["q_proj", "v_proj"]} | options)
    tiny.stir(adapters)
    truth = model(tiny.ids()).logits
    save_adapter(adapters, tmp_path / "ours", base_model="tiny")
    in_peft = PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(in_peft(tiny.ids()).logits, truth, **CLOSE)
    if method == "hira":
        assert in_peft.peft_config["default"].hira_dropout == options.get("dropout", 0.0)
    (tmp_path / "ours" / "loraloom.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for the base's configuration
        in_peft.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    for folder in ("ours", "theirs"):
        again = tiny.build("llama")
        read = load_adapter(again, tmp_path / folder)
        torch.testing.assert_close(again(tiny.ids()).logits, truth, **CLOSE)
        name = "lora" if method == "loraxs" else method
        assert read.adapters["default"].spec.method == name


def test_pefts_hira_has_one_rank(tmp_path):
    """Its rank_pattern changes nothing; ours is for folders that it cannot load."""
    wrapped = theirs(
        tiny.build("llama"), HiraConfig(r=4, target_modules=["q_proj"], rank_pattern={"q_proj": 2})
    )
    assert wrapped.base_model.model.model.layers[0].self_attn.q_proj.hira_A["default"].shape[0] == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(str(tmp_path / "theirs"))
    model = tiny.build("llama")
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(model(tiny.ids()).logits, wrapped(tiny.ids()).logits, **CLOSE)
    model = tiny.build("llama")
    adapters = attach(model, "hira", r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2})
    tiny.stir(adapters)
    save_adapter(adapters, tmp_path / "ours")
    assert not (tmp_path / "ours" / "adapter_config.json").exists()
    again = tiny.build("llama")
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(again(tiny.ids()).logits, model(tiny.ids()).logits)


class Fixed(nn.Module):
    """Dropout with one mask."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


def test_under_dropout_peft_drops_inputs_of_w_too():
    """Ours is g (x W^T + s x' A^T B^T) + b; PEFT's x W^T + (g - 1) x' W^T + g s x' A^T B^T + b."""
    gen = torch.Generator().manual_seed(4)
    x = torch.randn(3, 16, generator=gen)
    mask = (torch.rand(3, 16, generator=gen) > 0.3).float() / 0.7
    base = nn.Sequential(nn.Linear(16, 5))
    config = LoraConfig(r=4, lora_alpha=6, use_dora=True, lora_dropout=0.3, target_modules=["0"])
    wrapped = theirs(copy.deepcopy(base), config).train()
    wrapped.base_model.model[0].lora_dropout["default"] = Fixed(mask)
    own = copy.deepcopy(base)
    adapters = attach(own, "dora", r=4, alpha=6.0, dropout=0.3, target_modules=["0"])
    p = same_as(wrapped, adapters)["0"].p
    adapters.train()
    adapters.banks["0"].drop = lambda x, compute: x * mask
    w = base[0].weight
    change = 1.5 * p["B"] @ p["A"]
    g = p["m"] / (w + change).norm(dim=1)
    truth = g * (x @ w.T + (x * mask) @ change.T) + base[0].bias
    torch.testing.assert_close(own(x), truth, **CLOSE)
    torch.testing.assert_close(wrapped(x), truth + (g - 1) * ((x * mask - x) @ w.T), **CLOSE)
    assert not torch.allclose(wrapped(x), truth, atol=1e-2)


def test_what_pefts_hira_leaves_out():
    """A table's scale, a convolution's padding mode."""
    for case, x in (("embedding-scaled", IDS), ("conv2d-reflect", torch.randn(1, 3, 5, 5))):
        module = table.CASES[case].make()
        own = nn.Sequential(copy.deepcopy(module))
        wrapped = theirs(nn.Sequential(copy.deepcopy(module)), HiraConfig(r=3, target_modules=["0"]))
        adapters = attach(own, "hira", r=3, target_modules=["0"])
        site = same_as(wrapped, adapters, "hira")["0"]
        delta = site.layer.like_weight(site.method.delta(site.layer, site.p))
        torch.testing.assert_close(
            own(x), functional_call(module, {"weight": module.weight + delta}, x), **CLOSE
        )
        assert not torch.allclose(own(x), wrapped(x), atol=1e-3)


# ---- DoRA by its equation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dora", "hira", "loraxs"])
@pytest.mark.parametrize("case", ["linear", "linear-nf4", "conv1d", "conv2d", "embedding"])
def test_training_under_autocast_is_close(method, case):
    """Of masters in float32 on a base in float32: sums in bfloat16, which rounds at 0.4 %, a few times over."""
    host, adapters = table.stirred(method, table.CASES[case], torch.float32)
    x = table.x_of(table.CASES[case])
    x = x.float() if x.is_floating_point() else x
    host(x).square().mean().backward()
    truth = [p.grad.clone() for p in adapters.parameters()]
    for p in adapters.parameters():
        p.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        loss = host(x).square().mean()
    loss.backward()
    for p, grad in zip(adapters.parameters(), truth, strict=True):
        assert (p.grad - grad).abs().max() < 0.05 * grad.abs().max()


@pytest.mark.parametrize("case", [case for case in table.CASES.values() if not case.whole])
def test_dora_is_its_equation_with_the_norm_held_fast(case):
    """m / ||W + sBA|| (W + sBA) in W's place, in the module's own words, on every kind of layer."""
    host, adapters = table.stirred("dora", case)
    x = table.x_of(case)
    x = x.requires_grad_(x.is_floating_point())
    sites = list(adapters.adapters["default"].sites.values())
    truth = copy.deepcopy(host.module)
    truth.__dict__.pop("forward", None)
    truth.padding_idx = None  # it stops the table's gradient, and A has one for that token too
    truth.weight = nn.Parameter(dense(truth.weight).double())
    layer = view(truth, "truth")
    flat = layer.matrix(truth.weight.detach())
    tensors = [tensor for site in sites for tensor in site.p.values()]
    inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    if x.requires_grad:
        tensors, inputs = [*tensors, x], [*inputs, x]
    for number, site in enumerate(sites):
        a, b, m = inputs[3 * number : 3 * number + 3]
        rows = torch.arange(len(flat)) if site.layer.rows is None else site.layer.rows
        v = flat[rows] + 5.0 / table.R * b @ a
        n = v.detach().square().sum(1).sqrt()
        flat = flat.index_copy(0, rows, (m / n)[:, None] * v)
    y_true = functional_call(truth, {"weight": layer.like_weight(flat)}, x)
    y = host(x)
    torch.testing.assert_close(y, y_true, **TIGHT)
    weigh = torch.randn(y.shape, generator=torch.Generator().manual_seed(6), dtype=y.dtype)
    grads = torch.autograd.grad((y_true * weigh).sum(), inputs)
    for own, grad in zip(torch.autograd.grad((y * weigh).sum(), tensors), grads, strict=True):
        torch.testing.assert_close(own, grad, **TIGHT)
    with adapters.hold():
        assert torch.equal(host(x), y)
        (host(x) * weigh).sum().backward()
    for tensor, grad in zip(tensors, grads, strict=True):
        torch.testing.assert_close(tensor.grad, grad, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lengths_are_found_in_float32(dtype):
    """Of weights whose squares are beyond float16, and whose sums bfloat16 would round at 0.4 %."""
    torch.manual_seed(0)
    module = nn.Linear(300, 40, dtype=dtype)
    with torch.no_grad():
        module.weight.mul_(1e4)
    model = nn.Sequential(module)
    adapters = attach(model, "dora", r=4, target_modules=["0"])
    p = adapters.adapters["default"].sites["0"].p
    torch.testing.assert_close(p["m"].double(), module.weight.double().norm(dim=1), rtol=1e-6, atol=0)
    tiny.stir(adapters, size=100.0)
    truth = (module.weight.double() + 2 * p["B"].double() @ p["A"].double()).norm(dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        gain = adapters.banks["0"].build().gain
    assert gain.dtype == torch.float32
    torch.testing.assert_close((p["m"] / gain).double(), truth, rtol=3e-6, atol=0)


def test_a_length_that_rounds_below_zero_is_zero():
    torch.manual_seed(0)
    b, a = torch.randn(50, 2), torch.randn(2, 30)
    module = nn.Linear(30, 50, bias=False)
    module.weight = nn.Parameter(-2 * b @ a)
    adapters = attach(nn.Sequential(module), "dora", r=2, alpha=4.0, target_modules=["0"])
    p = adapters.adapters["default"].sites["0"].p
    p["A"].data, p["B"].data = a, b  # W + 2 B A is zero but for rounding
    lengths = p["m"] / adapters.banks["0"].build().gain
    assert (lengths <= 2e-3 * p["m"]).all()  # 1e-7 of the square, a few times over
    assert (lengths == 0).any()


def test_a_row_of_zeros_is_refused_by_name():
    model = nn.ModuleDict({"one": nn.Linear(4, 6), "two": nn.Linear(4, 6)})
    with torch.no_grad():
        model["two"].weight[[1, 4]] = 0
    with pytest.raises(UserError, match="two: 2 of 6 rows of its weight are all zero") as caught:
        attach(model, "dora", r=2, target_modules=["one", "two"])
    assert "leave the layer out" in caught.value.hint
    assert "forward" not in model["one"].__dict__
    shapes = nn.Sequential(nn.Linear(4, 6, device="meta"))  # of shapes nobody can tell
    site = attach(shapes, "dora", r=2, target_modules=["0"]).adapters["default"].sites["0"]
    assert site.p["m"].is_meta
    assert site.p["m"].shape == (6,)


def test_the_sums_of_squares_follow_the_weight():
    module = nn.Linear(5, 3)
    module.weight = nn.Parameter(torch.randn(3, 5))
    layer = view(module, "layer")
    first = layer.squares(torch.float32)
    assert layer.squares(torch.float32) is first
    torch.testing.assert_close(first, module.weight.detach().square().sum(1))

    def anew():
        now = layer.squares(torch.float32)
        torch.testing.assert_close(now, dense(module.weight, torch.float32).square().sum(1))
        assert layer.squares(torch.float32) is now
        return now

    module.weight = nn.Parameter(module.weight.detach() + 1)
    second = anew()
    with torch.no_grad():
        module.weight.mul_(2)
    third = anew()
    module.to(torch.bfloat16)
    fourth = anew()
    module.weight = quantized(module.weight)
    fifth = anew()
    module.to(torch.float32)  # its codes are exchanged
    anew()
    assert len({tuple(one.tolist()) for one in (first, second, third, fourth, fifth)}) == 5
    assert layer.squares(torch.float64).dtype == torch.float64


def test_magnitudes_have_no_weight_decay_and_no_ratio():
    model = nn.Sequential(nn.Linear(5, 4))
    adapters = attach(model, "dora", r=2, lr_ratio=4.0, target_modules=["0"])
    p = adapters.adapters["default"].sites["0"].p
    optimizer = make_optimizer(adapters.groups(1e-3), TrainConfig(weight_decay=0.5))
    by_id = {
        id(q): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for q in group["params"]
    }
    assert by_id == {id(p["A"]): (1e-3, 0.5), id(p["B"]): (4e-3, 0.5), id(p["m"]): (1e-3, 0.0)}


def test_parameters_of_llama_2_7b():
    """DoRA adds one number for each output: 1,359,872 over all linear layers, as PEFT counts them."""
    config = LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    counts = {}
    for method in ("lora", "dora", "loraxs"):
        adapters = attach(model, method, r=1, target_modules="all-linear")
        counts[method] = sum(p.numel() for p in adapters.parameters())
        adapters.detach()
    assert counts["dora"] - counts["lora"] == 1_359_872
    assert counts["loraxs"] == 7 * 32


# ---- W in pieces --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([None, "nf4", "fp4"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([32, 64, 256]),
    st.integers(1, 500),
)
def test_pieces_put_together_are_the_weight(out, width, code, double, turned, block, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant, "PIECE", piece)
        w = torch.randn(out, width, generator=torch.Generator().manual_seed(out * 41 + width))
        held = w if code is None else quantized(w, table=code, block=block, double=double)
        held = held.T if turned else held
        truth = dense(held)
        whole = torch.full_like(truth, torch.nan)
        for rows, columns, part in pieces(held, torch.float32):
            assert part.numel() <= max(piece, width)
            assert whole[rows, columns].isnan().all()
            whole[rows, columns] = part
        assert torch.equal(whole, truth)


class Largest(TorchDispatchMode):
    """The most floating numbers that an operation makes room for."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs)) if plain(t)
        }
        for tensor in torch.utils._pytree.tree_leaves(out):
            fresh = plain(tensor) and tensor.untyped_storage()._cdata not in given
            if fresh and tensor.is_floating_point() and not tensor.is_meta:
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return out


def plain(value):
    return isinstance(value, torch.Tensor) and not isinstance(value, quant.Weight4)


def big(kind):
    """A layer of some 200,000 weights that divide into no round number of blocks."""
    torch.manual_seed(0)
    if kind == "conv1d":
        return table.in_4_bits(Conv1D(331, 601))
    if kind == "embedding":
        return nn.Embedding(601, 331).bfloat16()
    module = nn.Linear(601, 331)
    if kind == "bfloat16":
        return module.bfloat16()
    return table.in_4_bits(module, double=kind != "flat", block={"wide": 2048}.get(kind, 64))


@pytest.mark.parametrize("kind", ["bfloat16", "nf4", "flat", "wide", "conv1d", "embedding"])
def test_no_matrix_of_ws_size_is_made_for_the_norm(kind, monkeypatch):
    monkeypatch.setattr(quant, "PIECE", 2**14)
    module = big(kind)
    weight = view(module, "layer").weight(torch.float64)
    counted = Largest()
    with counted:
        adapters = attach(nn.Sequential(module), "dora", r=4, target_modules=["0"])
        tiny.stir(adapters, size=0.5)
        site = adapters.adapters["default"].sites["0"]
        pair = site.method.pair(site.layer, site.p)
        pair.gain.sum().backward()
    assert counted.numel <= 2**14 + 2 * 2048  # a piece, and the rest of the blocks at its ends
    assert counted.numel > 2**12  # it was counted
    truth = (weight + 2 * (site.p["B"].double() @ site.p["A"].double())).norm(dim=1)
    torch.testing.assert_close((site.p["m"] / pair.gain).double(), truth, rtol=1e-5, atol=0)
    assert site.p["A"].grad is None  # nothing flows through the norm
    torch.testing.assert_close(site.p["m"].grad.double(), 1 / truth, rtol=1e-5, atol=0)


# ---- HiRA ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["linear", "linear-nf4", "conv1d", "conv2d", "embedding"])
def test_hira_keeps_nothing_of_ws_size_for_the_backward_pass(case):
    host, adapters = table.stirred("hira", table.CASES[case], torch.float32)
    x = table.x_of(table.CASES[case])
    x = x.float().requires_grad_() if x.is_floating_point() else x
    own = host.module.weight
    held = {part.untyped_storage()._cdata for part in ([own] if plain(own) else own.codes.tensors())}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in held:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        host(x)
    site = adapters.adapters["default"].sites["layer"]
    assert kept  # B at the least
    size = (site.layer.out_features, site.layer.in_features)
    assert not {size, size[::-1], tuple(own.shape)} & set(kept)


def test_hira_changes_w_by_a_product_of_high_rank():
    host, adapters = table.stirred("hira", table.CASES["linear"])
    site = adapters.adapters["default"].sites["layer"]
    delta = site.method.delta(site.layer, site.p)
    torch.testing.assert_close(delta, host.layer.weight * (site.p["B"] @ site.p["A"]), **TIGHT)
    assert torch.linalg.matrix_rank(delta) == 5 > table.R


def test_hira_on_a_table_makes_no_second_table():
    model = nn.Sequential(nn.Embedding(500, 20))
    adapters = attach(model, "hira", r=2, target_modules=["0"])
    tiny.stir(adapters)
    assert isinstance(adapters.banks["0"].layer, EmbeddingLayer)
    counted = Largest()
    with counted:
        model(torch.tensor([[3, 4]])).sum().backward()
    assert 0 < counted.numel <= 2 * 500  # A's gradient


def test_the_start_of_hira_is_loras():
    model = nn.Sequential(nn.Linear(5, 4))
    mine = attach(model, "hira", r=3, seed=2, target_modules=["0"]).adapters["default"].sites["0"].p
    other = nn.Sequential(nn.Linear(5, 4))
    loras = attach(other, "lora", r=3, seed=2, target_modules=["0"]).adapters["default"].sites["0"].p
    assert torch.equal(mine["A"], loras["A"])
    assert not mine["B"].any()
    assert HiRA().r == 32


# ---- LoRA-XS ------------------------------------------------------------------------------------------------


def xs(module, **settings):
    adapters = attach(nn.Sequential(module), "loraxs", target_modules=["0"], **settings)
    return adapters, adapters.adapters["default"].sites["0"]


@pytest.mark.parametrize("which", ["top", "bottom"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "nf4"])
def test_lora_xs_trains_r_between_parts_of_w(kind, which):
    torch.manual_seed(0)
    module = {
        "linear": lambda: nn.Linear(12, 9),
        "conv1d": lambda: Conv1D(9, 12),
        "embedding": lambda: nn.Embedding(12, 9),
        "nf4": lambda: table.in_4_bits(nn.Linear(12, 9)),
    }[kind]()
    adapters, site = xs(module, r=4, alpha=6.0, which=which)
    w = dense(module.weight).double()
    w = w if w.shape == (9, 12) else w.T
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    part = slice(None, 4) if which == "top" else slice(-4, None)
    a, b, r = (site.p[name].double() for name in "ABR")
    torch.testing.assert_close(b @ a, u[:, part] * s[part] @ v[part], **CLOSE)
    torch.testing.assert_close(b.T @ b, torch.eye(4).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close((a @ a.T).diagonal(), s[part] ** 2, **CLOSE)
    assert [p.shape for p in adapters.parameters()] == [(4, 4)]
    assert r.any()
    assert r.abs().max() < 1e-4
    tiny.stir(adapters, size=0.5)
    r = site.p["R"].double()
    change = 1.5 * b @ r @ a
    torch.testing.assert_close(site.method.delta(site.layer, site.p).double(), change, **CLOSE)


def test_the_start_of_r_is_small_normal_and_of_the_seed():
    module = nn.Linear(80, 70)
    r = xs(copy.deepcopy(module), r=64, seed=1)[1].p["R"]
    assert abs(r.detach().std().item() / 1e-5 - 1) < 0.05
    assert torch.equal(r, xs(copy.deepcopy(module), r=64, seed=1)[1].p["R"])
    assert not torch.equal(r, xs(copy.deepcopy(module), r=64, seed=2)[1].p["R"])


def test_the_fast_decomposition_is_close_and_of_the_seed():
    torch.manual_seed(0)
    module = nn.Linear(60, 50)
    u, s, v = torch.linalg.svd(module.weight.detach(), full_matrices=False)
    with torch.no_grad():
        module.weight.copy_(u * s * 0.8 ** torch.arange(50) @ v)
    exact = xs(copy.deepcopy(module), r=4)[1].p
    fast, again = (xs(copy.deepcopy(module), r=4, niter=10)[1].p for _ in range(2))
    torch.testing.assert_close(fast["B"] @ fast["A"], exact["B"] @ exact["A"], rtol=0, atol=1e-3)
    assert torch.equal(fast["A"], again["A"])


def test_lora_xs_learns_what_lies_within_its_parts():
    torch.manual_seed(0)
    module = nn.Linear(12, 9)
    adapters, site = xs(module, r=4, alpha=4.0)
    x = torch.randn(64, 12)
    a, b = site.p["A"], site.p["B"]
    truth = 0.3 * torch.randn(4, 4)
    goal = (module(x) + x @ (b @ truth @ a).T).detach()
    optimizer = torch.optim.Adam(adapters.groups(0.05))
    for _ in range(200):
        optimizer.zero_grad()
        (module(x) - goal).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(site.p["R"], truth, rtol=0, atol=1e-2)
    assert site.p["A"] is a  # frozen


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"which": "middle"}, "method.which is 'middle'"),
        ({"niter": -1}, "method.niter is -1"),
        ({"niter": 1.5}, "method.niter is 1.5"),
        ({"which": "bottom", "niter": 4}, "method.niter is 4, and the fast decomposition finds the largest"),
    ],
)
def test_wrong_settings_of_lora_xs(wrong, message):
    with pytest.raises(UserError) as caught:
        AdapterSpec(method="loraxs", options=wrong).make()
    assert caught.value.message.startswith(message)


def test_all_three_start_from_shapes_alone():
    """For plans: shapes as on a real model, in 4 bits too."""
    for method in ("dora", "hira", "loraxs"):
        for module in (nn.Linear(70, 30), Conv1D(30, 70), nn.Embedding(70, 30), nn.Conv2d(7, 30, (5, 2))):
            real, hollow = nn.Sequential(module), nn.Sequential(copy.deepcopy(module).to("meta"))
            truth = attach(real, method, r=3, target_modules=["0"]).adapters["default"].sites["0"].p
            for shapes in (hollow, nn.Sequential(table.in_4_bits(nn.Linear(70, 30, device="meta")))):
                found = attach(shapes, method, r=3, target_modules=["0"]).adapters["default"].sites["0"].p
                assert {k: t.shape for k, t in found.items()} == {k: t.shape for k, t in truth.items()}
                assert all(tensor.is_meta for tensor in found.values())
                assert {k: t.requires_grad for k, t in found.items()} == {
                    k: t.requires_grad for k, t in truth.items()
                }


def test_an_adapter_of_numbers_on_a_model_of_shapes():
    """As merging has it: the tensors come from a file, the weight from a shard, one at a time."""
    module = nn.Linear(6, 4)
    adapters = attach(nn.Sequential(module), "dora", r=2, target_modules=["0"])
    tiny.stir(adapters)
    held = adapters.adapters["default"].sites["0"]
    truth = held.method.delta(held.layer, held.p)
    skeleton = nn.Sequential(nn.Linear(6, 4, device="meta"))
    blank = Adapters(skeleton, device="cpu")
    site = blank.add("default", AdapterSpec(method="dora", r=2, target_modules=["0"]), blank=True).sites["0"]
    with torch.no_grad():
        for name, tensor in site.p.items():
            tensor.copy_(held.p[name])
    skeleton[0].weight = nn.Parameter(module.weight.detach().clone())
    torch.testing.assert_close(site.method.delta(site.layer, site.p), truth)
