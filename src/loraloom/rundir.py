"""The run folder: what a run leaves behind, written and read here and nowhere else.

    config.yaml            the settings that the user gave
    config.resolved.yaml   every setting, with its origin as a comment; origins.json has the origins
    env.json               versions, device, number format and the reason for it, the commit
    command.txt            the command, as it was given
    run.json               the state: status, steps, best, and the like
    metrics.jsonl          one JSON object for each training step and each evaluation
    samples.jsonl          answers to the same prompts, evaluation by evaluation
    checks.json            what was verified, and how it came out
    adapter/               a PEFT folder; checkpoints/step-000100/ holds full states; data/, eval/ and so on

Every file is replaced whole; the two logs grow by one write a line, so that a kill tears at most the last.
It imports no torch: looking at runs is quick.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from . import config as settings
from .config import RunConfig
from .environment import environment, now
from .errors import UserError, nearest
from .files import OLD, append_line, finish_folder, whole_folder, write_json, write_text

STATE = "run.json"
RESOLVED = "config.resolved.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
CHECKPOINT = re.compile(r"step-(\d+)")


class Run:
    """One run folder. `Run.create` makes it, `Run.open` finds it; nothing is kept in memory but the settings.

    path  the folder, as the user wrote it
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._config: RunConfig | None = None
        self._mended: set[str] = set()

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """The run in the folder `path`.

        raises  UserError if it is no run folder: what is missing, and the runs nearby
        """
        path = Path(path)
        missing = [name for name in (STATE, RESOLVED) if not (path / name).is_file()]
        if missing:
            raise not_a_run(path, missing)
        finish_exchange(path / "adapter")
        return cls(path)

    @classmethod
    def create(
        cls, path: Path | str, config: RunConfig, origins: Mapping[str, str], argv: Sequence[str], **env: Any
    ) -> Run:
        """Make the run folder with its settings, versions and command; its status is "running".

        argv  the command line, sys.argv
        env   what the caller knows of the machine: device, device_name, dtype, reason

        raises  UserError if `path` is a file or a folder that is not empty
        """
        path = Path(path)
        refuse_taken(path)
        # An existing empty folder may be a mount point, which cannot be renamed over.
        with whole_folder(path) if not path.exists() else nullcontext(path) as folder:
            run = cls(folder)
            write_text(folder / "config.yaml", given_yaml(config, origins))
            run.settle(config, origins)
            write_json(
                folder / "env.json", environment() | {"base_is_folder": Path(config.model.id).exists()} | env
            )
            command = [Path(argv[0]).name, *argv[1:]] if argv else []
            write_text(folder / "command.txt", shlex.join(command) + "\n")
            what = {
                "model": config.model.id,
                "method": str(config.method.get("name", "lora")),
            }  # read by `runs`
            write_json(folder / STATE, {"status": "running", "started": now(), "step": 0} | what)
        return cls(path)

    def settle(self, config: RunConfig, origins: Mapping[str, str]) -> None:
        """Store the settings anew, once the trainer has filled in what was `auto`."""
        write_json(self.path / "origins.json", dict(origins))
        write_text(self.path / RESOLVED, settings.to_yaml(config, origins))
        self._config = config

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name or self.path.resolve().name

    @property
    def config(self) -> RunConfig:
        """The settings, read back from config.resolved.yaml."""
        if self._config is None:
            self._config = settings.read_stored(self.path / RESOLVED)
        return self._config

    @property
    def origins(self) -> dict[str, str]:
        """The origin of each setting by dotted name: default, file, flag or auto."""
        return self.read("origins.json", {})

    @property
    def env(self) -> dict[str, Any]:
        """Versions, device, number format and commit."""
        return self.read("env.json", {})

    @property
    def command(self) -> str:
        """The command as it was given."""
        path = self.path / "command.txt"
        return path.read_text(encoding="utf-8").strip() if path.is_file() else ""

    @property
    def state(self) -> dict[str, Any]:
        """run.json as it is on the disk now."""
        return self.read(STATE, {})

    def update(self, **fields: Any) -> None:
        """Set fields of run.json, which is replaced whole."""
        write_json(self.path / STATE, self.state | fields)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record to metrics.jsonl."""
        self._append(METRICS, record)

    def sample(self, record: Mapping[str, Any]) -> None:
        """Append a record to samples.jsonl."""
        self._append(SAMPLES, record)

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, or only those of one kind: "train" or "eval"."""
        return [record for record in read_lines(self.path / METRICS) if kind in (None, record.get("kind"))]

    def samples(self) -> list[dict[str, Any]]:
        """The records of samples.jsonl."""
        return read_lines(self.path / SAMPLES)

    def truncate(self, step: int) -> None:
        """Forget the metrics and samples after `step`, for a run that goes on from there."""
        for name in (METRICS, SAMPLES):
            path = self.path / name
            if path.is_file():
                kept = [json.dumps(record) for record in read_lines(path) if record.get("step", 0) <= step]
                write_text(path, "".join(line + "\n" for line in kept))

    def checks(self) -> list[dict[str, Any]]:
        """What was verified: name, ok and detail of each."""
        return self.read("checks.json", [])

    def add_check(self, name: str, ok: bool, detail: str) -> None:
        """Record a check; an earlier one of that name is replaced."""
        checks = self.checks()
        entry = {"name": name, "ok": bool(ok), "detail": detail}
        places = [place for place, check in enumerate(checks) if check.get("name") == name]
        if places:
            checks[places[0]] = entry
        else:
            checks.append(entry)
        write_json(self.path / "checks.json", checks)

    @property
    def adapter_path(self) -> Path:
        """The adapter's folder; it need not exist yet."""
        return self.path / "adapter"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """The whole checkpoints as (step, folder), the oldest first."""
        folder = self.path / "checkpoints"
        if not folder.is_dir():
            return []
        for left in folder.glob(OLD + "step-*"):
            finish_exchange(folder / left.name.removeprefix(OLD))
        found = [(CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
        return sorted((int(match[1]), path) for match, path in found if match)

    def latest(self) -> tuple[int, Path] | None:
        """The last whole checkpoint, or None."""
        return max(self.checkpoints(), default=None)

    def read(self, name: str, default: Any) -> Any:
        """A JSON file of the run folder, or `default` where there is none.

        raises  UserError if it is not JSON
        """
        path = self.path / name
        if not path.is_file():
            return default
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}", hint="restore the file, or remove it") from None

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        path = self.path / name
        if name not in self._mended:
            cut_torn_line(path)
            self._mended.add(name)
        append_line(path, json.dumps(record))


def find_runs(folder: Path | str, *, depth: int = 2) -> list[Run]:
    """The runs in a folder: itself, or those at most `depth` folders below it, by name; none is read."""
    return [Run(path) for path in run_folders(Path(folder), depth)]


def run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / STATE).is_file():
        yield folder
    elif depth:
        try:
            below = sorted(
                path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
            )
        except OSError:  # a folder that is not there or that we may not read holds no runs for us
            return
        for path in below:
            yield from run_folders(path, depth - 1)


def not_a_run(path: Path, missing: Sequence[str]) -> UserError:
    """The error for a folder that is no run: what is missing, and what may have been meant."""
    if not path.exists():
        message = f"there is no run folder {path}"
    elif path.is_file():
        message = f"{path} is a file, not a run folder"
    else:
        message = f"{path} is not a run folder: it has no {' and no '.join(missing)}"
    inside = next((parent for parent in path.parents if (parent / STATE).is_file()), None)
    if inside is not None:
        return UserError(message, hint=f"it lies in the run folder {inside}: did you mean that?")
    near = [str(run.path) for run in find_runs(path) or find_runs(path.parent, depth=1)]
    close = nearest(str(path), near, count=1) if near else []
    hint = (
        f"did you mean {close[0]}?"
        if close
        else "`loraloom train` makes a run folder; `loraloom runs` lists them"
    )
    return UserError(message, details=[f"a run: {name}" for name in near[:10]], hint=hint)


def refuse_taken(path: Path) -> None:
    """
    raises  UserError if `path` is a file, a run or a folder with other things in it
    """
    if path.is_file():
        raise UserError(f"{path} is a file; a run needs a folder", hint="choose another one with -o")
    if (path / STATE).is_file():
        raise UserError(
            f"{path} already holds a run",
            hint=f"go on with it: loraloom resume {path}   or choose another one with -o",
        )
    if path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"{path} is not empty, and a run would mix its files with what is there",
            hint="choose another one with -o",
        )


def finish_exchange(path: Path) -> None:
    """Complete the exchange of a folder that a kill cut between its two renames, and only then.

    `finish_folder` also clears `.partial-` names; a reader must not, since the run may be writing one now.
    """
    if path.with_name(OLD + path.name).exists() and not path.exists():
        finish_folder(path)


def given_yaml(config: RunConfig, origins: Mapping[str, str]) -> str:
    """The settings that came from a file or a flag, as YAML that `resolve` reads back."""
    tree: dict[str, Any] = {}
    for name, value in settings.flatten(config.model_dump(mode="json")).items():
        if origins.get(name, settings.origin_above(name, origins)) in ("file", "flag"):
            settings.assign(tree, name, value)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; a torn last line is left out.

    raises  UserError if another line is not a JSON object
    """
    if not path.is_file():
        return []
    *lines, _torn = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(
                f"{path} line {number} is not a JSON object", hint="remove the line; the others are unharmed"
            )
        records.append(record)
    return records


def cut_torn_line(path: Path) -> None:
    """Remove an unfinished last line, so that the next record does not continue it."""
    if path.is_file():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
