"""The verbs as functions: what the command line calls, and what Python users call.

run = train(model="...", data="...", output="runs/first")
evaluate("runs/first"); merge("runs/first", "out/first")
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import card, finish
from .checkpoint import Progress, restore, save_best, save_checkpoint
from .config import RunConfig, resolve
from .data import cache as store
from .errors import NonFinite, OutOfMemory, UserError
from .files import write_json, write_text
from .report import build_report
from .rundir import Run, refuse_taken
from .small_model import cache_folder
from .train import train_loop
from .use import Opened, converse, evaluate, merge, open_target
from .workshop import Workshop, build

__all__ = ["Opened", "Run", "converse", "evaluate", "merge", "open_target", "resume", "train"]
Listener = Callable[[str, Any], None]


def silent(kind: str, record: Any) -> None:
    """A listener that says nothing."""


def train(
    config: Path | str | RunConfig | None = None,
    *,
    listen: Listener = silent,
    offline: bool = False,
    argv: list[str] | None = None,
    progress: bool = False,
    settings: Mapping[str, Any] | None = None,
    **named: Any,
) -> Run:
    """Fine-tune, and leave a run folder.

    config    a YAML file, or settings as `resolve` returns them
    settings  dotted names to values, which win over the file: {"train.epochs": 2}
    named     the same as keywords: model=, data=, output=, r= ...; a section as a dict: train={"epochs": 2}
    listen    told ("workshop", Workshop), ("step", record), ("eval", record), ("sample", record),
              ("checkpoint", path) and ("end", status)

    raises  UserError for settings, DataError for data, NonFinite, OutOfMemory; KeyboardInterrupt after
            Ctrl-C, with the state saved
    """
    given = {**(settings or {}), **named}
    if isinstance(config, RunConfig):
        given = {**config.model_dump(exclude_unset=True), **given}
    chosen, origins = resolve(None if isinstance(config, RunConfig) else config, given)
    refuse_taken(Path(chosen.output))
    shop = build(chosen, offline=offline, cache=data_cache(), progress=progress)
    origins = origins | dict.fromkeys(shop.decided, "auto")
    machine = {"device": str(shop.loaded.device), "device_name": device_name(shop.loaded.device)}
    number_format = {"dtype": str(shop.loaded.dtype).removeprefix("torch."), "reason": shop.loaded.reason}
    run = Run.create(chosen.output, shop.config, origins, argv or sys.argv, **machine, **number_format)
    keep_data(shop, run)
    return go(shop, run, Progress(), listen)


def resume(
    path: Path | str, *, listen: Listener = silent, offline: bool = False, progress: bool = False
) -> Run:
    """Go on with a run that was stopped, killed or failed, from its last checkpoint, as if it had not stopped.

    raises  UserError if it is finished, is still running, or its data has changed
    """
    run = Run.open(path)
    state = run.state
    if state.get("status") in ("done", "stopped_early"):
        raise UserError(
            f"{run.path} is finished ({state['status'].replace('_', ' ')} at step {state.get('step')})",
            hint="train a new run with more train.epochs, or use this one: loraloom eval, chat, merge",
        )
    if state.get("status") == "running" and alive(state):
        raise UserError(f"{run.path} is still running, as process {state['pid']}")
    shop = build(run.config, offline=offline, cache=data_cache(), progress=progress)
    if state.get("data_digest") not in (None, shop.data_digest()):
        raise UserError(
            f"the data of {run.path} has changed since it started, so it cannot be continued",
            hint="restore the files, or train a new run",
        )
    latest = run.latest()
    progress_ = restore(shop, latest[1]) if latest is not None else Progress()
    run.truncate(progress_.step if latest is not None else -1)
    return go(shop, run, progress_, listen)


def go(shop: Workshop, run: Run, progress: Progress, listen: Listener) -> Run:
    """Train from where `progress` stands, and leave the run folder whole, however it ends."""
    began, before = time.monotonic(), run.state.get("seconds", 0.0)
    counts = parameter_counts(shop)
    run.update(
        status="running",
        steps=len(shop.plan),
        pid=os.getpid(),
        host=platform.node(),
        data_digest=shop.data_digest(),
        message=None,
        **counts,
    )
    listen("workshop", shop)

    def end(status: str, message: str | None = None) -> None:
        seconds = before + time.monotonic() - began
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        run.update(status=status, message=message, seconds=seconds, finished=finished, step=progress.step)
        listen("end", status)

    try:
        status = train_loop(shop, run, progress, listen)
    except NonFinite as error:
        save_checkpoint(shop, run, progress)  # nothing has moved since the last good step
        end("failed", error.message)
        error.details.append(f"the adapter of step {progress.step} is kept in {run.path}")
        raise
    except torch.OutOfMemoryError as error:
        end("failed", "out of memory")
        raise out_of_memory(shop, error) from None
    except KeyboardInterrupt:
        end("interrupted", "stopped by Ctrl-C")
        raise
    except BaseException as error:
        end("failed", str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise
    if status == "interrupted":
        end(status, f"stopped by Ctrl-C; go on with: loraloom resume {run.path}")
        raise KeyboardInterrupt
    if not (run.adapter_path / "adapter_config.json").is_file():
        save_best(shop, run, progress)
    finish.check_run(shop, run, progress)
    end(status)
    write_pages(run)
    return run


def parameter_counts(shop: Workshop) -> dict[str, int]:
    """How many numbers train, and how many the base has."""
    trainable = sum(p.numel() for p in shop.adapters.parameters())
    return {"trainable": trainable, "total": sum(p.numel() for p in shop.model.parameters())}


def out_of_memory(shop: Workshop, error: Exception) -> OutOfMemory:
    """Which two changes help, largest first."""
    tokens = shop.micro_tokens
    changes = [f"train.micro_tokens={tokens // 2} (now {tokens}): about half of the activations"]
    if not shop.config.train.gradient_checkpointing:
        changes.append("train.gradient_checkpointing=true: keeps only each layer's input")
    return OutOfMemory(
        f"the device ran out of memory at {tokens} tokens in a forward pass: activations grew past what is free",
        details=[str(error).splitlines()[0], *changes],
        hint="--set " + " --set ".join(change.split(" ")[0].rstrip(":") for change in changes),
    )


def keep_data(shop: Workshop, run: Run) -> None:
    """The run's own record of its data: counts, problems, and the held-out examples themselves."""
    report = shop.prepared.report
    write_json(run.path / "data" / "manifest.json", report.to_dict())
    write_text(run.path / "data" / "issues.csv", report.issues_csv())
    store.store(run.path / "data" / "held-out", shop.eval, shop.eval, report)


def write_pages(run: Run) -> None:
    """README.md, and report.html where its libraries are installed."""
    write_text(run.path / "README.md", card.model_card(run))
    if find_spec("matplotlib") and find_spec("jinja2"):
        build_report(run)


def alive(state: Mapping[str, Any]) -> bool:
    """Whether the process that wrote a run's state still runs, as far as this machine can tell."""
    pid = state.get("pid")
    if state.get("host") != platform.node() or not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not is_zombie(pid)


def is_zombie(pid: int) -> bool:
    """Whether a process has ended and only waits to be noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def data_cache() -> Path:
    return cache_folder() / "data"
