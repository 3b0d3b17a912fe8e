"""Pairs a Triton operation with the torch definition that it must equal, and chooses between them by device.

    @twin(definition)
    def operation(...):                         the same signature; imports its kernels when it is called
        from . import operation_triton
        ...

Tensors on a GPU go to the kernels, all others to the definition. Triton is never imported until a kernel
is chosen, so that a machine without it can do everything else.

raises  TypeError at import if the two signatures differ
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Path = Literal["triton", "torch"]
Operation = TypeVar("Operation", bound=Callable[..., Any])

PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}  # name: definition, kernels
_forced: list[Path] = []  # the innermost choice of `forced` is last


def twin(definition: Operation) -> Callable[[Operation], Operation]:
    """Decorates the operation that runs the kernels; what it gives chooses by the first tensor's device."""

    def pair(kernels: Operation) -> Operation:
        if inspect.signature(definition) != inspect.signature(kernels):
            raise TypeError(
                f"{kernels.__qualname__} and {definition.__qualname__} differ in their signatures"
            )

        @functools.wraps(kernels)
        def operation(*args: Any, **kwargs: Any) -> Any:
            chosen = kernels if path_of(_device(args, kwargs))[0] == "triton" else definition
            return chosen(*args, **kwargs)

        PAIRS[f"{kernels.__module__}.{kernels.__qualname__}"] = (definition, kernels)
        return operation  # type: ignore[return-value]

    return pair


def path_of(device: torch.device) -> tuple[Path, str]:
    """Which of the two runs on a device, and why, in a few words."""
    if _forced:
        return _forced[-1], "asked for"
    if device.type != "cuda":
        return "torch", "the kernels need a CUDA GPU"
    if not has_triton():
        return "torch", "triton is not installed"
    return "triton", "on the GPU"


@contextmanager
def forced(path: Path) -> Iterator[None]:
    """Every pair takes this path inside, whatever the device; kernels on a CPU need TRITON_INTERPRET=1."""
    _forced.append(path)
    try:
        yield
    finally:
        _forced.pop()


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.device
    raise TypeError("an operation on tensors was called without one")
