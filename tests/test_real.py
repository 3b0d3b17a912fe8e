"""The real small model: what tiny random ones cannot show. Slow; run by `make test-slow` and CI.

The model is the demo's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraloom import api
from loraloom.adapt import attach
from loraloom.adapter_io import load_adapter, save_adapter
from loraloom.config import DataConfig, ModelConfig
from loraloom.data import prepare
from loraloom.model import load_model, load_tokenizer
from loraloom.nll import honours_boundaries

pytestmark = [
    pytest.mark.slow,
    # PEFT reads an attribute that transformers has renamed
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
TEXT = "The capital of France is Paris, and the capital of Italy is"


@pytest.fixture(scope="module")
def ids(real_model: Path) -> torch.Tensor:
    return torch.tensor([load_tokenizer(real_model)(TEXT)["input_ids"]])


def moved(adapters) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_peft_computes_the_same_logits(
    real_model: Path, ids: torch.Tensor, tmp_path: Path, method: str
) -> None:
    model = load_model(ModelConfig(id=str(real_model), dtype="float32")).model
    adapters = attach(model, method, r=8, target_modules=["q", "v", "mlp"])
    moved(adapters)
    save_adapter(adapters, tmp_path / "adapter", base_model=str(real_model))
    ours = model(ids).logits
    base = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    # float32, thirty layers: sums in another order, measured at 2e-5 of logits up to 30
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert (
        ours - load_model(ModelConfig(id=str(real_model), dtype="float32")).model(ids).logits
    ).abs().max() > 1


def test_a_merged_folder_is_the_adapter_and_keeps_the_head_tied(
    real_model: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = load_model(ModelConfig(id=str(real_model), dtype="float32")).model
    adapters = attach(model, r=4)
    moved(adapters)
    save_adapter(adapters, tmp_path / "adapter", base_model=str(real_model))
    before = model(ids).logits
    result = api.merge(tmp_path / "adapter", tmp_path / "merged", dtype="float32", offline=True)
    assert result.ok, result.problems
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(ids).logits, before, rtol=1e-4, atol=1e-3)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template
    assert merged.generation_config.eos_token_id == tokenizer.eos_token_id == 2


def test_an_adapted_head_of_a_tied_model_is_merged_untied(
    real_model: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = load_model(ModelConfig(id=str(real_model), dtype="float32")).model
    table = model.get_input_embeddings().weight.clone()
    adapters = attach(model, r=4, target_modules=["head"])
    moved(adapters)
    save_adapter(adapters, tmp_path / "adapter", base_model=str(real_model))
    before = model(ids).logits
    assert api.merge(tmp_path / "adapter", tmp_path / "merged", dtype="float32", offline=True).ok
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(ids).logits, before, rtol=1e-4, atol=1e-3)
    assert torch.equal(merged.model.embed_tokens.weight, table)
    assert not torch.equal(merged.lm_head.weight, table)


def test_packing_keeps_its_documents_apart(real_model: Path) -> None:
    for attention in ("sdpa", "eager"):
        loaded = load_model(ModelConfig(id=str(real_model), dtype="float32", attention=attention))
        assert honours_boundaries(loaded.model, 49152) is None


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_few_steps_on_real_instructions_lower_the_held_out_loss(
    real_model: Path, real_instructions: Path, tmp_path: Path, quantize: str
) -> None:
    settings = {"data.limit": 200, "data.eval": 24, "data.max_length": 256, "data.max_lost": 0.5}
    settings |= {"train.max_steps": 6, "train.batch_size": 8, "train.learning_rate": 1e-3, "eval.every": 6}
    run = api.train(
        model=str(real_model),
        data=str(real_instructions),
        output=str(tmp_path / "run"),
        settings=settings | {"eval.max_new_tokens": 8, "model.quantize": quantize},
    )
    assert run.state["status"] == "done"
    assert run.state["best"]["loss"] < run.state["base_loss"] - 0.05
    adapters = load_adapter(load_model(ModelConfig(id=str(real_model))).model, run.adapter_path)
    assert len(adapters.adapters["default"].sites) == 210


def test_all_real_instructions_are_read_and_end(real_model: Path, real_instructions: Path) -> None:
    data = DataConfig(train=str(real_instructions))
    prepared = prepare(data, load_tokenizer(real_model), model_max_length=8192, progress=False)
    report = prepared.report
    assert report.read == 3102
    assert report.sources[0].format == "alpaca"
    assert report.all_ended
    assert report.train + report.eval + sum(problem.count for problem in report.problems) == 3102
