"""Prepared data on disk, under a key of everything it depends on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..files import digest, finish_folder, whole_folder, write_bytes, write_text
from .examples import Examples
from .label_examples import LabelledExamples
from .report import DataReport

VERSION = 1  # raise it when the same settings give other tokens, masks or reports
TENSORS = ("ids", "trained", "offsets", "answers")
LABELLED = ("ids", "types", "offsets", "labels")


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of what a tokenizer does to a text, its chat template included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    marks = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return digest(type(tokenizer).__name__, rules, marks, template)


def key_of(settings: Any, sources: Sequence[str], tokenizer: Any) -> str:
    """The name of the cache folder.

    settings  JSON-able: the data section, seed, the model's length
    sources   digests of the files' content
    """
    return digest(str(VERSION), json.dumps(settings, sort_keys=True), *sources, tokenizer_digest(tokenizer))[
        :32
    ]


def store(folder: Path, train: Examples, held: Examples, report: DataReport) -> None:
    """Write prepared data as one folder, whole or not at all.

    raises  Failure if the disk is full or the folder cannot be written
    """
    tensors: dict[str, Tensor] = {}
    for side, examples in (("train", train), ("eval", held)):
        tensors |= {f"{side}.{name}": getattr(examples, name).contiguous() for name in TENSORS}
    data = save(tensors)
    facts = json.dumps(
        {
            "tensors": digest(data),
            "train": train.rows,
            "eval": held.rows,
            "report": report.to_dict(),
            "issues": report.issues,
        }
    )
    with whole_folder(folder) as partial:
        write_bytes(partial / "tokens.safetensors", data)
        write_text(partial / "facts.json", json.dumps({"digest": digest(facts), "facts": facts}))


def store_labelled(folder: Path, examples: LabelledExamples) -> None:
    """Write labelled examples as one folder, whole or not at all.

    raises  Failure if the disk is full or the folder cannot be written
    """
    tensors = {name: getattr(examples, name).contiguous() for name in LABELLED}
    with whole_folder(folder) as partial:
        write_bytes(partial / "tokens.safetensors", save(tensors))
        write_text(partial / "rows.json", json.dumps(examples.rows))


def fetch_labelled(folder: Path) -> LabelledExamples | None:
    """Read what `store_labelled` wrote; None if it is not there, or is damaged."""
    finish_folder(folder)
    try:
        tensors = load((folder / "tokens.safetensors").read_bytes())
        names = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
        ids, types, offsets, labels = (tensors[name] for name in LABELLED)
        return LabelledExamples(ids, types, offsets, labels, names)
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


def fetch(folder: Path) -> tuple[Examples, Examples, DataReport] | None:
    """Read what `store` wrote; None if it is not there, or is damaged and has to be made again."""
    finish_folder(folder)
    try:
        shell = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        data = (folder / "tokens.safetensors").read_bytes()
        if shell["digest"] != digest(shell["facts"]):
            return None
        facts = json.loads(shell["facts"])
        if facts["tensors"] != digest(data):
            return None
        tensors = load(data)
        train, held = (
            Examples.from_tensors({name: tensors[f"{side}.{name}"] for name in TENSORS}, facts[side])
            for side in ("train", "eval")
        )
        report = DataReport.from_dict(facts["report"], facts["issues"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    report.cached = True
    return train, held, report
