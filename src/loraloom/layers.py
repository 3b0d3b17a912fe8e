"""Frozen layers as methods see them: a matrix W of shape (O, I), whatever the module's own layout.

A method never asks what kind of layer it sits on. It reads `weight()` and gives thin factors, which `down`
and `up` apply in the layer's own way: a product, a lookup, a convolution. Between the two, features are last.

shapes  O out, I in, R rank; x and y as the module takes and gives them; z is (..., R), features last
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .quant import Weight4, dense, pieces


class Layer:
    """A frozen `nn.Linear`, seen as (O, I); the other kinds change the layout only.

    rows  the output features that belong to this view (q, k or v of a fused projection), or None for all
    """

    def __init__(self, module: nn.Module, name: str, rows: Tensor | None = None) -> None:
        self.module, self.name, self.rows = module, name, rows
        self.key = name  # with the role behind it, where a projection's rows are adapted apart
        layout = torch.empty(self._tensor("weight").shape, device="meta")
        whole_O, self.in_features = self.matrix(layout).shape
        self.whole_features = whole_O  # of the module
        self.out_features = whole_O if rows is None else len(rows)  # of this view
        # of W's rows: the memory that W was in, its stamp, the sums
        self._squares: tuple[weakref.ref[Any], Any, Tensor] | None = None

    def _tensor(self, name: str) -> Tensor:
        tensor = getattr(self.module, name)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{self.name}.{name} is {type(tensor).__name__}, not a tensor")
        return tensor

    def matrix(self, w: Tensor) -> Tensor:
        """The module's weight as (O, I)."""
        return w

    def like_weight(self, w_OI: Tensor) -> Tensor:
        """A matrix (O, I) in the module's own layout: the inverse of `matrix`."""
        return w_OI

    def whole_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The module's weight, dense, in its own layout and dtype or another; 4 bits are dequantised."""
        return dense(self._tensor("weight"), dtype)

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W of this view, (O, I), frozen, in the module's dtype or another."""
        w_OI = self.matrix(self.whole_weight(dtype))
        return w_OI if self.rows is None else w_OI[self.rows]

    def bias(self) -> Tensor | None:
        """The bias of this view, (O,), or None."""
        bias = getattr(self.module, "bias", None)
        if not isinstance(bias, Tensor):
            return None
        return bias.detach() if self.rows is None else bias.detach()[self.rows]

    @property
    def device(self) -> torch.device:
        """Where the layer's weights are."""
        return next(self.module.parameters()).device

    def inputs(self, x: Tensor) -> Tensor:
        """x as rows of W's inputs, (..., I): what x W^T is taken of."""
        return x

    def times(self, a_RI: Tensor) -> Tensor:
        """W A^T, (O, R), in A's dtype, without a dense copy of W: what to use where W is not needed itself."""
        w_OI = self.matrix(self._tensor("weight").detach())
        a_RI = a_RI.to(w_OI.device)
        wa_OR = a_RI.new_zeros(self.whole_features, len(a_RI))
        for rows, columns, part in pieces(w_OI, a_RI.dtype):
            wa_OR[rows].addmm_(part, a_RI[:, columns].T)  # in place: autocast leaves it alone
        return wa_OR if self.rows is None else wa_OR[self.rows]

    def squares(self, dtype: torch.dtype) -> Tensor:
        """The sum of squares of each row of W, (O,); kept, and taken anew if the module's weight is another."""
        weight = self._tensor("weight").detach()
        held = weight.codes.packed if isinstance(weight, Weight4) else weight
        memory, stamp = held.untyped_storage(), (dtype, held.dtype, held._version)
        if self._squares is None or self._squares[0]() is not memory or self._squares[1] != stamp:
            w_OI = self.matrix(weight)
            sum_O = torch.zeros(self.whole_features, dtype=dtype, device=weight.device)
            for rows, _, part in pieces(w_OI, dtype):
                sum_O[rows] += part.square().sum(1)
            own_O = sum_O if self.rows is None else sum_O[self.rows]
            self._squares = weakref.ref(memory), stamp, own_O
        return self._squares[2]

    def down(self, x: Tensor, a_RI: Tensor) -> Tensor:
        """x A^T, (..., R)."""
        return F.linear(x, a_RI)

    def up(self, z: Tensor, b_OR: Tensor) -> Tensor:
        """z B^T, (..., O), features last."""
        return F.linear(z, b_OR)

    def last(self, y: Tensor) -> Tensor:
        """The module's output with features last."""
        return y

    def unlast(self, y: Tensor) -> Tensor:
        """The inverse of `last`."""
        return y

    def spread(self, part: Tensor, fill: float = 0.0) -> Tensor:
        """Rows of this view put in their places among all rows of the module; the others hold `fill`."""
        if self.rows is None:
            return part
        whole = part.new_full((self.whole_features, *part.shape[1:]), fill)
        return whole.index_copy(0, self.rows.to(part.device), part)

    takes_dropout = True  # a lookup has no features to drop


class Conv1DLayer(Layer):
    """transformers' Conv1D: a linear layer that keeps W as (I, O)."""

    def matrix(self, w: Tensor) -> Tensor:
        return w.T

    def like_weight(self, w_OI: Tensor) -> Tensor:
        return w_OI.T


class EmbeddingLayer(Layer):
    """A lookup: x one-hot over the vocabulary, W is (dim, vocab), the transpose of the table.

    `padding_idx` needs no care here: it stops the table's gradient, and A is trained for that token like
    for any other. `scale_grad_by_freq` and `sparse` would be ignored for A, so such tables are refused.
    """

    def matrix(self, w: Tensor) -> Tensor:
        return w.T

    def like_weight(self, w_OI: Tensor) -> Tensor:
        return w_OI.T

    def down(self, x: Tensor, a_RI: Tensor) -> Tensor:
        return self.scaled(F.embedding(x, a_RI.T))

    def scaled(self, z: Tensor) -> Tensor:
        """Rows as the module gives them: Gemma 3 scales inside its embedding."""
        scale = getattr(self.module, "embed_scale", None)
        return z if scale is None else z * scale.to(z.dtype) if isinstance(scale, Tensor) else z * scale

    takes_dropout = False


class Conv2dLayer(Layer):
    """A convolution: I is channels x kernel; A is a convolution to R channels, B one of kernel 1."""

    def matrix(self, w: Tensor) -> Tensor:
        return w.flatten(1)

    def like_weight(self, w_OI: Tensor) -> Tensor:
        return w_OI.view(self._tensor("weight").shape)

    def down(self, x: Tensor, a_RI: Tensor) -> Tensor:
        m = self.module
        assert isinstance(m, nn.Conv2d)
        kernel = a_RI.view(len(a_RI), *m.weight.shape[1:])
        padding: Any = m.padding
        if m.padding_mode != "zeros":
            x, padding = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode), 0
        return self.last(F.conv2d(x, kernel, None, m.stride, padding, m.dilation))

    def inputs(self, x: Tensor) -> Tensor:
        m = self.module
        assert isinstance(m, nn.Conv2d)
        mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
        images = F.pad(x if x.dim() == 4 else x[None], m._reversed_padding_repeated_twice, mode=mode)
        windows = F.unfold(images, m.kernel_size, m.dilation, 0, m.stride).mT  # (N, places, I)
        return windows.flatten(0, 1)

    def last(self, y: Tensor) -> Tensor:
        return y.movedim(-3, -1)

    def unlast(self, y: Tensor) -> Tensor:
        return y.movedim(-1, -3)


class BlockLayer(Layer):
    """A decoder block seen from outside: its output, the hidden states (..., D), and no weight of its own.

    ids    the token ids of the pass that runs, (B, T); None where the model is not called with ids
    vocab  rows of the model's own table of tokens
    """

    ids: Tensor | None = None

    def __init__(self, module: nn.Module, name: str, width: int, vocab: int) -> None:
        self.vocab = vocab
        self.module, self.name, self.rows, self.key = module, name, None, name
        self.in_features = self.out_features = self.whole_features = width

    def bias(self) -> Tensor | None:
        return None

    def ids_of_pass(self) -> Tensor:
        """raises  UserError if the model is not called with token ids"""
        if self.ids is None:
            raise UserError("an adapter here needs the token ids: call the model with input_ids")
        return self.ids

    takes_dropout = False


def kind_of(module: nn.Module) -> type[Layer] | None:
    """The view for a module, or None if it is no layer that can be adapted."""
    if isinstance(module, nn.Linear):
        # MultiheadAttention reads the weight of such a part and never calls it: an adapter would do nothing
        return None if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) else Layer
    if type(module).__name__ == "Conv1D" and hasattr(
        module, "nf"
    ):  # known by shape: transformers stays behind its door
        return Conv1DLayer
    if isinstance(module, nn.Embedding):
        return EmbeddingLayer
    if isinstance(module, nn.Conv2d):
        return Conv2dLayer
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether `all-linear` means this module."""
    return kind_of(module) in (Layer, Conv1DLayer)


def view(module: nn.Module, name: str, rows: Tensor | None = None) -> Layer:
    """The frozen layer behind a module.

    raises  UserError if the module cannot be adapted
    """
    kind = kind_of(module)
    if kind is None:
        raise UserError(
            f"{name} is a {type(module).__name__}, which cannot be adapted",
            hint="nn.Linear, Conv1D, nn.Embedding and nn.Conv2d can",
        )
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        raise UserError(f"{name} is a convolution in {module.groups} groups, which cannot be adapted")
    if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq or module.sparse):
        raise UserError(
            f"{name} is an embedding with max_norm, scale_grad_by_freq or sparse, which cannot be adapted",
            hint="max_norm rewrites the table in every forward pass, and the base must stay as it is",
        )
    plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    if isinstance(module, nn.Embedding) and not plain:
        raise UserError(
            f"{name} is a {type(module).__name__}, which looks up otherwise than nn.Embedding: it cannot be adapted"
        )
    if torch.is_floating_point(module.weight) is False:  # type: ignore[arg-type]
        raise UserError(f"{name} keeps its weight as {module.weight.dtype}, which cannot be adapted")
    return kind(module, name, rows)
