"""adapter_config.json as PEFT writes it, in our settings; what we cannot honour is refused by name.

Which method a folder means is asked of the methods themselves: those of its peft_type, the plainest one last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from . import methods
from .adapter import AdapterSpec
from .adapter_files import CONFIG
from .errors import UserError
from .layers import is_linear, kind_of
from .methods.base import Method
from .peft_types import BASE_CHANGING, TYPES, PeftType
from .targets import output_head

INIT = "init_lora_weights"
CHANGED = ": it changed the base's weights"
COMMON = {item.name for item in fields(Method)}  # what an AdapterSpec has itself: r, alpha, dropout


def type_of(config: Mapping[str, Any], folder: Path) -> PeftType:
    """PEFT's type of a folder.

    raises  UserError if no method here has it, or a setting is on that none can honour
    """
    name = str(config.get("peft_type"))
    known = {kind.peft_type for kind in map(methods.find, methods.names())} & TYPES.keys()
    if name not in known:
        raise UserError(
            f"{folder} is a {name} adapter, which cannot be read",
            hint=f"{', '.join(sorted(map(str, known)))} can",
        )
    kind = TYPES[name]
    if unread := [key for key, off in kind.unread.items() if key in config and config[key] not in off]:
        raise unhonoured(folder, config, unread)
    return kind


def unhonoured(folder: Path, config: Mapping[str, Any], keys: list[str]) -> UserError:
    details = [f"{key} = {config[key]}" + (CHANGED if key == INIT else "") for key in keys]
    return UserError(f"{folder} uses what cannot be honoured", details=details)


def method_of(config: Mapping[str, Any], folder: Path) -> tuple[str, dict[str, Any]]:
    """The method that a folder of PEFT's means, and the method's own settings.

    A method is meant if it answers, and looks at every setting that makes the folder another method's: its answer
    is another one without it.

    raises  UserError with the settings that nobody takes
    """
    kind = type_of(config, folder)
    special = special_settings(config, kind)
    looked_at: set[str] = set()
    for name, method in asked(config["peft_type"]):
        answer = method.from_peft(config)
        if answer is None:
            continue
        own = {key for key in special if method.from_peft(without(config, key)) != answer}
        if own == set(special):
            return name, answer
        looked_at |= own
    wrong = [key for key in special if key not in looked_at] or special or reasons(config)
    raise unhonoured(folder, config, wrong)


def special_settings(config: Mapping[str, Any], kind: PeftType) -> list[str]:
    """The settings that make a folder another method's than the plainest of its type."""
    found = [key for key, off in kind.special.items() if key in config and config[key] not in off]
    changing = str(config.get(INIT, True)).lower().startswith(BASE_CHANGING)
    return found + [INIT] * changing


def asked(peft_type: str) -> list[tuple[str, type[Method]]]:
    """The methods of a type that speak for themselves, those that build on others first."""
    kinds = [(name, methods.find(name)) for name in methods.names()]
    own = [(name, kind) for name, kind in kinds if kind.peft_type == peft_type and "from_peft" in vars(kind)]
    return sorted(own, key=lambda item: -len(item[1].__mro__))


def without(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {other: value for other, value in config.items() if other != key}


def reasons(config: Mapping[str, Any]) -> list[str]:
    """The settings each of which alone keeps every method of the type from answering."""
    kinds = [kind for _, kind in asked(config["peft_type"])]
    found = [key for key in config if any(k.from_peft(without(config, key)) is not None for k in kinds)]
    return found or ["peft_type"]


def spec_of(model: nn.Module, config: Mapping[str, Any], folder: Path) -> AdapterSpec:
    """Our settings for an adapter that PEFT wrote."""
    kind = type_of(config, folder)
    method, answer = method_of(config, folder)
    if kind.tokens:
        return AdapterSpec(method=method, options=answer)
    targets = peft_targets(model, config)
    if not targets:
        raise UserError(
            f"adapter {folder} does not fit {type(model).__name__}: "
            f"target_modules {config.get('target_modules')} match none of its layers"
        )
    refuse_layers(model, config, targets, folder)
    patterns: dict[str, Any] = {
        setting: present(config.get(setting), targets) if setting in kind.patterns else {}
        for setting in ("rank_pattern", "alpha_pattern")
    }
    common: dict[str, Any] = {"r": config.get(kind.r, kind.rank)}
    common |= {"alpha": config.get(kind.alpha, 8)} if kind.alpha else {}
    common |= {"dropout": config.get(kind.dropout, 0.0)} if kind.dropout else {}
    common |= {key: value for key, value in answer.items() if key in COMMON}
    return AdapterSpec(
        method=method,
        options={key: value for key, value in answer.items() if key not in COMMON},
        target_modules=targets,
        bias=our_bias(config, kind),
        modules_to_save=saved_modules(model, config),
        **common,
        **patterns,
    )


def refuse_layers(model: nn.Module, config: Mapping[str, Any], targets: list[str], folder: Path) -> None:
    """
    raises  UserError for a layer on which PEFT leaves a setting unheeded: aLoRA's on a table
    """
    kind = type_of(config, folder)
    kinds = kind.layers(config)
    others = [name for name in targets if kind_of(model.get_submodule(name)) not in kinds]
    if others and kinds != kind.kinds:
        keys = [key for key in kind.narrow if config.get(key) not in kind.special[key]]
        raise UserError(
            f"{folder} uses what cannot be honoured",
            details=[f"{', '.join(keys)}: PEFT does not heed it on {name}" for name in others[:10]],
        )


def our_bias(config: Mapping[str, Any], kind: PeftType) -> str:
    """Which biases train, in our word for it."""
    bias = str(config.get("bias", "none"))
    return "lora_only" if kind.bias is not None and bias == kind.bias else bias


def saved_modules(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """The modules trained whole; of the two names that PEFT adds for every classifier, those that exist."""
    wanted = list(config.get("modules_to_save") or ())
    guessed = ("classifier", "score") if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else ()
    names = [name for name, _ in model.named_modules()]
    found: list[str] = []
    for entry in wanted:
        there = [name for name in names if name.endswith(entry)]  # PEFT's rule: a plain ending
        exact = [name for name in there if matches(name, [entry])]
        if there == exact:  # our own rule says the same, and the file may say it shorter
            found += [entry] if there or entry not in guessed else []
        else:
            found += there
    return list(dict.fromkeys(found))


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
