"""Rows of CSV and TSV files, with the line where each begins."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError
from .problems import Problems

DELIMITERS = ",;\t"


def read(text: str, path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(line, fields) of each row; the first row names the columns.

    A .tsv file is split at tabs; a .csv file at whichever of , ; and tab gives its header most columns.

    raises  DataError for a row with too many or too few fields (all of them at once), an open quote or a
            header that names a column twice
    """
    csv.field_size_limit(sys.maxsize)  # the default of 128 kB is less than a long document
    delimiter = "\t" if path.suffix.lower() == ".tsv" else guess_delimiter(text, path)
    records = lines(text, path, delimiter)
    header_line, header = next(records, (1, []))
    if not header:
        raise DataError(f"{path} is empty", hint="its first line must name the columns")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(
            f"{path} line {header_line}: the header names {', '.join(map(repr, twice))} twice",
            hint="give every column a name of its own",
        )
    problems = Problems()
    for line, record in records:
        if len(record) != len(header):
            said = f"{path.name}:{line} has {len(record)} fields, the header has {len(header)}"
            problems.add("a row with another number of fields", f"{said}: {delimiter.join(record)[:60]!r}")
        elif not problems.kinds:
            yield str(line), dict(zip(header, record))
    problems.stop(str(path), 'a text that holds the separator or a line break must stand in "double quotes"')


def guess_delimiter(text: str, path: Path) -> str:
    """The separator that gives the header most columns; a comma where they tie."""

    def columns(delimiter: str) -> int:
        try:
            return len(next(lines(text, path, delimiter), (1, []))[1])
        except DataError:
            return 0

    return max(DELIMITERS, key=columns)


def lines(text: str, path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of each record that is not a blank line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            open_quote = "unexpected end of data" in str(error)
            raise DataError(
                f"{path} line {line}: "
                + ("a quote is opened and never closed" if open_quote else str(error)),
                details=[text.split("\n", line)[line - 1][:80]],
                hint='a " inside a quoted text is written twice: ""',
            ) from None
        if record:
            yield line, record
