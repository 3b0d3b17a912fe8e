"""The command line: what it prints where, its exit codes, and that bad input ends in words and leaves nothing."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_run import make_data, make_model, run_tiny, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraloom import __version__, api, cli, console, fold, merge_check, use
from loraloom.errors import OutOfMemory
from loraloom.nll import nll_sum
from loraloom.rundir import Run

VERBS = [
    "doctor",
    "download",
    "convert",
    "data",
    "plan",
    "train",
    "resume",
    "merge",
    "eval",
    "chat",
    "report",
    "runs",
    "inspect",
    "study",
    "latency",
]


class Told(NamedTuple):
    code: int
    out: str
    err: str


Say = Callable[..., Told]


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str]) -> Say:
    """Run one command in this process."""

    def command(*arguments: Any) -> Told:
        capfd.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        shown = capfd.readouterr()
        assert "Traceback" not in shown.err
        return Told(code, shown.out, shown.err)

    return command


@pytest.fixture(scope="module")
def trained(model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, in a folder of runs."""
    path = tmp_path_factory.mktemp("work") / "runs" / "first"
    return run_tiny(model_folder, data_file, path, train__max_steps=3, train__epochs=1).path


def shell(code: str, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, **more)


# ---- usage --------------------------------------------------------------------------------------------------


def test_help_lists_the_verbs_in_the_order_of_work_and_imports_no_torch() -> None:
    code = (
        "import sys; from loraloom.cli import run; code = run(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'datasets'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = shell(code, "--help")
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.partition("Commands:")[2].splitlines() if line.strip()]
    assert listed == VERBS
    for verb in ("train", "chat"):
        assert shell(code, verb, "--help").returncode == 0
    assert "train.learning_rate = auto" in shell(code, "train", "--settings").stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, say: Say) -> None:
    told = say(verb, "--help")
    assert told.code == 0
    assert f"Usage: loraloom {verb}" in told.out or f" {verb} " in told.out.splitlines()[0]
    assert told.err == ""


def test_version_and_no_command(say: Say) -> None:
    assert say("--version").out.split() == ["loraloom,", "version", __version__]
    told = say()
    assert told.code == 2
    assert "Commands:" in told.out + told.err


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["trian"], "there is no command 'trian'", "did you mean train"),
        (["train", "--modle", "x"], "--modle", "--model"),
        (["eval"], "Missing argument 'RUN'", "--help"),
        (["merge", "x", "y", "--dtype", "int4"], "'int4' is not one of", "--help"),
        (
            ["train", "--set", "epochs=3", "-m", "m", "-d", "d", "-o", "o"],
            "unknown key epochs",
            "train.epochs",
        ),
        (["train", "--set", "train.epochs", "-m", "m"], "--set train.epochs: write key=value", ""),
        (["train", "--set", "eval.prompts=[a"], "--set eval.prompts=[a", "quotes"),
        (["train"], "model is not set", ""),
        (["train", "a.yaml", "-c", "b.yaml"], "two configuration files", "name one"),
        (["train", "no.yaml"], "there is no configuration file no.yaml", ""),
        (["train", "-m", "m", "-d", "d", "-o", "o", "--method", "lroa"], "there is no method 'lroa'", "lora"),
        (["chat", "x", "--json"], "--json needs a question", "--ask"),
        (["chat", "x", "--compare"], "--compare needs a question", "--ask"),
    ],
)
def test_wrong_usage(
    arguments: list[str], error: str, hint: str, say: Say, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--method" in arguments:  # is known only when the model is there
        make_model(tmp_path / "m")
        make_data(tmp_path / "d")
        (tmp_path / "d").rename("d.jsonl")
        arguments[arguments.index("d")] = "d.jsonl"
    told = say(*arguments)
    assert told.code == 2
    assert told.out == ""
    assert error in told.err
    assert hint in told.err.partition(error)[2]
    assert not (tmp_path / "o").exists()


def test_settings_are_listed(say: Say) -> None:
    told = say("train", "--settings")
    assert told.code == 0
    assert "train.betas = [0.9, 0.999]\n" in told.out
    rows = json.loads(say("train", "--settings", "--json").out)
    assert {"name": "dropout", "default": "0.0", "description": "on the adapter's input"} in rows
    assert any(row["name"] == "method.niter" and row["description"].startswith("pissa: ") for row in rows)
    own = say("train", "--settings", "--method", "vera").out
    assert "method.d_initial = 0.1\n    vera: " in own
    assert "pissa: " not in own
    assert say("train", "--settings", "--method", "lore").code == 2


def test_debug_shows_the_traceback() -> None:
    code = "import sys; from loraloom.cli import run; sys.exit(run(sys.argv[1:]))"
    done = shell(code, "--debug", "runs", "no-such-folder")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "UserError" in done.stderr


@pytest.mark.parametrize(
    "cause", [KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")]
)
def test_codes_of_interruption_and_memory(cause: BaseException, say: Say, monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise cause

    monkeypatch.setattr(use, "open_target", fail)
    told = say("chat", "x", "--ask", "y")
    assert told.code == (130 if isinstance(cause, KeyboardInterrupt) else OutOfMemory.exit_code == 4 and 4)
    assert ("interrupted" if told.code == 130 else "ran out of memory") in told.err


def test_out_of_memory_in_training_names_what_helps(
    model_folder: Path, data_file: Path, tmp_path: Path, say: Say, monkeypatch: Any
) -> None:
    def fail(model: Any, batch: Any) -> Any:
        if not next(model.parameters()).is_meta:  # the planner takes the step on shapes, to explain
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")
        return nll_sum(model, batch)

    monkeypatch.setattr("loraloom.step.nll_sum", fail)
    flags = [f"--set={k}={v}" for k, v in settings(model_folder, data_file, tmp_path / "run").items()]
    told = say("train", *flags, "--offline")
    assert told.code == 4
    assert "CUDA out of memory. Tried to allocate 2.00 GiB" in told.err
    for part in ("activations", "base", "adapters", "optimizer"):
        assert part in told.err
    assert len(re.findall(r"--set \S+=\S+ saves [\d.]+ GB", told.err)) == 2
    assert Run.open(tmp_path / "run").state["status"] == "failed"


# ---- a whole job ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_train_eval_merge_chat_report_runs(
    quantize: str, model_folder: Path, data_file: Path, tmp_path: Path, say: Say, monkeypatch: Any
) -> None:
    """Every verb with --json prints one JSON value on stdout, and nothing else there."""
    monkeypatch.chdir(tmp_path)
    flags = [f"--set={k}={v}" for k, v in settings(model_folder, data_file, Path("runs/first")).items()]
    done = {}
    for name, arguments in {
        "data": ["data", data_file, "-m", model_folder, "--offline"],
        "plan": ["plan", *flags, "--gpu", "1GB", "--offline", f"--set=model.quantize={quantize}"],
        "train": [
            "train",
            *flags,
            "--set=train.max_steps=3",
            "--offline",
            f"--set=model.quantize={quantize}",
        ],
        "eval": ["eval", "runs/first", "--answers", "3", "--max-new-tokens", "3", "--offline"],
        "eval of a file": ["eval", "runs/first", "--data", data_file, "--answers", "0", "--offline"],
        "merge": ["merge", "runs/first", "merged", "--offline"],
        "chat": ["chat", "runs/first", "--ask", "what is 2", "--max-new-tokens", "3", "--offline"],
        "compare": ["chat", "runs/first", "--ask", "2", "--compare", "--max-new-tokens", "3", "--offline"],
        "report": ["report", "runs/first"],
        "runs": ["runs"],
    }.items():
        told = say(*arguments, "--json")
        assert told.code == 0, (name, told)
        assert told.out.count("\n") == 1, (name, told.out)
        assert told.err == "", (name, told.err)
        done[name] = json.loads(told.out)
    assert done["data"]["train"] > 0
    assert done["train"]["status"] == "done"
    assert done["train"]["path"] == "runs/first"
    assert done["train"]["execution"]["loss"] == "in chunks of tokens"
    assert {row["metric"] for row in done["eval"]["rows"]} >= {"loss", "exact match"}
    assert done["eval"]["settings"]["examples"] == 4
    assert done["eval of a file"]["settings"]["examples"] == 24
    assert sorted(path.name for path in Path("runs/first/eval").iterdir()) == ["held-out.json", "sums.json"]
    assert done["merge"]["ok"] is True
    assert done["chat"].keys() == {"prompt", "tuned"}
    assert done["compare"].keys() == {"prompt", "tuned", "base"}
    assert Path(done["report"]["report"]).is_file()
    assert len(done["runs"]) == 1
    checks = {check["name"]: check["ok"] for check in Run.open("runs/first").checks()}
    assert checks["merge verified"]


def test_the_same_for_people(trained: Path, tmp_path: Path, say: Say, monkeypatch: Any) -> None:
    monkeypatch.chdir(trained.parent.parent)
    told = say("eval", "runs/first", "--answers", "2", "--max-new-tokens", "2", "--offline")
    assert told.code == 0
    assert all(word in told.out for word in ("base", "tuned", "loss", "exact match", "standard error"))
    told = say("merge", "runs/first", tmp_path / "merged", "--offline")
    assert told.code == 0
    assert f"Merged into {tmp_path / 'merged'}" in told.out
    assert "top-1 agree 100" in told.out
    head, line = say("runs").out.splitlines()
    assert head.split()[:4] == ["run", "status", "model", "method"]
    assert line.startswith("runs/first  done ")
    assert line.endswith(" s ago")
    assert "…" not in line  # nothing is cut, however narrow the terminal
    told = say("report", "runs/first", "runs/first", "-o", tmp_path / "both.html")
    assert told.out.strip() == str(tmp_path / "both.html")
    told = say("chat", "runs/first", "--ask", "what is 2", "--max-new-tokens", "4", "--offline")
    assert told.code == 0
    assert told.err == ""


def test_training_tells_its_progress_on_stderr(
    model_folder: Path, data_file: Path, tmp_path: Path, say: Say
) -> None:
    changes = {"train.max_steps": 2, "eval.every": 1}
    given = settings(model_folder, data_file, tmp_path / "run") | changes
    flags = [f"--set={k}={v}" for k, v in given.items()]
    told = say("train", *flags, "--offline")
    assert told.code == 0
    assert told.out == ""
    for words in (
        "model ",
        "20 examples, 4 held out",
        "step 2/2",
        "the base",
        "Done in",
        "Next ",
        "loraloom merge",
    ):
        assert words in told.err
    lines = told.err.splitlines()
    execution = Run.open(tmp_path / "run").state["execution"]
    assert list(execution) == ["kernels", "attention", "layers", "loss", "recompute", "graphs"]
    for name, text in execution.items():  # what computes a step is said once, with the reason
        assert lines.count(f" {name:<10}{text}") == 1
    flags[flags.index(f"--set=output={tmp_path / 'run'}")] = f"--set=output={tmp_path / 'quiet'}"
    told = say("train", *flags, "--offline", "--quiet")
    assert told == (0, "", "")


def test_a_yaml_file_of_three_lines_with_flags(
    model_folder: Path, data_file: Path, tmp_path: Path, say: Say
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"model: {model_folder}\ndata: {data_file}\noutput: {tmp_path / 'run'}\n")
    told = say("train", file, "--set=train.max_steps=1", "--seed", 3, "--method", "rslora", "--offline", "-q")
    assert told == (0, "", "")
    run = Run.open(tmp_path / "run")
    assert run.config.train.seed == 3
    assert run.config.method["name"] == "rslora"
    assert run.origins["model.id"] == "file"
    assert run.origins["train.seed"] == "flag"
    again = tmp_path / "again.yaml"
    again.write_text((run.path / "config.yaml").read_text().replace("/run", "/again"))
    assert say("train", again, "--offline", "-q").code == 0
    first, second = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("run", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_a_chat_through_a_pipe(trained: Path, say: Say, monkeypatch: Any) -> None:
    lines = "/base\nwhat is 2\n/nonsense\n/base\nwhat is 2\n/quit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    told = say("chat", trained, "--max-new-tokens", "4", "--offline")
    assert told.code == 0
    assert told.err == ""
    assert "base answers from here on" in told.out
    assert "tuned answers from here on" in told.out
    assert "there is no command /nonsense" in told.out
    assert sys.stdin.read() == "never read\n"


def test_a_sample_is_one_line_that_obeys_no_control_character(capsys: pytest.CaptureFixture[str]) -> None:
    view = console.TrainView()
    view("sample", {"prompt": "a" * 99 + " end", "answer": "begin \x1b[2J" + "b" * 99, "stopped": False})
    view("sample", {"prompt": "p", "answer": "", "stopped": True})
    first, second = capsys.readouterr().err.splitlines()
    assert "\x1b" not in first
    assert "aaa end → begin �[2Jbbb" in first
    assert first.endswith("b…  (cut)")
    assert second.strip() == "sample  p → (nothing)"


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s"), (130, "2 min"), (8000, "2 h"), (200_000, "2 days")]
)
def test_how_long_ago(seconds: float, text: str) -> None:
    assert console.span(seconds) == text


# ---- merging ------------------------------------------------------------------------------------------------


def merged_equals_adapter(run: Path, out: Path) -> Any:
    opened = use.open_target(run, offline=True)
    assert opened.adapters is not None
    opened.adapters.eval()
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("what is 2 and 2", return_tensors="pt")["input_ids"]
    assert ids.tolist() == opened.tokenizer("what is 2 and 2", return_tensors="pt")["input_ids"].tolist()
    with torch.no_grad():
        theirs, ours = model(ids).logits, opened.model(ids).logits
        with opened.adapters.disabled():
            base = opened.model(ids).logits
    assert model.dtype == torch.float32
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert (ours - base).abs().max() > 0.05  # the adapter does something
    assert tokenizer.chat_template == opened.tokenizer.chat_template
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", ["all-linear", "[q, v, head]", "[q, v, embed]", "[q, head, embed]"])
@pytest.mark.usefixtures("quick")
def test_a_merged_model_is_a_model_of_its_own(
    tied: bool, targets: str, data_file: Path, tmp_path: Path, say: Say
) -> None:
    model = make_model(tmp_path / "model", tied=tied)
    given = settings(model, data_file, tmp_path / "run") | {"target_modules": targets, "train.max_steps": 4}
    flags = [f"--set={k}={v}" for k, v in given.items()]
    told = say("train", *flags, "--offline", "-q")
    assert told.code == 0, told.err
    told = say("merge", tmp_path / "run", tmp_path / "merged", "--offline")
    assert told.code == 0, told
    merged = merged_equals_adapter(tmp_path / "run", tmp_path / "merged")
    apart = not tied or targets != "all-linear"
    assert merged.config.tie_word_embeddings != apart
    assert ("lm_head.weight" in stored(tmp_path / "merged")) == apart
    assert "Writing" not in told.err


def stored(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_merging_is_refused_where_something_is(
    trained: Path, tmp_path: Path, say: Say, monkeypatch: Any
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    told = say("merge", trained, taken, "--offline")
    assert told.code == 2
    assert "is there already" in told.err
    assert "--force" in told.err
    assert (taken / "thesis.txt").read_text() == "years of work"
    told = say("merge", trained, taken / "thesis.txt", "--offline", "--force")
    assert told.code == 2
    assert "is a file" in told.err
    before = sorted(path.name for path in trained.iterdir())
    for out in (trained, trained.parent, Run.open(trained).config.model.id):
        told = say("merge", trained, out, "--offline", "--force")
        assert told.code == 2
        assert "would remove" in told.err
    for part in ("adapter", "checkpoints", "eval"):
        if (trained / part).is_dir():
            told = say("merge", trained, trained / part, "--offline", "--force")
            assert told.code == 2
            assert "which is to be merged" in told.err or "would remove" in told.err
    told = say("merge", trained, taken / "thesis.txt" / "deep", "--offline")
    assert told.code == 1
    assert "a part of this path is a file" in told.err
    monkeypatch.chdir(taken)
    assert say("merge", trained, taken, "--offline", "--force").code == 2
    assert before == sorted(path.name for path in trained.iterdir())
    monkeypatch.chdir(tmp_path)
    assert say("merge", trained, taken, "--offline", "--force").code == 0
    assert not (taken / "thesis.txt").exists()
    assert (taken / "config.json").is_file()


def test_merging_keeps_the_number_format_of_the_files(trained: Path, tmp_path: Path, say: Say) -> None:
    def kept(out: str, *more: Any) -> Any:
        assert say("merge", trained, tmp_path / out, "--offline", *more).code == 0
        return json.loads((tmp_path / out / "config.json").read_text())["dtype"]

    assert kept("same") == "float32"
    assert kept("half", "--dtype", "bfloat16") == "bfloat16"


def test_a_merge_that_is_not_the_adapter_fails(
    trained: Path, tmp_path: Path, say: Say, monkeypatch: Any
) -> None:
    tuned = merge_check.Recorded.tuned
    monkeypatch.setattr(merge_check.Recorded, "tuned", lambda self, ids: -tuned(self, ids))
    monkeypatch.setattr(fold.Run, "add_check", lambda *_: None)
    monkeypatch.setattr(fold, "write_json", lambda *_: None)
    assert say("merge", trained, tmp_path / "a", "--offline").code == 1
    told = say("merge", trained, tmp_path / "b", "--offline", "--json")
    assert told.code == 1
    assert json.loads(told.out)["folder"] == str(tmp_path / "b")


# ---- bad input ------------------------------------------------------------------------------------------------


def rows(*given: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in given).encode()


GOOD = [{"prompt": f"what is {i}", "completion": "two"} for i in range(6)]
HUGE = {"prompt": "x", "completion": "ab " * 100_000}
BAD_DATA: dict[str, tuple[str, bytes | None, dict[str, Any], int, list[str]]] = {
    "missing": ("a.jsonl", None, {}, 3, ["a.jsonl", "there is no"]),
    "unknown column": ("a.jsonl", rows(*GOOD), {"data.map": "{prompt: q9}"}, 3, ["q9", "prompt", "a.jsonl"]),
    "broken line": ("a.jsonl", rows(*GOOD) + b'{"prompt": "a", \n', {}, 3, ["a.jsonl", "7"]),
    "empty file": ("a.jsonl", b"", {}, 3, ["a.jsonl"]),
    "only blank lines": ("a.jsonl", b"\n\n  \n", {}, 3, ["a.jsonl"]),
    "nothing but empty answers": ("a.jsonl", rows({"prompt": "a", "completion": ""}), {}, 3, ["empty"]),
    "latin-1": ("a.csv", "prompt,completion\nsüß,ja\n".encode("latin-1"), {}, 3, ["a.csv", "data.encoding"]),
    "unknown fields": ("a.jsonl", rows({"foo": "a", "bar": "b"}), {}, 3, ["foo", "bar"]),
    "a row of 100k tokens": ("a.jsonl", rows(*GOOD, HUGE), {"data.too_long": "error"}, 3, ["a.jsonl:7"]),
    "held out more than there is": ("a.jsonl", rows(*GOOD), {"data.eval": 6}, 3, ["data.eval"]),
    "no such validation file": ("a.jsonl", rows(*GOOD), {"data.eval": "held.jsonl"}, 3, ["held.jsonl"]),
    "an unknown kind of file": ("a.docx", b"PK", {}, 3, ["a.docx"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case: str, model_folder: Path, tmp_path: Path, say: Say, monkeypatch: Any) -> None:
    name, content, more, code, words = BAD_DATA[case]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    flags = [f"--set={key}={value}" for key, value in more.items()]
    told = say("train", "-m", model_folder, "-d", name, "-o", "run", *flags, "--offline")
    assert told.code == code, told.err
    assert told.out == ""
    for word in words:
        assert word in told.err, told.err
    assert "\nerror: " in "\n" + told.err  # behind the model's line, which is known by then
    assert {path.name for path in tmp_path.iterdir()} <= {name}  # no half of a run
    assert say("data", name, "-m", model_folder, *flags, "--offline").code == code


@pytest.mark.usefixtures("quick")
def test_odd_data_that_is_fine(model_folder: Path, tmp_path: Path, say: Say, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bom.csv").write_bytes("prompt,completion\r\nwas ist süß,ja\r\nund das,nein\r\n".encode("utf-8-sig"))
    Path("long.jsonl").write_bytes(rows(*GOOD * 4, HUGE))
    common = ["-m", model_folder, "--set=train.max_steps=1", "--offline", "-q"]
    assert say("train", "-d", "bom.csv", "-o", "bom", "--set=data.eval=0", *common).code == 0
    told = say("train", "-d", "long.jsonl", "-o", "long", "--set=data.max_lost=0.2", *common)
    assert told.code == 0, told.err
    manifest = json.loads(Path("long/data/manifest.json").read_text())
    assert "long.jsonl:25" in json.dumps(manifest), manifest


def test_bad_models(model_folder: Path, data_file: Path, tmp_path: Path, say: Say, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "wordless", tokenizer=False)
    (tmp_path / "empty").mkdir()
    for model, words in {
        "wordless": ["has no tokenizer", "tokenizer.json"],
        "empty": ["no config.json"],
        "org/not-here": ["org/not-here", "offline"],
        str(data_file): ["is a file"],
    }.items():
        told = say("train", "-m", model, "-d", data_file, "-o", "run", "--offline")
        assert told.code == 2, told.err
        assert all(word in told.err for word in words), told.err
        assert "hint: " in told.err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["eval", "chat", "merge", "resume", "report"])
def test_a_run_that_is_not_there_names_the_near_ones(
    verb: str, trained: Path, say: Say, monkeypatch: Any
) -> None:
    monkeypatch.chdir(trained.parent.parent)
    more = {"merge": ["out"], "chat": ["--ask", "x"]}.get(verb, [])
    offline = [] if verb == "report" else ["--offline"]
    told = say(verb, "runs/frist", *more, *offline)
    assert told.code == 2
    assert "there is no run folder runs/frist" in told.err
    assert "did you mean runs/first?" in told.err
    assert not Path("out").exists()
    monkeypatch.chdir("runs")
    told = say(verb, "frist", *more, *offline)  # could be a model's name
    assert told.code == 2
    assert "did you mean first" in told.err, told.err


def test_the_adapter_of_another_model(trained: Path, tmp_path: Path, say: Say) -> None:
    other = make_model(tmp_path / "other", hidden_size=16, num_hidden_layers=1)
    for verb, more in {"eval": [], "chat": ["--ask", "x"], "merge": [tmp_path / "out"]}.items():
        for target in (trained, trained / "adapter"):
            told = say(verb, target, *more, "--model", other, "--offline")
            assert told.code == 2, told.err
            assert "does not fit LlamaForCausalLM" in told.err
            assert "the adapter has (4, 32), the model needs (4, 16)" in told.err
            assert "it was trained on" in told.err
    assert not (tmp_path / "out").exists()


def test_a_plain_model_and_an_adapter_folder(
    trained: Path, model_folder: Path, tmp_path: Path, say: Say
) -> None:
    told = say("eval", model_folder, "--offline")
    assert told.code == 2
    assert "has no adapter" in told.err
    assert say("merge", model_folder, tmp_path / "out", "--offline").code == 2
    assert say("chat", model_folder, "--ask", "x", "--max-new-tokens", "2", "--offline").code == 0
    told = say("eval", trained / "adapter", "--offline")
    assert told.code == 3
    assert "--data FILE" in told.err
    moved = shutil.copytree(trained / "adapter", tmp_path / "moved")
    assert say("merge", moved, tmp_path / "out", "--offline").code == 0
    merged_equals_adapter(trained, tmp_path / "out")


def test_an_output_that_is_taken(
    trained: Path, model_folder: Path, data_file: Path, tmp_path: Path, say: Say
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    for output, words in {
        trained: ["already holds a run", "loraloom resume"],
        tmp_path / "notes": ["is not empty"],
        tmp_path / "notes" / "a.txt": ["is a file"],
    }.items():
        told = say("train", "-m", model_folder, "-d", data_file, "-o", output, "--offline")
        assert told.code == 2
        assert all(word in told.err for word in words), told.err
    told = say("resume", trained)
    assert told.code == 2
    assert "is finished" in told.err


def test_no_runs(tmp_path: Path, say: Say) -> None:
    told = say("runs", tmp_path)
    assert told.code == 2
    assert "there are no runs" in told.err
    assert say("runs", tmp_path, "--json") == (0, "[]\n", "")


def test_a_damaged_run(trained: Path, tmp_path: Path, say: Say) -> None:
    broken = shutil.copytree(trained, tmp_path / "broken")
    (broken / "adapter" / "adapter_model.safetensors").write_bytes(b"\x00" * 64)
    told = say("chat", broken, "--ask", "x", "--offline")
    assert told.code == 2
    assert "adapter_model.safetensors is not a whole safetensors file" in told.err
    (broken / "run.json").write_text("{")
    assert say("resume", broken).code == 2
    shutil.rmtree(broken / "adapter")
    (broken / "run.json").write_text("{}")
    told = say("eval", broken, "--offline")
    assert told.code == 2
    assert "has no adapter yet" in told.err


# ---- Python ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_the_same_from_python(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    from loraloom.config import resolve

    given = settings(model_folder, data_file, tmp_path / "a")
    config, _ = resolve(None, given)
    first = api.train(config, output=str(tmp_path / "a"), train={"max_steps": 2}, offline=True)
    assert first.config.train.max_steps == 2
    assert first.config.train.batch_size == 4
    told: list[str] = []
    second = api.train(
        settings=given | {"output": str(tmp_path / "b")},
        train={"max_steps": 2},
        offline=True,
        listen=lambda kind, _: told.append(kind),
    )
    assert (first.path / "adapter/adapter_model.safetensors").read_bytes() == (
        second.path / "adapter/adapter_model.safetensors"
    ).read_bytes()
    assert told[:4] == ["fact", "fact", "fact", "workshop"]  # the model, the data, the method
    assert told[-1] == "end"
    assert set(told) == {"fact", "workshop", "step", "eval", "sample", "checkpoint", "end"}
    result = api.evaluate(second.path, num_answers=0, offline=True)
    assert result["settings"]["examples"] == 4


def test_the_terminal_shows_a_bar_and_ends_it(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty", reason="a terminal is imitated by pty, which Windows has not")
    given = settings(model_folder, data_file, tmp_path / "run") | {"train.max_steps": 3}
    flags = [f"--set={k}={v}" for k, v in given.items()]
    environment = {key: value for key, value in os.environ.items() if key != "CI"} | {
        "TERM": "xterm",
        "COLUMNS": "100",
    }
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "loraloom", "train", *flags, "--offline"]
    with subprocess.Popen(command, stderr=slave, stdout=slave, env=environment) as child:
        os.close(slave)
        shown = io.BytesIO()
        while True:
            try:
                part = os.read(master, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown.write(part)
    os.close(master)
    text = shown.getvalue().decode()
    assert child.returncode == 0, text
    assert "tok/s" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is back
    assert "Done in" in text
