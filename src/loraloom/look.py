"""`loraloom data`: a data set as training would see it, without the model's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from . import hub, methods
from .classifying import longest_of
from .config import RunConfig, describe, resolve
from .data import Labelled, Prepared, length_histogram, prepare, prepare_labels, show
from .errors import UserError
from .model import load_tokenizer
from .small_model import cache_folder
from .workshop import UNLIMITED


def prepare_file(
    file: str, model: str | None, settings: dict[str, Any], *, offline: bool
) -> tuple[Prepared | Labelled, Any]:
    """Read and tokenise a file as `train` would.

    model  whose tokenizer; the small model's if none is named

    raises  DataError, UserError as `train` would
    """
    chosen = {"model": model or "smollm2-135m-instruct", "output": "none", "data": file}
    config: RunConfig
    config, _ = resolve(None, chosen | settings)
    given = config.model
    folder = hub.resolve(
        given.id, revision=given.revision, offline=offline, allow_pickle=given.allow_pickle
    ).path
    tokenizer = load_tokenizer(folder)
    if config.task == "classification":
        longest = longest_of(folder, tokenizer)
        how: dict[str, Any] = {"seed": config.train.seed, "offline": offline}
        return prepare_labels(config.data, tokenizer, model_max_length=longest, **how), tokenizer
    limit = context_of(folder)
    cache = cache_folder() / "data"
    prepared = prepare(
        config.data,
        tokenizer,
        model_max_length=limit,
        seed=config.train.seed,
        cache=cache,
        offline=offline,
    )
    return prepared, tokenizer


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


def show_file(prepared: Prepared | Labelled, tokenizer: Any, console: Console, *, previews: int) -> None:
    if isinstance(prepared, Labelled):
        show_labels(prepared, tokenizer, console, previews=previews)
        return
    show(prepared, tokenizer, console, previews=previews)


def show_labels(found: Labelled, tokenizer: Any, console: Console, *, previews: int) -> None:
    """Columns, rows of each label, what was left out, lengths, and a few rows as the model reads them."""
    report = found.report
    lines = [
        f"{len(report.sources)} source(s), {report.read:,} rows read, {report.kept:,} used: {report.summary}"
    ]
    lines.append("columns: " + ", ".join(f"{field} = {column}" for field, column in report.columns.items()))
    for side, counts in report.counts.items():
        if counts:
            shown = [
                f"{name} {count:,}" if report.labels else f"{name} {count:.4g}"
                for name, count in counts.items()
            ]
            lines.append(f"{side}: " + ", ".join(shown[:20]) + (" ..." if len(shown) > 20 else ""))
    for problem in report.problems:
        lines.append(f"{problem.effect}: {problem.count:,} {problem.kind} ({', '.join(problem.rows[:3])})")
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"tokens a row, at most {report.max_length:,} ({report.max_length_origin})"]
    lines.append(length_histogram(found.train.lengths.tolist()))
    for example in found.train[:previews]:
        label = report.labels[int(example.label)] if report.labels else f"{example.label:g}"
        lines += ["", f"{example.row}  label {label}", f"  {tokenizer.decode(example.ids)}"]
    console.print("\n".join(lines), markup=False, highlight=False)
