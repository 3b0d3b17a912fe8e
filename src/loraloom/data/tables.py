"""Rows of Parquet files and Hugging Face data sets: what the extra [data] is for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import DataError


def parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(number from 1, fields) of each row of a Parquet file.

    raises  DataError if it is not a Parquet file, or pyarrow is not installed
    """
    parquet = load("pyarrow.parquet", f"to read {path}")
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield str(number), fields
    except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of these
        raise DataError(
            f"{path} is not a Parquet file that can be read",
            details=[str(error)],
            hint="it may be cut short, or of another kind: write it again, or give it its right ending",
        ) from None


def hf_rows(path: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(number from 1, fields) of each row of hf:ID or hf:ID:CONFIG.

    raises  DataError if it cannot be loaded, or datasets is not installed
    """
    datasets = load("datasets", f"to read {path}")
    name, _, config = path.removeprefix("hf:").partition(":")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # hub, network, split and format errors share no base class
        said = [line for line in str(error).splitlines() if line.strip()][:5]
        raise DataError(
            f"{path} (split {split}) cannot be loaded: {type(error).__name__}",
            details=said,
            hint="check the name and the split; hf:ID:CONFIG picks one of several configurations",
        ) from None
    for number, fields in enumerate(found, start=1):
        yield str(number), dict(fields)


def load(name: str, purpose: str) -> ModuleType:
    """Import a module of the extra [data].

    raises  DataError with the command that installs it
    """
    try:
        if name == "datasets":
            import datasets

            return datasets
        import pyarrow.parquet

        return pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{name.partition('.')[0]} is needed {purpose} and cannot be imported",
            details=[str(error)],
            hint='pip install "loraloom[data]"',
        ) from None
