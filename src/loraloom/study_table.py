"""The table of a study: what runs with several seeds came to, and which differences are more than the seeds' spread.

    main         what the settings are compared by: the loss, or a classifier's metric, such as accuracy
    mean, sd     over the seeds of a setting, sd with n - 1
    chosen       the setting with the best mean of it on the selection rows; the final rows have no part in it
    verdict      Welch's test of a setting's final scores against those of the chosen one, p < 0.05 on both sides; of
                 the logarithms of losses, because their spreads grow with the loss

A pair of settings is tested by itself: of twenty such tests one may fail by chance.

units   loss in nats a token or a row; seconds of training steps alone; memory in bytes, the peak of a run's process
        or GPU
source  Welch 1947, Biometrika 34, 28-35
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from .noise import RARE, satterthwaite, student
from .study_file import Setting, Study
from .wording import duration, number, percent, plural, signed

LOSS, MATCH = "loss", "exact_match"
SCORES = ("selection", LOSS, MATCH, "seconds", "memory", "base_loss")
TEXT_UNIT = "nats a token"
UNITS = {
    "nats/row": "nats a row",
    "squared": "squared error",
}  # of a classifier's loss, as its evaluation has it
CHOSEN, WITHIN, BETTER, WORSE = "chosen", "within the seeds' spread", "better", "worse"
ONE_RUN = "one run: no spread"
NO_SPREAD = "no spread over these seeds"
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
        "main": finished[0]["main"] if finished else None,
        "unit": finished[0]["unit"] if finished else None,
    }
    for key in SCORES:
        row[key] = summary([run[key] for run in finished if run.get(key) is not None])
    names = list(dict.fromkeys(name for run in finished for name in run.get("tasks", {})))
    row["tasks"] = {name: task_summary(name, finished) for name in names}
    return row


def task_summary(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A benchmark's or a classifier's metric over the seeds; share says whether it is one.

    base  the mean of what the base has, or a classifier that does not read the text
    """
    cells = [run["tasks"][name] for run in runs if name in run["tasks"]]
    base = {"base": mean(cell["base"] for cell in cells)} if all("base" in cell for cell in cells) else {}
    return {**(summary([cell["value"] for cell in cells]) or {}), "share": cells[0]["share"]} | base


def summary(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean and standard deviation over seeds; the deviation of a single one is None."""
    if not values:
        return None
    return {
        "mean": mean(values),
        "sd": stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def main_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the settings are compared by."""
    return next((row["main"] for row in rows if row.get("main")), LOSS)


def unit_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of the loss."""
    return next((UNITS[row["unit"]] for row in rows if row.get("unit") in UNITS), TEXT_UNIT)


def measures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the final rows were scored by: what the settings are compared by stands first."""
    main = main_of(rows)
    others = [MATCH] * any(row[MATCH] for row in rows) + tasks_of(rows) + [LOSS]
    return [main, *(name for name in others if name != main)]


def measured(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A score of the final rows over the seeds; empty where there is none."""
    found = row[name] if name in (LOSS, MATCH) else row["tasks"].get(name)
    return {"share": name == MATCH} | found if found else {}


def choose(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row with the best mean on the selection rows, of those whose runs are all finished."""
    sign = 1 if main_of(rows) == LOSS else -1
    whole = [row for row in rows if row["selection"] and not row["failed"] and not row["open"]]
    return min(whole, key=lambda row: sign * row["selection"]["mean"], default=None)


def verdict(row: Mapping[str, Any], chosen: Mapping[str, Any] | None) -> str:
    """A row's final score beside the chosen one's, in words."""
    if chosen is None or row["loss"] is None:
        return ""
    if row is chosen:
        return CHOSEN
    main = main_of([chosen])
    ours, theirs = (measured(one, main)["values"] for one in (row, chosen))
    if len(ours) < 2 or len(theirs) < 2:
        return ONE_RUN
    sides = [ours, theirs]
    if main == LOSS:
        sides = [[math.log(max(loss, TINY)) for loss in side] for side in sides]
    if not any(map(stdev, sides)) and ours[0] != theirs[0]:
        return NO_SPREAD
    if welch(*sides) >= RARE:
        return WITHIN
    return BETTER if (mean(ours) < mean(theirs)) == (main == LOSS) else WORSE


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """The two-sided p of Welch's test: how often chance alone sets two means so far apart.

    raises  ValueError for fewer than two values on a side
    """
    if len(a) < 2 or len(b) < 2:
        raise ValueError("a spread needs two values")
    errors = [stdev(side) / math.sqrt(len(side)) for side in (a, b)]
    apart = mean(a) - mean(b)
    if not any(errors):
        return 1.0 if apart == 0 else 0.0
    return student(apart / math.hypot(*errors), satterthwaite(errors, [len(a), len(b)]))


def sentences(rows: Sequence[dict[str, Any]], sizes: Mapping[str, int]) -> list[str]:
    """What the table says, in words."""
    chosen = choose(rows)
    said = []
    if chosen is not None:
        over, main = plural(len(chosen["seeds"]), "seed"), main_of(rows)
        best = "lowest loss" if main == LOSS else f"highest {main}"
        value = shown(chosen["selection"], share=is_share(chosen, main))
        value += f" {unit_of(rows)}" if main == LOSS else ""
        said.append(
            f"Chosen: {chosen['name']}. Over {over} it has the {best} on the {sizes['selection']} selection "
            f"rows, {value}."
        )
        said.append(final_words(chosen, sizes))
        said += beside(rows, chosen)
    for row in rows:
        said += [f"{row['name']}, seed {one['seed']}, failed: {one['why']}." for one in row["failed"]]
    left = sum(row["open"] for row in rows)
    return said + ([f"{plural(left, 'run')} not made yet."] if left else [])


def final_words(chosen: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    main, match = main_of([chosen]), chosen[MATCH]
    score, share = measured(chosen, main), is_share(chosen, main)
    base = chosen["base_loss"]["mean"] if main == LOSS else score["base"]
    other = "base" if unit_of([chosen]) == TEXT_UNIT else "constant answer"
    words = f"On the {sizes['final']} final rows, which no choice has seen, its {main} is "
    words += f"{shown(score, share=share)}, the {other}'s {percent(base) if share else number(base)}"
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
    same = [f"{row['name']} ({apart(row, chosen)})" for row in rows if row["verdict"] == NO_SPREAD]
    if same:
        said.append(f"Not told from it, for the seeds of neither moved the score: {'; '.join(same)}.")
    if any(row["verdict"] == ONE_RUN for row in rows):
        said.append("With one run of each, no difference is told from the seeds' spread: raise `repeats`.")
    return said


def apart(row: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    main = main_of([chosen])
    change = measured(row, main)["mean"] - measured(chosen, main)["mean"]
    if is_share(chosen, main):
        return signed(100.0 * change, 2) + " points"
    return signed(change, 2)


def is_share(row: Mapping[str, Any], name: str) -> bool:
    return bool(measured(row, name).get("share"))


def shown(cell: Mapping[str, Any] | None, *, share: bool = False) -> str:
    """A mean with its standard deviation over seeds."""
    if not cell:
        return ""
    scale = 100.0 if share else 1.0
    text = number(float(cell["mean"]) * scale, 3 if share else 4)
    if cell["sd"] is not None:
        text += f" \N{PLUS-MINUS SIGN} {number(float(cell['sd']) * scale, 2)}"
    return text + ("\u202f%" if share else "")


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What stands over `cells`."""
    main, *others = measures(rows)
    head = ["setting", "trained", f"selection {main}", f"final {main}"]
    head += [{LOSS: "final loss", MATCH: "exact match"}.get(name, name) for name in others]
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
        shown(row["selection"], share=is_share(row, main_of(rows))),
    ]
    line += [shown(measured(row, name), share=is_share(row, name)) for name in measures(rows)]
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
