"""An adapter without its base: a tree of layers that have the shapes of the file's pairs, and no numbers.

PEFT's methods with a pair write A (R, I) and B (O, R) of each module; so the tree is known from the file. What
else a file holds, modules that are trained whole and biases, is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapt import Adapters
from .adapter_files import read_config
from .adapter_fill import fill_from_peft
from .adapter_io import read_tensors
from .errors import UserError
from .peft_config import spec_of
from .peft_tensors import PREFIX

PAIR = re.compile(r"(?P<module>.+)\.(?P<method>\w+)_A(?P<rest>\.weight)?")


def pair_tensors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """By module: A and B, as PEFT's methods with a pair write them."""
    found = {}
    for key, a in tensors.items():
        match = PAIR.fullmatch(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else None
        if match:
            b = tensors.get(f"{PREFIX}{match['module']}.{match['method']}_B{match['rest'] or ''}")
            if b is not None:
                found[match["module"]] = a, b
    return found


def bare_layers(folder: Path) -> dict[str, nn.Module]:
    """Layers of the shapes that an adapter's pairs have, without numbers.

    raises  UserError if the file has no pairs, or there is none that PEFT could read
    """
    shapes: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for name, (a, b) in sorted(pair_tensors(read_tensors(folder, allow_pickle=False)).items()):
            if a.dim() == 4:
                shapes[name] = nn.Conv2d(a.shape[1], b.shape[0], tuple(a.shape[2:]), bias=False)  # type: ignore[arg-type]
            elif name.rpartition(".")[2].startswith(("embed", "wte", "wpe")):
                shapes[name] = nn.Embedding(a.shape[1], b.shape[0])
            else:
                shapes[name] = nn.Linear(a.shape[1], b.shape[0], bias=False)
    if not shapes:
        raise UserError(
            f"without its base nothing can be said of {folder}: its file has no pairs A, B",
            hint="name the base: --model ID_OR_FOLDER",
        )
    return shapes


def tree(layers: Mapping[str, nn.Module]) -> nn.Module:
    """Modules that hold these layers under their names."""
    root = nn.Module()
    for name, layer in layers.items():
        *path, leaf = name.split(".")
        place = root
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(leaf, layer)
    return root


def read_as_peft(adapters: Adapters, folder: Path, name: str) -> None:
    """Put the pairs of PEFT's file on the tree; what is trained whole beside them is left out."""
    config = read_config(folder) | {"modules_to_save": None, "bias": "none"}
    tensors = read_tensors(folder, allow_pickle=False)
    held = pair_tensors(tensors)
    own = {key: value for key, value in tensors.items() if module_of(key, held) is not None}
    spec = replace(spec_of(adapters.model, config, folder), target_modules=sorted(held))
    adapter = adapters.add(name, spec, blank=True, starting=False)
    fill_from_peft(adapters, adapter, own, folder, config)


def module_of(key: str, held: Mapping[str, Any]) -> str | None:
    """The module that a tensor of PEFT's file belongs to, if it is one of those."""
    path = key.removeprefix(PREFIX)
    parts: Sequence[str] = path.split(".")
    return next((name for cut in range(len(parts)) if (name := ".".join(parts[:cut])) in held), None)
