"""The micro-batches of the next steps, made while the present one trains.

    a thread     make(step), then on a GPU: into pinned memory, and to the device on a stream of its own
    the loop     takes a step's batches; its stream waits for their copies, the host for nothing that is ready

What a step holds is a function of its number alone, so that the order of the work changes no bit.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .packing import Batch

DEPTH = 3  # steps at most that wait, or are being made
Make = Callable[[int], Sequence[Batch]]


class Ahead:
    """An iterator over the batches of steps; it works inside `with` alone, which ends its thread however it is left.

    raises  whatever `make` raises, when the loop comes to that step
    """

    def __init__(self, make: Make, steps: range, device: torch.device, *, depth: int = DEPTH) -> None:
        self.make, self.steps, self.device, self.depth = make, steps, device, depth
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: deque[tuple[Sequence[Batch], Any]] = deque()  # batches, and the event after their copies
        self._turn = threading.Condition()  # guards what stands above and below
        self._stopped = self._done = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="loraloom-packing", daemon=True)

    def __enter__(self) -> Ahead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._stopped = True
            self._ready.clear()
            self._turn.notify_all()
        self._thread.join()

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        return self

    def __next__(self) -> Sequence[Batch]:
        with self._turn:
            self._turn.wait_for(lambda: self._ready or self._done or self._stopped)
            if not self._ready:
                if self._error is not None:
                    raise self._error
                raise StopIteration
            batches, copied = self._ready.popleft()
            self._turn.notify_all()
        if copied is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(copied)
            for batch in batches:
                batch.each(lambda tensor: used_on(tensor, here))
        return batches

    def _work(self) -> None:
        """The thread: one step after another, until all are made or nobody wants them."""
        try:
            for step in self.steps:
                with self._turn:
                    self._turn.wait_for(lambda: self._stopped or len(self._ready) < self.depth)
                    if self._stopped:
                        return
                made = self._moved(self.make(step))
                with self._turn:
                    if not self._stopped:
                        self._ready.append(made)
                    self._turn.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._turn:
                self._done = True
                self._turn.notify_all()

    def _moved(self, batches: Sequence[Batch]) -> tuple[Sequence[Batch], Any]:
        """The batches on the device, and the event after which they are there."""
        if self._stream is None:
            return batches, None
        with torch.cuda.stream(
            self._stream
        ):  # which makes its device the thread's, for the pinned memory too
            there = [batch.each(self._copied) for batch in batches]
            return there, self._stream.record_event()

    def _copied(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True)


def used_on(tensor: Tensor, stream: Any) -> Tensor:
    """Keep the tensor's memory from being given to the copying stream again before this one has read it."""
    tensor.record_stream(stream)
    return tensor
