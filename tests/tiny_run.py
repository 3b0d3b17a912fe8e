"""A tiny model folder, a data file and the settings of a run of a second, for tests only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_tokenizers import chatml
from transformers import AutoModelForCausalLM, LlamaConfig

from loraloom import api
from loraloom.config import resolve
from loraloom.model_files import read_json
from loraloom.rundir import Run
from loraloom.workshop import Workshop, build

WIDTH = 32


def make_model(folder: Path, *, tied: bool = True, tokenizer: bool = True, **changes: Any) -> Path:
    """A random Llama of two layers with a tokenizer of 500 tokens, as transformers writes it."""
    words = chatml()
    shape: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**shape | changes))
    with torch.no_grad():
        for parameter in model.parameters():  # drawn widely, so that answers depend on their prompts
            parameter.copy_(torch.randn(parameter.shape) * 0.15 + (parameter.dim() == 1))
    model.save_pretrained(folder)
    if tokenizer:
        words.save_pretrained(folder)
    return folder


def make_data(path: Path, rows: int = 24) -> Path:
    """Rows that differ, of different lengths."""
    lines = []
    for i in range(rows):
        question = f"what is {i} and {i * 7 % 10}" + " and two" * (i % 4)
        lines.append({"prompt": question, "completion": f"the answer is {i + i * 7 % 10}" + "!" * (i % 3)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(model: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Ten quick steps in float32, two epochs of 20 rows; `train__save_every=2` sets train.save_every."""
    chosen = {
        "model": str(model),
        "data": str(data),
        "output": str(output),
        "r": 4,
        "model.dtype": "float32",
        "data.eval": 4,
        "train.max_steps": 10,
        "train.batch_size": 4,
        "train.learning_rate": 5e-3,
        "eval.every": 2,
        "eval.max_new_tokens": 4,
    }
    return chosen | {key.replace("__", "."): value for key, value in changes.items()}


def make_shop(model: Path, data: Path, **changes: Any) -> Workshop:
    """A workshop without a run folder."""
    config, _ = resolve(None, settings(model, data, Path("unused"), **changes))
    return build(config, offline=True, progress=False)


def run_tiny(model: Path, data: Path, output: Path, **changes: Any) -> Run:
    """A whole run."""
    listen = changes.pop("listen", api.silent)
    return api.train(settings=settings(model, data, output, **changes), offline=True, listen=listen)


def adapter_bytes(run: Run) -> bytes:
    return (run.adapter_path / "adapter_model.safetensors").read_bytes()


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what differs from machine to machine."""
    return [{k: v for k, v in one.items() if k not in ("seconds", "memory")} for one in records]


def progress_of(run: Run) -> dict[str, Any]:
    latest = run.latest()
    assert latest is not None
    return dict(read_json(latest[1] / "progress.json"))
