"""The run folder: made whole, read back, tolerant of what a kill leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_run import make_run

from loraloom import files
from loraloom.config import resolve
from loraloom.errors import UserError
from loraloom.rundir import Run, find_runs


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "runs" / "tickets")


def test_create_leaves_every_file_and_reads_back(run: Run) -> None:
    names = {path.name for path in run.path.iterdir()}
    assert names == {
        "config.yaml", "config.resolved.yaml", "origins.json", "env.json", "command.txt", "run.json"
    }  # fmt: skip
    again = Run.open(run.path)
    assert again.config == run.config
    assert again.config.model.id == "org/small-model"
    assert again.origins["model.id"] == "flag"
    assert again.origins["train.seed"] == "default"
    assert again.state["status"] == "running"
    assert again.state["model"] == "org/small-model"
    assert again.env["dtype"] == "float32"
    assert again.env["torch"]
    assert again.command == "loraloom train -m org/small-model -d tickets.csv -o tickets"


def test_config_yaml_holds_what_was_given_and_resolves_to_the_same(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", {"r": 64, "train.learning_rate": 1e-4, "method": "rslora"})
    text = (run.path / "config.yaml").read_text()
    assert "r: 64" in text
    assert "seed" not in text
    config, _ = resolve(run.path / "config.yaml")
    assert config == run.config


def test_settle_stores_what_auto_became(run: Run) -> None:
    from loraloom.config import with_values

    run.settle(with_values(run.config, {"data.max_length": 640}), run.origins | {"data.max_length": "auto"})
    again = Run.open(run.path)
    assert again.config.data.max_length == 640
    assert again.origins["data.max_length"] == "auto"


def test_create_refuses_a_run_a_file_and_a_folder_in_use(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already holds a run") as refused:
        make_run(run.path)
    assert f"loraloom resume {run.path}" in str(refused.value.hint)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        make_run(tmp_path / "file")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "README.md").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        make_run(tmp_path / "used")
    assert (tmp_path / "used" / "README.md").read_text() == "mine"


def test_create_fills_an_empty_folder_in_place(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    inode = (tmp_path / "mount").stat().st_ino
    run = make_run(tmp_path / "mount")
    assert run.path.stat().st_ino == inode
    assert Run.open(run.path).state["step"] == 0


def test_a_failed_create_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("loraloom.rundir.environment", fail)
    with pytest.raises(KeyboardInterrupt):
        make_run(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_open_says_what_is_missing_and_lists_runs_nearby(run: Run) -> None:
    with pytest.raises(UserError, match="there is no run folder") as error:
        Run.open(run.path.parent / "tikets")
    assert f"a run: {run.path}" in error.value.details
    assert str(run.path) in str(error.value.hint)
    with pytest.raises(UserError, match=r"it has no run\.json and no config\.resolved\.yaml") as error:
        Run.open(run.path.parent)
    assert f"a run: {run.path}" in error.value.details
    (run.path / "adapter").mkdir()
    with pytest.raises(UserError) as error:
        Run.open(run.path / "adapter")
    assert "did you mean that" in str(error.value.hint)
    (run.path / "config.resolved.yaml").unlink()
    with pytest.raises(UserError, match=r"it has no config\.resolved\.yaml"):
        Run.open(run.path)


def test_update_keeps_the_other_fields_and_survives_a_kill(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.update(step=7)
    assert run.state["status"] == "running"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run.update(step=8, status="done")
    assert Run.open(run.path).state["step"] == 7


def test_metrics_tolerate_a_torn_last_line_and_go_on_after_it(run: Run) -> None:
    run.log({"kind": "train", "step": 1, "loss": 2.5})
    run.log({"kind": "eval", "step": 1, "loss": 2.4})
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "train", "step": 2, "lo')
    again = Run.open(run.path)
    assert [record["step"] for record in again.metrics()] == [1, 1]
    again.log({"kind": "train", "step": 2, "loss": 2.3})
    assert [record["loss"] for record in again.metrics("train")] == [2.5, 2.3]
    assert [record["loss"] for record in again.metrics("eval")] == [2.4]


def test_a_broken_line_inside_is_named(run: Run) -> None:
    run.log({"kind": "train", "step": 1})
    files.append_line(run.path / "metrics.jsonl", "oops")
    run.log({"kind": "train", "step": 2})
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2"):
        run.metrics()


def test_samples_keep_line_breaks_and_odd_characters(run: Run) -> None:
    text = "two\nlines \u2028 and ü 漢 \x85"
    run.sample({"step": 0, "prompt": text, "answer": text, "reference": None, "stopped": True})
    assert Run.open(run.path).samples()[0]["answer"] == text


def test_truncate_drops_what_came_after(run: Run) -> None:
    for step in range(6):
        run.log({"kind": "train", "step": step})
        run.sample({"step": step, "prompt": "p", "answer": "a"})
    run.truncate(3)
    run.log({"kind": "train", "step": 4})
    assert [record["step"] for record in run.metrics()] == [0, 1, 2, 3, 4]
    assert [record["step"] for record in run.samples()] == [0, 1, 2, 3]


def test_checks_replace_those_of_their_name(run: Run) -> None:
    run.add_check("merge", False, "mean KL 0.3")
    run.add_check("rows", True, "all")
    run.add_check("merge", True, "mean KL 4e-5")
    assert run.checks() == [
        {"name": "merge", "ok": True, "detail": "mean KL 4e-5"},
        {"name": "rows", "ok": True, "detail": "all"},
    ]


def test_checkpoints_are_the_whole_ones_in_order(run: Run) -> None:
    folder = run.path / "checkpoints"
    assert run.checkpoints() == []
    assert run.latest() is None
    for name in ("step-000100", "step-000020", ".partial-step-000120", ".old-step-000110", "notes"):
        (folder / name).mkdir(parents=True)
    assert [step for step, _ in run.checkpoints()] == [
        20,
        100,
        110,
    ]  # 110: its exchange was cut, and is undone
    assert run.latest() == (110, folder / "step-000110")
    assert (folder / ".partial-step-000120").exists(), "a reader must not remove what may be being written"


def test_open_completes_a_cut_exchange_of_the_adapter_but_spares_one_in_progress(run: Run) -> None:
    (run.path / ".partial-adapter").mkdir()
    Run.open(run.path)
    assert (run.path / ".partial-adapter").exists()
    (run.path / ".partial-adapter" / "new").touch()
    (run.path / ".old-adapter").mkdir()
    Run.open(run.path)
    assert (run.path / "adapter" / "new").exists()
    assert not (run.path / ".old-adapter").exists()


def test_find_runs_looks_two_folders_down_and_not_into_runs(run: Run, tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "sweep" / "r8")
    make_run(run.path / "inside")
    make_run(tmp_path / "runs" / ".hidden")
    assert [found.path.name for found in find_runs(tmp_path / "runs")] == ["r8", "tickets"]
    assert [found.path for found in find_runs(run.path)] == [run.path]
    assert find_runs(tmp_path / "nowhere") == []


def test_damaged_state_is_an_error_with_the_file(run: Run) -> None:
    (run.path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        _ = run.state


def test_reading_a_run_does_not_import_torch() -> None:
    code = "import loraloom.rundir, loraloom.results, loraloom.report, loraloom.card, sys, json;"
    code += "print(json.dumps([n for n in ('torch', 'transformers', 'matplotlib', 'jinja2') if n in sys.modules]))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == []


def test_a_run_from_before_a_key_was_renamed_can_be_read(tmp_path: Path) -> None:
    text = "model: {id: m}\ndata: {train: [{path: d}]}\noutput: o\ntrain: {gradient_checkpointing: %s}\n"
    for old, new in (("true", "full"), ("false", "none")):
        (tmp_path / "config.resolved.yaml").write_text(text % old, encoding="utf-8")
        assert Run(tmp_path).config.train.recompute == new
