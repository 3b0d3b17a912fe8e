"""The training step, whole. Nothing else in the package calls backward() on a loss but what looks before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapt import Adapters
from .errors import Failure, NonFinite
from .methods.base import Method
from .nll import nll_sum, token_nll
from .packing import IGNORED, Batch


@dataclass(frozen=True)
class StepStats:
    loss: float  # nats per target token, over the whole step
    grad_norm: float  # L2 over all trained parameters, before clipping
    targets: int  # tokens that carried loss
    tokens: int  # tokens that went through the model, without padding


# The gradient of a step's loss, added to what trains: (model, adapters, batches, targets, step) -> the loss
Backward = Callable[[nn.Module, Adapters, Sequence[Any], int, int], Tensor]
# The rows of a step whose loss is not finite: (model, adapters, batches, step) -> their places
Broken = Callable[[nn.Module, Adapters, Sequence[Any], int], list[str]]


# ==== a single training step =================================================================================


def accumulate(
    model: nn.Module,
    adapters: Adapters,
    batches: Sequence[Any],
    targets: int | Tensor,
    step: int,
    *,
    loss_sum: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Tensor:
    """Forward and backward over the micro-batches; returns their share of the loss, float64, on the device.

    targets   of the whole step
    loss_sum  of a batch's targets by the model, where it is not `nll_sum`
    """
    device = next(model.parameters()).device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    with adapters.hold():  # each layer's A and B are built once, and their gradient returns at the end
        for batch in batches:
            here = batch.to(device)
            with adapters.batch(step=step, token_BT=here.token):
                part = (loss_sum or nll_sum)(model, here) / targets
                part.backward()
            loss += part.detach()
    return loss


class Queued:
    """A step whose work is queued on the device; `settle` waits for its numbers.

    moved  whether the optimizer's step is queued with it: the next step may be queued before this one is settled
    bad    on the device: whether this step, or one before it that nobody has settled, is not finite
    """

    def __init__(self, moved: bool, bad: Tensor, settle: Callable[[], StepStats]) -> None:
        self.moved, self.bad, self.settle = moved, bad, settle


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
    backward: Backward = accumulate,
    broken: Broken | None = None,
) -> StepStats:
    """Take one optimizer step over a list of micro-batches: queue it and wait for its numbers.

    raises  ValueError if no token carries loss; NonFinite if the loss or the gradient is not finite. In both
            cases no weight has moved
    """
    queued = queue_step(
        model,
        adapters,
        optimizer,
        batches,
        step=step,
        num_steps=num_steps,
        max_norm=max_norm,
        inspect=inspect,
        backward=backward,
        broken=broken,
    )
    return queued.settle()


def queue_step(
    model: nn.Module,
    adapters: Adapters,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    step: int,
    num_steps: int,
    max_norm: float | None,
    inspect: Callable[[], None] | None = None,
    backward: Backward = accumulate,
    broken: Broken | None = None,
    after: Queued | None = None,
) -> Queued:
    """Queue one optimizer step over a list of micro-batches.

    The loss is summed over tokens and divided by the targets of the whole step, so one batch of 8 rows and
    four of 2 rows give the same gradient.

    step      optimizer steps before this one, of num_steps in all
    inspect   called with the gradients in place, before anything moves
    backward  another way to do what `accumulate` does
    broken    another way to do what `broken_rows` does
    after     the step before, if it moved and is not settled yet: were it not finite, this one moves nothing either

    shapes  batch.ids, .labels, .position are (B, T) int64; B and T may differ between batches
    source  tests/test_train.py: splitting a step changes nothing
    """
    targets = sum(batch.targets for batch in batches)  # counted by the packer, on the host
    if targets == 0:
        raise ValueError(f"step {step}: no token carries loss; is every label masked?")

    loss = backward(model, adapters, batches, targets, step)

    for adapter in active(adapters):
        penalty = adapter.method.penalty(list(adapter.sites.values()))  # AdaLoRA's; None for most
        if penalty is not None:
            penalty.backward()

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)
    bad = ~(loss + grad_norm).isfinite()
    bad = bad if after is None else bad | after.bad
    moved = inspect is None and guards(optimizer, adapters)
    if moved:  # the device itself leaves the weights alone where a number is not finite
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
        optimizer.zero_grad(set_to_none=True)
    read = numbers(loss, grad_norm)

    def settle() -> StepStats:
        nats, norm = read()  # the one wait of the step
        tokens = sum(stop - start for batch in batches for _, start, stop in batch.spans)
        stats = StepStats(nats, norm, targets, tokens)
        if not (math.isfinite(nats) and math.isfinite(norm)):
            optimizer.zero_grad(set_to_none=True)
            raise broken_step((broken or broken_rows)(model, adapters, batches, step), batches, step, stats)
        if not moved:
            move(adapters, optimizer, step, num_steps, inspect)
        return stats

    return Queued(moved, bad, settle)


def move(
    adapters: Adapters,
    optimizer: torch.optim.Optimizer,
    step: int,
    num_steps: int,
    inspect: Callable[[], None] | None,
) -> None:
    """What follows a gradient that is known to be finite."""
    if inspect is not None:
        inspect()
    for adapter in active(adapters):
        adapter.method.before_step(list(adapter.sites.values()), step)
    optimizer.step()
    for adapter in active(adapters):
        adapter.method.after_step(list(adapter.sites.values()), step, num_steps)
    optimizer.zero_grad(set_to_none=True)


# =============================================================================================================


def guards(optimizer: torch.optim.Optimizer, adapters: Adapters) -> bool:
    """Whether the optimizer can be told on the device not to move, and no method must look on before or after."""
    own = any(
        getattr(type(one.method), hook) is not getattr(Method, hook)
        for one in active(adapters)
        for hook in ("before_step", "after_step")
    )
    groups = optimizer.param_groups
    return (
        not own and isinstance(optimizer, torch.optim.AdamW) and all(group.get("fused") for group in groups)
    )


def numbers(*values: Tensor) -> Callable[[], list[float]]:
    """Start to bring numbers from the device to the host, in one copy; the call waits for them."""
    device = values[0].device
    together = torch.stack([value.to(device, torch.float64) for value in values])
    if device.type != "cuda":
        return lambda: [value.item() for value in together.cpu()]  # among shapes too
    host = torch.empty(len(values), dtype=torch.float64, pin_memory=True)
    host.copy_(together, non_blocking=True)
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(device))

    def wait() -> list[float]:
        there.synchronize()
        return host.tolist()

    return wait


def active(adapters: Adapters) -> list[Any]:
    return [adapters.adapters[name] for name in adapters.active]


def broken_step(bad: Sequence[str], batches: Sequence[Batch], step: int, stats: StepStats) -> NonFinite:
    """The error for a step that is not finite: which rows, and whether the rows or the weights are to blame."""
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
        if not adapter.method.per_token  # its tokens may stand in later steps alone
        for key, site in adapter.sites.items()
        if site.trainable and not any(p.grad is not None and bool(p.grad.any()) for p in site.trainable)
    ]
    if dead:
        raise Failure(
            f"{len(dead)} adapted layers received no gradient in the first step: they would learn nothing",
            details=dead[:20],
            hint="take them out of target_modules; the model may not use them in its forward pass",
        )
