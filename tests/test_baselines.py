"""The baselines of the LoRA paper: what they compute, written out again, and how much they train."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from peft import PeftModel, PromptTuningConfig, get_peft_model

from loraloom import layers, methods
from loraloom.adapt import Adapters, AdapterSpec, attach
from loraloom.adapter_files import is_peft_folder
from loraloom.adapter_io import load_adapter, save_adapter
from loraloom.dressing import dress, dress_prompts, with_tokens
from loraloom.errors import UserError
from loraloom.nll import nll_sum
from loraloom.packing import IGNORED, pack
from loraloom.shapes import published
from loraloom.skeleton import meta_model

SUM = {"rtol": 1e-10, "atol": 1e-10}  # float64; sums are reordered
L, D = 96, 12288  # GPT-3


def wide(kind: str) -> torch.nn.Module:
    return tiny.build(kind).double()


def widened(adapters: Adapters) -> dict[str, torch.Tensor]:
    """Every tensor in float64, away from its start, by name."""
    for _, tensor in adapters.adapters["default"].named_tensors():
        tensor.data = tensor.data.double()
    tiny.stir(adapters, size=0.3)
    return dict(adapters.adapters["default"].named_tensors())


# ---- how much they train ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt3() -> torch.nn.Module:
    return meta_model(published("gpt3-175b"), dtype=torch.bfloat16)


def trained(model: torch.nn.Module, method: str, r: int = 16, **options: object) -> int:
    adapters = Adapters(model)
    try:
        with torch.device("meta"):
            adapters.add("default", AdapterSpec(method=method, r=r, options=options), blank=True)
        return sum(p.numel() for p in adapters.parameters())
    finally:
        adapters.detach()


@pytest.mark.parametrize(("r", "millions"), [(1, 7.1), (4, 21.2), (8, 40.1), (16, 77.9), (64, 304.4)])
def test_adapter_h_trains_what_the_paper_counts(gpt3, r, millions):
    """LoRA paper, table 15."""
    count = trained(gpt3, "adapterh", r)
    assert count == 2 * L * (2 * D * r + r + D)
    assert round(count / 1e6, 1) == millions


def test_adapter_l_adds_its_norms(gpt3):
    assert trained(gpt3, "adapterl", 4) == L * (2 * D * 4 + 4 + D) + 2 * L * D


@pytest.mark.parametrize(
    ("prefix", "millions"), [(32, 0.49), (64, 0.88), (128, 1.67), (256, 3.24), (512, 6.39)]
)
def test_prefix_embeddings_train_what_the_paper_counts(gpt3, prefix, millions):
    """The paper prints 0.4, 0.9, 1.7, 3.2 and 6.4."""
    count = trained(gpt3, "prefix_embedding", prefix=prefix, infix=8)
    assert count == D * (prefix + 8)
    assert round(count / 1e6, 2) == millions


def test_prefix_layers_train_a_vector_for_each_block(gpt3):
    assert trained(gpt3, "prefix_layer", prefix=32, infix=8) == L * D * (32 + 8)


def test_lora_with_a_prefix_adds_up(gpt3):
    """Table 15: 37.7 M for r = 8 on q and v; with l_p = 8 and l_i = 4 37.8 M, and 52.8 M in every layer."""
    lora = trained(gpt3, "lora")
    embedding = trained(gpt3, "lora_prefix", prefix=8, infix=4)
    layer = trained(gpt3, "lora_prefix", prefix=8, infix=4, kind="layer")
    assert embedding - lora == 12 * D
    assert layer - lora == 12 * D * L
    assert round((37_748_736 + embedding - lora) / 1e6, 1) == 37.9  # the paper prints 37.8
    assert round((37_748_736 + layer - lora) / 1e6, 1) == 51.9  # and 52.8


def test_bitfit_trains_every_bias_and_full_every_weight(gpt3):
    biases = sum(p.numel() for name, p in gpt3.named_parameters() if name.endswith("bias"))
    assert trained(gpt3, "bitfit") == biases
    assert trained(gpt3, "full") == sum(p.numel() for p in gpt3.parameters())  # tied weights once


# ---- what they compute --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_adapter_h_by_its_equation(activation):
    """Both places of a block, by hand on a GPT-2 block: attention, adapter, residual, mlp, adapter, residual."""
    model = wide("gpt2")
    plain = copy.deepcopy(model)
    adapters = attach(model, "adapterh", r=3, options={"activation": activation})
    p = widened(adapters)
    ids = tiny.ids()
    h = plain.transformer.wte(ids) + plain.transformer.wpe(torch.arange(ids.shape[1]))
    mask = torch.full((ids.shape[1],) * 2, float("-inf"), dtype=h.dtype).triu(1)
    for i, block in enumerate(plain.transformer.h):
        q, k, v = (
            part.unflatten(-1, (4, -1)).transpose(1, 2)
            for part in block.attn.c_attn(block.ln_1(h)).split(16, -1)
        )
        a = torch.softmax(q @ k.mT / 2 + mask, -1) @ v
        a = block.attn.c_proj(a.transpose(1, 2).flatten(2))
        h = h + a + bottleneck(a, p, f"transformer.h.{i}.attn.c_proj", activation)
        m = block.mlp(block.ln_2(h))
        h = h + m + bottleneck(m, p, f"transformer.h.{i}.mlp.c_proj", activation)
    truth = plain.lm_head(plain.transformer.ln_f(h))
    torch.testing.assert_close(model(ids).logits, truth, **SUM)


def bottleneck(y, p, name, activation="relu"):
    z = y @ p[f"{name}/W_down"].T + p[f"{name}/b_down"]
    z = torch.relu(z) if activation == "relu" else z * 0.5 * (1 + torch.erf(z / 2**0.5))
    return z @ p[f"{name}/W_up"].T + p[f"{name}/b_up"]


def test_adapter_l_by_its_equation():
    """After each block, behind a norm of its own."""
    model = wide("llama")
    plain = copy.deepcopy(model)
    p = widened(attach(model, "adapterl", r=3))
    ids = tiny.ids()
    h = plain.model.embed_tokens(ids)
    rotary = plain.model.rotary_emb(h, torch.arange(ids.shape[1])[None])
    mask = torch.full((ids.shape[1],) * 2, float("-inf"), dtype=h.dtype).triu(1)[None, None]
    for i, block in enumerate(plain.model.layers):
        out = block(h, attention_mask=mask, position_embeddings=rotary)
        h = out[0] if isinstance(out, tuple) else out
        name = f"model.layers.{i}"
        normed = F.layer_norm(h, (16,), p[f"{name}/norm.w"], p[f"{name}/norm.b"])
        h = h + bottleneck(normed, p, name)
    torch.testing.assert_close(model(ids).logits, plain.lm_head(plain.model.norm(h)), **SUM)


def test_bitfit_is_the_model_with_other_biases():
    model = wide("gpt2")
    plain = copy.deepcopy(model)
    adapters = attach(model, "bitfit")
    tiny.stir(adapters, size=0.3)
    with torch.no_grad():
        for name, tensor in adapters.overlaid("default"):
            assert name.endswith(".bias")
            plain.get_parameter(name).copy_(tensor)
    ids = tiny.ids()
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, **SUM)


def test_bitfit_needs_biases_or_makes_them_by_name():
    model = wide("llama")
    with pytest.raises(UserError, match="bitfit finds nothing to train") as caught:
        attach(model, "bitfit")
    assert caught.value.hint == "it has no biases: set method.add_missing=true"
    plain = copy.deepcopy(model)
    p = widened(attach(model, "bitfit", add_missing=True))
    for key, tensor in p.items():
        module = plain.get_submodule(key.removesuffix("/b"))
        module.bias = torch.nn.Parameter(tensor.detach().clone())
    ids = tiny.ids()
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, **SUM)


def test_full_fine_tuning_is_training_the_model_itself():
    """Three AdamW steps beside torch's own on a copy: the same losses and weights, tied ones still tied."""
    model = wide("llama-tied")
    plain = copy.deepcopy(model)
    adapters = attach(model, "full")
    ids = tiny.ids()
    ours = torch.optim.AdamW(adapters.groups(1e-2))
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for _ in range(3):
        losses = []
        for host, optimizer in ((model, ours), (plain, theirs)):
            optimizer.zero_grad()
            loss = host(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, **SUM)
    trained = dict(adapters.overlaid("default"))
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(trained[name], parameter, **SUM)
    assert trained["lm_head.weight"] is trained["model.embed_tokens.weight"]


def test_bitfit_gives_a_bias_only_where_there_is_none():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False))
    adapters = attach(model, "bitfit", add_missing=True)
    assert list(adapters.adapters["default"].sites) == ["1"]
    assert [name for name, _ in adapters.overlaid("default")] == ["0.bias"]
    assert sum(p.numel() for p in adapters.parameters()) == 4 + 2


# ---- prefixes -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT asks transformers by an old name
def test_prefix_embedding_is_pefts_prompt_tuning():
    model = wide("llama")
    theirs = get_peft_model(
        copy.deepcopy(model), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=16)
    ).double()
    adapters = attach(model, "prefix_embedding", prefix=3)
    ours = adapters.adapters["default"].sites["model.embed_tokens"].p["P"]
    prompt = theirs.prompt_encoder["default"].embedding.weight
    ours.data = prompt.detach().clone()
    ids = tiny.ids()
    dressed = torch.tensor(dress_prompts(model, ids.tolist()))
    assert dressed.shape == (3, 10)
    y, truth = model(dressed).logits, theirs(input_ids=ids).logits
    torch.testing.assert_close(y, truth, **SUM)
    y.square().sum().backward()
    truth.square().sum().backward()
    torch.testing.assert_close(ours.grad, prompt.grad, **SUM)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_prompt_tuning_folders_both_ways(tmp_path):
    model = tiny.build("llama")
    ids = tiny.ids()
    adapters = attach(model, "prefix_embedding", prefix=3)
    tiny.stir(adapters)
    save_adapter(adapters, tmp_path / "ours")
    y = model(torch.tensor(dress_prompts(model, ids.tolist()))).logits
    theirs = PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "ours")
    torch.testing.assert_close(theirs(input_ids=ids).logits, y)
    theirs.save_pretrained(tmp_path / "theirs")
    fresh = tiny.build("llama")
    load_adapter(fresh, tmp_path / "theirs")
    assert torch.equal(fresh(torch.tensor(dress_prompts(fresh, ids.tolist()))).logits, y)
    with_infix = attach(tiny.build("llama"), "prefix_embedding", prefix=3, infix=1)
    save_adapter(with_infix, tmp_path / "infix")
    assert not is_peft_folder(tmp_path / "infix")


def test_prefix_layers_replace_what_every_block_reads():
    """By equations: at the special places the input of each block is its own trained vector."""
    model = wide("llama")
    plain = copy.deepcopy(model)
    p = widened(attach(model, "prefix_layer", prefix=2, infix=1))
    ids = torch.tensor([[9, 8, 7, 6]])
    dressed = torch.tensor([[50, 51, 9, 8, 52, 7, 6]])  # V = 50
    special = torch.tensor([0, 1, 4])
    h = plain.model.embed_tokens(torch.tensor([[0, 0, 9, 8, 0, 7, 6]]))
    rotary = plain.model.rotary_emb(h, torch.arange(7)[None])
    mask = torch.full((7, 7), float("-inf"), dtype=h.dtype).triu(1)[None, None]
    for i, block in enumerate(plain.model.layers):
        name = "model.embed_tokens" if i == 0 else f"model.layers.{i - 1}"
        h = h.index_copy(1, special, p[f"{name}/P"][None])
        out = block(h, attention_mask=mask, position_embeddings=rotary)
        h = out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(model(dressed).logits, plain.lm_head(plain.model.norm(h)), **SUM)
    assert len(p) == len(plain.model.layers)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, **SUM)  # nothing without its tokens


@pytest.mark.parametrize("method", ["prefix_embedding", "prefix_layer"])
def test_a_block_reads_the_trained_vector_to_the_last_bit(method):
    """Beside large hidden states too: it replaces them, and is not the rounded sum of them and a difference."""
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight *= 1000
    model = model.bfloat16()
    adapters = attach(model, method, prefix=2)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.01)
    seen: list[torch.Tensor] = []

    def look(_, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    for block in model.model.layers:
        block.register_forward_pre_hook(look, with_kwargs=True)
    model(torch.tensor([[50, 51, 9, 8]]))
    for h, parameter in zip(seen, adapters.parameters()):
        assert torch.equal(h[0, :2], parameter.bfloat16())


def test_prefix_tokens_start_as_the_tables_own_rows_scaled_as_the_module_does():
    class Scaled(torch.nn.Embedding):
        embed_scale = 4.0

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    table = Scaled(11, 3)
    layer = layers.view(table, "table")
    p = methods.make("prefix_embedding", {"prefix": 2}).init(layer, torch.Generator().manual_seed(0))["P"]
    rows = table(torch.arange(11))
    assert all(any(torch.equal(vector, row) for row in rows) for vector in p)


class Row:
    def __init__(self, ids, labels):
        self.ids, self.labels, self.row = ids, labels, "row"

    @property
    def targets(self):
        return sum(label != IGNORED for label in self.labels)


def test_the_infix_stands_before_the_last_answer_and_carries_no_loss():
    row = Row([1, 2, 3, 4, 5, 6], [IGNORED, 2, IGNORED, IGNORED, 5, 6])
    dressed = with_tokens(row, [90, 91], [92])
    assert dressed.ids == [90, 91, 1, 2, 3, 4, 92, 5, 6]
    assert dressed.labels == [IGNORED, IGNORED, IGNORED, 2, IGNORED, IGNORED, IGNORED, 5, 6]
    assert dressed.targets == row.targets == 3


@pytest.mark.parametrize("method", ["prefix_embedding", "prefix_layer", "lora_prefix"])
def test_dressed_rows_packed_equal_them_one_by_one(method):
    model = wide("llama")
    attach(model, method, r=2, options={"prefix": 2, "infix": 1})
    rows = [Row(list(range(3, 3 + n)), [IGNORED] * 2 + list(range(5, 3 + n))) for n in (4, 6, 9)]
    dressed = dress(model, rows)
    together = sum(nll_sum(model, b) for b in pack(dressed, micro_tokens=64, packing=True, pad_id=0))
    alone = sum(
        nll_sum(model, b) for row in dressed for b in pack([row], micro_tokens=64, packing=False, pad_id=0)
    )
    torch.testing.assert_close(together, alone, rtol=1e-7, atol=0)  # Llama's norms compute in float32


def test_a_base_that_is_asked_sees_no_special_tokens():
    model = wide("llama")
    adapters = attach(model, "prefix_embedding", prefix=2)
    assert dress_prompts(model, [[5, 6]]) == [[50, 51, 5, 6]]
    with adapters.disabled():
        assert dress_prompts(model, [[5, 6]]) == [[5, 6]]
    adapters.add("other", AdapterSpec(r=2))
    adapters.use("default", "other")
    with pytest.raises(UserError, match="cannot be used together with others"):
        dress_prompts(model, [[5, 6]])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("adapterh", {"activation": "tanh"}, "activation is 'tanh'"),
        ("prefix_embedding", {"prefix": 0}, "prefix is 0 and infix 0"),
        ("lora_prefix", {"kind": "both"}, "kind is 'both'"),
        ("alora", {}, "alora needs an invocation"),
        ("loradrop", {"probe_steps": 0}, "probe_steps is 0"),
        ("loradrop", {"threshold": 1.5}, "threshold is 1.5"),
    ],
)
def test_settings_out_of_range_are_named(method, options, message):
    with pytest.raises(UserError, match=message):
        methods.make(method, options)
