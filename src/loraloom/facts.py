"""What a model is, from its small files and the headers of its weights; no weight is read."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from .hub import resolve
from .model_files import find_weights, read_config, read_json

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class ModelFacts:
    id: str
    path: str
    commit: str | None
    architecture: str
    parameters: int | None  # None for .bin weights, which have no readable header
    formats: list[str]
    bytes: int  # of the weight files
    licence: str | None
    chat_template: bool
    context_length: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def model_facts(name: str | Path, *, revision: str | None = None, offline: bool = False) -> ModelFacts:
    """The facts of a model folder, a Hugging Face id (fetched if needed) or the small model.

    raises  UserError if it is no model
    """
    found = resolve(str(name), revision=revision, offline=offline)
    folder = found.path
    config = read_config(folder)
    weights = find_weights(folder)
    parameters, formats = None, []
    if weights.kind == "safetensors":
        headers = [read_header(path) for path in weights.paths]
        tensors = [item for header in headers for item in header.values()]
        parameters = sum(math.prod(item["shape"]) for item in tensors)
        formats = sorted({item["dtype"] for item in tensors})
    text = config.get("text_config") or config
    return ModelFacts(
        id=found.id,
        path=str(folder),
        commit=found.commit,
        architecture=(config.get("architectures") or [config["model_type"]])[0],
        parameters=parameters,
        formats=formats,
        bytes=weights.bytes,
        licence=licence(folder),
        chat_template=has_template(folder),
        context_length=next((int(text[key]) for key in CONTEXT_KEYS if text.get(key)), None),
    )


def read_header(path: Path) -> dict[str, Any]:
    """Name to {dtype, shape} of a safetensors file.

    source  the safetensors format: 8 bytes of length (little endian), then that much JSON
    """
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return header


def licence(folder: Path) -> str | None:
    """The licence that the model card's front matter names."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    if len(lines) < 3 or lines[0].strip():
        return None
    try:
        front = yaml.safe_load(lines[1])
    except yaml.YAMLError:
        return None
    if not isinstance(front, dict) or not front.get("license"):
        return None
    value = front["license"]
    return str(front.get("license_name") or value) if value == "other" else str(value)


def has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(read_json(path).get("chat_template"))
