"""The verb `inspect`: what an adapter did to its base, and how alike two adapters are.

The numbers come from spectra.py; here they are gathered, judged in words, and written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from . import hub
from .adapter_files import about_base, is_adapter_folder, read_record
from .analysis import EXACT_SIDE, LEADING
from .environment import now
from .errors import UserError
from .files import write_text
from .fold import recipe_of
from .heatmaps import figures_of
from .inspect_page import ANALYSIS, analysis_content, at
from .merge import Recipe
from .merge_table import LARGE
from .report import render
from .rundir import STATE, Run
from .spectra import SIXTEEN, Walk, Wanted, walk_alone, walk_base
from .use import find_target, near_runs
from .wording import number, percent, plural

HARDLY = 1e-3  # of the median layer's size: a layer that moved less is named
NAMED = 5  # layers in a sentence
Numbers = dict[str, Any]


def inspect(
    target: Path | str,
    other: Path | str | None = None,
    *,
    model: str | None = None,
    base: bool = True,
    layers: tuple[int, ...] | None = None,
    k: int = 10,
    epsilon: float = 0.5,
    offline: bool = False,
    progress: bool = False,
) -> Numbers:
    """Look at every layer of an adapter, and compare it with another one on the same base.

    model   the base, instead of the one that the run or the adapter names
    base    False leaves out all that needs the base's weights
    layers  decoder layers whose phi(i, j) is kept whole: None for the middle one, () for all

    raises  UserError if a target is no adapter, changes no weight, or does not fit the base
    """
    if not 0 < epsilon <= 1:
        raise UserError(f"epsilon is {epsilon}", hint="a cosine above 0, at most 1")
    if k < 1:
        raise UserError(f"k is {k}", hint="a number of singular vectors from 1 up")
    adapter, beside = folder_of(target), folder_of(other) if other is not None else None
    wanted = Wanted(k, epsilon, layers)
    recipe, why = base_of(target, model, offline=offline) if base else (None, "left out, as asked")
    if recipe is None:
        walk = walk_alone(adapter, beside, wanted)
        walk.notes.append(f"The base's weights were not read ({why}), so nothing here is measured against W.")
    else:
        walk = walk_base(recipe, beside, wanted, progress=progress)
    return gathered(walk, Path(target), Path(other) if other is not None else None, recipe)


def folder_of(target: Path | str) -> Path:
    """The adapter's folder of a run, or a folder that is one.

    raises  UserError if there is none
    """
    path = Path(target)
    if (path / STATE).is_file():
        path = Run.open(path).adapter_path
        if not is_adapter_folder(path):
            raise UserError(f"{target} has no adapter yet", hint=f"loraloom resume {target}")
    elif not is_adapter_folder(path):
        if not path.exists():
            Run.open(path)  # raises, and says which runs are near
        raise UserError(f"{target} is neither a run nor an adapter", hint="name a run or an adapter folder")
    return path


def base_of(target: Path | str, model: str | None, *, offline: bool) -> tuple[Recipe | None, str]:
    """How the base is read; or None and why not, where nobody named it or what is named is not here.

    raises  UserError for a base that the caller names and that is not here
    """
    path = Path(target)
    if model is None and not (path / STATE).is_file() and not about_base(path).get("base_model_name_or_path"):
        return None, "the adapter does not name its base; --model does"
    found = find_target(target, model=model)
    try:
        with near_runs(found):
            hub.resolve(
                found.base.id,
                revision=found.base.revision,
                offline=offline,
                allow_pickle=found.base.allow_pickle,
            )
    except UserError as error:
        if model is not None:
            raise
        return None, f"{error.message}; --model names another place"
    return recipe_of(found, None, None, offline=offline), ""


# ---- the whole ----------------------------------------------------------------------------------------------


def gathered(walk: Walk, target: Path, other: Path | None, recipe: Recipe | None) -> Numbers:
    """Everything that analysis.json holds."""
    adapter = walk.adapters.adapters["adapter"]
    comparison = None
    if other is not None:
        notes = same_start(walk)
        comparison = {"with": who(walk, "other", other), "layers": walk.pairs, "notes": notes}
    settings = {
        "k": walk.wanted.k,
        "epsilon": walk.wanted.epsilon,
        "exact_up_to": EXACT_SIDE,
        "leading_above": LEADING,
    }
    found: Numbers = {
        "format": 1,
        "created": now(),
        "adapter": who(walk, "adapter", target),
        "base": str(recipe.folder) if recipe is not None else None,
        "base_kept_in": (recipe.kept_in.get("table") or "as it is") if recipe is not None else None,
        "notes": [*walk.notes, *exactness(walk, recipe)],
        "settings": settings,
        "kinds": kinds(walk.layers),
        "layers": walk.layers,
        "comparison": comparison,
    }
    found["checks"] = checks(walk.layers, merges=adapter.method.mergeable)
    return found


def who(walk: Walk, name: str, path: Path) -> Numbers:
    adapter = walk.adapters.adapters[name]
    about = {"name": path.name or str(path), "path": str(path), "method": adapter.spec.method}
    ranks = {site.method.r for site in adapter.sites.values()}
    return about | {"r": max(ranks, default=None), "alpha": adapter.method.alpha, "seed": adapter.spec.seed}


def exactness(walk: Walk, recipe: Recipe | None) -> list[str]:
    """What is not exact, and whether the adapter was read as something else."""
    notes = []
    if any(row.get("exact") is False for row in walk.layers):
        notes.append(
            f"Of weights whose smaller side is above {EXACT_SIDE}, W's directions are the {LEADING} leading ones, by "
            "subspace iteration: there, intruder dimensions are counted against these, so they are at most so many."
        )
    if any(row.get("dense") and row.get("effective_rank") is None and row.get("norm") for row in walk.layers):
        notes.append(
            "An update that is no low-rank product has a singular value for each of its rows or columns; of "
            f"those above {EXACT_SIDE} only the leading ones are found, and there is no effective rank."
        )
    if walk.exported:
        notes.append("It is read as the plain LoRA that it was written as: there are no A and B of its own.")
    return notes


def same_start(walk: Walk) -> list[str]:
    """A warning where phi shows the common start and not what was learnt."""
    one, two = walk.adapters.adapters["adapter"], walk.adapters.adapters["other"]
    known = all(read_record_at(walk, name) for name in ("adapter", "other"))
    drawn = one.spec.method == two.spec.method and any("A" in pair["sides"] for pair in walk.pairs)
    if known and drawn and one.spec.seed == two.spec.seed:
        return [
            f"Both started from seed {one.spec.seed}: the rows that A began with are the same in both, and φ of A "
            "counts them. B began at zero: look at B, or train one of them with another seed."
        ]
    return []


def read_record_at(walk: Walk, name: str) -> bool:
    """Whether an adapter's own record tells its seed; PEFT's settings do not."""
    folder = walk.folders.get(name)
    return folder is not None and read_record(folder) is not None


def kinds(layers: Sequence[Mapping[str, Any]]) -> list[Numbers]:
    """Medians over the layers of each kind of weight; intruders are summed."""
    found = []
    for kind in dict.fromkeys(row["kind"] for row in layers):
        rows = [row for row in layers if row["kind"] == kind]

        def mid(path: str, rows: Sequence[Mapping[str, Any]] = rows) -> float | None:
            values = [value for row in rows if (value := at(row, path)) is not None]
            return median(values) if values else None

        counts = [row["intruders"] for row in rows if row.get("intruders") is not None]
        found.append(
            {
                "kind": kind,
                "layers": len(rows),
                "r": max(row["r"] for row in rows),
                **{key: mid(key) for key in ("norm", "norm_W", "ratio", "effective_rank", "stable_rank")},
                "amplification": mid("amplification"),
                **{f"projection_{key}": mid(f"projections.{key}") for key in ("update", "own", "random")},
                "intruders": sum(counts) if counts else None,
                **{name: mid(f"rounding.{name}.error") for name in SIXTEEN},
            }
        )
    return found


# ---- health -------------------------------------------------------------------------------------------------


def checks(layers: Sequence[Mapping[str, Any]], *, merges: bool) -> list[Numbers]:
    """Verdicts in words, each good, warn, bad or even (neither)."""
    found = [finite_check(layers), learnt_check(layers)]
    if any(row.get("rounding") for row in layers):
        found += [rounding_check(layers, name) for name in SIXTEEN] if merges else []
        found.append(intruder_check(layers))
    return found


def finite_check(layers: Sequence[Mapping[str, Any]]) -> Numbers:
    broken = [row["name"] for row in layers if row["state"] == "not finite"]
    detail = f"all of {plural(len(layers), 'layer')}"
    if broken:
        detail = f"{len(broken)} of {plural(len(layers), 'layer')} hold NaN or infinity: {few(broken)}"
    return verdict("finite", "bad" if broken else "good", detail)


def learnt_check(layers: Sequence[Mapping[str, Any]]) -> Numbers:
    """Layers whose update is zero, and those that hardly moved."""
    zero = [row for row in layers if row["state"].startswith("zero")]
    if zero:
        reasons = sorted({row["state"].removeprefix("zero").removeprefix(": ") for row in zero} - {""})
        why = f" ({'; '.join(reasons)}: no step reached it, or all were undone)" if reasons else ""
        detail = f"{len(zero)} of {plural(len(layers), 'layer')} did not learn{why}: "
        return verdict("every layer learnt", "bad", detail + few([row["name"] for row in zero]))
    sizes = [row["norm"] for row in layers if row.get("norm")]
    typical = median(sizes) if sizes else 0.0
    still = [row["name"] for row in layers if row.get("norm") and row["norm"] < HARDLY * typical]
    if still:
        detail = f"{len(still)} moved less than {percent(HARDLY)} of the median layer: {few(still)}"
        return verdict("every layer learnt", "warn", detail)
    return verdict("every layer learnt", "good", f"no update of {plural(len(layers), 'layer')} is zero")


def rounding_check(layers: Sequence[Mapping[str, Any]], name: str) -> Numbers:
    """What a merge in 16 bits would lose, over all layers."""
    title = f"merging in {name}"
    rows = [row for row in layers if at(row, f"rounding.{name}")]
    over = [row["name"] for row in rows if row["rounding"][name]["error"] is None]
    if over:
        return verdict(title, "bad", f"values beyond the format's range: {few(over)}")
    total = math.hypot(*(row["norm"] for row in rows))
    lost = math.hypot(*(row["rounding"][name]["error"] * row["norm"] for row in rows)) / total
    top = max(rows, key=lambda row: row["rounding"][name]["error"])
    worst = top["rounding"][name]
    detail = (
        f"loses {percent(lost)} of the update; most in {top['name']}, {percent(worst['error'])}, where "
        f"{percent(worst['unchanged'])} of the weights stay as they were"
    )
    return verdict(title, "warn" if lost > LARGE else "good", detail)


def intruder_check(layers: Sequence[Mapping[str, Any]]) -> Numbers:
    """Intruder dimensions are told, not judged: how many are too many depends on the task."""
    counts = {row["name"]: row["intruders"] for row in layers if row.get("intruders") is not None}
    some = sorted((name for name, count in counts.items() if count), key=lambda name: -counts[name])
    if not some:
        return verdict("intruder dimensions", "even", f"none in {plural(len(counts), 'layer')}")
    told = ", ".join(f"{name} ({counts[name]})" for name in some[:NAMED])
    detail = f"{sum(counts.values())} in {len(some)} of {plural(len(counts), 'layer')}, most in {told}"
    return verdict("intruder dimensions", "even", detail)


def verdict(name: str, level: str, detail: str) -> Numbers:
    return {"name": name, "level": level, "ok": level != "bad", "detail": detail}


def few(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def sentences(analysis: Mapping[str, Any]) -> list[str]:
    """What a reader should know first."""
    told = []
    moved = sorted((k for k in analysis["kinds"] if k.get("ratio")), key=lambda kind: -kind["ratio"])
    if moved:
        parts = [f"{kind['kind']} by {percent(kind['ratio'], 2)}" for kind in ends(moved)]
        told.append(f"The typical layer moved {spoken(parts, len(moved))} of its weight's norm.")
    ranked = sorted(
        (k for k in analysis["kinds"] if k.get("effective_rank")), key=lambda kind: -kind["effective_rank"]
    )
    if ranked:
        parts = [f"{number(k['effective_rank'], 2)} of {k['r']} in {k['kind']}" for k in ends(ranked)]
        told.append(f"Effective rank: {spoken(parts, len(ranked))}.")
    return told


def ends(kinds: Sequence[Numbers]) -> list[Numbers]:
    """The first and the last of them."""
    return [kinds[0], kinds[-1]] if len(kinds) > 1 else list(kinds)


def spoken(parts: Sequence[str], count: int) -> str:
    return (" to " if count > 2 else " and ").join(parts)


# ---- what is written ----------------------------------------------------------------------------------------


def keep(analysis: Numbers, folder: Path) -> Path:
    """Write analysis.json: in a run's folder its report shows it."""
    path = folder / ANALYSIS
    write_text(path, json.dumps(analysis, ensure_ascii=False, separators=(",", ":")) + "\n")
    return path


def write_page(analysis: Numbers, folder: Path, command: str | None = None) -> list[Path]:
    """inspect.html, and each figure as SVG and PNG.

    raises  UserError if matplotlib or jinja2 is missing
    """
    page = folder / "inspect.html"
    level = "bad" if any(check["level"] == "bad" for check in analysis["checks"]) else "good"
    about, other = analysis["adapter"], analysis["comparison"]
    beside = f" beside {other['with']['name']}" if other else ""
    base = Path(analysis["base"]).name if analysis["base"] else None
    content = {
        "title": about["name"] + beside,
        "subtitle": f"{about['method']}, r = {about['r']}" + (f", on {base}" if base else ""),
        "light": level,
        "status": "healthy" if level == "good" else "look at this",
        "verdict": sentences(analysis),
        "analysis": analysis_content(analysis),
        "command": command,
    }
    write_text(page, render("inspect.html.j2", content))
    written = [page]
    for figure in figures_of(analysis):
        written += figure.as_files(folder)
    return written
