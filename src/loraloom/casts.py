"""Frozen tensors in the dtype of the computation: each cast once, however many layers use it.

A layer that casts for itself keeps its copy until its backward pass, so that a tensor which stands once in
memory would stand there once for each layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Casts:
    """The casts of frozen tensors and of slices of them; each lives as long as the tensor it is of."""

    def __init__(self) -> None:
        self._made: Any = WeakTensorKeyDictionary()  # by whole tensor, then by dtype: (stamp, cast)

    def __call__(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in another dtype; itself if there is nothing to cast."""
        if tensor.dtype == dtype or not tensor.is_floating_point():
            return tensor
        if tensor.requires_grad or torch.compiler.is_compiling():
            return tensor.to(dtype)
        whole = tensor if tensor._base is None else tensor._base
        if not whole.is_contiguous():
            return tensor.to(dtype)
        stamp = whole.data_ptr(), whole.device, whole.dtype, whole.shape, whole._version
        made = self._made.setdefault(whole, {})
        if dtype not in made or made[dtype][0] != stamp:
            with torch.inference_mode(False), torch.no_grad():  # a later backward pass may need it
                made[dtype] = stamp, whole.detach().to(dtype)
        cast = made[dtype][1]
        if tensor is whole:
            return cast
        return cast.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
