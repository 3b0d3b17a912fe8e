"""Rows of JSON and JSON-lines files, with the line where each begins."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from .problems import Problems, around

BLANK = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()
CHATS = ("messages", "conversations")  # an object with one of these is a row, not a holder of rows
NAMES = {
    list: "a list",
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def read(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, fields) of each row of a list, of an object that holds one list, or of JSON lines.

    The content decides which of them it is, because many a .json file holds lines.

    raises  DataError with line, column and the text around; for JSON lines all broken lines at once
    """
    start = skip(text, 0)
    if text[start : start + 1] != "[" and (path.suffix.lower() != ".json" or is_lines(text, start)):
        return read_lines(text, path)
    return read_list(text, path)


def is_lines(text: str, start: int) -> bool:
    """Whether the first line is a whole JSON object and another line follows."""
    line, _, rest = text[start:].partition("\n")
    try:
        return isinstance(json.loads(line), dict) and bool(rest.strip())
    except (ValueError, RecursionError):
        return False


def read_lines(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    problems = Problems()
    # split, not splitlines: JSON strings may hold other line separators, such as U+2028
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problems.add("not JSON", f"{where} column {error.colno}: {error.msg}: {around(line, error.pos)}")
        except (ValueError, RecursionError) as error:
            problems.add("not JSON", f"{where}: {error}: {around(line, 0)}")
        else:
            if isinstance(value, dict):
                # after a bad line the rest is read only to find more bad lines
                if not problems.kinds:
                    yield str(number), value
            else:
                problems.add("not an object", f"{where} is {NAMES[type(value)]}: {around(line, 0)}")
    problems.stop(
        str(path), 'every line must be one JSON object, such as {"prompt": "...", "completion": "..."}'
    )


def read_list(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        items = top_items(text, path)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} line {error.lineno} column {error.colno}: not JSON: {error.msg}",
            details=[around(text, error.pos)],
            hint="a list of objects is wanted: [{...}, {...}], or one object a line",
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not JSON: {error}", hint="a list of objects is wanted, or one object a line"
        ) from None
    lines, line, last = [], 1, 0
    for place, _ in items:
        line += text.count("\n", last, place)
        last = place
        lines.append(line)
    by_line = len(set(lines)) == len(lines)
    problems = Problems()
    for number, (line, (place, value)) in enumerate(zip(lines, items), start=1):
        if not isinstance(value, dict):
            shown = (
                f"{path.name}:{line} item {number} is {NAMES[type(value)]}: {around(text, place, width=20)}"
            )
            problems.add("not an object", shown)
        elif not problems.kinds:
            yield str(line) if by_line else f"item {number}", value
    problems.stop(str(path), 'every item must be an object, such as {"prompt": "...", "completion": "..."}')


def top_items(text: str, path: Path) -> list[tuple[int, Any]]:
    """(offset, value) of each item of the list that the file is or holds."""
    start = skip(text, 0)
    if text[start : start + 1] == "[":
        items, end = list_items(text, start)
        end_of_file(text, end)
        return items
    if text[start : start + 1] != "{":
        raise json.JSONDecodeError("expecting a list or an object", text, start)
    lists, keys, end = object_lists(text, start)
    end_of_file(text, end)
    chat = [key for key in lists if key in CHATS]
    if chat or not lists:
        value, _ = DECODER.raw_decode(text, start)
        if chat or any(isinstance(item, str) for item in value.values()):
            return [(start, value)]
    if len(lists) == 1:
        return next(iter(lists.values()))
    raise DataError(
        f"{path} holds an object with {len(lists)} lists, and not one list of rows",
        details=[f"its keys: {', '.join(keys) or 'none'}"],
        hint="make it a list of objects, or an object with one list",
    )


def list_items(text: str, start: int) -> tuple[list[tuple[int, Any]], int]:
    """(offset, value) of each item of the list that begins at `start`, and the offset behind it."""
    items: list[tuple[int, Any]] = []
    place = skip(text, start + 1)
    if text[place : place + 1] == "]":
        return items, place + 1
    while True:
        value, end = DECODER.raw_decode(text, place)
        items.append((place, value))
        end = skip(text, end)
        if text[end : end + 1] == "]":
            return items, end + 1
        if text[end : end + 1] != ",":
            raise json.JSONDecodeError("expecting ',' or ']'", text, end)
        place = skip(text, end + 1)


def object_lists(text: str, start: int) -> tuple[dict[str, list[tuple[int, Any]]], list[str], int]:
    """The items of each list in the object that begins at `start`, all its keys, and the offset behind it."""
    lists: dict[str, list[tuple[int, Any]]] = {}
    keys: list[str] = []
    place = skip(text, start + 1)
    if text[place : place + 1] == "}":
        return lists, keys, place + 1
    while True:
        if text[place : place + 1] != '"':
            raise json.JSONDecodeError("expecting a name in double quotes", text, place)
        key, end = DECODER.raw_decode(text, place)
        keys.append(key)
        end = skip(text, end)
        if text[end : end + 1] != ":":
            raise json.JSONDecodeError("expecting ':'", text, end)
        place = skip(text, end + 1)
        if text[place : place + 1] == "[":
            lists[key], end = list_items(text, place)
        else:
            _, end = DECODER.raw_decode(text, place)
        end = skip(text, end)
        if text[end : end + 1] == "}":
            return lists, keys, end + 1
        if text[end : end + 1] != ",":
            raise json.JSONDecodeError("expecting ',' or '}'", text, end)
        place = skip(text, end + 1)


def end_of_file(text: str, end: int) -> None:
    end = skip(text, end)
    if end < len(text):
        raise json.JSONDecodeError("something follows the end", text, end)


def skip(text: str, place: int) -> int:
    """The offset of the next character that is no blank."""
    match = BLANK.match(text, place)
    return match.end() if match else place
