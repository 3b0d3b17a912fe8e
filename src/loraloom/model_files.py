"""What stands in a model folder; nothing heavy is imported, so that `loraloom download` starts at once."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .adapter_files import about_base, is_adapter_folder
from .errors import UserError

Kind = Literal["safetensors", "bin", "gguf", "none"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


@dataclass(frozen=True)
class Weights:
    """The weight files of a folder, in the safest format that it has."""

    kind: Kind
    paths: list[Path]

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)


def find_weights(folder: Path) -> Weights:
    """Safetensors before .bin before GGUF.

    raises  UserError if an index names a shard that is not there
    """
    for kind, stem, suffix in (("safetensors", "model", ".safetensors"), ("bin", "pytorch_model", ".bin")):
        single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if single.is_file():
            return Weights(kind, [single])  # type: ignore[arg-type]
        if index.is_file():
            return Weights(kind, shards(index))  # type: ignore[arg-type]
    found = sorted(folder.glob("*.gguf"))
    return Weights("gguf", found) if found else Weights("none", [])


FORMATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as safetensors calls them


def stored_format(folder: Path) -> str | None:
    """The number format of most of a folder's weights; None if it is none that models compute in.

    config.json is asked only where the files do not say it: it is often wrong.
    """
    about, weights = read_config(folder), find_weights(folder)
    named = about.get("dtype") or about.get("torch_dtype")
    if weights.kind != "safetensors" or about.get("quantization_config"):
        return named if named in FORMATS.values() else None
    count: Counter[str] = Counter()
    for path in weights.paths:
        for tensor in read_header(path).values():
            count[tensor["dtype"]] += math.prod(tensor["shape"])
    found = [FORMATS[kind] for kind, _ in count.most_common() if kind in FORMATS]
    return found[0] if found else None


def read_header(path: Path) -> dict[str, Any]:
    """The names, formats and shapes in a safetensors file.

    raises  UserError if it is none
    """
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"{path} is not a whole safetensors file", hint="fetch the model again") from error
    return {name: about for name, about in header.items() if name != "__metadata__"}


def shards(index: Path) -> list[Path]:
    """The files that an index lists, in order."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} has no weight_map; the folder is broken") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{index.parent}: {len(missing)} of {len(names)} weight files are missing",
            details=missing[:8],
            hint="the download or copy was cut short: fetch the model again",
        )
    return [index.parent / name for name in names]


def read_json(path: Path) -> Any:
    """raises  UserError if the file is no JSON"""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    raises  UserError for a folder that is an adapter, or no model
    """
    path = folder / "config.json"
    if path.is_file():
        config = read_json(path)
        if not isinstance(config, dict) or not config.get("model_type"):
            raise UserError(f"{path} has no model_type; it is no transformers model")
        return config
    if is_adapter_folder(folder):
        base = about_base(folder).get("base_model_name_or_path")
        raise UserError(
            f"{folder} is an adapter, not a model",
            hint=f"its base is {base!r}: give that as the model, and this folder as the adapter",
        )
    if found := sorted(folder.glob("*.gguf")):
        raise gguf_given(found[0])
    raise UserError(
        f"{folder} has no config.json, so it is no transformers model",
        details=[f"it holds: {', '.join(sorted(item.name for item in folder.iterdir())[:8]) or 'nothing'}"],
        hint="give the folder that holds config.json and the weights",
    )


def gguf_given(path: Path) -> UserError:
    return UserError(
        f"{path} is a GGUF file, which cannot be trained on directly",
        hint=f"convert it first: loraloom convert {path} {path.with_suffix('')}",
    )


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)
