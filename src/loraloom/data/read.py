"""Rows from files: JSON, JSONL, CSV, TSV, plain text, Parquet and Hugging Face data sets.

Text formats are read by our own code, so that every row knows its line. A row's place is written
`file.jsonl:17`: the line where it begins, counted from 1; where several rows share a line, and in Parquet
files and Hugging Face sets, which have no lines, the row's number: `file.json:item 17`, `file.parquet:17`.
A .txt or .md file is one document.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import DataError, nearest
from ..progress import nothing
from . import csv_rows, json_rows
from .tables import hf_rows, parquet_rows

SUFFIXES = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".md": "text",
    ".parquet": "parquet",
}
BOMS = [  # utf-32 first: its mark begins with that of utf-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
]


@dataclass(frozen=True, slots=True)
class Row:
    """One record as it stands in the file."""

    where: str  # "file.jsonl:17"
    fields: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """The rows of one source, and every column that some row has, in the order met."""

    name: str
    rows: list[Row]
    columns: list[str]


def read_table(
    path: str,
    *,
    split: str,
    encoding: str,
    limit: int | None,
    label: str | None = None,
    offline: bool = False,
    each: Callable[[], None] = nothing,
) -> Table:
    """Read one source.

    path     a file, or hf:ID of a Hugging Face data set, hf:ID:CONFIG for one of its configurations
    split    of a Hugging Face set, such as train[:100]
    limit    stop after so many rows
    label    how a row's place names the file; its name if None
    offline  take a Hugging Face set from the cache
    each     called before each row; what it raises ends the reading

    raises  DataError if it is missing, cannot be decoded or parsed; all broken lines at once
    """
    name = label or (path if path.startswith("hf:") else Path(path).name)
    hub = path.startswith("hf:")
    found = hf_rows(path, split, offline=offline) if hub else file_rows(locate(path), encoding)
    rows = []
    for place, fields in islice(found, limit):
        each()
        rows.append(Row(f"{name}:{place}", fields))
    columns = list(dict.fromkeys(key for row in rows for key in row.fields))
    return Table(path, rows, columns)


def file_rows(path: Path, encoding: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, fields) of each row of a file; the place is its line or number."""
    kind = SUFFIXES[path.suffix.lower()]
    if kind == "parquet":
        return parquet_rows(path)
    text = decode(path.read_bytes(), path, encoding)
    if kind == "text":
        return iter([("1", {"text": text})])
    return json_rows.read(text, path) if kind == "json" else csv_rows.read(text, path)


def locate(path: str) -> Path:
    """The file a source names.

    raises  DataError if there is none, it is a folder, or its ending says nothing
    """
    file = Path(path)
    if file.is_dir():
        inside = sorted(item.name for item in file.iterdir() if item.suffix.lower() in SUFFIXES)
        hint = f"name a file in it, such as {file / inside[0]}" if inside else "name a file"
        raise DataError(f"data {path} is a folder", details=inside[:10], hint=hint)
    if not file.is_file():
        folder = file.parent
        names = [item.name for item in folder.iterdir()] if folder.is_dir() else []
        close = nearest(file.name, [name for name in names if Path(name).suffix.lower() in SUFFIXES])
        hint = "check the name"
        if close:
            hint = f"did you mean {' or '.join(str(folder / name) for name in close)}?"
        elif not folder.is_dir():
            hint = f"there is no folder {folder} either; a Hugging Face data set is written hf:ID"
        raise DataError(f"there is no data file {path}", hint=hint)
    if file.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"data {path}: files ending in {file.suffix or 'nothing'!r} cannot be read",
            hint="it can be " + ", ".join(SUFFIXES) + ", or hf:ID for a Hugging Face data set",
        )
    return file


def decode(data: bytes, path: Path, encoding: str) -> str:
    """The text of a file; a byte order mark, if any, is taken off.

    raises  DataError naming the first byte that does not decode, with its line
    """
    marked = next((name for mark, name in BOMS if data.startswith(mark)), "utf-8")
    used = marked if encoding == "auto" else encoding
    try:
        return data.decode(used).removeprefix("\ufeff")
    except LookupError:
        raise DataError(
            f"data.encoding is {encoding!r}, which Python does not know",
            hint="such as utf-8, latin-1, utf-16",
        ) from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        shown = f"0x{data[error.start]:02x}" if error.start < len(data) else "the end of the file"
        other = "latin-1 (or cp1252, utf-16, whatever wrote it)" if used.startswith("utf") else "utf-8"
        raise DataError(
            f"{path} line {line}: byte {error.start:,} is {shown}, which is not {used}",
            details=[repr(data[max(0, error.start - 20) : error.start + 20])[1:]],
            hint=f"if it was saved in another encoding, say which: --set data.encoding={other}",
        ) from None
