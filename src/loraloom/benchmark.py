"""`loraloom eval --tasks`: benchmarks of lm-evaluation-harness over a run, an adapter or plain models.

The base and the tuned model are one model in one process: its adapter is put aside for the one and in use for the
other, so no merged folder is written. Several targets stand in one table, one model at a time in memory.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from . import harness, scores, tasks
from .environment import now, version
from .errors import UserError
from .files import write_json, write_text
from .harness import Options
from .model import name_of
from .tasks import SOURCES, LocalTask
from .use import Opened, open_target


@dataclass(frozen=True)
class Chosen:
    """What is asked: lm-eval's tasks with their data, and of which the data are from here."""

    tasks: list[Any]
    local: dict[str, LocalTask]
    name: str


def benchmark(
    targets: Sequence[str],
    names: str | Sequence[str],
    *,
    data_dir: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    batch: int | None = None,
    name: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    offline: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores with their standard errors. Of one run or adapter: base beside tuned. Of several targets: a column each.

    names     tasks of lm-eval, YAML files of one's own, short names, or "article2"
    data_dir  a folder with the files of the article's six tasks, which then need no hub
    name      of the result in the run's eval/ folder; made from the tasks otherwise

    raises  UserError for a task, a target or a setting that cannot be had
    """
    asked = Options(shots, limit, chat_template, batch)
    if model is not None and len(targets) > 1:
        raise UserError("--model names the base of one target", hint="leave it out, or name one target")
    with TemporaryDirectory(prefix="loraloom-tasks-") as folder:
        chosen = choose(names, data_dir, Path(folder), asked, name, offline, progress)
        offline_now = offline or len(chosen.local) == len(chosen.tasks)

        def measured(opened: Opened) -> dict[str, Any]:
            return harness.measure(
                opened.model, opened.tokenizer, chosen.tasks, asked, offline=offline_now, progress=progress
            )

        def column(target: str) -> tuple[dict[str, Any], dict[str, Any]]:
            opened = open_target(target, dtype=dtype, offline=offline)
            results = measured(opened)
            return results, settings_of(opened, chosen, asked, results)

        if len(targets) > 1:
            return columns(targets, column, chosen.name)
        opened = open_target(targets[0], model=model, dtype=dtype, offline=offline)
        if opened.adapters is None:
            results = measured(opened)
            return columns(
                targets, lambda _: (results, settings_of(opened, chosen, asked, results)), chosen.name
            )
        opened.adapters.eval()
        with opened.adapters.disabled():
            base = measured(opened)
        tuned = measured(opened)
        return beside(opened, base, tuned, chosen.name, settings_of(opened, chosen, asked, tuned))


def choose(
    names: str | Sequence[str],
    data_dir: str | Path | None,
    folder: Path,
    asked: Options,
    name: str | None,
    offline: bool,
    progress: bool,
) -> Chosen:
    """The tasks with their data, before any model is loaded."""
    full = tasks.full_names(names)
    if name is not None and (Path(name).name != name or name.startswith(".") or name == "held-out"):
        raise UserError(f"a result cannot be named {name!r}", hint="--name takes a plain word")
    if data_dir is None:
        own = [place_of(one) for one in full]
        return Chosen(
            harness.load_tasks(own, offline=offline, progress=progress), {}, name or label(full, asked)
        )
    written = tasks.write_local(full, Path(data_dir), folder, yaml_of=harness.yaml_of, shots=asked.shots)
    loaded = harness.load_tasks([task.path for task in written], offline=True, progress=progress)
    return Chosen(loaded, {task.name: task for task in written}, name or label(full, asked))


def place_of(name: str) -> str | Path:
    """A task's YAML where it is known without a search through all of lm-eval's; else its name."""
    if name in SOURCES:
        return harness.yaml_of(SOURCES[name].yaml)
    return Path(name) if name.endswith((".yaml", ".yml")) else name


def label(full: Sequence[str], asked: Options) -> str:
    """A file's name for a set of tasks, and for how they are asked: a quick trial does not replace the whole."""
    how = [f"limit{asked.limit}"] * (asked.limit is not None)
    how += [f"{asked.shots}shots"] * (asked.shots is not None) + ["chat"] * asked.chat
    full = [Path(name).stem if name.endswith((".yaml", ".yml")) else name for name in full]
    short = {whole: part for part, whole in tasks.SHORT.items()}
    joined = "+".join(short.get(name, name) for name in full)
    if set(full) == set(tasks.SHORT.values()):
        joined = tasks.ARTICLE
    elif len(joined) > 60:
        joined = f"{short.get(full[0], full[0])}+{len(full) - 1}-more"
    return "-".join([joined, *how])


def beside(
    opened: Opened, base: dict[str, Any], tuned: dict[str, Any], name: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """The base beside the tuned model; kept in the run's eval/ folder, with lm-eval's own results."""
    rows = scores.paired_rows(base, tuned)
    result = {"name": name, "created": now(), "settings": settings, "rows": rows}
    if opened.run is not None:
        folder = opened.run.path / "eval"
        keep(base, folder / name / "base")
        keep(tuned, folder / name / "tuned")
        write_json(folder / f"{name}.json", result)
    return result


def columns(
    targets: Sequence[str], column: Callable[[str], tuple[dict[str, Any], dict[str, Any]]], name: str
) -> dict[str, Any]:
    """A column for each target, one in memory at a time: a run or an adapter as it was tuned, a model as it is."""
    found, settings = [], []
    for target in targets:
        results, how = column(target)
        found.append(results)
        settings.append(how)
        gc.collect()
        torch.cuda.empty_cache()
    return {
        "name": name,
        "created": now(),
        "models": [{"target": target} | how for target, how in zip(targets, settings, strict=True)],
        "settings": settings[0] | {"dtype": " and ".join(dict.fromkeys(how["dtype"] for how in settings))},
        "rows": scores.column_rows(found),
    }


def settings_of(opened: Opened, chosen: Chosen, asked: Options, results: dict[str, Any]) -> dict[str, Any]:
    """What was measured, and how: all that is needed to measure it again."""
    notes, table = [], {}
    for task, count in results["n-samples"].items():
        table[task] = {
            "version": results["versions"].get(task),
            "shots": results["n-shot"].get(task),
            "items": count["effective"],
            "of": count["original"],
        } | (chosen.local[task].to_dict() if task in chosen.local else {})
        if asked.shots is not None and table[task]["shots"] != asked.shots:
            notes.append(f"{task} is always asked with {table[task]['shots']} shots")
    loaded = opened.loaded
    return {
        "lm_eval": version("lm_eval"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "model": loaded.source.id,
        "commit": loaded.source.commit,
        "adapter": opened.target if opened.adapters is not None else None,
        "quantised": loaded.quantised,
        "dtype": name_of(loaded.dtype),
        "device": loaded.device.type,
        "attention": loaded.attention.partition(":")[0],
        "batch": asked.batch if asked.batch is not None else f"auto: {batches(results['used'])}",
        "max_length": results.get("max_length"),
        "chat_template": asked.chat,
        "limit": asked.limit,
        "seeds": {
            key: results["config"].get(key)
            for key in ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
        },
        "notes": notes,
        "tasks": table,
    }


def batches(used: Sequence[int]) -> str:
    return f"{used[0]} to {used[-1]} rows" if len(used) > 1 else f"{used[0]} rows" if used else "none"


def keep(results: dict[str, Any], folder: Path) -> None:
    """lm-eval's own results as JSON, and beside them each item's scores."""
    own = {key: value for key, value in results.items() if key not in ("samples", "used")}
    write_text(folder / "results.json", json.dumps(own, indent=2, ensure_ascii=False, default=str) + "\n")
    items = (json.dumps(item, ensure_ascii=False, default=str) for item in scores.per_item(results))
    write_text(folder / "items.jsonl", "".join(item + "\n" for item in items))
