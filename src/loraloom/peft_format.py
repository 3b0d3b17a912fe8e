"""What of an adapter PEFT can load, and adapter_config.json as we write it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .adapt import Adapters
from .adapter import Adapter
from .adapter_files import ALONE, LORA, PEFT
from .layers import Conv1DLayer
from .methods.base import LowRank, Method, Site
from .peft_config import matches
from .peft_tensors import PLAIN_LORA, by_module, export_rank, kept, pair_of, placed, whole
from .peft_types import TYPES
from .targets import is_tied, modules_named

PEFT_HEADS = ("classifier", "score")  # what PEFT trains of a classifier by itself

# ---- which form ---------------------------------------------------------------------------------------------


def form_of(adapter: Adapter) -> str:
    """The form of an adapter's files: PEFT's own tensors, else a plain LoRA that computes the same, else ours alone."""
    if is_peft(adapter):
        return PEFT
    return LORA if is_lora(adapter) else ALONE


def is_peft(adapter: Adapter) -> bool:
    """Whether PEFT has a place for every tensor of the adapter."""
    method, sites = adapter.method, list(adapter.sites.values())
    kind = TYPES.get(method.peft_type or "")
    if kind is None or not sites or (adapter.spec.bias != "none" and kind.bias is None):
        return False
    if kind.tokens and adapter.spec.modules_to_save:
        return False
    kinds = kind.layers(method.peft_config())
    if not all(type(site.layer) in kinds and kept(site) <= placed(site) for site in sites):
        return False
    ranks, alphas = {site.method.r for site in sites}, {site.method.alpha for site in sites}
    if len(ranks) > 1 and "rank_pattern" not in kind.patterns:
        return False
    if len(alphas) > 1 and "alpha_pattern" not in kind.patterns and kind.alpha is not None:
        return False
    if any(len({id(site.p[name]) for site in sites}) > 1 for name in method.peft_shared):
        return False
    return all(whole(parts) or is_block(parts) for parts in by_module(adapter).values())


@torch.no_grad()
def is_block(sites: Sequence[Site]) -> bool:
    """Whether the roles of one module are plain LoRAs of one scale, which make one block."""
    plain = all(dict(site.method.peft_keys) == PLAIN_LORA and kept(site) == {"A", "B"} for site in sites)
    return plain and len({scale_of(site) for site in sites}) == 1


@torch.no_grad()
def is_lora(adapter: Adapter) -> bool:
    """Whether a plain LoRA computes the same on every layer, and for every token."""
    kinds = TYPES["LORA"].kinds
    if not adapter.sites or any(adapter.method.inserts()):
        return False
    return all(
        isinstance(site.method, LowRank)
        and not site.method.per_token
        and type(site.method).enter is Method.enter
        and type(site.layer) in kinds
        and pair_of(site).gain is None
        for site in adapter.sites.values()
    )


# ---- settings -----------------------------------------------------------------------------------------------


def peft_settings(adapters: Adapters, adapter: Adapter, form: str = PEFT) -> dict[str, Any]:
    """adapter_config.json of an adapter in one of the two forms that PEFT loads."""
    method, model, spec = adapter.method, adapters.model, adapter.spec
    name = "LORA" if form == LORA else str(method.peft_type)
    kind = TYPES[name]
    saved = modules_named(model, spec.modules_to_save)
    if kind.tokens:
        width = next(iter(adapter.sites.values())).layer.out_features
        about = {
            "peft_type": name,
            "task_type": task_type(model, saved),
            "inference_mode": True,
            "token_dim": width,
        }
        return about | dict(kind.plain) | method.peft_config()
    modules = by_module(adapter)
    if form == LORA:
        rows = export_rank(adapter)
        scales, own = dict.fromkeys(modules, (rows, float(rows))), {}
    else:
        scales, own = {module: block_scale(sites) for module, sites in modules.items()}, method.peft_config()
    (r, alpha), _ = Counter(scales.values()).most_common(1)[0]
    ranks = {anchored(m, scales): own_r for m, (own_r, _) in scales.items() if own_r != r}
    alphas = {anchored(m, scales): number(a) for m, (_, a) in scales.items() if a != alpha}
    tied = "ensure_weight_tying" in kind.unread and is_tied(model)
    return {
        "peft_type": name,
        "task_type": task_type(model, saved),
        "inference_mode": True,
        "target_modules": target_list(model, list(scales)),
        # full names: PEFT takes an entry for every module whose name ends so, "norm" for input_layernorm too
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(isinstance(site.layer, Conv1DLayer) for site in adapter.sites.values()),
        **kind.plain,
        **own,
        kind.r: r,
        **({kind.alpha: number(alpha)} if kind.alpha else {}),
        **({kind.dropout: method.dropout} if kind.dropout else {}),
        **({"bias": kind.bias if spec.bias == "lora_only" else spec.bias} if kind.bias else {}),
        **({"rank_pattern": ranks} if "rank_pattern" in kind.patterns else {}),
        **({"alpha_pattern": alphas} if "alpha_pattern" in kind.patterns else {}),
        **({"ensure_weight_tying": False} if tied else {}),
    }


def agreed(method: Method, form: str) -> list[str]:
    """The settings in which adapter_config.json and our own file must say the same: what the adapter computes."""
    kind, own = (TYPES["LORA"], {}) if form == LORA else (TYPES[str(method.peft_type)], method.peft_config())
    common = ["peft_type", kind.r, *filter(None, (kind.alpha,)), *kind.special, *kind.patterns]
    return list(dict.fromkeys([*common, "bias", "modules_to_save", *own]))


def block_scale(sites: Sequence[Site]) -> tuple[int, float]:
    """r and alpha of a whole module: for several roles r is the sum, and alpha keeps the scale."""
    method = sites[0].method
    if len(sites) == 1:
        return method.r, method.alpha
    r = sum(site.method.r for site in sites)
    return r, scale_of(sites[0]) * (math.sqrt(r) if method.peft_config().get("use_rslora") else r)


@torch.no_grad()
def scale_of(site: Site) -> float:
    """What multiplies B A."""
    return float(pair_of(site).e)


def number(value: float) -> float | int:
    """A whole number without its point, as people write it."""
    return int(value) if float(value).is_integer() else float(value)


def task_type(model: nn.Module, saved: Sequence[str] = ()) -> str | None:
    """How PEFT calls the model's task; None where its wrapper would train more than the adapter does.

    For classifiers PEFT takes a head of its own as trained, whether or not the folder holds one.

    saved  the modules that the adapter trains whole
    """
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if name.endswith("ForSequenceClassification") and any(hasattr(model, head) for head in PEFT_HEADS):
        return "SEQ_CLS" if all(head in saved for head in PEFT_HEADS if hasattr(model, head)) else None
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
