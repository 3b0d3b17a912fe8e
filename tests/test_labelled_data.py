"""Rows with labels: columns, labels, bad rows, lengths, the held-out side, and the GLUE tasks without a network."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_labels import make_rows, rows, tokenizer

from loraloom.config import DataConfig
from loraloom.data import Labelled, prepare_labels
from loraloom.data.cache import fetch_labelled, store_labelled
from loraloom.data.glue import TASKS
from loraloom.data.labels import as_name, as_number, labels_of
from loraloom.errors import DataError


def read(path: Path | str, **changes: Any) -> Labelled:
    config = DataConfig(train=str(path), **{"eval": 0.0} | changes)  # type: ignore[arg-type]
    return prepare_labels(config, tokenizer(), model_max_length=40, progress=False)


@pytest.mark.parametrize(
    ("columns", "text", "pair"),
    [
        (["sentence", "label"], "sentence", None),
        (["sentence1", "sentence2", "label"], "sentence1", "sentence2"),
        (["premise", "hypothesis", "label"], "premise", "hypothesis"),
        (["question", "sentence", "label"], "question", "sentence"),
        (["question", "label"], "question", None),
        (["text", "class"], "text", None),
        (["idx", "question1", "question2", "label"], "question1", "question2"),
    ],
)
def test_columns_are_found(columns: list[str], text: str, pair: str | None, tmp_path: Path) -> None:
    items = [
        {name: f"w{i} w{at}" for at, name in enumerate(columns)} | {columns[-1]: "ab"[i % 2]}
        for i in range(6)
    ]
    found = read(make_rows(tmp_path / "d.jsonl", items)).report.columns
    assert (found["text"], found.get("pair"), found["label"]) == (text, pair, columns[-1])


def test_columns_can_be_named_and_wrong_names_are_refused(tmp_path: Path) -> None:
    items = [{"a": f"w{i}", "b": f"w{i + 1}", "c": i % 2} for i in range(6)]
    file = make_rows(tmp_path / "d.jsonl", items)
    found = read(file, map={"text": "a", "pair": "b", "label": "c"})
    assert found.report.labels == ["0", "1"]
    assert found.train[0].types[:3] == [0, 0, 0]
    assert 1 in found.train[0].types
    with pytest.raises(DataError, match="no column for the text and the label") as caught:
        read(file)
    assert caught.value.hint == "--set data.map.text=COLUMN --set data.map.label=COLUMN"
    for wrong, said in (({"prompt": "a"}, "not a field"), ({"text": "z"}, "no column 'z'")):
        with pytest.raises(DataError, match=said):
            read(file, map=wrong)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 2, 2], ["2", "10"]),
        (["10", "2", " 2 "], ["2", "10"]),
        ([1.0, 0.0], ["0", "1"]),
        ([True, False], ["false", "true"]),
        ([0, "neutral"], ["0", "neutral"]),
        ([0.5, 1, 3.2], []),
        (["0.5", "1"], []),
    ],
)
def test_what_labels_are(values: list[Any], names: list[str]) -> None:
    assert list(labels_of([("r", value) for value in values], "auto").names) == names


def test_labels_can_be_said_to_be_numbers_or_classes(tmp_path: Path) -> None:
    file = make_rows(tmp_path / "d.jsonl", [{"text": f"w{i}", "label": i % 3} for i in range(9)])
    assert read(file).report.labels == ["0", "1", "2"]
    numbers = read(file, labels="numbers")
    assert numbers.report.labels == []
    assert numbers.train.labels.tolist() == [float(i % 3) for i in range(9)]
    words = make_rows(tmp_path / "w.jsonl", [{"text": f"w{i}", "label": "ab"[i % 2]} for i in range(4)])
    with pytest.raises(DataError, match="no number"):
        read(words, labels="numbers")


@settings(deadline=None)
@given(st.one_of(st.integers(), st.floats(), st.text(max_size=8), st.booleans(), st.none()))
def test_any_label_is_read_or_refused(value: Any) -> None:
    number, name = as_number(value), as_name(value)
    assert number is None or abs(number) < float("inf")
    assert name is None or name == name.strip() != ""


def test_bad_rows_are_named_all_at_once(tmp_path: Path) -> None:
    items = [
        *rows(4),
        {"text": 7, "label": "good"},
        {"text": "w1"},
        {"text": "w2", "label": " "},
        {"label": "bad"},
    ]
    with pytest.raises(DataError) as caught:
        read(make_rows(tmp_path / "d.jsonl", items))
    told = "\n".join(caught.value.details)
    for line in ("d.jsonl:5: text", "d.jsonl:6: label", "d.jsonl:7: label", "d.jsonl:8: text"):
        assert line in told


def test_one_class_alone_and_far_too_many_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="every row has the label 'a'"):
        read(make_rows(tmp_path / "d.jsonl", [{"text": f"w{i}", "label": "a"} for i in range(4)]))
    with pytest.raises(DataError, match="are no classes"):
        read(make_rows(tmp_path / "e.jsonl", [{"text": f"w{i}", "label": f"id{i}"} for i in range(1500)]))


def test_empty_texts_duplicates_and_other_labels(tmp_path: Path) -> None:
    items = [{"text": "w1", "label": "a"}, {"text": "w1", "label": "a"}, {"text": "w1", "label": "b"}]
    items += [{"text": " ", "label": "b"}, {"text": "w2", "label": "b"}]
    found = read(make_rows(tmp_path / "d.jsonl", items), max_lost=0.5)
    assert [(p.kind, p.count) for p in found.report.problems] == [
        ("empty text", 1),
        ("duplicate", 1),
        ("another label for the same text", 1),
    ]
    assert found.report.counts["train"] == {"a": 1, "b": 2}


def test_nothing_is_cut_unless_asked_for(tmp_path: Path) -> None:
    items = [*rows(30), {"text": " ".join(["w9"] * 60), "label": "bad"}]
    file = make_rows(tmp_path / "d.jsonl", items)
    dropped = read(file, max_length=20)
    assert [(p.kind, p.effect, p.count) for p in dropped.report.problems] == [("too long", "dropped", 1)]
    for way in ("error", "split"):
        with pytest.raises(DataError, match="1 row over max_length 20"):
            read(file, max_length=20, too_long=way)
    cut = read(file, max_length=20, too_long="truncate")
    last = cut.train[len(cut.train) - 1]
    assert len(last.ids) == 20
    assert last.ids[-1] == 3  # the tokenizer's own end still stands
    assert [(p.kind, p.effect, p.count) for p in cut.report.problems] == [("cut", "cut", 1)]
    with pytest.raises(DataError, match="takes at most 40"):
        read(file, max_length=50)


def test_pairs_are_written_as_the_tokenizer_writes_them(tmp_path: Path) -> None:
    items = rows(10, paired=True)
    found = read(make_rows(tmp_path / "d.jsonl", items))
    for example, row in zip(found.train, items):
        told = tokenizer()(row["sentence1"], row["sentence2"])
        assert (example.ids, example.types) == (told["input_ids"], told["token_type_ids"])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_other_files_are_read_alike(suffix: str, tmp_path: Path) -> None:
    items = rows(20)
    path = tmp_path / f"d{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(items), path)
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, ["text", "label"], delimiter="\t" if suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(items)
    found, same = read(path), read(make_rows(tmp_path / "d.jsonl", items))
    assert found.train.ids.tolist() == same.train.ids.tolist()
    assert found.train.labels.tolist() == same.train.labels.tolist()


def test_the_held_out_side_shares_no_text_and_is_kept(tmp_path: Path) -> None:
    file = make_rows(tmp_path / "d.jsonl", rows(100))
    found = read(file, eval=20)
    assert (len(found.train), len(found.eval)) == (80, 20)
    texts = [{tuple(example.ids) for example in side} for side in (found.train, found.eval)]
    assert not texts[0] & texts[1]
    other = make_rows(tmp_path / "e.jsonl", [*rows(10), *rows(10, seed=7)])
    leaky = read(file, eval=str(other))
    assert "also in the validation set" in {p.kind for p in leaky.report.problems}
    assert len(leaky.eval) == 20
    store_labelled(tmp_path / "held", found.eval)
    again = fetch_labelled(tmp_path / "held")
    assert again is not None
    assert all(a.equal(b) for a, b in zip(again.parts, found.eval.parts))
    assert again.rows == found.eval.rows
    (tmp_path / "held" / "rows.json").write_text("{")
    assert fetch_labelled(tmp_path / "held") is None


# ==== GLUE ===================================================================================================

FIELDS = {  # of the hub's nyu-mll/glue, and the metric that table 2 of the LoRA paper reports
    "mnli": (("premise", "hypothesis"), 3, "accuracy"),
    "sst2": (("sentence",), 2, "accuracy"),
    "mrpc": (("sentence1", "sentence2"), 2, "accuracy"),
    "cola": (("sentence",), 2, "matthews"),
    "qnli": (("question", "sentence"), 2, "accuracy"),
    "qqp": (("question1", "question2"), 2, "accuracy"),
    "rte": (("sentence1", "sentence2"), 2, "accuracy"),
    "stsb": (("sentence1", "sentence2"), 0, "pearson"),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was asked of the hub; the rows are our own, with the hub's columns."""
    asked: list[tuple[str, str]] = []

    def serve(path: str, split: str, *, offline: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        asked.append((path, split))
        fields, classes, _ = FIELDS[path.rpartition(":")[2]]
        for i in range(12):
            words = {
                name: f"w{(i * 3 + at) % 40} {'w5' if split == 'train' else 'w6'}"
                for at, name in enumerate(fields)
            }
            yield str(i + 1), words | {"label": i % classes if classes else i / 4, "idx": i}

    monkeypatch.setattr("loraloom.data.read.hf_rows", serve)
    return asked


@pytest.mark.parametrize("name", TASKS)
def test_glue_tasks_have_the_hubs_columns_and_splits(name: str, hub: list[tuple[str, str]]) -> None:
    fields, classes, metric = FIELDS[name]
    found = read(f"glue:{name}", eval=0.05)
    held = "validation_matched" if name == "mnli" else "validation"
    assert hub == [(f"hf:nyu-mll/glue:{name}", "train"), (f"hf:nyu-mll/glue:{name}", held)]
    assert (
        tuple(found.report.columns[key] for key in ("text", "pair") if key in found.report.columns) == fields
    )
    assert found.report.labels == [str(i) for i in range(classes)]
    assert TASKS[name].metric == metric
    assert len(found.eval) == 12
    assert TASKS[name].classes == classes


def test_a_glue_task_that_is_none_and_one_that_cannot_be_had(no_sockets: None) -> None:
    with pytest.raises(DataError, match="no such GLUE task") as caught:
        read("glue:rtee")
    assert caught.value.hint == "did you mean rte?"
