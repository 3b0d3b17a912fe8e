"""One adapter: its settings, its tensors by layer, and how both are made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import methods
from .config import resolve_alpha
from .errors import UserError, did_you_mean
from .files import digest
from .layers import Layer
from .methods.base import Method, Site
from .targets import Target


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """What an adapter is, apart from its tensors. The fields are those of a run's settings."""

    method: str = "lora"
    options: dict[str, Any] = field(default_factory=dict)  # the method's own settings
    r: int = 16
    alpha: float | str = "2r"
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    layers: str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: Sequence[str] = ()
    seed: int = 0

    def make(self) -> Method:
        """The method with the settings that layers share."""
        common = {"r": self.r, "alpha": resolve_alpha(self.alpha, self.r), "dropout": self.dropout}
        return methods.make(self.method, self.options | common)

    def at(self, method: Method, target: Target) -> Method:
        """The method with one layer's own r and alpha."""
        r = first_match(self.rank_pattern, target, self.r)
        alpha = first_match(self.alpha_pattern, target, resolve_alpha(self.alpha, r))
        return replace(method, r=r, alpha=float(alpha))


@dataclass
class Adapter:
    """One adapter: its settings and its tensors by layer."""

    name: str
    spec: AdapterSpec
    method: Method
    sites: dict[str, Site]  # by target key: a module's name, or name:role
    roles: dict[str, Target]

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the method by a stable name, trained and frozen."""
        for key, site in self.sites.items():
            for name, tensor in site.p.items():
                yield f"{key}/{name}", tensor


def first_match(patterns: dict[str, Any], target: Target, default: Any) -> Any:
    """The value of the first pattern that matches a target as PEFT matches: `(.*\\.)?(pattern)$`."""
    for pattern, value in patterns.items():
        if pattern_matches(pattern, target):
            return value
    return default


def pattern_matches(pattern: str, target: Target) -> bool:
    return any(re.match(rf"(.*\.)?({pattern})$", name) for name in (target.name, target.key))


def init_sites(
    own: Sequence[Method], layers: Sequence[Layer], gens: Sequence[torch.Generator]
) -> list[dict[str, Tensor]]:
    """Each site's tensors; layers whose method has the same settings are made together."""
    tensors: list[dict[str, Tensor]] = [{} for _ in own]
    for method in dict.fromkeys(own):
        members = [i for i, other in enumerate(own) if other == method]
        made = method.init_all([layers[i] for i in members], [gens[i] for i in members])
        for i, p in zip(members, made):
            tensors[i] = p
    return tensors


def place(p: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A site's tensors on a device, in place, so that what is shared stays shared."""
    for tensor in p.values():
        if tensor.device != device:
            tensor.data = tensor.data.to(device)
    return p


def seed_of(seed: int, *, name: str) -> int:
    """A generator's seed for one layer: it does not depend on which other layers there are."""
    return int(digest(str(seed), name)[:15], 16)


def has_gain(site: Site) -> bool:
    pair = getattr(site.method, "pair", None)
    with torch.no_grad():
        return pair is not None and pair(site.layer, site.p).gain is not None


def check_patterns(spec: AdapterSpec, targets: Sequence[Target]) -> None:
    """Refuse a rank or alpha pattern that matches no target."""
    for setting, patterns in (("rank_pattern", spec.rank_pattern), ("alpha_pattern", spec.alpha_pattern)):
        for pattern in patterns:
            if not any(pattern_matches(pattern, target) for target in targets):
                leaves = {target.name.rpartition(".")[2] for target in targets}
                raise UserError(
                    f"{setting}: {pattern!r} matches no layer with an adapter",
                    hint=did_you_mean(pattern, leaves),
                )
