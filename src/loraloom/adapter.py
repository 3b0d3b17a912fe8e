"""One adapter: its settings, its tensors by layer, and how both are made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import methods
from .config import resolve_alpha
from .errors import UserError, did_you_mean
from .files import digest
from .layers import BlockLayer, Layer
from .methods.base import Method, Site
from .targets import Target


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """What an adapter is, apart from its tensors. The fields are those of a run's settings."""

    method: str = "lora"
    options: dict[str, Any] = field(default_factory=dict)  # the method's own settings
    r: int | str = "auto"  # the method's own default
    alpha: float | str = "auto"  # as many times r as in the method's own defaults
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "auto"  # where the method goes by itself
    layers: str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: Sequence[str] = ()
    seed: int = 0

    def make(self) -> Method:
        """The method with the settings that layers share.

        raises  UserError for a setting out of range, or one that the method does not have
        """
        spec = self if "auto" not in (self.r, self.alpha) else self.settled()
        check_rank(spec.r, "r")
        if isinstance(self.dropout, bool | str) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout!r}", hint="it is a share from 0 up to, but not, 1")
        assert isinstance(spec.r, int)
        for key in ("r", "alpha", "dropout"):
            if key in self.options:
                raise UserError(f"method.{key} is no setting of a method", hint=f"set {key} itself")
        common = {"r": spec.r, "alpha": alpha_of(spec.alpha, spec.r), "dropout": self.dropout}
        return methods.make(self.method, self.options | common)

    def settled(self) -> AdapterSpec:
        """The same with what `auto` means for the method written out."""
        kind = methods.find(self.method)
        r = kind.r if self.r == "auto" else self.r
        spec = replace(self, r=r, alpha=f"{kind.alpha / kind.r:g}r" if self.alpha == "auto" else self.alpha)
        entries = spec.make().auto_targets() if self.target_modules == "auto" else ()
        return replace(spec, target_modules=list(entries)) if entries else spec

    def at(self, method: Method, target: Target) -> Method | None:
        """The method with one layer's own r and alpha; None where the rank is 0: the layer is left out."""
        r = first_match(self.rank_pattern, target, method.r)
        alpha = alpha_of(first_match(self.alpha_pattern, target, self.alpha), max(1, r))
        return replace(method, r=r, alpha=alpha) if r else None


@dataclass
class Adapter:
    """One adapter: its settings and its tensors by layer."""

    name: str
    spec: AdapterSpec
    method: Method
    sites: dict[str, Site]  # by target key: a module's name, or name:role
    roles: dict[str, Target]
    ready: bool = True  # false while a method that must see data first has not seen any

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the method by a stable name, trained and frozen."""
        for key, site in self.sites.items():
            for name, tensor in site.p.items():
                yield f"{key}/{name}", tensor


def check_rank(r: Any, setting: str, least: int = 1) -> None:
    if isinstance(r, bool) or not isinstance(r, int) or r < least:
        zero = "" if least else ", or 0 to leave the layers out"
        raise UserError(f"{setting} is {r!r}", hint=f"a rank is a whole number from 1 up{zero}")


def alpha_of(alpha: Any, r: int) -> float:
    """alpha as a number.

    raises  UserError if it is neither a number nor a multiple of the rank
    """
    try:
        return resolve_alpha(alpha, r)
    except ValueError as error:
        raise UserError(str(error)) from None
    except TypeError:
        raise UserError(
            f"alpha is {alpha!r}", hint="use a number or a multiple of the rank, such as 2r"
        ) from None


def first_match(patterns: dict[str, Any], target: Target, default: Any) -> Any:
    """The value of the first pattern that matches a target as PEFT matches: `(.*\\.)?(pattern)$`."""
    for pattern, value in patterns.items():
        if pattern_matches(pattern, target):
            return value
    return default


def pattern_matches(pattern: str, target: Target) -> bool:
    return any(re.match(rf"(.*\.)?({pattern})$", name) for name in (target.name, target.key))


def init_sites(
    own: Sequence[Method],
    layers: Sequence[Layer],
    gens: Sequence[torch.Generator],
    *,
    blank: bool = False,
) -> list[dict[str, Tensor]]:
    """Each site's tensors; layers whose method has the same settings are made together.

    blank  they will be filled from a file: what would be computed from weights is only allocated
    """
    if blank:
        layers = [shell(layer) for layer in layers]
    tensors: list[dict[str, Tensor]] = [{} for _ in own]
    for method in dict.fromkeys(own):
        members = [i for i, other in enumerate(own) if other == method]
        made = method.init_all([layers[i] for i in members], [gens[i] for i in members])
        for i, p in zip(members, made):
            tensors[i] = p
    return tensors


def place(sites: list[dict[str, Tensor]], devices: Sequence[torch.device]) -> list[dict[str, Tensor]]:
    """The sites' tensors on their layers' devices, in place, so that what is shared stays shared."""
    shells: dict[int, Tensor] = {}  # of tensors that go to the meta device, which takes no data in place
    for p, device in zip(sites, devices):
        for name, tensor in p.items():
            if device.type == "meta":
                shell = tensor.detach().to(device)
                shell = nn.Parameter(shell) if isinstance(tensor, nn.Parameter) else shell
                p[name] = shells.setdefault(id(tensor), shell)
            elif tensor.is_meta:  # of a blank site
                own = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
                own = nn.Parameter(own) if isinstance(tensor, nn.Parameter) else own
                p[name] = shells.setdefault(id(tensor), own)
            elif tensor.device != device:
                tensor.data = tensor.data.to(device)
    return sites


def shell(layer: Layer) -> Layer:
    """The same layer with weights that have a shape and no numbers: nothing can be computed from them."""
    if isinstance(layer, BlockLayer):
        return layer
    hollow = copy(layer)
    weight = layer.module.weight
    assert isinstance(weight, Tensor)
    hollow.module = copy(layer.module)
    hollow.module._parameters = dict(layer.module._parameters)
    empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    hollow.module._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
    return hollow


def seed_of(seed: int, *, name: str) -> int:
    """A generator's seed for one layer: it does not depend on which other layers there are."""
    return int(digest(str(seed), name)[:15], 16)


def has_gain(site: Site) -> bool:
    pair = getattr(site.method, "pair", None)
    with torch.no_grad():
        return pair is not None and pair(site.layer, site.p).gain is not None


def check_patterns(spec: AdapterSpec, targets: Sequence[Target]) -> None:
    """Refuse a rank or alpha pattern that matches no target, or whose value is none."""
    for pattern, r in spec.rank_pattern.items():
        check_rank(r, f"rank_pattern: {pattern!r}", least=0)
    for setting, patterns in (("rank_pattern", spec.rank_pattern), ("alpha_pattern", spec.alpha_pattern)):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{setting}: {pattern!r} is not a regular expression: {error}") from None
            if not any(pattern_matches(pattern, target) for target in targets):
                leaves = {target.name.rpartition(".")[2] for target in targets}
                raise UserError(
                    f"{setting}: {pattern!r} matches no layer with an adapter",
                    hint=did_you_mean(pattern, leaves),
                )
