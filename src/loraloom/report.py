"""A run folder as one HTML page, and several runs side by side: the only file that imports jinja2.

The page needs no network and nothing beside it: style, drawings and CSV files stand in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import inspect_page, sections
from .comparison import comparison, groups
from .curves import Chart, loss_chart, metric_chart, overlay, series, small_charts, smooth
from .environment import now, version
from .errors import UserError
from .files import write_text
from .results import result
from .rundir import Run
from .verdict import light, method, tiles, verdict
from .wording import day, number

TEMPLATES = Path(__file__).parent / "templates"


def build_report(run: Run, out: Path | None = None) -> Path:
    """Write a run's page, whatever its state: report.html in its folder, or `out`.

    returns  its path
    raises  UserError if matplotlib or jinja2 is missing, `out` is a folder, or a file of the run is damaged
    """
    path = out or run.path / "report.html"
    refuse_folder(path)
    write_text(path, render("report.html.j2", report_content(run)))
    return path


def refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder", hint=f"name the page's file: -o {path / 'page.html'}")


def report_content(run: Run) -> dict[str, Any]:
    """What the report's template shows."""
    outcome, state = result(run), run.state
    colour, words = light(run, outcome)
    train, held = run.metrics("train"), run.metrics("eval")
    checks = [
        {
            "name": str(check.get("name")),
            "ok": bool(check.get("ok")),
            "detail": str(check.get("detail") or ""),
        }
        for check in run.checks()
    ]
    return {
        "title": run.name,
        "subtitle": f"{method(run.config)} on {run.config.model.id}",
        "light": colour,
        "status": words,
        "started": day(state.get("started")),
        "verdict": verdict(run, outcome),
        "tiles": tiles(run, outcome),
        "checks": sorted(checks, key=lambda check: bool(check["ok"])),
        "loss": loss_chart(train, held, outcome, unit(run)),
        "metrics": metric_chart(held, sections.METRICS) if run.config.task == "classification" else None,
        "charts": small_charts(train),
        "evaluations": sections.evaluation_views(run),
        "samples": sections.sample_views(run),
        "data": sections.data_view(run),
        "adapter": sections.adapter_view(run),
        "analysis": inspect_page.analysis_view(run),
        "settings": sections.settings_view(run),
        "environment": sections.pairs(
            {name: value for name, value in run.env.items() if name != "base_is_folder"}
        ),
        "merge": sections.pairs(
            {name: value for name, value in (run.read("merge.json", None) or {}).items() if name != "layers"}
        ),
        "command": run.command,
    }


def unit(run: Run) -> str:
    """Of the run's loss."""
    if run.config.task == "causal":
        return "nats per target token"
    return "nats per row" if sections.labels(run) else "squared error"


def compare(runs: list[Run], out: Path) -> dict[str, Any]:
    """Write a page that lays runs over each other: what was measured, curves, and the settings that differ.

    returns  the same as plain values, and the page's path as "report"

    raises  UserError for fewer than two runs, if `out` is a folder, or if matplotlib or jinja2 is missing
    """
    if len(runs) < 2:
        raise UserError("a comparison needs at least two runs", hint="loraloom report RUN RUN [RUN ...]")
    refuse_folder(out)
    found = comparison(runs)
    write_text(out, render("compare.html.j2", compare_content(runs, found)))
    return {"report": str(out)} | found


def compare_content(runs: Sequence[Run], found: dict[str, Any]) -> dict[str, Any]:
    """What the comparison's template shows."""
    names = found["names"]
    return found | {
        "title": f"{len(runs)} runs compared",
        "lights": [light(run, result(run)) for run in runs],
        "groups": groups(found["measurements"]),
        "charts": [chart for chart in curves_of(runs, names) if chart.count],
    }


def curves_of(runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    """The losses of all runs over their steps, a chart for each unit, and what classifiers were measured by."""
    units = [unit(run) for run in runs]
    metrics = dict.fromkeys(run.config.eval.best for run in runs if run.config.task == "classification")
    held = [run.metrics("eval") for run in runs]
    train = [series(run.metrics("train"), "loss") for run in runs]
    charts = [
        overlay(
            metric, f"Held-out {metric}", "", [(name, *series(one, metric)) for name, one in zip(names, held)]
        )
        for metric in metrics
        if metric not in ("auto", "loss")
    ]
    for place, own in enumerate(dict.fromkeys(units)):
        end = f"-{place + 1}" if place else ""
        losses = [series(one, "loss") if of == own else ([], []) for one, of in zip(held, units)]
        smoothed = [(x, smooth(y)) if of == own else ([], []) for (x, y), of in zip(train, units)]
        charts += [
            overlay(f"held-out{end}", "Held-out loss", own, [(n, *one) for n, one in zip(names, losses)]),
            overlay(
                f"train{end}", "Train loss, smoothed", own, [(n, *one) for n, one in zip(names, smoothed)]
            ),
        ]
    return charts


def render(template: str, content: dict[str, Any]) -> str:
    """Fill a template; everything that is not ours is escaped.

    raises  UserError if jinja2 is not installed
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise UserError("the report needs jinja2", hint="pip install 'loraloom[report]'") from None
    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,  # by hand: jinja2 would choose by the file's ending, which is .j2
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["number"] = number
    return jinja.get_template(template).render(content, made=day(now()), version=version("loraloom"))
