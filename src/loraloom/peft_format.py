"""How an adapter stands in PEFT's format: the key and shape of each tensor, and the settings.

q, k or v of a fused projection make one block: A is stacked, B has a column block for each role with zeros
elsewhere, r grows with the number of roles and alpha so that the scale stays.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import methods
from .adapt import Adapters
from .adapter import Adapter
from .errors import UserError
from .layers import Conv1DLayer, Conv2dLayer, EmbeddingLayer
from .methods.base import Site
from .methods.lora import LoRA
from .peft_config import matches
from .targets import is_tied

PREFIX = "base_model.model."
OWN = "loraloom.json"
EMBEDDING_KEYS = {"A": "lora_embedding_A", "B": "lora_embedding_B"}  # without .weight, as PEFT has it

# ---- tensors ------------------------------------------------------------------------------------------------


def file_tensors(adapters: Adapters, adapter: Adapter) -> dict[str, Tensor]:
    """Every tensor of the file by its key, contiguous, on the CPU, none sharing memory with another."""
    tensors: dict[str, Tensor] = {}
    for module, sites in by_module(adapter).items():
        for key, tensor in block(sites).items():
            tensors[f"{PREFIX}{module}.{file_suffix(sites[0], key)}"] = file_shape(sites[0], key, tensor)
    for full_name, tensor in adapters.overlaid(adapter.name):
        tensors[overlay_key(adapter, full_name)] = tensor
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}


def by_module(adapter: Adapter) -> dict[str, list[Site]]:
    """The sites of each module: one, or one for each role."""
    table: dict[str, list[Site]] = {}
    for key, site in adapter.sites.items():
        table.setdefault(adapter.roles[key].name, []).append(site)
    return table


def file_suffix(site: Site, tensor_name: str) -> str:
    keys = EMBEDDING_KEYS if isinstance(site.layer, EmbeddingLayer) else site.method.peft_keys
    if tensor_name not in keys:
        raise UserError(
            f"method {methods.name_of(site.method)} has no place for {tensor_name!r} in PEFT's format"
        )
    return keys[tensor_name]


def file_shape(site: Site, name: str, tensor: Tensor) -> Tensor:
    """A tensor in the shape of the file: for a convolution A is (r, I, kernel) and B is (O, r, 1, 1)."""
    if not isinstance(site.layer, Conv2dLayer):
        return tensor
    kernel = site.layer.whole_weight().shape[1:]
    return tensor.view(len(tensor), *kernel) if name == "A" else tensor[..., None, None]


def overlay_key(adapter: Adapter, full_name: str) -> str:
    """A module trained whole keeps its name; the bias of an adapted layer stands under base_layer."""
    module, _, leaf = full_name.rpartition(".")
    adapted = {target.name for target in adapter.roles.values()}
    return f"{PREFIX}{module}.base_layer.{leaf}" if module in adapted else PREFIX + full_name


def block(sites: Sequence[Site]) -> dict[str, Tensor]:
    """The tensors of a whole module: a site's own, or A stacked and B in blocks for several roles."""
    if len(sites) == 1 and sites[0].layer.rows is None:
        return dict(sites[0].p)
    return {
        "A": torch.cat([site.p["A"] for site in sites]),
        "B": torch.cat([site.layer.spread(site.p["B"]) for site in sites], dim=1),
    }


def unblock(sites: Sequence[Site], whole: Mapping[str, Tensor], where: str) -> list[dict[str, Tensor]]:
    """The inverse of `block`.

    raises  UserError if B is not zero outside the roles' rows
    """
    if len(sites) == 1 and sites[0].layer.rows is None:
        return [dict(whole)]
    sizes = [site.method.r for site in sites]
    parts, rest = [], whole["B"].clone()
    for site, a, b in zip(sites, whole["A"].split(sizes), whole["B"].split(sizes, dim=1)):
        assert site.layer.rows is not None
        rows = site.layer.rows.cpu()
        parts.append({"A": a, "B": b[rows]})
    start = 0
    for site, size in zip(sites, sizes):
        rest[site.layer.rows.cpu(), start : start + size] = 0  # type: ignore[union-attr]
        start += size
    if rest.any():
        raise UserError(f"{where}: B is not zero outside the rows of the roles that {OWN} names")
    return parts


def tidied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors without what PEFT writes twice: with `bias="all"` it also writes, under the names of its
    own wrappers, the biases of modules that are trained whole, and of the originals that they replace.
    """
    plain = {key: tensor for key, tensor in tensors.items() if ".original_module." not in key}
    names = {key: re.sub(r"\.modules_to_save\.[^.]+\.", ".", key) for key in plain}
    return {name: plain[name if name in plain else key] for key, name in names.items()}


def base_copy(model: nn.Module, key: str) -> Tensor | None:
    """The base's parameter that a key of the file names: PEFT writes whole tables beside adapted ones."""
    path = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    return dict(model.named_parameters(remove_duplicate=False)).get(path)


# ---- settings -----------------------------------------------------------------------------------------------


def peft_settings(adapters: Adapters, adapter: Adapter) -> dict[str, Any]:
    """adapter_config.json, as PEFT reads it.

    raises  UserError if PEFT has no such method
    """
    method = adapter.method
    if method.peft_type is None:
        raise UserError(f"method {methods.name_of(method)} has no place in PEFT's format")
    scales = {module: block_scale(sites) for module, sites in by_module(adapter).items()}
    (r, alpha), _ = Counter(scales.values()).most_common(1)[0]
    tied = is_tied(adapters.model)
    return {
        "peft_type": method.peft_type,
        "task_type": task_type(adapters.model),
        "inference_mode": True,
        "r": r,
        "lora_alpha": number(alpha),
        "lora_dropout": method.dropout,
        "target_modules": target_list(adapters.model, list(scales)),
        "rank_pattern": {anchored(m, scales): own_r for m, (own_r, _) in scales.items() if own_r != r},
        "alpha_pattern": {anchored(m, scales): number(a) for m, (_, a) in scales.items() if a != alpha},
        "bias": adapter.spec.bias,
        "modules_to_save": list(adapter.spec.modules_to_save) or None,
        "fan_in_fan_out": any(isinstance(site.layer, Conv1DLayer) for site in adapter.sites.values()),
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        **({"ensure_weight_tying": False} if tied else {}),
        **method.peft_config(),
    }


def block_scale(sites: Sequence[Site]) -> tuple[int, float]:
    """r and alpha of a whole module: for several roles r is the sum, and alpha keeps the scale.

    raises  UserError if the roles' scales differ: one block has one scale
    """
    own = [site.method for site in sites]
    if len(sites) == 1:
        return own[0].r, own[0].alpha
    assert all(isinstance(method, LoRA) for method in own)
    scales = {method.scale for method in own if isinstance(method, LoRA)}
    if len(scales) > 1:
        raise UserError(
            f"{sites[0].layer.name}: its roles have different scales {sorted(scales)}, PEFT has one a module"
        )
    r = sum(method.r for method in own)
    return r, scales.pop() * type(own[0]).denominator(r)  # type: ignore[attr-defined]


def number(value: float) -> float | int:
    """A whole number without its point, as people write it."""
    return int(value) if float(value).is_integer() else float(value)


def task_type(model: nn.Module) -> str | None:
    """How PEFT calls the model's task; None where its wrapper would train more than the adapter does.

    For classifiers PEFT takes a head of its own as trained, whether or not the folder holds one.
    """
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if name.endswith("ForConditionalGeneration") else None


def anchored(module: str, all_modules: Iterable[str]) -> str:
    """A pattern's key for one module: PEFT matches by ending, so a name that ends another one is anchored."""
    return f"^{module}" if any(name.endswith("." + module) for name in all_modules) else module


def target_list(model: nn.Module, chosen: Sequence[str]) -> list[str] | str:
    """What makes PEFT adapt just these modules: last names, else full names, else an expression."""
    names = [name for name, _ in model.named_modules()]
    for entries in (sorted({name.rpartition(".")[2] for name in chosen}), sorted(chosen)):
        if {name for name in names if matches(name, entries)} == set(chosen):
            return entries
    return "|".join(re.escape(name) for name in sorted(chosen))
