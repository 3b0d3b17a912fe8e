"""Tiny model folders, GGUF files and a tiny hub on the loopback, for tests only."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from loraloom.adapt import Adapters
from loraloom.adapter import AdapterSpec
from loraloom.adapter_io import save_adapter

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("Ċ", "Ċ"), ("1", "2"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def tokens() -> list[str]:
    return [*SPECIAL, *alphabet(), *(left + right for left, right in MERGES)]


def tokenizer() -> Any:
    """Byte-level BPE of 264 tokens; digits stand alone."""
    built = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens())}, merges=MERGES))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


def model(kind: str = "llama", *, tied: bool = True, **changes: Any) -> Any:
    """A random model of two layers."""
    wide: dict[str, Any] = {
        "vocab_size": len(tokens()),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    decoder = {"num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128}
    config: Any = {
        "llama": lambda: LlamaConfig(**{**wide, **decoder, **changes}),
        "qwen2": lambda: Qwen2Config(**{**wide, **decoder, **changes}),
        "qwen3": lambda: Qwen3Config(**{**wide, **decoder, "head_dim": 32, **changes}),
        "gpt2": lambda: GPT2Config(**{**wide, "n_inner": 96, "n_positions": 128, **changes}),
    }[kind]()
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():  # biases and norms too: their defaults would hide a mix-up
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
    return made.eval()


def folder(path: Path, kind: str = "llama", **options: Any) -> Path:
    """A whole model folder as transformers writes it."""
    model(kind, **options).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def deep_folder(path: Path, layers: int, *, shard: int, targets: str | list[str] = "auto") -> str:
    """A Llama of so many layers of 4.5 MB in shards, and an adapter for it beside it, made without a model in memory.

    shard    bytes
    targets  target_modules of the adapter, in PATH-adapter
    """
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=512,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(path, max_shard_size=shard)
    tokenizer().save_pretrained(path)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    adapters = Adapters(skeleton, device="cpu")
    adapters.add("default", AdapterSpec(r=2, target_modules=targets))
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=gen) / 64)
    about = {"quantize": "nf4", "dtype": "bfloat16"}
    save_adapter(adapters, Path(f"{path}-adapter"), base_model=str(path), trained_on=about)
    return str(path)


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of Llama models."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, source: Any, *, pre: str | None = "smollm", quantise: str = "F32", **fields: Any
) -> Path:
    """A GGUF file of a model, by the gguf package, as llama.cpp's converter would write it."""
    import gguf

    config = source.config
    kind = config.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if kind == "gpt2":
        writer.add_feed_forward_length(config.n_inner)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if kind == "qwen3":
        writer.add_key_length(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens())
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens()])
    writer.add_token_merges([f"{left} {right}" for left, right in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for key, value in fields.items():
        getattr(writer, key)(value)
    add_tensors(writer, source, quantise)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensors(writer: Any, source: Any, quantise: str) -> None:
    import gguf

    config = source.config
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, weight in source.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weight.numpy()
        if config.model_type == "gpt2" and array.ndim == 2 and ".h." in name:
            array = array.T
        if config.model_type == "llama" and "q_proj" in name:
            array = permute(array, config.num_attention_heads)
        if config.model_type == "llama" and "k_proj" in name:
            array = permute(array, config.num_key_value_heads)
        kind = gguf.GGMLQuantizationType[quantise if array.ndim == 2 else "F32"]
        writer.add_tensor(
            table.get_name(name, try_suffixes=(".weight", ".bias")),
            gguf.quants.quantize(np.ascontiguousarray(array), kind),
            raw_dtype=kind,
        )


@contextmanager
def fake_hub(models: dict[str, Path | int]) -> Iterator[Any]:
    """A hub on 127.0.0.1 that serves folders by id; a number is the error that it answers with.

    Yields an object with `url`, `commit` (of every model) and `requests`, the list of paths asked for.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = unquote(urlparse(self.path).path)
            server.requests.append(f"{self.command} {path}")
            name = next((name for name in models if f"/{name}/" in f"{path}/"), None)
            place = models.get(name) if name else None
            if place is None:
                return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
            if isinstance(place, int):
                return self.send(place, b"{}", {"X-Error-Code": "GatedRepo"} if place == 403 else {}, body)
            if "/revision/" in path and path.rsplit("/", 1)[1] not in ("main", server.commit):
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            names = sorted(item.name for item in place.iterdir())
            if "/resolve/" in path:
                return self.file(place / path.rsplit("/", 1)[1], body)
            if "/tree/" in path:
                tree = [
                    {
                        "type": "file",
                        "path": item,
                        "size": (place / item).stat().st_size,
                        "oid": etag(place / item),
                    }
                    for item in names
                ]
                return self.send(200, json.dumps(tree).encode(), {}, body)
            info = {
                "_id": "1",
                "id": name,
                "sha": server.commit,
                "siblings": [{"rfilename": item} for item in names],
            }
            return self.send(200, json.dumps(info).encode(), {}, body)

        def file(self, path: Path, body: bool) -> None:
            if not path.is_file():
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": server.commit, "Accept-Ranges": "bytes"}
            return self.send(200, path.read_bytes(), headers, body)

        def send(self, code: int, data: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.commit, server.requests = "c0ffee" + "0" * 34, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()
