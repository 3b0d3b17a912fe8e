"""Studies: what a file expands to, the articles' counts, who sees which rows, the table's arithmetic, resuming."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_run import adapter_bytes, make_data

from loraloom import api, cli, study, study_run
from loraloom.config import DataConfig, ModelConfig, RunConfig, Source, resolve
from loraloom.data.read import Row, Table
from loraloom.errors import DataError, UserError
from loraloom.noise import student
from loraloom.rundir import Run
from loraloom.shapes import published
from loraloom.skeleton import make_shape
from loraloom.study_data import share_out, split_data
from loraloom.study_file import FOLDER, StudyFile, read_study, runs_of, shipped
from loraloom.study_page import content, write_page
from loraloom.study_plan import plan_study
from loraloom.study_table import (
    BETTER,
    CHOSEN,
    NO_SPREAD,
    ONE_RUN,
    WITHIN,
    WORSE,
    cells,
    choose,
    columns,
    sentences,
    table,
    welch,
)
from loraloom.wording import percent

PRESETS = [
    (name, preset)
    for name, path in shipped().items()
    for preset in StudyFile.model_validate(yaml.safe_load(path.read_text())).presets
]
PUBLISHED = [
    pytest.param(
        *one, marks=pytest.mark.slow if one == ("which-rank", "published") else ()
    )  # GPT-3 fifteen times
    for one in PRESETS
    if one[1] != "small"
]
linux = pytest.mark.skipif(
    sys.platform != "linux", reason="forks after torch is loaded, which only Linux does safely"
)


def write(folder: Path, **keys: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return path


@pytest.fixture
def tiny(model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The settings of a run of a second; 8 of 32 rows are held out."""
    data = make_data(tmp_path / "rows.jsonl", rows=32)
    return {
        "model": {"id": str(model_folder), "dtype": "float32"},
        "data": {"train": str(data), "eval": 8},
        "r": 4,
        "train": {
            "max_steps": 4,
            "batch_size": 4,
            "learning_rate": 5e-3,
            "save_every": 1,
            "early_stop": None,
        },
        "eval": {"every": 2, "max_new_tokens": 4},
    }


def run_here(path: Path, out: Path, **more: Any) -> dict[str, Any]:
    return study.study(path, out=out, processes=False, offline=True, argv=["loraloom"], **more)


# What a file says


def test_settings_are_crossed_with_the_grid_and_seeds_come_in_turn(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        run={"model": "m", "data": "d.jsonl", "target_modules": "all-linear"},
        set={"train.epochs": 2},
        settings=[{"name": "q", "target_modules": ["q"]}, {"target_modules": ["q", "v"]}],
        grid={"r": [1, 8], "alpha": "2r"},
        axis="r",
        seeds=[5, 3],
    )
    found = read_study(path)
    assert [one.name for one in found.settings] == [
        "q, r 1, alpha 2r",
        "q, r 8, alpha 2r",
        "target modules q,v, r 1, alpha 2r",
        "target modules q,v, r 8, alpha 2r",
    ]
    assert [one.x for one in found.settings] == [1, 8, 1, 8]
    config = found.config(found.settings[3])
    assert (config.target_modules, config.r, config.alpha, config.train.epochs) == (["q", "v"], 8, "2r", 2)
    assert found.values(found.settings[0], 3)["train.seed"] == 3
    assert [(one.name[0], seed) for one, seed, _ in runs_of(found)] == [
        (letter, seed) for seed in (5, 3) for letter in "qqtt"
    ]
    assert len({name for _, _, name in runs_of(found)}) == 8


def test_a_method_with_options_replaces_the_method_of_the_base(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        run={"model": "m", "data": "d", "method": {"name": "adalora", "start_r": 12}},
        settings=[{"name": "plain", "method": "lora"}, {"name": "vera", "method": {"name": "vera"}}],
    )
    found = read_study(path)
    assert [found.config(one).method for one in found.settings] == [{"name": "lora"}, {"name": "vera"}]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"setings": []}, "unknown key setings"),
        ({"settings": [{"name": "a"}, {"name": "a"}]}, "two settings have one name"),
        ({"grid": {"rank": [1]}}, "mine.yaml, rank 1: unknown key rank"),
        ({"grid": {"alpha": ["2r"]}, "axis": "alpha"}, "axis is alpha"),
        ({"expected": {"b": 3}}, "expected names no setting"),
        ({"seeds": [1, 1]}, "seeds is"),
        ({"settings": [{"train.seed": 2}]}, "sets train.seed"),
        ({"run": "nowhere.yaml"}, "no such file"),
        ({"repeats": 0}, "repeats is 0"),
    ],
)
def test_a_file_that_makes_no_study_is_refused_in_words(tmp_path: Path, keys: Any, words: str) -> None:
    path = write(tmp_path, **{"run": {"model": "m", "data": "d"}} | keys)
    with pytest.raises(UserError) as caught:
        read_study(path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("data.limit", [60, 120]),
        ("data.eval", [8, 0.25]),
        ("data.encoding", ["auto", "latin-1"]),
        ("data.train", ["a.jsonl", "b.jsonl"]),
        ("data", ["a.jsonl", "b.jsonl"]),
        ("data.map", [{"prompt": "question"}, {"prompt": "title"}]),
        ("data.format", ["auto", "text"]),
        ("data.labels", ["classes", "numbers"]),
        ("data.duplicates", ["drop", "keep"]),
    ],
)
def test_settings_cannot_have_rows_of_their_own(tmp_path: Path, name: str, values: list[Any]) -> None:
    """All train on the rows that were held apart for the first of them: a table would name equal runs apart."""
    run = {"model": "m", "data": {"train": "d.jsonl"}}
    with pytest.raises(UserError, match="rows are shared by all settings") as caught:
        read_study(write(tmp_path, run=run, grid={name: values}))
    wanted = "data.train" if name == "data" else name
    (detail,) = caught.value.details
    assert detail.startswith(f"{wanted}: ")
    assert detail.count("(") == 2
    assert caught.value.hint == f"set {wanted} once, in run or in set"
    assert len(read_study(write(tmp_path, run=run, grid={name: values[:1]})).settings) == 1


def test_settings_are_compared_by_the_same_tokens(tmp_path: Path) -> None:
    path = write(tmp_path, run={"model": "m", "data": "d"}, grid={"data.loss_on": ["completion", "all"]})
    with pytest.raises(UserError, match="compared by unlike scores"):
        read_study(path)


def test_names_that_are_near_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["study", "ranks"]) == 2
    assert "did you mean rank" in capsys.readouterr().err
    assert cli.run(["study", "rank", "--preset", "publishd", "--plan"]) == 2
    assert "published" in capsys.readouterr().err


# What ships


@pytest.mark.parametrize(("name", "preset"), PUBLISHED)
def test_the_articles_counts(name: str, preset: str) -> None:
    """Planning compares every setting's count with what the preset expects."""
    found = read_study(name, preset)
    plans = {one.name: one.trainable for one in plan_study(found, memory=False, offline=True)}
    assert plans == found.file.expected


def test_the_counts_that_the_articles_print() -> None:
    """Of the presets' numbers, those that stand in articles 2 and 3."""

    def of(name: str, preset: str = "published") -> dict[str, int]:
        return read_study(name, preset).file.expected

    assert of("defaults")["defaults"] == 4_194_304
    assert of("layers")["all layers"] == of("rank")["r 8"] == 20_277_248
    assert of("rank")["r 16"] == of("rank-fixed-alpha")["r 16"] == 40_554_496
    assert of("rank")["r 256"] == of("alpha")["alpha 512"] == 648_871_936
    assert set(of("weight-types").values()) == {18_874_368}
    assert of("which-rank")["q, v, r 8"] == 37_748_736  # table 4's 37.7 M
    assert of("which-rank", "gpt2")["r 4"] == 393_216
    assert max(one.x or 0 for one in read_study("rank", "published").settings) == 2048


def test_where_our_count_is_not_the_articles_the_note_has_the_difference() -> None:
    """Table 4 prints 175,255.8 M for all of GPT-3; the published shape has 651.5 M less, its embedding used twice."""
    found = read_study("full-fine-tuning", "published").file
    d, tokens, positions = 12_288, 50_257, 2_048
    layer = 4 * d * d + 4 * d + 8 * d * d + 5 * d + 4 * d  # attention, MLP, two norms
    whole = 96 * layer + (tokens + positions) * d + 2 * d
    assert found.expected["full fine-tuning"] == whole
    printed, head = 175_255.8e6, tokens * d
    for number in (whole, printed, printed - whole, head):
        assert f"{number / 1e6:,.1f} M" in found.note
    assert f"other {(printed - whole - head) / 1e6:.0f} M" in found.note


def test_what_an_article_found_stands_among_its_figures() -> None:
    """Article 2, section 5, prints fp4's memory, and no time of its training."""
    given = read_study("quantization", "published").file
    one, nf4, fp4 = (given.published[name] for name in ("bf16", "nf4", "fp4"))
    assert nf4["seconds"] / one["seconds"] == pytest.approx(1.5, abs=0.01)
    assert {four["memory_gb"] / one["memory_gb"] < 0.67 for four in (nf4, fp4)} == {True}
    assert ("fp4's is not told" in given.found) == ("seconds" not in fp4)


def test_a_wrong_count_is_an_error_before_anything_runs(tiny: dict[str, Any], tmp_path: Path) -> None:
    path = write(
        tmp_path, run=tiny, settings=[{"name": "a"}, {"name": "b", "r": 8}], expected={"a": 1, "b": 2}
    )
    with pytest.raises(UserError, match="not as many") as caught:
        run_here(path, tmp_path / "out")
    assert len(caught.value.details) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_every_shipped_preset_asks_something_of_runs_that_can_be(name: str, preset: str) -> None:
    found = read_study(name, preset)
    assert found.file.asks.endswith("?")
    assert found.file.source.startswith("article ")
    assert len({slug for _, _, slug in runs_of(found)}) == len(found.settings) * len(found.seeds)
    assert preset != "small" or len(found.seeds) == 3
    assert all(bool(found.shape(found.config(one).model.id)) == (preset != "small") for one in found.settings)


def test_published_figures_belong_to_settings_of_some_preset() -> None:
    for name in shipped():
        every = [read_study(name, preset) for own, preset in PRESETS if own == name]
        names = {one.name for found in every for one in found.settings}
        assert names >= {key for found in every for key in found.file.published}


@pytest.mark.parametrize("name", ["llama2-7b", "gpt3-175b"])
def test_the_shipped_config_is_the_published_shape(name: str) -> None:
    own = make_shape(**json.loads((FOLDER / f"{name}.config.json").read_text())).to_dict()
    known = published(name).to_dict()
    assert {key for key in known if own[key] != known[key]} <= {"architectures", "rms_norm_eps"}


def test_what_article_2_saves_by_sgd_and_by_4_bits() -> None:
    """16.78 MB less for SGD at r = 8 (section 6), and at least a third less with a base in nf4 (section 5)."""
    plans = {one.name: one for one in plan_study(read_study("optimizers", "published"), offline=True)}
    assert plans["AdamW"].memory - plans["SGD"].memory == 16_777_216  # type: ignore[operator]
    assert plans["AdamW"].state - plans["SGD"].state == 16_777_216
    bases = {one.name: one for one in plan_study(read_study("quantization", "published"), offline=True)}
    saved = 1 - bases["nf4"].memory / bases["bf16"].memory  # type: ignore[operator]
    assert saved > 1 / 3
    assert all(one.steps == 390 for one in bases.values())


# The rows


def rows(count: int) -> list[Row]:
    return [
        Row(f"r:{i}", {"prompt": f"what is {i}?", "completion": f"it is {i}", "id": i}) for i in range(count)
    ]


def keys_of(side: list[Row]) -> set[str]:
    return {row.fields["prompt"] for row in side}


def about(**data: Any) -> RunConfig:
    return RunConfig(model=ModelConfig(id="m"), output="o", data=DataConfig(train=[Source(path="t")], **data))


@given(
    numbers=st.lists(st.integers(0, 30), min_size=4, max_size=60),
    share=st.one_of(st.floats(0.1, 0.9), st.integers(2, 8)),
    seed=st.integers(0, 5),
    file=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_no_row_is_on_two_sides(numbers: list[int], share: float, seed: int, file: bool) -> None:
    known = rows(31)
    table_of = Table("t", [known[i] for i in numbers], ["prompt", "completion", "id"])
    held = Table("h", known[:6], ["prompt", "completion", "id"]) if file else None
    data = about(eval="h.jsonl" if file else share)
    different = len(set(numbers))
    try:
        split = share_out(data, [table_of], held, seed)
    except DataError:
        out = set(range(6)) if file else set()
        wanted = int(share) if share >= 1 else int(share * different + 1e-9)
        assert not set(numbers) - out if file else wanted < 2 or wanted >= different or different < 2
        return
    train, selection, final = keys_of(split.train[0]), keys_of(split.selection), keys_of(split.final)
    assert not train & selection
    assert not train & final
    assert not selection & final
    every = {f"what is {i}?" for i in numbers} | ({f"what is {i}?" for i in range(6)} if file else set())
    assert train | selection | final == every
    assert 0 <= len(selection) - len(final) <= 1
    shuffled = list(table_of.rows)
    random.Random(seed).shuffle(shuffled)
    again = share_out(data, [Table("t", shuffled, table_of.columns)], held, seed)
    assert (keys_of(again.selection), keys_of(again.final)) == (selection, final)


def test_rows_that_differ_only_where_nobody_reads_are_equal() -> None:
    twins = [Row("a", {"prompt": "x", "completion": "y", "id": i}) for i in range(5)] + rows(20)
    data = about(eval=6, duplicates="keep")
    split = share_out(data, [Table("t", twins, ["prompt", "completion", "id"])], None, 0)
    sides = [
        sum(row.fields["prompt"] == "x" for row in side)
        for side in (split.train[0], split.selection + split.final)
    ]
    assert sorted(sides) in ([0, 5], [0, 1])


def test_nothing_held_out_is_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, run=tiny, set={"data.eval": 0})
    with pytest.raises(DataError, match="held-out rows"):
        run_here(path, tmp_path / "out")


def test_the_made_rows_are_the_demos() -> None:
    sys.path.insert(0, "examples")
    try:
        import subtraction
    finally:
        sys.path.pop(0)
    config, _ = resolve(None, {"model": "m", "data.train": "x", "data.eval": 300, "output": "o"})
    split, changes = split_data(config, made="subtraction")
    pairs = subtraction.sums()
    wanted = {(f"Question: What is {a} minus {b}?\nAnswer:", f" {a - b}") for a, b in pairs}
    every = [*split.train[0], *split.selection, *split.final]
    assert {(row.fields["prompt"], row.fields["completion"]) for row in every} == wanted
    assert split.sizes == {"train": len(pairs) - 300, "selection": 150, "final": 150}
    assert changes["data.train"] == [{"path": "train-0.jsonl", "repeat": 1}]


# The runs


def test_a_study_end_to_end(quick: None, tiny: dict[str, Any], tmp_path: Path) -> None:
    path = write(
        tmp_path,
        run=tiny,
        grid={"r": [1, 4]},
        repeats=2,
        axis="r",
        asks="which?",
        expected={"r 1": 928, "r 4": 3712},
    )
    out = tmp_path / "out"
    heard: list[str] = []
    record = run_here(path, out, listen=lambda kind, _: heard.append(kind))
    assert heard == ["begin", *["run", "ran"] * 4]
    assert record == json.loads((out / "study.json").read_text())
    assert record["rows"] == {"train": 24, "selection": 4, "final": 4}
    for run in record["runs"]:
        own = Run(out / run["run"])
        final = own.read("eval/final.json", {})
        assert run["loss"] == next(row["tuned"]["value"] for row in final["rows"] if row["metric"] == "loss")
        assert run["selection"] == own.state["best"]["loss"]
        assert run["seconds"] == pytest.approx(sum(one["seconds"] for one in own.metrics("train")))
        assert own.config.data.eval == str(out / "data" / "selection.jsonl")
        assert [one.path for one in own.config.data.train] == [str(out / "data" / "train-0.jsonl")]
    for row in record["table"]:
        own_runs = [run for run in record["runs"] if run["setting"] == row["name"]]
        assert row["loss"]["mean"] == pytest.approx(mean(run["loss"] for run in own_runs))
        assert row["seeds"] == [0, 1]
    best = min(record["table"], key=lambda row: row["selection"]["mean"])
    assert best["verdict"] == CHOSEN
    page = (out / "study.html").read_text()
    assert "which?" in page
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    before = {run["run"]: (out / run["run"] / "run.json").read_bytes() for run in record["runs"]}
    assert run_here(path, out)["table"] == record["table"]  # nothing is made again
    assert before == {name: (out / name / "run.json").read_bytes() for name in before}
    other = write(tmp_path, run=tiny, grid={"r": [1, 8]})
    with pytest.raises(UserError, match="other settings"):
        run_here(other, out)


def test_no_choice_sees_the_final_rows(quick: None, tiny: dict[str, Any], tmp_path: Path) -> None:
    """The same study with other final rows trains the same bits and chooses the same; only what is reported moves."""
    path = write(tmp_path, run=tiny, grid={"r": [1, 4]})
    records = []
    for place, answer in enumerate((" yes", " something else entirely")):
        out = tmp_path / f"out{place}"
        folder = study.Folder(out, read_study(path))
        folder.begin("x")
        folder.split()
        rows = [{"prompt": f"other {i}", "completion": answer} for i in range(4)]
        (out / "data" / "final.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        records.append(run_here(path, out))
    first, second = records
    for a, b in zip(first["runs"], second["runs"]):
        assert adapter_bytes(Run(tmp_path / "out0" / a["run"])) == adapter_bytes(
            Run(tmp_path / "out1" / b["run"])
        )
        assert a["selection"] == b["selection"]
        assert a["loss"] != b["loss"]
    assert [row["verdict"] for row in first["table"]] == [row["verdict"] for row in second["table"]]


def test_a_failed_run_is_told_and_the_others_go_on(quick: None, tiny: dict[str, Any], tmp_path: Path) -> None:
    path = write(
        tmp_path,
        run=tiny,
        settings=[
            {"name": "wild", "train.learning_rate": 1e30, "train.max_grad_norm": None},
            {"name": "calm"},
        ],
    )
    record = run_here(path, tmp_path / "out")
    wild, calm = record["table"]
    assert (wild["verdict"], calm["verdict"]) == ("", CHOSEN)
    assert "nan" in wild["failed"][0]["why"]
    assert any(line.startswith("wild, seed 0, failed:") for line in record["says"])
    tried: list[str] = []
    run_here(
        path,
        tmp_path / "out",
        listen=lambda kind, one: tried.append(one.get("name")) if kind == "run" else None,
    )
    assert tried == []
    run_here(
        path,
        tmp_path / "out",
        retry=True,
        listen=lambda kind, one: tried.append(one.get("name")) if kind == "run" else None,
    )
    assert tried == ["wild"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:unclosed:ResourceWarning")
def test_tasks_are_scored_when_a_run_is_finished(quick: None, tiny: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from task_files import make_task_files

    files = make_task_files(tmp_path / "files")
    asked = {"tasks": ["causative"], "task_limit": 3, "task_data": "files"}  # beside the study
    path = write(tmp_path, run=tiny, **asked)
    record = run_here(path, tmp_path / "out")
    (run,) = record["runs"]
    kept = Run(tmp_path / "out" / run["run"]).read("eval/tasks.json", {})
    assert kept["settings"]["limit"] == 3
    assert run["tasks"] == {
        row["metric"]: {
            "value": row["tuned"]["value"],
            "base": row["base"]["value"],
            "share": True,
        }
        for row in kept["rows"]
    }
    (row,) = record["table"]
    (name,) = row["tasks"]
    assert row["tasks"][name]["mean"] == kept["rows"][0]["tuned"]["value"]
    at = columns(record["table"]).index(name)
    assert cells(row, record["table"])[at] == percent(row["tasks"][name]["mean"])
    assert name.replace("_", " ") in (tmp_path / "out" / "study.html").read_text()
    assert record["study"]["documents"] == {
        task: one["sha256"] for task, one in kept["settings"]["tasks"].items()
    }
    rows = (files / "blimp_causative.jsonl").read_text().splitlines(keepends=True)
    (files / "blimp_causative.jsonl").write_text("".join(reversed(rows)))
    with pytest.raises(UserError, match="other settings") as caught:
        run_here(path, tmp_path / "out")
    assert caught.value.details == ["not the same: documents"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"tasks": ["causative"], "task_data": "nowhere"},
            "names nowhere, and there is no such folder beside it",
        ),
        ({"tasks": ["facts"], "task_data": "files"}, "mmlu_global_facts_test.csv is missing"),
        ({"tasks": ["arc_easy"], "task_data": "files"}, "tasks: task_data has no form for arc_easy"),
        ({"tasks": ["causativ"]}, "there is no task 'causativ'"),
        ({"tasks": ["mine.yaml"]}, "names mine.yaml, and there is no such file beside it"),
        ({"tasks": ["causative"], "task_data": "files"}, "not a pair of sentence_good and sentence_bad"),
    ],
)
def test_a_benchmark_that_cannot_be_had_is_said_before_anything_runs(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], words: str
) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "blimp_causative.jsonl").write_text("{}\n")
    (tmp_path / "elsewhere" / "nowhere").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")  # a folder of that name here is not the one that is meant
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"run": tiny, **asked}))
    with pytest.raises(UserError) as caught:
        run_here(path, tmp_path / "out")
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


@linux
def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(
    quick: None, tiny: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path, run=tiny, grid={"r": [1, 4]})
    whole = run_here(path, tmp_path / "whole")
    child = os.fork()
    if not child:
        made: list[str] = []

        def listen(kind: str, record: Any) -> None:
            made.append(kind) if kind == "workshop" else None
            if kind == "step" and len(made) == 2 and record["step"] == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        original = study_run.make
        study_run.make = lambda task: original(task, listen)  # type: ignore[assignment,misc]
        run_here(path, tmp_path / "cut")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    cut = tmp_path / "cut"
    states = [Run(cut / run["run"]).state["status"] for run in whole["runs"]]
    assert states == ["done", "running"]
    resumed = run_here(path, cut)
    for run, again in zip(whole["runs"], resumed["runs"]):
        assert adapter_bytes(Run(cut / again["run"])) == adapter_bytes(Run(tmp_path / "whole" / run["run"]))
        assert (again["loss"], again["selection"]) == (run["loss"], run["selection"])


def test_ctrl_c_leaves_all_whole(
    quick: None, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, run=tiny, grid={"r": [1, 4]})
    original, calls = api.train, []

    def train(**keys: Any) -> Any:
        calls.append(keys)
        if len(calls) == 2:

            def listen(kind: str, record: Any) -> None:
                if kind == "step" and record["step"] == 2:
                    signal.raise_signal(signal.SIGINT)

            keys["listen"] = listen
        return original(**keys)

    monkeypatch.setattr("loraloom.api.train", train)
    with pytest.raises(KeyboardInterrupt, match="1 of 2 runs are finished"):
        run_here(path, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    assert [run["status"] for run in record["runs"]] == ["finished", "open"]
    assert record["says"][-1] == "1 run not made yet."
    assert {run["status"] for run in run_here(path, tmp_path / "out")["runs"]} == {"finished"}
    assert len(calls) == 2  # the second was resumed


def test_a_signal_is_passed_on_to_the_run() -> None:
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(7))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    with study.passing_on() as relay:
        signal.raise_signal(signal.SIGINT)  # before it is there
        child = relay.to(
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
        )
        assert child.stdout is not None
        with child.stdout:
            assert child.wait(timeout=30) != 0
    with study.passing_on() as relay:
        child = relay.to(
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
        )
        assert child.stdout is not None
        with child.stdout:
            child.stdout.readline()
            signal.raise_signal(signal.SIGTERM)
            assert child.wait(timeout=30) == 7
    assert relay.asked == 1


def test_a_process_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = tmp_path / "python"
    shell.write_text("#!/bin/sh\nkill -9 $$\n")
    shell.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(shell))
    study.in_process({"failure": str(tmp_path / "failure.json")})
    assert "memory runs out" in json.loads((tmp_path / "failure.json").read_text())["message"]
    shell.write_text("#!/bin/sh\nexit 130\n")
    with pytest.raises(KeyboardInterrupt):
        study.in_process({"failure": str(tmp_path / "failure.json")})
    shell.write_text(f"#!/bin/sh\ntrap '' INT\nkill -INT {os.getpid()}\nsleep 1\nexit 0\n")
    with pytest.raises(KeyboardInterrupt):  # a run that came to its end before it heard
        study.in_process({"failure": str(tmp_path / "failure.json")})


# The table


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)],
)
def test_student_is_that_of_the_printed_tables(freedom: float, t: float) -> None:
    assert student(t, freedom) == pytest.approx(0.05, abs=1e-4)


@given(st.floats(0, 200))
def test_student_has_its_closed_forms(t: float) -> None:
    assert student(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-6)
    assert student(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-6)


@given(
    st.lists(st.floats(-9, 9), min_size=2, max_size=6, unique=True),
    st.lists(st.floats(-90, 90), min_size=2, max_size=6, unique=True),
)
@settings(deadline=None)
def test_welch_is_scipys(a: list[float], b: list[float]) -> None:
    stats = pytest.importorskip("scipy.stats")
    assume(min(stdev(a), stdev(b)) > 1e-3)
    assert welch(a, b) == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue, abs=1e-5)
    assert welch(a, b) == pytest.approx(welch(b, a))


def test_welch_cries_wolf_one_time_in_twenty() -> None:
    draw = random.Random(0)
    alarms = sum(
        welch([draw.gauss(0, 1) for _ in range(3)], [draw.gauss(0, 3) for _ in range(4)]) < 0.05
        for _ in range(600)
    )
    assert 0.02 < alarms / 600 < 0.08


def test_welch_without_any_spread() -> None:
    assert welch([1.0, 1.0], [1.0, 1.0]) == 1
    assert welch([1.0, 1.0], [2.0, 2.0]) == 0
    with pytest.raises(ValueError, match="two values"):
        welch([1.0], [2.0, 3.0])


def made(name: str, seed: int, selection: float, loss: float, **more: Any) -> dict[str, Any]:
    found = {
        "setting": name,
        "seed": seed,
        "run": f"runs/{name}-{seed}",
        "status": "finished",
        "message": None,
    }
    found |= {"selection": selection, "loss": loss, "exact_match": 0.5, "seconds": 2.0, "memory": 10**9}
    return found | {"base_loss": 2.0, "trainable": 10, "main": "loss", "unit": "nats/token"} | more


@pytest.fixture
def four(tmp_path: Path) -> Any:
    path = write(
        tmp_path,
        run={"model": "m", "data": "d"},
        settings=[{"name": name} for name in ("a", "b", "c", "<b>d")],
        published={"a": {"seconds": 100, "Score": 3.5}, "b": {"Score": 4.0}},
        repeats=3,
    )
    return read_study(path)


def test_the_choice_is_by_the_selection_rows_alone(four: Any) -> None:
    runs = [made("a", s, 1.0 + 0.01 * s, 1.50 + 0.01 * s) for s in range(3)]
    runs += [made("b", s, 1.2 + 0.01 * s, 1.51 + 0.02 * s) for s in range(3)]
    runs += [made("c", s, 1.3, 1.2 + 0.01 * s) for s in range(3)]
    runs += [made("<b>d", s, 1.4, 9.0 + 0.01 * s) for s in range(3)]
    rows = table(four, runs)
    assert [row["verdict"] for row in rows] == [CHOSEN, WITHIN, BETTER, WORSE]
    moved = table(four, [run | {"loss": 10 - run["loss"]} for run in runs])
    assert moved[0]["verdict"] == CHOSEN  # whatever the final rows say


def test_a_wild_setting_is_told_from_a_calm_one(four: Any) -> None:
    """Final losses that were measured: every one of b lies far above every one of a, and its spread is large."""
    runs = [made("a", s, 0.6, loss) for s, loss in enumerate((0.6071, 0.5732, 0.5288))]
    runs += [made("b", s, 1.5, loss) for s, loss in enumerate((1.207, 1.210, 2.010))]
    rows = table(four, runs)
    assert [row["verdict"] for row in rows[:2]] == [CHOSEN, WORSE]
    assert (
        welch(*(row["loss"]["values"] for row in rows[:2])) > 0.05
    )  # which the losses themselves do not tell


def test_a_setting_with_a_failed_run_is_not_chosen(four: Any) -> None:
    runs = [made("a", 0, 1.0, 1.0), made("a", 1, 1.0, 1.0, status="failed", message="diverged")]
    runs += [made("b", s, 2.0, 2.0) for s in range(3)]
    rows = table(four, runs)
    assert choose(rows)["name"] == "b"  # type: ignore[index]
    assert rows[0]["failed"] == [{"seed": 1, "why": "diverged"}]


def test_one_run_of_each_knows_no_spread(four: Any) -> None:
    rows = table(four, [made("a", 0, 1.0, 1.0), made("b", 0, 2.0, 2.0)])
    assert [row["verdict"] for row in rows[:2]] == [CHOSEN, ONE_RUN]


def test_what_no_seed_moves_is_not_called_worse(four: Any) -> None:
    runs = [made("a", s, 1.0, 1.5) for s in range(3)] + [made("b", s, 1.2, 1.51) for s in range(3)]
    runs += [made("c", s, 1.3, 1.5) for s in range(3)] + [made("<b>d", s, 1.4, 9 + s) for s in range(3)]
    rows = table(four, runs)
    assert [row["verdict"] for row in rows] == [CHOSEN, NO_SPREAD, WITHIN, WORSE]
    said = " ".join(sentences(rows, {"selection": 50, "final": 60}))
    assert "Not told from it, for the seeds of neither moved the score: b (+0.010)." in said


def test_the_page_escapes_names_and_shows_what_was_published(four: Any, tmp_path: Path) -> None:
    folder = study.Folder(tmp_path / "out", four)
    runs = [made(name, s, 1.0, 1.0 + 0.01 * s) for name in ("a", "b", "<b>d") for s in range(3)]
    rows = table(four, runs)
    record = {
        "study": four.to_dict(),
        "table": rows,
        "runs": runs,
        "says": ["said"],
        "axis": None,
        "rows": {"train": 3, "selection": 2, "final": 2},
        "environment": {"torch": "2"},
        **dict.fromkeys(("asks", "source", "found", "note"), "x"),
    }
    page = write_page(folder.path, record).read_text()
    assert "<b>d" not in page.replace("<b>&lt;b&gt;d", "")
    assert "&lt;b&gt;d" in page
    assert "1 min 40 s".replace(" ", "\u202f", 0) in page.replace("\u202f", " ")
    assert [chart.title for chart in content(folder.path, record)["published"]] == ["Published: Score"]


# The command


def test_the_command_lists_and_plans(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["study", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in listed} == set(shipped())
    assert cli.run(["study", "layers", "--preset", "published", "--plan", "--offline"]) == 0
    said = capsys.readouterr().out
    assert "20,277,248 =" in said
    assert cli.run(["study", "full-fine-tuning", "--preset", "published", "--plan", "--offline"]) == 0
    assert "174,604,259,328 =" in (told := capsys.readouterr().out)
    assert "175,255.8 M" in told
    assert cli.run(["study", "weight-types", "--preset", "published"]) == 2
    assert "not public" in capsys.readouterr().err


def test_the_command_makes_a_study(
    quick: None,
    tiny: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loraloom.study.in_process", study.here)
    path = write(tmp_path, run=tiny, grid={"r": [1, 4]})
    assert cli.run(["study", str(path), "-o", str(tmp_path / "out"), "--offline"]) == 0
    captured = capsys.readouterr()
    assert "1/2  r 1, seed 0" in captured.err
    assert "Chosen: r " in captured.out
    assert "study.html" in captured.err


# The real small model


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(shipped()))
def test_the_small_presets_counts(real_model: Path, users_cache: None, name: str) -> None:
    found = read_study(name, "small")
    plans = plan_study(found, memory=False)
    assert {one.name: one.trainable for one in plans} == found.file.expected


@pytest.mark.slow
def test_a_small_preset_in_processes(real_model: Path, tmp_path: Path) -> None:
    """Two steps of `layers`, each run in a process of its own, on the real model."""
    given = yaml.safe_load(shipped()["layers"].read_text())["presets"]["small"]
    run = yaml.safe_load((FOLDER / given["run"]).read_text()) | {"model": str(real_model)}
    change = {"train.max_steps": 2, "data.limit": 120, "data.eval": 8, "eval.every": 2}
    path = write(tmp_path, **given | {"run": run, "set": change, "repeats": 1})
    record = study.study(path, out=tmp_path / "out", offline=True)
    assert [run["status"] for run in record["runs"]] == ["finished", "finished"]
    assert [run["trainable"] for run in record["runs"]] == [460_800, 2_442_240]
    assert all(run["memory"] > 2e8 for run in record["runs"])
