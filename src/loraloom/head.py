"""From hidden states to summed nats, chunk by chunk over the rows that predict a labelled token.

    nll_L = cross_entropy(head(h[target_at - 1]), labels[target_at])

Logits of all rows are never stored. The gradient is taken together with the loss, while a chunk's logits are there:
of the hidden states, and of whatever trains in the head's forward (an adapter, a bias, the head itself). The
backward pass only scales it. Nothing here asks the device for a number, so nothing waits for it.

shapes  B rows, T tokens a row, N = B T, h hidden width, L labelled tokens, C of them in a chunk, V vocabulary
source  tests/test_head.py: equals the cross-entropy of full logits in float64, with every gradient
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .flow import Flow
from .kernels.cross_entropy import IGNORED, cross_entropy, place_rows

CHUNK_BYTES = 2**28  # of a chunk's logits, unless its rows become too few
LEAST_ROWS = 1024  # a product of fewer rows is slower than its arithmetic
TILE_ROWS = 128  # chunks are whole tiles of a product


class Labelled(Protocol):
    """What the loss reads of a packing.Batch: labels (B, T) and target_at (L,), int64."""

    @property
    def labels(self) -> Tensor: ...
    @property
    def target_at(self) -> Tensor: ...


@dataclass
class Gradient:
    """What the chunks have given so far, of the sum of their nats.

    d_Lh    of the hidden states' labelled rows; None if they need none
    leaves  by id: what trains in the head, and its gradient
    """

    d_Lh: Tensor | None
    leaves: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, leaf: Tensor, part: Tensor) -> None:
        if id(leaf) in self.leaves:
            self.leaves[id(leaf)][1].add_(part)
        else:
            self.leaves[id(leaf)] = leaf, part.clone()  # autograd may give one tensor to several leaves


@dataclass(frozen=True)
class Head:
    """A model's last layer, and what the model makes of its output: logits = cap tanh(scale y / cap)."""

    module: nn.Module
    vocabulary: int
    scale: float = 1.0
    cap: float | None = None

    def nll_sum(self, hidden_BTh: Tensor, batch: Labelled) -> Tensor:
        """The sum of `token_nll`, with its gradient if gradients are recorded."""
        if not torch.is_grad_enabled():
            return self.token_nll(hidden_BTh, batch).sum()
        need = hidden_BTh.requires_grad
        many, num_rows = len(batch.target_at), hidden_BTh.shape[:2].numel()
        gradient = Gradient(hidden_BTh.new_empty(many, hidden_BTh.shape[-1]) if need else None)
        nats = self._nll(hidden_BTh, batch, gradient).sum()
        label_L, source_L = aims(batch)
        place_L = torch.where(label_L == IGNORED, num_rows, source_L)  # beyond the rows: nowhere
        leaves = [leaf for leaf, _ in gradient.leaves.values()]
        grads = [part for _, part in gradient.leaves.values()]
        return _Known.apply(nats, gradient.d_Lh, place_L, grads, hidden_BTh, *leaves)

    @torch.no_grad()
    def token_nll(self, hidden_BTh: Tensor, batch: Labelled) -> Tensor:
        """nll_L, 0 where the label is -100, without gradient; float32, float64 for logits in float64."""
        return self._nll(hidden_BTh, batch, None)

    def _nll(self, hidden_BTh: Tensor, batch: Labelled, gradient: Gradient | None) -> Tensor:
        label_L, source_L = aims(batch)
        one = self._frozen_chunk if self.plain(hidden_BTh) else self._any_chunk
        parts = [
            one(hidden_BTh, source_L[rows], label_L[rows], gradient, rows)
            for rows in chunks(len(label_L), self.vocabulary * hidden_BTh.element_size())
        ]
        precise = torch.promote_types(hidden_BTh.dtype, torch.float32)
        return torch.cat(parts) if parts else hidden_BTh.new_empty(0, dtype=precise)

    # ---- one chunk --------------------------------------------------------------------------------------

    def plain(self, hidden_BTh: Tensor) -> bool:
        """Whether the module is one frozen product and no more, so that its gradient is another."""
        m = self.module
        if type(m).forward is not nn.Linear.forward or "forward" in m.__dict__:
            return False
        tensors = [m.weight] if m.bias is None else [m.weight, m.bias]
        kind = hidden_BTh.device.type
        cast = kind != "meta" and torch.is_autocast_enabled(kind)
        return not cast and all(
            type(t) in (nn.Parameter, Tensor) and t.dtype == hidden_BTh.dtype and not t.requires_grad
            for t in tensors
        )

    @torch.no_grad()
    def _frozen_chunk(
        self, hidden_BTh: Tensor, source_C: Tensor, label_C: Tensor, gradient: Gradient | None, rows: slice
    ) -> Tensor:
        """Two products, and between them the logits turn into their gradient where they stand."""
        w_Vh = self.module.weight
        assert isinstance(w_Vh, Tensor)
        d_Lh = None if gradient is None else gradient.d_Lh
        x_Ch = hidden_BTh.flatten(0, 1).index_select(0, source_C)
        logits_CV = F.linear(x_Ch, w_Vh, self.module.bias)  # type: ignore[arg-type]
        nll_C = self._entropy(logits_CV, label_C, None if d_Lh is None else logits_CV)
        if d_Lh is not None:
            torch.mm(logits_CV, w_Vh, out=d_Lh[rows])
        return nll_C

    def _any_chunk(
        self, hidden_BTh: Tensor, source_C: Tensor, label_C: Tensor, gradient: Gradient | None, rows: slice
    ) -> Tensor:
        """The module as it is, and the gradient of all that its output depends on."""
        d_Lh = None if gradient is None else gradient.d_Lh
        with torch.set_grad_enabled(gradient is not None):
            y_CV, x_Ch = self.output(hidden_BTh, source_C, need=d_Lh is not None)
        logits_CV = y_CV.detach().contiguous()
        if gradient is None or not y_CV.requires_grad:
            return self._entropy(logits_CV, label_C, None)
        grad_CV = torch.empty_like(logits_CV)  # the module may need the logits for its own gradient
        nll_C = self._entropy(logits_CV, label_C, grad_CV)
        leaves = [leaf for leaf in leaves_of(y_CV) if leaf is not x_Ch]
        wanted = [*leaves] if d_Lh is None else [*leaves, x_Ch]
        parts = torch.autograd.grad(y_CV, wanted, grad_CV, allow_unused=True)
        for leaf, part in zip(wanted, parts):
            if leaf is x_Ch and d_Lh is not None:
                d_Lh[rows] = 0 if part is None else part
            elif part is not None:
                gradient.add(leaf, part)
        return nll_C

    def output(self, hidden_BTh: Tensor, source_C: Tensor, *, need: bool = False) -> tuple[Tensor, Tensor]:
        """The module's output for some rows, (C, V), and those rows as a leaf, (C, h)."""
        x_Ch = hidden_BTh.detach().flatten(0, 1).index_select(0, source_C).requires_grad_(need)
        with ExitStack() as stack:
            for flow in flows(self.module):
                stack.enter_context(some_tokens(flow, hidden_BTh.shape[:2], source_C))
            return self.module(x_Ch[None]).squeeze(0), x_Ch

    def _entropy(self, logits_CV: Tensor, label_C: Tensor, grad_CV: Tensor | None) -> Tensor:
        return cross_entropy(logits_CV, label_C, scale=self.scale, cap=self.cap, grad_CV=grad_CV)


class _Known(torch.autograd.Function):
    """A sum whose gradient is known already."""

    @staticmethod
    def forward(
        ctx: Any,
        nats: Tensor,
        d_Lh: Tensor | None,
        place_L: Tensor,
        grads: list[Tensor],
        hidden_BTh: Tensor,
        *leaves: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(d_Lh, place_L, *grads)
        ctx.shape = hidden_BTh.shape
        return nats.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Any, ...]:
        d_Lh, place_L, *grads = ctx.saved_tensors
        d_BTh = None
        if d_Lh is not None:
            d_BTh = place_rows(d_Lh, place_L, factor, ctx.shape[:2].numel()).view(ctx.shape)
        return None, None, None, None, d_BTh, *(times(part, factor) for part in grads)


def times(part: Tensor, factor: Tensor) -> Tensor:
    """A product rounded once: a factor of one element would be rounded to the tensor's dtype first."""
    wide = torch.promote_types(part.dtype, torch.float32)
    return (part.to(wide) * factor.to(wide)).to(part.dtype)


# ---- which rows ---------------------------------------------------------------------------------------------


def aims(batch: Labelled) -> tuple[Tensor, Tensor]:
    """(label_L, source_L): each label and the row of hidden states before it; -100 fills up a fixed L."""
    label_L = batch.labels.flatten().index_select(0, batch.target_at)
    return label_L, (batch.target_at - 1).clamp_min(0)


def chunks(many: int, row_bytes: int) -> list[slice]:
    """Rows in chunks of about one size, whose logits take CHUNK_BYTES or have LEAST_ROWS rows."""
    most = max(LEAST_ROWS, CHUNK_BYTES // row_bytes // TILE_ROWS * TILE_ROWS)
    count = -(-many // most)
    size = -(-many // (count * TILE_ROWS)) * TILE_ROWS if count else 1
    return [slice(start, min(start + size, many)) for start in range(0, many, size)]


def leaves_of(y: Tensor) -> list[Tensor]:
    """The leaves that gradients of y would gather in."""
    found: dict[int, Tensor] = {}
    seen, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        left += [before for before, _ in node.next_functions]
    return list(found.values())


def flows(module: nn.Module) -> list[Flow]:
    """What adapters on the module or on a part of it share."""
    owners = (getattr(m.__dict__.get("forward"), "__self__", None) for m in module.modules())
    found = (getattr(owner, "flow", None) for owner in owners)
    return list({id(flow): flow for flow in found if isinstance(flow, Flow)}.values())


@contextmanager
def some_tokens(flow: Flow, shape: tuple[int, ...], at_C: Tensor) -> Iterator[None]:
    """Adapters see some tokens of the batch (B, T) as one row: whose each is, and which dropout it has."""
    before = flow.tokens, flow.mask_BMK, flow.token_BT
    mask_BMK, token_BT = flow.mask_BMK, flow.token_BT
    if mask_BMK is not None:
        flow.mask_BMK = mask_BMK.expand(*shape, -1).flatten(0, 1).index_select(0, at_C)[None]
    known = token_BT is not None and token_BT.shape == shape
    flow.token_BT = (token_BT.flatten().index_select(0, at_C) if known else at_C)[None]  # type: ignore[union-attr]
    flow.tokens = (1, len(at_C))
    try:
        yield
    finally:
        flow.tokens, flow.mask_BMK, flow.token_BT = before


# ---- the model without its head -----------------------------------------------------------------------------


@contextmanager
def standing_aside(module: nn.Module, answer: Tensor | None = None) -> Iterator[list[Tensor]]:
    """Let a model run without its head, and keep what would have entered that.

    The model as a whole is called, so that its hooks see what they always see. What it makes of the head's output
    has no width and costs nothing.

    answer  what the head gives instead
    """
    entered: list[Tensor] = []

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        hidden = args[0] if args else next(iter(kwargs.values()))
        entered.append(hidden)
        return hidden.new_empty(*hidden.shape[:-1], 0) if answer is None else answer

    with in_place_of_forward(module, forward):
        yield entered


@contextmanager
def listening(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What enters a module and what it gives, without a hook of its own."""
    heard: list[tuple[Tensor, Tensor]] = []
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        y = own(*args, **kwargs)
        heard.append((args[0] if args else next(iter(kwargs.values())), y))
        return y

    with in_place_of_forward(module, forward):
        yield heard


@contextmanager
def in_place_of_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    kept = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if kept is not None:
            module.__dict__["forward"] = kept


def hooked(module: nn.Module) -> bool:
    """Whether something looks at a module from outside and must see whole batches enter it."""
    return any(map(bool, hooks_of(module)))


def hooks_of(module: nn.Module) -> list[Any]:
    """Where a module keeps its hooks: what is put there later is seen too."""
    return [
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ]
