"""Count the bytes of live tensors while something runs, on real tensors or on shapes alone.

    with Shapes(), Tape() as tape:      tensors of the meta device have no numbers; the tape counts them all the same
        ...

A block is what an allocator would be asked for: a storage, rounded up. It is born when an operation returns it and
dies when nothing holds it any more, so the tape needs no knowledge of what runs. What a kernel takes for itself
while it works is not seen; sdpa.py adds what is known of the fused attentions.

units   bytes; `now` counts operations
source  tests/test_memory.py: on a CPU the tape agrees with the events of torch's own memory profiler
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .quant import Weight4

ROUND = 512  # what torch's allocator of GPU memory hands out is a multiple of this: its kMinBlockSize
VALUES = 1 << 21  # elements up to which integers keep their numbers among shapes
BACKWARD, AFTER = "backward", "after backward"  # a phase that begins so ends with the backward pass
PARTS = ("base", "adapters", "gradients", "optimizer", "activations", "workspace")
aten = torch.ops.aten


@dataclass(slots=True)
class Block:
    """One allocation: alive from operation `born` until `died`."""

    size: int
    born: int
    part: str | None  # None: told apart by how it lived
    saved: bool  # made where gradients are recorded: in a forward pass, or a recomputed one
    died: int | None = None
    in_backward: bool = False  # freed while a backward pass ran

    def named(self) -> str:
        """Its part: kept for the backward pass, or in passing."""
        return self.part or ("activations" if self.saved and self.in_backward else "workspace")


@dataclass(slots=True)
class Peak:
    """The most bytes of one phase, and when."""

    total: int = 0
    when: int = 0


class Tape(TorchDispatchMode):
    """Every block that operations make inside, what is alive, and the peak of each phase.

    phase  a name for what runs now; whoever knows sets it
    """

    def __init__(self, round_to: int = ROUND) -> None:
        super().__init__()
        self.round_to = round_to
        self.live, self.now, self.phase = 0, 0, ""
        self.blocks: list[Block] = []
        self.peaks: dict[str, Peak] = {}
        self._alive: dict[int, tuple[Block, weakref.ref[Any]]] = {}  # by the address of the storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.now += 1
        if self.phase.startswith(BACKWARD) and not in_backward():
            self.phase = AFTER
        for tensor in tensors_in(out):
            self.see(tensor)
        return out

    def see(self, tensor: Tensor, part: str | None = None) -> None:
        """Count a tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            if part is not None:
                self._alive[key][0].part = part
            return
        size = -(-storage.nbytes() // self.round_to) * self.round_to
        block = Block(size, self.now, part, torch.is_grad_enabled() or not in_backward())
        self._alive[key] = block, weakref.ref(storage, partial(self.freed, key))
        self.blocks.append(block)
        self.live += size
        peak = self.peaks.get(self.phase)
        if peak is None or self.live > peak.total:
            self.peaks[self.phase] = Peak(self.live, self.now)

    def hold(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count what is there already, or say what part it is; a weight in 4 bits by its codes."""
        for tensor in tensors:
            for whole in tensor.codes.tensors() if isinstance(tensor, Weight4) else (tensor,):
                self.see(whole, part)

    def freed(self, key: int, _: Any) -> None:
        block, _ = self._alive.pop(key)
        block.died, block.in_backward = self.now, in_backward()
        self.live -= block.size

    def by_part(self, when: int) -> dict[str, int]:
        """The bytes that were alive right after an operation, by part; ask when all is over."""
        parts = dict.fromkeys(PARTS, 0)
        for block in self.blocks:
            if block.born <= when and (block.died is None or block.died >= when):
                parts[block.named()] += block.size
        return parts


def in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of an operation's result or of its arguments."""
    if isinstance(value, Tensor):
        if not isinstance(value, Weight4):
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


class Shapes(TorchDispatchMode):
    """Lets code that was written for numbers run on the meta device.

    Small tensors of integers stay on the CPU with their values, wherever they were asked to go: token ids, positions
    and labels decide about shapes and branches. Meeting a shape, they are shapes too. A number that is asked of a
    shape is 1, so that what is tested for being finite is finite. Nothing is drawn.

    raises  NotImplementedError, from torch, where the shape of a result depends on numbers that are not there
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*tensors_in(args), *tensors_in(list(kwargs.values()))]
        if any(tensor.is_meta for tensor in given):
            if func is aten._local_scalar_dense.default:
                return 1.0 if args[0].is_floating_point() else 1
            kwargs = {key: value for key, value in kwargs.items() if key != "generator"}
            if func is aten._to_copy.default and not is_meta(kwargs.get("device", "meta")):
                kwargs["device"] = "meta"
                if kwargs.get("dtype", args[0].dtype) == args[0].dtype:
                    return args[0].detach()  # from one stand-in for the GPU to the other is no copy
            if not all(tensor.is_meta for tensor in given):
                args, kwargs = shaped(args), shaped(kwargs)
            return func(*args, **kwargs)
        wants_meta = is_meta(kwargs.get("device"))
        if not given:
            out = func(*args, **kwargs)
            small = wants_meta and isinstance(out, Tensor) and has_values(out)
            return func(*args, **{**kwargs, "device": "cpu"}) if small else out
        if wants_meta and func is aten._to_copy.default and has_values(args[0]):
            return func(*args, **{**kwargs, "device": "cpu"})
        if sum(tensor.numel() for tensor in given) > 4096 and grows(func, args, kwargs):
            return func(*shaped(args), **shaped(kwargs))
        return func(*args, **kwargs)


def is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor keeps its numbers among shapes."""
    return not tensor.is_floating_point() and tensor.numel() <= VALUES


def shaped(value: Any) -> Any:
    """Arguments with every tensor as a shape."""
    if isinstance(value, Tensor):
        return value if value.is_meta else value.to("meta")
    if isinstance(value, dict):
        return {key: shaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(shaped(item) for item in value)
    return value


def grows(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether an operation on numbers gives too many of them."""
    try:
        out = func(*shaped(args), **shaped(kwargs))
    except (NotImplementedError, RuntimeError):  # its result's shape depends on the numbers
        return False
    return any(tensor.numel() > VALUES for tensor in tensors_in(out))
