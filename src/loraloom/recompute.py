"""What the backward pass computes again instead of having kept it: the tiers of train.recompute.

    none      everything that the backward pass needs is kept
    gate_up   the inner width of each fused layer's MLP is computed again
    full      each decoder layer keeps its input and is computed again as a whole
    offload   as full, with the inputs in the host's memory: copied out while the layer runs, and back in while the
              layer above it is computed again

A layer is recomputed by an attribute `forward` on that one instance, outside of the adapters' own. Every tier gives
the same bits. Nothing of a frozen base in eval mode is random and dropout is keyed, so no random state is kept.

units   bytes; PIECE of host memory
source  Chen et al. 2016, arXiv:1604.06174; tests/test_recompute.py: all tiers against none, bit for bit
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .adapt import Adapters
from .config import TrainConfig
from .errors import UserError
from .fast import FastLayer, engage
from .flow import Flow
from .paging import CudaLanes, Pair
from .skeleton import decoder_layers

TIERS = ("none", "gate_up", "full", "offload")  # each keeps less on the GPU than the one before it
UNDO = "recompute"  # among what adapters take off their model
PIECE = 2**24  # pinned memory is handed out in powers of two: larger pieces would leave more of it unused


@dataclass(frozen=True)
class Choice:
    """What a run computes again, the tokens of its passes, and why in words."""

    tier: str
    tokens: int
    reason: str


class Now:
    """Lanes of a device whose copies are done at once; on meta there is nothing to copy."""

    def copy(self, lane: str, pairs: Sequence[Pair]) -> None:
        for target, source in pairs:
            target.copy_(source)

    def mark(self, lane: str) -> None:
        return None

    def wait(self, lane: str, event: Any) -> None:
        return None


class Ticket:
    """One input on the shelf; `before` is the one put there before it, which the backward pass needs next."""

    def __init__(self, shelf: Shelf, h: Tensor, before: weakref.ref[Ticket] | None) -> None:
        self.size, self.dtype, self.device = h.shape, h.dtype, h.device
        self.before = before
        self.free = shelf.free
        self.pieces = [] if h.is_meta else shelf.take(h.nbytes)

    def pairs(self, h: Tensor) -> list[Pair]:
        """(piece, its part of h), byte by byte."""
        if not self.pieces:
            return []
        parts = h.view(-1).view(torch.uint8).split(self.pieces[0].numel())
        return [(piece[: part.numel()], part) for piece, part in zip(self.pieces, parts)]

    def __del__(self) -> None:
        self.free += self.pieces  # what still copies them comes before the next copy in its lane


class Shelf:
    """Inputs of layers in the host's memory.

    On the device stand at most the input that is being copied out, or the one that is being computed with and the
    one that comes in. The lane that computes waits for a copy before what was copied is let go, so that the memory
    is free at that place in the order of work, however far the host is ahead of the device. Every other lane waits
    for that one before it copies, and so for all copies before.

    Host memory is taken in pieces that are used again: in all, the inputs of the layers of one pass.
    """

    def __init__(self, lanes: Any = None, *, piece: int = PIECE) -> None:
        self.lanes, self.piece = lanes, piece
        self.free: list[Tensor] = []
        self.made = 0  # pieces
        self.pinned = True
        self.leaving: tuple[weakref.ref[Ticket], Tensor, Any] | None = None
        self.coming: tuple[weakref.ref[Ticket], Tensor, Any] | None = None
        self.last: weakref.ref[Ticket] | None = None

    def put(self, h: Tensor) -> Ticket:
        """Start the copy of an input to the host; the one before it leaves the device."""
        if self.lanes is None:
            self.lanes = CudaLanes(h.device) if h.device.type == "cuda" else Now()
        lanes, h = self.lanes, h.detach().contiguous()
        self.let_go()
        ticket = Ticket(self, h, self.last)
        self.last = weakref.ref(ticket)
        lanes.wait("out", lanes.mark("main"))
        lanes.copy("out", ticket.pairs(h))
        self.leaving = self.last, h, lanes.mark("out")
        return ticket

    def get(self, ticket: Ticket) -> Tensor:
        """The input again, on its device; the one before it starts to come in."""
        if self.leaving is not None and self.leaving[0]() is ticket:
            h = self.leaving[1]  # the last layer's has never left
        else:
            if self.coming is None or self.coming[0]() is not ticket:
                self.fetch(ticket)
            assert self.coming is not None
            h = self.coming[1]
        self.let_go()
        before = None if ticket.before is None else ticket.before()
        if before is not None:
            self.fetch(before)
        return h

    def fetch(self, ticket: Ticket) -> None:
        """Start a copy back to the device."""
        self.let_go()
        lanes = self.lanes
        h = torch.empty(ticket.size, dtype=ticket.dtype, device=ticket.device)
        lanes.wait("in", lanes.mark("main"))  # earlier work may still read what stood in this memory
        lanes.copy("in", [(part, piece) for piece, part in ticket.pairs(h)])
        self.coming = weakref.ref(ticket), h, lanes.mark("in")

    def let_go(self) -> None:
        """Drop what is on the device, once its copy is done."""
        for held in (self.leaving, self.coming):
            if held is not None:
                self.lanes.wait("main", held[2])
        self.leaving = self.coming = None

    def take(self, numbytes: int) -> list[Tensor]:
        """Pieces of host memory for so many bytes."""
        count = -(-numbytes // self.piece)
        return [self.free.pop() if self.free else self.make() for _ in range(count)]

    def make(self) -> Tensor:
        self.made += 1
        if self.pinned and isinstance(self.lanes, CudaLanes):
            try:
                return torch.empty(self.piece, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self.pinned = False
                warnings.warn(
                    f"train.recompute=offload: the host gives no more pinned memory ({str(error).splitlines()[0]}); "
                    "the rest is pageable, and copies of it hold the training up",
                    stacklevel=2,
                )
        return torch.empty(self.piece, dtype=torch.uint8)


class Recomputed:
    """A layer's forward that keeps its input alone, on the device or on a shelf."""

    def __init__(self, inner: Callable[..., Any], flow: Flow, shelf: Shelf | None = None) -> None:
        self.inner, self.flow, self.shelf = inner, flow, shelf
        self.__self__ = getattr(inner, "__self__", None)  # whose forward it is: a bank's, or the module's own
        self.released = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.released:
            return self.inner(*args, **kwargs)
        given = (*args, *kwargs.values())
        if not torch.is_grad_enabled() or any(hasattr(value, "get_seq_length") for value in given):
            return self.inner(*args, **kwargs)  # keys and values in a cache would be written twice

        turns: list[dict[str, Any]] = [{}, {}]
        if isinstance(self.inner, FastLayer):
            turns = [{"turn": "second"}, {"turn": "first"}]

        def run(*args: Any) -> Any:
            if torch._C._current_graph_task_id() != -1:  # inside backward()
                self.flow.check_recomputation()
            return self.inner(*args, **kwargs, **(turns.pop() if len(turns) > 1 else turns[0]))

        if self.shelf is not None:
            return self.offloaded(run, args, kwargs)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)

    def offloaded(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same with the hidden states on the shelf: `first` holds them until the layer has them."""
        assert self.shelf is not None
        first = [args[0] if args else kwargs.pop("hidden_states", None)]
        if not isinstance(first[0], Tensor):
            raise UserError(
                "this model does not hand its layers their hidden states first, so that they cannot be offloaded",
                hint="--set train.recompute=full",
            )
        shelf, ticket, rest, trains = self.shelf, self.shelf.put(first[0]), args[1:], first[0].requires_grad

        def again() -> Any:
            return run(first.pop() if first else shelf.get(ticket).requires_grad_(trains), *rest)

        del args
        return checkpoint(again, use_reentrant=False, preserve_rng_state=False)


def fuse(adapters: Adapters, train: TrainConfig, *, gpu: bool) -> list[str]:
    """Fused layers where the settings want them, before a tier is applied; what came of it, in words.

    raises  UserError if they are asked for and this model has none
    """
    lift(adapters)
    if not (gpu if train.fast == "auto" else train.fast):
        adapters.unfuse()
        why = "train.fast=auto fuses on a GPU" if train.fast == "auto" else "train.fast=false"
        return [f"the model's own code: {why}"]
    lines = engage(adapters)
    if train.fast is True and not adapters.fast:
        raise UserError(
            "train.fast=true: no layer can be fused",
            details=lines,
            hint="--set train.fast=auto; attention by documents is --set model.attention=varlen",
        )
    return lines


def apply(model: nn.Module, adapters: Adapters, tier: str) -> None:
    """Put a tier in place of the one that was; adapters are attached and layers fused before.

    raises  UserError if the model's layers are not found, or none of them is fused where the tier needs that
    """
    if tier not in TIERS:
        raise ValueError(f"{tier!r} is none of {', '.join(TIERS)}")
    lift(adapters)
    layers = list(decoder_layers(model) or ())
    if tier == "gate_up" and not adapters.fast:
        raise UserError(
            f"train.recompute=gate_up: {type(model).__name__} runs without fused layers here, whose MLP alone could "
            "be computed again",
            hint="--set train.recompute=full",
        )
    for one in adapters.fast:
        one.parts.recompute = "gate_up" if tier == "gate_up" else "none"
    if tier not in ("full", "offload"):
        return
    if not layers:
        raise UserError(
            f"no decoder layers are found in {type(model).__name__}, so that none can be computed again",
            hint="--set train.recompute=none",
        )
    shelf = Shelf() if tier == "offload" else None
    placed = [(layer, Recomputed(layer.forward, adapters.flow, shelf)) for layer in layers]
    for layer, forward in placed:
        layer.__dict__["forward"] = forward
    adapters.undo[UNDO] = partial(release, placed)


def lift(adapters: Adapters) -> None:
    """Give the layers the forwards that they had before a tier was put in place, if one was."""
    take_off = adapters.undo.pop(UNDO, None)
    if take_off is not None:
        take_off()


def release(placed: Sequence[tuple[nn.Module, Recomputed]]) -> None:
    for layer, forward in placed:
        forward.released, forward.shelf = True, None  # for whoever still holds it as the layer's forward
        unwrap(layer)


def unwrap(layer: nn.Module) -> None:
    """Give a layer the forward that it had."""
    held = layer.__dict__.get("forward")
    if isinstance(held, Recomputed):
        layer.__dict__["forward"] = held.inner
        if held.inner == type(layer).forward.__get__(layer):
            del layer.__dict__["forward"]
