"""What does not fit in the settings, in the user's words: pydantic's list as one error of ours."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .errors import UserError, did_you_mean

ELSEWHERE = {  # what other tools call our settings
    "lr": "train.learning_rate",
    "rank": "r",
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "num_train_epochs": "train.epochs",
    "gradient_accumulation_steps": "train.batch_size",
    "max_seq_length": "data.max_length",
    "gradient_checkpointing": "train.recompute (full for true, none for false)",
}


def in_words(
    error: ValidationError, names: Collection[str], *, file: Path | str | None, lines: Mapping[str, int]
) -> UserError:
    """All problems at once, each with its place, and a hint for the first that has one.

    names  every dotted name of the schema
    lines  the line of each name in the file
    """
    details, hints = [], []
    for problem in error.errors():
        name = setting_of(problem, names)
        where = f"{file} line {lines[name]}: " if file is not None and name in lines else ""
        details.append(f"{where}{say(problem, name)}")
        if problem["type"] == "extra_forbidden":
            hints.append(did_you_mean_key(name, names))
        elif problem["type"] == "missing" and "." not in name:
            hints.append("three settings are enough: -m MODEL -d DATA -o OUTPUT, or a YAML file with them")
    details = list(dict.fromkeys(details))
    hint = next(iter(filter(None, hints)), None)
    if len(details) == 1:
        return UserError(details[0], hint=hint)
    return UserError("the settings do not fit", details=details, hint=hint)


def setting_of(problem: Any, names: Collection[str]) -> str:
    """The dotted name a problem is about, without the indices and union arms of its location."""
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        return ".".join(location)
    starts = [".".join(location[: end + 1]) for end in range(len(location))]
    return next((name for name in reversed(starts) if name in names), "settings")


def say(problem: Any, name: str) -> str:
    """One problem in the user's words."""
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key {name}"
        case "missing":
            return f"{name} is not set"
        case "value_error":
            reason = str(problem["ctx"]["error"])
            return reason if name == "settings" else f"{name}: {reason}"
        case _:
            return f"{name} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def did_you_mean_key(name: str, names: Collection[str]) -> str | None:
    """The nearest key in the same section, the same key in another, or what other tools call so."""
    parent, _, last = name.rpartition(".")
    section = {key.rpartition(".")[2]: key for key in names if key.rpartition(".")[0] == parent}
    found = [section[word] for word in difflib.get_close_matches(last, section, n=2, cutoff=0.75)]
    found += [key for key in names if key.rpartition(".")[2] == last]
    found += [ELSEWHERE[last]] if last in ELSEWHERE else []
    if found:
        return "did you mean " + " or ".join(dict.fromkeys(found)) + "?"
    return did_you_mean(last, section)
