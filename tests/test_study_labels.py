"""Studies of classifiers: the metric that settings are compared by, counts without the head, GLUE's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_labels import make_encoder, make_rows

from loraloom import study
from loraloom.config import resolve
from loraloom.data import glue
from loraloom.errors import DataError, UserError
from loraloom.rundir import Run
from loraloom.study_data import as_the_task_has_it, split_data
from loraloom.study_file import read_study
from loraloom.study_page import content
from loraloom.study_plan import plan_study
from loraloom.study_table import BETTER, CHOSEN, WITHIN, WORSE, cells, columns, sentences, table

TASKS = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")


def write(folder: Path, **keys: Any) -> Path:
    path = folder / "labels.yaml"
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "model", "roberta")


def run_of(encoder: Path, data: Path) -> dict[str, Any]:
    """A second of training on 80 rows; 40 are held out."""
    return {
        "task": "classification",
        "model": {"id": str(encoder), "dtype": "float32"},
        "data": {"train": str(data), "eval": 40},
        "r": 4,
        "target_modules": ["q", "v"],
        "train": {"max_steps": 12, "batch_size": 8, "learning_rate": 1e-2, "early_stop": None},
        "eval": {"every": 6},
    }


def test_a_study_of_classifiers_end_to_end(quick: None, encoder: Path, tmp_path: Path) -> None:
    """The planned counts are those that trained, and the metric of the selection rows chooses."""
    settings = [
        {"name": "LoRA"},
        {
            "name": "full",
            "method": "full",
            "r": "auto",
            "target_modules": "auto",
            "train.learning_rate": 1e-3,
        },
        {"name": "BitFit", "method": "bitfit", "r": "auto", "target_modules": "auto"},
    ]
    rows = make_rows(tmp_path / "rows.jsonl")
    path = write(tmp_path, run=run_of(encoder, rows), settings=settings, repeats=2, asks="which?")
    planned = {one.name: one.trainable for one in plan_study(read_study(path), offline=True)}
    assert planned["LoRA"] == 2 * 2 * 4 * (32 + 32)
    record = study.study(path, out=tmp_path / "out", processes=False, offline=True, argv=["loraloom"])
    for run in record["runs"]:
        own = Run(tmp_path / "out" / run["run"])
        final = {row["metric"]: row for row in own.read("eval/final.json", {})["rows"]}
        assert run["trainable"] == planned[run["setting"]] == own.state["trainable"] - own.state["head"]
        assert run["main"] == "accuracy"
        assert run["selection"] == own.state["best"]["accuracy"]
        assert run["tasks"]["accuracy"] == {
            "value": final["accuracy"]["tuned"]["value"],
            "base": final["accuracy"]["constant"]["value"],
            "share": True,
        }
        assert run["loss"] == final["loss"]["tuned"]["value"]
    chosen = max(record["table"], key=lambda row: row["selection"]["mean"])
    assert chosen["verdict"] == CHOSEN
    assert columns(record["table"])[2:7] == [
        "selection accuracy",
        "final accuracy",
        "f1",
        "matthews",
        "final loss",
    ]
    assert f"Chosen: {chosen['name']}. Over 2 seeds it has the highest accuracy" in record["says"][0]
    page = content(tmp_path / "out", record)
    assert [chart.title for chart in page["charts"]] == [
        f"{name} on the final rows" for name in ("Accuracy", "F1", "Matthews", "Loss")
    ]
    assert page["unit"] == "nats a row"


def made(name: str, seed: int, accuracy: float, final: float, loss: float) -> dict[str, Any]:
    scored = {"accuracy": {"value": final, "base": 0.7, "share": True}}
    found = {"setting": name, "seed": seed, "status": "finished", "message": None, "trainable": 10}
    found |= {"main": "accuracy", "unit": "nats/row", "selection": accuracy, "loss": loss, "base_loss": 0.6}
    return found | {"exact_match": None, "seconds": 2.0, "memory": 10**9, "tasks": scored}


def test_more_is_better_and_the_loss_does_not_choose(tmp_path: Path) -> None:
    """b has the best metric to choose by and the worst loss; c and d differ from it on the final rows."""
    settings = [{"name": name} for name in "abcd"]
    found = read_study(write(tmp_path, run={"model": "m", "data": "d"}, settings=settings, repeats=3))
    runs = []
    for seed, noise in enumerate((-0.01, 0.0, 0.01)):
        runs += [
            made("a", seed, 0.85, 0.80 + 2 * noise, 0.1),
            made("b", seed, 0.90, 0.80 + noise, 0.9),
            made("c", seed, 0.80, 0.60 + noise, 0.1),
            made("d", seed, 0.89, 0.95 + noise, 0.1),
        ]
    rows = table(found, runs)
    assert [row["verdict"] for row in rows] == [WITHIN, CHOSEN, WORSE, BETTER]
    said = " ".join(sentences(rows, {"selection": 50, "final": 60}))
    assert "highest accuracy on the 50 selection rows, 90.0 ± 0 %" in said.replace("\u202f", " ")
    assert "its accuracy is 80.0 ± 1.0 %, the constant answer's 70.0 %" in said.replace("\u202f", " ")
    assert "c (\N{MINUS SIGN}20 points)" in said
    assert "d (+15 points)" in said
    line = dict(zip(columns(rows), cells(rows[1], rows), strict=True))
    assert line["final loss"] == "0.9000 ± 0"


def test_the_weights_that_table_2_prints() -> None:
    """0.3 M for RoBERTa base and 0.8 M for RoBERTa large: r = 8 on q and v, without the head."""
    for task in TASKS:
        found = read_study("classification", task)
        plans = {one.name: one.trainable for one in plan_study(found, memory=False, offline=True)}
        assert plans == found.file.expected
        assert plans == {"RoBERTa base": 12 * 2 * 8 * 2 * 768, "RoBERTa large": 24 * 2 * 8 * 2 * 1024}
        figures = {key for one in found.file.published.values() for key in one}
        assert figures == {glue.TASKS[task].metric}
        part = glue.TASKS[task].held_out != "validation"  # the published figures are of all of it
        assert ("mismatched" in found.file.note) == part


@pytest.mark.parametrize(
    ("task", "metric", "kind"), [("cola", "matthews", "classes"), ("stsb", "pearson", "numbers")]
)
def test_what_a_glue_task_says_is_kept_with_its_rows(task: str, metric: str, kind: str) -> None:
    found = read_study("classification", task)
    config = found.config(found.settings[0])
    assert as_the_task_has_it(config) == {"eval.best": metric, "data.labels": kind}


def test_the_tweets_are_refused_offline_if_they_are_not_there() -> None:
    config, _ = resolve(None, {"model": "m", "data.train": "x", "output": "o", "task": "classification"})
    with pytest.raises(UserError, match="offline, and the tweets are not in"):
        split_data(config, made="tweets", offline=True)


def test_equal_texts_with_their_labels_are_on_one_side(tmp_path: Path) -> None:
    items = [{"text": f"w{i % 20} w7", "label": "good" if i % 2 else "bad", "id": i} for i in range(60)]
    data = make_rows(tmp_path / "rows.jsonl", items)
    given = {"model": "m", "data.train": str(data), "output": "o", "task": "classification", "data.eval": 8}
    split, _ = split_data(resolve(None, given)[0], made=None)
    sides = [{row.fields["text"] for row in side} for side in (split.train[0], split.selection, split.final)]
    assert [len(side) for side in sides] == [12, 4, 4]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]


def test_settings_of_two_tasks_are_no_study(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        run={"model": "m", "data": "d.csv"},
        settings=[{"name": "text"}, {"name": "labels", "task": "classification"}],
    )
    with pytest.raises(UserError, match="different tasks"):
        read_study(path)


def test_settings_are_compared_by_one_metric(tmp_path: Path) -> None:
    """A loss of 0.689 beside accuracies would be shown as 68.9 %, and could win."""
    path = write(
        tmp_path,
        run={"task": "classification", "model": "m", "data": "d.csv"},
        settings=[{"name": "by loss", "eval.best": "loss"}, {"name": "as given"}],
    )
    with pytest.raises(UserError, match="compared by unlike scores") as caught:
        read_study(path)
    assert caught.value.details == ["eval.best: loss (by loss), auto (as given)"]
    both = write(
        tmp_path, run={"model": "m", "data": "d"}, grid={"task": ["classification"], "eval.best": ["loss"]}
    )
    assert read_study(both).config(read_study(both).settings[0]).eval.best == "loss"


def test_a_column_that_is_not_there_is_said(encoder: Path, tmp_path: Path) -> None:
    data = make_rows(tmp_path / "rows.jsonl", [{"words": "w1", "label": "a"}, {"words": "w2", "label": "b"}])
    path = write(tmp_path, run=run_of(encoder, data))
    with pytest.raises(DataError, match="no column for the text"):
        study.study(path, out=tmp_path / "out", processes=False, offline=True, argv=["loraloom"])
