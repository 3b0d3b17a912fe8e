"""Write tensors as they come into safetensors files of a limited size, with the index for transformers."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import files

LIMIT = 4 << 30  # bytes per file
SMALL, LARGE = 1 << 16, 1 << 25  # bytes: too small for pages of its own; above glibc's largest mmap threshold


class ShardWriter:
    """`add` every tensor, then `finish`; at most one shard is in memory."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder = folder
        self.limit = limit
        self.waiting: dict[str, Tensor] = {}
        self.size = 0
        self.total = 0
        self.trimmed = 0  # `total` when freed memory was last given back
        self.written: list[list[str]] = []  # tensor names of each shard

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.waiting and self.size + size > self.limit:
            self.flush()
        self.waiting[name] = apart(tensor)
        self.size += size
        self.total += size
        if self.total - self.trimmed > self.limit // 32:
            self.trimmed = self.total
            give_back_memory()

    def flush(self) -> None:
        path = self.path(len(self.written))
        save_file(self.waiting, path, metadata={"format": "pt"})
        path.chmod(self.folder.stat().st_mode & 0o666)  # safetensors makes it unreadable to others
        self.written.append(list(self.waiting))
        self.waiting, self.size = {}, 0

    def path(self, number: int) -> Path:
        return self.folder / f"shard-{number}.safetensors"

    def finish(self) -> None:
        """Write the last shard and give all their final names, which say how many there are."""
        self.flush()
        count = len(self.written)
        if count == 1:
            self.path(0).rename(self.folder / "model.safetensors")
            return
        where = {}
        for number, names in enumerate(self.written):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self.path(number).rename(self.folder / final)
            where.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self.total}, "weight_map": where}
        files.write_json(self.folder / "model.safetensors.index.json", index)


def give_back_memory() -> None:
    """Let the system have what was freed: glibc keeps it, and seldom uses it for aligned memory of other sizes."""
    trim = trimmer()
    if trim is not None:
        trim(0)


@cache
def trimmer() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None where there is no glibc."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def apart(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own.

    What waits on the heap, among what comes and goes, would keep the heap from shrinking: it gets pages of its own.
    The system's allocator gives such pages to large tensors by itself.
    """
    size = tensor.numel() * tensor.element_size()
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == size
    if alone and size >= LARGE:
        return tensor
    if size < SMALL:
        return tensor.clone(memory_format=torch.contiguous_format)
    pages = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    return pages.view(tensor.dtype).view(tensor.shape).copy_(tensor)
