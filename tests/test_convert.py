"""GGUF, .bin and safetensors to safetensors folders; the truth is the model that the source was made from."""

import json
import pickle
from pathlib import Path

import gguf
import model_folders
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraloom import convert as convert_module
from loraloom import gguf_model, quantize_files, shards
from loraloom.bnb_format import open_state
from loraloom.cli import run as cli
from loraloom.convert import convert
from loraloom.errors import Failure, UserError
from loraloom.gguf_tokenizer import LLAMA3, QWEN2, TEKKEN
from loraloom.model_files import find_weights
from loraloom.quant import Weight4, dense
from loraloom.quantize_files import quantize_folder

IDS = torch.tensor([[1, 5, 9, 200, 33, 2, 77, 263]])


def same_model(folder: Path, expected: torch.nn.Module) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        difference = (loaded(IDS).logits - expected(IDS).logits).abs().max()
    assert difference == 0
    assert loaded.config.tie_word_embeddings == expected.config.tie_word_embeddings


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
def test_gguf_gives_the_logits_of_the_model_it_was_made_from(tmp_path: Path, kind: str, tied: bool) -> None:
    source = model_folders.model(kind, tied=tied)
    path = model_folders.write_gguf(tmp_path / "m.gguf", source)
    report = convert(path, tmp_path / "out")
    same_model(tmp_path / "out", source)
    assert (report.rounding, report.logit_difference, report.same_top, report.dtype) == (0, 0, 1, "float32")
    assert report.parameters == sum(p.numel() for p in source.parameters())
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) == (not tied)
    written, truth = json.loads((tmp_path / "out" / "config.json").read_text()), source.config.to_dict()
    for key in (
        "model_type",
        "bos_token_id",
        "eos_token_id",
        "vocab_size",
        "rope_parameters",
        "rms_norm_eps",
    ):
        assert written.get(key) == truth.get(key)


def test_gguf_tokenizer_template_and_stop_tokens_arrive(tmp_path: Path) -> None:
    convert(model_folders.write_gguf(tmp_path / "m.gguf", model_folders.model()), tmp_path / "out")
    truth, made = model_folders.tokenizer(), AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("x\n\n1", "12 the 1212\n\nthe", "naïve <|im_end|> 東京", ""):
        assert made(text)["input_ids"] == truth(text)["input_ids"], text
    turns = [{"role": "user", "content": "Hi 12"}]
    assert made.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (made.bos_token, made.eos_token, made.pad_token, made.is_fast) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        True,
    )
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_turn_end_that_is_not_the_end_token_becomes_a_stop_token(tmp_path: Path) -> None:
    path = model_folders.write_gguf(tmp_path / "m.gguf", model_folders.model(), add_eos_token_id=0)
    convert(path, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


def test_quantised_gguf_is_dequantised_and_the_rounding_reported(tmp_path: Path) -> None:
    source = model_folders.model()
    path = model_folders.write_gguf(tmp_path / "m.gguf", source, quantise="Q8_0")
    report = convert(path, tmp_path / "out")
    assert (report.dtype, report.formats[0]) == ("bfloat16", "Q8_0")
    assert 0 < report.rounding <= 2**-8
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in written.items():  # Q8_0 steps are 1/127 of a block's largest, and bfloat16 adds 2^-9
        truth = source.state_dict()[name]
        assert (tensor.float() - truth).abs().max() <= truth.abs().max() * (0.5 / 127 + 2**-8)
    exact = convert(path, tmp_path / "exact", dtype="float32")
    assert exact.rounding == 0
    assert exact.logit_difference == 0


def test_transformers_own_reader_agrees(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF files only with accelerate")
    path = model_folders.write_gguf(tmp_path / "m.gguf", model_folders.model(), quantise="Q4_1")
    convert(path, tmp_path / "out", dtype="float32")
    same_model(
        tmp_path / "out",
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval(),
    )


def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    source = model_folders.model(hidden_size=256, rope_parameters=scaling)
    plain = model_folders.model(
        hidden_size=256, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
    )
    factors = (plain.model.rotary_emb.inv_freq / source.model.rotary_emb.inv_freq).numpy()
    assert factors.max() > 2
    path = model_folders.write_gguf(tmp_path / "m.gguf", source)
    reader = gguf_model.open_gguf(path)
    record = type("Record", (), {"data": factors.astype(np.float32)})()
    found = gguf_model.rope(
        gguf_model.GgufFile(path, reader.fields, {**reader.tensors, "rope_freqs.weight": record})
    )
    assert found.pop("rope_type") == scaling.pop("rope_type")
    assert found == pytest.approx(scaling)
    record.data = record.data * 1.5
    with pytest.raises(UserError, match="not the rotary scaling of Llama 3"):
        gguf_model.rope(gguf_model.GgufFile(path, reader.fields, {"rope_freqs.weight": record}))


def test_word_rules_are_those_of_transformers() -> None:
    module = pytest.importorskip(
        "transformers.integrations.gguf.gguf_tokenizer_mapping", reason="this transformers has no such table"
    )
    table = getattr(module, "GGUF_PRE_TOKENIZER_SPLITS", None)
    if table is None:
        pytest.skip("this transformers has no such table")
    assert (table["llama-bpe"], table["tekken"], table["qwen2"]) == (LLAMA3, TEKKEN, QWEN2)


@pytest.mark.parametrize("pre", [None, "default", "brand-new"])
def test_an_unknown_word_rule_is_refused_unless_a_tokenizer_is_given(tmp_path: Path, pre: str | None) -> None:
    path = model_folders.write_gguf(tmp_path / "m.gguf", model_folders.model(), pre=pre)
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre") as caught:
        convert(path, tmp_path / "out")
    assert "--tokenizer FOLDER" in str(caught.value)
    assert not (tmp_path / "out").exists()
    model_folders.tokenizer().save_pretrained(tmp_path / "original")
    convert(path, tmp_path / "out", tokenizer=tmp_path / "original")
    made = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert made("x\n\n12")["input_ids"] == model_folders.tokenizer()("x\n\n12")["input_ids"]


def test_gguf_that_is_no_gguf_or_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"<html>not found</html>" * 10)
    with pytest.raises(UserError, match="not a whole GGUF file"):
        convert(path, tmp_path / "out")
    whole = model_folders.write_gguf(tmp_path / "whole.gguf", model_folders.model()).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole GGUF file"):
        convert(path, tmp_path / "out")


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="'mamba' are not supported"):
        convert(tmp_path / "m.gguf", tmp_path / "out")


def test_gguf_with_a_tensor_too_many_is_refused(tmp_path: Path) -> None:
    source = model_folders.model("llama", attention_bias=True)
    source.config.attention_bias = False
    path = model_folders.write_gguf(tmp_path / "m.gguf", source)
    reader = gguf_model.open_gguf(path)
    shapes = {
        name: value.shape
        for name, value in model_folders.model().state_dict().items()
        if "lm_head" not in name
    }
    with pytest.raises(UserError, match="not those of a llama model") as caught:
        list(gguf_model.tensors(reader, shapes))
    assert "no place for: blk.0.attn_q.bias" in caught.value.details


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    folder = model_folders.folder(tmp_path / "src")
    source = model_folders.model()
    torch.save(source.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "LICENSE").write_text("free")
    return folder


def test_bin_is_read_only_when_asked_for_by_name(bin_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"only as \.bin files") as caught:
        convert(bin_folder, tmp_path / "out")
    assert "--allow-pickle" in str(caught.value)
    report = convert(bin_folder, tmp_path / "out", allow_pickle=True)
    assert (report.kind, report.dtype, report.rounding) == ("bin", "as it was", 0)
    same_model(tmp_path / "out", model_folders.model())
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    for name in ("tokenizer.json", "LICENSE", "config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (bin_folder / name).read_bytes()


def test_sharded_bin(bin_folder: Path, tmp_path: Path) -> None:
    state = torch.load(bin_folder / "pytorch_model.bin", weights_only=True)
    (bin_folder / "pytorch_model.bin").unlink()
    where = {}
    for number, names in enumerate((list(state)[:7], list(state)[7:])):
        torch.save({name: state[name] for name in names}, bin_folder / f"pytorch_model-{number}.bin")
        where.update(dict.fromkeys(names, f"pytorch_model-{number}.bin"))
    (bin_folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    convert(bin_folder, tmp_path / "out", allow_pickle=True)
    same_model(tmp_path / "out", model_folders.model())
    (bin_folder / "pytorch_model-1.bin").unlink()
    with pytest.raises(UserError, match="1 of 2 weight files are missing"):
        convert(bin_folder, tmp_path / "again", allow_pickle=True)


class Evil:
    """Unpickled, it makes a file."""

    marker = Path()

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.marker,))


def test_bin_with_code_is_not_run(bin_folder: Path, tmp_path: Path) -> None:
    Evil.marker = tmp_path / "ran"
    (bin_folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Evil()}, protocol=2))
    with pytest.raises(UserError, match="not a plain file of weights"):
        convert(bin_folder, tmp_path / "out", allow_pickle=True)
    assert not Evil.marker.exists()


def test_another_number_format(tmp_path: Path) -> None:
    folder = model_folders.folder(tmp_path / "src")
    report = convert(folder, tmp_path / "out", dtype="bfloat16")
    assert (report.kind, report.dtype) == ("safetensors", "bfloat16")
    source, written = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert source.keys() == written.keys()
    assert all(torch.equal(written[name], source[name].bfloat16()) for name in source)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert report.logit_difference > 0


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    folder = model_folders.folder(tmp_path / "src")
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][3] = 1e5
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight has values beyond the range"):
        convert(folder, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_shards_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folders.folder(tmp_path / "src", tied=False)
    monkeypatch.setattr(shards.ShardWriter.__init__, "__defaults__", (60_000,))
    convert(folder, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    same_model(tmp_path / "out", model_folders.model(tied=False))


def test_a_filled_target_is_kept_unless_forced(tmp_path: Path) -> None:
    folder = model_folders.folder(tmp_path / "src")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        convert(folder, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    convert(folder, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "mine.txt").exists()
    for target in (folder, tmp_path):
        with pytest.raises(UserError, match="replace its own source"):
            convert(folder, target, force=True)


def test_a_result_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folders.folder(tmp_path / "src")
    monkeypatch.setattr(convert_module, "compare_tensors", lambda *_: 0.0)
    honest = shards.ShardWriter.add
    monkeypatch.setattr(
        shards.ShardWriter, "add", lambda self, name, tensor: honest(self, name, tensor * 1.01)
    )
    with pytest.raises(Failure, match="other logits"):
        convert(folder, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(
        shards.ShardWriter, "add", lambda self, name, tensor: honest(self, name, tensor * 1.01)
    )
    with pytest.raises(Failure, match="not written as it was read"):
        convert(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "holds no weights"),
        (lambda path: path.write_text("x"), "neither a GGUF file nor a model folder"),
    ],
)
def test_nothing_to_convert(tmp_path: Path, make, text: str) -> None:
    make(tmp_path / "src")
    with pytest.raises(UserError, match=text):
        convert(tmp_path / "src", tmp_path / "out")


def test_sentencepiece_vocabulary_gives_the_ids_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    from loraloom.gguf_tokenizer import build_tokenizer

    words = ["▁the", "▁t", "he", "▁th", "e", "t", "h", "▁", "l", "o", "lo", "1", "2", "▁lo"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    scores = [0.0] * 259 + [-float(index) for index in (3, 0, 1, 2, *range(20, 25), 21, 4, 30, 31, 5)]
    fields = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    built, settings = build_tokenizer(gguf_model.GgufFile(tmp_path, fields, {}))
    assert settings["model_max_length"] == 64
    pairs = [("▁", "t"), ("h", "e"), ("▁t", "h"), ("▁t", "he"), ("▁th", "e"), ("l", "o"), ("▁", "lo")]
    truth = LlamaTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=pairs)
    for text in ("the lo the", "12 the  lol", "é the"):
        assert built.encode(text).ids == [1, *truth(text, add_special_tokens=False)["input_ids"]], text
        assert built.decode(built.encode(text).ids) == text


# ---- into bitsandbytes' 4 bits ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama-tied", "llama", "gpt2", "neox"])
@pytest.mark.parametrize(("table", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_bitsandbytes_reads_what_we_write(tmp_path: Path, kind: str, table: str, double: bool) -> None:
    """Every number that it dequantises is the one that we quantised while reading, bit for bit."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    from test_quant import load, logits, written

    source = written(tmp_path / "m", kind)
    report = quantize_folder(source, tmp_path / "q", table=table, double=double, progress=False)
    theirs, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "q", output_loading_info=True, device_map="cpu", dtype=torch.float32
    )
    assert not any(found.values()), found
    ours = load(source, quantize=table, double_quant=double, device="auto").model  # where the writer was, too
    back = load(tmp_path / "q", quantize="none").model
    in_memory = dict(ours.named_parameters())
    coded = 0
    for name, w in theirs.named_parameters():
        own = dense(in_memory[name]).cpu()
        assert torch.equal(own, dense(back.get_parameter(name))), name
        if hasattr(w, "quant_state"):
            coded += 1
            flat = bnb.dequantize_4bit(w.data, w.quant_state)
            assert torch.equal(flat, own.T if kind == "gpt2" else own), name
        else:
            assert torch.equal(w, own), name
    assert coded == report.quantised == sum(isinstance(w, Weight4) for w in in_memory.values()) > 0
    a, b = logits(back), logits(theirs)
    assert (a - b).norm() < 0.02 * b.norm()  # its CPU product rounds to bfloat16 on the way
    # source  QLoRA's double quantisation, and the block-64 errors on N(0, 1) of both tables
    assert report.bits == pytest.approx(4.127 if double else 4.5, abs=0.03)
    assert report.error == pytest.approx({"nf4": 0.0920, "fp4": 0.1219}[table], rel=0.02)
    assert report.mean_kl is not None


@pytest.mark.filterwarnings("ignore")
def test_the_rest_stays_in_the_format_named(tmp_path: Path) -> None:
    from test_quant import written

    source = written(tmp_path / "m", "llama", dtype=torch.float16, shard="60KB")
    report = quantize_folder(source, tmp_path / "q", table="nf4", progress=False)
    assert report.dtype == "float16"
    report = quantize_folder(
        source, tmp_path / "q", table="nf4", dtype="bfloat16", force=True, progress=False
    )
    assert report.dtype == "bfloat16"
    about = json.loads((tmp_path / "q" / "config.json").read_text())
    assert about["dtype"] == "bfloat16"
    assert about["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    state = open_state(find_weights(tmp_path / "q").paths)
    assert state["model.embed_tokens.weight"][:].dtype == torch.bfloat16
    assert state["model.layers.0.mlp.up_proj.weight"][...].dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu")
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "table", "told"),
    [
        ("llama", "e2m1", "is not one of 'nf4', 'fp4'"),
        ("mixtral", "nf4", "no place for model.layers.0.mlp.experts"),
    ],
)
def test_what_its_format_has_no_place_for(tmp_path: Path, kind: str, table: str, told: str, capsys) -> None:
    from test_quant import written

    source = written(tmp_path / "m", kind)
    assert cli(["convert", str(source), str(tmp_path / "q"), "--quantize", table]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert ("model.quantize" in error) == (kind == "mixtral")  # the command line itself offers two tables
    with pytest.raises(UserError, match="bitsandbytes' format has no place for") as caught:
        quantize_folder(source, tmp_path / "q", table=table)
    assert "model.quantize" in (caught.value.hint or "")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_quantising_by_command_and_what_it_refuses(tmp_path: Path, capsys) -> None:
    from test_quant import written

    source, made = written(tmp_path / "m", "llama"), tmp_path / "q"
    assert cli(["convert", str(source), str(made), "--quantize", "nf4", "--no-double-quant", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["bits"], told["table"], told["dtype"]) == (4.5, "nf4", "float32")
    assert cli(["convert", str(made), str(tmp_path / "r"), "--quantize", "nf4"]) == 2
    assert "quantised already" in capsys.readouterr().err
    assert cli(["convert", str(source), str(made), "--quantize", "nf4"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert cli(["convert", str(source / "config.json"), str(tmp_path / "r"), "--quantize", "nf4"]) == 2
    assert "no model folder" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_disk_that_loses_a_bit_is_noticed(tmp_path: Path, monkeypatch) -> None:
    from test_quant import written

    source = written(tmp_path / "m", "llama")
    written_once = shards.save_file

    def broken(tensors, path, **about):
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].clone()
        tensors[name][7] ^= 1
        written_once(tensors, path, **about)

    monkeypatch.setattr(shards, "save_file", broken)
    with pytest.raises(Failure, match=r"layers\.1\.mlp\.up_proj\.weight was not written as it was made"):
        quantize_folder(source, tmp_path / "q", table="nf4", progress=False)
    assert not (tmp_path / "q").exists()


def test_no_comparison_where_the_source_does_not_fit(tmp_path: Path, monkeypatch) -> None:
    from test_quant import written

    monkeypatch.setattr(quantize_files, "too_large", lambda *_: "no room")
    report = quantize_folder(written(tmp_path / "m", "llama"), tmp_path / "q", table="nf4", progress=False)
    assert (report.mean_kl, report.same_top) == (None, None)
