"""The verbs as functions: what the command line calls, and what Python users call.

run = train(model="...", data="...", output="runs/first")
evaluate("runs/first"); merge("runs/first", "out/first")
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import card, classifying, finish
from . import plan as plans
from .adapter_files import is_adapter_folder
from .checkpoint import Progress, clear, discard_diverged, restore, save_best, save_checkpoint
from .classifier import head_size
from .config import RunConfig, flatten, resolve, with_values
from .data import Examples, Labelled
from .data import cache as store
from .errors import Failure, NonFinite, OutOfMemory, UserError
from .files import write_json, write_text
from .fit import choose, find_gpu
from .fold import merge
from .memory import Predictor
from .model import Loaded
from .oom import explain_oom
from .opening import Tell
from .packing import StepPlan
from .quant import Weight4
from .recompute import Choice
from .report import build_report
from .rundir import Run, refuse_taken
from .small_model import cache_folder
from .train import train_loop
from .use import Opened, converse, evaluate, open_target
from .workload import Measured
from .workshop import Workshop, build, method_of, spec_of, usual_tokens

__all__ = ["Opened", "Run", "converse", "evaluate", "merge", "open_target", "plan", "resume", "train"]
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
    listen    told ("fact", (name, text)), perhaps in another thread; ("workshop", Workshop), ("step", record),
              ("eval", record), ("sample", record), ("checkpoint", path) and ("end", status)

    raises  UserError for settings, DataError for data, NonFinite, OutOfMemory; KeyboardInterrupt after
            Ctrl-C, with the state saved
    """
    given = {**(settings or {}), **named}
    if isinstance(config, RunConfig):
        given = flatten(config.model_dump(exclude_unset=True)) | given
    chosen, origins = resolve(None if isinstance(config, RunConfig) else config, given)
    refuse_taken(Path(chosen.output))
    torch.manual_seed(chosen.train.seed)  # nothing of ours draws from it; a part of a model may
    make = builder(chosen)
    common: dict[str, Any] = {"offline": offline, "cache": data_cache(), "progress": progress}
    shop = make(chosen, **common, fit=fit_beside_the_model, tell=as_facts(listen))
    origins = origins | dict.fromkeys(shop.decided, "auto")
    machine = {"device": str(shop.loaded.device), "device_name": device_name(shop.loaded.device)}
    number_format = {"dtype": str(shop.loaded.dtype).removeprefix("torch."), "reason": shop.loaded.reason}
    run = Run.create(chosen.output, shop.config, origins, argv or sys.argv, **machine, **number_format)
    keep_data(shop, run)
    return go(shop, run, Progress(), listen)


def as_facts(listen: Listener) -> Tell:
    """The first lines of a run as a listener hears them."""
    return lambda name, text: listen("fact", (name, text))


def builder(config: RunConfig) -> Callable[..., Workshop]:
    """What makes the workshop of a run's task."""
    return classifying.build if config.task == "classification" else build


def plan(
    config: Path | str | None = None,
    *,
    shape: str | None = None,
    gpu: str | None = None,
    length: int | None = None,
    fit: bool = False,
    offline: bool = False,
    progress: bool = False,
    settings: Mapping[str, Any] | None = None,
    **named: Any,
) -> dict[str, Any]:
    """What a run would take, before any weight is loaded: the fields of plan.Plan.

    config, settings, named  as in `train`; only the model must be named
    shape                    a published model's shape instead, such as "llama3-8b"
    gpu                      what to fit into, such as "80GB"; None: the first GPU here
    length                   tokens of the longest example, instead of the data's
    fit                      plan for the largest pass that fits

    raises  UserError for settings that do not fit the model, or if nothing fits
    """
    chosen = plans.settings_of(config, {**(settings or {}), **named})
    return plans.plan(
        chosen,
        shape=shape,
        gpu=find_gpu(gpu),
        length=length,
        fit=fit,
        offline=offline,
        progress=progress,
    ).to_dict()


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
        raise UserError(
            f"{run.path} is still running, as process {state['pid']}",
            hint="wait for it, or stop it with Ctrl-C: it saves its state first",
        )
    clear(run)
    latest = run.latest()
    method = spec_of(run.config).make()
    if method.needs is not None and latest is None:
        raise UserError(
            f"{run.path} stopped before the start that {run.config.method['name']} chose was saved",
            hint="train a new run with the same settings",
        )
    make = builder(run.config)
    common: dict[str, Any] = {"offline": offline, "cache": data_cache(), "progress": progress}
    shop = make(run.config, **common, fresh=latest is None, tell=as_facts(listen))
    if state.get("data_digest") not in (None, shop.data_digest()):
        raise UserError(
            f"the data of {run.path} has changed since it started, so it cannot be continued",
            hint="restore the files, or train a new run",
        )
    known = state.get("execution", {}).get("recompute")
    if known is not None and run.origins.get("train.recompute") == "auto":
        shop.execution["recompute"] = known  # chosen when the run began, for the reason given then
    if not (run.path / "data" / "held-out").is_dir():  # killed before it was kept
        keep_data(shop, run)
    where = restore(shop, latest[1]) if latest is not None else Progress()
    if where.step == 0:
        where = Progress()  # the first evaluation is made again
    run.truncate(where.step or -1)
    return go(shop, run, where, listen)


def go(shop: Workshop, run: Run, progress: Progress, listen: Listener) -> Run:
    """Train from where `progress` stands, and leave the run folder whole, however it ends."""
    began, before = time.monotonic(), run.state.get("seconds", 0.0)
    counts = parameter_counts(shop)
    run.update(
        status="running",
        steps=len(shop.plan),
        pid=os.getpid(),
        pid_started=started(os.getpid()),
        host=platform.node(),
        data_digest=shop.data_digest(),
        message=None,
        mergeable=method_of(shop).mergeable,
        execution=shop.execution,
        **counts,
    )
    listen("workshop", shop)

    def end(status: str, message: str | None = None) -> None:
        seconds = before + time.monotonic() - began
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            run.update(status=status, message=message, seconds=seconds, finished=finished, step=progress.step)
        finally:
            listen("end", status)

    with told(shop, run, progress, end):
        if progress.step == 0 and method_of(shop).needs is not None:
            save_checkpoint(shop, run, progress)  # what it saw took time, and is not looked at again
        status = train_loop(shop, run, progress, listen)
        if status == "interrupted":
            raise KeyboardInterrupt
        if not is_adapter_folder(run.adapter_path):
            save_best(shop, run, progress)
        finish.check_run(shop, run, progress)
    end(status)
    write_pages(run)
    return run


@contextmanager
def told(shop: Workshop, run: Run, progress: Progress, end: Callable[[str, str], None]) -> Iterator[None]:
    """Whatever ends the run inside: its state says so, and the error says what is left and how to go on."""
    again = f"go on with: loraloom resume {run.path}"
    try:
        yield
    except NonFinite as error:
        error.details.append(
            keep_state(shop, run, progress) if error.weights_good else last_good(shop, run, progress)
        )
        end("failed", error.message)
        raise
    except torch.OutOfMemoryError as error:
        end("failed", "out of memory")
        raise out_of_memory(shop, error) from None
    except KeyboardInterrupt:
        saved = f"the state of step {progress.step} is saved; " if is_saved(run, progress) else ""
        end("interrupted", f"stopped by Ctrl-C; {saved}{again}")
        raise KeyboardInterrupt(f"interrupted; {saved}{again}") from None
    except Failure as error:
        with suppress(UserError):  # on a full disk this cannot be written either
            end("failed", error.message)
        if isinstance(error.__cause__, OSError):
            error.details.append(f"then {again}")
        raise
    except BaseException as error:
        end("failed", str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise


def is_saved(run: Run, progress: Progress) -> bool:
    latest = run.latest()
    return latest is not None and latest[0] == progress.step


def last_good(shop: Workshop, run: Run, progress: Progress) -> str:
    """What is left when the weights themselves have diverged: nothing of them is kept as good."""
    discard_diverged(shop, run, progress)
    latest, best = run.latest(), run.state.get("best")
    kept = [f"the state of step {latest[0]} in {latest[1]}"] if latest else []
    kept += [f"the adapter of step {best['step']} in {run.adapter_path}"] if best else []
    return "kept: " + ", ".join(kept) if kept else "nothing was kept: it diverged before the first checkpoint"


def keep_state(shop: Workshop, run: Run, progress: Progress) -> str:
    """Save what a broken step has left as it was; says where, or why it could not be."""
    try:
        return f"the state of step {progress.step} is kept in {save_checkpoint(shop, run, progress)}"
    except UserError as error:
        return f"the state of step {progress.step} is not kept: {error.message}"


def parameter_counts(shop: Workshop) -> dict[str, int]:
    """How many numbers train, how many the base has, and how many of a classifier's are its head's."""
    trainable = sum(p.numel() for p in shop.adapters.parameters())
    head = {"head": head_size(shop.model)} if shop.config.task == "classification" else {}
    return {"trainable": trainable, "total": sum(p.numel() for p in shop.model.parameters())} | head


def fit_beside_the_model(config: RunConfig, loaded: Loaded, examples: Examples, steps: StepPlan) -> Choice:
    """What to compute again, and the tokens of a pass, for which the GPU has room now that the base stands in it."""
    gpu = find_gpu(None)
    assert gpu is not None
    held = torch.cuda.memory_reserved(loaded.device)
    work, config = Measured(examples, steps, packing=config.data.packing), as_kept(config, loaded.model)
    try:
        predictor = Predictor(config, loaded.model.config, cudnn=gpu.cudnn)
    except UserError as error:
        if config.train.micro_tokens == "fit":
            raise
        return Choice("none", usual_tokens(config, loaded.device.type), error.message)
    return choose(predictor, work, replace(gpu, bytes=gpu.bytes + held))


def as_kept(config: RunConfig, model: Any) -> RunConfig:
    """The settings as the model's weights are kept: its files may have been in 4 bits already."""
    codes = next((p.codes for p in model.parameters() if isinstance(p, Weight4)), None)
    if codes is None:
        return config
    return with_values(config, codes.settings)


def out_of_memory(shop: Workshop, error: Exception) -> OutOfMemory:
    """What takes how much, what grew, and which two changes save most."""
    device, said = shop.loaded.device, str(error)
    if isinstance(shop.prepared, Labelled):  # the plan of a GPU's memory knows causal models alone
        return less_memory(shop, said)
    work = Measured(shop.train, shop.plan, packing=shop.packing)
    cuda = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if cuda else None
    cudnn = cuda and torch.cuda.get_device_capability(device)[0] >= 9
    try:
        return explain_oom(
            as_kept(shop.config, shop.model),
            shop.model.config,
            work,
            shop.micro_tokens,
            cudnn=cudnn,
            total=total,
            said=said,
        )
    except UserError:
        return less_memory(shop, said)


def less_memory(shop: Workshop, said: str) -> OutOfMemory:
    half = f"train.micro_tokens={shop.micro_tokens // 2}"
    return OutOfMemory(f"out of memory: {said.splitlines()[0]}", hint=f"--set {half}")


def keep_data(shop: Workshop, run: Run) -> None:
    """The run's own record of its data: counts, problems, and the held-out examples themselves."""
    report = shop.prepared.report
    write_json(run.path / "data" / "manifest.json", report.to_dict())
    write_text(run.path / "data" / "issues.csv", report.issues_csv())
    if isinstance(shop.prepared, Labelled):
        store.store_labelled(run.path / "data" / "held-out", shop.eval)
    else:
        store.store(run.path / "data" / "held-out", Examples.build([]), shop.eval, shop.prepared.report)


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
    # A number is given again to another process, after a restart of a container even soon.
    return not is_zombie(pid) and state.get("pid_started") in (None, started(pid))


def is_zombie(pid: int) -> bool:
    """Whether a process has ended and only waits to be noticed."""
    return process_facts(pid)[:1] == ["Z"]


def started(pid: int) -> int | None:
    """When a process began, in the system's own count; None where the system does not say."""
    found = process_facts(pid)
    return int(found[19]) if len(found) > 19 else None


def process_facts(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, the state first; none where there is no such file."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def data_cache() -> Path:
    return cache_folder() / "data"
