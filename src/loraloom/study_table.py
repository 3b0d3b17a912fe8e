"""The table of a study: what runs with several seeds came to, and which differences are more than the seeds' spread.

    mean, sd     over the seeds of a setting, sd with n - 1
    chosen       the setting with the lowest mean loss on the selection rows; the final rows have no part in it
    verdict      Welch's test of the logarithms of a setting's final losses against those of the chosen one, p < 0.05
                 on both sides; of logarithms, because spreads grow with the loss

A pair of settings is tested by itself: of twenty such tests one may fail by chance.

units   loss in nats a token; seconds of training steps alone; memory in bytes, the peak of a run's process or GPU
source  Welch 1947, Biometrika 34, 28-35
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from .study_file import Setting, Study
from .wording import duration, number, plural

SCORES = ("selection", "loss", "exact_match", "seconds", "memory", "base_loss")
CHOSEN, WITHIN, BETTER, WORSE = "chosen", "within the seeds' spread", "better", "worse"
ONE_RUN = "one run: no spread"
GIGABYTE = 1e9
TINY = 1e-12  # a loss of nothing has no logarithm


def table(study: Study, runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each setting, in the study's order."""
    rows = [row_of(study, one, [run for run in runs if run["setting"] == one.name]) for one in study.settings]
    chosen = choose(rows)
    for row in rows:
        row["verdict"] = verdict(row, chosen)
    return rows


def row_of(study: Study, setting: Setting, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the finished runs of a setting came to."""
    finished = [run for run in runs if run["status"] == "finished"]
    row: dict[str, Any] = {
        "name": setting.name,
        "group": setting.group,
        "x": setting.x,
        "trainable": finished[0]["trainable"] if finished else None,
        "seeds": [run["seed"] for run in finished],
        "failed": [{"seed": run["seed"], "why": run["message"]} for run in runs if run["status"] == "failed"],
        "open": sum(run["status"] == "open" for run in runs),
        "published": study.file.published.get(setting.name, {}),
    }
    for key in SCORES:
        row[key] = summary([run[key] for run in finished if run.get(key) is not None])
    names = list(dict.fromkeys(name for run in finished for name in run.get("tasks", {})))
    row["tasks"] = {name: task_summary(name, finished) for name in names}
    return row


def task_summary(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A benchmark's metric over the seeds; share says whether it is one."""
    cells = [run["tasks"][name] for run in runs if name in run["tasks"]]
    return {**(summary([cell["value"] for cell in cells]) or {}), "share": cells[0]["share"]}


def summary(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean and standard deviation over seeds; the deviation of a single one is None."""
    if not values:
        return None
    return {
        "mean": mean(values),
        "sd": stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def choose(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row with the lowest loss on the selection rows, of those whose runs are all finished."""
    whole = [row for row in rows if row["selection"] and not row["failed"] and not row["open"]]
    return min(whole, key=lambda row: row["selection"]["mean"], default=None)


def verdict(row: Mapping[str, Any], chosen: Mapping[str, Any] | None) -> str:
    """A row's final loss beside the chosen one's, in words."""
    if chosen is None or row["loss"] is None:
        return ""
    if row is chosen:
        return CHOSEN
    ours, theirs = row["loss"]["values"], chosen["loss"]["values"]
    if len(ours) < 2 or len(theirs) < 2:
        return ONE_RUN
    if welch(*([math.log(max(loss, TINY)) for loss in side] for side in (ours, theirs))) >= 0.05:
        return WITHIN
    return BETTER if mean(ours) < mean(theirs) else WORSE


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """The two-sided p of Welch's test: how often chance alone sets two means so far apart.

    raises  ValueError for fewer than two values on a side
    """
    if len(a) < 2 or len(b) < 2:
        raise ValueError("a spread needs two values")
    shares = [stdev(side) ** 2 / len(side) for side in (a, b)]
    apart, error = mean(a) - mean(b), sum(shares)
    if error == 0:
        return 1.0 if apart == 0 else 0.0
    freedom = error**2 / sum(share**2 / (len(side) - 1) for share, side in zip(shares, (a, b)))
    return student(apart / math.sqrt(error), freedom)


def student(t: float, freedom: float) -> float:
    """P(|T| > |t|) of Student's t: with t = sqrt(n) tan(u) the density is cos(u)^(n - 1), summed by Simpson's rule."""
    n, count = freedom - 1, 2000
    end = math.atan2(abs(t), math.sqrt(freedom))
    heights = [math.cos(end * i / count) ** n for i in range(count + 1)]
    inside = end / count / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1::2]) + 2 * sum(heights[2:-1:2]))
    whole = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    return max(0.0, 1 - inside / whole)


def sentences(rows: Sequence[dict[str, Any]], sizes: Mapping[str, int]) -> list[str]:
    """What the table says, in words."""
    chosen = choose(rows)
    said = []
    if chosen is not None:
        over = plural(len(chosen["seeds"]), "seed")
        said.append(
            f"Chosen: {chosen['name']}. Over {over} it has the lowest loss on the {sizes['selection']} selection "
            f"rows, {shown(chosen['selection'])} nats a token."
        )
        said.append(final_words(chosen, sizes))
        said += beside(rows, chosen)
    for row in rows:
        said += [f"{row['name']}, seed {one['seed']}, failed: {one['why']}." for one in row["failed"]]
    left = sum(row["open"] for row in rows)
    return said + ([f"{plural(left, 'run')} not made yet."] if left else [])


def final_words(chosen: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    match = chosen["exact_match"]
    base = chosen["base_loss"]
    words = (
        f"On the {sizes['final']} final rows, which no choice has seen, its loss is {shown(chosen['loss'])}"
    )
    words += f", the base's {number(base['mean'])}" if base else ""
    return words + (f"; {shown(match, share=True)} of the answers are exact." if match else ".")


def beside(rows: Sequence[dict[str, Any]], chosen: Mapping[str, Any]) -> list[str]:
    """The other settings by what the test says of them."""
    said = []
    for kind, words in (
        (WITHIN, "Within the seeds' spread of it:"),
        (WORSE, "Worse on the final rows:"),
        (BETTER, "Better on the final rows, though not chosen:"),
    ):
        names = [
            f"{row['name']} ({apart(row, chosen)})" if kind != WITHIN else row["name"]
            for row in rows
            if row["verdict"] == kind
        ]
        if names:
            said.append(f"{words} {'; '.join(names)}.")
    if any(row["verdict"] == ONE_RUN for row in rows):
        said.append("With one run of each, no difference is told from the seeds' spread: raise `repeats`.")
    return said


def apart(row: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    change = row["loss"]["mean"] - chosen["loss"]["mean"]
    return ("+" if change > 0 else "") + number(change, 2)


def shown(cell: Mapping[str, Any] | None, *, share: bool = False) -> str:
    """A mean with its standard deviation over seeds."""
    if cell is None:
        return ""
    scale = 100.0 if share else 1.0
    text = number(float(cell["mean"]) * scale, 3 if share else 4)
    if cell["sd"] is not None:
        text += f" \N{PLUS-MINUS SIGN} {number(float(cell['sd']) * scale, 2)}"
    return text + ("\u202f%" if share else "")


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What stands over `cells`."""
    head = ["setting", "trained", "selection loss", "final loss", "exact match", *tasks_of(rows)]
    head += ["time", "peak", "beside the chosen"]
    return [*head, "published"] if any(row["published"] for row in rows) else head


def tasks_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["tasks"]))


def cells(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row as text."""
    seconds, memory = row["seconds"], row["memory"]
    line = [
        row["name"],
        f"{row['trainable']:,}" if row["trainable"] is not None else "",
        shown(row["selection"]),
        shown(row["loss"]),
        shown(row["exact_match"], share=True),
    ]
    scored = (row["tasks"].get(name) for name in tasks_of(rows))
    line += [shown(cell, share=bool(cell and cell["share"])) for cell in scored]
    line += [
        duration(seconds["mean"]) if seconds else "",
        f"{max(memory['values']) / GIGABYTE:.2f} GB" if memory else "",
        row["verdict"] or ("failed" if row["failed"] else "not run" if row["open"] else ""),
    ]
    return [*line, published(row["published"])] if any(one["published"] for one in rows) else line


def published(figures: Mapping[str, float]) -> str:
    """Published figures of a setting in words."""
    units = {"seconds": duration, "memory_gb": lambda gb: f"{number(float(gb))} GB"}
    return ", ".join(
        units[key](value) if key in units else f"{key.replace('_', ' ')} {value:g}"
        for key, value in figures.items()
    )
