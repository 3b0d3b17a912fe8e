"""Shapes of published models, to plan without any file: `loraloom plan --shape llama3-8b`.

source  GPT-3: Brown et al. 2020, arXiv:2005.14165, table 2.1, with GPT-2's vocabulary; its sparse attention is
        planned as dense. LLaMA: Touvron et al. 2023, arXiv:2302.13971, table 2. Llama 2: arXiv:2307.09288. Llama 3:
        arXiv:2407.21783, table 3. Mistral: arXiv:2310.06825. Widths of the MLP and heads of keys: the models' own
        config.json. tests/test_plan.py holds the published parameter counts against them
"""

from __future__ import annotations

from typing import Any

from .errors import UserError, did_you_mean
from .skeleton import make_shape


def llama(
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    kv: int,
    vocab: int = 32000,
    context: int = 4096,
    **more: Any,
) -> dict[str, Any]:
    """The fields of a config of Llama's kind."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        **more,
    }


LLAMA3 = {"vocab": 128256, "context": 8192}
LLAMA32 = {"vocab": 128256, "context": 131072, "tie_word_embeddings": True}

SHAPES: dict[str, dict[str, Any]] = {
    "gpt3-175b": {
        "model_type": "gpt2",
        "n_embd": 12288,
        "n_layer": 96,
        "n_head": 96,
        "n_positions": 2048,
        "vocab_size": 50257,
    },
    "llama-65b": llama(8192, 22016, 80, 64, 64, context=2048),
    "llama2-7b": llama(4096, 11008, 32, 32, 32),
    "llama2-13b": llama(5120, 13824, 40, 40, 40),
    "llama2-70b": llama(8192, 28672, 80, 64, 8),
    "llama3-8b": llama(4096, 14336, 32, 32, 8, **LLAMA3),
    "llama3-70b": llama(8192, 28672, 80, 64, 8, **LLAMA3),
    "llama3.2-1b": llama(2048, 8192, 16, 32, 8, **LLAMA32),
    "llama3.2-3b": llama(3072, 8192, 28, 24, 8, head_dim=128, **LLAMA32),
    "mistral-7b": llama(4096, 14336, 32, 32, 8, context=32768, model_type="mistral", sliding_window=None),
}


def published(name: str) -> Any:
    """The config of a published shape.

    raises  UserError if there is none of that name
    """
    if name not in SHAPES:
        raise UserError(f"there is no shape {name!r}", hint=did_you_mean(name, SHAPES))
    return make_shape(**SHAPES[name])
