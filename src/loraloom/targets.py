"""Which layers an adapter sits on: names, suffixes, roles, regular expressions, layer ranges.

auto                       where the method goes by itself: all-linear for LoRA and its like
all-linear                 every linear layer but the output head
[q_proj, v_proj]           modules of that name, or whose name ends so
[q, v]                     roles: separate layers, or the rows of q and v in a fused projection
'.*\\.mlp\\..*'            a regular expression that matches whole names
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .errors import UserError, did_you_mean, nearest
from .fused import LEAVES, rows_by_role
from .layers import is_linear, kind_of, view

ROLES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "query_proj", "q_lin", "wq"),
    "k": ("k_proj", "key", "key_proj", "k_lin", "wk"),
    "v": ("v_proj", "value", "value_proj", "v_lin", "wv"),
    "o": (
        *("o_proj", "attn.out_proj", "attention.out_proj", "out_lin", "attention.wo", "attn.c_proj"),
        *("attention.output.dense", "attention.dense", "self_attention.dense", "self_attn.dense"),
    ),
    "mlp": (
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "mlp.c_fc", "mlp.c_proj"),
        *("dense_h_to_4h", "dense_4h_to_h", "fc1", "fc2", "fc_in", "fc_out"),
        *("intermediate.dense", "output.dense", "lin1", "lin2"),
    ),
    "down": (),  # the last layer of an mlp
    "head": (),  # known by identity
    "embed": (),
}
DOWN = ("down_proj", "mlp.c_proj", "dense_4h_to_h", "fc2", "fc_out", "output.dense", "lin2")
BLOCKS = ("blocks", "inner-blocks")  # every decoder block's output; but the last one's
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Target:
    """One place for an adapter: a module, the rows of one role in it, or a whole decoder block's output."""

    name: str
    role: str | None = None
    rows: Tensor | None = None
    block: bool = False

    @property
    def key(self) -> str:
        """The name that tells it apart: `h.0.attn.c_attn:q`."""
        return self.name if self.role is None else f"{self.name}:{self.role}"


def select(
    model: nn.Module,
    target_modules: str | Sequence[str],
    *,
    layers: str | None = None,
    skip: Sequence[str] = (),
) -> list[Target]:
    """The targets in the model's own order.

    layers  such as "0-11,20": only the modules of those layers
    skip    modules below these names are left out: they are trained whole

    raises  UserError for an entry that matches nothing, with the nearest names
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if kind_of(module) is not None and not any(name == s or name.startswith(s + ".") for s in skip)
    }
    entries = as_entries(target_modules)
    if not entries:
        raise UserError("target_modules is empty", hint="name the layers to adapt, or write all-linear")
    found: list[Target] = []
    if isinstance(entries, str):
        found = by_expression(modules, entries)
    else:
        for entry in entries:
            found += by_entry(model, modules, entry)
    unique = {target.key: target for target in found}
    whole = {target.name for target in unique.values() if target.role is None}
    chosen = [target for target in unique.values() if target.role is None or target.name not in whole]
    if layers is not None:
        chosen = in_layers(chosen, layers, modules)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return sorted(chosen, key=lambda target: (order[target.name], "qkv".find(target.role or "")))


def as_entries(target_modules: str | Sequence[str]) -> str | list[str]:
    """A list of entries, or a regular expression: text with anything but names, dots and commas in it."""
    if not isinstance(target_modules, str):
        return list(target_modules)
    if re.fullmatch(r"[\w.,\- ]+", target_modules):
        return [entry.strip() for entry in target_modules.split(",") if entry.strip()]
    return target_modules


def by_expression(modules: dict[str, nn.Module], expression: str) -> list[Target]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise UserError(f"target_modules {expression!r} is not a regular expression: {error}") from None
    found = [Target(name) for name in modules if pattern.fullmatch(name)]
    if not found:
        raise UserError(
            f"target_modules {expression!r} matches no whole name of a layer",
            details=[f"a layer here: {name}" for name in some_names(modules)],
            hint="the expression must match from the first to the last letter; start it with .*",
        )
    return found


def by_entry(model: nn.Module, modules: dict[str, nn.Module], entry: str) -> list[Target]:
    """What one entry of the list means: all-linear, else a name or suffix, else a role."""
    head = output_head(model)
    if entry == "all-linear":
        found = [Target(name) for name, module in modules.items() if is_linear(module) and module is not head]
    elif entry in BLOCKS:
        found = [Target(name, block=True) for name in block_names(model)]
        found = found[:-1] if entry == "inner-blocks" else found
        if entry == "inner-blocks" and not found:
            return []  # a model of one block has none
    else:
        found = [Target(name) for name in modules if name == entry or name.endswith("." + entry)]
        if not found and entry in ROLES:
            found = by_role(model, modules, entry)
    if not found:
        raise UserError(f"target_modules: {no_match(model, modules, entry)}", hint=near(modules, entry))
    return found


def by_role(model: nn.Module, modules: dict[str, nn.Module], role: str) -> list[Target]:
    """The layers that play a role, or the rows that play it in fused projections."""
    if role in ("head", "embed"):
        wanted = output_head(model) if role == "head" else input_embedding(model)
        return [Target(name) for name, module in modules.items() if module is wanted]
    if role == "down":
        return [Target(n) for n in modules if plays(n, "mlp") and any(ends(n, end) for end in DOWN)]
    found = [Target(name) for name in modules if plays(name, role)]
    if found or role not in ("q", "k", "v"):
        return found
    for name, module in modules.items():
        leaf = name.rpartition(".")[2]
        if leaf in LEAVES and is_linear(module):
            table = rows_by_role(getattr(model, "config", None), leaf, view(module, name).out_features)
            if table is not None:
                found.append(Target(name, role, table[role]))
    return found


def modules_named(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """The full names of the modules to train whole.

    raises  UserError if one matches nothing, or has no parameters
    """
    found = []
    for entry in [wanted] if isinstance(wanted, str) else wanted:
        names = [n for n, _ in model.named_modules() if n and (n == entry or n.endswith("." + entry))]
        names = [n for n in names if any(True for _ in model.get_submodule(n).parameters())]
        if not names:
            full = {n.rpartition(".")[0] for n, _ in model.named_parameters()}
            leaves = sorted({n.rpartition(".")[2] for n in full if n})
            raise UserError(
                f"modules_to_save: {entry!r} is no module with weights", hint=did_you_mean(entry, leaves)
            )
        found += names
    return found


def plays(name: str, role: str) -> bool:
    """Whether a module's name is one of the role's; the longest ending decides between two roles."""
    best = max(
        (
            (len(ending), other)
            for other, endings in ROLES.items()
            for ending in endings
            if ends(name, ending)
        ),
        default=(0, ""),
    )
    return best[1] == role


def ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def no_match(model: nn.Module, modules: dict[str, nn.Module], entry: str) -> str:
    """Why an entry matches nothing, in words."""
    for name, module in model.named_modules():
        if ends(name, entry) and name not in modules and kind_of(module) is not None:
            return f"{entry!r} is in modules_to_save: it is trained whole"
        if ends(name, entry) and name not in modules:
            return f"{entry!r} is a {type(module).__name__}, which cannot be adapted itself"
    return f"{entry!r} matches no layer of this {type(model).__name__}"


def near(modules: dict[str, nn.Module], entry: str) -> str:
    """The nearest endings that exist."""
    endings = sorted({name.rpartition(".")[2] for name in modules})
    close = nearest(entry, [*endings, *ROLES])
    names = ", ".join(endings[:24])
    return (
        f"did you mean {' or '.join(close)}? " if close else ""
    ) + f"there are {names}; roles: {', '.join(ROLES)}"


def some_names(modules: dict[str, nn.Module]) -> list[str]:
    """One full name for each ending, at most eight."""
    return list({name.rpartition(".")[2]: name for name in modules}.values())[:8]


def in_layers(targets: list[Target], layers: str, modules: dict[str, nn.Module]) -> list[Target]:
    """Only the targets of the layers asked for."""
    wanted = parse_layers(layers)
    there = {number for name in modules if (number := layer_number(name)) is not None}
    missing = sorted(wanted - there)
    if missing:
        listed = ", ".join(map(str, missing[:8]))
        raise UserError(
            f"layers {layers!r}: the model has no layer {listed}",
            hint=f"it has layers {min(there)}-{max(there)}"
            if there
            else "its modules carry no layer numbers",
        )
    chosen = [target for target in targets if layer_number(target.name) in wanted]
    if not chosen:
        raise UserError(f"layers {layers!r} leave nothing of target_modules")
    return chosen


def parse_layers(text: str) -> set[int]:
    """ "0-3,8" as {0, 1, 2, 3, 8}.

    raises  UserError if it is written otherwise
    """
    numbers: set[int] = set()
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise UserError(f"layers is {text!r}: write numbers and ranges, such as 0-11,20")
        numbers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return numbers


def layer_number(name: str) -> int | None:
    """The first number among a module name's parts: its layer."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def input_group(name: str) -> str:
    """A name shared by the layers that read the same input: q, k and v, or gate and up."""
    parent, _, leaf = name.rpartition(".")
    for group in SAME_INPUT:
        if leaf in group:
            return f"{parent}.{group[0]}"
    return name


def block_names(model: nn.Module) -> list[str]:
    """The names of the decoder's (or encoder's) blocks, in order: the longest list of modules of one kind."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(part) for part in module}) == 1
    ]
    if not lists:
        return []
    name, found = max(lists, key=lambda one: (len(one[1]), -one[0].count(".")))
    return [f"{name}.{number}" for number in range(len(found))]


def hidden_width(model: nn.Module) -> int:
    """D, the size of a hidden state.

    raises  UserError for a model whose configuration does not say it
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise UserError(f"{type(model).__name__} does not say how wide its hidden states are")
    return width


def vocabulary(model: nn.Module) -> int:
    """Rows of the table of tokens; 0 for a model without one."""
    table = input_embedding(model)
    return table.num_embeddings if isinstance(table, nn.Embedding) else 0


def output_head(model: nn.Module) -> nn.Module | None:
    """The output embedding, by identity; None for a model without one."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The input embedding, by identity; None for a model without one."""
    get = getattr(model, "get_input_embeddings", None)
    return get() if get is not None else None


def is_tied(model: nn.Module) -> bool:
    """Whether the output head and the input embedding are one tensor."""
    head = output_head(model)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    return (
        head is not None
        and embedding is not None
        and getattr(head, "weight", 0) is getattr(embedding, "weight", 1)
    )
