"""Every way to name layers, on real architectures, and what is said when a name fits nothing."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as tf
from torch import nn

from loraloom.adapt import attach
from loraloom.errors import UserError
from loraloom.targets import input_group, is_tied, layer_number, parse_layers, select

LLAMA_LEAVES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def keys(model, wanted, **options):
    return [target.key for target in select(model, wanted, **options)]


def leaves(model, wanted, **options):
    return {target.name.rpartition(".")[2] for target in select(model, wanted, **options)}


# ---- the syntaxes -------------------------------------------------------------------------------------------


def test_all_linear_is_every_linear_layer_but_the_head():
    for kind in ("llama", "llama-tied"):
        assert leaves(tiny.build(kind), "all-linear") == LLAMA_LEAVES
    gpt2 = tiny.build("gpt2")
    assert leaves(gpt2, "all-linear") == {"c_attn", "c_proj", "c_fc"}
    assert len(select(gpt2, ["all-linear", "lm_head"])) == 4 * tiny.LAYERS + 1


def test_names_endings_and_full_names():
    model = tiny.build("llama")
    assert keys(model, ["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert keys(model, "v_proj, q_proj") == keys(model, ["q_proj", "v_proj"])
    assert keys(model, "model.layers.1.mlp.up_proj") == ["model.layers.1.mlp.up_proj"]
    assert keys(model, ["self_attn.q_proj"]) == keys(model, ["q_proj"])
    assert keys(model, ["lm_head", "embed_tokens"]) == ["model.embed_tokens", "lm_head"]


def test_an_expression_matches_whole_names():
    model = tiny.build("llama")
    assert keys(model, r".*\.1\.mlp\..*") == [
        f"model.layers.1.mlp.{x}" for x in ("gate_proj", "up_proj", "down_proj")
    ]
    assert keys(model, ".*(q|v)_proj") == keys(model, ["q_proj", "v_proj"])


def test_layer_ranges():
    model = tiny.build("llama")
    assert keys(model, ["q_proj"], layers="1") == ["model.layers.1.self_attn.q_proj"]
    assert keys(model, ["q_proj"], layers="0-1") == keys(model, ["q_proj"])
    assert parse_layers("0-2, 5") == {0, 1, 2, 5}
    for wrong in ("3-1", "a", "", "1;2", "-1"):
        with pytest.raises(UserError, match="write numbers and ranges"):
            parse_layers(wrong)


def test_a_target_named_twice_stands_once_and_the_whole_wins_over_its_roles():
    gpt2 = tiny.build("gpt2")
    assert keys(gpt2, ["q", "c_attn", "c_attn"]) == [f"transformer.h.{i}.attn.c_attn" for i in (0, 1)]
    assert keys(gpt2, ["v", "q"], layers="0") == [
        "transformer.h.0.attn.c_attn:q",
        "transformer.h.0.attn.c_attn:v",
    ]


# ---- roles --------------------------------------------------------------------------------------------------

ROLES = {  # the modules of layer 0 that play each role
    "llama": {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "mlp": "mlp.gate_proj mlp.up_proj mlp.down_proj",
    },
    "gpt2": {"q": "attn.c_attn:q", "v": "attn.c_attn:v", "o": "attn.c_proj", "mlp": "mlp.c_fc mlp.c_proj"},
    "neox": {
        "q": "attention.query_key_value:q",
        "o": "attention.dense",
        "mlp": "mlp.dense_h_to_4h mlp.dense_4h_to_h",
    },
    **{
        kind: {
            "k": "self_attention.query_key_value:k",
            "o": "self_attention.dense",
            "mlp": "mlp.dense_h_to_4h mlp.dense_4h_to_h",
        }
        for kind in ("falcon-new", "falcon-7b", "falcon-rw", "bloom")
    },
    "phi3": {
        "v": "self_attn.qkv_proj:v",
        "o": "self_attn.o_proj",
        "mlp": "mlp.gate_up_proj mlp.down_proj",
    },
    **{
        kind: {
            "q": "attention.self.query",
            "k": "attention.self.key",
            "v": "attention.self.value",
            "o": "attention.output.dense",
            "mlp": "intermediate.dense output.dense",
        }
        for kind in ("bert", "bert-cls", "roberta-cls")
    },
}


@pytest.mark.parametrize("kind", ROLES)
def test_roles(kind):
    model = tiny.build(kind)
    for role, endings in ROLES[kind].items():
        found = keys(model, [role])
        assert len(found) == tiny.LAYERS * len(endings.split()), role
        first = [key for key in found if layer_number(key) == 0]
        assert [any(key.endswith("." + ending) for key in first) for ending in endings.split()]
        for ending in endings.split():
            assert sum(key.endswith("0." + ending) for key in first) == 1, (role, ending)


def test_a_classifier_is_no_attention_output():
    assert not any("classifier" in key for key in keys(tiny.build("roberta-cls"), ["o", "mlp"]))


def test_head_and_embed_are_known_by_identity():
    assert keys(tiny.build("gpt2"), ["head", "embed"]) == ["transformer.wte", "lm_head"]
    neox = tiny.build("neox")
    [head] = keys(neox, ["head"])
    assert neox.get_submodule(head) is neox.get_output_embeddings()
    assert is_tied(tiny.build("llama-tied"))
    assert is_tied(tiny.build("gpt2"))
    assert not is_tied(tiny.build("llama"))
    assert not is_tied(nn.Linear(2, 2))


def test_layers_that_read_one_input_share_a_group():
    assert input_group("h.0.attn.q_proj") == input_group("h.0.attn.v_proj") != input_group("h.1.attn.q_proj")
    assert input_group("m.gate_proj") == input_group("m.up_proj") != input_group("m.down_proj")
    assert input_group("q_proj") == ".q_proj"
    assert input_group("h.0.attn.c_attn") == "h.0.attn.c_attn"


# ---- errors -------------------------------------------------------------------------------------------------


def refused(model, wanted, **options):
    with pytest.raises(UserError) as caught:
        select(model, wanted, **options)
    return caught.value


def test_an_unknown_name_gives_the_nearest_and_all_others():
    error = refused(tiny.build("llama"), ["q_porj"])
    assert error.message == "target_modules: 'q_porj' matches no layer of this LlamaForCausalLM"
    assert error.hint == (
        "did you mean q_proj or v_proj or o_proj? there are down_proj, embed_tokens, gate_proj, k_proj, lm_head, "
        "o_proj, q_proj, up_proj, v_proj; roles: q, k, v, o, mlp, down, head, embed"
    )


def test_one_wrong_name_among_right_ones_is_refused():
    assert "'query'" in refused(tiny.build("llama"), ["q_proj", "query"]).message


def test_a_module_that_is_no_layer():
    message = refused(tiny.build("llama"), ["self_attn"]).message
    assert message == "target_modules: 'self_attn' is a LlamaAttention, which cannot be adapted itself"
    message = refused(tiny.build("llama"), ["lm_head"], skip=["lm_head"]).message
    assert message == "target_modules: 'lm_head' is in modules_to_save: it is trained whole"


def test_expressions_that_match_nothing_or_are_none():
    error = refused(tiny.build("llama"), "q_proj|v_proj")
    assert error.message == "target_modules 'q_proj|v_proj' matches no whole name of a layer"
    assert error.hint == "the expression must match from the first to the last letter; start it with .*"
    assert "a layer here: model.layers.1.self_attn.q_proj" in error.details
    assert "is not a regular expression" in refused(tiny.build("llama"), "*q_proj").message


def test_layers_that_are_not_there():
    error = refused(tiny.build("llama"), ["q_proj"], layers="0-5")
    assert error.message == "layers '0-5': the model has no layer 2, 3, 4, 5"
    assert error.hint == "it has layers 0-1"
    error = refused(nn.Sequential(nn.Linear(2, 2)).requires_grad_(False), ["0"], layers="3")
    assert error.hint == "it has layers 0-0"
    assert refused(tiny.build("llama"), ["lm_head"], layers="0").message == (
        "layers '0' leave nothing of target_modules"
    )


@pytest.mark.parametrize("nothing", ["", [], (), " , "])
def test_nothing_at_all_is_refused(nothing):
    assert refused(tiny.build("llama"), nothing).message == "target_modules is empty"


def test_layers_that_cannot_be_adapted_say_why():
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 4))
    grouped.add_module("fixed", nn.Linear(4, 4).half().to(torch.float16))
    grouped.add_module("counts", Counts(5, 4))
    for name, text in (("0", "2 groups"), ("1", "max_norm"), ("counts", "looks up otherwise")):
        with pytest.raises(UserError, match=text):
            attach(grouped, target_modules=[name])
    assert all("forward" not in module.__dict__ for module in grouped.modules())


class Counts(nn.Embedding):
    """An embedding of places, not of its input: as OPT's positions."""

    def forward(self, mask):
        return super().forward(mask.cumsum(1))


def test_a_part_that_multihead_attention_never_calls_is_left_out():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert keys(model, "all-linear") == ["linear1", "linear2"]
    assert "cannot be adapted itself" in refused(model, ["out_proj"]).message


# ---- counts that the papers print ---------------------------------------------------------------------------


def on_meta(config):
    with torch.device("meta"):
        return tf.AutoModelForCausalLM.from_config(config)


def trained(model, **settings):
    adapters = attach(model, **settings)
    count = sum(parameter.numel() for parameter in adapters.parameters())
    adapters.detach()
    return count


def test_gpt2_medium_q_v_of_rank_4():
    """LoRA paper, table 3: 0.35M, which is 393,216."""
    model = on_meta(tf.GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    assert trained(model, r=4, target_modules=["q", "v"]) == 393_216


def test_llama_2_7b():
    """Raschka's experiments: 4,194,304 for q and v at r = 8; 20,277,248 and 40,554,496 for everything."""
    config = tf.LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    )
    model = on_meta(config)
    assert trained(model, r=8, target_modules=["q_proj", "v_proj"]) == 4_194_304
    everything = ["all-linear", "head"]
    assert trained(model, r=8, target_modules=everything) == 20_277_248
    assert trained(model, r=16, target_modules=everything) == 40_554_496


def test_roberta_base_q_v_of_rank_8():
    """LoRA paper, table 2: 0.3M."""
    with torch.device("meta"):
        model = tf.AutoModelForSequenceClassification.from_config(tf.RobertaConfig())
    assert trained(model, r=8, target_modules=["q", "v"]) == 294_912


def test_gpt3_q_v_of_rank_4():
    """LoRA paper, table 15: 2 L d r for each of q and v, 96 layers of width 12288: 18.9M at r = 4 for both."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.v_proj = nn.Linear(12288, 12288), nn.Linear(12288, 12288)

    with torch.device("meta"):
        model = nn.ModuleList(Layer() for _ in range(96))
    assert trained(model, r=4, target_modules=["q_proj", "v_proj"]) == 2 * 96 * 2 * 12288 * 4 == 18_874_368


def test_what_layers_share_is_shared_on_meta_too():
    adapters = attach(on_meta(tf.LlamaConfig(num_hidden_layers=1)), r=2)
    for site in adapters.adapters["default"].sites.values():
        assert site.p["A"].is_meta
        assert isinstance(site.p["A"], nn.Parameter)
