"""The loop around the training step."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from . import classifying
from .checkpoint import Progress, save_best, save_checkpoint
from .compiling import compile_seconds
from .dressing import dresser
from .heldout import Loss, held_out
from .optim import rate_factor, set_rates, warmup_steps
from .packing import Batch, pack
from .prefetch import Ahead
from .rundir import Run
from .samples import answer_prompts
from .step import Queued, StepStats, accumulate, check_gradients, queue_step
from .task import Task
from .workshop import Workshop, method_of

TELL_SECONDS = 2.0  # between records of the step in run.json: each waits for the disk


def train_loop(shop: Workshop, run: Run, progress: Progress, listen: Callable[[str, Any], None]) -> str:
    """Train from `progress` to the end; returns how it ended: done, stopped_early or interrupted.

    Every evaluation may make a new best adapter; checkpoints hold the whole state.

    listen  told ("step", record), ("eval", record), ("sample", record), ("note", words) and ("checkpoint", path)
    """
    config, num_steps, task = shop.config.train, len(shop.plan), task_of(shop)
    num_warmup = warmup_steps(config.warmup, num_steps)
    last_saved = last_told = time.monotonic()
    if progress.step == 0:
        task.evaluate(shop, run, progress, listen)
    elif progress.waited_enough(config.early_stop):  # killed after its last checkpoint
        return "stopped_early"
    left = range(progress.step, num_steps)
    with asked_to_stop() as stop, Ahead(task.packer(shop), left, shop.loaded.device) as ahead:
        steps = Steps(shop, ahead, num_warmup, task)
        while progress.step < num_steps:
            began = time.monotonic()
            number = progress.step + 1
            seen = number == num_steps or (shop.evaluates and number % shop.eval_every == 0)
            seen = seen or due_now(config.save_every, config.save_minutes, number, last_saved) or stop.asked
            stats, lr = steps.take(progress.step, alone=seen)
            progress.step = number
            record = step_record(number, stats, lr, time.monotonic() - began)
            if config.compile:
                record["compile_seconds"] = compile_seconds()  # so far
            run.log(record)
            listen("step", record)
            for note in shop.fresh_notes():
                listen("note", note)
            finished = progress.step == num_steps
            if shop.evaluates and (progress.step % shop.eval_every == 0 or finished):
                task.evaluate(shop, run, progress, listen)
            ended = finished or progress.waited_enough(config.early_stop)
            due = due_now(config.save_every, config.save_minutes, progress.step, last_saved)
            saves = (due or ended or stop.asked) and steps.next is None
            if saves:
                listen("checkpoint", save_checkpoint(shop, run, progress))
                last_saved = time.monotonic()
            if saves or time.monotonic() - last_told > TELL_SECONDS:
                run.update(step=progress.step)
                last_told = time.monotonic()
            if stop.asked and saves and not finished:
                return "interrupted"
            if ended:
                return "done" if finished else "stopped_early"
    return "done"


class Steps:
    """The steps of a run in order. Where nothing need be seen between two of them, the next one is queued on the GPU
    before the numbers of this one are read: the GPU does not wait for the host."""

    def __init__(
        self, shop: Workshop, batches: Iterator[Sequence[Any]], num_warmup: int, task: Task | None = None
    ) -> None:
        self.shop, self.batches, self.num_warmup = shop, batches, num_warmup
        self.task = task or TEXT
        self.next: tuple[Queued, float] | None = None  # queued, and not settled
        self.failed: Exception | None = None  # what queueing it has raised

    def take(self, step: int, *, alone: bool) -> tuple[StepStats, float]:
        """The numbers of the step after `step` others, and its rate.

        alone  queue no other step behind it: its weights will be looked at
        """
        if self.failed is not None:
            raise self.failed
        queued, lr = self.next or self.queue(step, None)
        self.next = None
        if queued.moved and not alone:
            try:
                self.next = self.queue(step + 1, queued)
            except Exception as error:  # it is the next step's, and this one is still to be told
                self.failed = error
        return queued.settle(), lr

    def queue(self, step: int, after: Queued | None) -> tuple[Queued, float]:
        shop, num_steps = self.shop, len(self.shop.plan)
        schedule = shop.config.train.schedule
        lr = set_rates(shop.optimizer, rate_factor(schedule, step, num_steps, self.num_warmup))
        queued = queue_step(
            shop.model,
            shop.adapters,
            shop.optimizer,
            next(self.batches),
            step=step,
            num_steps=num_steps,
            max_norm=shop.config.train.max_grad_norm,
            inspect=(lambda: check_gradients(shop.adapters)) if step == 0 else None,
            backward=self.task.gradient or shop.graphs or accumulate,
            broken=self.task.broken,
            after=after,
        )
        return queued, lr


def task_of(shop: Workshop) -> Task:
    """What the loop asks of the run's task."""
    return classifying.TASK if shop.config.task == "classification" else TEXT


def packer(shop: Workshop) -> Callable[[int], list[Batch]]:
    """What makes the micro-batches of a step, whatever adapter is in use meanwhile."""
    dressed = dresser(shop.model)

    def make(step: int) -> list[Batch]:
        examples = dressed([shop.train[i] for i in shop.plan[step]])
        batches = pack(examples, micro_tokens=shop.micro_tokens, packing=shop.packing, pad_id=shop.pad_id)
        return batches if shop.graphs is None else [shop.graphs.pad(batch) for batch in batches]

    return make


def evaluate_now(shop: Workshop, run: Run, progress: Progress, listen: Callable[[str, Any], None]) -> None:
    """The held-out loss and the sampled answers; the best adapter so far is kept."""
    began = time.monotonic()
    shop.adapters.eval()
    base: dict[str, float] = {}
    if progress.step == 0 and shop.evaluates and not method_of(shop).identity:
        with shop.adapters.disabled():
            base = {"base": measure(shop).mean}
    try:
        with shop.adapters.hold():
            if shop.evaluates:
                loss = measure(shop)
                record = {
                    "kind": "eval",
                    "step": progress.step,
                    "loss": loss.mean,
                    "targets": loss.targets,
                    "seconds": time.monotonic() - began,
                    **base,
                }
                run.log(record)
                listen("eval", record)
                if progress.note(loss.mean, base=base.get("base")):
                    save_best(shop, run, progress)
            for sample in answer_prompts(shop):
                entry = {"step": progress.step, **sample}
                run.sample(entry)
                listen("sample", entry)
    finally:
        shop.adapters.train()


TEXT = Task(packer, None, None, evaluate_now)


def measure(shop: Workshop) -> Loss:
    """The held-out loss of the model as it is now."""
    return held_out(
        shop.model,
        shop.eval,
        pad_id=shop.pad_id,
        micro_tokens=shop.micro_tokens,
        packing=shop.packing,
    )


def step_record(step: int, stats: StepStats, lr: float, seconds: float) -> dict[str, Any]:
    """A line of metrics.jsonl. memory is the peak in bytes on a GPU, the process's on a CPU."""
    return {
        "kind": "train",
        "step": step,
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "lr": lr,
        "tokens": stats.tokens,
        "targets": stats.targets,
        "seconds": seconds,
        "memory": peak_memory(),
    }


def peak_memory() -> int:
    """Peak bytes so far: of the GPU's allocator, or of this process where there is no GPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource  # not on every system that has torch
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def due_now(save_every: int | None, save_minutes: float | None, step: int, last_saved: float) -> bool:
    if save_every is not None and step % save_every == 0:
        return True
    return save_minutes is not None and time.monotonic() - last_saved >= save_minutes * 60


class Stop:
    """Whether Ctrl-C, or a polite kill, has come: the step is finished and saved first."""

    asked = False


@contextmanager
def asked_to_stop() -> Iterator[Stop]:
    """The first Ctrl-C asks; the second one ends at once."""
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    except ValueError:
        pass  # not the main thread, which alone may listen: Ctrl-C then ends as it always does
    try:
        yield stop
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
