"""An adapter's parts put on a model: which layers it sits on, its tensors there, what it trains whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .adapter import Adapter, AdapterSpec, check_patterns, init_sites, place, seed_of
from .errors import UserError
from .forwards import Forwards
from .layers import Layer, view
from .methods.base import Method, Site
from .refusals import refuse
from .targets import Target, modules_named, select


def make_adapter(
    forwards: Forwards,
    name: str,
    spec: AdapterSpec,
    *,
    device: torch.device | None,
    blank: bool,
    starting: bool,
) -> Adapter:
    """The adapter of these settings, its parts in place on the model.

    device    of its tensors, each layer's own if None
    blank     its tensors will be filled from a file: only their shapes are made
    starting  whether training starts with it

    raises  UserError for a setting that does not fit the model; some parts may be in place then
    """
    model, method = forwards.model, spec.make()
    spec = spec.settled()
    refuse(method, spec, model, starting=starting)
    saved = modules_named(model, spec.modules_to_save)
    targets = []
    if spec.target_modules != "auto":  # a method that sits on no layer leaves it so
        targets = select(model, spec.target_modules, layers=spec.layers, skip=saved)
    check_patterns(spec, targets)
    whole = method.trains_whole()
    for part in saved:  # each with copies of its own: PEFT too lets a head part from its table
        forwards.overlay(part).add(name, None, {}, device)
    wanted = {"biases": "all", "everything": "everything"}.get(whole, spec.bias)
    train_whole(forwards, name, wanted, {target.name for target in targets}, saved, device)
    sites = make_sites(forwards, name, spec, method, targets, device=device, blank=blank, starting=starting)
    if not sites and not any(name in overlay.p for overlay in forwards.overlays.values()):
        hint = (
            "it has no biases: set method.add_missing=true" if whole == "biases" else "look at rank_pattern"
        )
        raise UserError(f"{spec.method} finds nothing to train in this {type(model).__name__}", hint=hint)
    roles = {target.key: target for target in targets if target.key in sites}
    return Adapter(name, spec, method, sites, roles, ready=blank or method.needs is None)


def make_sites(
    forwards: Forwards,
    name: str,
    spec: AdapterSpec,
    method: Method,
    targets: Sequence[Target],
    *,
    device: torch.device | None,
    blank: bool,
    starting: bool,
) -> dict[str, Site]:
    """The method's tensors on every target, and the banks told of them."""
    chosen: list[tuple[Target, Layer, Method]] = []
    for target in targets:
        own = spec.at(method, target)
        layer = layer_of(forwards, target) if own is not None else None
        own = own.at(layer) if own is not None and layer is not None else None
        if own is not None and layer is not None:
            refuse(own, spec, forwards.model, layer, starting=starting)
            chosen.append((target, layer, own))
    methods, layers = [own for _, _, own in chosen], [layer for _, layer, _ in chosen]
    gens = [torch.Generator().manual_seed(seed_of(spec.seed, name=target.key)) for target, _, _ in chosen]
    homes = [device or layer.device for layer in layers]
    made = place(init_sites(methods, layers, gens, blank=blank), homes)
    sites = {}
    for (target, layer, own), p in zip(chosen, made):
        sites[target.key] = Site(layer, own, p)
        forwards.bank(target).sites.setdefault(name, []).append(sites[target.key])
    forwards.drop_bare()  # of layers that were left out
    return sites


def layer_of(forwards: Forwards, target: Target) -> Layer:
    """The view of a target: the bank's own of the whole module, or one of some rows."""
    whole = forwards.bank(target).layer
    if target.rows is None:
        return whole
    part = view(whole.module, target.name, target.rows)
    part.key = target.key
    return part


def train_whole(
    forwards: Forwards,
    adapter: str,
    which: str,
    chosen: set[str],
    saved: Sequence[str],
    device: torch.device | None,
) -> None:
    """Give the adapter its own copies of the base's parameters.

    which  none; lora_only: biases of the modules in `chosen`; all: every bias; everything: every parameter
    """
    if which == "none":
        return
    if which not in ("all", "lora_only", "everything"):
        raise UserError(f"bias is {which!r}", hint="it can be none, all or lora_only")
    copies: dict[int, nn.Parameter] = {}
    for name, module in forwards.model.named_modules():
        if any(name == s or name.startswith(s + ".") for s in saved) or (
            which == "lora_only" and name not in chosen
        ):
            continue
        own = [leaf for leaf, value in module._parameters.items() if isinstance(value, nn.Parameter)]
        if which != "everything":
            own = [leaf for leaf in own if leaf == "bias"]
        if own:
            forwards.overlay(name).add(adapter, own, copies, device)
