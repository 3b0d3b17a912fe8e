"""4-bit weights in models: what transformers would compute with the dequantised numbers, on every way in.

bitsandbytes gives the numbers; transformers' own dense model with those numbers in it gives the logits.
"""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import tokenizer
from safetensors.torch import load_file, save_file
from torch import nn

from loraloom import api
from loraloom.adapt import attach
from loraloom.config import ModelConfig
from loraloom.errors import UserError
from loraloom.incoming import quantize_model
from loraloom.kernels.matmul_frozen import _buffers, release_buffers
from loraloom.layers import is_linear
from loraloom.model import Loaded, load_model, write_model
from loraloom.quant import Weight4, bits_per_parameter, dense, encode, quantized, stored_bytes

bnb = pytest.importorskip("bitsandbytes.functional")

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
MLP = {"intermediate_size": 128, "num_key_value_heads": 2}
MODELS = {
    "llama-tied": lambda: tf.LlamaConfig(**SHAPE, **MLP, tie_word_embeddings=True),
    "llama": lambda: tf.LlamaConfig(**SHAPE, **MLP, tie_word_embeddings=False),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=300, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "neox": lambda: tf.GPTNeoXConfig(**SHAPE, intermediate_size=128),
    "mixtral": lambda: tf.MixtralConfig(**SHAPE, **MLP, num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": lambda: tf.Qwen2MoeConfig(
        **SHAPE, **MLP, moe_intermediate_size=64, shared_expert_intermediate_size=64, num_experts=4
    ),
    "qwen3-moe": lambda: tf.Qwen3MoeConfig(
        **SHAPE, **MLP, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, head_dim=16
    ),
}
IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))


def written(folder: Path, kind: str, *, shard: str = "5GB", dtype: Any = torch.float32) -> Path:
    """A random model as transformers writes it, in the names of its checkpoints, with a tokenizer."""
    torch.manual_seed(0)
    model: Any = tf.AutoModelForCausalLM.from_config(MODELS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (parameter.dim() == 1))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, **changes: Any) -> Loaded:
    chosen = {"dtype": "float32", "device": "cpu", "quantize": "nf4"} | changes
    return load_model(ModelConfig(id=str(folder), **chosen), offline=True, progress=False)


def roundtrip(w: torch.Tensor, kind: str) -> torch.Tensor:
    """What bitsandbytes makes of a matrix; flat, since 0.50 misreads rows that end inside a block on a CPU."""
    packed, state = bnb.quantize_4bit(w.reshape(-1), quant_type=kind, blocksize=64, compress_statistics=False)
    return bnb.dequantize_4bit(packed, state).view(w.shape)


def truth(folder: Path, kind: str = "nf4") -> Any:
    """transformers' dense model, with bitsandbytes' numbers in its linear layers and experts."""
    model: Any = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for name, module in model.named_modules():
            if is_linear(module) and module is not head:
                w = module.weight
                turned = type(module).__name__ == "Conv1D"
                w.copy_(roundtrip(w.T, kind).T if turned else roundtrip(w, kind))
            if name.endswith(".experts"):
                for w in module.parameters():
                    for one in w:
                        one.copy_(roundtrip(one, kind))
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("base") / request.param, request.param, shard="100KB")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


# ---- the way in ---------------------------------------------------------------------------------------------


def test_logits_are_those_of_transformers_with_bitsandbytes_numbers(folder: Path) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 1
    for kind in ("nf4", "fp4"):
        loaded = load(folder, quantize=kind, double_quant=False)
        torch.testing.assert_close(logits(loaded.model), logits(truth(folder, kind)), rtol=0, atol=2e-6)
        assert loaded.quantised == f"{kind}, 4.500 bits a weight in blocks of 64"


@pytest.mark.parametrize("table", ["nf4", "fp4", "e2m1"])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_every_format_with_double_quantisation(tmp_path: Path, table: str, block: int) -> None:
    """Scales in 8 bits move the weights by little: the norm of the change is a fifth of a percent."""
    folder = written(tmp_path / "m", "llama-tied")
    one = load(folder, quantize=table, quant_block=block).model
    two = load(folder, quantize=table, quant_block=block, double_quant=False).model
    for a, b in zip(one.parameters(), two.parameters()):
        assert (dense(a) - dense(b)).norm() <= 0.01 * dense(b).norm()
        assert not isinstance(a, Weight4) or (a.codes.block, a.codes.table) == (block, table)


def test_what_is_in_four_bits_and_what_is_not(folder: Path) -> None:
    model = load(folder, dtype="bfloat16").model
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                fused = name.endswith(".experts") and parameter.dim() == 3
                meant = fused or (leaf == "weight" and is_linear(module) and module is not head)
                assert isinstance(parameter, Weight4) == meant, name
                assert parameter.dtype == torch.bfloat16
                assert not parameter.requires_grad
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_a_dense_model_passes_through_our_hands_unchanged(folder: Path) -> None:
    ours = load(folder, quantize="none").model
    plain = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for (name, a), (_, b) in zip(ours.state_dict().items(), plain.state_dict().items()):
        assert torch.equal(a, b), name
    assert not hasattr(ours.config, "quantization_config")
    assert not any(hasattr(ours, name) for name in ("hf_quantizer", "quantization_method"))


def test_tied_weights_stay_one_tensor(tmp_path: Path) -> None:
    model = load(written(tmp_path / "m", "llama-tied")).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", "llama")
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert "1 values that are not finite" in str(caught.value.details) + caught.value.message
    assert "layers.1.mlp.up_proj" in str(caught.value.details) + caught.value.message


def test_modules_to_keep_stay_dense(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", "llama")
    config = ModelConfig(id=str(folder), dtype="float32", device="cpu", quantize="nf4")
    model = load_model(config, offline=True, keep=["o_proj"], progress=False).model
    assert not isinstance(model.model.layers[0].self_attn.o_proj.weight, Weight4)
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, Weight4)
    adapters = attach(model, target_modules=["q_proj"], modules_to_save=["o_proj"])
    assert adapters.overlays
    with pytest.raises(UserError, match="kept in 4 bits, so it cannot be trained whole"):
        attach(load(folder).model, target_modules=["q_proj"], modules_to_save=["o_proj"])


def test_quantising_in_memory_is_quantising_while_reading(folder: Path) -> None:
    plain = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inside = quantize_model(plain)
    loaded = load(folder).model
    for (name, a), (_, b) in zip(inside.named_parameters(), loaded.named_parameters()):
        assert isinstance(a, Weight4) == isinstance(b, Weight4), name
        assert torch.equal(dense(a), dense(b)), name
    with torch.device("meta"):
        meta = quantize_model(tf.AutoModelForCausalLM.from_config(plain.config))
    assert sum(map(stored_bytes, meta.parameters())) == sum(map(stored_bytes, inside.parameters()))


# ---- bitsandbytes' checkpoints, both directions -------------------------------------------------------------


def bnb_settings(**changes: Any) -> Any:
    chosen = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    }
    return tf.BitsAndBytesConfig(load_in_4bit=True, **chosen | changes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama-tied", "llama", "gpt2", "neox"])
@pytest.mark.parametrize(("table", "double"), [("nf4", True), ("fp4", False)])
def test_a_checkpoint_of_bitsandbytes_is_read(tmp_path: Path, kind: str, table: str, double: bool) -> None:
    folder = written(tmp_path / "m", kind)
    given = bnb_settings(bnb_4bit_quant_type=table, bnb_4bit_use_double_quant=double)
    theirs: Any = tf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=given, dtype=torch.float32, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "bnb")
    tokenizer().save_pretrained(tmp_path / "bnb")
    loaded = load(tmp_path / "bnb", quantize="none")
    assert (loaded.quantised or "").startswith(table)
    own = dict(loaded.model.named_parameters())
    for name, w in theirs.named_parameters():
        if hasattr(w, "quant_state"):
            numbers = bnb.dequantize_4bit(w.data, w.quant_state)
            assert torch.equal(dense(own[name]), numbers.T if kind == "gpt2" else numbers), name
    held = sum(hasattr(w, "quant_state") for w in theirs.parameters())
    assert sum(isinstance(w, Weight4) for w in own.values()) == held > 0
    ours, bnbs = logits(loaded.model), logits(theirs)
    assert (ours - bnbs).norm() < 0.02 * bnbs.norm()  # its CPU product rounds to bfloat16 on the way
    other = {"nf4": "fp4", "fp4": "nf4"}[table]
    with pytest.raises(UserError, match=f"quantised to {table} already"):
        load(tmp_path / "bnb", quantize=other)


def quantised_by_bnb(folder: Path) -> Path:
    """A folder as transformers and bitsandbytes write it."""
    theirs: Any = tf.AutoModelForCausalLM.from_pretrained(
        written(folder / "m", "llama"),
        quantization_config=bnb_settings(),
        dtype=torch.float32,
        device_map="cpu",
    )
    theirs.save_pretrained(folder / "bnb")
    tokenizer().save_pretrained(folder / "bnb")
    return folder / "bnb"


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_checkpoint_of_bitsandbytes_is_refused_by_name(tmp_path: Path) -> None:
    path = quantised_by_bnb(tmp_path) / "model.safetensors"
    whole = load_file(path)
    damages: dict[str, Any] = {
        f"{UP}.nested_absmax": None,
        f"{UP}.absmax": None,
        f"{UP}.quant_map": torch.arange(16.0),
        UP: whole[UP][:-1].clone(),
        f"{UP}.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8),
    }
    for name, value in damages.items():
        broken = {key: tensor for key, tensor in whole.items() if key != name}
        save_file(broken | ({} if value is None else {name: value}), path, {"format": "pt"})
        with pytest.raises(UserError) as caught:
            load(path.parent, quantize="none")
        assert UP in caught.value.message, name
        assert "fetch it again" in (caught.value.hint or "")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load(path.parent, quantize="none")


@pytest.mark.filterwarnings("ignore")
def test_a_plan_knows_that_the_files_are_in_four_bits(tmp_path: Path) -> None:
    folder = quantised_by_bnb(tmp_path)
    planned = api.plan(
        model=str(folder), settings={"model.dtype": "float32", "model.fp8": False}, offline=True
    )
    assert planned["quantize"] == "nf4"
    assert planned["base_bytes"] == pytest.approx(load(folder, quantize="none").bytes, abs=64)  # and buffers
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises(UserError, match="gptq"):
        api.plan(model=str(folder), offline=True)


@pytest.mark.filterwarnings("ignore")
def test_modules_to_keep_come_out_of_a_checkpoint_of_bitsandbytes_dense(tmp_path: Path) -> None:
    config = ModelConfig(id=str(quantised_by_bnb(tmp_path)), dtype="float32", device="cpu")
    model = load_model(config, offline=True, keep=["o_proj"], progress=False).model
    assert not isinstance(model.model.layers[0].self_attn.o_proj.weight, Weight4)
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, Weight4)


# ---- what models do beside ----------------------------------------------------------------------------------


def test_a_device_by_its_number_keeps_tied_weights_tied(tmp_path: Path) -> None:
    model = load(written(tmp_path / "m", "llama-tied"), device="cpu:0").model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_what_a_model_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    """Hunyuan's router is float32 in every model."""
    config = tf.HunYuanMoEV1Config(
        **SHAPE, **MLP, num_experts=4, moe_topk=2, moe_intermediate_size=64, num_shared_expert=1, head_dim=16
    )
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    ours = load(tmp_path / "m", dtype="bfloat16", quantize="none").model
    kinds = {name: parameter.dtype for name, parameter in theirs.named_parameters()}
    assert len(set(kinds.values())) == 2
    assert {name: parameter.dtype for name, parameter in ours.named_parameters()} == kinds
    for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_trained_classifier_stays_dense(tmp_path: Path, kind: str) -> None:
    shape = SHAPE | {"intermediate_size": 128, "num_labels": 3}
    config = tf.LlamaConfig(**shape) if kind == "llama" else tf.BertConfig(**shape)
    torch.manual_seed(0)
    model: Any = tf.AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    chosen = ModelConfig(id=str(tmp_path / "m"), dtype="float32", device="cpu", quantize="nf4")
    loaded = load_model(chosen, task="classify", num_labels=3, offline=True, progress=False).model
    inside = quantize_model(model)
    for found in (loaded, inside):
        held = {name for name, parameter in found.named_parameters() if isinstance(parameter, Weight4)}
        assert held
        assert not any(name.startswith(("score", "classifier")) for name in held)


def test_a_model_in_four_bits_is_not_written_as_a_dense_one(tmp_path: Path) -> None:
    loaded = load(written(tmp_path / "m", "llama"))
    with pytest.raises(UserError, match="not written as a dense one"):
        write_model(loaded.model, loaded.tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the weight itself --------------------------------------------------------------------------------------


def both(
    o: int = 7, i: int = 33, *, flipped: bool = False, dtype: Any = torch.float64
) -> tuple[Weight4, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    shape = (i, o) if flipped else (o, i)
    w = quantized(torch.randn(shape, generator=gen), flipped=flipped).to(dtype)
    return w, dense(w)


@pytest.mark.parametrize("flipped", [False, True])
def test_products_and_their_gradients_are_those_of_the_dense_matrix(flipped: bool) -> None:
    w, d = both(flipped=flipped)
    assert (w.shape, w.dtype, w.T.shape) == (d.shape, d.dtype, d.T.shape)
    for call in (
        lambda m, x, b: nn.functional.linear(x, m.T if flipped else m, b),
        lambda m, x, b: torch.addmm(b, x.flatten(0, 1), m if flipped else m.T),
        lambda m, x, b: x @ (m if flipped else m.T) + b,
        lambda m, x, b: torch.matmul(x, m if flipped else m.T),
        lambda m, x, b: ((m.T if flipped else m) @ x.mT).mT,
    ):
        x = torch.randn(2, 3, 33, dtype=torch.float64, requires_grad=True)
        b = torch.randn(7, dtype=torch.float64, requires_grad=True)
        y, z = call(w, x, b), call(d, x, b)
        torch.testing.assert_close(y, z, rtol=0, atol=1e-12)
        seed = torch.randn_like(y)
        wants = torch.autograd.grad(z, [x, b], seed, allow_unused=True)
        for got, want in zip(torch.autograd.grad(y, [x, b], seed, allow_unused=True), wants):
            assert (got is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_nothing_dense_is_saved_for_the_backward_pass() -> None:
    layer = nn.Linear(256, 256, bias=False)
    layer.weight = quantized(layer.weight)  # type: ignore[assignment]
    x = torch.randn(4, 256, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert not [t for t in saved if t.numel() >= layer.weight.numel()]
    release_buffers()
    gc.collect()
    y.sum().backward()
    sizes = [t.numel() for t in _buffers.values()]
    assert sizes == [layer.weight.numel()]  # one buffer, made anew
    layer(x).sum().backward()
    nn.Linear(4, 4)(torch.randn(2, 4))
    assert [t.numel() for t in _buffers.values()] == sizes


def test_one_buffer_serves_layers_of_all_sizes() -> None:
    release_buffers()
    small, large = both(4, 8, dtype=torch.float32)[0], both(32, 64, dtype=torch.float32)[0]
    for w in (small, large, small):
        nn.functional.linear(torch.randn(2, w.shape[1]), w)
    assert [t.numel() for t in _buffers.values()] == [32 * 64]


def test_whatever_wants_the_numbers_unseen_is_refused() -> None:
    w, _ = both()
    for forbidden in (
        lambda: w + 1,
        lambda: w.norm(),
        lambda: w[0],
        lambda: w.sum(),
        lambda: torch.cat([w, w]),
    ):
        with pytest.raises(RuntimeError, match="quantised"):
            forbidden()
    with pytest.raises(RuntimeError, match="right side"):
        nn.functional.linear(w, torch.randn(3, 33, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="stands for"):
        nn.functional.linear(torch.randn(2, 33), w)


def test_autocast_is_that_of_a_dense_weight() -> None:
    layer = nn.Linear(33, 7)
    layer.weight = quantized(layer.weight)  # type: ignore[assignment]
    plain = copy.deepcopy(layer)
    plain.weight = nn.Parameter(dense(layer.weight))
    x = torch.randn(2, 33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), plain(x))
    with pytest.raises(RuntimeError, match="cannot be shared between processes"):
        layer.share_memory()


def test_modules_move_copy_and_keep_their_bits() -> None:
    layer = nn.Linear(33, 7)
    layer.weight = quantized(layer.weight)  # type: ignore[assignment]
    bits = [t.clone() for t in layer.weight.codes.tensors()]
    twin = copy.deepcopy(layer).to(torch.bfloat16).to("cpu")
    assert twin.weight.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(bits, twin.weight.codes.tensors()))
    assert twin(torch.randn(2, 33, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float32
    meta = copy.deepcopy(layer).to("meta")
    assert meta(torch.empty(2, 33, device="meta")).shape == (2, 7)
    assert isinstance(layer.weight, nn.Parameter)
    assert not layer.weight.requires_grad


@settings(max_examples=30, deadline=None)
@given(e=st.integers(1, 4), o=st.integers(1, 9), i=st.integers(1, 70), double=st.booleans())
def test_experts_are_quantised_one_by_one(e: int, o: int, i: int, double: bool) -> None:
    w = torch.randn(e, o, i, generator=torch.Generator().manual_seed(e * o * i))
    fused = quantized(w, double=double)
    x = torch.randn(3, i)
    for index, one in enumerate(w):
        alone = encode(one, double=double)
        assert torch.equal(dense(fused)[index], alone.decode(torch.float32))
        for at in (index, torch.tensor(index)):
            assert torch.equal(nn.functional.linear(x, fused[at]), x @ alone.decode(torch.float32).T)


def test_bits_are_those_published() -> None:
    """source  QLoRA, section 3: 4 + 8/64 + 32/(64 * 256) with double quantisation, 4.5 without."""
    layer = nn.Linear(4096, 1024, bias=False)
    plain = nn.Linear(4096, 1024, bias=False)
    layer.weight, plain.weight = quantized(layer.weight), quantized(plain.weight, double=False)  # type: ignore[assignment]
    assert bits_per_parameter(layer) == pytest.approx(4.127, abs=5e-4)
    assert bits_per_parameter(plain) == 4.5
    assert bits_per_parameter(nn.Linear(3, 3)) is None


# ---- memory -------------------------------------------------------------------------------------------------

PEAK = """
import sys, threading
import torch
torch.set_num_threads(1)
from loraloom.config import ModelConfig
from loraloom.model import load_model

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))

load_model(ModelConfig(id=sys.argv[2], dtype="float32", device="cpu", quantize="nf4"), offline=True)  # imports
before, seen, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.002):
        seen.append(anonymous())

thread = threading.Thread(target=watch)
thread.start()
loaded = load_model(ModelConfig(id=sys.argv[1], dtype="float32", device="cpu", quantize="nf4"), offline=True)
done.set()
thread.join()
print(max(seen) - before, loaded.bytes)
"""


def test_the_dense_model_is_never_held(tmp_path: Path) -> None:
    """Memory of its own that a process takes while it loads: the 4-bit model and less than two shards."""
    config = tf.LlamaConfig(
        **SHAPE | {"hidden_size": 512, "num_hidden_layers": 12},
        intermediate_size=1408,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "big", max_shard_size="16MB")
    tokenizer().save_pretrained(tmp_path / "big")
    shards = [path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors")]
    assert sum(shards) > 9 * max(shards)
    small = written(tmp_path / "small", "llama-tied")
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "big"), str(small)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    peak, held = map(int, ran.stdout.split())
    assert held < 0.15 * sum(shards)
    assert peak < held + 2 * max(shards), f"{peak:,} bytes for {held:,} of weights, shards of {max(shards):,}"
