"""Loading and writing models: what comes in is whole, frozen and quiet, and each thing that can be wrong is said."""

import json
import warnings
from pathlib import Path

import model_folders
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from loraloom import pretrained
from loraloom.config import ModelConfig
from loraloom.errors import UserError
from loraloom.facts import model_facts
from loraloom.model import load_model, load_tokenizer, pad_id, pick_device, pick_dtype, stop_ids, write_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folders.folder(tmp_path / "base")


def refused(folder: Path | str, **settings: object) -> UserError:
    with pytest.raises(UserError) as caught:
        load_model(ModelConfig(id=str(folder), **settings), offline=True)
    return caught.value


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_a_loaded_model_is_the_saved_one_frozen_and_quiet(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture
) -> None:
    folder = model_folders.folder(tmp_path / "base", kind)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_model(ModelConfig(id=str(folder), device="cpu"))
    assert capfd.readouterr() == ("", "")
    ids = torch.arange(20)[None]
    assert torch.equal(loaded.model(ids).logits, model_folders.model(kind)(ids).logits)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (loaded.dtype, loaded.device, loaded.notes) == (torch.float32, torch.device("cpu"), [])
    assert loaded.reason == "float32: this CPU has no instructions for bfloat16, and is slower in it"
    assert (loaded.source.kind, loaded.source.id) == ("folder", str(folder))
    assert loaded.tokenizer("x\n\n1")["input_ids"] == model_folders.tokenizer()("x\n\n1")["input_ids"]


def test_number_format_and_attention_as_set(folder: Path) -> None:
    loaded = load_model(ModelConfig(id=str(folder), dtype="bfloat16", device="cpu", attention="eager"))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.reason == "bfloat16: as set"
    assert loaded.model.config._attn_implementation == "eager"


def test_auto_format_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, it=capability: it)
        assert pick_dtype("auto", torch.device("cuda"))[0] == expected


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "tpu:0"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match=r"model\.device"):
        pick_device(name)


def test_no_request_is_made_for_a_local_folder(folder: Path, no_sockets: None) -> None:
    load_model(ModelConfig(id=str(folder)), offline=True)
    load_model(ModelConfig(id=str(folder)))


def test_a_missing_weight_is_an_error_and_not_a_random_number(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    error = refused(folder)
    assert "1 weights of the model are not in its files" in error.message
    assert error.details == ["missing: model.layers.1.mlp.up_proj.weight"]


def test_a_weight_of_another_shape_is_an_error(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    assert "of another shape: model.layers.0.mlp.up_proj.weight" in refused(folder).details


def test_weights_without_a_place_are_noted(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(
        {**state, "score.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    loaded = load_model(ModelConfig(id=str(folder)))
    assert loaded.notes == ["1 weights in the files have no place in the model: score.weight"]


def test_a_new_head_may_be_missing_where_it_is_named(folder: Path) -> None:
    config = ModelConfig(id=str(folder))
    with pytest.raises(UserError, match="not in its files"):
        load_model(config, task="classify", num_labels=3)
    loaded = load_model(config, task="classify", num_labels=3, new_weights=["score"])
    assert loaded.model.score.weight.shape == (3, 64)


def test_a_folder_without_weights_config_or_tokenizer(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "kept")
    assert "has a config.json and no weights" in refused(folder).message
    (tmp_path / "kept").rename(folder / "model.safetensors")
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused(folder).message
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(folder).message
    (tmp_path / "empty").mkdir()
    assert "it holds: nothing" in str(refused(tmp_path / "empty"))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    model_folders.model().save_pretrained(folder, max_shard_size="60KB")
    model_folders.tokenizer().save_pretrained(folder)
    load_model(ModelConfig(id=str(folder)))
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    assert gone.name in refused(folder).details


def test_broken_files_are_said_without_a_traceback(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "transformers cannot load" in refused(folder).message
    (folder / "tokenizer.json").write_text("{")
    assert "transformers cannot load" in refused(folder).message
    (folder / "config.json").write_text("{")
    assert "cannot be read as JSON" in refused(folder).message
    (folder / "config.json").write_text('{"model_type": "from-the-future"}')
    (folder / "tokenizer.json").unlink()
    model_folders.tokenizer().save_pretrained(folder)
    assert "pip install -U transformers" in str(refused(folder))


def test_code_in_a_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "code of its own, which is never run" in str(refused(folder))
    assert not marker.exists()


def test_bin_weights_only_when_asked_for(folder: Path) -> None:
    torch.save(model_folders.model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    error = refused(folder)
    assert "only as .bin files" in error.message
    assert "loraloom convert" in str(error.hint)
    assert "model.allow_pickle=true" in str(error.hint)
    loaded = load_model(ModelConfig(id=str(folder), allow_pickle=True))
    ids = torch.arange(9)[None]
    assert torch.equal(loaded.model(ids).logits, model_folders.model()(ids).logits)


def test_safetensors_come_before_bin(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    load_model(ModelConfig(id=str(folder), allow_pickle=True))


def test_an_adapter_names_its_base(tmp_path: Path, folder: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "meta/llama"}')
    assert "'meta/llama'" in str(refused(adapter))
    (folder / "adapter_config.json").write_text("{}")
    assert "holds a model and an adapter" in refused(folder).message


def test_gguf_and_quantised_models_are_sent_elsewhere(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    assert f"loraloom convert {path} {tmp_path / 'm'}" in str(refused(path))
    alone = tmp_path / "alone"
    alone.mkdir()
    path.rename(alone / "m.gguf")
    assert "loraloom convert" in str(refused(alone))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq"}})
    )
    assert "quantised weights (gptq)" in refused(folder).message


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    folder = model_folders.folder(tmp_path / "base", vocab_size=200)
    assert "ids up to 263, and the model has 200 rows" in refused(folder).message


def test_pad_and_stop_ids(folder: Path) -> None:
    loaded = load_model(ModelConfig(id=str(folder)))
    tokenizer = loaded.tokenizer
    assert pad_id(tokenizer) == 2
    assert stop_ids(loaded.model, tokenizer) == [2]
    loaded.model.generation_config.eos_token_id = [5, 7]
    tokenizer.eos_token = "<|endoftext|>"
    assert stop_ids(loaded.model, tokenizer) == [5, 7, 0, 2]  # the template's turn end comes last
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert stop_ids(loaded.model, tokenizer) == [5, 7, 0]
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == 0
    tokenizer.eos_token = None
    assert pad_id(tokenizer) == 0
    assert json.loads((folder / "tokenizer_config.json").read_text())["pad_token"] == "<|im_end|>"


def test_a_written_folder_is_the_model(tmp_path: Path, folder: Path) -> None:
    loaded = load_model(ModelConfig(id=str(folder)))
    loaded.model.generation_config = GenerationConfig(eos_token_id=[2, 0], temperature=0.7, top_p=0.9)
    with pytest.raises(ValueError, match="do_sample"):  # what transformers does by itself
        loaded.model.save_pretrained(tmp_path / "crash")
    kept = loaded.model.generation_config
    write_model(loaded.model, loaded.tokenizer, tmp_path / "out")
    assert loaded.model.generation_config is kept
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids).logits, loaded.model(ids).logits)
    assert again.generation_config.eos_token_id == [2, 0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == model_folders.TEMPLATE
    assert not list(tmp_path.glob(".*"))
    write_model(loaded.model, loaded.tokenizer, tmp_path / "out")  # in place of the old one


@pytest.mark.parametrize(
    "flag", [{"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.1}, {"min_p": 0.1}, {"typical_p": 0.9}]
)
def test_sampling_settings_without_sampling_can_be_saved(tmp_path: Path, flag: dict) -> None:
    generation = GenerationConfig(do_sample=False, eos_token_id=3, **flag)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pretrained.valid_generation(generation).save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 3
    sampling = GenerationConfig(do_sample=True, **flag)
    kept = pretrained.valid_generation(sampling)
    assert {name: getattr(kept, name) for name in flag} == flag


def test_tokenizer_without_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(tmp_path)


def test_facts(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# Card\n")
    facts = model_facts(folder, offline=True)
    model = model_folders.model()
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.bytes == (folder / "model.safetensors").stat().st_size
    assert (facts.architecture, facts.formats) == ("LlamaForCausalLM", ["F32"])
    assert (facts.licence, facts.chat_template, facts.context_length) == ("mit", True, 128)
    json.dumps(facts.to_json())
    (folder / "README.md").write_text("# No front matter\n---\nlicense: mit\n---\n")
    assert model_facts(folder).licence is None
