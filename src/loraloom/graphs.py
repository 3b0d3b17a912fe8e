"""Passes as CUDA graphs: what a micro-batch launches, forward and backward, is recorded once and then replayed.

A layer launches about a hundred kernels. A pass of few tokens keeps a GPU busy for less time than the host takes for
that, and a slow host does not keep up with thousands of tokens. A graph has fixed shapes, so batches are padded to few
of them (graph_shapes.py).

Gradients are added to buffers that stay: they stand as `.grad` from a step's first pass to its end. What looks at
them, clips them and moves weights runs between replays as ever.

units   tokens
source  tests/test_graphs.py: padded or not, recorded or not, the same losses and weights
"""

from __future__ import annotations

import gc
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .adapt import Adapters
from .attention import HALF, takes_documents
from .config import RunConfig
from .errors import UserError
from .graph_shapes import SHORT, Shape, even, padded, shape_of
from .head import hooked
from .kernels.matmul_frozen import release_buffers
from .methods.base import Method
from .nll import why_whole_logits
from .packing import Batch
from .step import accumulate

MOST = 8192  # tokens of a pass that `auto` records if it need not be padded: longer ones keep a GPU busy
KEPT = 16  # graphs at once
WORTH = 4  # replays that a graph takes to pay for its recording
WARM = 3  # passes before the first recording; one before others
USABLE = 0.92  # of a GPU's memory: the rest is the driver's, and what lies between blocks

Run = Callable[[], Tensor]  # one pass over a batch that stands still: adds to gradients, returns the loss


# ---- recording ----------------------------------------------------------------------------------------------


class Recorder(Protocol):
    """Makes a pass repeatable. A test on a CPU runs it again instead."""

    def warm(self, run: Run, *, first: bool) -> None:
        """Run it as often as it takes until nothing is compiled or chosen any more.

        first  whether no pass was recorded before

        raises  RuntimeError if it waits for the device
        """

    def crowded(self) -> str | None:
        """None if there is memory for a recording beside passes as ever, else how much is missing."""

    def record(self, run: Run) -> Run:
        """What runs it again on the same tensors."""


class CudaRecorder:
    """CUDA graphs in one pool: they are never replayed at once, so they may share the memory of what they compute."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)

    def warm(self, run: Run, *, first: bool) -> None:
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        try:
            with torch.cuda.stream(self.stream):
                run()  # compiles kernels and tries their variants, which may wait
                with no_waiting():
                    for _ in range(WARM - 1 if first else 0):
                        run()
        finally:
            here.wait_stream(self.stream)  # a pass that fails leaves work behind too

    def crowded(self) -> str | None:
        now, total = torch.cuda.memory_allocated(self.device), torch.cuda.mem_get_info(self.device)[1]
        passing = torch.cuda.max_memory_allocated(self.device) - now  # the graphs keep as much as the largest
        if now + 2 * passing <= USABLE * total:
            return None
        return (
            f"graphs keep what a pass needs, {passing / 1e9:.1f} GB, beside the {(now + passing) / 1e9:.1f} GB "
            f"of passes without them: more than {total / 1e9:.0f} GB hold"
        )

    def record(self, run: Run) -> Run:
        release_buffers()  # those made while recording belong to the pool, which a graph keeps
        gc.collect()  # an old pass's nodes would bring in the stream that they were made on
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        mode = "thread_local"  # the thread that packs may allocate meanwhile
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph, self.pool, capture_error_mode=mode):
                loss = run()
        finally:
            torch.cuda.set_stream(here)  # a recording that fails leaves its own
        release_buffers()

        def replay() -> Tensor:
            graph.replay()
            return loss

        return replay


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device inside raises RuntimeError, as far as torch sees it."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # torch says once that this is a prototype
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dataclass(frozen=True)
class Graph:
    """A pass over tensors that stay, and how to run it again."""

    inputs: list[Tensor]
    targets: Tensor
    replay: Run

    def __call__(self, batch: Batch, targets: int) -> Tensor:
        """Add the gradient of another batch of the shape; its share of the loss, good until the next replay."""
        for mine, other in zip(self.inputs, tensors_of(batch), strict=True):
            mine.copy_(other, non_blocking=True)
        self.targets.fill_(targets)
        return self.replay()


def tensors_of(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    batch.each(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


class Graphs:
    """The backward pass of `train_step` by replaying. Batches that `pad` has not padded run as ever.

    recorder  makes a pass repeatable
    most      tokens of the largest pass that is padded and recorded; None: of any
    most_even  tokens of the largest pass that is recorded because it need not be padded
    strict    whether it is an error if passes cannot be recorded

    raises  UserError, at the first pass, if it cannot be recorded and must
    """

    def __init__(
        self,
        recorder: Recorder,
        *,
        pad_id: int,
        most: int | None = SHORT,
        most_even: int = 0,
        strict: bool = False,
    ) -> None:
        self.recorder, self.pad_id, self.strict = recorder, pad_id, strict
        self.most, self.most_even = most, most_even
        self.kept: OrderedDict[Shape, Graph] = OrderedDict()
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.recorded = self.replayed = 0
        self.stopped: str | None = None  # why nothing is recorded any more

    def pad(self, batch: Batch) -> Batch:
        """A batch as a graph needs it, or as it is if it is too long for one."""
        if self.stopped or self.too_long(batch):
            return batch
        return padded(batch, self.pad_id)

    def too_long(self, batch: Batch) -> bool:
        if self.most is None:
            return False
        return batch.ids.numel() > (max(self.most, self.most_even) if even(batch) else self.most)

    def takes(self, batch: Batch) -> bool:
        """Whether a batch has a shape that `pad` makes."""
        tokens, targets = batch.ids.numel(), len(batch.target_at)
        if not batch.documents.known:
            return True
        in_line = len(batch.ids) == 1 and targets in (tokens // 2, tokens)
        return in_line and even(batch) and not self.too_long(batch)

    def __call__(
        self, model: nn.Module, adapters: Adapters, batches: Sequence[Batch], targets: int, step: int
    ) -> Tensor:
        """What `step.accumulate` does."""
        self.put_gradients()
        loss = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
        for batch in batches:
            graph = self.find(model, adapters, batch, targets, step) if self.takes(batch) else None
            if graph is None:
                loss += accumulate(model, adapters, [batch], targets, step)
            else:
                loss += graph(batch, targets)
        return loss

    def put_gradients(self) -> None:
        """Let the buffers stand as gradients, zero where a step begins."""
        fresh = [parameter for parameter in self.gradients if parameter.grad is None]
        if fresh:
            torch._foreach_zero_([self.gradients[parameter] for parameter in fresh])
        for parameter, gradient in self.gradients.items():
            if parameter.grad is not None and parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient

    def find(
        self, model: nn.Module, adapters: Adapters, batch: Batch, targets: int, step: int
    ) -> Graph | None:
        """The graph of a batch's shape, recorded if it is new; None if nothing is recorded any more."""
        shape = shape_of(batch)
        if shape in self.kept:
            self.replayed += 1
            self.kept.move_to_end(shape)
            return self.kept[shape]
        if self.stopped:
            return None
        if self.recorded >= KEPT and self.replayed < WORTH * self.recorded:
            self.stopped = (
                f"{self.recorded} shapes were recorded for {self.replayed} replays: shapes differ too much"
            )
            return None
        device = next(model.parameters()).device
        mine, divisor = batch.to(device).each(torch.clone), torch.full((), targets, device=device)
        replay = self.record(adapters, lambda: accumulate(model, adapters, [mine], divisor, step))
        if replay is None:
            return None
        self.recorded += 1
        self.kept[shape] = Graph(tensors_of(mine), divisor, replay)
        while len(self.kept) > KEPT:
            self.kept.popitem(last=False)
        return self.kept[shape]

    def record(self, adapters: Adapters, run: Run) -> Run | None:
        """Record a pass; gradients are then what they were before, in buffers. None if it cannot be recorded."""
        parameters = adapters.parameters(*adapters.active)
        before = [parameter.grad for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.grad = None
            self.recorder.warm(run, first=not self.recorded)
            for parameter, gradient in zip(parameters, before):
                if parameter.grad is not None and parameter not in self.gradients:
                    self.gradients[parameter] = torch.zeros_like(parameter.grad)
                parameter.grad = gradient
            self.put_gradients()
            if not self.strict and (crowded := self.recorder.crowded()):
                self.stopped = crowded
                return None
            return self.recorder.record(run)
        except RuntimeError as error:
            for parameter, gradient in zip(parameters, before):
                parameter.grad = gradient
            release_buffers()  # they may belong to the recording's pool, or to another stream
            if out_of_memory(error):
                if self.strict:
                    raise
                self.kept.clear()  # what runs eagerly cannot use the memory that graphs keep
            self.stopped = f"a pass cannot be recorded: {str(error).splitlines()[0]}"
            if self.strict:
                raise refused(self.stopped) from error
            return None


def out_of_memory(error: BaseException) -> bool:
    """Whether it is that, or what ending a recording made of it."""
    return any(isinstance(one, torch.OutOfMemoryError) for one in (error, error.__context__))


# ---- whether ------------------------------------------------------------------------------------------------


def graph_reason(
    adapters: Adapters, config: RunConfig, model: nn.Module, device: torch.device, *, fitted: bool = False
) -> str | None:
    """None if a run's passes may be recorded, else why not. What only a pass shows is found at the first one.

    config  with what was `auto` decided
    fitted  whether a pass has as many tokens as fit (train.micro_tokens=fit), which config says no more if decided
    """
    if device.type != "cuda":
        return f"this run is on {device}, which has no CUDA graphs"
    if not config.data.packing:
        return "rows of one example each have too many shapes (data.packing)"
    if fitted or config.train.micro_tokens == "fit":
        return "train.micro_tokens=fit leaves no room for the tokens that padding to a graph's shape adds"
    if not takes_documents(model):
        return f"in attention {attention_name(model)} a mask is made for each batch, which waits for the GPU"
    dtype = next(model.parameters()).dtype
    if dtype not in HALF:
        name = str(dtype).removeprefix("torch.")
        return f"attention without lengths on the host takes 16 bits, and the model is in {name}"
    why = why_whole_logits(model)
    if why is not None:
        return f"the loss takes the model's own logits, which waits for the GPU: {why}"
    if config.train.recompute == "offload":
        return "train.recompute=offload copies from host memory that others use meanwhile"
    if any(hooked(module) for module in model.modules() if module is not model):
        return "hooks on the model's modules would not run again"
    return adapters_reason(adapters)


def adapters_reason(adapters: Adapters) -> str | None:
    """Why the passes of the adapters in use cannot be recorded, if so."""
    if len(adapters.active) != 1:
        return f"{len(adapters.active)} adapters are in use"
    name = adapters.active[0]
    method = adapters.adapters[name].method
    if method.dropout:
        return "dropout differs from step to step"
    if method.per_token:
        return f"{type(method).__name__} chooses among tokens"
    if type(method).penalty is not Method.penalty:
        return f"{type(method).__name__} adds a penalty to the loss"
    if any(parameter._backward_hooks for parameter in adapters.parameters(name)):
        return "hooks on the adapter's tensors would not run again"
    return None


def attention_name(model: Any) -> str:
    return getattr(getattr(model, "config", None), "_attn_implementation", None) or "of its own"


def refused(why: str) -> UserError:
    return UserError(f"train.graphs=true: {why}", hint="--set train.graphs=false")


def make_graphs(
    wish: bool | str, why: str | None, device: torch.device, *, pad_id: int, tokens: int
) -> tuple[Graphs | None, str]:
    """The graphs of a run, and in words why there are some or none.

    wish    train.graphs
    why     graph_reason's
    tokens  of a usual pass

    raises  UserError if graphs are asked for and there is a reason against them
    """
    if wish is False:
        return None, "train.graphs=false"
    if why is not None:
        if wish is True:
            raise refused(why)
        return None, why
    if wish == "auto" and tokens > MOST:
        return None, f"a pass has {tokens:,} tokens, which keep a GPU busy without them"
    if wish is True:
        return Graphs(CudaRecorder(device), pad_id=pad_id, most=None, strict=True), "as set"
    words = (
        "" if tokens <= SHORT else f", or longer ones of documents of one length; {tokens:,} are usual here"
    )
    graphs = Graphs(CudaRecorder(device), pad_id=pad_id, most_even=MOST)
    return graphs, f"passes of up to {SHORT:,} tokens{words}"
