"""What a run came to: the figures that `runs`, the report, comparisons and the model card share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import UserError
from .rundir import Run, find_runs
from .wording import moment


@dataclass(frozen=True)
class Result:
    """The outcome of a run; None is what was not measured.

    best_loss, base_loss     held-out loss in nats per target: the best one, and before the first step
    exact_match, base_match  shares from `loraloom eval`
    seconds                  wall-clock
    memory                   peak bytes
    speed                    tokens per second of training, over all steps
    """

    status: str
    steps: int
    best_step: int | None
    best_loss: float | None
    base_loss: float | None
    exact_match: float | None
    base_match: float | None
    seconds: float | None
    memory: int | None
    speed: float | None
    tokens: int | None
    trainable: int | None
    total: int | None


def result(run: Run) -> Result:
    """The outcome of a run, from run.json, metrics.jsonl and eval/."""
    state = run.state
    train = run.metrics("train")
    best = state.get("best") or {}
    held = [record for record in run.metrics("eval") if record.get("loss") is not None]
    if not best and held:
        best = min(held, key=lambda record: record["loss"])
    start = next((record["loss"] for record in held if record.get("step") == 0), None)
    base_match, match = exact_match(run)
    tokens, seconds = total(train, "tokens"), total(train, "seconds")
    return Result(
        status=str(state.get("status", "unknown")),
        steps=state.get("step") or max((record.get("step", 0) for record in train), default=0),
        best_step=best.get("step"),
        best_loss=best.get("loss"),
        base_loss=state.get("base_loss", start),
        exact_match=match,
        base_match=base_match,
        seconds=state.get("seconds", seconds or None),
        memory=max((record["memory"] for record in train if record.get("memory")), default=None),
        speed=tokens / seconds if tokens and seconds else None,
        tokens=int(tokens) or None,
        trainable=state.get("trainable"),
        total=state.get("total"),
    )


def total(records: Sequence[dict[str, Any]], key: str) -> float:
    """The sum of a field over the records that have it."""
    return sum(record[key] for record in records if record.get(key) is not None)


def evaluations(run: Run) -> list[dict[str, Any]]:
    """The tables of eval/*.json, the oldest first; a file that holds no table is left out."""
    found = []
    for path in sorted((run.path / "eval").glob("*.json")):
        table = run.read(f"eval/{path.name}", None)
        if isinstance(table, dict) and isinstance(table.get("rows"), list):
            found.append({"name": path.stem} | table)
    return sorted(found, key=lambda table: str(table.get("created", "")))


def exact_match(run: Run) -> tuple[float | None, float | None]:
    """The newest exact match as (base, tuned)."""
    for table in reversed(evaluations(run)):
        for row in table["rows"]:
            if str(row.get("metric", "")).lower().replace("_", " ").replace("-", " ") == "exact match":
                return value_of(row.get("base")), value_of(row.get("tuned"))
    return None, None


def value_of(cell: Any) -> float | None:
    """The value of a table's cell, which is {"value", "stderr"} or a bare number."""
    return cell.get("value") if isinstance(cell, dict) else cell


def runs_table(folder: Path | str) -> list[dict[str, Any]]:
    """A row for each run in a folder, the newest first: what `loraloom runs` prints. It reads no metrics.

    returns  dicts of name, path, status, model, method, steps, best_loss, base_loss, exact_match, seconds,
             age (seconds since its start); a run that cannot be read has the status "unreadable"
    """
    folder = Path(folder)
    rows = [table_row(run, folder) for run in find_runs(folder)]
    return sorted(rows, key=lambda row: (row["age"] is None, row["age"] or 0.0, row["name"]))


def table_row(run: Run, folder: Path) -> dict[str, Any]:
    name = run.name if run.path == folder else run.path.relative_to(folder).as_posix()
    row: dict[str, Any] = {"name": name, "path": str(run.path)}
    try:
        state, match = run.state, exact_match(run)[1]
    except UserError:
        state, match = {"status": "unreadable"}, None
    started = moment(state.get("started"))
    return row | {
        "status": state.get("status", "unknown"),
        "model": state.get("model"),
        "method": state.get("method"),
        "steps": state.get("step", 0),
        "best_loss": (state.get("best") or {}).get("loss"),
        "base_loss": state.get("base_loss"),
        "exact_match": match,
        "seconds": state.get("seconds"),
        "age": (datetime.now(UTC) - started).total_seconds() if started else None,
    }
