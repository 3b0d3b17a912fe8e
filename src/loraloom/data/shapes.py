"""Which shape the rows of a source have, and which column is which field.

| format | fields; those it may have | example |
| --- | --- | --- |
| alpaca | instruction, output; input, system | {"instruction": "Add", "input": "2 3", "output": "5"} |
| prompt_completion | prompt, completion; system | {"prompt": "2 + 3 =", "completion": " 5"} |
| messages | messages; system | {"messages": [{"role": "user", "content": "Hi"}, ...]} |
| sharegpt | conversations; system | {"conversations": [{"from": "human", "value": "Hi"}, ...]} |
| text | text | {"text": "Once upon a time"} |

`data.map` (our field: your column) settles it. Without it, columns with our names are taken, then common
other names are guessed and the report says so. Where two guesses are possible, the user must choose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, did_you_mean, nearest
from .read import Table

NEEDED = {
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "text": ("text",),
}
OPTIONAL = {
    "alpaca": ("input", "system"),
    "prompt_completion": ("system",),
    "messages": ("system",),
    "sharegpt": ("system",),
    "text": (),
}
CHATS = ("messages", "conversations", "conversation", "dialogue", "chat")
ANSWERS = ("completion", "answer", "response", "output", "reply", "target", "solution")
ALIASES = {
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response", "answer", "completion"),
    "prompt": ("prompt", "question", "query", "input", "instruction", "problem", "request", "source"),
    "completion": ANSWERS,
    "messages": CHATS,
    "conversations": CHATS,
    "text": ("text", "content", "document"),
    "system": ("system", "system_prompt"),
}
PAIRS = [("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("input", "output")]
KEYS = {"messages": {"role", "content"}, "sharegpt": {"from", "value"}}
SEEN = 20  # columns listed in an error


@dataclass(frozen=True)
class Shape:
    """The format of a source's rows and the column of each of its fields."""

    format: str
    columns: dict[str, str]  # our field: the user's column
    guessed: bool  # a column was chosen by a name that is not ours


def detect(table: Table, wanted: str, given: Mapping[str, str]) -> Shape:
    """The shape of a table's rows.

    wanted  a format, or "auto"
    given   our field: the user's column

    raises  DataError if `given` names an unknown field or column, or no shape fits, or two do
    """
    check_map(table, wanted, given)
    if wanted == "auto":
        wanted = mapped_format(given, table) if given else guess_format(table)
    columns = dict(given)
    for field in (*NEEDED[wanted], *OPTIONAL[wanted]):
        if field not in columns:
            found = column_for(field, table, taken=columns.values(), needed=field in NEEDED[wanted])
            if found is not None:
                columns[field] = found
    missing = [field for field in NEEDED[wanted] if field not in columns]
    if missing:
        raise no_column(table, wanted, missing)
    guessed = any(field != column and field not in given for field, column in columns.items())
    return Shape(wanted, columns, guessed)


def check_map(table: Table, wanted: str, given: Mapping[str, str]) -> None:
    formats = list(NEEDED) if wanted == "auto" else [wanted]
    fields = list(dict.fromkeys(field for name in formats for field in (*NEEDED[name], *OPTIONAL[name])))
    for field in given:
        if field not in fields:
            raise DataError(
                f"data.map: {field} is not a field"
                + ("" if wanted == "auto" else f" of the format {wanted}"),
                details=[f"the fields: {', '.join(fields)}"],
                hint=did_you_mean(field, fields),
            )
    absent = {field: column for field, column in given.items() if column not in table.columns}
    if absent:
        raise DataError(
            f"data.map: {table.name} has no column " + ", ".join(map(repr, absent.values())),
            details=[seen(table)],
            hint=did_you_mean(next(iter(absent.values())), table.columns),
        )


def mapped_format(given: Mapping[str, str], table: Table) -> str:
    """The only format that has all the mapped fields, or whose needed fields are all mapped."""
    fits = [name for name in NEEDED if set(given) <= {*NEEDED[name], *OPTIONAL[name]}]
    whole = [name for name in fits if set(NEEDED[name]) <= set(given)]
    chosen = whole or fits
    if len(chosen) == 1:
        return chosen[0]
    guess = guess_format(table) if chosen else None
    if guess in chosen:
        return str(guess)
    raise DataError(
        f"data.map ({', '.join(given)}) does not say which format the rows have",
        details=[f"{name}: {', '.join((*NEEDED[name], *OPTIONAL[name]))}" for name in NEEDED],
        hint="map every field that the format needs, or set data.format",
    )


def guess_format(table: Table) -> str:
    """The format that the columns suggest.

    raises  DataError if none does, or several pairs of columns could be prompt and answer
    """
    chat = [
        by_keys for name in CHATS for column in same(name, table) if (by_keys := chat_kind(table, column))
    ]
    if chat:
        return chat[0]
    if all(has(name, table) for name in NEEDED["prompt_completion"]):
        return "prompt_completion"
    if has("instruction", table) and any(has(name, table) for name in ALIASES["output"]):
        return "alpaca"
    if any(has(name, table) for name in ALIASES["prompt"]) and any(has(name, table) for name in ANSWERS):
        return "prompt_completion"
    if any(has(name, table) for name in ALIASES["text"]):
        return "text"
    asked = like(ALIASES["prompt"], table, "PROMPT_COLUMN")
    said = like(ANSWERS, table, "ANSWER_COLUMN")
    raise DataError(
        f"{table.name}: no known shape fits the rows",
        details=[seen(table), *(f"{name} needs {', '.join(needed)}" for name, needed in NEEDED.items())],
        hint=f"say which column is which, such as --set data.map='{{prompt: {asked}, completion: {said}}}'"
        " (the first line of a CSV file must name the columns)",
    )


def like(names: Sequence[str], table: Table, otherwise: str) -> str:
    """The column most like one of some names, such as "Best Answer" for answer."""
    lower = {column.lower(): column for column in table.columns}
    inside = [column for name in names for low, column in lower.items() if name in low]
    close = [lower[found] for name in names for found in nearest(name, lower, count=1)]
    return next(iter(inside + close), otherwise)


def column_for(field: str, table: Table, *, taken: Sequence[str] | Any, needed: bool) -> str | None:
    """The column of a field: the one of its name, else one with another usual name.

    raises  DataError if several columns have usual names of a needed field
    """
    if field in table.columns and field not in taken:
        return field
    found = [column for name in ALIASES[field] for column in same(name, table) if column not in taken]
    if len(found) <= 1 or not needed:
        return found[0] if found else None
    if field in ("prompt", "completion"):
        for pair in PAIRS:
            columns = [column for name in pair for column in same(name, table)]
            if len(columns) == 2:
                return columns[field == "completion"]
    raise DataError(
        f"{table.name}: {' and '.join(found)} could each be the {field}",
        details=[seen(table)],
        hint=f"say which: --set data.map='{{{field}: {found[0]}}}'",
    )


def no_column(table: Table, wanted: str, missing: Sequence[str]) -> DataError:
    column = like(ALIASES[missing[0]], table, "YOUR_COLUMN")
    return DataError(
        f"{table.name}: the format {wanted} needs {' and '.join(missing)}, and no column is called so",
        details=[seen(table)],
        hint=f"say which column it is: --set data.map='{{{missing[0]}: {column}}}'",
    )


def chat_kind(table: Table, column: str) -> str | None:
    """The format of a column of turns, from the keys of the first turn in it."""
    for row in table.rows:
        turns = as_turns(row.fields.get(column))
        if isinstance(turns, Sequence) and turns and isinstance(turns[0], Mapping):
            return next((name for name, keys in KEYS.items() if keys <= set(turns[0])), None)
    return None


def as_turns(value: Any) -> Any:
    """A cell of turns; in CSV files and some Parquet files it is JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def same(name: str, table: Table) -> list[str]:
    """The columns called `name`, whatever their case."""
    return [column for column in table.columns if column.strip().lower() == name]


def has(name: str, table: Table) -> bool:
    return bool(same(name, table))


def seen(table: Table) -> str:
    more = f" and {len(table.columns) - SEEN} more" if len(table.columns) > SEEN else ""
    return "its columns: " + (", ".join(table.columns[:SEEN]) or "none") + more
