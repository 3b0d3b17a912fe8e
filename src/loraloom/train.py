"""The training step, whole, and the loop around it. Nothing else in the package calls backward() on a loss."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .adapt import Adapters
from .checkpoint import Progress, save_best, save_checkpoint
from .errors import Failure, NonFinite
from .heldout import held_out
from .nll import nll_sum, token_nll
from .optim import rate_factor, set_rates, warmup_steps
from .packing import IGNORED, Batch, pack
from .rundir import Run
from .samples import answer_prompts
from .workshop import Workshop


@dataclass(frozen=True)
class StepStats:
    loss: float  # nats per target token, over the whole step
    grad_norm: float  # L2 over all trained parameters, before clipping
    targets: int  # tokens that carried loss
    tokens: int  # tokens that went through the model, without padding


# ==== a single training step =================================================================================


def train_step(
    model: nn.Module,
    adapters: Adapters,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    step: int,
    num_steps: int,
    max_norm: float | None,
    inspect: Callable[[], None] | None = None,
) -> StepStats:
    """Take one optimizer step over a list of micro-batches.

    The loss is summed over tokens and divided by the targets of the whole step, so one batch of 8 rows and
    four of 2 rows give the same gradient.

    step     optimizer steps before this one, of num_steps in all
    inspect  called with the gradients in place, before anything moves

    shapes  batch.ids, .labels, .position are (B, T) int64; B and T may differ between batches
    raises  ValueError if no token carries loss; NonFinite if the loss or the gradient is not finite. In both
            cases no weight has moved
    source  tests/test_train.py: splitting a step changes nothing
    """
    targets = sum(batch.targets for batch in batches)  # counted by the packer, on the host
    if targets == 0:
        raise ValueError(f"step {step}: no token carries loss; is every label masked?")

    device = next(model.parameters()).device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    with adapters.hold():  # each layer's A and B are built once, and their gradient returns at the end
        for batch in batches:
            here = batch.to(device)
            with adapters.batch(step=step, token_BT=here.token):
                part = nll_sum(model, here) / targets
                part.backward()
            loss += part.detach()

    for adapter in active(adapters):
        penalty = adapter.method.penalty(list(adapter.sites.values()))  # AdaLoRA's; None for most
        if penalty is not None:
            penalty.backward()

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    limit = math.inf if max_norm is None else max_norm
    grad_norm = nn.utils.clip_grad_norm_(parameters, limit)
    tokens = sum(stop - start for batch in batches for _, start, stop in batch.spans)
    stats = StepStats(loss.item(), grad_norm.item(), targets, tokens)  # the one host sync of the step
    if not (math.isfinite(stats.loss) and math.isfinite(stats.grad_norm)):
        optimizer.zero_grad(set_to_none=True)
        raise broken_step(model, adapters, batches, step, stats)
    if inspect is not None:
        inspect()

    for adapter in active(adapters):
        adapter.method.before_step(list(adapter.sites.values()), step)
    optimizer.step()
    for adapter in active(adapters):
        adapter.method.after_step(list(adapter.sites.values()), step, num_steps)
    optimizer.zero_grad(set_to_none=True)
    return stats


# =============================================================================================================


def active(adapters: Adapters) -> list[Any]:
    return [adapters.adapters[name] for name in adapters.active]


def broken_step(
    model: nn.Module, adapters: Adapters, batches: Sequence[Batch], step: int, stats: StepStats
) -> NonFinite:
    """The error for a step that is not finite: which rows, and whether the rows or the weights are to blame."""
    bad = broken_rows(model, adapters, batches, step)
    rows = [row for batch in batches for row in batch.rows]
    if not bad:
        details = [f"every row's loss is finite, the gradient is not; the step held {', '.join(rows[:20])}"]
    elif len(bad) == len(rows):
        details = [f"the loss of all {len(rows)} rows of the step is not finite: training has diverged"]
    else:
        details = [f"{row}: its loss is not finite" for row in bad[:20]]
    error = NonFinite(
        f"step {step + 1}: loss {stats.loss:.4g}, gradient norm {stats.grad_norm:.4g}",
        details=details,
        hint="look at these rows; or train a new run with a lower train.learning_rate, or model.dtype=float32",
    )
    error.weights_good = len(bad) < len(rows)
    return error


@torch.no_grad()
def broken_rows(model: nn.Module, adapters: Adapters, batches: Sequence[Batch], step: int) -> list[str]:
    """The rows whose loss is not finite.

    Each is tried alone: in a packed row, 0 * NaN in the attention breaks its neighbours too.
    """
    device = next(model.parameters()).device
    bad: list[str] = []
    for batch in batches:
        for row, one in members(batch.to(device)):
            with adapters.batch(step=step, token_BT=one.token):
                finite = bool(token_nll(model, one)[0].isfinite().all())
            if not finite:
                bad.append(row)
    return bad


def members(batch: Batch) -> Iterator[tuple[str, Batch]]:
    """Each example of a batch as a batch of its own, without padding."""
    for row, (b, start, stop) in zip(batch.rows, batch.spans):
        ids, labels, token = (item[b : b + 1, start:stop] for item in (batch.ids, batch.labels, batch.token))
        targets = int((labels != IGNORED).sum())
        yield row, Batch(ids, labels, None, token, targets, [row], [(0, 0, stop - start)])


def check_gradients(adapters: Adapters) -> None:
    """After the first backward pass: every adapted layer must have received a gradient.

    A tensor may rightly have none (A, while B is zero), a whole layer may not: it would never learn.

    raises  Failure that names the layers
    """
    dead = [
        key
        for adapter in active(adapters)
        for key, site in adapter.sites.items()
        if site.trainable and not any(p.grad is not None and bool(p.grad.any()) for p in site.trainable)
    ]
    if dead:
        raise Failure(
            f"{len(dead)} adapted layers received no gradient in the first step: they would learn nothing",
            details=dead[:20],
            hint="take them out of target_modules; the model may not use them in its forward pass",
        )


# ---- the loop -----------------------------------------------------------------------------------------------


def train_loop(shop: Workshop, run: Run, progress: Progress, listen: Callable[[str, Any], None]) -> str:
    """Train from `progress` to the end; returns how it ended: done, stopped_early or interrupted.

    Every evaluation may make a new best adapter; checkpoints hold the whole state.

    listen  told ("step", record), ("eval", record), ("sample", record) and ("checkpoint", path)
    """
    config, num_steps = shop.config.train, len(shop.plan)
    every = shop.eval_every
    num_warmup = warmup_steps(config.warmup, num_steps)
    last_saved = time.monotonic()
    if progress.step == 0:
        evaluate_now(shop, run, progress, listen)
    elif progress.waited_enough(config.early_stop):  # killed after its last checkpoint
        return "stopped_early"
    with asked_to_stop() as stop:
        while progress.step < num_steps:
            began = time.monotonic()
            lr = set_rates(shop.optimizer, rate_factor(config.schedule, progress.step, num_steps, num_warmup))
            examples = [shop.train[i] for i in shop.plan[progress.step]]
            batches = pack(examples, micro_tokens=shop.micro_tokens, packing=shop.packing, pad_id=shop.pad_id)
            stats = train_step(
                shop.model,
                shop.adapters,
                shop.optimizer,
                batches,
                step=progress.step,
                num_steps=num_steps,
                max_norm=config.max_grad_norm,
                inspect=(lambda: check_gradients(shop.adapters)) if progress.step == 0 else None,
            )
            progress.step += 1
            record = step_record(progress.step, stats, lr, time.monotonic() - began)
            run.log(record)
            listen("step", record)
            finished = progress.step == num_steps
            if shop.evaluates and (progress.step % every == 0 or finished):
                evaluate_now(shop, run, progress, listen)
            ended = finished or progress.waited_enough(config.early_stop)
            due = due_now(config.save_every, config.save_minutes, progress.step, last_saved)
            if due or ended or stop.asked:
                listen("checkpoint", save_checkpoint(shop, run, progress))
                last_saved = time.monotonic()
            run.update(step=progress.step)
            if stop.asked and not finished:
                return "interrupted"
            if ended:
                return "done" if finished else "stopped_early"
    return "done"


def evaluate_now(shop: Workshop, run: Run, progress: Progress, listen: Callable[[str, Any], None]) -> None:
    """The held-out loss and the sampled answers; the best adapter so far is kept."""
    began = time.monotonic()
    shop.adapters.eval()
    try:
        with shop.adapters.hold():
            if shop.evaluates:
                loss = held_out(
                    shop.model,
                    shop.eval,
                    pad_id=shop.pad_id,
                    micro_tokens=shop.micro_tokens,
                    packing=shop.packing,
                )
                record = {
                    "kind": "eval",
                    "step": progress.step,
                    "loss": loss.mean,
                    "targets": loss.targets,
                    "seconds": time.monotonic() - began,
                }
                run.log(record)
                listen("eval", record)
                if progress.note(loss.mean):
                    save_best(shop, run, progress)
            for sample in answer_prompts(shop):
                entry = {"step": progress.step, **sample}
                run.sample(entry)
                listen("sample", entry)
    finally:
        shop.adapters.train()


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
