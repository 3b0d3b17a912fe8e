"""`loraloom data`: a data set as training would see it, without the model's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from . import hub, methods
from .config import RunConfig, describe, resolve
from .data import Prepared, prepare, show
from .errors import UserError
from .model import load_tokenizer
from .small_model import cache_folder
from .workshop import UNLIMITED


def prepare_file(
    file: str, model: str | None, settings: dict[str, Any], *, offline: bool
) -> tuple[Prepared, Any]:
    """Read and tokenise a file as `train` would.

    model  whose tokenizer; the small model's if none is named

    raises  DataError, UserError as `train` would
    """
    chosen = {"model": model or "smollm2-135m-instruct", "output": "none", "data": file}
    config: RunConfig
    config, _ = resolve(None, chosen | settings)
    folder = hub.resolve(config.model.id, revision=config.model.revision, offline=offline).path
    tokenizer = load_tokenizer(folder)
    limit = context_of(folder)
    cache = cache_folder() / "data"
    return prepare(
        config.data, tokenizer, model_max_length=limit, seed=config.train.seed, cache=cache
    ), tokenizer


def context_of(folder: Path) -> int:
    """Tokens that a model's positions reach, from its config.json.

    raises  UserError if there is none
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json: it is no model folder")
    config = json.loads(path.read_text(encoding="utf-8"))
    return int(config.get("max_position_embeddings") or config.get("n_positions") or UNLIMITED)


def settings(method: str | None) -> list[tuple[str, str, str]]:
    """Rows (name, default, meaning) of every setting, and of those that methods have of their own.

    method  only this one's; None for all

    raises  UserError if there is no such method
    """
    rows = describe()
    for name in [method] if method else methods.names():
        rows += [
            (f"method.{key}", default, f"{name}: {text}") for key, default, text in methods.settings(name)
        ]
    return rows


def show_file(prepared: Prepared, tokenizer: Any, console: Console, *, previews: int) -> None:
    show(prepared, tokenizer, console, previews=previews)
