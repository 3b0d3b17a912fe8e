"""Tiny random causal models, a tiny byte-level tokenizer and stand-ins for adapters, for tests only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

PAD, END = 256, 257  # the two ids after the 256 bytes
VOCABULARY = 258
CONTEXT = 96


def causal(kind: str = "llama", *, attention: str = "sdpa", seed: int = 0, scale: float = 6.0) -> Any:
    """A random model of two layers; its weights are scaled up so that answers depend on their prompts."""
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }
    wide = {"intermediate_size": 64}
    config: Any = {
        "llama": lambda: LlamaConfig(**shape, **wide, num_key_value_heads=2),
        "qwen2": lambda: Qwen2Config(**shape, **wide, num_key_value_heads=2),
        "neox": lambda: GPTNeoXConfig(**shape, **wide),
        "gpt2": lambda: GPT2Config(**shape, n_inner=64),
    }[kind]()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, a padding token and an end token."""
    alphabet = bytes_to_unicode()
    vocabulary = {alphabet[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable character for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(rest)}


class FakeAdapters:
    """Low-rank updates on a model's output layer by a forward hook, switched like adapt.Adapters."""

    def __init__(self, model: Any, names: tuple[str, ...] = ("a",), scale: float = 0.3) -> None:
        head = model.get_output_embeddings()
        generator = torch.Generator().manual_seed(7)
        size = (head.weight.shape[0], head.weight.shape[1])
        self.deltas = {
            name: scale * torch.randn(size, generator=generator).to(head.weight.dtype) for name in names
        }
        self.names, self.active, self.rows = list(names), names[0] if names else None, None
        self.routes: list[list[str | None]] = []
        head.register_forward_hook(self.add)

    def add(self, _module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        rows = self.rows if self.rows is not None else [self.active] * output.shape[0]
        return torch.stack(
            [
                y if name is None else y + x @ self.deltas[name].T
                for x, y, name in zip(inputs[0], output, rows, strict=True)
            ]
        )

    def eval(self) -> None:
        """There is no dropout to turn off."""

    @contextmanager
    def disabled(self) -> Iterator[None]:
        saved, self.active = self.active, None
        try:
            yield
        finally:
            self.active = saved

    def use(self, name: str | None) -> None:
        self.active = name

    def inserts(self, name: str) -> tuple[int, int]:
        return 0, 0

    @contextmanager
    def routed(self, names: list[str | None]) -> Iterator[None]:
        self.rows = list(names)
        self.routes.append(list(names))
        try:
            yield
        finally:
            self.rows = None
