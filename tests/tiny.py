"""Tiny random transformers models by family, float32, in eval mode, the same for the same seed. No tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

from loraloom.quant import Weight4

VOCAB = 50
WIDTH, HEADS, LAYERS = 16, 4, 2
PLAIN = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
PLAIN |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MLP = {"intermediate_size": 24}
GPT2 = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BERT = PLAIN | MLP | {"max_position_embeddings": 40, "hidden_dropout_prob": 0.0}
BERT |= {"attention_probs_dropout_prob": 0.0, "num_labels": 3}
FALCON = PLAIN | {"alibi": False, "attention_dropout": 0.0, "hidden_dropout": 0.0}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**PLAIN, **MLP, num_key_value_heads=2, tie_word_embeddings=False),
    "llama-tied": lambda: tf.LlamaConfig(**PLAIN, **MLP, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": lambda: tf.GPT2Config(**GPT2),
    "neox": lambda: tf.GPTNeoXConfig(**PLAIN, **MLP, max_position_embeddings=32),
    "falcon-new": lambda: tf.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "falcon-7b": lambda: tf.FalconConfig(
        **FALCON, new_decoder_architecture=False, multi_query=True, bias=True
    ),
    "falcon-rw": lambda: tf.FalconConfig(
        **FALCON, new_decoder_architecture=False, multi_query=False, bias=True
    ),
    "phi3": lambda: tf.Phi3Config(
        **PLAIN, **MLP, num_key_value_heads=2, max_position_embeddings=32, original_max_position_embeddings=32
    ),
    "bloom": lambda: tf.BloomConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS, bos_token_id=1, eos_token_id=2
    ),
    "bigcode-mqa": lambda: tf.GPTBigCodeConfig(**GPT2, multi_query=True),
    "bigcode-mha": lambda: tf.GPTBigCodeConfig(**GPT2, multi_query=False),
    "mpt": lambda: tf.MptConfig(
        vocab_size=VOCAB, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, max_seq_len=32
    ),
    "bert": lambda: tf.BertConfig(**BERT),
    "bert-cls": lambda: tf.BertConfig(**BERT),
    "roberta-cls": lambda: tf.RobertaConfig(**BERT),
}
FUSED = ["gpt2", "neox", "falcon-new", "falcon-7b", "falcon-rw", "phi3", "bloom"]
FUSED += ["bigcode-mqa", "bigcode-mha", "mpt"]
CAUSAL = ["llama", "llama-tied", *FUSED]


def build(kind: str, *, seed: int = 0) -> Any:
    """A model whose every parameter is drawn, biases and norms too, so that no term of a formula hides."""
    config = CONFIGS[kind]()
    auto: Any = tf.AutoModelForCausalLM
    if kind.endswith("-cls"):
        auto = tf.AutoModelForSequenceClassification
    elif kind == "bert":
        auto = tf.AutoModelForMaskedLM
    torch.manual_seed(seed)
    model = auto.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            around = 1.0 if parameter.dim() == 1 and parameter.std() == 0 and parameter.mean() == 1 else 0.0
            parameter.copy_(around + 0.2 * torch.randn(parameter.shape))
    return model.eval()


def ids(*, rows: int = 3, length: int = 7, seed: int = 5) -> torch.Tensor:
    """Token ids (rows, length) without padding."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def stir(adapters: Any, *names: str, seed: int = 9, size: float = 0.1) -> None:
    """Move every trained tensor of the adapters (all of them without a name) away from its start."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters(*names):
            noise = torch.randn(parameter.shape, generator=gen, dtype=parameter.dtype) * size
            parameter.add_(noise.to(parameter.device))


def digest(model: torch.nn.Module) -> dict[str, bytes]:
    """The bits of every tensor of a model."""
    bits = {}
    for name, tensor in model.state_dict().items():
        parts = tensor.codes.tensors() if isinstance(tensor, Weight4) else [tensor]
        flat = [part.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for part in parts]
        bits[name] = torch.cat(flat).numpy().tobytes()
    return bits
