"""EVA, CorDA, LoRA-GA and LoRA-One: against PEFT on the same batches, or the papers' equations in float64.

The hooks before the first step are driven here by hand, by forward and gradient hooks on the layers. Singular
vectors have no sign of their own, so rows are turned the same way before they are compared.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import itertools
import re
import sys
import types

import pytest
import tiny
import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import loraga as peft_loraga
from peft.tuners.lora.config import CordaConfig
from torch import nn

from loraloom import methods
from loraloom.adapt import attach
from loraloom.errors import NonFinite, UserError
from loraloom.layers import view
from loraloom.methods import corda
from loraloom.methods.base import Site
from loraloom.quant import dense, quantized
from loraloom.targets import input_group

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
NARROW = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
]  # 16 wide: PEFT's SVD is exact there
# float32 singular vectors of some hundred summed products: their error is 1e-7 over the gap between values
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def sites_of(adapters):
    return adapters.adapters["default"].sites


def method_of(adapters):
    return adapters.adapters["default"].method


def watch(model, adapters, batches, loss=None):
    """Run the batches and show every layer what passes; the stores by site, shared where inputs are."""
    sites, stores = sites_of(adapters), {}
    gradients = method_of(adapters).needs == "gradients"
    for batch in batches:
        seen, handles = {}, []
        for key, site in sites.items():

            def hook(module, args, y, key=key, seen=seen):
                seen[key] = (args[0].detach(), y)
                if gradients:
                    y.retain_grad()

            handles.append(site.layer.module.register_forward_hook(hook))
        with torch.set_grad_enabled(gradients):
            out = model(**batch) if isinstance(batch, dict) else model(batch)
        if gradients:
            loss(out).backward()
        for handle in handles:
            handle.remove()
        shown = set()
        for key, site in sites.items():
            group = key if gradients else input_group(key)
            if group in shown:
                stores[key] = stores[group]
                continue
            shown.add(group)
            stores[key] = stores.setdefault(group, {})
            x, y = seen[key]
            x, g = x.flatten(0, -2), y.grad.flatten(0, -2) if gradients else None
            real = torch.ones(len(x), dtype=torch.bool)
            labelled = real
            if isinstance(batch, dict):
                real = batch["attention_mask"].flatten().bool()
                labelled = (batch["labels"] != -100).flatten() & real
            site.method.observe(site, stores[key], x[real], None if g is None else g[real], labelled[real])
    return stores


def prepared(make, batches, *, loss=None, **spec):
    """A model whose adapter has seen the batches: (model, adapters, the settings that `begin` changed)."""
    model = make()
    adapters = attach(model, **spec)
    stores = watch(model, adapters, batches, loss)
    sites = sites_of(adapters)
    found = {key: site.method.found(site, stores[key]) for key, site in sites.items()}
    changes, tensors = method_of(adapters).begin(sites, found)
    model = make()
    adapters = attach(model, **(spec | changes))
    for key, parts in tensors.items():
        assert set(parts) == set(sites_of(adapters)[key].p)
        for name, tensor in parts.items():
            own = sites_of(adapters)[key].p[name]
            assert isinstance(tensor, nn.Parameter) == isinstance(own, nn.Parameter)
            assert tensor.shape == own.shape
            assert tensor.dtype == torch.float32
            own.data = tensor.detach().clone()
    return model, adapters, changes


def texts(count, *, rows=4, length=14, seed=0):
    """Batches with padding and masked labels."""
    gen = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, tiny.VOCAB, (rows, length), generator=gen)
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def turned(rows, like):
    """Each row with the sign that brings it nearer to its twin; the signs too."""
    signs = (rows * like).sum(1).sign()
    return rows * signs[:, None], signs


# ---- EVA ----------------------------------------------------------------------------------------------------


@pytest.fixture
def unsigned(monkeypatch):
    """PEFT's cosines have a sign, so that a vector whose sign it turns counts as a new one: here it does not."""
    signed = nn.functional.cosine_similarity
    monkeypatch.setattr(nn.functional, "cosine_similarity", lambda a, b: signed(a, b).abs())


def peft_eva(kind, targets, batches, r, **eva):
    config = LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=targets, init_lora_weights="eva", eva_config=EvaConfig(**eva)
    )
    model = get_peft_model(tiny.build(kind), config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


def lora_layers(peft_model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in peft_model.named_modules()
        if hasattr(module, "lora_A") and len(module.lora_A)
    }


@pytest.mark.parametrize(
    ("kind", "targets", "r", "rho", "tau", "count"),
    [
        (
            "llama",
            NARROW,
            8,
            1.0,
            0.99,
            5,
        ),  # gone through until every layer has converged, each in its own time
        ("llama", NARROW, 4, 2.0, 0.0, 2),  # two batches, then ranks are dealt out
        ("gpt2", ["c_attn", "attn.c_proj", "c_fc"], 4, 2.0, 0.0, 2),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_eva_finds_pefts_ranks_and_directions(kind, targets, r, rho, tau, count, unsigned):
    batches = texts(count)
    theirs = lora_layers(peft_eva(kind, targets, batches, r, rho=rho, tau=tau))
    rounds = list(itertools.islice(itertools.cycle(batches), 200 if tau else count))
    spec = {"method": "eva", "r": r, "target_modules": targets, "rho": rho, "tau": tau}
    model, adapters, changes = prepared(lambda: tiny.build(kind), rounds, **spec)
    ours = sites_of(adapters)
    assert set(ours) == set(theirs)
    for key, site in ours.items():
        a = theirs[key].lora_A["default"].weight
        assert site.p["A"].shape == a.shape
        assert not site.p["B"].any()
        assert site.method.scale == pytest.approx(theirs[key].scaling["default"])
        torch.testing.assert_close(turned(site.p["A"], a)[0], a, **CLOSE)
    ranks = [len(site.p["A"]) for site in ours.values()]
    assert (len(set(ranks)) > 1) == (rho > 1)
    assert set(changes["rank_pattern"].values()) <= set(ranks)
    assert torch.equal(model(tiny.ids()).logits, tiny.build(kind)(tiny.ids()).logits)


def test_eva_whitens_each_layer_once(unsigned):
    """PEFT divides a shared input's directions once for every layer that reads it; the last to come shows it."""
    batches, r = texts(2), 4
    theirs = lora_layers(peft_eva("llama", NARROW, batches, r, rho=1.0, tau=0.0, whiten=True))
    spec = {"method": "eva", "r": r, "target_modules": NARROW, "rho": 1, "tau": 0, "niter": 0}
    _, plain, _ = prepared(lambda: tiny.build("llama"), batches, **spec)
    _, white, _ = prepared(lambda: tiny.build("llama"), batches, whiten=True, **spec)
    for key, layer in theirs.items():
        a, a_white = sites_of(plain)[key].p["A"], sites_of(white)[key].p["A"]
        root = a_white.norm(dim=1)
        torch.testing.assert_close(a_white, a * root[:, None])
        a_theirs = layer.lora_A["default"].weight
        if key.endswith("o_proj"):  # its input is its own
            torch.testing.assert_close(turned(a_white, a_theirs)[0], a_theirs, **CLOSE)
        elif key.endswith(("k_proj", "v_proj", "up_proj")):
            assert not torch.allclose(a_theirs.norm(dim=1), root, rtol=0.2)


def linear(*, out=7, into=5, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(into, out, bias=bias))


def test_eva_in_pieces_is_the_pca_of_the_whole():
    """With as many directions as inputs nothing is dropped between batches, so the order of sums is all."""
    gen = torch.Generator().manual_seed(1)
    mix = torch.randn(5, 5, generator=gen)
    batches = [torch.randn(n, 5, generator=gen) @ mix + 3 for n in (9, 6, 4, 11)]  # the third is too short
    adapters = attach(linear(), "eva", r=5, rho=1.0, tau=1.0, target_modules=["0"])
    [site] = sites_of(adapters).values()
    store = {}
    for x in batches:
        site.method.observe(site, store, x, None, torch.ones(len(x), dtype=torch.bool))
    found = site.method.found(site, store)
    whole = torch.cat([x for x in batches if len(x) >= 5]).double()
    _, s, v = torch.linalg.svd(whole - whole.mean(0), full_matrices=False)
    torch.testing.assert_close(turned(found["V"].double(), v)[0], v, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["S"].double(), s, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["share"].double(), s**2 / (s**2).sum(), rtol=1e-4, atol=1e-6)


def test_eva_stops_looking_when_every_direction_is_final():
    adapters = attach(linear(), "eva", r=2, rho=1.0, target_modules=["0"])
    [site] = sites_of(adapters).values()
    x, every, store = torch.randn(30, 5), torch.ones(30, dtype=torch.bool), {}
    for _ in range(2):
        site.method.observe(site, store, x, None, every)
    before = dict(store)
    site.method.observe(site, store, torch.randn(30, 5), None, every)
    assert all(torch.equal(store[name], before[name]) for name in before)
    assert store["tokens"] == 60


def test_eva_looks_at_labelled_tokens_unless_told_otherwise():
    x = torch.randn(20, 5)
    labelled = torch.arange(20) % 2 == 0
    seen = {}
    for choice in (True, False):
        adapters = attach(linear(), "eva", r=2, labelled=choice, target_modules=["0"])
        [site] = sites_of(adapters).values()
        store = {}
        site.method.observe(site, store, x, None, labelled)
        seen[choice] = store["mean"]
    torch.testing.assert_close(seen[True], x[labelled].mean(0))
    torch.testing.assert_close(seen[False], x.mean(0))


def shares(**by_layer):
    return {
        key: {"V": torch.eye(4)[: len(s)], "S": torch.tensor(s).sqrt(), "share": torch.tensor(s)} if s else {}
        for key, s in by_layer.items()
    }


def four_linears():
    return nn.ModuleDict({name: nn.Linear(4, 6) for name in ("a", "ab", "c", "d")})


def test_eva_deals_out_rank_by_share_and_leaves_layers_out():
    """Budget 2 + 2 + 2: four for a, two for c, none for ab; d saw nothing and keeps its own."""
    spec = {"method": "eva", "r": 2, "alpha": 6.0, "target_modules": ["a", "ab", "c", "d"]}
    adapters = attach(four_linears(), **spec)
    found = shares(a=[0.4, 0.3, 0.2, 0.1], ab=[0.02, 0.01], c=[0.5, 0.15, 0.05, 0.01], d=[])
    changes, tensors = method_of(adapters).begin(sites_of(adapters), found)
    assert changes == {"rank_pattern": {"ab": 0, "a": 4}, "alpha_pattern": {"a": 12.0}}
    assert {key: tuple(p["A"].shape) for key, p in tensors.items()} == {"a": (4, 4), "c": (2, 4)}
    again = attach(four_linears(), **(spec | changes))
    assert {key: len(site.p["A"]) for key, site in sites_of(again).items()} == {"a": 4, "c": 2, "d": 2}
    assert {site.method.scale for site in sites_of(again).values()} == {3.0}
    spec["options"] = {"keep_scale": False}
    adapters = attach(four_linears(), **spec)
    changes, _ = method_of(adapters).begin(sites_of(adapters), found)
    again = attach(four_linears(), **(spec | changes))
    assert [site.method.alpha for site in sites_of(again).values()] == [6.0, 6.0, 6.0]


def test_evas_patterns_name_one_layer_each():
    """A shorter name that a longer one ends with must not take its rank, nor a dot stand for any letter."""
    model = nn.ModuleDict({"q": nn.Linear(4, 6), "deep": nn.ModuleDict({"q": nn.Linear(4, 6)})})
    adapters = attach(model, "eva", r=2, target_modules=["q"])
    found = {"q": shares(q=[0.1, 0.05, 0.02])["q"], "deep.q": shares(q=[0.4, 0.3, 0.2])["q"]}
    changes, _ = method_of(adapters).begin(sites_of(adapters), found)
    assert list(changes["rank_pattern"].items()) == [(re.escape("deep.q"), 3), ("q", 1)]
    model = copy.deepcopy(
        nn.ModuleDict({"q": nn.Linear(4, 6), "deep": nn.ModuleDict({"q": nn.Linear(4, 6)})})
    )
    again = attach(model, "eva", r=2, target_modules=["q"], **changes)
    assert {key: len(site.p["A"]) for key, site in sites_of(again).items()} == {"q": 1, "deep.q": 3}


def test_eva_says_when_no_batch_was_long_enough():
    adapters = attach(linear(), "eva", r=2, target_modules=["0"])
    [site] = sites_of(adapters).values()
    store = {}
    site.method.observe(site, store, torch.randn(3, 5), None, torch.ones(3, dtype=torch.bool))
    with pytest.raises(UserError, match="every batch had fewer tokens than the 4 directions"):
        site.method.begin({"0": site}, {"0": site.method.found(site, store)})


# ---- CorDA --------------------------------------------------------------------------------------------------


def rows_of_text(count):
    """One row a batch, as PEFT's hook needs it."""
    return [batch["input_ids"] for batch in texts(count, rows=1, length=30)]


def pefts_corda(monkeypatch):
    """PEFT's module asks for the package attrs, for its dataclass alone, and does not declare that it does."""
    stand_in = types.ModuleType("attr")
    stand_in.dataclass = dataclasses.dataclass
    monkeypatch.setitem(sys.modules, "attr", stand_in)
    return importlib.import_module("peft.tuners.lora.corda")


def peft_corda_model(peft_corda, kind, targets, batches, mode, r=3, alpha=5.0):
    model = tiny.build(kind)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=targets,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )
    peft_corda.preprocess_corda(model, config, run_model=lambda: [model(ids) for ids in batches])
    return get_peft_model(model, config)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize(
    ("kind", "targets"), [("llama", [*NARROW, "down_proj"]), ("gpt2", ["c_attn", "c_proj", "c_fc"])]
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_corda_starts_and_learns_as_pefts(kind, targets, mode, monkeypatch):
    batches = rows_of_text(4)
    theirs = peft_corda_model(pefts_corda(monkeypatch), kind, targets, batches, mode)
    layers = lora_layers(theirs)
    spec = {"method": "corda", "r": 3, "alpha": 5.0, "target_modules": targets, "mode": mode}
    base = tiny.build(kind)
    model, adapters, changes = prepared(lambda: tiny.build(kind), batches, **spec)
    assert changes == {}
    assert torch.equal(model(tiny.ids()).logits, base(tiny.ids()).logits)
    assert set(sites_of(adapters)) == set(layers)
    for key, site in sites_of(adapters).items():
        a, b = (layers[key].lora_A["default"].weight, layers[key].lora_B["default"].weight)
        near, signs = turned(site.p["A"], a)
        torch.testing.assert_close(near, a, rtol=1e-3, atol=1e-4 * a.abs().max().item())
        torch.testing.assert_close(site.p["B"] * signs, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
        rest_OI = site.layer.weight() - 5 / 3 * site.p["B0"] @ site.p["A0"]
        residual = layers[key].get_base_layer().weight
        torch.testing.assert_close(rest_OI, residual.T if kind == "gpt2" else residual, rtol=1e-4, atol=1e-4)
        a.data, b.data = a * signs[:, None], b * signs  # theirs turned our way, for what follows
    gen = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for key, site in sites_of(adapters).items():
            for mine, other in ((site.p["A"], layers[key].lora_A), (site.p["B"], layers[key].lora_B)):
                step = 0.05 * torch.randn(mine.shape, generator=gen)
                mine += step
                other["default"].weight += step
    ids = tiny.ids()
    out, reference = model(ids).logits, theirs(ids).logits
    torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-4)
    out.logsumexp(-1).sum().backward()
    reference.logsumexp(-1).sum().backward()
    for key, site in sites_of(adapters).items():
        for name, parts in (("A", layers[key].lora_A), ("B", layers[key].lora_B)):
            g = parts["default"].weight.grad
            torch.testing.assert_close(site.p[name].grad, g, rtol=1e-3, atol=1e-3 * g.abs().max().item())


@pytest.mark.parametrize("in_4_bits", [False, True])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_cordas_parts_of_full_rank_are_w_itself(mode, in_4_bits):
    """U S V^T C^-1 = W whatever C is; few tokens make it singular."""

    def make():
        model = linear(into=6, out=4)
        if in_4_bits:
            model[0].weight = quantized(model[0].weight)
        return model

    spec = {"method": "corda", "r": 4, "alpha": 3.0, "target_modules": ["0"], "mode": mode}
    model, adapters, _ = prepared(make, [torch.randn(2, 6), torch.randn(3, 6)], **spec)
    p = sites_of(adapters)["0"].p
    w_OI = dense(model[0].weight, torch.float32)
    torch.testing.assert_close(0.75 * p["B0"] @ p["A0"], w_OI, rtol=1e-4, atol=1e-4)


def test_corda_damps_until_the_inverse_is_one(monkeypatch):
    """0.01, doubled until the error is below the limit: here a limit between the third's and the fourth's."""
    gen = torch.Generator().manual_seed(3)
    x_TI = torch.randn(40, 12, generator=gen) * 10.0 ** torch.linspace(0, -4, 12)
    c_II = (x_TI / x_TI.max().abs()).T @ (x_TI / x_TI.max().abs())
    eye, errors = torch.eye(12), []
    for k in range(4):
        regular = c_II + 0.01 * 2**k * c_II.diagonal().mean() * eye
        errors.append(float((regular @ torch.linalg.inv(regular) - eye).norm()))
    limit = errors[3] * 1.01
    wanted = next(k for k, error in enumerate(errors) if error < limit)
    assert wanted > 0
    monkeypatch.setattr(corda, "INVERSE_ERROR", limit)
    w_OI = torch.randn(7, 12, generator=gen)
    regular = c_II + 0.01 * 2**wanted * c_II.diagonal().mean() * eye
    u, s, v = torch.linalg.svd((w_OI @ regular).double(), full_matrices=False)
    truth = u[:, :2] * s[:2] @ v[:2] @ torch.linalg.inv(regular.double())
    model = linear(into=12)
    with torch.no_grad():
        model[0].weight.copy_(w_OI)
    adapters = attach(model, "corda", r=2, alpha=2.0, target_modules=["0"])
    [site] = sites_of(adapters).values()
    store = {}
    site.method.observe(site, store, x_TI, None, torch.ones(40, dtype=torch.bool))
    p = site.method.found(site, store)
    torch.testing.assert_close((p["B0"] @ p["A0"]).double(), truth, rtol=1e-3, atol=1e-4)


def test_corda_names_a_layer_whose_inputs_are_not_finite():
    adapters = attach(linear(), "corda", r=2, target_modules=["0"])
    [site] = sites_of(adapters).values()
    store = {}
    x = torch.randn(8, 5)
    x[2, 1] = float("nan")
    site.method.observe(site, store, x, None, torch.ones(8, dtype=torch.bool))
    with pytest.raises(NonFinite, match="0: its inputs are not finite"):
        site.method.found(site, store)


# ---- gradients ----------------------------------------------------------------------------------------------

R, ALPHA = 2, 6.0


def two_layers(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 5, bias=False)).to(dtype)


def inputs(count=2, rows=11):
    gen = torch.Generator().manual_seed(6)
    return [torch.randn(rows + i, 9, generator=gen) for i in range(count)]


def loss_of(y):
    return (y.sin() + y.square()).sum()


def true_gradients(batches, like=None):
    """dL/dW of both layers by autograd on a plain dense model, float64."""
    model = two_layers(torch.float64)
    for key in ("0", "2") if like is not None else ():
        model.get_submodule(key).weight.data = dense(like.get_submodule(key).weight, torch.float64)
    for x in batches:
        loss_of(model(x.double())).backward()
    return {key: model.get_submodule(key).weight.grad for key in ("0", "2")}


@pytest.mark.parametrize("in_4_bits", [False, True])
@pytest.mark.parametrize("method", ["loraga", "loraone"])
def test_the_gradient_of_a_frozen_weight_is_found(method, in_4_bits):
    model = two_layers()
    for key in ("0", "2") if in_4_bits else ():
        model.get_submodule(key).weight = quantized(model.get_submodule(key).weight)
    adapters = attach(model, method, r=R, target_modules=["0", "2"])
    stores = watch(model, adapters, inputs(), loss_of)
    for key, g_OI in true_gradients(inputs(), like=model).items():
        torch.testing.assert_close(stores[key]["G"].double(), g_OI, rtol=1e-4, atol=1e-4)
        assert not model.get_submodule(key).weight.requires_grad


TAKEN = {"ArB2r": ([0, 1], [2, 3]), "A2rBr": ([2, 3], [0, 1]), "ArBr": ([1, 3], [0, 2])}


@pytest.mark.parametrize("direction", TAKEN)
@pytest.mark.parametrize("size", ["stable", "unit", "gd", "weight_svd"])
def test_lora_ga_by_its_equations(direction, size):
    base, batches = two_layers(), inputs()
    spec = {"method": "loraga", "r": R, "alpha": ALPHA, "target_modules": ["0", "2"]}
    spec |= {"direction": direction, "scale_by": size}
    model, adapters, changes = prepared(two_layers, batches, loss=loss_of, **spec)
    assert changes == {}
    s = ALPHA / R**0.5
    for key, g_OI in true_gradients(batches).items():
        site = sites_of(adapters)[key]
        u, _, v = torch.linalg.svd(g_OI)
        rows, columns = TAKEN[direction]
        w_s = torch.linalg.svdvals(base.get_submodule(key).weight.double())
        length = {
            "stable": len(g_OI) ** 0.25 / 16**0.5,
            "unit": 1.0,
            "gd": 1 / s,
            "weight_svd": (w_s[:R] / s).sqrt().mean().item(),
        }[size]
        assert site.method.scale == s
        a, b = length * v[rows], length * u[:, columns]
        torch.testing.assert_close(turned(site.p["A"].double(), a)[0], a, **CLOSE)
        torch.testing.assert_close(turned(site.p["B"].double().T, b.T)[0], b.T, **CLOSE)
        assert torch.equal(site.p["A"], site.p["A0"])
        assert torch.equal(site.p["B"], site.p["B0"])
    x = batches[0]
    assert torch.equal(model(x), base(x))
    tiny.stir(adapters)
    moved = copy.deepcopy(base).double()
    with torch.no_grad():  # the paper's own form: W - s B0 A0 in W's place, and B A beside it
        for key, site in sites_of(adapters).items():
            p = {name: tensor.double() for name, tensor in site.p.items()}
            moved.get_submodule(key).weight += s * (p["B"] @ p["A"] - p["B0"] @ p["A0"])
    torch.testing.assert_close(model(x).double(), moved(x.double()), rtol=1e-4, atol=1e-4)


def test_lora_gas_random_directions_are_the_first_2r_without_overlap():
    batches = inputs()
    spec = {
        "method": "loraga",
        "r": R,
        "target_modules": ["0", "2"],
        "direction": "random",
        "scale_by": "unit",
    }
    _, adapters, _ = prepared(two_layers, batches, loss=loss_of, **spec)
    for key, g_OI in true_gradients(batches).items():
        u, _, v = torch.linalg.svd(g_OI)
        p = sites_of(adapters)[key].p
        of_a = (p["A"].double() @ v[: 2 * R].T).abs()
        of_b = (p["B"].double().T @ u[:, : 2 * R]).abs()
        taken = torch.cat([of_a, of_b]).detach()
        assert sorted(taken.argmax(1).tolist()) == list(range(2 * R))
        assert (taken.max(1).values - 1).abs().max() < 1e-3


@pytest.mark.parametrize("direction", [*TAKEN, "random"])
def test_lora_ga_on_a_layer_too_small_for_2r_directions(direction):
    """4 outputs and rank 3: LoRA's start stands in for the two that are not there, never zero on both sides."""
    layer = view(nn.Linear(9, 4), "layer")
    method = methods.find("loraga")(r=3, direction=direction)
    site = Site(layer, method, method.init(layer, torch.Generator().manual_seed(1)))
    store = {}
    method.observe(site, store, torch.randn(20, 9), torch.randn(20, 4), torch.ones(20, dtype=torch.bool))
    p = method.found(site, store)
    assert bool((p["A"].norm(dim=1) + p["B"].norm(dim=0) > 0.01).all())
    spare = (p["A"] == site.p["A"]).all(1).sum() + (p["B"] == 0).all(0).sum()
    assert spare == 2


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # of its preparation
def test_pefts_lora_ga_is_another_method():
    """B times the gradient's singular values, A at length 1: not the paper's start, and it depends on the loss."""
    model, batches = two_layers(), inputs()
    config = LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules=["0"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )
    peft_loraga.preprocess_loraga(model, config, lambda: [loss_of(model(x)).backward() for x in batches])
    theirs = get_peft_model(model, config).base_model.model[0]
    spec = {"method": "loraga", "r": R, "alpha": ALPHA, "target_modules": ["0"]}
    _, adapters, _ = prepared(two_layers, batches, loss=loss_of, **spec)
    p = sites_of(adapters)["0"].p
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    length = 12**0.25 / 4
    s = torch.linalg.svdvals(true_gradients(batches)["0"] / len(batches)).float()
    torch.testing.assert_close(p["A"].norm(dim=1), torch.full((R,), length))
    torch.testing.assert_close(p["B"].norm(dim=0), torch.full((R,), length))
    torch.testing.assert_close(a.norm(dim=1), torch.ones(R))
    torch.testing.assert_close(b.norm(dim=0), length * s[R : 2 * R], **CLOSE)
    torch.testing.assert_close(turned(length * a, p["A"])[0], p["A"], **CLOSE)


def test_lora_one_by_its_equations():
    base, batches = two_layers(), inputs()
    spec = {"method": "loraone", "r": R, "alpha": ALPHA, "target_modules": ["0", "2"]}
    model, adapters, changes = prepared(two_layers, batches, loss=loss_of, **spec)
    assert changes == {}
    s, moved = ALPHA / R**0.5, copy.deepcopy(base).double()
    for key, g_OI in true_gradients(batches).items():
        p = sites_of(adapters)[key].p
        u, sigma, v = torch.linalg.svd(-g_OI)
        root = (sigma[:R] / sigma[0] / 128).sqrt()
        a, b = root[:, None] * v[:R], u[:, :R] * root
        near, signs = turned(p["A"].double(), a)
        torch.testing.assert_close(near, a, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(p["B"].double() * signs, b, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            moved.get_submodule(key).weight += s * b @ a
    x = batches[0]
    torch.testing.assert_close(model(x).double(), moved(x.double()), rtol=1e-4, atol=1e-5)
    before, after = (sum(loss_of(net(x)).item() for x in batches) for net in (base, model))
    assert after < before  # a step down the gradient, not up


def test_lora_ones_start_stands_in_for_directions_the_gradient_lacks():
    """One token makes a gradient of rank 1: the other rows are LoRA's, and learn."""
    spec = {"method": "loraone", "r": 3, "target_modules": ["0"], "seed": 4}
    plain = sites_of(attach(two_layers(), **spec))["0"].p
    _, adapters, _ = prepared(two_layers, inputs(1, rows=1), loss=loss_of, **spec)
    p = sites_of(adapters)["0"].p
    assert not torch.equal(p["A"][0], plain["A"][0])
    assert torch.equal(p["A"][1:], plain["A"][1:])
    assert p["B"][:, 0].any()
    assert not p["B"][:, 1:].any()


@pytest.mark.parametrize("damping", [1e-6, 0.3])
def test_lora_ones_preconditioner(damping):
    adapters = attach(two_layers(), "loraone", r=R, damping=damping, target_modules=["0", "2"])
    tiny.stir(adapters, size=1.0)
    gen = torch.Generator().manual_seed(5)
    truths = {}
    for key, site in sites_of(adapters).items():
        a, b = site.p["A"].detach().double(), site.p["B"].detach().double()
        for tensor in (site.p["A"], site.p["B"]):
            tensor.grad = torch.randn(tensor.shape, generator=gen)
        eye = damping * torch.eye(R, dtype=torch.float64)
        truths[key] = (
            torch.linalg.inv(b.T @ b + eye) @ site.p["A"].grad.double(),
            site.p["B"].grad.double() @ torch.linalg.inv(a @ a.T + eye),
        )
    method_of(adapters).before_step(list(sites_of(adapters).values()), 0)
    for key, (g_a, g_b) in truths.items():
        p = sites_of(adapters)[key].p
        torch.testing.assert_close(p["A"].grad.double(), g_a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(p["B"].grad.double(), g_b, rtol=1e-4, atol=1e-5)


def test_lora_one_can_leave_gradients_alone():
    adapters = attach(two_layers(), "loraone", r=R, precondition=False, target_modules=["0"])
    p = sites_of(adapters)["0"].p
    p["A"].grad, p["B"].grad = torch.ones(R, 9), torch.ones(12, R)
    method_of(adapters).before_step(list(sites_of(adapters).values()), 0)
    assert bool((p["A"].grad == 1).all() and (p["B"].grad == 1).all())
    adapters = attach(two_layers(), "loraone", r=R, target_modules=["0"])
    method_of(adapters).before_step(
        list(sites_of(adapters).values()), 0
    )  # before any gradient: nothing to do


@pytest.mark.parametrize("method", ["loraga", "loraone"])
def test_a_large_gradient_may_be_decomposed_fast(method):
    """Above the size that is decomposed exactly: values that fall by a tenth each are found to a thousandth."""
    gen = torch.Generator().manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(n, 40, generator=gen)).Q for n in (600, 530))
    g_OI = u * 0.9 ** torch.arange(40) @ v.T
    starts = []
    for niter in (4, 0):
        adapters = attach(linear(into=530, out=600), method, r=3, niter=niter, target_modules=["0"])
        [site] = sites_of(adapters).values()
        starts.append(site.method.found(site, {"G": g_OI}))
    fast, exact = starts
    for name in exact:
        a, b = (p[name].detach() if name.startswith("A") else p[name].detach().T for p in (fast, exact))
        assert torch.cosine_similarity(a, b).abs().min() > 0.99
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=1), rtol=0.01, atol=0)
        assert not torch.equal(a, b)


# ---- all four -----------------------------------------------------------------------------------------------

FOUR = ["corda", "eva", "loraga", "loraone"]


@pytest.mark.parametrize("method", FOUR)
def test_a_layer_that_saw_nothing_starts_as_it_was(method):
    """An expert that no token was sent to, beside a layer that saw some."""
    model = four_linears()
    adapters = attach(model, method, r=2, target_modules=["a", "c"])
    sites, found = sites_of(adapters), {}
    for key, tokens in (("a", 9), ("c", 0)):
        store = {}
        x, g = torch.randn(tokens, 4), torch.randn(tokens, 6)
        sites[key].method.observe(sites[key], store, x, g, torch.ones(tokens, dtype=torch.bool))
        found[key] = sites[key].method.found(sites[key], store)
    _, tensors = method_of(adapters).begin(sites, found)
    assert list(tensors) == ["a"]


@pytest.mark.parametrize(("method", "examples"), list(zip(FOUR, [256, 256, 64, 64])))
def test_how_many_examples_are_asked_for(method, examples):
    kind = methods.find(method)
    assert kind().probes() == (examples, 0)
    assert kind(samples=3).probes() == (3, 0)


@pytest.mark.parametrize(
    ("method", "option", "value", "hint"),
    [
        *((method, "samples", 0, "it is a whole number from 1 up") for method in FOUR),
        ("eva", "rho", 0.5, "it is a number from 1 up"),
        ("eva", "tau", 1.5, "it is a number from 0 to 1"),
        ("eva", "niter", 1.5, "it is a whole number from 0 up"),
        ("corda", "mode", "top", "it can be ipm, kpm"),
        ("loraga", "direction", "ab", "it can be ArB2r, A2rBr, ArBr, random"),
        ("loraga", "scale_by", "big", "it can be stable, unit, gd, weight_svd"),
        ("loraga", "gamma", 0, "it is a number from 1e-09 up"),
        ("loraone", "gamma", -1, "it is a number from 1e-09 up"),
        ("loraone", "damping", -1.0, "it is a number from 0 up"),
        ("loraone", "niter", True, "it is a whole number from 0 up"),
    ],
)
def test_settings_out_of_range_are_named(method, option, value, hint):
    with pytest.raises(UserError, match=rf"method\.{option} is {value!r}") as caught:
        methods.find(method)(**{option: value})
    assert caught.value.hint == hint
