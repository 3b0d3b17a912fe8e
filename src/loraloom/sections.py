"""The parts of the report below its curves, as plain values: evaluations, samples, data, adapter, settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from .config import flatten
from .curves import Chart, csv_address, evenly, histogram
from .results import evaluations
from .rundir import Run
from .wording import MISSING, number, percent

STEPS = 12  # answers shown for one prompt; the CSV has all
EXAMPLES = 8  # of each kind of held-out example
SIGNS = {"better": ("good", "better"), "worse": ("bad", "worse"), "within noise": ("even", "within noise")}
METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman")  # of labels, as metrics.jsonl names them
MOST_CLASSES = 30  # of a confusion table in the page; the JSON has all
KINDS = (  # (base is right, tuned is right) and how the page calls it
    ((False, True), "learnt: the base was wrong, the tuned model is right"),
    ((True, False), "lost: the base was right, the tuned model is wrong"),
    ((False, False), "still wrong"),
    ((True, True), "right before and after"),
)

CLASSIFIER_KINDS = (
    ((False, True), "right, where the constant answer is wrong"),
    ((True, False), "wrong, where the constant answer is right"),
    ((False, False), "wrong, and so is the constant answer"),
    ((True, True), "right, and so is the constant answer"),
)


def evaluation_views(run: Run) -> list[dict[str, Any]]:
    """Each eval/*.json as a table of base beside tuned, and its examples by kind."""
    views = []
    for table in evaluations(run):
        rows = [evaluation_row(row) for row in table["rows"] if isinstance(row, dict)]
        columns = (
            "metric",
            *(("constant", "constant_stderr") if table.get("task") == "classification" else ()),
            "base",
            "base_stderr",
            "tuned",
            "tuned_stderr",
            "change",
            "change_stderr",
            "verdict",
        )
        plain = [plain_row(row) for row in table["rows"] if isinstance(row, dict)]
        views.append(
            {
                "name": str(table["name"]),
                "created": table.get("created"),
                "rows": rows,
                "against": "constant" if table.get("task") == "classification" else "base",
                "confusion": confusion(table),
                "settings": pairs({k: v for k, v in (table.get("settings") or {}).items() if k != "tasks"}),
                "tasks": task_rows((table.get("settings") or {}).get("tasks")),
                "kinds": example_kinds(
                    table.get("examples") or [], classifier=table.get("task") == "classification"
                ),
                "csv": csv_address(columns, plain),
                "file": f"eval-{table['name']}.csv",
            }
        )
    return views


def labels(run: Run) -> list[str]:
    """The classes of a classifier; none where it answers with numbers, or is none."""
    manifest = run.read("data/manifest.json", None)
    return list(manifest.get("labels", ())) if isinstance(manifest, dict) else []


def confusion(table: Mapping[str, Any]) -> dict[str, Any] | None:
    """How often each label got each answer, with the shade of each cell: its share of the label's rows."""
    counts, names = table.get("confusion"), table.get("labels")
    if not counts or not names or len(names) > MOST_CLASSES:
        return None
    rows = []
    for name, row in zip(names, counts):
        total = max(1, sum(row))
        cells = [
            (number(count), round(0.62 * count / total, 3), other == name) for other, count in zip(names, row)
        ]
        rows.append((name, cells))
    return {"names": names, "rows": rows}


def evaluation_row(row: Mapping[str, Any]) -> dict[str, str]:
    """One metric as text; a share is written in per cent."""
    sign, words = SIGNS.get(str(row.get("verdict")), ("even", str(row.get("verdict") or MISSING)))
    is_share = row.get("unit") == "share"
    change = {"value": row.get("change"), "stderr": row.get("change_stderr")}
    rise = "+" if isinstance(row.get("change"), int | float) and row["change"] > 0 else ""
    return {
        "metric": f"{row['task']}, {row['score']}"
        if "task" in row
        else str(row.get("metric", "")).replace("_", " "),
        "unit": "" if is_share else str(row.get("unit") or ""),
        "base": with_error(row.get("base"), is_share),
        "constant": with_error(row.get("constant"), is_share),
        "tuned": with_error(row.get("tuned"), is_share),
        "change": rise + with_error(change, is_share),
        "sign": sign,
        "verdict": words,
    }


def task_rows(tasks: Any) -> list[list[str]]:
    """The benchmarks of a table: task, version, shots, items, where its items are from."""
    if not isinstance(tasks, dict):
        return []
    return [
        [
            name,
            str(about.get("version")),
            plain(about.get("shots")),
            f"{plain(about.get('items'))} of {plain(about.get('of'))}",
            str(about.get("source") or "the hub"),
        ]
        for name, about in tasks.items()
    ]


def with_error(cell: Any, is_share: bool = False) -> str:
    """A value with its standard error: 0.412 ± 0.011, or 41.2 ± 1.1 % for a share."""
    value, error = (cell.get("value"), cell.get("stderr")) if isinstance(cell, dict) else (cell, None)
    if value is None:
        return MISSING
    scale = 100.0 if is_share else 1.0
    text = number(value * scale, 3 if is_share else 4) + (f" ± {number(error * scale, 2)}" if error else "")
    return text + ("\u202f%" if is_share else "")


def plain_row(row: Mapping[str, Any]) -> list[Any]:
    sides = [row["constant"]] if "constant" in row else []
    sides += [row.get("base"), row.get("tuned")]
    cells: list[Any] = []
    for side in sides:
        cell = side if isinstance(side, dict) else {"value": side}
        cells += [cell.get("value"), cell.get("stderr")]
    return [row.get("metric"), *cells, row.get("change"), row.get("change_stderr"), row.get("verdict")]


def example_kinds(examples: Sequence[Mapping[str, Any]], *, classifier: bool = False) -> list[dict[str, Any]]:
    """The held-out examples sorted by what training did to them; a classifier's beside the constant answer."""
    kinds = []
    for (base, tuned), title in CLASSIFIER_KINDS if classifier else KINDS:
        found = [e for e in examples if (bool(e.get("base_ok")), bool(e.get("tuned_ok"))) == (base, tuned)]
        shown = [
            {key: e.get(key) for key in ("row", "prompt", "reference", "base", "tuned")}
            for e in found[:EXAMPLES]
        ]
        if found:
            kinds.append(
                {"title": title, "count": len(found), "examples": shown, "base_ok": base, "tuned_ok": tuned}
            )
    return kinds


def sample_views(run: Run) -> dict[str, Any]:
    """The answers to each prompt, step by step, and all of them as CSV."""
    prompts: dict[str, list[dict[str, Any]]] = {}
    samples = run.samples()
    for sample in samples:
        prompts.setdefault(str(sample.get("prompt", "")), []).append(sample)
    views = []
    for prompt, answers in prompts.items():
        reference = next((answer["reference"] for answer in answers if answer.get("reference")), None)
        views.append(
            {
                "prompt": prompt,
                "reference": reference,
                "answers": [answer_view(answer) for answer in evenly(answers, STEPS)],
            }
        )
    columns = ("step", "prompt", "answer", "reference", "stopped")
    rows = [[sample.get(key) for key in columns] for sample in samples]
    return {"prompts": views, "csv": csv_address(columns, rows)}


def answer_view(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "step": sample.get("step"),
        "answer": str(sample.get("answer") or ""),
        "cut": sample.get("stopped") is False,
    }


def data_view(run: Run) -> dict[str, Any] | None:
    """data/manifest.json, whatever it holds: facts, tables, and a histogram of the lengths."""
    manifest = run.read("data/manifest.json", None)
    if not isinstance(manifest, dict):
        return None
    facts, tables, charts = [], [], []
    for key, value in manifest.items():
        bars = bars_of(value) if "hist" in key else None
        if bars:
            charts.append(length_chart(key, bars))
        elif isinstance(value, dict) and value:
            tables.append({"title": title_of(key).capitalize(), "columns": [], "rows": pairs(value)})
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            columns = list(dict.fromkeys(name for item in value for name in item))
            rows = [[plain(item.get(name), name) for name in columns] for item in value[:20]]
            tables.append(
                {
                    "title": title_of(key).capitalize(),
                    "columns": [title_of(name) for name in columns],
                    "rows": rows,
                }
            )
        elif isinstance(value, list) and value:
            tables.append(
                {
                    "title": title_of(key).capitalize(),
                    "columns": [],
                    "rows": [[plain(item)] for item in value[:20]],
                }
            )
        elif not isinstance(value, dict | list):
            facts.append((title_of(key), plain(value, key)))
    return {"facts": facts, "tables": tables, "charts": charts}


def bars_of(value: Any) -> list[tuple[str, float]] | None:
    """A histogram as (label, count), from {"edges", "counts"}, a mapping or pairs; or None."""
    if (
        isinstance(value, dict)
        and isinstance(value.get("counts"), list)
        and isinstance(value.get("edges"), list)
    ):
        value = list(zip(value["edges"], value["counts"]))
    elif isinstance(value, dict):
        value = list(value.items())
    if not isinstance(value, list) or not value:
        return None
    if not all(isinstance(item, list | tuple) and len(item) == 2 for item in value):
        return None
    if not all(isinstance(count, int | float) for _, count in value):
        return None
    return [(str(label), count) for label, count in value]


def length_chart(key: str, bars: list[tuple[str, float]]) -> Chart:
    return histogram(re.sub(r"\W+", "-", key), title_of(key).capitalize(), "examples, by tokens", bars)


def adapter_view(run: Run) -> dict[str, Any] | None:
    """adapter/summary.json as a table of layers by modules: how far each weight moved."""
    summary = run.read("adapter/summary.json", None)
    layers = [
        layer for layer in (summary or {}).get("layers", []) if isinstance(layer, dict) and layer.get("name")
    ]
    if not layers:
        return None
    moved = {str(layer["name"]): movement(layer) for layer in layers}
    relative = all(layer.get("norm_W") for layer in layers)
    modules, grid = layer_grid(list(moved))
    top = max((value for value in moved.values() if value is not None), default=0.0)
    rows = [
        (label, [heat_cell(cells.get(module), moved, top, relative) for module in modules])
        for label, cells in grid.items()
    ]
    if all(value is None for value in moved.values()):  # a method whose update is no product of A and B
        rows = []
    keys = list(dict.fromkeys(key for layer in layers for key in layer))
    order = sorted((name for name in moved if moved[name]), key=lambda name: -(moved[name] or 0))
    return {
        "relative": relative,
        "modules": modules,
        "rows": rows,
        "top": [(name, heat_text(moved[name], relative)) for name in order[:5]],
        "dead": [name for name, value in moved.items() if value == 0],
        "columns": keys,
        "table": [[number(layer.get(key)) for key in keys] for layer in layers],
        "csv": csv_address(keys, [[layer.get(key) for key in keys] for layer in layers]),
    }


def movement(layer: Mapping[str, Any]) -> float | None:
    """The norm of the update over the norm of the weight, or the update's alone where that is not known."""
    delta, weight = layer.get("norm_delta"), layer.get("norm_W")
    if delta is None:
        return None
    return float(delta) / float(weight) if weight else float(delta)


def layer_grid(names: Sequence[str]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """The modules, in order, and for each layer number the full name of each module."""
    split = {name: re.fullmatch(r"(?:.*?\.)?(\d+)\.(.+)", name) for name in names}
    paths = {name: (match[1], match[2]) if match else ("", name) for name, match in split.items()}
    short = shortest({path for _, path in paths.values()})
    grid: dict[str, dict[str, str]] = {}
    for name, (layer, path) in paths.items():
        grid.setdefault(layer or "others", {})[short[path]] = name
    modules = list(dict.fromkeys(short[path] for _, path in paths.values()))
    order = sorted(grid, key=lambda label: (not label.isdigit(), int(label) if label.isdigit() else 0))
    return modules, {label: grid[label] for label in order}


def shortest(paths: set[str]) -> dict[str, str]:
    """The shortest ending of each dotted path that no other path has."""
    short = {}
    for path in paths:
        parts = path.split(".")
        endings = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        others = [other for other in paths if other != path]
        short[path] = next((e for e in endings if not any(("." + o).endswith("." + e) for o in others)), path)
    return short


def heat_cell(
    name: str | None, moved: Mapping[str, float | None], top: float, relative: bool
) -> dict[str, Any]:
    value = moved.get(name) if name else None
    strength = (value / top if top else 0.0) if value is not None else 0.0
    text = heat_text(value, relative) if name else ""
    return {"name": name or "", "text": text, "strength": round(0.62 * strength, 3), "dead": value == 0}


def heat_text(value: float | None, relative: bool) -> str:
    return (percent(value, 2) if relative else number(value, 3)) if value is not None else MISSING


def settings_view(run: Run) -> dict[str, Any]:
    """Every setting with its value as YAML and its origin: those that somebody set, and the defaults."""
    origins = run.origins
    rows = [
        (name, yaml_text(value), origins.get(name, "default"))
        for name, value in flatten(run.config.model_dump(mode="json")).items()
    ]
    rank = {"flag": 0, "file": 1, "auto": 2}
    given = sorted((row for row in rows if row[2] != "default"), key=lambda row: rank.get(row[2], 3))
    return {"given": given, "defaults": [row for row in rows if row[2] == "default"]}


def yaml_text(value: Any) -> str:
    """A value as one line of YAML."""
    if isinstance(value, str) and value:
        return value
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
        .split("\n...")[0]
        .strip()
    )


def pairs(tree: Mapping[str, Any]) -> list[list[str]]:
    """A tree as rows of name and text."""
    return [[title_of(name), plain(value, name)] for name, value in flatten(tree).items()]


def plain(value: Any, name: str = "") -> str:
    """A value as text; a share as per cent."""
    if isinstance(value, float) and 0 <= value <= 1 and re.search(r"share|agree|fraction", name):
        return percent(value)
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value[:10]) + (" …" if len(value) > 10 else "") or MISSING
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(item, key)}" for key, item in value.items()) or MISSING
    return number(value)


def title_of(key: str) -> str:
    return key.replace("_", " ").replace(".", ": ")
