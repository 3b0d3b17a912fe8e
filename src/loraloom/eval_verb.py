"""`loraloom eval`: which of its two kinds is asked for, and what cannot go together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from . import api, evaluate, tasks, use
from .errors import UserError

HELD_OUT = ("data", "answers", "max_new_tokens", "metrics")  # options of the held-out evaluation alone
BENCHMARK = ("data_dir", "shots", "limit", "chat_template", "batch", "name")  # of benchmarks alone


def run(targets: Sequence[str], options: dict[str, Any], console: Console, *, as_json: bool) -> Any:
    """Evaluate and show it, or return it for --json.

    raises  UserError for options that do not go together, or a wrong number of targets
    """
    names = options.pop("tasks")
    held_out, benchmark = ({key: options.pop(key) for key in keys} for keys in (HELD_OUT, BENCHMARK))
    others = held_out if names is not None else benchmark
    given = [
        f"--{key.replace('_', '-')}"
        for key, value in others.items()
        if value is not None and value is not False
    ]
    if given:
        which = "without" if names is not None else "with"
        raise UserError(f"{given[0]} goes {which} --tasks", hint="loraloom eval --help")
    if names == "list":
        return show_tasks(console, as_json=as_json)
    if not targets:
        raise UserError("Missing argument 'RUN': a run, an adapter or a model", hint="loraloom eval --help")
    if names is None:
        return of_held_out(targets, options | held_out, console, as_json=as_json)
    from . import benchmark as benchmarks
    from . import scores

    result = benchmarks.benchmark(targets, names, **options, **benchmark, progress=not as_json)
    write_page(targets)
    return result if as_json else scores.render(result, console)


def of_held_out(targets: Sequence[str], options: dict[str, Any], console: Console, *, as_json: bool) -> Any:
    if len(targets) > 1:
        raise UserError(
            "several runs are compared by --tasks",
            hint="loraloom report RUN RUN compares what they were measured at",
        )
    count = options.pop("answers")
    options["num_answers"] = 200 if count is None else count
    if options["metrics"] and not options["num_answers"]:
        raise UserError("--metrics scores answers, and --answers 0 asks for none", hint="leave --answers out")
    options["metrics"] = [name.strip() for name in (options["metrics"] or "").split(",") if name.strip()]
    result = use.evaluate(targets[0], progress=not as_json, **options)
    write_page(targets)
    return result if as_json else evaluate.render(result, console)


def write_page(targets: Sequence[str]) -> None:
    """A run's page has the new table."""
    if len(targets) == 1 and (Path(targets[0]) / "run.json").is_file():
        api.write_pages(api.Run.open(targets[0]))


def show_tasks(console: Console, *, as_json: bool) -> Any:
    """Every name that --tasks takes, one a line."""
    from . import harness

    found = {"short": tasks.SHORT} | harness.task_names()
    if as_json:
        return found
    for short, name in tasks.SHORT.items():
        console.out(f"{short} = {name}", highlight=False)
    console.out(f"{tasks.ARTICLE} = {','.join(tasks.SHORT)}", highlight=False)
    for kind in ("groups", "tags", "tasks"):
        for name in found[kind]:
            console.out(f"{name}  ({kind.removesuffix('s')})" if kind != "tasks" else name, highlight=False)
    return None
