"""PEFT's files, outputs and gradients against ours: the same tensors, written by one and read by the other.

Forward passes are compared in float32 to 1e-5: both sum the same products, in another order. `peft` is
imported only in tests.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import fields

import pytest
import tiny
import torch
from peft import (
    AdaLoraConfig,
    HiraConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import nn

from loraloom import methods
from loraloom.adapt import attach
from loraloom.adapter import AdapterSpec
from loraloom.adapter_io import load_adapter, save_adapter
from loraloom.errors import NonFinite, UserError
from loraloom.peft_config import INIT, in_layers
from loraloom.peft_tensors import PREFIX, file_suffix, placed
from loraloom.peft_types import TYPES

# of transformers to PEFT, about a name that PEFT still asks for
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


INVOCATION = [20, 21]  # aLoRA's; the last row of ids has none


def logits(model):
    ids = tiny.ids()
    ids[0, 2:4] = ids[1, 5:] = torch.tensor(INVOCATION)
    return model(ids).logits


def theirs(kind: str, *, seed: int = 0, config=LoraConfig, **settings) -> PeftModel:
    """PEFT's adapter on a tiny model, moved away from its start."""
    with warnings.catch_warnings():
        for start in (
            "The following rank_pattern keys",
            "fan_in_fan_out",
            "Specified to not",
            "Model has `tie",
        ):
            warnings.filterwarnings("ignore", start)
        model = get_peft_model(tiny.build(kind, seed=seed), config(**settings))
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=gen) * 0.1)
    return model.eval()


def ours(kind: str, **settings):
    model = tiny.build(kind)
    adapters = attach(model, **settings)
    tiny.stir(adapters)
    return model, adapters


def in_peft(kind: str, folder) -> PeftModel:
    """Our folder, loaded by PEFT: any warning, as of a missing key, is an error."""
    return PeftModel.from_pretrained(tiny.build(kind), str(folder)).eval()


def by_file_key(model: PeftModel) -> dict[str, torch.Tensor]:
    """PEFT's gradients by the key that the tensor has in a file."""
    return {
        name.replace(".default", "").replace(".modules_to_save", "").replace("_vector.weight", "_vector"): (
            parameter.grad
        )
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and parameter.grad is not None
    }


def our_gradients(adapters) -> dict[str, torch.Tensor]:
    adapter = adapters.adapters["default"]
    found = {}
    for key, site in adapter.sites.items():
        for name in placed(site):
            found[f"{PREFIX}{key}.{file_suffix(site, name)}"] = site.p[name].grad
    adapted = set(adapter.sites)
    for name, tensor in adapters.overlaid("default"):
        module, _, leaf = name.rpartition(".")
        found[f"{PREFIX}{module}.base_layer.{leaf}" if module in adapted else PREFIX + name] = tensor.grad
    return {key: grad for key, grad in found.items() if grad is not None}


# ---- theirs, read by us -------------------------------------------------------------------------------------

LLAMA = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}
GPT2 = {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
BERT = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"]}
PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 3, "nothing": 5},
    "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 9},
}
SPECIAL = {
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2, "c_fc": 2}},
    "alora": {"alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}
ADALORA = {"init_r": 3, "lora_alpha": 6, "total_step": 9, "target_modules": LLAMA["target_modules"]}
CASES = {
    "llama": ("llama", LLAMA),
    "llama-rslora": ("llama", LLAMA | {"use_rslora": True}),
    "llama-patterns": ("llama", LLAMA | PATTERNS),
    "llama-rslora-patterns": ("llama", LLAMA | PATTERNS | {"use_rslora": True}),
    "llama-head-and-table": ("llama", LLAMA | {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "llama-saved-head": ("llama", LLAMA | {"modules_to_save": ["lm_head"]}),
    "llama-all-linear": ("llama", LLAMA | {"target_modules": "all-linear"}),
    "llama-expression": ("llama", LLAMA | {"target_modules": r".*\.(q|o)_proj"}),
    "llama-layers": ("llama", LLAMA | {"layers_to_transform": [1]}),
    "llama-layers-pattern": ("llama", LLAMA | {"layers_to_transform": 0, "layers_pattern": "layers"}),
    "llama-excluded": ("llama", LLAMA | {"exclude_modules": ["v_proj"]}),
    "llama-excluded-by-expression": ("llama", LLAMA | {"exclude_modules": r".*layers\.0\..*"}),
    "llama-full-names": ("llama", LLAMA | {"target_modules": ["model.layers.1.self_attn.q_proj"]}),
    "gpt2": ("gpt2", GPT2),
    "gpt2-rslora": ("gpt2", GPT2 | {"use_rslora": True}),
    "gpt2-bias-all": ("gpt2", GPT2 | {"bias": "all"}),
    "gpt2-bias-lora-only": ("gpt2", GPT2 | {"bias": "lora_only"}),
    "gpt2-table": ("gpt2", GPT2 | {"target_modules": ["c_attn", "wpe"]}),
    "bert": ("bert", BERT),
    "bert-bias-all": ("bert", BERT | {"bias": "all"}),
    "bert-bias-lora-only": ("bert", BERT | {"bias": "lora_only"}),
    "bert-classifier": ("bert-cls", BERT | {"task_type": "SEQ_CLS"}),
    "bert-classifier-all-linear": (
        "bert-cls",
        BERT | {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    ),
    "roberta-classifier": ("roberta-cls", BERT | {"task_type": "SEQ_CLS", "bias": "lora_only"}),
    "roberta-classifier-bias-all": ("roberta-cls", BERT | {"task_type": "SEQ_CLS", "bias": "all"}),
    "roberta-saved": ("roberta-cls", BERT | {"modules_to_save": ["classifier"]}),
    "neox": ("neox", {"r": 4, "target_modules": ["query_key_value"]}),
    **{
        f"{kind}-{name}": (kind, base | settings)
        for kind, base in (("llama", LLAMA), ("gpt2", GPT2))
        for name, settings in SPECIAL.items()
        if (kind, name) != ("gpt2", "olora")  # PEFT's own forward pass fails there
    },
    "llama-dora-table": ("llama", LLAMA | {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}),
    "llama-hira-table": (
        "llama",
        {"config": HiraConfig, "r": 4, "target_modules": ["q_proj", "embed_tokens"]},
    ),
    **{
        f"{kind}-{name}": (kind, {"config": config, "r": 4, "target_modules": base["target_modules"]} | more)
        for kind, base in (("llama", LLAMA), ("gpt2", GPT2))
        for name, config, more in (
            ("vera", VeraConfig, {"bias": "vera_only"}),
            ("vera-redrawn", VeraConfig, {"save_projection": False, "projection_prng_key": 5}),
            ("randlora", RandLoraConfig, {"randlora_alpha": 20, "bias": "all"}),
            ("randlora-redrawn", RandLoraConfig, {"save_projection": False, "sparse": True}),
            ("hira", HiraConfig, {"modules_to_save": ["lm_head"]}),
        )
    },
    "llama-adalora": ("llama", {"config": AdaLoraConfig, **ADALORA}),
    "gpt2-adalora": ("gpt2", {"config": AdaLoraConfig, **ADALORA, "target_modules": GPT2["target_modules"]}),
}


@pytest.mark.parametrize(("kind", "settings"), CASES.values(), ids=CASES)
def test_their_folder_gives_their_logits_and_their_gradients(kind, settings, tmp_path):
    model = theirs(kind, **settings)
    saved(model, tmp_path)
    ours = tiny.build(kind)
    adapters = load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(model), **CLOSE)
    logits(ours).square().mean().backward()
    logits(model).square().mean().backward()
    truth, found = by_file_key(model), our_gradients(adapters)
    assert set(found) == set(truth)
    for key, gradient in truth.items():
        torch.testing.assert_close(found[key].reshape(gradient.shape), gradient, **CLOSE, msg=key)
    if not adapters.adapters["default"].method.mergeable:
        return
    adapters.merge()
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-4)  # rounded once more, in W


def saved(model, folder, **options):
    with warnings.catch_warnings():  # of adapted tables, and of configurations it cannot look up offline
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder), **options)


def test_an_adapted_table_may_lie_in_the_folder_beside_its_adapter(tmp_path):
    model = theirs("llama", **LLAMA | {"target_modules": ["q_proj", "embed_tokens"]})
    saved(model, tmp_path, save_embedding_layers=True)
    assert any("embed_tokens.base_layer.weight" in key for key in load_file(tmp_path / WEIGHTS))
    ours = tiny.build("llama")
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(model), **CLOSE)
    half = tiny.build("llama").bfloat16()  # rounded, and still the same table
    load_adapter(half, tmp_path)
    with pytest.raises(UserError) as caught:
        load_adapter(tiny.build("llama", seed=1), tmp_path)
    assert (
        "model.embed_tokens.base_layer.weight: a copy of the base's that differs from this model's"
        in caught.value.details
    )


class Net(nn.Module):
    """A small net with a convolution of each kind that we take, and names that end each other's."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.conv = nn.Conv2d(1, 4, 3, padding=1, stride=2)
        self.round = nn.Conv2d(4, 4, 2, bias=False)
        self.lin = nn.Linear(16, 5)
        self.block = nn.ModuleDict({"lin": nn.Linear(5, 5), "other": nn.Linear(5, 5)})

    def forward(self, ids):
        x = self.round(torch.relu(self.conv(self.table(ids)[:, None])))
        return self.block["other"](torch.tanh(self.block["lin"](self.lin(x.flatten(1)))))


def net():
    torch.manual_seed(0)
    return Net()


IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])


def test_any_torch_model_with_convolutions_and_tables_both_ways(tmp_path):
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["table", "conv", "round", "lin"]}
    model = get_peft_model(net(), LoraConfig(**settings, rank_pattern={"conv": 2}))
    tiny.stir(Trainable(model))
    saved(model, tmp_path / "theirs")
    mine = net()
    adapters = load_adapter(mine, tmp_path / "theirs")
    torch.testing.assert_close(mine(IDS), model(IDS), **CLOSE)
    mine(IDS).square().sum().backward()
    model(IDS).square().sum().backward()
    truth, found = by_file_key(model), our_gradients(adapters)
    # convolutions: PEFT's file has (r, I, kh, kw) and (O, r, 1, 1)
    assert set(found) == set(truth)
    for key, gradient in truth.items():
        torch.testing.assert_close(found[key].reshape(gradient.shape), gradient, **CLOSE)
    save_adapter(adapters, tmp_path / "ours")
    again = PeftModel.from_pretrained(net(), str(tmp_path / "ours"))
    torch.testing.assert_close(again(IDS), model(IDS), **CLOSE)


class Trainable:
    def __init__(self, model):
        self.model = model

    def parameters(self):
        return [p for p in self.model.parameters() if p.requires_grad]


def test_the_first_number_of_a_name_is_its_layer():
    """As for an expert inside a layer; by PEFT's own matching."""
    names = ["model.layers.1.experts.0.up", "model.layers.0.experts.1.up", "layers.1.up", "h.1.up", "x.up"]
    for layers, pattern in ((1, None), ([1], "layers"), ([0, 1], ["h", "layers"]), ([], None), (None, None)):
        settings = {"target_modules": ["up"], "layers_to_transform": layers, "layers_pattern": pattern}
        config = LoraConfig(**settings)
        for name in names:
            assert in_layers(name, layers, pattern) == bool(check_target_module_exists(config, name)), name


# ---- ours, read by them -------------------------------------------------------------------------------------

OURS = {
    "llama": ("llama", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    "llama-all": ("llama", {"r": 4}),
    "llama-rslora": ("llama", {"method": "rslora", "r": 4, "rank_pattern": {"q_proj": 2}}),
    "llama-loraplus": ("llama", {"method": "loraplus", "r": 4}),
    "llama-patterns": (
        "llama",
        {"r": 4, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 3.5}},
    ),
    "llama-layers": ("llama", {"r": 4, "layers": "1"}),
    "llama-head": ("llama", {"r": 4, "target_modules": ["all-linear", "head"]}),
    "llama-embed": ("llama", {"r": 4, "target_modules": ["q", "embed"]}),
    "llama-saved-head": ("llama", {"r": 4, "modules_to_save": ["lm_head"]}),
    "gpt2": ("gpt2", {"r": 4}),
    "gpt2-bias-all": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "bias": "all"}),
    "gpt2-bias-lora-only": ("gpt2", {"r": 4, "bias": "lora_only"}),
    "bert": ("bert", {"r": 4, "target_modules": ["q", "v"], "bias": "lora_only"}),
    "bert-classifier": (
        "bert-cls",
        {"r": 4, "target_modules": ["q", "v"], "modules_to_save": ["classifier"]},
    ),
    "bert-without-head": ("bert-cls", {"r": 4, "target_modules": ["q", "v"]}),
    "roberta-classifier": (
        "roberta-cls",
        {"r": 4, "target_modules": ["q", "v", "mlp"], "modules_to_save": ["classifier"], "bias": "all"},
    ),
    "gpt2-roles": ("gpt2", {"r": 4, "target_modules": ["q", "v"]}),
    "gpt2-roles-rslora": ("gpt2", {"method": "rslora", "r": 4, "target_modules": ["q", "v"]}),
    "gpt2-one-role": ("gpt2", {"r": 4, "target_modules": ["k"]}),
    "gpt2-roles-and-more": ("gpt2", {"r": 4, "target_modules": ["q", "k", "v", "c_fc"]}),
    **{
        f"{kind}-roles": (kind, {"r": 4, "target_modules": ["q", "v"]})
        for kind in ("neox", "phi3", "falcon-new", "falcon-7b", "falcon-rw", "bloom")
    },
}


@pytest.mark.parametrize(("kind", "settings"), OURS.values(), ids=OURS)
def test_our_folder_gives_our_logits_in_peft_and_is_read_back_as_it_was(kind, settings, tmp_path):
    model, adapters = ours(kind, **settings)
    truth = logits(model)
    save_adapter(adapters, tmp_path, base_model="tiny")
    torch.testing.assert_close(logits(in_peft(kind, tmp_path)), truth, **CLOSE)
    again = tiny.build(kind)
    back = load_adapter(again, tmp_path)
    assert torch.equal(logits(again), truth)
    assert list(back.adapters["default"].sites) == list(adapters.adapters["default"].sites)
    as_peft = tiny.build(kind)  # and without our own file, as PEFT reads it
    (tmp_path / "loraloom.json").unlink()
    load_adapter(as_peft, tmp_path)
    torch.testing.assert_close(logits(as_peft), truth, **CLOSE)


def test_names_that_end_other_names_are_told_apart(tmp_path):
    """PEFT matches by ending: `lin` would also mean `block.lin`, in the targets and in the patterns."""
    cases = (
        (["lin", "block.lin", "other"], {"^lin": 2}),  # also for block.lin, if the key were not anchored
        (["block.lin"], {}),
        ("^lin$|table", {}),
    )
    for targets, ranks in cases:
        model = net()
        adapters = attach(model, r=3, target_modules=targets, rank_pattern=ranks)
        tiny.stir(adapters)
        save_adapter(adapters, tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = PeftModel.from_pretrained(net(), str(tmp_path))
        torch.testing.assert_close(again(IDS), model(IDS), **CLOSE)


def test_a_block_is_exactly_our_roles(tmp_path):
    """A stacked, B in columns with zeros elsewhere, r and alpha grown by the number of roles."""
    _, adapters = ours("gpt2", r=4, alpha=6.0, target_modules=["q", "v"])
    save_adapter(adapters, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (8, 12, ["c_attn"])
    tensors = load_file(tmp_path / WEIGHTS)
    name = "transformer.h.0.attn.c_attn"
    q, v = (adapters.adapters["default"].sites[f"{name}:{role}"].p for role in "qv")
    a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    assert torch.equal(a, torch.cat([q["A"], v["A"]]))
    truth = torch.zeros(3 * tiny.WIDTH, 8)
    truth[: tiny.WIDTH, :4], truth[2 * tiny.WIDTH :, 4:] = q["B"].detach(), v["B"].detach()
    assert torch.equal(b, truth)


def test_roles_of_different_scales_make_no_block_and_are_one_lora_of_scale_1(tmp_path):
    model, adapters = ours("gpt2", r=4, target_modules=["q", "v"], alpha_pattern={".*c_attn:q": 3})
    save_adapter(adapters, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (8, 8, {})
    torch.testing.assert_close(logits(in_peft("gpt2", tmp_path)), logits(model), **CLOSE)
    again = tiny.build("gpt2")
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


# ---- a folder that does not fit -----------------------------------------------------------------------------

WEIGHTS = "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    _, adapters = ours("llama", r=4, target_modules=["q_proj", "v_proj"])
    save_adapter(adapters, tmp_path, base_model="org/base")
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def reconfigure(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (folder / "loraloom.json").unlink(missing_ok=True)


def refused(folder, kind="llama", **options):
    """The error of reading a folder, which must leave the model without a trace."""
    model = tiny.build(kind)
    bits = tiny.digest(model)
    with pytest.raises(UserError) as caught:
        load_adapter(model, folder, **options)
    assert tiny.digest(model) == bits
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model._forward_pre_hooks
    return caught.value


def test_a_missing_a_surplus_and_a_misshapen_tensor_are_all_listed(folder):
    def change(tensors):
        del tensors[f"{Q0}.lora_A.weight"]
        tensors[f"{Q0}.lora_B.weight"] = torch.zeros(3, 4)
        tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 16)
        tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 16)
        tensors["base_model.model.transformer.wte.weight"] = torch.zeros(2)

    rewrite(folder, change)
    assert str(refused(folder)) == (
        f"adapter {folder} does not fit LlamaForCausalLM\n"
        "  model.layers.0.self_attn.q_proj.lora_B.weight: the adapter has (3, 4), the model needs (16, 4)\n"
        "  model.layers.0.self_attn.q_proj.lora_A.weight: not in the adapter\n"
        "  model.layers.0.mlp.up_proj.lora_A.weight: in the adapter's file, but not in its settings\n"
        "  model.layers.7.self_attn.q_proj.lora_A.weight: not in the model, which has 2 layers\n"
        "  transformer.wte.weight: not in the model\n"
        "\n"
        "hint: it was trained on org/base"
    )


def test_another_models_adapter(folder):
    error = refused(folder, "gpt2")
    assert error.message == "target_modules: 'q_proj' matches no layer of this GPT2LMHeadModel"
    assert error.hint == "it was trained on org/base"
    reconfigure(folder)
    assert refused(folder, "gpt2").message == (
        f"adapter {folder} does not fit GPT2LMHeadModel: target_modules ['q_proj', 'v_proj'] match none of its layers"
    )


def test_one_tensor_of_the_model_cannot_take_two_values(tmp_path):
    """BERT's output bias stands in two modules."""
    _, adapters = ours("bert", r=2, target_modules=["q"], bias="all")
    save_adapter(adapters, tmp_path)
    rewrite(tmp_path, lambda tensors: tensors["base_model.model.cls.predictions.decoder.bias"].add_(1))
    assert refused(tmp_path, "bert").message == (
        f"adapter {tmp_path}: cls.predictions.bias and cls.predictions.decoder.bias are one tensor here, "
        "and differ there"
    )


def test_loading_onto_a_model_with_adapters_leaves_them_as_they_were(folder):
    model, adapters = ours("llama", r=2, target_modules=["q_proj"])
    truth = logits(model)
    rewrite(folder, lambda tensors: tensors.pop(f"{Q0}.lora_A.weight"))
    with pytest.raises(UserError, match="does not fit"):
        load_adapter(adapters, folder, "second")
    assert (adapters.names, adapters.active) == (["default"], ("default",))
    assert torch.equal(logits(model), truth)
    assert set(adapters.banks) == set(adapters.adapters["default"].sites)


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"lora_bias": True}, "lora_bias = True"),
        ({"layer_replication": [[0, 1]]}, "layer_replication = [[0, 1]]"),
        ({"target_parameters": ["experts"]}, "target_parameters = ['experts']"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices = [3]"),
        ({"use_qalora": True}, "use_qalora = True"),
        ({"init_lora_weights": "corda"}, "init_lora_weights = corda: it changed the base's weights"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights = lora_ga: it changed the base's weights"),
        (
            {"init_lora_weights": "pissa", "use_rslora": True},  # the one is taken, the two together are not
            "init_lora_weights = pissa: it changed the base's weights",
        ),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights = pissa_niter_4: it changed the base's weights",
        ),
        ({"init_lora_weights": "loftq"}, "init_lora_weights = loftq: it changed the base's weights"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(folder, changes, detail):
    reconfigure(folder, **changes)
    error = refused(folder)
    assert (error.message, error.details) == (f"{folder} uses what cannot be honoured", [detail])


def test_settings_that_only_different_methods_take_are_refused_together(folder):
    reconfigure(folder, use_dora=True, alora_invocation_tokens=[1])
    error = refused(folder)
    assert error.message == f"{folder} uses what cannot be honoured"
    assert error.details == ["use_dora = True", "alora_invocation_tokens = [1]"]


def test_alora_is_refused_where_peft_does_not_heed_it(folder):
    reconfigure(folder, alora_invocation_tokens=[1], target_modules=["q_proj", "embed_tokens"])
    assert refused(folder).details == ["alora_invocation_tokens: PEFT does not heed it on model.embed_tokens"]


READ = {  # settings that all types have
    *("peft_type", "r", "target_modules", "exclude_modules", "bias", "modules_to_save", "task_type"),
    *("layers_to_transform", "layers_pattern", "base_model_name_or_path"),
    "save_projection",  # where the file is read
}
NO_EFFECT = {  # about training, placement or looking up
    *("auto_mapping", "peft_version", "revision", "inference_mode", "fan_in_fan_out", "runtime_config"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "init_weights"),
}
UNHEEDED = {  # settings that PEFT has there and does nothing with, or only in training
    "ADALORA": {"use_rslora", "alpha_pattern", "total_step"},
    "HIRA": {"rank_pattern"},
    # what the model says itself, and how the embeddings started
    "PROMPT_TUNING": {"token_dim", "num_attention_heads", "num_layers", "prompt_tuning_init"}
    | {"prompt_tuning_init_text", "prompt_tuning_init_state_dict_path", "tokenizer_name_or_path"}
    | {"tokenizer_kwargs"},
}
CONFIGS = {
    "LORA": LoraConfig,
    "ADALORA": AdaLoraConfig,
    "VERA": VeraConfig,
    "RANDLORA": RandLoraConfig,
    "HIRA": HiraConfig,
    "PROMPT_TUNING": PromptTuningConfig,
}


@pytest.mark.parametrize("name", TYPES)
def test_every_setting_of_peft_is_read_refused_or_without_effect(name):
    """A field that PEFT gains must be looked at before an adapter that uses it is read."""
    kind = TYPES[name]
    read = READ | {kind.r, kind.alpha, kind.dropout, *kind.special, *kind.patterns, *kind.unread}
    read |= {INIT} if name in ("LORA", "ADALORA") else set()
    for method in map(methods.find, methods.names()):
        if method.peft_type == name:
            read |= Asked.keys_of(method)
    read |= {"ADALORA": {"rank_pattern"}}.get(name, set())  # where its files are unpacked
    assert {field.name for field in fields(CONFIGS[name])} <= read | NO_EFFECT | UNHEEDED.get(name, set())


class Asked(dict):
    """A folder's settings that note which of them a method looks at."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def get(self, key, default=None):
        self.seen.add(key)
        return default

    @classmethod
    def keys_of(cls, method) -> set[str]:
        seen: set[str] = set()
        method.from_peft(cls(seen))
        return seen


def test_another_method_of_peft_is_refused(folder):
    reconfigure(folder, peft_type="LOHA")
    error = refused(folder)
    assert (error.message, error.hint) == (
        f"{folder} is a LOHA adapter, which cannot be read",
        "ADALORA, HIRA, LORA, PROMPT_TUNING, RANDLORA, VERA can",
    )


def test_a_folder_that_no_method_of_its_type_answers_for(folder, monkeypatch):
    """The settings that each of them refuses are named."""
    monkeypatch.setattr(
        methods.find("vera"), "from_peft", lambda config: None if config.get("d_initial") == 3 else {}
    )
    reconfigure(folder, peft_type="VERA", d_initial=3)
    assert refused(folder).details == ["d_initial = 3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": "*q_proj"}, "'*q_proj' in adapter_config.json is not a regular expression: "),
        (
            {"target_modules": None},
            "adapter {folder} does not fit LlamaForCausalLM: target_modules None match",
        ),
        ({"r": "four"}, "r is 'four'"),
        ({"lora_alpha": None}, "alpha is None"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: '(' is not a regular expression: "),
        ({"modules_to_save": ["nothing"]}, "modules_to_save: 'nothing' is no module with weights"),
        ({"lora_dropout": "much"}, "dropout is 'much'"),
    ],
)
def test_wrong_settings_in_their_file(folder, changes, message):
    reconfigure(folder, **changes)
    assert refused(folder).message.startswith(message.format(folder=folder))


def test_broken_files(folder, tmp_path):
    weights = folder / WEIGHTS
    whole = weights.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        assert refused(folder).message.startswith(f"{weights} is not a whole safetensors file: ")
    weights.unlink()
    assert refused(folder).message == f"{folder} holds no {WEIGHTS}"
    config = folder / "adapter_config.json"
    for text, message in (
        ("{", f"{config} is not JSON: "),
        ("[]", f"{config} is a list, not an object with settings"),
        ("\xff", f"{config} is not JSON: "),
    ):
        config.write_bytes(text.encode("latin-1"))
        assert refused(folder).message.startswith(message)
    config.unlink()
    assert refused(folder).message == f"{folder} has no adapter_config.json: it is no adapter"
    assert refused(folder / "none").message == f"{folder / 'none'} is not a folder"


def test_our_own_file_broken_or_at_odds(folder):
    own = folder / "loraloom.json"
    good = own.read_text()
    for text in ("{", "[]", "{}", '{"format": 1, "spec": {"colour": 1}}', '{"format": 1, "spec": 3}'):
        own.write_text(text)
        error = refused(folder)
        assert error.message.startswith(f"{own} is broken: ")
        assert error.hint == "delete it to read the folder as PEFT does"
    own.write_text('{"format": 3}')
    assert refused(folder).message == f"{own} has format 3, this version reads 1 to 2"
    own.write_text(good)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 99}))
    error = refused(folder)
    assert error.message == f"{folder}: adapter_config.json and loraloom.json do not agree"
    assert error.details == ["lora_alpha: 99 in adapter_config.json, 8 by loraloom.json"]


def test_values_that_are_not_finite_are_neither_read_nor_written(folder, tmp_path):
    rewrite(folder, lambda tensors: tensors[f"{Q0}.lora_A.weight"].fill_(float("nan")))
    error = refused(folder)
    assert isinstance(error, NonFinite)
    assert error.details == [f"{Q0}.lora_A.weight"]
    _, adapters = ours("llama", r=4, target_modules=["q_proj"])
    with torch.no_grad():
        adapters.parameters()[0][0, 0] = float("inf")
    with pytest.raises(NonFinite, match="is not finite and was not written"):
        save_adapter(adapters, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(NonFinite, match="is not finite"):
        adapters.merge()
    assert adapters.merged == ()


def test_a_pickle_is_read_only_when_asked_for(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    pickled = folder / "adapter_model.bin"
    torch.save(tensors, pickled)
    error = refused(folder)
    assert (
        error.message
        == f"{folder} holds only adapter_model.bin, a pickle, which can run code when it is read"
    )
    assert error.hint == "set model.allow_pickle=true if you trust its source"
    truth, _ = ours("llama", r=4, target_modules=["q_proj", "v_proj"])
    model = tiny.build("llama")
    load_adapter(model, folder, allow_pickle=True)
    assert torch.equal(logits(model), logits(truth))
    for junk in (b"", b"not a pickle", pickled.read_bytes()[:100]):
        pickled.write_bytes(junk)
        assert refused(folder, allow_pickle=True).message.startswith(f"{pickled} cannot be read as weights: ")
    torch.save({"a": nn.Linear(2, 2)}, pickled)  # code to run, not weights
    assert "cannot be read as weights" in refused(folder, allow_pickle=True).message


def test_which_adapter_is_saved(tmp_path):
    _, adapters = ours("llama", r=4, target_modules=["q_proj"])
    adapters.add("second", AdapterSpec(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="name the adapter: there are default, second"):
        save_adapter(adapters, tmp_path)
    with pytest.raises(UserError, match="there is no adapter named 'secnd'"):
        save_adapter(adapters, tmp_path, "secnd")
    save_adapter(adapters, tmp_path, "second")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
