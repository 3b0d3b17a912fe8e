"""torch.compile for decoder layers: their own code and their adapters', fused by torch's compiler.

One layer's code serves all layers alike, so the compiler runs a few times: for the first layer, whose input needs no
gradient, for the others, and for both again once a second size is seen. Attention stays as it is: it chooses kernels
by the lengths of documents, which differ from batch to batch. Passes without gradients run uncompiled.

source  tests/test_graphs.py: the same losses and weights
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from . import attention
from .errors import UserError
from .kernels.twin import has_triton
from .quant import Weight4

VARIANTS = 32  # of one layer's code, before torch would go on uncompiled


class Compiled:
    """A layer's forward: compiled where gradients are recorded, as it was elsewhere."""

    def __init__(self, inner: Callable[..., Any], backend: str) -> None:
        self.inner, self.__self__ = inner, getattr(inner, "__self__", None)
        self.compiled = torch.compile(inner, backend=backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.compiled if torch.is_grad_enabled() else self.inner)(*args, **kwargs)


def compile_layers(layers: Sequence[nn.Module], device: torch.device, *, backend: str = "inductor") -> str:
    """Compile the decoder layers that are not fused; says how many.

    layers  with their adapters; fused ones have an attribute `forward` that is not their class's

    raises  UserError if none can be compiled
    """
    uncompile(layers)
    plain = [layer for layer in layers if "forward" not in layer.__dict__]
    why = compile_reason(layers, plain, device)
    if why is not None:
        raise UserError(f"train.compile=true: {why}", hint="--set train.compile=false")
    import torch._dynamo  # the compiler takes seconds to import

    # the compiler itself looks at `.grad` of what enters a layer
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    if not getattr(attention.attend, "_torchdynamo_disable", False):
        attention.attend = torch.compiler.disable(attention.attend)
    for layer in plain:
        layer.__dict__["forward"] = Compiled(layer.forward, backend)
    return f"compiled layers: {len(plain)} of {len(layers)}, as the first steps run"


def uncompile(layers: Sequence[nn.Module]) -> None:
    """Give the layers their own code again."""
    for layer in layers:
        if isinstance(layer.__dict__.get("forward"), Compiled):
            del layer.__dict__["forward"]


def compile_reason(
    layers: Sequence[nn.Module], plain: Sequence[nn.Module], device: torch.device
) -> str | None:
    """Why nothing can be compiled, if so."""
    if not layers:
        return "the model's decoder layers are not found"
    if not plain:
        return "every decoder layer is fused, or an adapter's own: nothing is left to compile"
    if any(isinstance(parameter, Weight4) for layer in plain for parameter in layer.parameters()):
        return "quantised weights are decoded by code that the compiler cannot follow"
    if device.type == "cuda" and not has_triton():
        return "the compiler needs triton, which is not installed"
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        return "the compiler needs a C++ compiler, and there is no g++ here"
    return None


def compile_seconds() -> float:
    """Seconds that this process has spent compiling so far."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("total_wall_time", 0.0))
