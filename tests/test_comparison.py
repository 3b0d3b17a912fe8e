"""Several runs side by side: all measurements in one table, the best marked only beyond noise, --json as the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_run import make_run
from test_report import read

from loraloom import cli
from loraloom.comparison import BEHIND, BEST, TRAINING, comparison, groups
from loraloom.files import write_json
from loraloom.noise import WITHIN
from loraloom.rundir import Run


def row(metric: str, base: float, tuned: float, error: float | None, **more: Any) -> dict[str, Any]:
    found = {"metric": metric, "unit": "share", "lower_is_better": False}
    return (
        found | {"base": {"value": base, "stderr": error}, "tuned": {"value": tuned, "stderr": error}} | more
    )


def run_with(path: Path, tables: dict[str, dict[str, Any]], **settings: Any) -> Run:
    run = make_run(path, settings)
    for place, (name, table) in enumerate(tables.items()):
        write_json(run.path / "eval" / f"{name}.json", {"created": f"2026-01-0{place + 1}"} | table)
    return run


def held(*rows: dict[str, Any], examples: int = 100) -> dict[str, Any]:
    return {"settings": {"examples": examples}, "rows": list(rows)}


def verdicts(found: dict[str, Any], metric: str) -> list[str | None]:
    (line,) = [one for one in found["measurements"] if one["metric"] == metric]
    return [one and one.get("verdict") for one in line["runs"]]


def test_the_best_is_marked_only_beyond_noise_of_every_other(tmp_path: Path) -> None:
    """1.96 standard errors of a difference of two errors of 0.01 are 0.0277."""
    values = {"clear": (0.60, 0.63, 0.50), "close": (0.60, 0.627, 0.50), "even": (0.5, 0.51, 0.52)}
    runs = [
        run_with(
            tmp_path / f"r{place}",
            {"held-out": held(*(row(name, 0.4, three[place], 0.01) for name, three in values.items()))},
        )
        for place in range(3)
    ]
    found = comparison(runs)
    assert verdicts(found, "clear") == [BEHIND, BEST, BEHIND]
    assert verdicts(found, "close") == [WITHIN, WITHIN, BEHIND]
    assert verdicts(found, "even") == [WITHIN, WITHIN, WITHIN]
    assert found["summary"].startswith("r1 (63.0 ± 1.0\u202f%) has the best clear (held-out)")


def test_lower_is_better_where_it_is(tmp_path: Path) -> None:
    how = {"unit": "nats/token", "lower_is_better": True}
    runs = [
        run_with(tmp_path / name, {"held-out": held(row("loss", 2.0, loss, 0.01, **how))})
        for name, loss in (("a", 1.0), ("b", 1.2))
    ]
    assert verdicts(comparison(runs), "loss") == [BEST, BEHIND]


@pytest.mark.parametrize(
    ("error", "lower"),
    [(None, False), (0.0, False), (0.01, None)],
    ids=["none", "all or none", "no direction"],
)
def test_what_has_no_known_error_or_direction_is_not_called_better(
    error: float | None, lower: bool | None, tmp_path: Path
) -> None:
    runs = [
        run_with(tmp_path / name, {"t": held(row("score", 0.1, value, error, lower_is_better=lower))})
        for name, value in (("a", 0.0), ("b", 1.0))
    ]
    assert BEST not in verdicts(comparison(runs), "score")


def test_what_was_asked_differently_is_shown_and_not_judged(tmp_path: Path) -> None:
    tables = [
        {
            "settings": {
                "tasks": {"arc": {"shots": shots, "items": 50, "version": 1}},
                "chat_template": False,
            },
            "rows": [row("arc acc", 0.2, 0.5 + shots / 10, 0.01, task="arc", score="acc", items=50)],
        }
        for shots in (0, 4)
    ]
    found = comparison([run_with(tmp_path / f"r{i}", {"arc": table}) for i, table in enumerate(tables)])
    (line,) = found["measurements"]
    assert line["metric"] == "arc, acc"
    assert line["note"] == "shots"
    assert verdicts(found, "arc, acc") == [None, None]
    assert [one["value"] for one in line["runs"]] == [0.5, 0.9]
    assert "none is called the best" in found["summary"]


def test_held_out_rows_of_two_runs_must_be_the_same(tmp_path: Path) -> None:
    runs = [run_with(tmp_path / n, {"held-out": held(row("exact match", 0.1, 0.5, 0.01))}) for n in "ab"]
    for place, run in enumerate(runs):
        (run.path / "data" / "held-out").mkdir(parents=True)
        (run.path / "data" / "held-out" / "tokens.safetensors").write_bytes(bytes([place]))
    (line,) = comparison(runs)["measurements"]
    assert line["note"] == "held-out rows or their tokens"


def test_bases_that_differ_stand_below_each_run(tmp_path: Path) -> None:
    same = [run_with(tmp_path / n, {"t": held(row("m", 0.4, 0.5, 0.01))}) for n in "ab"]
    assert comparison(same)["measurements"][0]["base"] == {"value": 0.4, "stderr": 0.01}
    other = run_with(tmp_path / "c", {"t": held(row("m", 0.3, 0.5, 0.01))})
    found = comparison([same[0], other])
    assert found["measurements"][0]["base"] is None
    (group,) = groups(found["measurements"])
    assert [one["base"] for one in group["rows"][0]["cells"]] == [
        "base 40.0 ± 1.0\u202f%",
        "base 30.0 ± 1.0\u202f%",
    ]


def test_a_run_without_a_measurement_leaves_its_cell_empty(tmp_path: Path) -> None:
    runs = [
        run_with(tmp_path / "a", {"held-out": held(row("bleu", 3.0, 20.0, 1.0, unit=""))}),
        run_with(tmp_path / "b", {}),
        run_with(tmp_path / "c", {"held-out": held({"metric": "bleu", "base": None, "tuned": None})}),
    ]
    (line,) = comparison(runs)["measurements"]
    assert [one is not None for one in line["runs"]] == [True, False, False]


def test_classifiers_are_compared_by_their_metrics_beside_the_constant_answer(tmp_path: Path) -> None:
    runs = []
    for name, value in (("a", 0.80), ("b", 0.90)):
        measured = row("accuracy", 0.5, value, 0.01, constant={"value": 0.7, "stderr": 0.02})
        table = {"task": "classification", "settings": {"examples": 500}, "rows": [measured]}
        run = run_with(tmp_path / name, {"held-out": table}, task="classification")
        run.log({"kind": "eval", "step": 0, "loss": 0.69, "accuracy": 0.5, "metric": "accuracy"})
        run.log({"kind": "eval", "step": 8, "loss": 0.4, "f1": 0.3, "accuracy": value, "metric": "accuracy"})
        run.update(best={"step": 8, "loss": 0.4, "metric": "accuracy", "accuracy": value})
        runs.append(run)
    found = comparison(runs)
    assert [(one["table"], one["metric"]) for one in found["measurements"]] == [
        (TRAINING, "accuracy"),
        (TRAINING, "f1"),
        (TRAINING, "loss"),
        ("held-out", "accuracy"),
    ]
    assert found["measurements"][3]["base"] == {"value": 0.7, "stderr": 0.02}
    assert verdicts({"measurements": found["measurements"][3:]}, "accuracy") == [BEHIND, BEST]
    assert groups(found["measurements"])[1]["about"] == "base: the constant answer"


def test_json_holds_what_the_page_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("a", 0.5), ("b", 0.8)):
        run_with(
            tmp_path / name,
            {"held-out": held(row("exact match", 0.1, value, 0.01))},
            r=4 if name == "a" else 8,
        )
    page = tmp_path / "page.html"
    assert cli.run(["report", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    _, shown = read(page)
    text = " ".join(shown.text.split())
    assert found["report"] == str(page)
    assert found["names"] == ["a", "b"]
    assert " ".join(found["summary"].split()) in text
    assert "exact match 10.0 ± 1.0 % 50.0 ± 1.0 % 80.0 ± 1.0 %" in text.replace("\u202f", " ")
    assert found["measurements"][0]["runs"][1]["verdict"] == BEST
    assert ["r", ["4", "8"]] in found["differences"]
    assert [row["name"] for row in found["costs"]] == ["steps"]
