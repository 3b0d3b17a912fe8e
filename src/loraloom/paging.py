"""Optimizer state in the host's memory, copied to the GPU a piece at a time and back: explicit, never managed memory.

    lane "in"     host -> slot k              after the slot's last copy back
    lane "main"   update in slot k            after the copy in
    lane "out"    slot k -> host              after the update

Copies are asynchronous, to and from pinned memory. A few slots of bounded size take turns, so the next piece
comes in and the last one goes out while one is updated. The order between lanes is kept by events alone; the
host waits only in `finish`, which whoever reads the state calls first.

What an order is kept with is a `Lanes`: CUDA streams, or a test's own that runs the work in any allowed order.

units   PIECE in bytes of one moment; a slot has two buffers of at most that length
source  QLoRA, arXiv:2305.14314, section 3 (paged optimizers there are managed memory, moved by the driver)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

PIECE = 2**23  # 8 MiB: long enough to run at the bus's speed, and three slots take 48 MiB
SLOTS = 3  # one coming in, one updated, one going out
ALIGN = 256  # elements; where parts start in a slot, and the blocks of 8-bit moments

Pair = tuple[Tensor, Tensor]


class Lanes(Protocol):
    """Queues of work that run beside each other: "in", "main" and "out"."""

    def host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros in memory that copies can reach without the CPU."""

    def device(self, numbytes: int) -> Tensor:
        """A buffer of bytes on the device that every lane may use."""

    def copy(self, lane: str, pairs: Sequence[Pair]) -> None:
        """Queue the copies to the first of each pair from the second."""

    def call(self, work: Callable[[], None]) -> None:
        """Queue work on "main"."""

    def mark(self, lane: str) -> Any:
        """An event: the lane has done all that is queued on it now."""

    def wait(self, lane: str, event: Any) -> None:
        """What is queued on the lane from here on runs after the event."""

    def finish(self) -> None:
        """Return when everything queued for "out" is done."""


class CudaLanes:
    """Lanes that are streams of one GPU; "main" is whichever stream is current."""

    def __init__(self, gpu: torch.device) -> None:
        if gpu.type != "cuda":
            raise ValueError(f"state is paged between the host and a CUDA device, not {gpu}")
        self.gpu = gpu
        self.side = {"in": torch.cuda.Stream(gpu), "out": torch.cuda.Stream(gpu)}

    def stream(self, lane: str) -> torch.cuda.Stream:
        return self.side.get(lane) or torch.cuda.current_stream(self.gpu)

    def host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def device(self, numbytes: int) -> Tensor:
        buffer = torch.empty(numbytes, dtype=torch.uint8, device=self.gpu)
        for stream in self.side.values():
            buffer.record_stream(stream)  # else its memory could be given away with a copy under way
        return buffer

    def copy(self, lane: str, pairs: Sequence[Pair]) -> None:
        with torch.cuda.stream(self.stream(lane)):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)

    def call(self, work: Callable[[], None]) -> None:
        work()

    def mark(self, lane: str) -> torch.cuda.Event:
        return self.stream(lane).record_event()

    def wait(self, lane: str, event: torch.cuda.Event) -> None:
        self.stream(lane).wait_event(event)

    def finish(self) -> None:
        self.side["out"].synchronize()


@dataclass
class Slot:
    """Two buffers on the device, and the event after which they may be filled again."""

    buffers: Pair
    free: Any = None


@dataclass(frozen=True)
class Load:
    """What fits into a slot: the host tensors of some parts, two a part, and the update of what they become."""

    hosts: Sequence[Pair]
    update: Callable[[list[Pair]], None]

    @property
    def numbytes(self) -> int:
        return sum(room(first) for first, _ in self.hosts)


class Pager:
    """Takes loads through the slots, which it makes when it sees how large they must be."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.slots: list[Slot] = []
        self.written: Any = None

    def run(self, loads: Sequence[Load]) -> None:
        """Queue the update of every load; `finish` waits for the state to be back."""
        if not loads:
            return
        lanes = self.lanes
        self.make_slots(max(load.numbytes for load in loads))
        lanes.wait("in", lanes.mark("main"))  # new buffers may be memory that earlier work still reads
        if self.written is not None:
            lanes.wait("in", self.written)
        for index, load in enumerate(loads):
            slot = self.slots[index % SLOTS]
            if slot.free is not None:
                lanes.wait("in", slot.free)
            staged = places(slot.buffers, load.hosts)
            copies = [pair for buffers, hosts in zip(staged, load.hosts) for pair in zip(buffers, hosts)]
            lanes.copy("in", copies)
            lanes.wait("main", lanes.mark("in"))
            lanes.call(lambda load=load, staged=staged: load.update(staged))  # type: ignore[misc]
            lanes.wait("out", lanes.mark("main"))
            lanes.copy("out", [(host, buffer) for buffer, host in copies])
            slot.free = lanes.mark("out")
        self.written = lanes.mark("out")

    def make_slots(self, numbytes: int) -> None:
        if not self.slots or self.slots[0].buffers[0].numel() < numbytes:
            device = self.lanes.device
            self.slots = [Slot((device(numbytes), device(numbytes))) for _ in range(SLOTS)]

    def finish(self) -> None:
        self.lanes.finish()


def places(buffers: Pair, hosts: Sequence[Pair]) -> list[Pair]:
    """Where in a slot's buffers each part goes, one behind the other, in its shape and dtype."""
    found, start = [], 0
    for first, _ in hosts:
        part = slice(start, start + first.nbytes)
        one, other = (buffer[part].view(first.dtype).view(first.shape) for buffer in buffers)
        found.append((one, other))
        start += room(first)
    return found


def room(host: Tensor) -> int:
    """The bytes that a part takes in a buffer."""
    return padded(host.numel()) * host.element_size()


def padded(numel: int) -> int:
    return -(-numel // ALIGN) * ALIGN


def cut(numels: Sequence[int], piece: int) -> list[list[tuple[int, int, int]]]:
    """Tensors as loads of parts (which tensor, start, stop): small ones share a load, large ones are cut."""
    loads: list[list[tuple[int, int, int]]] = [[]]
    left = piece
    for index, numel in enumerate(numels):
        start = 0
        while start < numel:
            if left < ALIGN:
                loads.append([])
                left = piece
            stop = min(numel, start + left)
            loads[-1].append((index, start, stop))
            left -= padded(stop - start)
            start = stop
    return [load for load in loads if load]
