"""A study's data: the held-out rows are split in two, once, before anything trains.

    train       what every run trains on, a file for each source
    selection   what a run's best step is chosen by, and the best setting
    final       what is reported: no run ever opens it before it is finished

Rows are files of a study's folder, so that every setting and seed has the same ones. Equal rows (by the columns that
are used) land on one side, whichever sources they come from; a training row that is also held out is left out.

raises  DataError if the rows cannot be read, or too few would be held out
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import DataConfig, RunConfig
from .data.labelled import glue_task, places_of
from .data.labels import find_columns
from .data.read import Row, Table
from .data.shapes import detect
from .data.sources import sources_of
from .errors import DataError
from .files import digest, write_text
from .small_model import tweets

PROMPT, ANSWER = "Question: What is {a} minus {b}?\nAnswer:", " {c}"


@dataclass(frozen=True)
class Split:
    """The rows on each side; train has one list a source."""

    train: list[list[Row]]
    selection: list[Row]
    final: list[Row]

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "train": sum(map(len, self.train)),
            "selection": len(self.selection),
            "final": len(self.final),
        }


def split_data(
    config: RunConfig, *, made: str | None, seed: int = 0, offline: bool = False
) -> tuple[Split, dict[str, Any]]:
    """The three sides, and the settings that read their files as they were meant: names in the study's folder.

    made     "subtraction" or "tweets": these rows, instead of the sources that the settings name
    seed     of the draw of the held-out rows
    offline  make no request
    """
    data = config.data
    if made is not None:
        rows = sums() if made == "subtraction" else labelled_tweets(offline=offline)
        tables, held, repeats = [Table(made, rows[: data.limit], list(rows[0].fields))], None, [1]
    else:
        tables, held, repeats = read(config, offline=offline)
    split = share_out(config, tables, held, seed)
    changes: dict[str, Any] = {"data.limit": None, "data.encoding": "auto", "data.eval": "selection.jsonl"}
    changes["data.train"] = [
        {"path": f"train-{place}.jsonl", "repeat": repeat} for place, repeat in enumerate(repeats)
    ]
    return split, changes | as_the_task_has_it(config)


def as_the_task_has_it(config: RunConfig) -> dict[str, Any]:
    """What a GLUE task's name says beside its rows, which files do not: its metric and what its labels are."""
    task = glue_task(config.data)
    if task is None:
        return {}
    said = {} if config.eval.best != "auto" else {"eval.best": task.metric}
    kind = "classes" if task.classes else "numbers"
    return said | ({} if config.data.labels != "auto" else {"data.labels": kind})


def read(config: RunConfig, *, offline: bool) -> tuple[list[Table], Table | None, list[int]]:
    """The training tables up to data.limit, the held-out one if it is a source of its own, the sources' repeats."""
    data, tables = config.data, list[Table]()
    held, left = None, data.limit
    for place in (places_of if labelled(config) else sources_of)(data, offline=offline):
        if place.use == "eval":
            held = place.read(data, None)
            continue
        tables.append(place.read(data, left))
        if left is not None:
            left -= len(tables[-1].rows)
    return tables, held, [source.repeat for source in data.train]


def labelled(config: RunConfig) -> bool:
    return config.task == "classification"


def share_out(config: RunConfig, tables: Sequence[Table], held: Table | None, seed: int) -> Split:
    """Hold rows out by a draw on their content, and halve them.

    The draw is by digests with the seed: the same rows are on the same sides, in whatever order they stand.
    """
    data = config.data
    keyed = [with_keys(config, table) for table in tables]
    if held is not None:
        pool = dict(with_keys(config, held))
        chosen = sorted(pool, key=lambda key: drawn(key, seed))
    else:
        pool = {key: row for table in keyed for key, row in table}
        order = sorted(pool, key=lambda key: drawn(key, seed))
        chosen = order[: wanted(data, len(order))]
    if len(chosen) < 2:
        raise DataError(
            f"a study needs held-out rows to choose by and others to report, and {len(chosen)} would be held out",
            hint="set data.eval to a share, a number of rows or a file",
        )
    half = (len(chosen) + 1) // 2
    out = set(chosen)
    train = [[row for key, row in table if key not in out] for table in keyed]
    if not any(train):
        raise DataError("every row would be held out, and none is left to train on", hint="lower data.eval")
    return Split(train, [pool[key] for key in chosen[:half]], [pool[key] for key in chosen[half:]])


def wanted(data: DataConfig, rows: int) -> int:
    """How many rows data.eval asks for, of so many different ones."""
    assert not isinstance(data.eval, str)
    return min(rows, int(data.eval) if data.eval >= 1 else int(data.eval * rows + 1e-9))


def with_keys(config: RunConfig, table: Table) -> list[tuple[str, Row]]:
    """Each row with a digest of what is used of it, and the first of equal rows alone."""
    data = config.data
    if labelled(config):
        columns = list(find_columns(table, data.map).to_dict().values())
    else:
        columns = list(detect(table, data.format, data.map).columns.values())
    seen: dict[str, Row] = {}
    pairs = []
    for row in table.rows:
        key = digest(*(json.dumps(row.fields.get(column), sort_keys=True, default=str) for column in columns))
        if data.duplicates == "keep" or key not in seen:
            pairs.append((key, row))
        seen[key] = row
    return pairs


def drawn(key: str, seed: int) -> str:
    return digest(str(seed), key)


def write_split(split: Split, folder: Path) -> None:
    """The files that `data` of the runs names, and final.jsonl."""
    for place, rows in enumerate(split.train):
        write_rows(folder / f"train-{place}.jsonl", rows)
    write_rows(folder / "selection.jsonl", split.selection)
    write_rows(folder / "final.jsonl", split.final)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    write_text(path, "".join(json.dumps(row.fields, ensure_ascii=False, default=str) + "\n" for row in rows))


def sums() -> list[Row]:
    """Every two-digit a - b with a >= b as a question, shuffled: the demo's rows."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, a + 1)]
    random.Random(0).shuffle(pairs)
    return [
        Row(f"made:{place}", {"prompt": PROMPT.format(a=a, b=b), "completion": ANSWER.format(c=a - b)})
        for place, (a, b) in enumerate(pairs, start=1)
    ]


def labelled_tweets(*, offline: bool) -> list[Row]:
    """Tweets with a sentiment, shuffled."""
    items = tweets(offline=offline)
    random.Random(0).shuffle(items)
    return [
        Row(f"tweets:{place}", {"text": text, "label": label})
        for place, (text, label) in enumerate(items, start=1)
    ]
