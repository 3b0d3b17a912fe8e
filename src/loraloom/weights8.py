"""Matrices in 8-bit floats, e4m3, with one scale an output channel: half of 16 bits, and 2.7 times nearer than nf4.

    scale[o] = 2^ceil(log2(max_i |w[o, i]| / 448))        w[o, i] ~ codes[o, i] * scale[o]

Scales are powers of two, so that the transpose, whose scales are those of input channels, holds the same numbers.

shapes  (O, I) a matrix; (E, O, I) fused experts, each coded by itself
units   scale in weight units
raises  ValueError if weights are not finite
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .kernels.fp8 import E4M3, power_of_two, quantize_rows, turn8
from .kernels.matmul_frozen import buffer


@dataclass(frozen=True)
class Codes8:
    """A matrix in 8-bit floats, or one for each of E experts, with a leading E on every tensor.

    shapes  codes (O, I) float8_e4m3fn; scale (O,) float32; columns (I,) float32, the scales of the transpose, where
            products are taken in 8 bits
    """

    codes: Tensor
    scale: Tensor
    columns: Tensor | None = None
    table: ClassVar[str] = "fp8"

    @property
    def packed(self) -> Tensor:
        return self.codes

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of one matrix."""
        return self.codes.shape[-2], self.codes.shape[-1]

    @property
    def experts(self) -> int | None:
        """E, or None for a single matrix."""
        return len(self.codes) if self.codes.dim() == 3 else None

    @property
    def numel(self) -> int:
        """Weights of one matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def settings(self) -> dict[str, object]:
        """The settings that give such codes."""
        return {"model.quantize": self.table}

    @property
    def grain(self) -> str:
        """What shares a scale, in words."""
        return "with one scale an output channel"

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.codes, self.scale)
        if self.columns is not None:
            yield self.columns

    def map(self, change: Callable[[Tensor], Tensor]) -> Codes8:
        """The same with every tensor changed, such as moved."""
        return Codes8(*(change(tensor) for tensor in self.tensors()))

    def expert(self, index: int) -> Codes8:
        """One expert's matrix: views, no copies."""
        return self.map(lambda tensor: tensor[index])

    def decode(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The dense matrix (O, I), or (E, O, I); in the flat buffer `out` if there is one."""
        if out is None or out.dtype != dtype:
            w = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        else:
            w = out[: self.codes.numel()].view(self.codes.shape)
        return w.copy_(self.codes).mul_(self.scale[..., None])

    def lines(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows of one matrix, dense."""
        return self.codes[start:stop].to(dtype).mul_(self.scale[start:stop, None])

    @property
    def multiplies8(self) -> bool:
        """Whether products are taken in 8 bits."""
        return self.columns is not None

    def with_channels(self) -> Codes8:
        """The same, to be multiplied in 8 bits both ways."""
        if self.experts is not None:
            parts = [self.expert(e).with_channels().columns for e in range(self.experts)]
            return replace(self, columns=torch.stack([part for part in parts if part is not None]))
        if self.codes.is_meta:
            return replace(self, columns=self.scale.new_empty(self.shape[1]))
        amax = self.scale.new_zeros(self.shape[1])
        for start in range(0, self.shape[0], LINES):
            amax = torch.maximum(amax, self.lines(start, start + LINES, torch.float32).abs_().amax(0))
        return replace(self, columns=power_of_two(amax))

    def without_channels(self) -> Codes8:
        return replace(self, columns=None)

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """The scales of the rows and of the columns in 8-bit floats."""
        if self.columns is None:
            raise ValueError("the scales of input channels are not there: `with_channels` measures them")
        return self.scale, self.columns

    def eight(self, turned: bool, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(O, I) and its rows' scale, or the transpose (I, O) and its own; see `kernels.matmul_frozen.Coded`."""
        if not turned:
            return (self.codes if out is None else self.copied(out)), self.scale
        columns = self.both[1]
        room = buffer(self.numel, E4M3, self.codes.device) if out is None else out
        return turn8(self.codes, self.scale, columns, room), columns

    def copied(self, out: Tensor) -> Tensor:
        """The codes in a flat buffer, or in a matrix with whole rows."""
        place = out[: self.numel].view(self.shape) if out.dim() == 1 else out
        return place.copy_(self.codes)


LINES = 256  # rows that are dense at once while channels are measured


def encode8(w_OI: Tensor) -> Codes8:
    """A matrix in 8-bit floats, on the device it is on.

    raises  ValueError naming how many weights are not finite
    """
    w_OI = w_OI.float() if w_OI.dtype.itemsize in (1, 8) else w_OI
    if not w_OI.is_meta and not torch.stack(torch.aminmax(w_OI)).isfinite().all():
        raise ValueError(f"{int((~w_OI.isfinite()).sum()):,} of {w_OI.numel():,} weights are not finite")
    rows = quantize_rows(w_OI, power=True)
    return Codes8(rows.codes, rows.scale)
