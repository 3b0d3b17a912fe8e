"""Merging shard by shard, against transformers' dense models with bitsandbytes' numbers and deltas made here."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as tf
from model_folders import deep_folder, tokenizer
from safetensors.torch import load_file, save_file
from test_quant import MODELS, bnb_settings, truth, written
from tiny_run import settings
from torch import Tensor

from loraloom import api, console, fold, merge_check
from loraloom.adapt import Adapters, attach
from loraloom.adapter_io import save_adapter
from loraloom.cli import run as cli
from loraloom.config import ModelConfig
from loraloom.errors import NonFinite, UserError
from loraloom.merge_check import MergeResult
from loraloom.methods.base import NotMergeable
from loraloom.model import load_model
from loraloom.model_files import find_weights, stored_format

PLAIN = {
    "quantize": "nf4",
    "double_quant": False,
}  # bitsandbytes' CPU rounds scales otherwise than its CUDA code
ALL = [*MODELS]


def adapter_on(folder: Path, out: Path, *, kept: dict[str, Any] | None = None, **settings: Any) -> Adapters:
    """An adapter trained by nobody, on a base in 4 bits; its numbers are few bits wide, so that B A is exact."""
    kept = PLAIN if kept is None else kept
    base = ModelConfig(id=str(folder), dtype="float32", device="cpu", **kept)
    keep = settings.get("modules_to_save", ())
    loaded = load_model(base, offline=True, keep=keep, progress=False)
    adapters = attach(loaded.model, **{"r": 4, "alpha": 8} | settings)
    gen = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=gen) / 64)
    about = {**kept, "dtype": "float32"} if kept.get("quantize", "none") != "none" else None
    save_adapter(adapters, out, base_model=str(folder), trained_on=about)
    return adapters


def deltas(adapter: Path, scale: float = 2.0) -> dict[str, Tensor]:
    """Of each module, from the file itself."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[name] = scale * (tensors[key.replace("lora_A", "lora_B")] @ a)
        if key.endswith(".lora_embedding_A"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_embedding_A")
            found[name] = scale * (tensors[key.replace("embedding_A", "embedding_B")] @ a)
    return found


def with_deltas(model: Any, adapter: Path) -> Any:
    """transformers' own dense model, its numbers those of the merge before they are rounded."""
    with torch.no_grad():
        for name, delta in deltas(adapter).items():
            w = model.get_submodule(name).weight
            turned = w.shape != delta.shape or type(model.get_submodule(name)).__name__ == "Conv1D"
            w.add_(delta.T if turned else delta)
    return model


def opened(out: Path) -> Any:
    """The merged folder as transformers reads it, every weight found and none left over."""
    model, report = tf.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    about = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in about
    assert about["architectures"] == [type(model).__name__]
    assert about["dtype"] == str(model.dtype).removeprefix("torch.")
    tf.AutoTokenizer.from_pretrained(out)
    return model


def same(model: Any, expected: Any, dtype: torch.dtype) -> None:
    """Every number of a merged model, bit for bit."""
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == dtype, name
        assert torch.equal(tensor, theirs[name].to(dtype)), name


def names_in(folder: Path) -> set[str]:
    return {name for path in find_weights(folder).paths for name in load_file(path)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Base folders by kind, in bfloat16 and in several files, each made once."""
    made: dict[str, Path] = {}

    def base(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("base") / kind
            made[kind] = written(folder, kind, shard="60KB", dtype=torch.bfloat16)
        return made[kind]

    return base


def merged(adapter: Path, out: Path, **options: Any) -> MergeResult:
    return fold.merge(adapter, out, offline=True, **options)


# ---- the numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [None, "float16", "float32"])
def test_dequantised_by_bitsandbytes_plus_delta_rounded_once(
    kind: str, dtype: str | None, bases: Any, tmp_path: Path
) -> None:
    folder = bases(kind)
    adapter_on(folder, tmp_path / "adapter")
    result = merged(tmp_path / "adapter", tmp_path / "out", dtype=dtype, no_verify=dtype is not None)
    assert result.ok, result.to_dict()
    assert (result.merged.base, result.merged.dtype) == ("dequantized", dtype or "bfloat16")
    expected = with_deltas(truth(folder), tmp_path / "adapter")
    same(opened(tmp_path / "out"), expected, getattr(torch, dtype or "bfloat16"))
    assert names_in(tmp_path / "out") == names_in(folder)
    assert len(result.merged.layers) == len(deltas(tmp_path / "adapter"))
    assert bool(result.merged.total("error")) == (dtype != "float32")


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "qwen2-moe"])
def test_the_original_base_is_the_other_choice(kind: str, bases: Any, tmp_path: Path) -> None:
    folder = bases(kind)
    adapter_on(folder, tmp_path / "adapter")
    result = merged(tmp_path / "adapter", tmp_path / "out", base="original", dtype="float32")
    plain = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    same(opened(tmp_path / "out"), with_deltas(plain, tmp_path / "adapter"), torch.float32)
    assert result.ok  # the 4-bit model it was trained on is another, which is no failure
    assert result.trained is not None
    assert result.trained.mean_kl > 100 * result.verification.mean_kl  # type: ignore[union-attr]
    assert result.merged.total("rounding") < 1e-6
    lost = difference(
        truth(folder), tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), result
    )
    assert result.merged.total("error") == pytest.approx(lost, rel=1e-4)
    kept = result.to_dict()
    assert kept["against_4bit"]["mean_kl"] == result.trained.mean_kl


def difference(a: Any, b: Any, result: MergeResult) -> float:
    """How far two bases are apart in the adapted layers, as a share of the update."""
    rows, x, y = result.merged.layers, a.state_dict(), b.state_dict()
    far = sum(float((x[f"{r.name}.weight"] - y[f"{r.name}.weight"]).double().norm() ** 2) for r in rows)
    return float((far / sum(row.update**2 for row in rows)) ** 0.5)


SHARES = {0.005: (0.041, 0.33, 18.4), 0.02: (0.010, 0.083, 4.6), 0.05: (0.004, 0.033, 1.84)}


@pytest.mark.parametrize("share", SHARES)
def test_the_published_table_of_errors(share: float, tmp_path: Path) -> None:
    """source  an independent simulation of NF4 with double quantisation, W 256 x 512 of N(0, 0.02^2), rank 16"""
    config = tf.LlamaConfig(
        vocab_size=300, hidden_size=512, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(0)
    model: Any = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.02)
    model.to(torch.float16).save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    kept = {"quantize": "nf4"}
    base = ModelConfig(id=str(tmp_path / "m"), dtype="float32", device="cpu", **kept)
    adapters = attach(
        load_model(base, offline=True, progress=False).model, r=16, alpha=16, target_modules=["up_proj"]
    )
    tiny.stir(adapters, size=1.0)
    site = next(iter(adapters.adapters["default"].sites.values()))
    with torch.no_grad():
        size = (site.p["B"] @ site.p["A"]).norm() / site.layer.weight().norm()
        site.p["B"].mul_(share / size)
    save_adapter(
        adapters, tmp_path / "a", base_model=str(tmp_path / "m"), trained_on=kept | {"dtype": "float32"}
    )

    def row(**options: Any) -> Any:
        result = merged(tmp_path / "a", tmp_path / "out", force=True, no_verify=True, **options)
        (line,) = result.merged.layers
        assert line.share == pytest.approx(share, rel=1e-3)
        return result

    f16, bf16, original = SHARES[share]
    assert row(dtype="float16").merged.total("error") == pytest.approx(f16, rel=0.15)
    told = row(dtype="bfloat16").merged
    assert told.total("error") == pytest.approx(bf16, rel=0.15)
    assert (told.hint is not None) == (bf16 > 0.05)
    apart = row(dtype="float16", base="original").merged
    assert apart.total("error") == pytest.approx(original, rel=0.15)
    assert row(dtype="float32").merged.total("error") == 0


# ---- what else an adapter may hold --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-tied", "llama", "gpt2"])
@pytest.mark.parametrize("targets", ["[embed]", "[head]", "[q, v, embed, head]"])
def test_heads_and_embeddings(kind: str, targets: str, bases: Any, tmp_path: Path) -> None:
    folder = bases(kind)
    adapter_on(folder, tmp_path / "adapter", target_modules=targets.strip("[]").split(", "))
    result = merged(tmp_path / "adapter", tmp_path / "out", dtype="float32")
    assert result.ok, result.to_dict()
    model, expected = opened(tmp_path / "out"), truth(folder)
    tied = expected.config.tie_word_embeddings
    if tied:
        head = expected.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    same(model, with_deltas(expected, tmp_path / "adapter"), torch.float32)
    assert result.merged.untied == tied
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_biases_and_modules_trained_whole(kind: str, bases: Any, tmp_path: Path) -> None:
    whole = {"llama": ["lm_head", "o_proj"], "gpt2": ["ln_f", "c_fc"]}[kind]
    adapters = adapter_on(
        bases(kind), tmp_path / "adapter", modules_to_save=whole, bias="all", target_modules=["q", "v"]
    )
    result = merged(tmp_path / "adapter", tmp_path / "out", dtype="float32")
    assert result.ok, result.to_dict()
    state = opened(tmp_path / "out").state_dict()
    own = dict(adapters.overlaid("default"))
    assert own
    assert all(torch.equal(state[name], tensor) for name, tensor in own.items())
    assert set(result.merged.replaced) == set(own)


def test_a_head_that_the_files_hold_apart_stays_apart(bases: Any, tmp_path: Path) -> None:
    """transformers does not tie what differs in the files, whatever the config says."""
    folder = written(tmp_path / "m", "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    for other, untied in ((table + 1, True), (table.clone(), False)):
        save_file(tensors | {"lm_head.weight": other}, folder / "model.safetensors", {"format": "pt"})
        adapter_on(folder, tmp_path / "adapter")
        result = merged(tmp_path / "adapter", tmp_path / "out", force=True)
        assert result.ok, result.to_dict()
        assert result.merged.untied == untied
        assert torch.equal(opened(tmp_path / "out").lm_head.weight, other)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_a_base_that_bitsandbytes_wrote(kind: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "m", kind)
    given = bnb_settings(bnb_4bit_use_double_quant=False)
    theirs = tf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=given, dtype=torch.float32, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "bnb")
    tf.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "bnb")
    adapter_on(tmp_path / "bnb", tmp_path / "adapter", kept={})
    result = merged(tmp_path / "adapter", tmp_path / "out")
    assert result.ok, result.to_dict()
    same(opened(tmp_path / "out"), with_deltas(truth(folder), tmp_path / "adapter"), torch.float32)
    with pytest.raises(UserError, match="holds only 4-bit weights"):
        merged(tmp_path / "adapter", tmp_path / "other", base="original")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_dense_base_is_merged_as_it_is(kind: str, bases: Any, tmp_path: Path) -> None:
    adapter_on(bases(kind), tmp_path / "adapter", kept={})
    result = merged(tmp_path / "adapter", tmp_path / "out")
    assert (result.ok, result.merged.base, result.trained) == (True, "original", None)
    plain = tf.AutoModelForCausalLM.from_pretrained(bases(kind), dtype=torch.float32)
    same(opened(tmp_path / "out"), with_deltas(plain, tmp_path / "adapter"), torch.bfloat16)
    with pytest.raises(UserError, match="was not in 4 bits"):
        merged(tmp_path / "adapter", tmp_path / "other", base="dequantized")


@pytest.mark.usefixtures("quick")
def test_a_run_in_four_bits_and_its_adapter_alone(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: Any
) -> None:
    """Codes come from the number format of training: here bfloat16, of files in float32."""
    four = {
        "model.quantize": "nf4",
        "model.double_quant": False,
        "model.dtype": "bfloat16",
        "train.max_steps": 4,
    }
    run = api.train(settings=settings(model_folder, data_file, tmp_path / "run") | four, offline=True)
    assert cli(["merge", str(run.path), str(tmp_path / "a"), "--offline", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((run.path / "merge.json").read_text())
    assert (told["base"], told["dtype"], told["verified"], told["prompts"]) == (
        "dequantized",
        "float32",
        True,
        4,
    )
    assert len(told["layers"]) == 14
    assert {check["name"]: check["ok"] for check in run.checks()}["merge verified"]
    plain = tf.AutoModelForCausalLM.from_pretrained(model_folder).to(torch.bfloat16)
    plain.save_pretrained(tmp_path / "as-seen")
    known = truth(tmp_path / "as-seen").state_dict()
    found = opened(tmp_path / "a").state_dict()
    change = deltas(run.adapter_path)
    assert len(change) == 14
    for name, tensor in found.items():
        expected = known[name] + change.get(name.removesuffix(".weight"), 0)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-7)
    copied = shutil.copytree(run.adapter_path, tmp_path / "alone")
    merged(copied, tmp_path / "b")
    assert all(
        torch.equal(tensor, found[name]) for name, tensor in opened(tmp_path / "b").state_dict().items()
    )


# ---- what is refused ----------------------------------------------------------------------------------------


def test_never_into_four_bits(bases: Any, tmp_path: Path, capsys: Any) -> None:
    adapter_on(bases("llama"), tmp_path / "adapter")
    for kind in ("nf4", "fp4", "e2m1"):
        assert (
            cli(["merge", str(tmp_path / "adapter"), str(tmp_path / "out"), "--dtype", kind, "--offline"])
            == 2
        )
        told = capsys.readouterr().err
        assert "larger than most updates" in told
        assert "loraloom convert OUT DST --quantize nf4" in told
    with pytest.raises(UserError, match="unknown number format"):
        merged(tmp_path / "adapter", tmp_path / "out", dtype="int7")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "told"), [(1e7, "use --dtype bfloat16 or float32"), (3e38, "NaN or infinity")]
)
def test_a_merge_that_is_not_finite_leaves_nothing(
    value: float, told: str, bases: Any, tmp_path: Path
) -> None:
    adapter_on(bases("llama"), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "layers.1.mlp.down_proj.lora_B" in key)
    tensors[key][3] = value
    save_file(tensors, path, {"format": "pt"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("before")
    with pytest.raises(
        NonFinite, match=r"layers\.1\.mlp\.down_proj\.weight is not finite in float16"
    ) as caught:
        merged(tmp_path / "adapter", tmp_path / "out", dtype="float16", force=True)
    assert told in str(caught.value.hint)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def test_what_is_no_change_of_w(bases: Any, tmp_path: Path, monkeypatch: Any) -> None:
    adapter_on(bases("llama"), tmp_path / "adapter")
    monkeypatch.setattr("loraloom.methods.lora.LoRA.per_token", True)
    with pytest.raises(NotMergeable, match="not a change of W"):
        merged(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_copy_of_the_base_must_be_this_bases(bases: Any, tmp_path: Path) -> None:
    """PEFT writes whole tables beside adapted ones; there is no base in memory to compare them with at first."""
    adapter_on(bases("llama"), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    table = tf.AutoModelForCausalLM.from_pretrained(bases("llama")).model.embed_tokens.weight.detach().float()
    save_file(tensors | {"base_model.model.model.embed_tokens.weight": table}, path)
    assert merged(tmp_path / "adapter", tmp_path / "out", no_verify=True).ok
    save_file(tensors | {"base_model.model.model.embed_tokens.weight": table + 1}, path)
    with pytest.raises(UserError, match=r"a copy of model\.embed_tokens\.weight that differs"):
        merged(tmp_path / "adapter", tmp_path / "other", no_verify=True)
    assert not (tmp_path / "other").exists()


def test_a_base_that_lacks_weights(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", "llama")
    adapter_on(folder, tmp_path / "adapter")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as caught:
        merged(tmp_path / "adapter", tmp_path / "out")
    assert "missing: model.layers.1.mlp.up_proj.weight" in caught.value.details
    assert "of another shape: model.norm.weight" in caught.value.details
    assert not (tmp_path / "out").exists()


def test_the_format_of_the_files_is_read_from_the_files(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", "llama", dtype=torch.float16)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"dtype": "float32"}))
    assert stored_format(folder) == "float16"


# ---- the verification ---------------------------------------------------------------------------------------


def test_one_model_in_memory_at_a_time(bases: Any, tmp_path: Path, monkeypatch: Any) -> None:
    adapter_on(bases("llama"), tmp_path / "adapter")
    seen: list[weakref.ref[Any]] = []

    def counting(load: Any) -> Any:
        def loaded(*args: Any, **kwargs: Any) -> Any:
            gc.collect()
            assert not [model for model in seen if model() is not None]
            found = load(*args, **kwargs)
            seen.append(weakref.ref(found.model))
            return found

        return loaded

    monkeypatch.setattr("loraloom.use.load_model", counting(load_model))
    monkeypatch.setattr("loraloom.merge_check.load_model", counting(load_model))
    assert merged(tmp_path / "adapter", tmp_path / "out", base="original").trained is not None
    assert len(seen) == 3


def test_it_is_skipped_with_the_reason(bases: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    adapter_on(bases("llama"), tmp_path / "adapter")
    monkeypatch.setattr("loraloom.use.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    told = merged(tmp_path / "adapter", tmp_path / "out", no_verify=True)
    assert (told.ok, told.verification, told.skipped) == (True, None, "--no-verify")
    monkeypatch.setattr(merge_check, "main_memory", lambda: (10**9, 1000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1000, 10**9))
    told = merged(tmp_path / "adapter", tmp_path / "out", force=True)
    assert "0.0 GB are free" in str(told.skipped)
    assert told.to_dict()["verified"] is False
    console.show_merge(told)
    assert "not verified: the model needs" in capsys.readouterr().out
    opened(tmp_path / "out")


def test_a_wrong_merge_is_noticed(bases: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    adapter_on(bases("llama"), tmp_path / "adapter")
    monkeypatch.setattr("loraloom.merge.merged", lambda bank, value: -1 * value.codes.decode(torch.float32))
    told = merged(tmp_path / "adapter", tmp_path / "out")
    assert not told.ok
    console.show_merge(told)
    assert "over the limit" in capsys.readouterr().out


def test_kept_logits_have_a_limit(monkeypatch: Any) -> None:
    monkeypatch.setattr(merge_check, "LOGITS", 100 * 4 * 2 * 20)
    assert merge_check.within([[1] * 9, [2] * 9, [3] * 9], vocabulary=100, models=1) == [
        [1] * 9,
        [2] * 9,
        [3] * 2,
    ]
    assert merge_check.within([[1] * 9, [2] * 9], vocabulary=100, models=2) == [[1] * 9, [2]]


# ---- the memory ---------------------------------------------------------------------------------------------

SHARD = 24 << 20
MEASURE = """
import sys, threading, time
from pathlib import Path
from loraloom import fold, shards

def anonymous():
    text = open("/proc/self/status").read()
    return int(text.split("RssAnon:")[1].split()[0]) << 10

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

small, large, limit = sys.argv[1:4]
shards.ShardWriter.__init__.__defaults__ = (int(limit),)
fold.merge(small + "-adapter", small + "-out", offline=True, no_verify=True)  # what is imported and kept for good
before, peak, done = anonymous(), 0, False
thread = threading.Thread(target=watch)
thread.start()
fold.merge(large + "-adapter", large + "-out", offline=True, no_verify=True)
done = True
thread.join()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read as Linux tells it")
def test_the_peak_is_a_shard_and_not_the_model(tmp_path: Path) -> None:
    small, large = (deep_folder(tmp_path / str(n), n, shard=SHARD) for n in (1, 44))
    assert find_weights(Path(large)).bytes > 7 * SHARD
    command = [sys.executable, "-c", MEASURE, small, large, str(SHARD)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert len(find_weights(Path(f"{large}-out")).paths) >= 8
    assert SHARD / 2 < grown < 3 * SHARD  # half a shard at least: else nothing was measured
