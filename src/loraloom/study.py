"""A study: every setting with every seed as an ordinary run, and one table of what they came to.

    OUT/study.json     what is tried, the runs, the table; written anew after each run
    OUT/study.html     the same as a page
    OUT/data/          the rows to train on, to choose by and to report (study_data.py)
    OUT/runs/          the run folders

A study that was stopped goes on where it was: finished runs are kept, one that was cut is resumed. A run that failed
is told and kept; the others go on.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import study_run
from .environment import environment
from .errors import INTERRUPTED, Failure, UserError
from .files import write_json
from .results import result, total
from .rundir import STATE, Run
from .study_data import split_data, write_split
from .study_file import Setting, Study, read_study, runs_of
from .study_page import write_page
from .study_plan import plan_study
from .study_run import FINISHED, SCORES, TASKS
from .study_table import LOSS, sentences, table
from .study_tasks import check_tasks

RECORD = "study.json"
SIDES = "data/sides.json"  # written last: how many rows each side has
Listener = Callable[[str, Any], None]


def silent(kind: str, record: Any) -> None:
    """A listener that says nothing."""


class Folder:
    """A study's folder on the disk."""

    def __init__(self, path: Path, study: Study, documents: Mapping[str, str] | None = None) -> None:
        """documents: the digests of the benchmarks' own documents, by task"""
        self.path, self.study, self.documents = path, study, dict(documents or {})

    @property
    def identity(self) -> dict[str, Any]:
        """What the folder belongs to."""
        return self.study.to_dict() | ({"documents": self.documents} if self.documents else {})

    @property
    def sides(self) -> dict[str, Any]:
        return dict(json.loads((self.path / SIDES).read_text(encoding="utf-8")))

    def run(self, name: str) -> Path:
        return self.path / "runs" / name

    def failure(self, name: str) -> Path:
        return self.path / "failures" / f"{name}.json"

    def begin(self, command: str) -> None:
        """Make the folder, or see that it holds this very study.

        raises  UserError if it holds something else
        """
        known = self.path / RECORD
        if known.is_file():
            before = json.loads(known.read_text(encoding="utf-8"))
            known_as, now = before.get("study", {}), json.loads(json.dumps(self.identity))
            if known_as != now:
                unlike = [key for key in known_as | now if known_as.get(key) != now.get(key)]
                raise UserError(
                    f"{self.path} holds a study with other settings",
                    details=[f"not the same: {', '.join(unlike)}"],
                    hint="name another folder with -o; that one's results stay as they are",
                )
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self.path} is not empty, and holds no study", hint="name another one with -o")
        write_json(known, {"study": self.identity, "command": command})

    def split(self, *, offline: bool = False) -> None:
        """Hold the rows out and write them, unless that is done."""
        if (self.path / SIDES).is_file():
            return
        config = self.study.config(self.study.settings[0])
        sides, changes = split_data(config, made=self.study.file.made, offline=offline)
        write_split(sides, self.path / "data")
        write_json(self.path / SIDES, {"sizes": sides.sizes, "settings": changes})

    def settings(self, setting: Setting, seed: int, name: str) -> dict[str, Any]:
        """A run's settings: the study's, on the study's rows."""
        data = self.path / "data"
        own = {key: v for key, v in self.study.values(setting, seed).items() if key not in ("data.train",)}
        own |= self.sides["settings"] | {"data.eval": str(data / "selection.jsonl")}
        own["data.train"] = [one | {"path": str(data / one["path"])} for one in own["data.train"]]
        return own | {"output": str(self.run(name))}

    def task(self, setting: Setting, seed: int, name: str, **more: Any) -> dict[str, Any]:
        """What study_run is told."""
        return more | {
            "run": str(self.run(name)),
            "settings": self.settings(setting, seed, name),
            "final": str(self.path / "data" / "final.jsonl"),
            "answers": self.study.file.answers,
            "tasks": self.study.tasks,
            "task_limit": self.study.file.task_limit,
            "task_data": str(self.study.task_data) if self.study.task_data else None,
            "failure": str(self.failure(name)),
        }

    def outcome(self, setting: Setting, seed: int, name: str) -> dict[str, Any]:
        """What a run came to: finished, failed with a message, or open.

        raises  Failure if other weights trained than the study expects
        """
        found: dict[str, Any] = {"setting": setting.name, "seed": seed, "run": f"runs/{name}"}
        path = self.run(name)
        state = Run(path).state
        wanted = [SCORES, *([TASKS] if self.study.file.tasks else [])]
        if state.get("status") in FINISHED and all((path / name).is_file() for name in wanted):
            count, scored = self.study.file.expected.get(setting.name), scores(Run(path))
            if count is not None and scored["trainable"] != count:
                raise Failure(
                    f"{path}: {scored['trainable']:,} weights trained, {count:,} are expected",
                    hint="its model's files are not those that were planned",
                )
            return found | {"status": "finished", "message": None} | scored
        if self.failure(name).is_file():
            told = json.loads(self.failure(name).read_text(encoding="utf-8"))
            return found | {"status": "failed", "message": told["message"]}
        if state.get("status") == "failed":
            return found | {"status": "failed", "message": state.get("message")}
        return found | {"status": "open", "message": state.get("message")}

    def write(self, command: str) -> dict[str, Any]:
        """The record of what there is so far."""
        runs = [self.outcome(*one) for one in runs_of(self.study)]
        rows = table(self.study, runs)
        given = self.study.file
        record = {
            "study": self.identity,
            "command": command,
            "asks": given.asks,
            "source": given.source,
            "found": given.found,
            "note": given.note,
            "axis": given.axis,
            "rows": self.sides["sizes"],
            "environment": environment() | machine(self, runs),
            "says": sentences(rows, self.sides["sizes"]),
            "table": rows,
            "runs": runs,
        }
        write_json(self.path / RECORD, record)
        return record


def study(
    name: str | Path,
    *,
    preset: str | None = None,
    out: Path | str | None = None,
    listen: Listener = silent,
    offline: bool = False,
    processes: bool = True,
    retry: bool = False,
    quiet: bool = True,
    argv: list[str] | None = None,
) -> dict[str, Any]:
    """Make every run of a study that is not finished; its record, which study.json holds too.

    name       a study that ships with the package, or a file
    out        the folder; None: runs/study-NAME-PRESET
    listen     told ("begin", {runs, finished}), ("run", {place, of, name, seed}) and ("ran", outcome)
    processes  a process for each run; else all in this one, whose peak memory is then that of them all
    retry      try runs again that failed

    raises  UserError for a study that cannot be run; KeyboardInterrupt after Ctrl-C, with all left whole
    """
    found = read_study(name, preset)
    if found.file.plan_only:
        raise UserError(
            f"{found.name}, {found.preset}, can only be planned: {found.file.plan_only}", hint="--plan"
        )
    place = Path(out or default_folder(found))
    words = argv or sys.argv
    plan_study(found, memory=False, offline=offline)  # the counts must be right before hours are spent
    folder = Folder(place, found, check_tasks(found, offline=offline))
    command = shlex.join([Path(words[0]).name, *words[1:]])
    folder.begin(command)
    folder.split(offline=offline)
    every = runs_of(found)
    before = [folder.outcome(*one)["status"] for one in every]
    listen("begin", {"study": found, "folder": str(place), "runs": len(every), "statuses": before})
    for count, (one, status) in enumerate(zip(every, before), start=1):
        if status == "finished" or (status == "failed" and not retry):
            continue
        setting, seed, run = one
        refuse_running(folder.run(run))
        listen("run", {"place": count, "of": len(every), "name": setting.name, "seed": seed})
        folder.failure(run).unlink(missing_ok=True)
        task = folder.task(*one, offline=offline, argv=words, quiet=quiet)
        with told(folder, command):
            (in_process if processes else here)(task)
        listen("ran", folder.outcome(*one))
        folder.write(command)
    record = folder.write(command)
    if find_spec("matplotlib") and find_spec("jinja2"):
        write_page(place, record)
    return record


def refuse_running(path: Path) -> None:
    """
    raises  UserError if another process trains this run now
    """
    state = Run(path).state
    if state.get("status") == "running" and study_run.api.alive(state):
        raise UserError(f"{path} is still running, as process {state['pid']}", hint="wait for it, or stop it")


def default_folder(found: Study) -> Path:
    return Path("runs") / "-".join(filter(None, ["study", found.name, found.preset]))


@contextmanager
def told(folder: Folder, command: str) -> Iterator[None]:
    """After Ctrl-C the record is written, and the message says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        done = [run for run in folder.write(command)["runs"] if run["status"] == "finished"]
        raise KeyboardInterrupt(
            f"interrupted; {len(done)} of {len(runs_of(folder.study))} runs are finished; "
            "go on with the same command"
        ) from None


def here(task: Mapping[str, Any]) -> None:
    """A run in this process. What fails is kept for the table."""
    try:
        study_run.make(dict(task))
    except UserError as error:
        write_json(task["failure"], {"message": error.message, "details": error.details, "hint": error.hint})


def in_process(task: Mapping[str, Any]) -> None:
    """A run in a process of its own.

    It is a session of its own, so that Ctrl-C comes to us alone: we pass it on once, and it saves its state.

    raises  KeyboardInterrupt if it was stopped
    """
    command = [sys.executable, "-m", "loraloom.study_run", json.dumps(task)]
    with passing_on() as relay:
        code = relay.to(subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)).wait()
    if relay.asked or code == INTERRUPTED or -code in (signal.SIGINT, signal.SIGTERM):
        raise KeyboardInterrupt  # also where the run came to its end before it heard
    if code < 0:
        name = signal.Signals(-code).name
        words = ", as the system does where memory runs out" if name == "SIGKILL" else ""
        write_json(task["failure"], {"message": f"its process was ended by {name}{words}"})
    elif code and not Path(task["failure"]).is_file():
        write_json(task["failure"], {"message": f"its process ended with {code}; its messages stand above"})


class Relay:
    """Ctrl-C and polite kills for another process, also those that came before it was there."""

    def __init__(self) -> None:
        self.asked = 0
        self.child: subprocess.Popen[bytes] | None = None

    def ask(self, number: int, frame: Any) -> None:
        self.asked += 1
        if self.child is not None:
            self.child.send_signal(signal.SIGINT)

    def to(self, child: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        self.child = child
        if self.asked:
            child.send_signal(signal.SIGINT)
        return child


@contextmanager
def passing_on() -> Iterator[Relay]:
    """As long as this lasts, Ctrl-C and a polite kill go to the relay's child, as often as they come."""
    relay = Relay()
    if threading.current_thread() is not threading.main_thread():
        yield relay  # only the main thread may listen
        return
    before = {number: signal.signal(number, relay.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield relay
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def scores(run: Run) -> dict[str, Any]:
    """A finished run's numbers. A classifier's base is the answer that does not read the text."""
    outcome, final = result(run), run.read(SCORES, {})
    labelled = final.get("task") == "classification"
    rows = {row["metric"]: row for row in final["rows"]}
    match, side = rows.get("exact match"), "constant" if labelled else "base"
    main = run.config.eval.best if labelled else LOSS
    scored = [row for row in final["rows"] if row["metric"] != LOSS] if labelled else []
    scored += run.read(TASKS, {"rows": []})["rows"]
    return {
        "main": main,
        "unit": rows[LOSS]["unit"],
        "selection": outcome.best_loss if main == LOSS else run.state["best"][main],
        "best_step": outcome.best_step,
        "loss": rows[LOSS]["tuned"]["value"],
        "loss_stderr": rows[LOSS]["tuned"]["stderr"],
        "base_loss": rows[LOSS][side]["value"],
        "exact_match": match["tuned"]["value"] if match else None,
        "base_match": match["base"]["value"] if match else None,
        "seconds": total(run.metrics("train"), "seconds"),
        "tasks": {
            row["metric"]: {
                "value": row["tuned"]["value"],
                "base": row[side if side in row else "base"]["value"],
                "share": row["unit"] == "share",
            }
            for row in scored
        },
        "memory": outcome.memory,
        "trainable": run.state["trainable"] - run.state.get("head", 0),
        "total": outcome.total,
        "steps": outcome.steps,
    }


def machine(folder: Folder, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the finished runs were made, as their own folders say."""
    names = ("device", "device_name", "dtype")
    found = [
        Run(folder.path / run["run"]).env for run in runs if (folder.path / run["run"] / STATE).is_file()
    ]
    return {name: "; ".join(dict.fromkeys(str(env[name]) for env in found if name in env)) for name in names}
