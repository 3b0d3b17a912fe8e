"""The settings that the benchmarks give each method, where they are not those of all."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from loraloom import methods
from loraloom.adapt import Adapters
from loraloom.adapter import AdapterSpec
from loraloom.methods.base import Method
from loraloom.skeleton import meta_model
from loraloom.trace import Shapes

SLOW_STARTS = ("pissa", "milora", "olora", "loraxs")  # and whatever must see something first
INVOCATION = (5, 6)
OWN: dict[str, dict[str, Any]] = {
    "bitfit": {"add_missing": True},
    "alora": {"invocation": INVOCATION},
}
NOTES = {
    "bitfit": "add_missing=true, as Llama has no biases",
    "loradrop": "half of the decoder layers kept",
    "alora": "from the middle of each row on",
    "eva": "the same rank everywhere",
}
LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def own_default(kind: type[Method], name: str) -> Any:
    return next(item.default for item in fields(kind) if item.name == name)


def rank_of(name: str, r: int) -> tuple[int, float | str]:
    """r and alpha of a method: the common ones, or its own where its rank means something else."""
    kind = methods.find(name)
    if name in ("vera", "randlora"):
        return own_default(kind, "r"), own_default(kind, "alpha")
    return r, "2r"


def spec_of(name: str, r: int, layers: int) -> AdapterSpec:
    options = dict(OWN.get(name, {}))
    if name == "loradrop":
        options["kept"] = [f"model.layers.{i}.{leaf}" for i in range(0, layers, 2) for leaf in LLAMA]
    rank, alpha = rank_of(name, r)
    return AdapterSpec(method=name, options=options, r=rank, alpha=alpha)


def counted(name: str, r: int, shape: Any) -> int:
    """Trained parameters on a model of this shape; no weight is there."""
    model, spec = meta_model(shape, dtype=torch.bfloat16), spec_of(name, r, shape.num_hidden_layers)
    with torch.device("meta"), Shapes():
        adapters = Adapters(model)
        adapters.add("default", spec, blank=True)
    return sum(p.numel() for p in adapters.parameters())
