"""LoRA-GA: start where the first step moves W like full fine-tuning would.

    G = dL/dW = U S V^T over a few batches        s = alpha / sqrt(r)
    A0 = k V[:, :r]^T,   B0 = k U[:, r:2r]        k = O^(1/4) / sqrt(gamma)
    y = x W^T + s x (B A - B0 A0)^T + bias

A and B start from A0 and B0. The paper writes W - s B0 A0 in W's place; here W stays and the difference is the
update. G is made from each layer's inputs and the gradient at its output, so the base may be in 4 bits. Where a
layer is too small to have 2r directions, LoRA's own start stands in for the others.

direction  which singular directions A and B take: ArB2r (the paper's) the first and the second r, A2rBr the
           other way round, ArBr the odd and the even, random a draw of both without overlap
scale      how long they are: stable (the paper's) k; unit 1; gd 1/s; weight_svd the mean of sqrt(S_W / s) over
           W's r largest singular values

PEFT's lora_ga is another method: it multiplies B by G's singular values and leaves A at length 1, which makes B
as small as the gradient is and A several times as long.

source  Wang et al. 2024, arXiv:2407.05000, section 3 and algorithm 1; `direction` and `scale` are the authors' code
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from ._data import SeesGradients, leading
from ._offset import Offset, offset_tensors
from .base import Site, Tensors, check, choose, option

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "unit", "gd", "weight_svd")


@dataclass(frozen=True, kw_only=True)
class LoRAGA(SeesGradients, Offset):
    direction: str = option("ArB2r", "the gradient's directions for A and B: ArB2r, A2rBr, ArBr or random")
    scale_by: str = option("stable", "their lengths: stable, unit, gd or weight_svd")
    gamma: float = option(16.0, "how much smaller than the output's variance the start is, if stable")

    learning_rate: ClassVar[float] = 1e-5
    rate_source: ClassVar[str] = "the authors' code for Llama-2-7B, conf/model/llama.yaml"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("direction", self.direction, DIRECTIONS)
        choose("scale_by", self.scale_by, SCALES)
        check("gamma", self.gamma, least=1e-9)

    def found(self, site: Site, store: Tensors) -> Tensors:
        if not store or not bool(store["G"].any()):
            return {}
        r, length = site.method.r, self.length(site)
        u_OK, _, v_KI = leading(store["G"], 4 * r, self.niter)
        rows, columns = self.taken(r, site.layer.key)
        a_RI, b_OR = (site.p[name].detach().clone().to(u_OK) for name in ("A", "B"))
        for i in range(r):
            if rows[i] < len(v_KI):
                a_RI[i] = length * v_KI[rows[i]]
            if columns[i] < len(v_KI):
                b_OR[:, i] = length * u_OK[:, columns[i]]
        return offset_tensors(a_RI, b_OR)

    def taken(self, r: int, name: str) -> tuple[list[int], list[int]]:
        """The numbers of A's and of B's singular directions."""
        order = list(range(2 * r))
        if self.direction == "random":
            gen = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            order = torch.randperm(2 * r, generator=gen).tolist()
        elif self.direction == "ArBr":
            order = order[1::2] + order[::2]
        elif self.direction == "A2rBr":
            order = order[r:] + order[:r]
        return order[:r], order[r:]

    def length(self, site: Site) -> float:
        """How long each row of A and column of B is."""
        assert isinstance(site.method, LoRAGA)
        s = site.method.scale
        if self.scale_by == "stable":
            return float(site.layer.out_features**0.25 / self.gamma**0.5)
        if self.scale_by == "weight_svd":
            r = site.method.r
            w_OI = site.layer.weight(torch.float32)
            return float((leading(w_OI, 4 * r, self.niter)[1][:r] / s).sqrt().mean())
        return 1 / s if self.scale_by == "gd" else 1.0
