"""An adapter's folder in its three forms: every method, written by us and read by PEFT and by ourselves.

Forward passes are compared in float32 to 1e-5, as in test_peft.py: both sum the same products, in another order.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraloom import methods
from loraloom.adapt import Adapters, attach
from loraloom.adapter_files import FILES, OWN, about_base, is_adapter_folder, is_peft_folder, read_record
from loraloom.adapter_io import folder_tensors, load_adapter, save_adapter
from loraloom.dressing import dress_prompts
from loraloom.errors import NonFinite, UserError
from loraloom.model_files import read_config
from loraloom.quant import dense, quantized
from loraloom.use import find_target

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WEIGHTS, OWN_WEIGHTS = "adapter_model.safetensors", "loraloom.safetensors"
INVOCATION = [20, 21]


class Net(nn.Module):
    """A convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 6)
        self.conv = nn.Conv2d(1, 4, 3, padding=1, stride=2)
        self.lin = nn.Linear(48, 5)

    def forward(self, ids):
        return self.lin(torch.relu(self.conv(self.table(ids)[:, None])).flatten(1))


PLACES = {  # the model, and the layers: linear, Conv1D, roles of one projection, a table, a convolution
    "linear": ("llama", ["q_proj", "down_proj"]),
    "conv1d": ("gpt2", ["c_attn", "c_fc"]),
    "roles": ("gpt2", ["q", "v"]),
    "table": ("llama", ["embed_tokens", "q_proj"]),
    "conv": ("net", ["conv", "lin"]),
}
P, L, O = "peft", "lora", "own"
FORMS = {  # by method, in the order of PLACES; None where the method cannot be there
    "adalora": (P, P, L, L, P),
    "adapterh": (O, O, O, O, O),
    "adapterl": (O, O, None, None, None),
    "alora": (P, P, P, O, None),
    "bitfit": (None, O, None, None, O),
    "corda": (L, L, L, None, L),
    "deltalora": (L, L, L, L, L),
    "dora": (P, P, O, P, P),
    "eva": (P, P, P, None, P),
    "full": (O, O, None, None, O),
    "hira": (P, P, O, P, P),
    "loftq": (P, P, P, None, None),
    "lora": (P, P, P, P, P),
    "lora_prefix": (O, O, None, None, None),
    "loradrop": (P, P, P, P, P),
    "lorafa": (P, P, P, None, P),
    "loraga": (L, L, L, None, L),
    "loraone": (P, P, P, None, P),
    "loraplus": (P, P, P, P, P),
    "lorapro": (P, P, P, P, P),
    "loraxs": (L, L, L, L, L),
    "milora": (L, L, L, L, L),
    "olora": (L, L, L, L, L),
    "pissa": (L, L, L, L, L),
    "prefix_embedding": (P, P, None, None, None),
    "prefix_layer": (O, O, None, None, None),
    "randlora": (P, P, O, O, O),
    "rslora": (P, P, P, P, P),
    "vera": (P, P, L, L, L),
}
OPTIONS = {
    "alora": {"invocation": INVOCATION},
    "loradrop": {"kept": ["model.layers.1.self_attn.q_proj", "transformer.h.0.attn.c_attn:q"]},
}
WHERE = [
    (method, place, form)
    for method, forms in FORMS.items()
    for place, form in zip(PLACES, forms)
    if form is not None
]
here = pytest.mark.parametrize(("method", "place", "form"), WHERE, ids=[f"{m}-{p}-{f}" for m, p, f in WHERE])


def model_at(place: str, method: str = "lora", *, dense_base: bool = False) -> nn.Module:
    """The model of a place; loftq's linear layers are in 4 bits, or `dense_base` what these stand for."""
    kind = PLACES[place][0]
    torch.manual_seed(0)
    model = Net() if kind == "net" else tiny.build(kind)
    for module in model.modules() if method == "loftq" else ():
        if isinstance(module, nn.Linear | Conv1D):
            module.weight = quantized(module.weight, flipped=isinstance(module, Conv1D))
            if dense_base:
                module.weight = nn.Parameter(dense(module.weight), requires_grad=False)
    return model


def trained(place: str, method: str, **settings) -> tuple[nn.Module, Adapters]:
    """A model with an adapter that has left its start."""
    model = model_at(place, method)
    where = {} if methods.find(method).own_places else {"target_modules": PLACES[place][1]}
    adapters = attach(model, method, **{"r": 2, "alpha": 3.0} | where | OPTIONS.get(method, {}) | settings)
    tiny.stir(adapters)
    return model, adapters


def output(model: nn.Module) -> torch.Tensor:
    """What the model makes of some ids, dressed as the adapter in use wants them."""
    ids = tiny.ids(rows=3, length=8)
    ids[0, 2:4] = torch.tensor(INVOCATION)
    if not isinstance(model, PeftModel):
        ids = torch.tensor(dress_prompts(model, ids.tolist()))
    found = model(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


def in_peft(model: nn.Module, folder: Path) -> PeftModel:
    """Our folder, loaded by PEFT: any warning, as of a missing key, is an error."""
    with warnings.catch_warnings():
        # of RandLoRA's bases, which it would have once more for each layer, and of AdaLoRA's own rank_pattern
        warnings.filterwarnings("ignore", r"Found missing adapter keys.*\.randlora_[AB]\.default'\]\.$")
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match")
        return PeftModel.from_pretrained(model, str(folder)).eval()


# ---- every method -------------------------------------------------------------------------------------------


def test_the_table_has_every_method():
    assert set(FORMS) == set(methods.names())


@here
def test_our_folder_in_peft_and_here_again(method, place, form, tmp_path):
    model, adapters = trained(place, method)
    truth, plain = output(model), output(model_at(place, method))
    assert truth.shape != plain.shape or not torch.allclose(truth, plain, atol=1e-3)
    save_adapter(adapters, tmp_path / "one", base_model="tiny")
    assert read_record(tmp_path / "one").form == form
    assert {path.name for path in (tmp_path / "one").iterdir()} == {OWN, *FILES[form]}
    again = model_at(place, method)
    back = load_adapter(again, tmp_path / "one")
    assert torch.equal(output(again), truth)
    assert list(back.adapters["default"].sites) == list(adapters.adapters["default"].sites)
    save_adapter(back, tmp_path / "two", base_model="tiny")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
    if form == "own":
        with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
            in_peft(model_at(place, method), tmp_path / "one")
        return
    base = model_at(place, method, dense_base=True)
    torch.testing.assert_close(output(in_peft(base, tmp_path / "one")), truth, **CLOSE)
    (tmp_path / "one" / OWN).unlink()  # and without our own files, as PEFT reads it
    if form == "lora":
        (tmp_path / "one" / OWN_WEIGHTS).unlink()
    as_peft = model_at(place, method)
    read = load_adapter(as_peft, tmp_path / "one")
    torch.testing.assert_close(output(as_peft), truth, **CLOSE)
    if form == "lora":
        assert read.adapters["default"].spec.method == "lora"


@here
def test_what_only_training_needs_is_not_written(method, place, form):
    _, adapters = trained(place, method)
    written = folder_tensors(adapters)
    sites = adapters.adapters["default"].sites
    for key, site in sites.items():
        for name in site.method.working & set(site.p):
            assert f"{key}/{name}" not in written.get(OWN_WEIGHTS, {})
    if form == "peft":
        names = {key.rpartition(".")[2] for key in written[WEIGHTS]} - {"weight"}
        own = adapters.adapters["default"].method
        allowed = {*own.peft_keys.values(), *own.peft_shared.values()}
        assert names <= allowed | {"lora_embedding_A", "lora_embedding_B"} | {
            "hira_embedding_A",
            "hira_embedding_B",
        }


# ---- form peft ----------------------------------------------------------------------------------------------


def test_shared_bases_stand_once_in_peft_s_file(tmp_path):
    _, adapters = trained("linear", "vera")
    save_adapter(adapters, tmp_path)
    keys = load_file(tmp_path / WEIGHTS).keys()
    assert {"base_model.vera_A", "base_model.vera_B"} <= keys
    assert sum(key.endswith(("vera_A", "vera_B")) for key in keys) == 2


def test_layers_that_share_a_pair_are_written_apart_and_share_it_again(tmp_path):
    """LoRA-drop: all layers that were not kept have one."""
    _, adapters = trained("linear", "loradrop")
    first, second = (f"model.layers.{i}.mlp.down_proj" for i in (0, 1))
    sites = adapters.adapters["default"].sites
    assert sites[first].p["A"] is sites[second].p["A"]
    save_adapter(adapters, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    keys = [f"base_model.model.{name}.lora_A.weight" for name in (first, second)]
    assert torch.equal(tensors[keys[0]], tensors[keys[1]])
    back = load_adapter(model_at("linear"), tmp_path).adapters["default"].sites
    assert back[first].p["A"] is back[second].p["A"]
    assert isinstance(back[first].p["A"], nn.Parameter)
    tensors[keys[1]] += 1
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=f"{first}/A and {second}/A are one tensor here, and differ there"):
        load_adapter(model_at("linear"), tmp_path)


def test_what_a_budget_dropped_is_not_in_peft_s_file(tmp_path):
    """AdaLoRA: two triplets of one layer, and all of another."""
    model, adapters = trained("linear", "adalora", r=3)
    first, second, *_ = sites = adapters.adapters["default"].sites
    with torch.no_grad():
        sites[first].p["E"][[0, 2]] = 0
        sites[second].p["E"].zero_()
    save_adapter(adapters, tmp_path / "one")
    tensors = load_file(tmp_path / "one" / WEIGHTS)
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    for name, marks in ((first, [False, True, False]), (second, [False] * 3)):
        assert config["rank_pattern"][f"{name}.lora_E"] == marks
        assert len(tensors[f"base_model.model.{name}.lora_A"]) == sum(marks)
        assert tensors[f"base_model.model.{name}.lora_E"].shape == (sum(marks), 1)
    torch.testing.assert_close(output(in_peft(model_at("linear"), tmp_path / "one")), output(model), **CLOSE)
    again = model_at("linear")
    back = load_adapter(again, tmp_path / "one")
    assert torch.equal(output(again), output(model))
    save_adapter(back, tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("method", "settings", "form"),
    [
        ("hira", {"rank_pattern": {"q_proj": 1}}, "own"),  # PEFT has one rank there
        ("hira", {"target_modules": ["lm_head"], "bias": "all"}, "own"),  # and trains no biases
        ("adalora", {"rank_pattern": {"q_proj": 1}}, "lora"),
        ("adalora", {"alpha_pattern": {"q_proj": 1.0}}, "lora"),
        ("randlora", {"alpha_pattern": {"q_proj": 1.0}}, "own"),
        ("dora", {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 1.0}}, "peft"),
    ],
)
def test_what_a_type_of_peft_cannot_say_has_another_form(method, settings, form, tmp_path):
    model, adapters = trained("linear", method, **settings)
    save_adapter(adapters, tmp_path)
    assert read_record(tmp_path).form == form
    again = model_at("linear")
    load_adapter(again, tmp_path)
    assert torch.equal(output(again), output(model))
    if form != "own":
        torch.testing.assert_close(output(in_peft(model_at("linear"), tmp_path)), output(model), **CLOSE)


# ---- form lora ----------------------------------------------------------------------------------------------

UNLIKE = {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"down_proj": 7.0}}


@pytest.mark.parametrize("method", ["pissa", "loraxs", "deltalora"])
def test_whoever_reads_one_scale_and_one_rank_computes_the_same(method, tmp_path):
    """As vLLM: alpha and r of the settings, patterns unread."""
    model, adapters = trained("linear", method, **UNLIKE)
    save_adapter(adapters, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / WEIGHTS)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    plain = model_at("linear")
    with torch.no_grad():
        for key in {name.rpartition(".lora_")[0] for name in tensors}:
            a, b = (tensors[f"{key}.lora_{x}.weight"] for x in "AB")
            assert len(a) == b.shape[1] == config["r"]
            module = plain.get_submodule(key.removeprefix("base_model.model."))
            module.weight += config["lora_alpha"] / config["r"] * b @ a
    torch.testing.assert_close(output(plain), output(model), **CLOSE)
    torch.testing.assert_close(output(in_peft(model_at("linear"), tmp_path)), output(model), **CLOSE)


def test_a_plain_lora_that_another_tool_changed_is_not_ours_any_more(tmp_path):
    model, adapters = trained("linear", "pissa", bias="all", modules_to_save=["lm_head"])
    save_adapter(adapters, tmp_path, base_model="org/base")
    again = model_at("linear")
    load_adapter(again, tmp_path)
    assert torch.equal(output(again), output(model))
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.lm_head.weight"] += 1
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_adapter(model_at("linear"), tmp_path)
    assert caught.value.message == f"{tmp_path}: {WEIGHTS} is not the one that {OWN} was written with"
    assert caught.value.hint == f"delete {OWN} to read the folder as PEFT does"
    (tmp_path / OWN).unlink()
    changed = model_at("linear")
    load_adapter(changed, tmp_path)
    assert not torch.allclose(output(changed), output(model))


@pytest.mark.parametrize(("method", "key"), [("pissa", "lora_alpha"), ("vera", "d_initial"), ("alora", "r")])
def test_settings_that_another_tool_changed_are_refused(method, key, tmp_path):
    _, adapters = trained("linear", method)
    save_adapter(adapters, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {key: 99}))
    with pytest.raises(UserError, match="do not agree") as caught:
        load_adapter(model_at("linear"), tmp_path)
    assert caught.value.details == [f"{key}: 99 in adapter_config.json, {config[key]} by {OWN}"]


def test_frozen_bases_of_roles_stand_once_beside_the_plain_lora(tmp_path):
    _, adapters = trained("roles", "vera")
    save_adapter(adapters, tmp_path)
    keys = load_file(tmp_path / OWN_WEIGHTS).keys()
    assert [key for key in keys if key.endswith("/A")] == ["transformer.h.0.attn.c_attn:q/A"]
    assert sum(key.endswith("/lambda_b") for key in keys) == 4


# ---- form own -----------------------------------------------------------------------------------------------


def test_a_model_trained_whole_is_written_under_its_own_names_and_what_is_tied_once(tmp_path):
    model, adapters = trained("conv1d", "full")
    save_adapter(adapters, tmp_path, base_model="org/base")
    tensors = load_file(tmp_path / OWN_WEIGHTS)
    assert set(tensors) == {name for name, _ in model.named_parameters()}  # without lm_head, which is tied
    own = dict(adapters.overlaid("default"))
    assert all(torch.equal(tensor, own[name]) for name, tensor in tensors.items())
    again = model_at("conv1d")
    bits = tiny.digest(again)
    load_adapter(again, tmp_path).merge()
    torch.testing.assert_close(output(again), output(model), **CLOSE)
    assert tiny.digest(again) != bits


def test_missing_surplus_and_misshapen_tensors_of_our_own_file(tmp_path):
    _, adapters = trained("linear", "adapterh")
    save_adapter(adapters, tmp_path, base_model="org/base")
    tensors = load_file(tmp_path / OWN_WEIGHTS)
    lost, cut, *_ = sorted(tensors)
    del tensors[lost]
    tensors[cut] = torch.zeros(3, 5, 7)
    tensors["nowhere/A"] = torch.zeros(2)
    save_file(tensors, tmp_path / OWN_WEIGHTS)
    model = model_at("linear")
    with pytest.raises(UserError, match="does not fit LlamaForCausalLM") as caught:
        load_adapter(model, tmp_path)
    assert [detail.partition(":")[0] for detail in caught.value.details] == [cut, lost, "nowhere/A"]
    assert caught.value.hint == "it was trained on org/base"
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("method", ["lora", "pissa", "adapterh"])
def test_values_that_are_not_finite_are_neither_written_nor_read(method, tmp_path):
    _, adapters = trained("linear", method)
    save_adapter(adapters, tmp_path / "good")
    before = {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()}
    with torch.no_grad():
        adapters.parameters()[0].view(-1)[0] = float("nan")
    with pytest.raises(NonFinite, match="was not written"):
        save_adapter(adapters, tmp_path / "good")
    assert {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()} == before
    file = tmp_path / "good" / (WEIGHTS if method == "lora" else OWN_WEIGHTS)
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(float("inf"))
    save_file(tensors, file)
    with pytest.raises(NonFinite, match="holds values that are not finite"):
        load_adapter(model_at("linear"), tmp_path / "good")


@pytest.mark.parametrize("method", ["pissa", "adapterh"])
def test_our_own_file_missing_or_cut(method, tmp_path):
    _, adapters = trained("linear", method)
    save_adapter(adapters, tmp_path)
    path = tmp_path / OWN_WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=re.escape(f"{path} is not a whole safetensors file")):
        load_adapter(model_at("linear"), tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=re.escape(f"{tmp_path} holds no {OWN_WEIGHTS}")):
        load_adapter(model_at("linear"), tmp_path)


# ---- the folder ---------------------------------------------------------------------------------------------


def test_nothing_stays_of_an_adapter_of_another_form(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for method in ("lora", "pissa", "adapterh", "lora"):
        model, adapters = trained("linear", method)
        save_adapter(adapters, tmp_path)
        form = read_record(tmp_path).form
        assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", OWN, *FILES[form]}
        again = model_at("linear")
        load_adapter(again, tmp_path)
        assert torch.equal(output(again), output(model))


def test_a_folder_of_the_first_format_is_read(tmp_path):
    """Which had no form, and was always PEFT's."""
    model, adapters = trained("roles", "rslora")
    save_adapter(adapters, tmp_path)
    own = json.loads((tmp_path / OWN).read_text())
    first = {"format": 1, "spec": own["spec"], "targets": own["targets"], "trained_on": {"quantize": "nf4"}}
    (tmp_path / OWN).write_text(json.dumps(first))
    again = model_at("roles")
    load_adapter(again, tmp_path)
    assert torch.equal(output(again), output(model))
    assert read_record(tmp_path).trained_on == {"quantize": "nf4"}


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2, "form": "gguf", "spec": {}}', '{"format": 2}'])
def test_a_broken_record_of_an_adapter_that_only_we_can_read(text, tmp_path):
    _, adapters = trained("linear", "adapterh")
    save_adapter(adapters, tmp_path)
    (tmp_path / OWN).write_text(text)
    with pytest.raises(UserError, match=f"{OWN} is broken: ") as caught:
        load_adapter(model_at("linear"), tmp_path)
    assert caught.value.hint is None  # PEFT could not read it either


def test_an_adapter_is_known_by_either_file(tmp_path):
    assert not is_adapter_folder(tmp_path)
    for method, form in (("lora", "peft"), ("adapterh", "own")):
        _, adapters = trained("linear", method)
        folder = tmp_path / form
        kept = {"quantize": "nf4", "dtype": "bfloat16"}
        save_adapter(adapters, folder, base_model="org/base", trained_on=kept, revision="abc")
        assert is_adapter_folder(folder)
        assert is_peft_folder(folder) == (form == "peft")
        assert about_base(folder)["revision"] == "abc"
        found = find_target(folder)
        assert (found.base.id, found.base.quantize, found.dtype) == ("org/base", "nf4", "bfloat16")
        assert found.adapter == folder
        with pytest.raises(UserError, match="is an adapter, not a model") as caught:
            read_config(folder)
        assert "'org/base'" in caught.value.hint


def test_nothing_heavy_is_computed_for_what_a_file_holds(tmp_path, monkeypatch):
    model, adapters = trained("linear", "pissa")
    save_adapter(adapters, tmp_path)

    def svd(w, *args, **kwargs):
        if not w.is_meta:
            raise AssertionError("a weight was decomposed")
        return real(w, *args, **kwargs)

    real = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", svd)
    again = model_at("linear")
    load_adapter(again, tmp_path)
    assert torch.equal(output(again), output(model))
