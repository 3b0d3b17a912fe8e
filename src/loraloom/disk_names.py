"""Weights handed on under the names of transformers' checkpoints, which differ from a model's own.

A renaming may join or part tensors (experts above all), so it needs all of a decoder layer; more is never held.
"""

from __future__ import annotations

from torch import Tensor, nn

from .pretrained import on_disk
from .shards import ShardWriter


class Names:
    """Hands weights on under the names of transformers' checkpoints, a whole decoder layer at a time."""

    def __init__(self, model: nn.Module, writer: ShardWriter) -> None:
        self.model, self.writer = model, writer
        self.group = ""
        self.held: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        group = part_of(name)
        if group != self.group:
            self.flush()
        self.group = group
        self.held[name] = tensor

    def flush(self) -> None:
        named = on_disk(self.model, self.held)
        self.held = {}
        while named:
            name = next(iter(named))
            self.writer.add(name, named.pop(name))


def part_of(name: str) -> str:
    """The decoder layer of a weight, such as model.layers.3; its module if it is in none."""
    parts = name.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: -1 if number is None else number + 1])


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names of each parameter that has several, by each of them."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(names) for names in groups.values() if len(names) > 1 for name in names}
