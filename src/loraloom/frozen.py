"""Frozen weights that read the same input, as one matrix: the products of q, k and v, or of gate and up, as one.

    y = x W^T,  dx = dy W        W = [W_q; W_k; W_v]

    dense          W is one memory, and each module's weight is a view of its own rows: no copy is kept
    coded          decoded into one reused buffer, forward and again backward
    coded, 8 bits  decoded to e4m3 by rows of W forward, by rows of W^T backward

shapes  x (T, I), y (T, O), W (O, I) with O the sum of the parts
source  tests/test_frozen.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels.block import FUSED_RANKS, Pair, Shown, add_low
from .kernels.fp8 import E4M3, matmul8
from .kernels.matmul_frozen import buffer
from .quant import AnyCodes, Codes, Weight4
from .weights8 import Codes8


class Frozen:
    """The weights of some modules as one; biases ride along."""

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self.modules = list(modules)
        weights = [part.weight for part in modules]
        sizes = [len(weight) for weight in weights]
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self.rows = [slice(start, stop) for start, stop in pairwise(ends)]
        self.shape = (ends[-1], weights[0].shape[1])
        self.dtype, self.device = weights[0].dtype, weights[0].device
        self.coded = isinstance(weights[0], Weight4)
        self._whole: Tensor | None = None  # W, or its codes in 8 bits, in one memory
        self._joined: list[Tensor] = []  # the weights that became views of it
        self._scales: tuple[Tensor, Tensor] | None = None
        self._columns: list[tuple[Weight4, Tensor]] = []  # the second of them as each weight had it
        if len(modules) > 1:
            self._join()
        if all(isinstance(weight, Weight4) and weight.fp8 for weight in weights):
            self._share_scales()

    @property
    def fp8(self) -> bool:
        """Whether products are taken in 8-bit floats: if they were with every part, and are now."""
        first = self.modules[0].weight
        return self._scales is not None and isinstance(first, Weight4) and first.fp8

    def _join(self) -> None:
        """Move what is kept by rows into one memory, each weight a view of it: values and names stay."""
        held = [kept_rows(weight) for weight in self.weights()]
        if held[0] is None:
            return  # 4 bits are decoded side by side anyway
        whole = torch.empty(self.shape, dtype=held[0].dtype, device=self.device)
        self._whole, self._joined = whole, self.weights()
        for weight, own, rows in zip(self._joined, held, self.rows):
            assert own is not None
            whole[rows] = own
            keep_rows(weight, whole[rows])

    def part(self) -> None:
        """Give each weight a memory and scales of its own again; one that was moved meanwhile has them already."""
        for weight in self._joined:
            rows = kept_rows(weight)
            if rows is not None and self._whole is not None and same_memory(rows, self._whole):
                keep_rows(weight, rows.clone())
        for weight, columns in self._columns:
            if self._scales is not None and weight.fp8 and columns_of(weight.codes) is self._scales[1]:
                weight.codes = with_columns(weight.codes, columns)
        self._whole, self._joined, self._columns = None, [], []

    @property
    def moved(self) -> bool:
        """Whether the weights have got other memory since they were joined, as when a model changes its dtype."""
        whole = self._whole
        if whole is None or whole.is_meta:
            return False
        for weight, own, rows in zip(self.weights(), self._joined, self.rows):
            held = kept_rows(weight)
            if held is None or weight is not own or held.data_ptr() != whole[rows].data_ptr():
                return True
        return False

    def _share_scales(self) -> None:
        """One scale for each input channel of all parts: powers of two, so that no number changes."""
        codes = [weight.codes for weight in self.weights() if isinstance(weight, Weight4)]
        columns = torch.stack([columns_of(one) for one in codes]).amax(0)
        rows = torch.cat([one.scale if isinstance(one, Codes8) else rows_of(one) for one in codes])
        for weight, one in zip(self.weights(), codes):
            assert isinstance(weight, Weight4)
            self._columns.append((weight, columns_of(one)))
            weight.codes = with_columns(one, columns)
        self._scales = rows, columns

    def weights(self) -> list[Tensor]:
        return [module.weight for module in self.modules]

    def bias(self) -> Tensor | None:
        """The modules' biases behind one another; zeros for a part that has none."""
        parts: list[Tensor | None] = [module.bias for module in self.modules]
        if all(part is None for part in parts):
            return None
        zeros = [torch.zeros(r.stop - r.start, dtype=self.dtype, device=self.device) for r in self.rows]
        whole = [zero if part is None else part.detach() for part, zero in zip(parts, zeros)]
        return whole[0] if len(whole) == 1 else torch.cat(whole)

    def dense(self) -> Tensor:
        """W (O, I); of coded weights in the shared buffer, until whoever decodes next."""
        if not self.coded:
            return self.weights()[0].detach() if self._whole is None else self._whole
        count, width = self.shape[0] * self.shape[1], self.shape[1]
        w = buffer(count, self.dtype, self.device)[:count]
        for weight, rows in zip(self.weights(), self.rows):
            assert isinstance(weight, Weight4)
            room = w[rows.start * width : rows.stop * width]
            made = weight.codes.decode(self.dtype, room)
            if not same_memory(made, room):  # a dtype that codes are not decoded to
                room.copy_(made.view(-1))
        return w.view(self.shape)

    def codes(self, *, turned: bool) -> tuple[Tensor, Tensor]:
        """W (O, I) in 8 bits, or W^T (I, O), and the scale of each row; until whoever decodes next."""
        assert self._scales is not None
        scale = self._scales[turned]
        if self._whole is not None and not turned:
            return self._whole, scale
        first = self.weights()[0]
        assert isinstance(first, Weight4)
        if len(self.modules) == 1:
            return first.codes.eight(turned)[0], scale
        shape = self.shape[::-1] if turned else self.shape
        count = shape[0] * shape[1]
        w8 = buffer(count, E4M3, self.device)[:count].view(shape)
        for weight, own in zip(self.weights(), self.rows):
            assert isinstance(weight, Weight4)
            weight.codes.eight(turned, w8[:, own] if turned else w8[own])
        return w8, scale

    def times(self, x: Shown, low: Pair | None = None, onto: Tensor | None = None) -> Tensor:
        """x W^T + bias, and what is added to it, (T, O): z b^T of low = (z, b), and a tensor."""
        bias = self.bias()
        if not self.fp8:
            assert x.dense is not None
            if low is None and onto is None:
                return F.linear(x.dense, self.dense(), bias)
            start = bias if onto is None else onto if bias is None else onto + bias
            if low is None:
                assert start is not None
                return torch.addmm(start, x.dense, self.dense().T)
            if onto is None:
                y = low[0] @ low[1].T if bias is None else torch.addmm(bias, low[0], low[1].T)
            else:
                assert start is not None
                y = add_low(start, low)
            return y.addmm_(x.dense, self.dense().T)  # the wide product last: it adds as it writes
        assert x.codes is not None
        y = matmul8(x.codes, *self.codes(turned=False), self.dtype)
        y = y if bias is None else y.add_(bias)
        if low is not None:
            return add_low(y, low, y=onto, over=True)
        return y if onto is None else y.add_(onto)

    def back(self, dy: Shown, low: Pair | None = None) -> Tensor:
        """dy W, and z a of low = (z, a) added, (T, I)."""
        if not self.fp8:
            assert dy.dense is not None
            if low is None:
                return dy.dense @ self.dense()
            return (low[0] @ low[1]).addmm_(dy.dense, self.dense())
        assert dy.codes is not None
        dx = matmul8(dy.codes, *self.codes(turned=True), self.dtype)
        if low is None:
            return dx
        fused = len(low[1]) in FUSED_RANKS
        return add_low(dx, low, turned=True, over=True) if fused else dx.addmm_(*low)


def kept_rows(weight: Tensor) -> Tensor | None:
    """What a weight keeps, row by row: its numbers or its codes in 8 bits; None for 4 bits."""
    if not isinstance(weight, Weight4):
        return weight.detach()
    return weight.codes.codes if isinstance(weight.codes, Codes8) else None


def keep_rows(weight: Tensor, rows: Tensor) -> None:
    if isinstance(weight, Weight4):
        assert isinstance(weight.codes, Codes8)
        weight.codes = replace(weight.codes, codes=rows)
    else:
        weight.data = rows


def same_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


def rows_of(codes: Codes) -> Tensor:
    assert codes.channels is not None
    return codes.channels[0]


def columns_of(codes: AnyCodes) -> Tensor:
    columns = codes.columns if isinstance(codes, Codes8) else codes.channels and codes.channels[1]
    assert columns is not None
    return columns


def with_columns(codes: AnyCodes, columns: Tensor) -> AnyCodes:
    if isinstance(codes, Codes8):
        return replace(codes, columns=columns)
    return replace(codes, channels=(rows_of(codes), columns))
