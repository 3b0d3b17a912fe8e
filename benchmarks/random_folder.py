"""A model folder with random weights of a Llama's shape and a small tokenizer, as a hub would give it: safetensors.

Weights are drawn on the device and written layer by layer, four files at a time: 13.5 GB for 7B. A folder that is
whole is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def write_folder(folder: Path, config: Any, *, device: str, tokenizer: Callable[[int], Any]) -> Path:
    """The folder of a Llama config with weights of std 0.02, bf16; norms are ones.

    tokenizer  given the size of the vocabulary, one that transformers can save
    """
    import torch
    from safetensors.torch import save_file

    if (folder / INDEX).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures, config.dtype, config.pad_token_id = ["LlamaForCausalLM"], torch.bfloat16, 3
    config.save_pretrained(folder)
    tokenizer(config.vocab_size).save_pretrained(folder)
    index: dict[str, str] = {}
    total, jobs = 0, []
    with ThreadPoolExecutor(4) as pool:
        for name, tensors in shards(config, device):
            jobs.append(pool.submit(save_file, tensors, folder / name, metadata={"format": "pt"}))
            index |= dict.fromkeys(tensors, name)
            total += sum(t.numel() * t.element_size() for t in tensors.values())
            while len(jobs) > 8:  # so that the host never holds much of the model
                jobs.pop(0).result()
        for job in jobs:
            job.result()
    about = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / INDEX).write_text(
        json.dumps(about), encoding="utf-8"
    )  # last: a folder without it is written anew
    return folder


def shards(config: Any, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """File names and their tensors by the names that transformers gives them."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    hidden, inter = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads

    def rand(rows: int, columns: int) -> Any:
        drawn = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        return drawn.normal_(0, 0.02, generator=generator).cpu()

    def ones() -> Any:
        return torch.ones(hidden, dtype=torch.bfloat16)

    ends = {"model.embed_tokens.weight": rand(config.vocab_size, hidden), "model.norm.weight": ones()}
    if not config.tie_word_embeddings:
        ends["lm_head.weight"] = rand(config.vocab_size, hidden)
    yield "ends.safetensors", ends
    sizes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden)}
    sizes |= {"self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden)}
    sizes |= {
        "mlp.gate_proj": (inter, hidden),
        "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
    }
    for i in range(config.num_hidden_layers):
        path = f"model.layers.{i}"
        layer = {f"{path}.{name}.weight": rand(*size) for name, size in sizes.items()}
        layer |= {f"{path}.{norm}.weight": ones() for norm in ("input_layernorm", "post_attention_layernorm")}
        yield f"layer{i:02d}.safetensors", layer


def byte_tokenizer(vocab: int) -> Any:
    """One token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    return named(own)


def word_tokenizer(vocab: int) -> Any:
    """One token for each word between blanks: w0, w1 ... as many as the vocabulary holds."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = SPECIAL + [f"w{i}" for i in range(vocab - len(SPECIAL))]
    own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return named(own)


def named(own: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    unk, bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=own, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad
    )
