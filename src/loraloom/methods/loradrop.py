"""LoRA-drop: train a pair of their own only in the layers where LoRA does much; the others share one.

    probe     ordinary LoRA on a part of the data, a few steps
    score     g_i = sum_x || Delta W_i x_i ||^2        I_i = g_i / sum_j g_j
    keep      layers in falling order of I until their sum reaches the threshold
    train     anew: a pair for each layer kept, one pair for all others

Layers are scored and share within their kind: matrices of one name (q_proj, v_proj ...) and shape, for only
these can share a pair. Scores include s; padding is left out; the probe's weights are not kept.

source  Zhou et al. 2024, arXiv:2402.07721, section 3; the threshold 0.9 is that of its experiments
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from ..layers import Layer
from .base import Site, Tensors, option
from .lora import LoRA


@dataclass(frozen=True, kw_only=True)
class LoRADrop(LoRA):
    threshold: float = option(0.9, "share of the importance that the layers kept must have")
    samples: int = option(64, "training examples that the probe sees")
    probe_steps: int = option(20, "optimizer steps of the probe")
    kept: Sequence[str] | None = option(None, "layers with a pair of their own; none: the probe decides")

    rate_source: ClassVar[str] = "LoRA's"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            raise UserError(f"threshold is {self.threshold}", hint="it is a share above 0, at most 1")
        if self.probe_steps < 1:
            raise UserError(f"probe_steps is {self.probe_steps}", hint="before any step every update is zero")
        if self.samples < 1:
            raise UserError(f"samples is {self.samples}", hint="the probe must see at least one example")
        if isinstance(self.kept, str):
            raise UserError(f"kept is {self.kept!r}", hint="it is a list of layers")
        if self.kept is not None:
            object.__setattr__(self, "kept", tuple(self.kept))  # methods with equal settings must hash alike

    @property
    def needs(self) -> str | None:  # type: ignore[override]
        return "updates" if self.kept is None else None

    def probes(self) -> tuple[int, int]:
        return self.samples, self.probe_steps

    def init_all(self, layers: Sequence[Layer], gens: Sequence[torch.Generator]) -> list[Tensors]:
        """Plain LoRA's pairs; of the layers that are not kept, the first one's for all of a kind."""
        made: list[Tensors] = []
        shared: dict[Any, Tensors] = {}
        for layer, gen in zip(layers, gens):
            p = self.init(layer, gen)
            if self.kept is not None and layer.key not in self.kept:
                p = dict(shared.setdefault(kind(layer), p))
            made.append(p)
        return made

    def observe(
        self, site: Site, store: Tensors, x_TI: Tensor, g_TO: Tensor | None, labelled_T: Tensor
    ) -> None:
        a_RI, b_OR = site.p["A"].float(), site.p["B"].float()
        u_TO = (x_TI.float() @ a_RI.T) @ b_OR.T * self.scale
        store["g"] = store.get("g", u_TO.new_zeros((), dtype=torch.float64)) + u_TO.double().square().sum()

    def found(self, site: Site, store: Tensors) -> Tensors:
        return store

    def begin(
        self, sites: Mapping[str, Site], found: Mapping[str, Tensors]
    ) -> tuple[dict[str, Any], dict[str, Tensors]]:
        kinds: dict[Any, dict[str, float]] = {}
        for key, site in sites.items():
            kinds.setdefault(kind(site.layer), {})[key] = float(found[key]["g"])
        kept = [key for scores in kinds.values() for key in most(scores, self.threshold)]
        return {"options": {"kept": [key for key in sites if key in kept]}}, {}


def kind(layer: Layer) -> tuple[str, int, int]:
    """What must be equal for two layers to share a pair: the name's last part and the shape."""
    return layer.key.rpartition(".")[2], layer.out_features, layer.in_features


def most(scores: Mapping[str, float], threshold: float) -> list[str]:
    """The keys of the greatest scores whose sum reaches a share of the whole.

    raises  UserError if every score is zero
    """
    total = sum(scores.values())
    if not total:
        raise UserError("LoRA-drop's probe changed nothing", hint="raise method.probe_steps")
    kept, reached = [], 0.0
    for key in sorted(scores, key=lambda key: -scores[key]):
        if reached >= threshold * total:
            break
        kept.append(key)
        reached += scores[key]
    return kept
