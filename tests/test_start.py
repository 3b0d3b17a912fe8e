"""What happens before the first step: the data beside the weights, and lines as soon as they are known."""

from __future__ import annotations

import gc
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_run import make_data, make_model, settings

from loraloom import api, progress, workshop
from loraloom.beside import Beside
from loraloom.data.read import read_table
from loraloom.errors import DataError, UserError
from loraloom.generate import context_length, reach
from loraloom.skeleton import read_shape

SECONDS = 20.0  # that nothing here takes


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data.jsonl")


def in_time(done: Callable[[], bool]) -> bool:
    end = time.monotonic() + SECONDS
    while not done() and time.monotonic() < end:
        time.sleep(0.01)
    return done()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "loraloom-beside"]


def test_work_beside_gives_its_result_or_what_it_raised() -> None:
    with Beside(lambda pause: 7) as work:
        assert work.result() == 7

    def fails(pause: Callable[[], None]) -> int:
        raise DataError("broken")

    with Beside(fails) as work:
        with pytest.raises(DataError, match="broken"):
            work.result()
        with pytest.raises(DataError, match="broken"):
            work.check()
    assert not threads()


def test_work_that_nobody_waits_for_ends() -> None:
    rounds: list[int] = []

    def forever(pause: Callable[[], None]) -> None:
        while True:
            pause()
            rounds.append(1)
            time.sleep(0.001)

    with Beside(forever) as work:
        assert in_time(lambda: len(rounds) > 2)
        work.check()
    assert not threads()


def test_an_interrupt_waits_for_the_work_to_end() -> None:
    over: list[int] = []

    def forever(pause: Callable[[], None]) -> None:
        try:
            while True:
                pause()
                time.sleep(0.01)
        finally:
            time.sleep(0.2)
            over.append(1)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Beside(forever) as work:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                work.result()
    finally:
        signal.signal(signal.SIGINT, before)
    assert over
    assert not threads()


def test_work_that_cannot_be_stopped_is_left_behind_by_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraloom.beside.PATIENCE", 0.05)
    ready = threading.Event()
    try:
        with pytest.raises(UserError, match="another"), Beside(lambda pause: ready.wait(SECONDS)):
            raise UserError("another")
        assert threads()
    finally:
        ready.set()
    assert in_time(lambda: not threads())


def test_reading_rows_can_be_ended(data_file: Path) -> None:
    seen: list[int] = []

    def each() -> None:
        seen.append(1)
        if len(seen) == 3:
            raise UserError("enough")

    with pytest.raises(UserError, match="enough"):
        read_table(str(data_file), split="train", encoding="utf-8", limit=None, each=each)
    assert len(seen) == 3


def test_broken_data_ends_the_loading(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights here never end: only the data's error can."""

    def weights(*_: Any, each: Callable[[], None], **__: Any) -> None:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            each()
        pytest.fail("the loading went on")

    data_file.write_text(data_file.read_text() + "{broken\n")
    monkeypatch.setattr(workshop, "load_model", weights)
    with pytest.raises(DataError, match="not JSON"):
        api.train(settings=settings(model_folder, data_file, tmp_path / "run"), offline=True)
    assert not (tmp_path / "run").exists()
    assert not threads()


def test_what_an_arriving_weight_raises_ends_the_loading(model_folder: Path) -> None:
    calls: list[int] = []

    def each() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise DataError("enough")

    config, _ = workshop_config(model_folder)
    with pytest.raises(DataError, match="enough"):
        workshop.load_model(config.model, offline=True, progress=False, each=each)
    assert len(calls) == 3


def workshop_config(model_folder: Path) -> Any:
    from loraloom.config import resolve

    return resolve(None, {"model": str(model_folder), "data": "none", "output": "none"})


def test_the_model_is_told_before_its_weights_are_read_and_the_data_beside(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []
    load, known = workshop.load_model, []

    def slow(*args: Any, **options: Any) -> Any:
        known.append([name for name, _ in told][:1])
        assert in_time(lambda: len(told) == 2)  # the data is read meanwhile
        return load(*args, **options)

    monkeypatch.setattr(workshop, "load_model", slow)
    given = settings(model_folder, data_file, tmp_path / "run", train__max_steps=1)
    api.train(
        settings=given, offline=True, listen=lambda kind, fact: told.append(fact) if kind == "fact" else None
    )
    assert [name for name, _ in told] == ["model", "data", "method"]
    assert known == [["model"]]
    for (_, text), word in zip(told, (str(model_folder), "examples", "14 layers")):
        assert word in text


def test_a_wrong_model_ends_the_reading(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise UserError("no such weights")

    monkeypatch.setattr(workshop, "load_model", fails)
    with pytest.raises(UserError, match="no such weights"):
        api.train(settings=settings(model_folder, data_file, tmp_path / "run"), offline=True)
    assert not threads()


def test_the_length_in_the_config_is_that_of_the_model(model_folder: Path) -> None:
    config, _ = workshop_config(model_folder)
    model = workshop.load_model(config.model, offline=True, progress=False).model
    assert reach(read_shape(model_folder)) == context_length(model) == 128


def test_two_that_count_at_once_share_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(progress, "err", Console(file=shown, force_terminal=True, width=100))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress.counted("rows", total=4) as rows:
        with progress.doing("waiting"), progress.counted("weights") as weights:
            rows("of a file", 2)
            weights("head")
            progress.err.print("a line")
            bars = progress.BOARD.bars
            assert bars is not None
            assert len(bars.tasks) == 3
            bars.refresh()  # which happens by itself ten times a second
        assert len(bars.tasks) == 1
    assert progress.BOARD.bars is None
    text = shown.getvalue()
    assert all(word in text for word in ("2 of 4 of a file", "1 head", "waiting", "a line"))


def test_garbage_waits_for_the_imports_alone() -> None:
    assert gc.isenabled()
    try:
        with progress.starting(shown=False):
            assert not gc.isenabled()
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_nothing_is_frozen_when_the_command_ends() -> None:
    """Libraries that look for what is left at the end would find it, and write pages of it."""
    code = (
        "import atexit, gc\n"
        "from loraloom.progress import starting\n"
        "atexit.register(lambda: print(gc.get_freeze_count()))\n"  # called last
        "with starting(shown=False):\n    import json\n"
        "print(gc.get_freeze_count() > 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "0"]
