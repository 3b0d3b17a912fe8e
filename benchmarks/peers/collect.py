"""Bring the lines of run_all.sh into benchmarks/results, where the docs' tables come from.

    python benchmarks/peers/collect.py OUT/main.jsonl OUT/alpaca.jsonl --commit HASH

A line of LIST.jsonl takes the place of an earlier one of the same setting in speed_LIST.json; failures are left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SETTING = [
    "peer",
    "model",
    "quant",
    "rank",
    "targets",
    "batch",
    "seq",
    "checkpoint",
    "data",
    "packing",
    "compile",
]
SETTING += ["autocast", "xformers", "recompute", "fp8", "fast", "dropout"]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return (*(row.get(name) for name in SETTING), row.get("graphs", "auto"))


def merged(earlier: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by setting, the later one of two, in the order of their first coming."""
    found = {key(row): row for row in earlier}
    for row in new:
        found[key(row)] = row
    return list(found.values())


def trustworthy(row: dict[str, Any]) -> bool:
    """Whether a line is of a training: finite losses, a gradient for everything, nothing left over in memory."""
    return (
        "error" not in row
        and row["finite"]
        and not row["params_without_grad"]
        and not row.get("left_over_gb")
        and (row.get("grad_norm0") or 0) > 0
    )


def collect(path: Path, commit: str, results: Path) -> Path:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row | {"commit": commit} for row in lines if trustworthy(row)]
    for row in lines:
        if not trustworthy(row):
            print(f"left out: {row['peer']} {row.get('quant')} {row.get('error', 'not a training')}")
    out = results / f"speed_{path.stem}.json"
    before = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.is_file() else []
    known = {name: value for row in rows for name, value in row["versions"].items()}
    record = {
        "command": f"bash benchmarks/peers/run_all.sh {path.stem}",
        "commit": commit,
        "machine": rows[0]["device"] if rows else "",
        "versions": {name: value for name, value in known.items() if name in ("torch", "transformers")},
        "rows": merged(before, rows),
    }
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("lists", nargs="+", type=Path)
    p.add_argument("--commit", default="")
    p.add_argument("--results", type=Path, default=RESULTS)
    a = p.parse_args()
    own = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    for path in a.lists:
        print(collect(path, a.commit or own.stdout.strip(), a.results))


if __name__ == "__main__":
    main()
