"""The page of `inspect`, as plain values: verdicts, tables by kind and by layer, phi, what each number means.

It works on the numbers of analysis.json alone, so that a run's report shows them without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from .curves import csv_address
from .heatmaps import SIDES, Row, figures_of, kinds_of
from .rundir import Run
from .sections import layer_grid
from .wording import number, percent

ANALYSIS = "analysis.json"
SIGNS = {"good": "✓", "warn": "!", "bad": "✗", "even": "≈"}
COLUMNS = (  # of the table of layers: a key, or a path of keys, and its heading
    ("name", "layer"),
    ("state", "state"),
    ("r", "r"),
    ("rank", "rank"),
    ("effective_rank", "effective rank"),
    ("stable_rank", "stable rank"),
    ("norm", "‖ΔW‖"),
    ("norm_W", "‖W‖"),
    ("ratio", "‖ΔW‖/‖W‖"),
    ("projections.update", "‖UᵀWV‖ of ΔW"),
    ("projections.own", "of W"),
    ("projections.random", "of random"),
    ("amplification", "amplification"),
    ("intruders", "intruders"),
    ("rounding.bfloat16.unchanged", "bf16 unchanged"),
    ("rounding.bfloat16.error", "bf16 error"),
    ("rounding.float16.unchanged", "fp16 unchanged"),
    ("rounding.float16.error", "fp16 error"),
)
GRIDS = (  # quantities shown as a table of layers by modules: key, heading, wording
    ("ratio", "Size of the update, ‖ΔW‖/‖W‖", percent),
    ("effective_rank", "Effective rank of the update", number),
    ("amplification", "Amplification factor", number),
    ("intruders", "Intruder dimensions", number),
    ("rounding.bfloat16.error", "Share of the update lost in bfloat16", percent),
)


def at(row: Row, path: str) -> Any:
    """A value by its keys, with dots between; None where there is none."""
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def analysis_view(run: Run) -> dict[str, Any] | None:
    """The part of a run's report about its analysis; None for a run that was not looked at."""
    analysis = run.read(ANALYSIS, None)
    return analysis_content(analysis) if isinstance(analysis, dict) else None


def analysis_content(analysis: Row) -> dict[str, Any]:
    """What templates/analysis.html.j2 shows."""
    layers = analysis["layers"]
    keys = [key for key, _ in COLUMNS if any(at(row, key) is not None for row in layers)]
    headings = [heading for key, heading in COLUMNS if key in keys]
    table = [[at(row, key) for key in keys] for row in layers]
    return {
        "notes": analysis["notes"],
        "checks": [dict(check) | {"sign": SIGNS[check["level"]]} for check in analysis["checks"]],
        "kinds": kind_table(analysis["kinds"]),
        "grids": [grid for key, title, wording in GRIDS if (grid := grid_view(layers, key, title, wording))],
        "charts": [figure.on_page() for figure in figures_of(analysis)],
        "pairs": pair_table(analysis),
        "columns": headings,
        "table": [[number(value, 3) for value in row] for row in table],
        "csv": csv_address(headings, table),
        "settings": analysis["settings"],
        "definitions": definitions(analysis),
    }


def kind_table(kinds: Sequence[Row]) -> dict[str, Any]:
    """The medians of each kind of weight."""
    wanted: list[tuple[str, str, Any]] = [
        ("layers", "layers", number),
        ("ratio", "‖ΔW‖/‖W‖", percent),
        ("effective_rank", "effective rank", lambda value: number(value, 3)),
        ("amplification", "amplification", lambda value: number(value, 3)),
        ("projection_update", "‖UᵀWV‖: of ΔW", lambda value: number(value, 3)),
        ("projection_own", "of W", lambda value: number(value, 3)),
        ("projection_random", "of random", lambda value: number(value, 3)),
        ("intruders", "intruders", number),
        ("bfloat16", "lost in bf16", percent),
        ("float16", "lost in fp16", percent),
    ]
    wanted = [item for item in wanted if any(kind.get(item[0]) is not None for kind in kinds)]
    return {
        "columns": ["weight", *(title for _, title, _ in wanted)],
        "rows": [[kind["kind"], *(wording(kind.get(key)) for key, _, wording in wanted)] for kind in kinds],
    }


def grid_view(layers: Sequence[Row], key: str, title: str, wording: Any) -> dict[str, Any] | None:
    """A quantity as a table of layers by modules, the darker the larger; None if no layer has it."""
    values = {row["name"]: at(row, key) for row in layers}
    known = [value for value in values.values() if value is not None]
    if not known:
        return None
    modules, grid = layer_grid(list(values))
    top = max(known) or 1.0
    zero = {row["name"] for row in layers if row["state"] != "learnt"}

    def cell(name: str | None) -> dict[str, Any]:
        value = values.get(name) if name else None
        text = (wording(value, 2) if isinstance(value, float) else number(value)) if name else ""
        strength = round(0.62 * value / top, 3) if value else 0.0
        return {"name": name or "", "text": text, "strength": strength, "dead": name in zero}

    rows = [(label, [cell(cells.get(module)) for module in modules]) for label, cells in grid.items()]
    return {"title": title, "modules": modules, "rows": rows}


def pair_table(analysis: Row) -> dict[str, Any] | None:
    """phi of each kind, as medians over its layers, beside what random matrices would give."""
    comparison = analysis.get("comparison")
    if not comparison:
        return None
    columns = ["weight", "of", "φ(1, 1)", "φ(p/2, p/2)", "φ of all", "at random: φ(1, 1)", "of all", "layers"]
    rows = []
    for kind in kinds_of(comparison["layers"]):
        pairs = [pair for pair in comparison["layers"] if pair["kind"] == kind]
        for side in SIDES:
            cells = [pair["sides"][side] for pair in pairs if side in pair["sides"]]
            if not cells:
                continue
            half = [cell["diagonal"][(len(cell["diagonal"]) - 1) // 2] for cell in cells]
            values = [
                median(cell["first"] for cell in cells),
                median(half),
                median(cell["all"] for cell in cells),
                median(1 / cell["size"] for cell in cells),
                median(cell["expected"] for cell in cells),
            ]
            rows.append([kind, side, *(number(value, 3) for value in values), number(len(cells))])
    return {
        "with": comparison["with"]["name"],
        "columns": columns,
        "rows": rows,
        "notes": comparison["notes"],
    }


def definitions(analysis: Row) -> list[tuple[str, str]]:
    """What each number means, for who reads the page alone."""
    k, epsilon = analysis["settings"]["k"], analysis["settings"]["epsilon"]
    said = [
        ("effective rank", "exp of the entropy of sᵢ²/Σs²: how many directions share the update evenly"),
        ("stable rank", "‖ΔW‖²/s₁²"),
        (
            "amplification",
            "‖ΔW‖/‖UᵀWV‖ with the update's own first r directions: how much it stresses what W does there",
        ),
        (
            "intruders",
            f"of the first {k} left singular vectors of W + ΔW, those whose cosine to every one of W is below "
            f"{number(epsilon)}",
        ),
        ("lost in bf16", "‖round(W + ΔW) less (W + ΔW)‖/‖ΔW‖, the sum rounded once as `merge` does"),
        ("unchanged", "share of the entries with ΔW ≠ 0 that rounding leaves where they were"),
    ]
    if analysis.get("comparison"):
        said += [
            (
                "φ(i, j)",
                "‖U₁ᵀU₂‖²/min(i, j) of the first i and the first j directions: 1 if one space holds the other",
            ),
            *(("of " + side, words) for side, words in SIDES.items()),
            ("p", "the smaller of the two ranks"),
        ]
    return said


def worst_first(layers: Sequence[Row]) -> list[Row]:
    """Layers in the order of how odd they are: not finite, zero, with intruders, lost in rounding, far moved."""

    def oddness(row: Row) -> tuple[Any, ...]:
        state = {"not finite": 0, "learnt": 2}.get(row["state"], 1)
        lost = at(row, "rounding.bfloat16.error")
        return (
            state,
            -(row.get("intruders") or 0),
            -(lost or 0.0),
            -(row.get("ratio") or row.get("norm") or 0.0),
        )

    return sorted(layers, key=oddness)
