"""Tables of docs/studies.md: the studies that ship, and those whose results lie in benchmarks/results.

study_NAME.json is a study.json, latency_*.json and full_finetuning.json are as their commands write them. What has no
result yet says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from tables import RESULTS, table

from loraloom import latency
from loraloom.study_file import listing, read_study
from loraloom.study_table import cells, columns

NOT_YET = "Not measured yet."


def measured(name: str) -> Any:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def plain(command: str) -> str:
    """A command without where its result was written."""
    return re.sub(r" -o \S+| --offline| --(out|commit) \S+", "", command)


def studies() -> str:
    """Every study, with the runs of each preset."""
    rows = []
    for one in listing():
        presets = []
        for preset in one["presets"]:
            found = read_study(one["name"], preset)
            count = len(found.settings) * len(found.seeds)
            presets.append(f"`{preset}`: {'planned only' if found.file.plan_only else f'{count} runs'}")
        rows.append([f"`{one['name']}`", one["asks"], f"{one['source']}: {one['found']}", "; ".join(presets)])
    return table(["study", "asks", "published", "presets"], rows)


def study(name: str) -> str:
    """A study's table and what it says."""
    record = measured(f"study_{name.replace('-', '_')}")
    if record is None:
        return NOT_YET
    rows, about = record["table"], record["environment"]
    lines = [table(columns(rows), [cells(row, rows) for row in rows]), "", " ".join(record["says"]), ""]
    versions = f"torch {about['torch']}; transformers {about['transformers']}"
    lines.append(
        f"{about['device']}, {about['dtype']}; {versions}; commit {about['commit'][:7]}; `{plain(record['command'])}`"
    )
    return "\n".join(lines)


def forward_times() -> str:
    """Article 3's table 1 on each machine that it was measured on."""
    parts = []
    for place in ("gpu", "cpu"):
        record = measured(f"latency_{place}")
        if record is None:
            parts.append(f"On a {place.upper()}: {NOT_YET.lower()}")
            continue
        lines = [line for case in record["cases"] for line in latency.cells(case)]
        threads = (
            f", {record['threads']} thread{'s' if record['threads'] > 1 else ''}" if record["threads"] else ""
        )
        said = "; ".join(
            f"{case['batch']} x {case['length']}: {latency.says(name, case['variants'][name])}"
            for case in record["cases"]
            for name in (latency.AGAIN, latency.MERGED)
        )
        versions = f"torch {record['versions']['torch']}; transformers {record['versions']['transformers']}"
        about = f"{record['machine']}, {record['dtype']}{threads}; {record['rounds']} rounds, {record['clock']} time; "
        about += f"{versions}; commit {record['commit'][:7]}; `{plain(record['command'])}`"
        parts.append(f"{table(latency.COLUMNS, lines)}\n\n{said}.\n\n{about}")
    return "\n\n".join(parts)


def full() -> str:
    """LoRA beside full fine-tuning on a GPU."""
    record = measured("full_finetuning")
    if record is None:
        return NOT_YET
    rows = []
    for name, row in record["results"].items():
        ratio = record["ratios"].get(name)
        rows.append(
            [
                name,
                f"{row['trainable']:,}",
                f"{row['peak_gb']:.2f}" if row["peak_gb"] else "",
                f"{row['predicted_gb']:.2f}",
                f"{row['tokens_per_s']:,.0f}",
                f"{ratio['times_less_memory']:.2f}" if ratio else "",
                f"{ratio['times_the_speed']:.2f}" if ratio else "",
            ]
        )
    head = ["", "trained", "peak GB", "planned GB", "tokens/s", "times less memory", "times the speed"]
    return table(head, rows, record)


TABLES: dict[str, Callable[[], str]] = {
    "studies": studies,
    "study_layers": partial(study, "layers"),
    "study_rank": partial(study, "rank"),
    "study_classification": partial(study, "classification"),
    "latency": forward_times,
    "full_finetuning": full,
}
