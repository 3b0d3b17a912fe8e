"""The sources of a data set: which there are, what they hold, and their rows as conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DataConfig, Source
from ..errors import DataError
from ..files import digest, file_digest
from ..progress import nothing
from .problems import Problems
from .read import Table, locate, read_table
from .report import SourceReport
from .shapes import Shape, detect
from .tables import hf_set
from .turns import Conversation, Dropped, conversations


@dataclass
class Place:
    """A source that is named and perhaps not read yet."""

    source: Source
    use: str  # train or eval
    label: str  # how a row's place names it
    offline: bool = False  # a Hugging Face set comes from the cache
    table: Table | None = None

    def check(self) -> None:
        """Look whether it is there; a Hugging Face set only where it must be in the cache.

        raises  DataError if it is not
        """
        if not is_hub(self.source):
            locate(self.source.path)
        elif self.offline:
            hf_set(self.source.path, self.source.split, offline=True)

    def read(self, config: DataConfig, limit: int | None, each: Callable[[], None] = nothing) -> Table:
        """The first rows of the source; read once. `each` is called before each row."""
        if self.table is None:
            path, split = self.source.path, self.source.split
            how: dict[str, Any] = {"encoding": config.encoding, "limit": limit, "label": self.label}
            self.table = read_table(path, split=split, offline=self.offline, each=each, **how)
        table = self.table
        return table if limit is None else Table(table.name, table.rows[:limit], table.columns)


@dataclass(frozen=True)
class ReadSource:
    """A source that has been read."""

    source: Source
    use: str
    columns: list[str]
    shape: Shape
    items: list[Conversation | Dropped]

    def report(self, kept: int) -> SourceReport:
        return SourceReport(
            path=self.source.path,
            split=self.source.split if self.source.path.startswith("hf:") else None,
            use=self.use,
            format=self.shape.format,
            columns=dict(self.shape.columns),
            guessed=self.shape.guessed,
            unused=[column for column in self.columns if column not in self.shape.columns.values()],
            repeat=self.source.repeat,
            read=len(self.items),
            kept=kept,
        )


def sources_of(config: DataConfig, *, offline: bool = False) -> list[Place]:
    """Every source, with a label for its rows: the file's name, or its path where two names are equal.

    A Hugging Face set that is named by data.eval is read from its split `validation`.
    """
    pairs = [(source, "train") for source in config.train]
    if not pairs:
        raise DataError("data.train names no source", hint="--set data.train=FILE, or hf:ID")
    if isinstance(config.eval, str):
        pairs.append((Source(path=config.eval, split="validation"), "eval"))
    names = [source.path if is_hub(source) else Path(source.path).name for source, _ in pairs]
    labels = [
        f"{name}[{source.split}]" if is_hub(source) else name if names.count(name) == 1 else source.path
        for name, (source, _) in zip(names, pairs)
    ]
    return [Place(source, use, label, offline) for label, (source, use) in zip(labels, pairs)]


def is_hub(source: Source) -> bool:
    return source.path.startswith("hf:")


def fingerprint(place: Place, config: DataConfig) -> str:
    """A digest of what a source holds. A Hugging Face set has to be read for it."""
    if not is_hub(place.source):
        return file_digest(locate(place.source.path))
    table = place.read(config, config.limit if place.use == "train" else None)
    return digest(*(f"{row.where} {row.fields}" for row in table.rows))


def tables_of(
    places: Sequence[Place], config: DataConfig, each: Callable[[], None] = nothing
) -> Iterator[tuple[Place, Table]]:
    """Every source's rows as they stand; `limit` counts the training rows of all together.

    each  called before each row; what it raises ends the reading

    raises  DataError if a source has none
    """
    left = config.limit
    for place in places:
        limit = left if place.use == "train" else None
        if limit == 0:
            continue
        table = place.read(config, limit, each)
        if left is not None and place.use == "train":
            left -= len(table.rows)
        if not table.rows:
            raise DataError(f"{place.source.path} has no rows", hint="name a file with rows")
        yield place, table


def read_all(
    places: Sequence[Place], config: DataConfig, each: Callable[[], None] = nothing
) -> list[ReadSource]:
    """Every source's rows as conversations; `limit` counts the training rows of all together.

    raises  DataError with all the rows that must be put right
    """
    problems = Problems()
    found = []
    for place, table in tables_of(places, config, each):
        shape = detect(table, config.format, config.map)
        items = conversations(table, shape, problems)
        found.append(ReadSource(place.source, place.use, table.columns, shape, items))
    names = ", ".join(dict.fromkeys(place.source.path for place in places))
    problems.stop(names, "put these rows right, or take them out")
    return found
