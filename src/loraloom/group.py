"""Frozen weights that read the same input, with the low-rank pairs that the adapter in use has on them.

    y = x W^T + s B^T,   s = x A^T          A = e [A_q; A_k; A_v],   B block-diagonal

A and B are put side by side in 16 bits once a step. Where they are thin enough and nothing is dropped, the kernels
between two products add them; else they are multiplied apart, part by part.

shapes  T tokens; A (R, I), B (O, R); R the sum of the parts' ranks, filled up to a width that kernels take
source  LoRA, arXiv:2106.09685, equation 3
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .adapt import Adapters
from .bank import Bank, Compute
from .flow import Flow
from .frozen import Frozen
from .kernels.block import FUSED_RANKS, Shown
from .kernels.products import mm32


@dataclass(frozen=True)
class Part:
    """One pair: its rows in the merged output, its columns among the ranks, and the scale that A carries there."""

    rows: slice
    ranks: slice
    e: float


@dataclass(frozen=True)
class Wide:
    """The pairs of a group side by side, in the dtype of the computation.

    b     (O, R), block-diagonal, where the ranks are few: kernels can add it
    each_b  (O_i, r_i) of each part, where they are not
    bank  whose dropout is applied, with what it computes
    """

    parts: tuple[Part, ...]
    a: Tensor
    b: Tensor | None
    each_b: tuple[Tensor, ...]
    bank: Bank | None = None  # whose dropout is applied
    compute: Compute | None = None


class Group:
    """A merged product of one layer.

    names  of its modules
    """

    def __init__(self, frozen: Frozen, names: Sequence[str], adapters: Adapters) -> None:
        self.frozen, self.names, self.adapters = frozen, list(names), adapters
        self._known: tuple[tuple[Compute | bool | None, ...], Wide] | None = None

    @property
    def banks(self) -> list[Bank | None]:
        return [self.adapters.banks.get(name) for name in self.names]

    def pairs(self) -> tuple[list[Compute | None], list[Tensor]]:
        """What the layer's banks compute now, and the tensors that gradients flow into: A, B of each pair in order."""
        computes = [None if bank is None else bank.held or bank.build() for bank in self.banks]
        tensors: list[Tensor] = []
        for compute in computes:
            if compute is not None:
                (segment,) = compute.segments
                b = segment.B
                if isinstance(segment.e, Tensor):
                    b = b * segment.e
                if segment.out is not None:
                    b = segment.out[:, None] * b
                tensors += [segment.A, b]
        return computes, tensors

    def wide(self, computes: Sequence[Compute | None], tensors: Sequence[Tensor]) -> Wide | None:
        """The pairs side by side; kept as long as the banks are held."""
        if not tensors:
            return None
        banks = self.banks
        key = (*computes, any(bank.flow.training for bank in banks if bank is not None))
        held = all(compute is None or (bank and bank.held) for bank, compute in zip(banks, computes))
        if held and self._known is not None and all(x is y for x, y in zip(self._known[0], key)):
            return self._known[1]
        made = self._make(computes, tensors)
        self._known = (key, made) if held else None
        return made

    def forget(self) -> None:
        self._known = None

    @torch.no_grad()
    def _make(self, computes: Sequence[Compute | None], tensors: Sequence[Tensor]) -> Wide:
        frozen = self.frozen
        parts: list[Part] = []
        dropped: tuple[Bank, Compute] | None = None
        start, at = 0, 0
        for bank, compute, rows in zip(self.banks, computes, frozen.rows):
            if bank is None or compute is None:
                continue
            e = compute.segments[0].e
            rank = len(tensors[at])
            parts.append(Part(rows, slice(start, start + rank), e if isinstance(e, float) else 1.0))
            start, at = start + rank, at + 2
            if bank.flow.training and any(compute.rates):
                dropped = bank, compute
        width = next((w for w in FUSED_RANKS if start <= w), None)
        fused = width is not None and dropped is None
        a = torch.zeros(
            width if fused and width else start, frozen.shape[1], dtype=frozen.dtype, device=frozen.device
        )
        b = a.new_zeros(frozen.shape[0], len(a)) if fused else None
        each: list[Tensor] = []
        for part, a_RI, b_OR in zip(parts, tensors[::2], tensors[1::2]):
            torch.mul(a_RI, part.e, out=a[part.ranks])
            if b is not None:
                b[part.rows, part.ranks] = b_OR
            else:
                each.append(b_OR.to(frozen.dtype))
        bank, compute = dropped or (None, None)
        return Wide(tuple(parts), a, b, tuple(each), bank, compute)


class Then:
    """What a forward pass drew its dropout from, for a backward pass that comes when the flow has moved on."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.fields = {name: getattr(flow, name) for name in ("active", "token_BT", "clock", "training")}

    @contextmanager
    def again(self) -> Iterator[None]:
        now = Then(self.flow)
        vars(self.flow).update(self.fields)
        try:
            yield
        finally:
            vars(self.flow).update(now.fields)


def then_of(wides: Sequence[Wide | None]) -> Then | None:
    """None if nothing is dropped."""
    return next((Then(wide.bank.flow) for wide in wides if wide is not None and wide.bank is not None), None)


def dropped(wide: Wide, x: Tensor) -> Tensor:
    """x with the adapter's dropout; linear in x, so gradients take it too."""
    return x if wide.bank is None or wide.compute is None else wide.bank.drop(x, wide.compute)


def thin(wide: Wide, x: Tensor) -> Tensor:
    """s = x A^T."""
    return dropped(wide, x) @ wide.a.T


def thin_grad(wide: Wide, dy: Tensor) -> Tensor:
    """ds = dy B."""
    if wide.b is not None:
        return dy @ wide.b
    ds = dy.new_empty(dy.shape[0], len(wide.a))
    for part, b_OR in zip(wide.parts, wide.each_b):
        torch.mm(dy[:, part.rows], b_OR, out=ds[:, part.ranks])
    return ds


def times(
    group: Group, wide: Wide | None, x: Shown, *, kernel_adds: bool = False, onto: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """y = x W^T + s B^T and s; the low-rank part is left to the kernel that reads y, where there is one.

    onto  added to y
    """
    if wide is None:
        return group.frozen.times(x, onto=onto), None
    assert x.dense is not None
    s = thin(wide, x.dense)
    if wide.b is not None:
        return group.frozen.times(x, None if kernel_adds else (s, wide.b), onto), s
    y = group.frozen.times(x, onto=onto)
    for part, b_OR in zip(wide.parts, wide.each_b):
        y[:, part.rows].addmm_(s[:, part.ranks], b_OR.T)
    return y, s


def back(
    group: Group, wide: Wide | None, dy: Shown, ds: Tensor | None, *, kernel_adds: bool = False
) -> Tensor:
    """dx = dy W + ds A, through the dropout."""
    if wide is None or ds is None or (kernel_adds and wide.b is not None):
        return group.frozen.back(dy)
    if wide.bank is None:
        return group.frozen.back(dy, (ds, wide.a))
    return group.frozen.back(dy).add_(dropped(wide, ds @ wide.a))


def low(wide: Wide | None, s: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """What a kernel adds to y."""
    return None if wide is None or wide.b is None or s is None else (s, wide.b)


def dlow(wide: Wide | None, ds: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """What a kernel adds to dx."""
    return None if wide is None or wide.b is None or ds is None else (ds, wide.a)


@dataclass(frozen=True)
class PairGrads:
    """dA and dB of a group's pairs, each made as soon as what it is made of is there, so that the rest can go.

    dtypes  of A, B of each pair in order
    """

    wide: Wide | None
    dtypes: Sequence[torch.dtype]
    a: list[Tensor] = field(default_factory=list)
    b: list[Tensor] = field(default_factory=list)

    def take_b(self, s: Tensor | None, dy: Tensor, whole: Tensor | None = None) -> None:
        """dB = dy^T s, summed in float32.

        whole  the sum of the pairs side by side, where a kernel has made it
        """
        if self.wide is None:
            return
        assert s is not None
        if whole is None and self.wide.b is not None:
            whole = mm32(dy.T, s)
        for part, dtype in zip(self.wide.parts, self.dtypes[1::2]):
            db = mm32(dy[:, part.rows].T, s[:, part.ranks]) if whole is None else whole[part.rows, part.ranks]
            self.b.append(db.to(dtype))

    def take_a(self, x: Tensor | None, ds: Tensor | None, whole: Tensor | None = None) -> None:
        """dA = ds^T x, summed in float32.

        whole  the sum, where a kernel has made it
        """
        if self.wide is None:
            return
        if whole is None:
            assert x is not None
            assert ds is not None
            whole = mm32(ds.T, dropped(self.wide, x))
        for part, dtype in zip(self.wide.parts, self.dtypes[::2]):
            self.a.append((whole[part.ranks] * part.e).to(dtype))

    def __iter__(self) -> Iterator[Tensor]:
        """In the order of the pairs."""
        return (grad for pair in zip(self.a, self.b, strict=True) for grad in pair)
