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


def build_report(run: Run) -> Path:
    """Write report.html into the run folder, whatever the run's state.

    returns  its path
    raises  UserError if matplotlib or jinja2 is missing, or a file of the run is damaged
    """
    path = run.path / "report.html"
    write_text(path, render("report.html.j2", report_content(run)))
    return path


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

    raises  UserError for fewer than two runs, or if matplotlib or jinja2 is missing
    """
    if len(runs) < 2:
        raise UserError("a comparison needs at least two runs", hint="loraloom report RUN RUN [RUN ...]")
    found = comparison(runs)
    write_text(Path(out), render("compare.html.j2", compare_content(runs, found)))
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
    """The losses of all runs over their steps, and what classifiers were measured by."""
    units = ", or ".join(dict.fromkeys(unit(run) for run in runs))
    metrics = dict.fromkeys(run.config.eval.best for run in runs if run.config.task == "classification")
    held = [(name, run.metrics("eval")) for name, run in zip(names, runs)]
    train = [(name, *series(run.metrics("train"), "loss")) for name, run in zip(names, runs)]
    return [
        *(
            overlay(metric, f"Held-out {metric}", "", [(name, *series(one, metric)) for name, one in held])
            for metric in metrics
            if metric not in ("auto", "loss")
        ),
        overlay("held-out", "Held-out loss", units, [(name, *series(one, "loss")) for name, one in held]),
        overlay("train", "Train loss, smoothed", units, [(name, x, smooth(y)) for name, x, y in train]),
    ]


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
