"""Rows to conversations: every format becomes turns, and every bad row is found before any is tokenised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .problems import Problems
from .read import Row, Table
from .shapes import NEEDED, Shape, as_turns

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
KINDS = {list: "a list", dict: "an object", int: "a number", float: "a number", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says. `input` is the second part of an Alpaca instruction."""

    role: str  # system, user or assistant
    text: str
    input: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row's turns. A document is one assistant turn that answers nothing and is never put in a template."""

    turns: tuple[Turn, ...]
    where: str
    document: bool = False
    trailing: int = 0  # turns after the last answer, which were left out


@dataclass(frozen=True)
class Dropped:
    """A row that cannot be trained on, and why."""

    where: str
    kind: str
    detail: str = ""


class Bad(Exception):
    """A row that must be put right: (kind, instance)."""


def conversations(table: Table, shape: Shape, problems: Problems) -> list[Conversation | Dropped]:
    """Each row as a conversation, or why it is dropped; rows that are wrong go to `problems`."""
    found: list[Conversation | Dropped] = []
    for row in table.rows:
        try:
            found.append(conversation(row, shape))
        except Bad as bad:
            problems.add(*bad.args)
    return found


def conversation(row: Row, shape: Shape) -> Conversation | Dropped:
    """One row as turns.

    raises  Bad if a field is missing or not text, or the turns are out of order
    """
    texts = {}
    for field, column in shape.columns.items():
        if field in ("messages", "conversations"):
            continue
        texts[field] = text_of(row, field, column, needed=field in NEEDED[shape.format])
    system = (Turn("system", texts["system"]),) if texts.get("system", "").strip() else ()
    if shape.format == "text":
        if not texts["text"].strip():
            return Dropped(row.where, "empty text")
        return Conversation((Turn("assistant", texts["text"]),), row.where, document=True)
    if shape.format in ("messages", "sharegpt"):
        return chat(row, shape, system)
    if shape.format == "alpaca":
        asked, said = "instruction", "output"
        given = texts.get("input", "")
        user = Turn("user", texts[asked], given if given.strip() else "")
    else:
        asked, said = "prompt", "completion"
        user = Turn("user", texts[asked])
    if not user.text.strip() and not user.input:
        return Dropped(row.where, "empty prompt", f"field {shape.columns[asked]} is empty")
    if not texts[said].strip():
        return Dropped(row.where, "empty answer", f"field {shape.columns[said]} is empty")
    return Conversation((*system, user, Turn("assistant", texts[said])), row.where)


def text_of(row: Row, field: str, column: str, *, needed: bool) -> str:
    """A text field. null counts as empty; a field that is needed must be there."""
    if column not in row.fields:
        if needed:
            near = ", ".join(list(row.fields)[:8]) or "nothing"
            raise Bad("a field is missing", f"{row.where}: no field {column!r}; it has {near}")
        return ""
    return checked(row.fields[column], row.where, repr(column))


def checked(value: Any, where: str, name: str) -> str:
    """A value that must be text that UTF-8 can hold; null counts as empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = KINDS.get(type(value), type(value).__name__)
        raise Bad("a field is not text", f"{where}: field {name} is {kind}: {str(value)[:40]}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        lone = f"\\u{ord(value[error.start]):04x}"
        raise Bad(
            "half a character", f"{where}: field {name} has a lone surrogate {lone} at {error.start}"
        ) from None
    return value


def chat(row: Row, shape: Shape, system: tuple[Turn, ...]) -> Conversation | Dropped:
    """A row of `messages` or `conversations`."""
    field = NEEDED[shape.format][0]
    column = shape.columns[field]
    if column not in row.fields:
        raise Bad("a field is missing", f"{row.where}: no field {column!r}")
    value = as_turns(row.fields[column])
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise Bad("turns are not a list", f"{row.where}: field {column!r} is {str(value)[:40]!r}")
    turns = [*system, *(turn(item, row.where, f"{column}[{at}]") for at, item in enumerate(value))]
    last = max((at for at, item in enumerate(turns) if item.role == "assistant"), default=-1)
    if last < 0:
        raise Bad("turns without an answer", f"{row.where}: no assistant turn in {roles(turns)}")
    check_order(turns, row.where)
    if any(not item.text.strip() for item in turns[: last + 1] if item.role == "assistant"):
        return Dropped(row.where, "empty answer", "an assistant turn is empty")
    return Conversation(tuple(turns[: last + 1]), row.where, trailing=len(turns) - last - 1)


def turn(item: Any, where: str, name: str) -> Turn:
    """One {"role", "content"} or {"from", "value"} object."""
    if not isinstance(item, Mapping):
        raise Bad("a turn is not an object", f"{where}: {name} is {str(item)[:40]!r}")
    role_key = "role" if "role" in item else "from"
    text_key = "content" if "content" in item else "value"
    if role_key not in item or text_key not in item:
        wanted = "role and content (or from and value)"
        raise Bad(
            "a field is missing",
            f"{where}: {name} needs {wanted}; it has {', '.join(map(str, item)) or 'nothing'}",
        )
    said = item[role_key]
    role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        raise Bad(
            "a role that is not known",
            f"{where}: {name}.{role_key} is {said!r}; use system, user or assistant",
        )
    if item.get("tool_calls"):
        raise Bad("tool calls", f"{where}: {name} calls tools, which cannot be trained on yet")
    return Turn(role, checked(joined(item[text_key]), where, f"{name}.{text_key}"))


def joined(content: Any) -> Any:
    """Content given as parts, [{"type": "text", "text": ...}], as one text; anything else as it is."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    return content


def check_order(turns: Sequence[Turn], where: str) -> None:
    """An optional system turn, then user and assistant in turn."""
    spoken = turns[1:] if turns[0].role == "system" else turns
    for at, item in enumerate(spoken):
        wanted = "assistant" if at % 2 else "user"
        if item.role != wanted:
            place = at + len(turns) - len(spoken)
            said = f"turn {place + 1} is {item.role}, and {wanted} was expected in {roles(turns)}"
            raise Bad("turns out of order", f"{where}: {said}")


def roles(turns: Sequence[Turn]) -> str:
    names = [item.role for item in turns]
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "an empty list"
