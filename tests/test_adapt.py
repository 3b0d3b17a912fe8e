"""Adapters on a model: where they go, what they leave, what is trained whole, and states after errors."""

from __future__ import annotations

import copy
import itertools

import pytest
import tiny
import torch
from torch import nn

from loraloom.adapt import Adapters, attach
from loraloom.adapter import AdapterSpec
from loraloom.adapter_io import load_adapter, save_adapter
from loraloom.errors import UserError
from loraloom.targets import is_tied

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def logits(model):
    return model(tiny.ids()).logits


def bare(model):
    """Whether nothing of ours is left on a model."""
    return not any(
        "forward" in module.__dict__ or module._forward_pre_hooks or module._forward_hooks
        for module in model.modules()
    )


def stirred(kind, **settings):
    model = tiny.build(kind).double()
    adapters = attach(model, **{"r": 3, "target_modules": ["q", "v"]} | settings)
    for _, tensor in adapters.named_parameters():
        tensor.data = tensor.data.double()
    tiny.stir(adapters)
    return model, adapters


# ---- any module ---------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """No configuration, no embeddings, keyword arguments, two outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, *, scale=1.0):
        h = self.first(x)
        return scale * self.second(h), h


def test_a_plain_module_takes_adapters():
    model = Plain().double()
    adapters = attach(model, r=2, target_modules="all-linear")
    assert set(adapters.banks) == {"first", "second"}
    for parameter in adapters.parameters():
        parameter.data = parameter.data.double()
    tiny.stir(adapters)
    x = torch.randn(5, 4, dtype=torch.float64)
    y, h = model(x, scale=2.0)
    truth = Plain().double()
    truth.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, site in adapters.adapters["default"].sites.items():
            truth.get_submodule(name).weight += site.method.delta(site.layer, site.p)
    torch.testing.assert_close((y, h), truth(x, scale=2.0), **CLOSE)


def test_the_root_itself_may_be_the_layer():
    """A single layer has no name to target: said so, and no trace left."""
    layer = nn.Linear(4, 4)
    with pytest.raises(UserError, match="matches no layer"):
        attach(layer, r=2, target_modules=["linear"])
    assert bare(layer)


def test_a_transformer_of_torch_is_kept_off_its_shortcut():
    """In evaluation it would read the weights of its parts and never call them."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    x = torch.randn(2, 5, 8)
    before = encoder(x)
    adapters = attach(encoder, r=2)
    torch.testing.assert_close(encoder(x), before)
    tiny.stir(adapters, size=1.0)
    with torch.no_grad():
        live = encoder(x)
        assert not torch.allclose(live, before, atol=0.05)
        adapters.merge()
        torch.testing.assert_close(encoder(x), live, rtol=1e-4, atol=1e-4)
    adapters.detach()
    assert bare(encoder)
    assert torch.equal(encoder(x), before)


# ---- coming and going ---------------------------------------------------------------------------------------


def test_attaching_twice_is_refused_whatever_state_the_first_is_in():
    model, adapters = stirred("llama")
    for change in (lambda: None, adapters.merge, adapters.unmerge):
        change()
        with pytest.raises(UserError) as caught:
            attach(model)
        assert caught.value.message == "this model carries adapters already"
        assert caught.value.hint == "add to the object that attach() returned, or detach() it"
    adapters.unmerge()
    with pytest.raises(UserError, match="carries adapters already"):
        Adapters(model.model.layers[0])
    adapters.detach()
    attach(model)


def test_names():
    _, adapters = stirred("llama")
    with pytest.raises(UserError, match="there is an adapter named 'default' already"):
        adapters.add("default", AdapterSpec())
    with pytest.raises(UserError, match="an adapter needs a name"):
        adapters.add("", AdapterSpec())
    adapters.add("second", AdapterSpec(r=2))
    assert (adapters.names, adapters.active) == (["default", "second"], ("second",))
    with pytest.raises(UserError) as caught:
        adapters.use("secnd")
    assert (caught.value.message, caught.value.hint) == (
        "there is no adapter named 'secnd'",
        "did you mean second?",
    )
    assert adapters.active == ("second",)


def test_removing_gives_modules_their_own_forward_back():
    model, adapters = stirred("llama")
    truth = logits(model)
    adapters.add("wide", AdapterSpec(r=2, target_modules="all-linear", bias="all"))
    widened = logits(model)
    adapters.use()
    assert torch.equal(logits(model), widened)  # a new adapter changes nothing
    adapters.use("default")
    adapters.remove("wide")
    assert torch.equal(logits(model), truth)
    adapted = {name for name, module in model.named_modules() if "forward" in module.__dict__}
    assert adapted == set(adapters.banks) == set(adapters.adapters["default"].sites)
    with pytest.raises(UserError, match="there is no adapter named 'wide'"):
        adapters.remove("wide")
    adapters.remove("default")
    assert adapters.active == ()
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_detached_adapters_are_no_use_any_more():
    _, adapters = stirred("llama")
    adapters.detach()
    with pytest.raises(UserError, match="were detached"):
        adapters.add("again", AdapterSpec())


def test_a_forward_that_stood_on_the_instance_stays_below_ours_and_comes_back():
    model = Plain()
    own = model.first.forward
    model.first.forward = lambda x: own(x) + 1  # as tools that move weights between devices do
    theirs = model.first.__dict__["forward"]
    x = torch.randn(3, 4)
    before = model(x)[0]
    adapters = attach(model, r=2, target_modules=["first"])
    assert torch.equal(model(x)[0], before)
    adapters.merge()
    assert model.first.__dict__["forward"] is theirs
    adapters.detach()
    assert model.first.__dict__["forward"] is theirs


def test_flags_of_requires_grad_come_back_one_by_one():
    model = tiny.build("gpt2")
    chosen = itertools.cycle([True, False, False])
    for parameter in model.parameters():
        parameter.requires_grad_(next(chosen))
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapters = attach(model, bias="all", modules_to_save=["ln_f"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    adapters.merge()
    adapters.detach()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_the_state_dict_is_the_bases_whatever_hangs_on_it():
    model = tiny.build("gpt2")
    bits = tiny.digest(model)
    adapters = attach(model, bias="all", modules_to_save=["ln_f"])
    tiny.stir(adapters)
    logits(model).sum().backward()
    assert tiny.digest(model) == bits
    model.load_state_dict(model.state_dict())
    assert not any(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_modules": ["q_proj", "nothing"]},
        {"modules_to_save": ["nothing"]},
        {"bias": "sometimes"},
        {"layers": "9"},
        {"rank_pattern": {"nothing": 3}},
        {"r": -1},
        {"method": "nothing"},
        {"options": {"nothing": 1}},
    ],
)
def test_a_failed_addition_leaves_everything_as_it_was(wrong):
    model, adapters = stirred("llama")
    truth, banks = logits(model), set(adapters.banks)
    with pytest.raises(UserError):
        adapters.add("second", AdapterSpec(**{"r": 2, "target_modules": "all-linear"} | wrong))
    assert (adapters.names, adapters.active, set(adapters.banks)) == (["default"], ("default",), banks)
    assert not adapters.overlays
    assert set(adapters.flow.seeds) == {"default"}
    assert torch.equal(logits(model), truth)


def test_an_addition_that_fails_half_way_is_taken_back(monkeypatch):
    model, adapters = stirred("llama")
    truth, banks = logits(model), set(adapters.banks)
    monkeypatch.setattr("loraloom.making.init_sites", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapters.add("second", AdapterSpec(target_modules="all-linear", bias="all", modules_to_save=["norm"]))
    assert (adapters.names, set(adapters.banks), adapters.overlays) == (["default"], banks, {})
    assert torch.equal(logits(model), truth)


def test_a_copy_of_an_adapted_model_is_independent_and_whole():
    """`copy.deepcopy(adapters)` carries its own model; a copied model carries its own adapters."""
    model, adapters = stirred("gpt2", bias="lora_only")
    truth = logits(model)
    twin = copy.deepcopy(adapters)
    assert twin.model is not model
    assert torch.equal(logits(twin.model), truth)
    tiny.stir(twin, seed=1)
    assert not torch.equal(logits(twin.model), truth)
    assert torch.equal(logits(model), truth)
    adapters.detach()
    assert not bare(twin.model)
    twin.merge()
    twin.detach()
    assert bare(twin.model)
    assert tiny.digest(twin.model) == tiny.digest(model)

    model, adapters = stirred("gpt2")
    copied = copy.deepcopy(model)
    adapters.detach()
    assert not torch.equal(logits(copied), logits(model))
    with pytest.raises(UserError, match="carries adapters already"):
        attach(copied)


def test_moving_the_model_keeps_the_adapters_in_step():
    """A base cast after attaching: the adapter stays float32 and follows the output's format."""
    model = tiny.build("llama")
    adapters = attach(model, r=2, bias="all", modules_to_save=["lm_head"])
    tiny.stir(adapters)
    model.bfloat16()
    assert logits(model).dtype == torch.bfloat16
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}


# ---- tied embeddings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"target_modules": ["head"]}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_an_adapter_on_a_tied_head_changes_only_the_head(kind, settings):
    model = tiny.build(kind).double()
    assert is_tied(model)
    adapters = attach(model, r=3, **{"target_modules": ["mlp"]} | settings)
    for parameter in adapters.parameters():
        parameter.data = parameter.data.double()
    head = model.get_output_embeddings()
    tiny.stir(adapters)
    if "modules_to_save" in settings:
        delta = next(iter(adapters.overlaid("default")))[1] - head.weight
        for site in adapters.adapters["default"].sites.values():
            site.p["B"].data.zero_()
    else:
        [site] = adapters.adapters["default"].sites.values()
        delta = site.method.delta(site.layer, site.p)
    hidden = model(tiny.ids(), output_hidden_states=True).hidden_states
    with adapters.disabled():
        base, base_hidden = (
            logits(model),
            model(tiny.ids(), output_hidden_states=True).hidden_states,
        )
    assert all(torch.equal(one, other) for one, other in zip(hidden, base_hidden))
    torch.testing.assert_close(logits(model), base + hidden[-1] @ delta.T, **CLOSE)
    truth = logits(model)
    adapters.merge()
    assert not is_tied(model)
    torch.testing.assert_close(logits(model), truth, **CLOSE)
    adapters.unmerge()
    assert is_tied(model)


def test_both_ends_of_a_tied_model_adapted_apart():
    model = tiny.build("llama-tied").double()
    adapters = attach(model, r=3, target_modules=["embed", "head"])
    for parameter in adapters.parameters():
        parameter.data = parameter.data.double()
    tiny.stir(adapters)
    truth = logits(model)
    adapters.merge()
    torch.testing.assert_close(logits(model), truth, **CLOSE)
    adapters.unmerge()
    assert torch.equal(logits(model), truth)
    assert is_tied(model)


# ---- what is trained whole ----------------------------------------------------------------------------------

WHOLE = {
    "biases": ("gpt2", {"bias": "all"}),
    "biases-of-layers": ("gpt2", {"bias": "lora_only"}),
    "head": ("llama", {"modules_to_save": ["lm_head"]}),
    "table": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "norms": ("llama", {"modules_to_save": ["norm", "input_layernorm"]}),
    "block": ("llama", {"modules_to_save": ["layers.1"], "layers": "0"}),
    "classifier": ("roberta-cls", {"modules_to_save": ["classifier"], "bias": "all"}),
    "tied-biases": ("bert", {"bias": "all"}),
}


@pytest.mark.parametrize(("kind", "settings"), WHOLE.values(), ids=WHOLE)
def test_own_parameters_work_as_if_they_were_the_models(kind, settings):
    model, adapters = stirred(kind, **settings)
    own, bits = dict(adapters.overlaid("default")), tiny.digest(model)
    assert own
    truth = copy.deepcopy(adapters)
    truth.merge()
    for name, tensor in own.items():
        assert torch.equal(truth.model.get_parameter(name), tensor)
    torch.testing.assert_close(logits(model), logits(truth.model), **CLOSE)
    logits(model).square().sum().backward()
    assert all(tensor.grad is not None for name, tensor in own.items() if used(name))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert tiny.digest(model) == bits
    with adapters.disabled():
        base = tiny.build(kind).double()
        assert torch.equal(logits(model), logits(base))
    assert {id(p) for group in adapters.groups(1e-3) for p in group["params"]} == {
        id(p) for p in adapters.parameters()
    }
    adapters.detach()
    assert tiny.digest(model) == bits
    assert bare(model)


def used(name):
    """Not the bias of a key, which no softmax can see in exact arithmetic, nor a copy nobody reads."""
    return "pooler" not in name


def test_gradients_of_own_parameters_are_those_of_the_models_own():
    model, adapters = stirred("roberta-cls", modules_to_save=["classifier"], bias="all")
    merged = copy.deepcopy(adapters)
    merged.merge()
    merged.model.requires_grad_(True)
    logits(model).square().sum().backward()
    logits(merged.model).square().sum().backward()
    for name, tensor in adapters.overlaid("default"):
        torch.testing.assert_close(tensor.grad, merged.model.get_parameter(name).grad, **CLOSE, msg=name)


def test_hooks_run_once_and_the_modules_mode_counts():
    """A module trained whole keeps its hooks and its own dropout."""
    model = tiny.build("roberta-cls")
    model.classifier.dropout.p = 0.5
    calls = []
    adapters = attach(model, target_modules=["q"], modules_to_save=["classifier"])
    model.classifier.register_forward_hook(lambda *_: calls.append("hook"))
    model.classifier.dense.register_forward_hook(lambda *_: calls.append("dense"))
    one, other = logits(model), logits(model)
    assert calls == ["dense", "hook"] * 2
    assert torch.equal(one, other)
    model.train()
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), one)
    adapters.detach()


def test_rows_and_sums_with_own_parameters_are_refused():
    model, adapters = stirred("llama", modules_to_save=["lm_head"])
    adapters.add("plain", AdapterSpec(r=2, target_modules=["q"]))
    with adapters.routed(["default", "plain", None]), pytest.raises(UserError) as caught:
        logits(model)
    assert (
        caught.value.message
        == "lm_head is trained whole by default: rows cannot be mixed with other adapters'"
    )
    for together in (adapters.use, adapters.merge):
        with pytest.raises(UserError) as caught:
            together("plain", "default")
        assert caught.value.message == (
            "default has biases or modules of its own, so it cannot be summed with others"
        )
    assert (adapters.active, adapters.merged) == (("plain",), ())
    with adapters.routed(["default"] * 3):
        routed = logits(model)
    adapters.use("default")
    assert torch.equal(logits(model), routed)


def test_one_adapters_layer_may_be_anothers_whole_module():
    model, adapters = stirred("llama", modules_to_save=["lm_head"])
    alone = logits(model)
    adapters.add("low", AdapterSpec(r=2, target_modules=["lm_head"]))
    tiny.stir(adapters, "low")
    low = logits(model)
    adapters.use("default")
    assert torch.equal(logits(model), alone)
    for name, truth in (("low", low), ("default", alone), ("low", low)):
        adapters.merge(name)
        torch.testing.assert_close(logits(model), truth, rtol=1e-6, atol=1e-6)  # its tensors are float32
    adapters.unmerge()
    adapters.remove("default")
    adapters.use("low")
    # Nothing stands between any more, so the layer is one node, which adds in another order.
    torch.testing.assert_close(logits(model), low, rtol=1e-12, atol=1e-12)
    fresh = tiny.build("llama").double()
    others = Adapters(fresh)
    others.add("low", AdapterSpec(r=2, target_modules=["lm_head"]))
    tiny.stir(others)
    assert torch.equal(logits(model), logits(fresh))


def test_a_module_trained_whole_is_no_target():
    _, adapters = stirred("llama", target_modules="all-linear", modules_to_save=["down_proj"])
    assert not any("down_proj" in key for key in adapters.adapters["default"].sites)
    with pytest.raises(UserError, match="is in modules_to_save: it is trained whole"):
        stirred("llama", target_modules=["lm_head"], modules_to_save="lm_head")


# ---- a gain on the whole output, with a trained bias --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("targets", [["c_attn"], ["q", "v"]])
def test_dora_scales_the_output_without_its_own_bias(dtype, targets):
    model = tiny.build("gpt2").to(dtype)
    adapters = attach(model, "dora", r=3, target_modules=targets, bias="lora_only")
    for parameter in adapters.parameters():
        parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
    assert torch.allclose(logits(model), logits(tiny.build("gpt2").to(dtype)), rtol=0.02, atol=0.02)
    tiny.stir(adapters, size=0.3)
    live = logits(model)
    assert live.dtype == dtype
    adapters.merge()
    tight = dtype == torch.float64
    torch.testing.assert_close(logits(model), live, **(CLOSE if tight else {"rtol": 0.1, "atol": 0.15}))


def test_two_gains_are_not_summed():
    _, adapters = stirred("gpt2", method="dora")
    adapters.add("plain", AdapterSpec(r=2, target_modules=["q"]))
    with pytest.raises(UserError, match="default scales the whole output of a layer"):
        adapters.use("plain", "default")
    assert adapters.active == ("plain",)


# ---- optimizer groups and names -----------------------------------------------------------------------------


def test_names_of_what_trains_are_stable():
    _, adapters = stirred("gpt2", layers="0", modules_to_save=["ln_f"])
    names = [name for name, _ in adapters.named_parameters()]
    assert names == [
        "default|transformer.h.0.attn.c_attn:q/A",
        "default|transformer.h.0.attn.c_attn:q/B",
        "default|transformer.h.0.attn.c_attn:v/A",
        "default|transformer.h.0.attn.c_attn:v/B",
        "default|transformer.ln_f.weight",
        "default|transformer.ln_f.bias",
    ]


def test_only_what_is_in_use_is_optimised():
    _, adapters = stirred("llama")
    adapters.add("second", AdapterSpec(r=2, target_modules=["q"]))
    inside = [p for group in adapters.groups(1.0) for p in group["params"]]
    assert {id(p) for p in inside} == {id(p) for p in adapters.parameters("second")}
    adapters.use("default", "second")
    assert sum(len(group["params"]) for group in adapters.groups(1.0)) == len(adapters.parameters())


def test_a_trained_table_of_a_tied_model_is_saved_and_read(tmp_path):
    model, adapters = stirred("llama-tied", modules_to_save=["embed_tokens", "lm_head"])
    save_adapter(adapters, tmp_path)
    again = tiny.build("llama-tied").double()
    load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
