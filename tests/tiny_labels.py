"""A tiny encoder folder, rows with labels and the settings of a short run, for tests only."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from loraloom import api
from loraloom.rundir import Run

WORDS = 40
LENGTH = 40
SHAPE = {"vocab_size": WORDS + 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = SHAPE | {"intermediate_size": 48, "pad_token_id": 0}
CONFIGS: dict[str, Any] = {
    "bert": lambda: tf.BertConfig(**ENCODER, max_position_embeddings=LENGTH),
    "roberta": lambda: tf.RobertaConfig(**ENCODER, max_position_embeddings=LENGTH + 1, type_vocab_size=1),
    "deberta": lambda: tf.DebertaV2Config(
        **ENCODER,
        max_position_embeddings=LENGTH,
        type_vocab_size=0,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        pooler_hidden_size=32,
    ),
    "llama": lambda: tf.LlamaConfig(**ENCODER, num_key_value_heads=2, bos_token_id=2, eos_token_id=3),
}


def tokenizer(*, pairs: bool = True) -> PreTrainedTokenizerFast:
    """Words w0 .. w39, written as [CLS] text [SEP] pair [SEP]; with `pairs` the model is told which is which."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(WORDS))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    told = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=LENGTH, **marks)
    told.model_input_names = ["input_ids", *(["token_type_ids"] if pairs else []), "attention_mask"]
    return told


def make_encoder(folder: Path, kind: str = "bert") -> Path:
    """A random base model without a head, its weights wide enough that answers depend on the text.

    Llama's tokenizer says which text a token is of, as many do whose model does not ask.
    """
    torch.manual_seed(0)
    model: Any = tf.AutoModel.from_config(CONFIGS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    model.save_pretrained(folder)
    tokenizer(pairs=kind in ("bert", "llama")).save_pretrained(folder)
    return folder


def rows(
    count: int = 120, *, numbers: bool = False, paired: bool = False, seed: int = 0
) -> list[dict[str, Any]]:
    """Texts in which one word says the label: w7 is good, w8 bad, or w0 to w9 a number."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        words = [f"w{draw.randrange(10, WORDS)}" for _ in range(draw.randrange(2, 9))]
        good = draw.random() < 0.4
        sign = draw.randrange(10) if numbers else 7 if good else 8
        words.insert(draw.randrange(len(words) + 1), f"w{sign}")
        row: dict[str, Any] = {
            "text": " ".join(words),
            "label": sign / 2 if numbers else "good" if good else "bad",
        }
        if paired:
            half = len(words) // 2
            row = {
                "sentence1": " ".join(words[:half]),
                "sentence2": " ".join(words[half:]),
                "label": row["label"],
            }
        found.append(row)
    return found


def make_rows(path: Path, items: list[dict[str, Any]] | None = None) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in items or rows()))
    return path


def settings(model: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Twelve quick steps in float32; `train__save_every=2` sets train.save_every."""
    chosen = {
        "task": "classification",
        "model": str(model),
        "data": str(data),
        "output": str(output),
        "r": 4,
        "target_modules": "q,v",
        "model.dtype": "float32",
        "data.eval": 30,
        "train.max_steps": 12,
        "train.batch_size": 8,
        "train.learning_rate": 1e-2,
        "eval.every": 4,
        "train.early_stop": None,
    }
    return chosen | {key.replace("__", "."): value for key, value in changes.items()}


def run_tiny(model: Path, data: Path, output: Path, **changes: Any) -> Run:
    listen = changes.pop("listen", api.silent)
    return api.train(settings=settings(model, data, output, **changes), offline=True, listen=listen)
