"""A run that stops and goes on ends as one that never stopped, bit for bit on a CPU."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import adapter_bytes, make_data, progress_of, run_tiny, settings, timeless

from loraloom import api, checkpoint
from loraloom.errors import UserError
from loraloom.files import write_json
from loraloom.heldout import Loss
from loraloom.rundir import Run

pytestmark = pytest.mark.usefixtures("quick")


class Cut(Exception):
    """What ends a run in the middle, as a kill would: nothing of ours catches it."""


@contextmanager
def cut_after(step: int) -> Iterator[Any]:
    """A listener that ends the run when the checkpoint of a step is there."""

    def listen(kind: str, record: Any) -> None:
        if kind == "checkpoint" and record.name == f"step-{step:06d}":
            raise Cut

    with pytest.raises(Cut):
        yield listen


def state(run: Run) -> dict[str, torch.Tensor]:
    latest = run.latest()
    assert latest is not None
    return load_file(latest[1] / checkpoint.STATE)


def assert_same_end(run: Run, other: Run) -> None:
    assert adapter_bytes(run) == adapter_bytes(other)
    one, two = state(run), state(other)
    assert one.keys() == two.keys()
    plain = run.config.train.optimizer == "sgd" and not run.config.train.momentum
    assert any(key.startswith("optimizer|") for key in one) != plain
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert progress_of(run) == progress_of(other)
    assert timeless(run.metrics()) == timeless(other.metrics())
    assert run.samples() == other.samples()
    varying = ("started", "finished", "seconds", "pid", "pid_started")
    first, second = ({k: v for k, v in one.state.items() if k not in varying} for one in (run, other))
    assert first == second
    assert run.checks() == other.checks()


CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"train__optimizer": "sgd"},
    "sgd without momentum": {"train__optimizer": "sgd", "train__momentum": 0.0},
    "dropout": {"dropout": 0.3},
    "epochs, unpacked": {"train__max_steps": None, "train__epochs": 2, "data__packing": False},
    "tokens a step": {"train__batch_size": None, "train__batch_tokens": 90},
    "a base in 4 bits": {"model__quantize": "nf4", "dropout": 0.1},
    "8-bit moments": {"train__optimizer": "adamw8bit", "r": 64},
    "no held-out set": {"data__eval": 0},
    "prompts and no held-out set": {"data__eval": 0, "eval__prompts": ["what is 2 and 2"]},
    "loraplus, biases, a module trained whole": {
        "method": {"name": "loraplus", "lr_ratio": 4},
        "modules_to_save": ["lm_head"],
        "target_modules": ["q", "v", "embed"],
    },
}


@pytest.mark.parametrize("case", CASES)
def test_five_steps_and_five_more_are_ten(
    case: str, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    changes = CASES[case] | {"train__save_every": 5}
    whole = run_tiny(model_folder, data_file, tmp_path / "whole", **changes)
    with cut_after(5) as listen:
        run_tiny(model_folder, data_file, tmp_path / "cut", **changes, listen=listen)
    cut = Run.open(tmp_path / "cut")
    assert cut.state["status"] == "failed"
    assert cut.latest() == (5, tmp_path / "cut" / "checkpoints" / "step-000005")
    assert whole.state["step"] == 10
    again = api.resume(tmp_path / "cut", offline=True)
    assert again.state["status"] == "done"
    assert_same_end(again, whole)


def test_from_every_step_even_without_a_checkpoint(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """What was written after the last checkpoint is forgotten and made again."""
    changes = {"train__save_every": 3, "train__max_steps": 7, "dropout": 0.1}
    whole = run_tiny(model_folder, data_file, tmp_path / "whole", **changes)
    for step in (1, 2, 4, 7):

        def listen(kind: str, record: Any, step: int = step) -> None:
            if kind == "step" and record["step"] == step:
                raise Cut

        with pytest.raises(Cut):
            run_tiny(model_folder, data_file, tmp_path / f"cut{step}", **changes, listen=listen)
        assert_same_end(api.resume(tmp_path / f"cut{step}", offline=True), whole)


def test_early_stopping_counts_on(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """The rate is far too high, so the loss rises; the best adapter is not the last."""
    changes = {"train__learning_rate": 0.3, "train__early_stop": 3, "eval__every": 1, "train__save_every": 1}
    whole = run_tiny(model_folder, data_file, tmp_path / "whole", **changes, train__max_steps=30)
    assert whole.state["status"] == "stopped_early"
    last = whole.state["step"]
    best = whole.state["best"]["step"]
    assert last == best + 3
    assert progress_of(whole)["waited"] == 3
    for step in (last - 1, last):
        with cut_after(step) as listen:
            path = tmp_path / f"cut{step}"
            run_tiny(model_folder, data_file, path, **changes, train__max_steps=30, listen=listen)
        again = api.resume(path, offline=True)
        assert_same_end(again, whole)


def test_the_kept_adapter_is_that_of_the_best_step(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses are given: falling to step 9, then rising, which a tiny model does not do on every machine."""
    given = iter([abs(step - 9) + 1.0 for step in range(15)])
    monkeypatch.setattr("loraloom.train.measure", lambda shop: Loss(next(given), 1, []))
    kept: dict[int, bytes] = {}

    def listen(kind: str, record: Any) -> None:
        if kind == "checkpoint":
            kept[int(record.name[-6:])] = (record / "adapter_model.safetensors").read_bytes()

    changes: dict[str, Any] = {"train__early_stop": None, "eval__every": 1, "train__save_every": 1}
    changes |= {"train__keep": 3, "train__max_steps": 14}
    run = run_tiny(model_folder, data_file, tmp_path / "run", **changes, listen=listen)
    held = {record["step"]: record["loss"] for record in run.metrics("eval")}
    assert min(held, key=held.__getitem__) == 9
    assert run.state["best"] == {"step": 9, "loss": 1.0}
    assert run.state["status"] == "done"  # early_stop is off
    assert adapter_bytes(run) == kept[9] != kept[14]
    assert [step for step, _ in run.checkpoints()] == [12, 13, 14]  # train.keep
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == [
        f"step-{step:06d}" for step in (12, 13, 14)
    ]


def test_a_checkpoint_is_an_adapter_folder_that_opens_by_itself(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    from loraloom.use import open_target

    run = run_tiny(model_folder, data_file, tmp_path / "run", data__prompt="plain", data__eval=0)
    latest = run.latest()
    assert latest is not None
    from_run, from_checkpoint = open_target(run.path, offline=True), open_target(latest[1], offline=True)
    assert from_checkpoint.style == from_run.style
    assert from_checkpoint.style.name == "plain"
    ids = torch.arange(5, 25, device=from_run.loaded.device)[None]
    with torch.no_grad():
        assert (
            torch.equal(
                from_run.model(ids).logits, from_checkpoint.model.to(from_run.loaded.dtype)(ids).logits
            )
            or from_checkpoint.loaded.dtype != torch.float32
        )


# ---- what is refused ----------------------------------------------------------------------------------------


@pytest.fixture
def stopped(model_folder: Path, data_file: Path, tmp_path: Path) -> Path:
    data = tmp_path / "own.jsonl"
    shutil.copy(data_file, data)
    with cut_after(2) as listen:
        run_tiny(model_folder, data, tmp_path / "run", train__max_steps=4, train__save_every=2, listen=listen)
    return tmp_path / "run"


@pytest.mark.parametrize("part", ["trained on", "held out"])
def test_changed_data_is_refused(stopped: Path, part: str) -> None:
    run = Run.open(stopped)
    data = Path(run.config.data.train[0].path)
    from loraloom.workshop import build

    shop = build(run.config, offline=True, progress=False)
    row = (shop.train if part == "trained on" else shop.eval)[0].row
    lines = data.read_text().splitlines()
    number = int(row.rpartition(":")[2]) - 1
    lines[number] = lines[number].replace("answer", "reply")
    data.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"the data of .* has changed since it started"):
        api.resume(stopped, offline=True)


def test_missing_data_is_said(stopped: Path) -> None:
    Path(Run.open(stopped).config.data.train[0].path).unlink()
    with pytest.raises(UserError, match=r"own\.jsonl") as caught:
        api.resume(stopped, offline=True)
    assert caught.value.exit_code == 3


def test_a_finished_run_is_refused(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    run = run_tiny(model_folder, data_file, tmp_path / "run", train__max_steps=1)
    with pytest.raises(UserError, match=r"is finished \(done at step 1\)") as caught:
        api.resume(run.path, offline=True)
    assert caught.value.hint is not None


def test_a_run_that_still_runs_is_refused(stopped: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    run = Run.open(stopped)
    try:
        about = {"status": "running", "pid": child.pid, "host": platform.node()}
        run.update(**about, pid_started=api.started(child.pid))
        with pytest.raises(UserError, match=f"still running, as process {child.pid}"):
            api.resume(stopped, offline=True)
        if sys.platform == "linux":
            assert not api.alive(about | {"pid_started": 1})  # the number belongs to another process now
        assert not api.alive(about | {"host": "elsewhere"})
        assert api.alive(about)
    finally:
        child.communicate(b"\n")
    assert not api.alive(run.state)
    assert api.resume(stopped, offline=True).state["status"] == "done"


def test_a_process_that_ended_and_was_not_waited_for_does_not_run() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not api.alive({"pid": child.pid, "host": platform.node()})
    child.wait()


def test_a_broken_checkpoint_is_said_and_the_one_before_it_used(stopped: Path) -> None:
    run = Run.open(stopped)
    latest = run.latest()
    assert latest is not None
    shutil.copytree(latest[1], latest[1].with_name("step-000003"))
    broken = latest[1].with_name("step-000003") / checkpoint.STATE
    for content in (broken.read_bytes()[:1000], b"", b"\xff" * 50):
        broken.write_bytes(content)
        with pytest.raises(UserError, match="step-000003 is no whole checkpoint") as caught:
            api.resume(stopped, offline=True)
        assert "remove it" in (caught.value.hint or "")
    shutil.rmtree(broken.parent)
    assert api.resume(stopped, offline=True).state["step"] == 4


def test_a_checkpoint_of_other_settings_is_refused(stopped: Path) -> None:
    run = Run.open(stopped)
    text = (run.path / "config.resolved.yaml").read_text()
    (run.path / "config.resolved.yaml").write_text(text.replace("\nr: 4 ", "\nr: 8 "))
    with pytest.raises(UserError, match="is of a run with other settings") as caught:
        api.resume(stopped, offline=True)
    assert any("/A" in line for line in caught.value.details)


def test_a_run_killed_before_it_kept_its_data_keeps_it_when_it_goes_on(stopped: Path) -> None:
    run = Run.open(stopped)
    shutil.rmtree(run.path / "data")
    shutil.rmtree(run.path / "checkpoints")
    write_json(run.path / "run.json", {"status": "running", "started": "now", "step": 0, "model": "m"})
    again = api.resume(stopped, offline=True)
    assert again.state["status"] == "done"
    assert (again.path / "data" / "held-out" / "facts.json").is_file()
    assert (again.path / "data" / "manifest.json").is_file()
    assert [record["step"] for record in again.metrics("eval")] == [0, 2, 4]


# ---- Ctrl-C -------------------------------------------------------------------------------------------------

RUNNER = """
import json, os, signal, sys
sys.path.insert(0, {tests!r})
import conftest
from loraloom import console
signals = json.loads(sys.argv[1])
def on_step(self, record):
    for number in signals.get(str(record["step"]), []):
        os.kill(os.getpid(), number)
console.TrainView.on_step = on_step
from loraloom.cli import run
sys.exit(run(sys.argv[2:]))
"""


def interrupted(arguments: list[str], signals: dict[int, list[int]]) -> subprocess.CompletedProcess[str]:
    code = RUNNER.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, json.dumps(signals), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_ctrl_c_saves_and_the_run_goes_on(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    whole = run_tiny(model_folder, data_file, tmp_path / "whole", dropout=0.1)
    path = tmp_path / "cut"
    flags = [f"--set={k}={v}" for k, v in settings(model_folder, data_file, path, dropout=0.1).items()]
    done = interrupted(["train", *flags, "--offline"], {3: [signal.SIGINT]})
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert f"loraloom resume {path}" in done.stderr
    assert done.stdout == ""
    run = Run.open(path)
    assert run.state["status"] == "interrupted"
    assert run.state["step"] == 3
    assert f"loraloom resume {path}" in run.state["message"]
    assert [step for step, _ in run.checkpoints()] == [3]  # the step in hand was finished and saved
    again = api.resume(path, offline=True)
    assert_same_end(again, whole)


def test_a_polite_kill_is_a_ctrl_c_and_a_second_one_ends_at_once(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for name, numbers, saved in (("kill", [signal.SIGTERM], [3]), ("twice", [signal.SIGINT] * 2, [])):

        def listen(kind: str, record: Any, numbers: list[int] = numbers) -> None:
            for number in numbers if kind == "step" and record["step"] == 3 else ():
                os.kill(os.getpid(), number)

        with pytest.raises(KeyboardInterrupt, match=f"loraloom resume {tmp_path / name}"):
            run_tiny(model_folder, data_file, tmp_path / name, listen=listen)
        run = Run.open(tmp_path / name)
        assert run.state["status"] == "interrupted"
        assert [step for step, _ in run.checkpoints()] == saved
        assert ("the state of step 3 is saved" in run.state["message"]) == bool(saved)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert api.resume(run.path, offline=True).state["status"] == "done"


def test_training_outside_the_main_thread_listens_to_no_signal(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(run_tiny, model_folder, data_file, tmp_path / "run", train__max_steps=2).result()
    assert run.state["status"] == "done"


def test_data_made_anew_with_the_same_content_is_the_same(stopped: Path) -> None:
    make_data(Path(Run.open(stopped).config.data.train[0].path))
    assert api.resume(stopped, offline=True).state["status"] == "done"
