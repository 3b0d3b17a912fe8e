"""The sources of a conversion: a GGUF file, or a folder with .bin or safetensors weights.

Each says what it holds, gives its weights one at a time, writes everything beside the weights, and loads
itself as a model for the comparison.
"""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from . import files, gguf_model, gguf_tokenizer
from .errors import UserError
from .model_files import find_weights, has_tokenizer, read_config
from .pretrained import from_folder, turn_end, write_generation, write_tokenizer

PROBE = 16  # tokens of the short input
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "README.md", "chat_templates")


class Source:
    """What the converter asks of a source."""

    kind: str
    path: Path
    formats: list[str]
    count: int
    dtype: torch.dtype | None  # the result's format unless the user names one; None: as each tensor is
    config: dict[str, Any]
    checks: list[str]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        raise NotImplementedError

    def write_rest(self, folder: Path, dtype: torch.dtype | None) -> None:
        raise NotImplementedError

    def load_source(self, dtype: torch.dtype | None) -> Any:
        raise NotImplementedError

    def load_folder(self, folder: Path, dtype: torch.dtype | None) -> Any:
        """The model in a folder, in `dtype`, by transformers itself."""
        kind = find_weights(folder).kind
        model, report = from_folder(
            model_class(self.config),
            folder,
            dtype=dtype or "auto",
            use_safetensors=kind == "safetensors",
            output_loading_info=True,
        )
        if missing := sorted(report["missing_keys"]):
            raise UserError(f"{folder}: {len(missing)} weights are missing", details=missing[:8])
        return model

    def outputs(self, load: Callable[[], Any]) -> Tensor:
        """The model's first output (logits, or hidden states) on a short input, in float32: (1, T, width)."""
        model = load().float().eval()
        words = int(model.config.get_text_config().vocab_size)
        ids = (torch.arange(1, PROBE + 1) * 7919 % words)[None]
        result = model(ids, use_cache=False)[0] if causal(self.config) else model(ids)[0]
        del model
        gc.collect()
        return result


def causal(config: dict[str, Any]) -> bool:
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.get("architectures") or [])


def model_class(config: dict[str, Any]) -> Any:
    """transformers' class for a config.json, never code from the folder."""
    for name in config.get("architectures") or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModel


def open_source(path: Path, *, tokenizer: str | Path | None, allow_pickle: bool) -> Source:
    """raises  UserError if there is nothing to convert, or only .bin files and `allow_pickle` is not given"""
    if path.is_file():
        if path.suffix == ".gguf":
            return GgufSource(path, tokenizer)
        raise UserError(f"{path} is neither a GGUF file nor a model folder")
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    weights = find_weights(path)
    if weights.kind == "none":
        raise UserError(
            f"{path} holds no weights", hint="looked for .safetensors, pytorch_model.bin and .gguf files"
        )
    if weights.kind == "gguf":
        if len(weights.paths) > 1:
            raise UserError(
                f"{path} holds {len(weights.paths)} GGUF files",
                details=[item.name for item in weights.paths[:8]],
                hint="give one file; join the parts of a split one first (llama-gguf-split --merge)",
            )
        return GgufSource(weights.paths[0], tokenizer)
    if tokenizer:
        raise UserError("a tokenizer can only be given for a GGUF file", hint=f"put its files into {path}")
    if weights.kind == "bin" and not allow_pickle:
        raise UserError(
            f"{path} has its weights only as .bin files, which are programs that could do anything when read",
            hint=f"if you trust where they come from: loraloom convert {path} DST --allow-pickle",
        )
    return FolderSource(path)


class GgufSource(Source):
    """A GGUF file; its config and tokenizer are rebuilt from its settings."""

    kind = "gguf"

    def __init__(self, path: Path, tokenizer: str | Path | None) -> None:
        self.path = path
        self.file = gguf_model.open_gguf(path)
        self.config = gguf_model.model_config(self.file)
        self.formats = self.file.kinds
        kept = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        # 8 bits of mantissa are finer than any quantised format's own steps, and as small as 16 bits get.
        self.dtype = kept.get(self.formats[0], torch.bfloat16)
        self.tokenizer = self.read_tokenizer(tokenizer)
        settings = dict(self.config)
        self.model_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        empty = self.empty()
        tied = empty.all_tied_weights_keys
        self.shapes = {name: value.shape for name, value in empty.state_dict().items() if name not in tied}
        self.count = len(self.shapes)
        self.checks = ["the tokenizer gives texts back unchanged"]

    def empty(self) -> Any:
        with torch.device("meta"):
            return model_class(self.config)(self.model_config)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return gguf_model.tensors(self.file, self.shapes)

    def load_source(self, dtype: torch.dtype | None) -> Any:
        weights = {name: tensor.to(dtype or torch.float32) for name, tensor in self.tensors()}
        return model_class(self.config).from_pretrained(
            None, config=copy.deepcopy(self.model_config), state_dict=weights, dtype=dtype or torch.float32
        )

    def read_tokenizer(self, folder: str | Path | None) -> Any:
        if folder is not None:
            if not has_tokenizer(Path(folder)):
                raise UserError(f"{folder} has no tokenizer files")
            tokenizer = from_folder(AutoTokenizer, Path(folder))
        else:
            built, settings = gguf_tokenizer.build_tokenizer(self.file)
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, **settings)
        if len(tokenizer) > self.config["vocab_size"]:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens and the model {self.config['vocab_size']}",
                hint="give the folder of the tokenizer that the model was made with",
            )
        check_round_trip(tokenizer)
        return tokenizer

    def write_rest(self, folder: Path, dtype: torch.dtype | None) -> None:
        config = copy.deepcopy(self.model_config)
        config.dtype = dtype
        config.architectures = self.config["architectures"]
        config.save_pretrained(folder)
        write_tokenizer(self.tokenizer, folder)
        ends = [
            self.tokenizer.eos_token_id,
            turn_end(self.tokenizer),
            *(self.file.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")),
        ]
        stops = [end for end in dict.fromkeys(ends) if end is not None]
        generation = GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=stops[0] if len(stops) == 1 else stops or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        write_generation(generation, folder)
        licence = self.file.fields.get("general.license")
        front = [*([f"license: {licence}"] if licence else []), "library_name: transformers"]
        name = self.file.fields.get("general.name") or self.path.stem
        text = f"# {name}\n\nConverted by LoRALoom from {self.path.name} ({', '.join(self.formats)})."
        files.write_text(folder / "README.md", "\n".join(["---", *front, "---", "", text, ""]))


def check_round_trip(tokenizer: Any) -> None:
    """raises  UserError if a text does not survive encoding and decoding"""
    for text in ("Hello world", "x\n\n1", "  two spaces, 2026!", "naïve 東京 🙂"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if back != text:
            raise UserError(
                f"the tokenizer of the file turns {text!r} into {back!r}",
                hint="give --tokenizer FOLDER of the original model",
            )


class FolderSource(Source):
    """A transformers folder; only its weights are rewritten, every other file is copied as it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)
        if "quantization_config" in self.config:
            method = self.config["quantization_config"].get("quant_method")
            raise UserError(
                f"{path} holds quantised weights ({method}), which cannot be converted",
                hint="convert the model in its original format",
            )
        self.weights = find_weights(path)
        self.kind = self.weights.kind
        self.dtype = None
        self.checks = []
        seen = [(name, str(tensor.dtype).removeprefix("torch.")) for name, tensor in self.tensors()]
        self.count = len(seen)
        kinds = [kind for _, kind in seen]
        self.formats = sorted(set(kinds), key=kinds.count, reverse=True)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        read = read_bin if self.kind == "bin" else read_safetensors
        tied = self.tied_names()
        for path in self.weights.paths:
            for name, tensor in read(path):
                if name not in tied:
                    yield name, tensor

    def tied_names(self) -> set[str]:
        """Names that the model fills from another weight: safetensors folders hold tied weights once."""
        if not causal(self.config):
            return set()
        config = from_folder(AutoConfig, self.path)
        with torch.device("meta"):
            return set(model_class(self.config)(config).all_tied_weights_keys)

    def load_source(self, dtype: torch.dtype | None) -> Any:
        return self.load_folder(self.path, dtype)

    def write_rest(self, folder: Path, dtype: torch.dtype | None) -> None:
        for pattern in SMALL_FILES:
            for item in self.path.glob(pattern):
                if item.is_file() and not item.name.endswith(".index.json"):
                    shutil.copyfile(item, folder / item.name)
        if dtype is not None:
            config = {key: value for key, value in self.config.items() if key != "torch_dtype"}
            files.write_json(folder / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})


def read_bin(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a .bin file, read without running what it says (torch's weights_only)."""
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before 2020 are no zip archives and cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path} is not a plain file of weights: {first}",
            hint="it is broken, or holds code instead of weights; it was not run",
        ) from error
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            yield name, tensor


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a whole safetensors file: {error}", hint="fetch the model again"
        ) from error
