"""Rows of Parquet files and Hugging Face data sets: what the extra [data] is for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub import constants

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


def hf_rows(path: str, split: str, *, offline: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """(number from 1, fields) of each row of hf:ID or hf:ID:CONFIG."""
    for number, fields in enumerate(hf_set(path, split, offline=offline), start=1):
        yield str(number), dict(fields)


def hf_set(path: str, split: str, *, offline: bool) -> Any:
    """The data set of hf:ID or hf:ID:CONFIG; its rows are read when they are asked for.

    offline  take it from the cache, and make no request

    raises  DataError if it cannot be loaded or is not in the cache, or datasets is not installed
    """
    datasets = load("datasets", f"to read {path}")
    name, _, config = path.removeprefix("hf:").partition(":")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        with no_requests(offline):
            return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # hub, network, split and format errors share no base class
        said = [line for line in str(error).splitlines() if line.strip()][:5]
        if (offline or constants.is_offline_mode()) and not_cached(error):
            raise DataError(
                f"offline, and {path} is not in the cache of data sets",
                details=[f"the cache: {datasets.config.HF_DATASETS_CACHE}", *said],
                hint="run once with a network, without --offline and HF_HUB_OFFLINE; or name a local file",
            ) from None
        raise DataError(
            f"{path} (split {split}) cannot be loaded: {type(error).__name__}",
            details=said,
            hint="check the name and the split; hf:ID:CONFIG picks one of several configurations",
        ) from None


@contextmanager
def no_requests(offline: bool) -> Iterator[None]:
    """Inside, neither huggingface_hub nor datasets asks the hub, if `offline`."""
    import datasets

    places = ((constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE"))
    before = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, offline or getattr(module, name))
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def not_cached(error: Exception) -> bool:
    """Whether a set, or one of its configurations, is missing in the cache: datasets says it in two ways."""
    return isinstance(error, ConnectionError) or "Couldn't find cache" in str(error)


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
