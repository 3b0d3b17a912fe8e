"""Trains a tiny run again and again, kills it at a chosen call to the file system, and looks at what is left.

A script of its own, so that it can fork: one warm process forks a child for each kill, and one that resumes.
It prints one JSON object; tests/test_kill.py judges it.

    python kill_runner.py MODEL DATA FOLDER NUM_KILLS
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  # one thread, before torch
from tiny_run import adapter_bytes, run_tiny, settings

from loraloom import api, checkpoint, cli, workshop
from loraloom.adapter_io import load_adapter
from loraloom.config import ModelConfig
from loraloom.errors import UserError
from loraloom.files import OLD, PARTIAL
from loraloom.rundir import Run

KINDS = ("write", "fsync", "replace", "rename", "mkdir", "open", "truncate", "unlink", "rmdir")
CHANGES: dict[str, Any] = {"train__max_steps": 6, "train__save_every": 1, "eval__every": 2, "dropout": 0.1}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Watch:
    """Counts calls that change the file system, and at the one that is asked for does something else.

    at      the number of the call, from 0; None: only count
    action  what to do then: kill, full (this and every later write fails)
    """

    def __init__(self, at: int | None = None, action: str = "kill") -> None:
        self.at, self.action = at, action
        self.calls: list[tuple[str, str]] = []
        for kind in KINDS:
            setattr(os, kind, self.wrap(kind, getattr(os, kind)))

    def wrap(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if kind == "open" and not args[1] & WRITES:
                return function(*args, **kwargs)
            self.calls.append((kind, name_of(args[0])))
            due = self.at is not None and len(self.calls) > self.at
            if due and self.action == "kill":
                if kind == "write":  # the half of it is on the disk
                    function(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            if due and self.action == "full" and kind in ("write", "mkdir"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return call


def name_of(target: Any) -> str:
    """The name of what a call works on, without its numbers."""
    if isinstance(target, int):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{target}")
    return re.sub(r"\d+", "N", Path(os.fsdecode(target) if not isinstance(target, int) else "fd").name)


def forked(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives in a child process; None if the child was killed."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        code = 1
        try:
            with open(write, "w", closefd=False) as pipe:
                json.dump(function(*args), pipe)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    with open(read) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if status:
        raise SystemExit(f"a child ended with {status}")
    return json.loads(answer)


class Trial:
    """One model and one data set, and the files that an undisturbed run leaves."""

    def __init__(self, model: Path, data: Path, folder: Path, *, held: int) -> None:
        self.model, self.data, self.folder = model, data, folder
        self.changes = CHANGES | {"data__eval": held}

    def train(self, path: Path, watch: tuple[int | None, str] | None = None) -> Any:
        seen = Watch(*watch) if watch else None
        run_tiny(self.model, self.data, path, **self.changes)
        return seen.calls if seen else []

    def command(self, path: Path, at: int, action: str) -> dict[str, Any]:
        """The same by the command line: its exit code and what it printed."""
        flags = [f"--set={k}={v}" for k, v in settings(self.model, self.data, path, **self.changes).items()]
        shown = io.StringIO()
        cli.console.err.file = shown
        if action:
            Watch(at, action)
        return {"code": cli.run(["train", *flags, "--offline"]), "shown": shown.getvalue()}

    def inspect(self, path: Path, expected: str) -> dict[str, Any]:
        """Open what is left, restore every checkpoint, load the adapter, go on, and compare."""
        result: dict[str, Any] = {
            "created": (path / "run.json").is_file(),
            "checkpoints": 0,
            "finished": False,
        }
        if not result["created"]:
            result["empty"] = not path.exists()
            run = run_tiny(self.model, self.data, path, **self.changes)
        else:
            run = Run.open(path)
            run.metrics(), run.samples(), run.checks()
            result["checkpoints"] = self.restorable(run)
            result["adapter"] = (run.adapter_path / "adapter_config.json").is_file()
            if result["adapter"]:
                load_adapter(LOADED.model, run.adapter_path).detach()
            try:
                run = api.resume(path, offline=True)
            except UserError as error:
                result["finished"] = "is finished" in error.message
                if not result["finished"]:
                    raise
        result["equal"] = adapter_bytes(run).hex() == Path(expected).read_text()
        result["status"] = run.state["status"]
        result["steps"] = [record["step"] for record in run.metrics("train")]
        result["left"] = [
            str(p.relative_to(path)) for p in path.rglob(".*") if p.name.startswith((PARTIAL, OLD))
        ]
        return result

    def restorable(self, run: Run) -> int:
        """How many checkpoints there are; each is put into a fresh workshop."""
        found = run.checkpoints()
        if found:
            shop = workshop.build(run.config, offline=True, cache=api.data_cache(), progress=False)
            for step, folder in found:
                assert checkpoint.restore(shop, folder).step == step
                load_adapter(shop.adapters, folder, name="again")
                shop.adapters.remove("again")
            shop.adapters.detach()
        return len(found)


def spread(calls: list[list[str]], count: int) -> list[int]:
    """Call numbers: each file's first rename and removal, one of every other kind, the rest evenly over all."""
    first: dict[tuple[str, ...], int] = {}
    for number, (kind, name) in enumerate(calls):
        first.setdefault((kind, name if kind in ("rename", "unlink") else ""), number)
    chosen = {*first.values(), len(calls) - 1}
    room = max(0, count - len(chosen))
    return sorted(chosen | {round(i * (len(calls) - 1) / max(1, room - 1)) for i in range(room)})


def kills(trial: Trial, count: int) -> dict[str, Any]:
    forked(trial.train, trial.folder / "warm")  # leaves the prepared data in the cache
    calls = forked(trial.train, trial.folder / "whole", (None, "kill"))
    expected = trial.folder / "expected"
    expected.write_text(adapter_bytes(Run(trial.folder / "whole")).hex())
    results = []
    for number in spread(calls, count):
        path = trial.folder / f"killed-{number}"
        assert forked(trial.train, path, (number, "kill")) is None
        results.append({"number": number, "call": calls[number]} | forked(trial.inspect, path, str(expected)))
    return {"calls": calls, "kills": results}


def full_disks(trial: Trial, count: int, calls: list[list[str]]) -> list[dict[str, Any]]:
    """The disk fills up while the third checkpoint is written, and at some other calls."""
    states = [number for number, call in enumerate(calls) if call == ["write", ".partial-state.safetensors"]]
    results = []
    for number in [states[2], *(round((i + 0.5) * len(calls) / count) for i in range(count))]:
        path = trial.folder / f"full-{number}"
        found = forked(trial.command, path, number, "full")
        results.append(
            {"number": number} | found | forked(trial.inspect, path, str(trial.folder / "expected"))
        )
    return results


def main(model: str, data: str, folder: str, count: str) -> None:
    global LOADED
    LOADED = workshop.load_model(ModelConfig(id=model, dtype="float32"), offline=True)
    workshop.load_model = lambda *_, **__: LOADED  # each child has its own copy of it
    api.build_report = lambda run: None  # drawing takes longer than training
    answer = {}
    for held in (4, 0):
        place = Path(folder) / f"held-{held}"
        place.mkdir()
        trial = Trial(Path(model), Path(data), place, held=held)
        answer[f"held-{held}"] = kills(trial, int(count) if held else int(count) // 5)
        if held:
            answer["full"] = full_disks(trial, 5, answer["held-4"]["calls"])
    print(json.dumps(answer))


LOADED: Any = None
if __name__ == "__main__":
    main(*sys.argv[1:])
