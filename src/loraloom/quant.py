"""Frozen weights in 4 or 8 bits that stand where dense ones stood: `module.weight` keeps its name, shape and dtype.

    W[i] = table[code[i]] * absmax[i // block]          y = x W^T, dequantised anew in each product
    W[o, i] = code[o, i] * scale[o]                     fp8 (`weights8`)

Products are taken in the dtype that the weight stands for, or in 8-bit floats where the codes know their channels'
scales (`with_channels`). `Weight4` is a tensor that has no dense storage. The layers' own code (`F.linear`, Conv1D's
`addmm`, an expert's slice of a fused tensor) finds its products defined; whatever else wants the numbers must ask
`dense`, so that no dense copy is made unseen.

shapes  (O, I) a matrix, coded row by row; (E, O, I) fused experts, each coded by itself
units   absmax in weight units, one for each block of a row-major matrix
source  QLoRA, arXiv:2305.14314, section 3; the layout is bitsandbytes'
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels.fp8 import E4M3
from .kernels.matmul_frozen import buffer, matmul_frozen
from .kernels.quant4 import (
    Scales8,
    channel_scale,
    dequantize4,
    dequantize4_fp8,
    quantize4,
    quantize_scales,
)
from .kernels.scales8 import dequantize_part
from .weights8 import Codes8, encode8

WIDE = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels write
PIECE = 2**22  # weights in a piece of a matrix that must not be dense as a whole: 16 MiB in float32


@dataclass(frozen=True)
class Codes:
    """A coded matrix, or one for each of E experts, with a leading E on every tensor.

    shapes  packed (H,) uint8, two codes a byte; absmax (G,) float32, or its 8-bit form; channels (O,) and (I,)
            float32, the scales of rows and columns in 8-bit floats, where products are taken in them
    """

    packed: Tensor
    scales: Tensor | Scales8
    table: str
    block: int
    shape: tuple[int, int]  # (O, I) of one matrix
    channels: tuple[Tensor, Tensor] | None = None

    def tensors(self) -> Iterator[Tensor]:
        yield self.packed
        if isinstance(self.scales, Tensor):
            yield self.scales
        else:
            yield from (self.scales.code_G, self.scales.absmax_S, self.scales.offset)
        yield from self.channels or ()

    def map(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """The same with every tensor changed, such as moved."""
        packed, *rest = (change(tensor) for tensor in self.tensors())
        channels = None
        if self.channels is not None:
            *rest, rows, columns = rest
            channels = (rows, columns)
        scales = rest[0] if len(rest) == 1 else Scales8(*rest)
        return replace(self, packed=packed, scales=scales, channels=channels)

    @property
    def experts(self) -> int | None:
        """E, or None for a single matrix."""
        return len(self.packed) if self.packed.dim() == 2 else None

    @property
    def numel(self) -> int:
        """Weights of one matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def settings(self) -> dict[str, object]:
        """The settings that give such codes."""
        double = isinstance(self.scales, Scales8)
        return {"model.quantize": self.table, "model.double_quant": double, "model.quant_block": self.block}

    @property
    def grain(self) -> str:
        """What shares a scale, in words."""
        return f"in blocks of {self.block}"

    def expert(self, index: int) -> Codes:
        """One expert's matrix: views, no copies."""
        return self.map(lambda tensor: tensor[index])

    def decode(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The dense matrix (O, I), or (E, O, I); in the flat buffer `out` if there is one."""
        if self.experts is not None:
            return torch.stack([self.expert(e).decode(dtype) for e in range(self.experts)])
        wide = dtype if dtype in WIDE else torch.float32
        held = out if out is not None and wide == dtype else None
        w_OI = dequantize4(
            self.packed,
            self.scales,
            table=self.table,
            shape=self.shape,
            block=self.block,
            dtype=wide,
            out=held,
        )
        return w_OI.to(dtype)

    def lines(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows of one matrix, dense: nothing is decoded but the blocks that they lie in."""
        length = self.shape[1]
        first, last = start * length // self.block, -(-stop * length // self.block)
        low, high = first * self.block, min(last * self.block, self.numel)
        held = self.scales
        w_N = dequantize4(
            self.packed[low // 2 : -(-high // 2)],
            held[first:last] if isinstance(held, Tensor) else dequantize_part(held, first, last),
            table=self.table,
            shape=(high - low,),
            block=self.block,
            dtype=dtype if dtype in WIDE else torch.float32,
        )
        return w_N[start * length - low : stop * length - low].view(-1, length).to(dtype)

    @property
    def multiplies8(self) -> bool:
        """Whether products are taken in 8 bits."""
        return self.channels is not None

    def with_channels(self) -> Codes:
        """The same, to be multiplied in 8 bits both ways."""
        if self.experts is not None:
            return stack([self.expert(e).with_channels() for e in range(self.experts)])
        form: dict[str, Any] = {"table": self.table, "shape": self.shape, "block": self.block}
        rows, columns = (channel_scale(self.packed, self.scales, **form, dim=dim) for dim in (0, 1))
        return replace(self, channels=(rows, columns))

    def without_channels(self) -> Codes:
        return replace(self, channels=None)

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """The scales of the rows and of the columns in 8-bit floats."""
        if self.channels is None:
            raise ValueError("the scales of channels are not there: `with_channels` measures them")
        return self.channels

    def eight(self, turned: bool, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(O, I) and its rows' scale, or the transpose (I, O) and its own; see `kernels.matmul_frozen.Coded`."""
        scale = self.both[turned]
        w8 = dequantize4_fp8(
            self.packed,
            self.scales,
            scale,
            table=self.table,
            shape=self.shape,
            block=self.block,
            transposed=turned,
            out=buffer(self.numel, E4M3, self.packed.device) if out is None else out,
        )
        return w8, scale


AnyCodes = Codes | Codes8


def encode(w: Tensor, *, table: str = "nf4", block: int = 64, double: bool = True) -> AnyCodes:
    """Quantise a matrix (O, I), or fused experts (E, O, I) one by one, on the device they are on.

    table   nf4, fp4, e2m1 or fp8, which has neither blocks nor scales in 8 bits
    double  keep the scales in 8 bits

    raises  ValueError if a weight is not finite
    """
    if w.dim() == 3:
        return stack([encode(one, table=table, block=block, double=double) for one in w])
    if table == Codes8.table:
        return encode8(w)
    packed_H, absmax_G = quantize4(w, table=table, block=block)
    scales = quantize_scales(absmax_G) if double else absmax_G
    return Codes(packed_H, scales, table, block, (w.shape[0], w.shape[1]))


def stack(parts: Sequence[AnyCodes]) -> Any:
    """The codes of several matrices of one shape as those of fused experts."""
    columns = [torch.stack(tensors) for tensors in zip(*(part.tensors() for part in parts))]
    fresh = iter(columns)
    return parts[0].map(lambda _: next(fresh))


class Weight4(Tensor):
    """A frozen weight in 4 bits, or 8, with the shape and dtype of the dense one it stands for.

    codes    of the matrix as it is quantised, rows along the inputs
    flipped  whether this tensor is the transpose of the coded matrix (Conv1D keeps W as (I, O))
    """

    codes: AnyCodes
    flipped: bool

    @staticmethod
    def __new__(cls, codes: AnyCodes, dtype: torch.dtype, flipped: bool = False) -> Weight4:
        shape = codes.shape[::-1] if flipped else codes.shape
        whole = shape if codes.experts is None else (codes.experts, *shape)
        self = Tensor._make_wrapper_subclass(cls, whole, dtype=dtype, device=codes.packed.device)
        self.codes, self.flipped = codes, flipped
        return self

    @property
    def nbytes_stored(self) -> int:
        """Bytes that this weight really takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.codes.tensors())

    @property
    def fp8(self) -> bool:
        """Whether products with it are taken in 8-bit floats, forward and backward."""
        return self.codes.multiplies8

    def again(
        self, codes: AnyCodes | None = None, dtype: torch.dtype | None = None, flip: bool = False
    ) -> Weight4:
        """Another tensor on the same or other codes."""
        return Weight4(codes or self.codes, dtype or self.dtype, self.flipped != flip)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Weight4({self.codes.table}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = FUNCTIONS.get(func)
        if own is not None:
            return own(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        own = OPERATIONS.get(func)
        if own is None:
            # a TypeError would be taken for the other operand's turn
            raise RuntimeError(
                f"{func} is not defined for a quantised weight: ask loraloom.quant.dense for the numbers"
            )
        return own(*args, **(kwargs or {}))

    # torch moves tensors of this kind by exchanging them whole (nn.Module.to)
    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = [f"part{number}" for number, _ in enumerate(self.codes.tensors())]
        for name, tensor in zip(names, self.codes.tensors()):
            self.__dict__[name] = tensor
        return names, (self.codes, self.dtype, self.flipped)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], about: Any, size: Any, stride: Any) -> Weight4:
        codes, dtype, flipped = about
        parts = iter(inner.values())
        return Weight4(codes.map(lambda _: next(parts)), dtype, flipped)


def product(x: Tensor, w: Weight4, bias: Tensor | None, *, transposed: bool) -> Tensor:
    """x w^T + bias if transposed, else x w + bias."""
    if not isinstance(w, Weight4) or isinstance(x, Weight4):
        raise RuntimeError("a quantised weight can only be the right side of a product")
    if w.codes.experts is not None:
        raise RuntimeError(
            "fused experts are multiplied one by one where they are quantised: set experts_implementation=eager"
        )
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # as for a dense weight
        fast = torch.get_autocast_dtype(device)
        x, bias = x.to(fast), None if bias is None else bias.to(fast)
    elif x.dtype != w.dtype:
        raise RuntimeError(f"the input is {x.dtype}, the quantised weight stands for {w.dtype}")
    return matmul_frozen(x, w.codes, w.flipped == transposed, bias, eight=w.fp8)


def linear(input: Tensor, weight: Weight4, bias: Tensor | None = None) -> Tensor:
    return product(input, weight, bias, transposed=True)


def matmul(input: Tensor, other: Tensor) -> Tensor:
    if isinstance(input, Weight4) and not isinstance(other, Weight4):  # w x, as Mamba multiplies
        return product(other.mT, input, None, transposed=True).mT
    return product(input, other, None, transposed=False)  # type: ignore[arg-type]


def addmm(input: Tensor, mat1: Tensor, mat2: Weight4) -> Tensor:
    return product(mat1, mat2, input, transposed=False)


def item(w: Weight4, index: Any) -> Weight4:
    """w[...] and, of fused experts, w[e]."""
    if index is Ellipsis or index == ():
        return w
    if w.codes.experts is None or not (
        isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0)
    ):
        raise RuntimeError(f"a quantised weight has no slice {index!r}")
    return w.again(w.codes.expert(int(index)))


def transpose(w: Weight4) -> Weight4:
    return w.again(flip=True)


def contiguous(w: Weight4) -> Weight4:
    return w


def copied(w: Weight4, **about: Any) -> Weight4:
    """The weight elsewhere, or standing for another dtype; the codes stay what they are."""
    device = about.get("device")
    codes = w.codes if device is None else w.codes.map(lambda tensor: tensor.to(device))
    if codes is w.codes:
        codes = w.codes.map(torch.clone)
    return w.again(codes, about.get("dtype"))


FUNCTIONS: dict[Any, Any] = {
    F.linear: linear,
    torch.addmm: addmm,
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    Tensor.__getitem__: item,
    Tensor.t: transpose,
    Tensor.T.__get__: transpose,  # type: ignore[attr-defined]
    Tensor.contiguous: contiguous,
}


def not_shared(*_: Any) -> None:
    raise RuntimeError("a quantised weight cannot be shared between processes: load it in each of them")


FUNCTIONS[Tensor.share_memory_] = not_shared
aten = torch.ops.aten
OPERATIONS: dict[Any, Any] = {
    aten.detach.default: Weight4.again,
    aten.alias.default: Weight4.again,
    aten.clone.default: lambda w, **_: copied(w),
    aten._to_copy.default: copied,
}


def quantized(
    w: Tensor, *, table: str = "nf4", block: int = 64, double: bool = True, flipped: bool = False
) -> nn.Parameter:
    """A dense weight as a frozen parameter in 4 bits, or 8.

    flipped  the weight is kept as (I, O), so its transpose is what is coded
    """
    codes = encode(w.detach().T if flipped else w.detach(), table=table, block=block, double=double)
    return nn.Parameter(Weight4(codes, w.dtype, flipped), requires_grad=False)


def dense(w: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers of any weight, detached: a quantised one is decoded straight to `dtype`, its own if None."""
    if not isinstance(w, Weight4):
        return w.detach() if dtype is None else w.detach().to(dtype)
    m = w.codes.decode(dtype or w.dtype)
    return m.transpose(-1, -2) if w.flipped else m


def pieces(w: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """A frozen matrix part by part, so that it is never dense, or in `dtype`, as a whole.

    Yields (rows, columns, the numbers there). A part is some whole lines of memory, at most PIECE weights: rows
    of w, or columns where w is the transpose of what is stored.
    """
    w = w.detach()
    turned = w.flipped if isinstance(w, Weight4) else w.stride(0) < w.stride(1)
    count, length = (w.shape[1], w.shape[0]) if turned else (w.shape[0], w.shape[1])
    step = max(1, PIECE // length)
    for start in range(0, count, step):
        lines = slice(start, min(start + step, count))
        if isinstance(w, Weight4):
            part = w.codes.lines(lines.start, lines.stop, dtype)
        else:
            part = (w.T if turned else w)[lines].to(dtype)
        yield (slice(None), lines, part.T) if turned else (lines, slice(None), part)


def stored_bytes(w: Tensor) -> int:
    """Bytes that a tensor takes."""
    return w.nbytes_stored if isinstance(w, Weight4) else w.numel() * w.element_size()


def bits_per_parameter(model: nn.Module) -> float | None:
    """Bits of the quantised weights, scales included; None if there are none."""
    held = [p for p in model.parameters() if isinstance(p, Weight4)]
    return 8 * sum(map(stored_bytes, held)) / sum(p.numel() for p in held) if held else None
