"""adapter_config.json as PEFT writes it, in our settings; what we cannot honour is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .adapter import AdapterSpec
from .errors import UserError
from .layers import is_linear, kind_of
from .targets import output_head

CONFIG = "adapter_config.json"

# Settings that change what the adapter computes, and the values under which they do not.
UNREAD: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "ensure_weight_tying": (False, None),
}
# Inits that change the base's weights, so that the adapter means nothing on the base as published.
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder.

    raises  UserError if there is none, or it is no LoRA that we can honour
    """
    path = folder / CONFIG
    if not path.is_file():
        what = "is not a folder" if not folder.is_dir() else f"has no {CONFIG}: it is no adapter"
        raise UserError(f"{folder} {what}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is a {type(config).__name__}, not an object with settings")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder} is a {kind} adapter, which cannot be read yet", hint="LORA can")
    set_ = [
        f"{key} = {config[key]}" for key, off in UNREAD.items() if key in config and config[key] not in off
    ]
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(BASE_CHANGING):
        set_.append(f"init_lora_weights = {init}: it changed the base's weights")
    if set_:
        raise UserError(f"{folder} uses what cannot be honoured", details=set_)
    return config


def spec_of(model: nn.Module, config: Mapping[str, Any], folder: Path) -> AdapterSpec:
    """Our settings for an adapter that PEFT wrote."""
    targets = peft_targets(model, config)
    if not targets:
        raise UserError(
            f"adapter {folder} does not fit {type(model).__name__}: "
            f"target_modules {config.get('target_modules')} match none of its layers"
        )
    return AdapterSpec(
        method="rslora" if config.get("use_rslora") else "lora",
        r=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        dropout=config.get("lora_dropout", 0.0),
        target_modules=targets,
        rank_pattern=present(config.get("rank_pattern"), targets),
        alpha_pattern=present(config.get("alpha_pattern"), targets),
        bias=config.get("bias", "none"),
        modules_to_save=saved_modules(model, config),
    )


def saved_modules(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """The modules trained whole; of the two names that PEFT adds for every classifier, those that exist."""
    wanted = list(config.get("modules_to_save") or ())
    guessed = ("classifier", "score") if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else ()
    names = [name for name, _ in model.named_modules()]
    there = [entry for entry in wanted if any(matches(name, [entry]) for name in names)]
    return list(dict.fromkeys(entry for entry in wanted if entry in there or entry not in guessed))


def present(patterns: Mapping[str, Any] | None, targets: list[str]) -> dict[str, Any]:
    """The patterns that match a target, or are none; PEFT lets the others pass."""
    found = {}
    for key, value in (patterns or {}).items():
        try:
            if any(re.match(rf"(.*\.)?({key})$", name) for name in targets):
                found[key] = value
        except re.error:
            found[key] = value  # refused where patterns are checked, by name
    return found


def peft_targets(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """The modules that PEFT would adapt.

    source  methods of PEFT's tuners: a string is matched whole, a list by name or ending
    """
    wanted, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    whole = tuple(config.get("modules_to_save") or ())
    everything = isinstance(wanted, str) and wanted.lower() == "all-linear"
    heads = [output_head(model)]
    if heads == [None] and config.get("task_type") == "SEQ_CLS":
        heads = [getattr(model, "score", None), getattr(model, "classifier", None)]
    chosen = []
    for name, module in model.named_modules():
        if kind_of(module) is None or matches(name, excluded) or any(f".{w}." in f".{name}." for w in whole):
            continue
        if everything:
            if is_linear(module) and not any(module is head for head in heads):
                chosen.append(name)
        elif matches(name, wanted) and (names_it(name, wanted) or in_layers(name, layers, pattern)):
            chosen.append(name)
    return chosen


def names_it(name: str, wanted: Any) -> bool:
    """Whether layer numbers do not matter, as the module is named in full or by an expression."""
    return isinstance(wanted, str) or name in wanted


def matches(name: str, wanted: Any) -> bool:
    """Whether PEFT's list or expression means a module.

    raises  UserError if the expression is none
    """
    if isinstance(wanted, str):
        try:
            return re.fullmatch(wanted, name) is not None
        except re.error as error:
            raise UserError(f"{wanted!r} in {CONFIG} is not a regular expression: {error}") from None
    return any(name == entry or name.endswith("." + entry) for entry in wanted or ())


def in_layers(name: str, layers: Any, pattern: Any) -> bool:
    """Whether a module belongs to the layers asked for: the first number in its name counts."""
    if layers is None or layers == []:
        return True
    wanted = [layers] if isinstance(layers, int) else list(layers)
    patterns = [pattern] if isinstance(pattern, str) else pattern
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    else:
        match = next(filter(None, (re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name) for p in patterns)), None)
    return match is not None and int(match[1]) in wanted
