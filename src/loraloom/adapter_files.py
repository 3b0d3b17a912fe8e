"""An adapter's folder from outside: its files, its form, and what its own record says.

peft  adapter_config.json, adapter_model.safetensors: PEFT's own tensors
lora  the same two, holding a plain LoRA that computes the same; the exact tensors in loraloom.safetensors
own   loraloom.safetensors alone: PEFT has no such thing, and finds no adapter of its own here

loraloom.json stands beside each of them: the form, the method with its settings, the places it sits on. A folder
without it was written by another tool, and is read as PEFT reads it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
OWN = "loraloom.json"
OWN_WEIGHTS = "loraloom.safetensors"

PEFT, LORA, ALONE = FORMS = ("peft", "lora", "own")
FILES = {PEFT: (CONFIG, WEIGHTS), LORA: (CONFIG, WEIGHTS, OWN_WEIGHTS), ALONE: (OWN_WEIGHTS,)}
FORMAT = 2  # of loraloom.json; 1 knew only the form peft, and did not name it
AS_PEFT = f"delete {OWN} to read the folder as PEFT does"


@dataclass(frozen=True)
class Record:
    """loraloom.json.

    spec        the fields of an AdapterSpec
    trained_on  how the base was kept; empty for a dense one
    about       what adapter_config.json would say about the base, where there is none
    exported    form lora: the digest of adapter_model.safetensors as we wrote it
    """

    form: str
    spec: dict[str, Any]
    targets: list[str]
    trained_on: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    exported: str | None = None

    def to_dict(self) -> dict[str, Any]:
        found = {"format": FORMAT, "form": self.form, "spec": self.spec, "targets": self.targets}
        more = {"trained_on": self.trained_on, "about": self.about, "exported": self.exported}
        return found | {key: value for key, value in more.items() if value}


def is_adapter_folder(folder: Path | str) -> bool:
    """Whether a folder holds an adapter, of PEFT's or of our own kind."""
    folder = Path(folder)
    return (folder / CONFIG).is_file() or (folder / OWN).is_file()


def is_peft_folder(folder: Path | str) -> bool:
    """Whether PEFT, and what reads PEFT's folders, can load the adapter."""
    return (Path(folder) / CONFIG).is_file()


def read_record(folder: Path) -> Record | None:
    """loraloom.json; None for a folder that another tool wrote.

    raises  UserError if the file is broken or newer than this version
    """
    path = folder / OWN
    if not path.is_file():
        return None
    try:
        own = json.loads(path.read_text(encoding="utf-8"))
        if own["format"] not in (1, FORMAT):
            raise UserError(
                f"{path} has format {own['format']}, this version reads 1 to {FORMAT}", hint="update loraloom"
            )
        found = Record(
            form=own["form"] if own["format"] > 1 else PEFT,
            spec=dict(own["spec"]),
            targets=list(own.get("targets", ())),
            trained_on=dict(own.get("trained_on", {})),
            about=dict(own.get("about", {})),
            exported=own.get("exported"),
        )
        if found.form not in FORMS:
            raise ValueError(f"there is no form {found.form!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise broken(path, error) from None
    return found


def broken(path: Path, error: Exception) -> UserError:
    hint = "delete it to read the folder as PEFT does" if is_peft_folder(path.parent) else None
    return UserError(f"{path} is broken: {error}", hint=hint)


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder.

    raises  UserError if there is none, or it cannot be read
    """
    path = folder / CONFIG
    if not path.is_file():
        what = "is not a folder" if not folder.is_dir() else f"has no {CONFIG}: it is no adapter"
        raise UserError(f"{folder} {what}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is a {type(config).__name__}, not an object with settings")
    return config


def about_base(folder: Path) -> dict[str, Any]:
    """What an adapter's folder says about its base: base_model_name_or_path, revision, modules_to_save.

    raises  UserError if it is no adapter, or its files are broken
    """
    record = read_record(folder)
    return read_config(folder) if record is None or record.form != ALONE else record.about


def trained_on(folder: Path) -> dict[str, Any]:
    """How the base was kept that an adapter was trained on; empty for a dense one, or if nobody says."""
    record = read_record(folder)
    return record.trained_on if record is not None else {}
