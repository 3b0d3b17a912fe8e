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
from loraloom.report import curves_of
from loraloom.rundir import Run


def row(metric: str, base: float, tuned: float, error: float | None, **more: Any) -> dict[str, Any]:
    """Of 100 items, but no count of them: a share with one is judged by its counts."""
    found = {"metric": metric, "unit": "score", "lower_is_better": False, "items": 100}
    return (
        found | {"base": {"value": base, "stderr": error}, "tuned": {"value": tuned, "stderr": error}} | more
    )


def run_with(path: Path, tables: dict[str, dict[str, Any]], **settings: Any) -> Run:
    run = make_run(path, settings)
    for place, (name, table) in enumerate(tables.items()):
        write_json(run.path / "eval" / f"{name}.json", {"created": f"2026-01-0{place + 1}"} | table)
    return run


def held(*rows: dict[str, Any], digest: str | None = "sha256:1") -> dict[str, Any]:
    return {"settings": {"examples": 100} | ({"rows": digest} if digest else {}), "rows": list(rows)}


def task_row(task: str, value: float, error: float | None = 0.01, **more: Any) -> dict[str, Any]:
    return row(f"{task} acc", 0.2, value, error, task=task, score="acc", **more)


def trained(run: Run, **best: Any) -> Run:
    """A run with the evaluation that training makes, on the rows that every such run has."""
    run.log({"kind": "eval", "step": 8, "loss": 1.0} | best)
    (run.path / "data" / "held-out").mkdir(parents=True, exist_ok=True)
    (run.path / "data" / "held-out" / "tokens.safetensors").write_bytes(b"rows")
    return run


def verdicts(found: dict[str, Any], metric: str) -> list[str | None]:
    (line,) = [one for one in found["measurements"] if one["metric"] == metric]
    return [one and one.get("verdict") for one in line["runs"]]


def test_the_best_is_marked_only_beyond_noise_of_every_other(tmp_path: Path) -> None:
    """Student's 1.97 standard errors of a difference of two errors of 0.01 are 0.0279."""
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
    assert found["summary"].startswith("r1 (0.6300 ± 0.010) has the best clear (held-out): every other")


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
    assert verdicts(comparison(runs), "score") == [None, None]


def test_shares_of_all_or_none_are_told_by_their_counts(tmp_path: Path) -> None:
    """Fisher's p of 0 against 4 of 4 is 0.029, of 0 against 3 of 3 it is 0.1; like shares are even."""
    for count, said in ((3, WITHIN), (4, BEST)):
        runs = [
            run_with(
                tmp_path / f"{name}{count}",
                {"t": held(row("m", 0.1, value, 0.0, unit="share", items=count))},
            )
            for name, value in (("a", 0.0), ("b", 1.0))
        ]
        assert verdicts(comparison(runs), "m")[1] == said
    runs = [run_with(tmp_path / name, {"t": held(row("m", 0.1, 1.0, 0.0))}) for name in "cd"]
    assert verdicts(comparison(runs), "m") == [WITHIN, WITHIN]


def test_of_few_examples_more_is_noise(tmp_path: Path) -> None:
    """2.2 standard errors of the difference: beyond 1.96, within Student's 2.31 of twice 5 examples."""
    for items, said in ((5, WITHIN), (500, BEST)):
        runs = [
            run_with(tmp_path / f"{name}{items}", {"t": held(row("m", 0.1, value, 0.1, items=items))})
            for name, value in (("a", 1.0), ("b", 1.31))
        ]
        assert verdicts(comparison(runs), "m")[1] == said


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
    assert line["note"] == "not the same: shots"
    assert verdicts(found, "arc, acc") == [None, None]
    assert [one["value"] for one in line["runs"]] == [0.5, 0.9]
    assert "none is called the best" in found["summary"]


@pytest.mark.parametrize("name", ["held-out", "new"])
@pytest.mark.parametrize(
    ("digests", "note"),
    [
        (("sha256:1", "sha256:2"), "not the same: rows or their tokens"),
        (("sha256:1", None), "not the same: rows or their tokens"),
        ((None, None), "not known to be the same: rows or their tokens"),
    ],
)
def test_runs_are_judged_on_the_same_rows_alone(
    name: str, digests: tuple[str | None, str | None], note: str, tmp_path: Path
) -> None:
    """Training's own rows are the same: they do not vouch for those of a table."""
    runs = [
        trained(run_with(tmp_path / n, {name: held(row("m", 0.1, value, 0.01), digest=digest)}))
        for n, value, digest in zip("ab", (0.5, 0.9), digests, strict=True)
    ]
    line = comparison(runs)["measurements"][-1]
    assert line["note"] == note
    assert [one.get("verdict") for one in line["runs"]] == [None, None]


def test_other_documents_of_a_local_task_are_other_questions(tmp_path: Path) -> None:
    runs = []
    for n in "ab":
        about = {"arc_local": {"shots": 0, "items": 50, "version": 1, "sha256": n}}
        table = {"settings": {"tasks": about}, "rows": [task_row("arc_local", 0.5)]}
        runs.append(run_with(tmp_path / n, {"arc": table}))
    assert comparison(runs)["measurements"][0]["note"] == "not the same: sha256"


def test_a_group_is_asked_what_its_tasks_are(tmp_path: Path) -> None:
    runs = []
    for shots in (0, 5):
        about = {name: {"shots": of, "items": 50, "version": 1} for name, of in (("law", 0), ("math", shots))}
        table = {
            "settings": {"tasks": about},
            "rows": [task_row("mmlu", 0.5 + shots / 10), task_row("law", 0.5)],
        }
        runs.append(run_with(tmp_path / f"r{shots}", {"mmlu": table}))
    notes = {line["metric"]: line["note"] for line in comparison(runs)["measurements"]}
    assert notes == {"mmlu, acc": "not the same: shots", "law, acc": ""}


def test_units_do_not_share_a_row_nor_a_chart(tmp_path: Path) -> None:
    text = trained(run_with(tmp_path / "text", {}))
    text.update(base_loss=2.0, best={"step": 8, "loss": 1.0})
    numbers = trained(run_with(tmp_path / "numbers", {}, task="classification"))
    found = comparison([text, numbers])
    assert [(line["metric"], line["unit"]) for line in found["measurements"]] == [
        ("loss", "nats/token"),
        ("loss", "squared"),
    ]
    assert [line["base"] and line["base"]["value"] for line in found["measurements"]] == [2.0, None]
    charts = {chart.unit: chart for chart in curves_of([text, numbers], found["names"]) if chart.count}
    assert list(charts) == ["nats per target token", "squared error"]


def test_a_base_that_one_run_lacks_is_not_that_of_all(tmp_path: Path) -> None:
    rows = [row("m", 0.4, 0.5, 0.01), row("m", 0.4, 0.5, 0.01) | {"base": None}]
    runs = [run_with(tmp_path / n, {"t": held(one)}) for n, one in zip("ab", rows, strict=True)]
    found = comparison(runs)
    assert found["measurements"][0]["base"] is None
    cells = groups(found["measurements"])[0]["rows"][0]["cells"]
    assert [one["base"] for one in cells] == ["base 0.4000 ± 0.010", ""]


def test_the_summary_names_the_table_and_the_direction(tmp_path: Path) -> None:
    """A row that does not say which way is better has no highest; a table is not training."""
    lines = [("word_perplexity", None), ("bleu", False)]
    runs = [
        run_with(
            tmp_path / n,
            {"nlg": held(*(row(m, 0.1, value, None, lower_is_better=lower) for m, lower in lines))},
        )
        for n, value in (("a", 0.5), ("b", 0.75))
    ]
    assert comparison(runs)["summary"] == (
        "b had the highest bleu (nlg), 0.7500; a had 0.5000. Whether that is more than noise is not known."
    )


def test_the_summary_counts_the_runs_that_were_measured(tmp_path: Path) -> None:
    values = (("a", 0.5), ("b", 0.75), ("c", None))
    runs = [
        run_with(tmp_path / n, {"t": held(row("bleu", 0.1, value, 0.01))} if value else {})
        for n, value in values
    ]
    said = "has the best bleu (t) of the 2 runs measured at it: every other is further off than noise."
    assert comparison(runs)["summary"].endswith(said)


def test_runs_that_are_even_stand_in_their_order(tmp_path: Path) -> None:
    run = trained(run_with(tmp_path / "a", {}))
    assert comparison([run, run])["summary"].startswith("a (1) and a (2) have the same held-out loss, ")


def test_bases_that_differ_stand_below_each_run(tmp_path: Path) -> None:
    same = [run_with(tmp_path / n, {"t": held(row("m", 0.4, 0.5, 0.01))}) for n in "ab"]
    assert comparison(same)["measurements"][0]["base"] == {"value": 0.4, "stderr": 0.01}
    other = run_with(tmp_path / "c", {"t": held(row("m", 0.3, 0.5, 0.01))})
    found = comparison([same[0], other])
    assert found["measurements"][0]["base"] is None
    (group,) = groups(found["measurements"])
    assert [one["base"] for one in group["rows"][0]["cells"]] == [
        "base 0.4000 ± 0.010",
        "base 0.3000 ± 0.010",
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
        table = {"task": "classification", "settings": {"rows": "sha256:1"}, "rows": [measured]}
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
    assert "exact match score 0.1000 ± 0.010 0.5000 ± 0.010 0.8000 ± 0.010" in text.replace("\u202f", " ")
    assert found["measurements"][0]["runs"][1]["verdict"] == BEST
    assert ["r", ["4", "8"]] in found["differences"]
    assert [row["name"] for row in found["costs"]] == ["steps"]
