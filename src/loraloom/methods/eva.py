"""EVA: let A look where the layer's inputs vary, and give rank to the layers where they vary in many ways.

    A = V[:rank]     the first principal components of the layer's inputs, unit length
    B = 0            so that the model is unchanged at the start

The components come from an incremental PCA, centred on the mean of all tokens so far. With n tokens seen, whose
components are V with singular values S around the mean m, a batch X of t tokens with mean m' gives

    U S' V'^T = SVD of the rows  [S V;  X - m';  sqrt(n t / (n + t)) (m - m')]

A layer keeps round(rho r) components, and stops looking when each has |cos| >= tau with its last estimate. A
batch with fewer tokens than components is passed over. Then rank is dealt out anew: a component explains the
share S_k^2 / (sum of squares) of its own layer's variance, and of all layers' components the largest shares
are kept, as many as LoRA would have had. A layer may end with rank 0 and is left out. alpha / r stays.

Four things differ from PEFT. It goes through the data until the components that get rank have converged; here
all of a layer's must, within the examples given. Its cosine has a sign, and a component whose sign it turns has
not converged. Its label mask takes tokens that carry loss, this one tokens that predict them. And where layers
share an input its `whiten` divides by the root of S once for each of them.

source  Paischer et al. 2024, arXiv:2410.07170; the PCA is Ross et al. 2008, Int. J. Computer Vision 77
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UserError
from ._data import SeesData, leading
from .base import Site, Tensors, check, option
from .lora import LoRA


@dataclass(frozen=True, kw_only=True)
class EVA(SeesData, LoRA):
    rho: float = option(2.0, "how many times r a layer's rank may become; 1 keeps every rank")
    tau: float = option(0.99, "the cosine with its last estimate from which on a direction is final")
    whiten: bool = option(False, "divide each direction by the root of its singular value")
    labelled: bool = option(True, "look only at the tokens that predict one with loss")
    keep_scale: bool = option(True, "let alpha follow a layer's new rank, so that alpha / r stays")
    niter: int = option(4, "steps of the fast decomposition of large batches; 0 is the exact one")

    rate_source: ClassVar[str] = "LoRA's; A's rows are less than twice as long as LoRA's"
    needs: ClassVar[str | None] = "inputs"

    def __post_init__(self) -> None:
        super().__post_init__()
        check("rho", self.rho, least=1)
        check("tau", self.tau, least=0, most=1)
        check("niter", self.niter, whole=True, least=0)

    def observe(
        self, site: Site, store: Tensors, x_TI: Tensor, g_TO: Tensor | None, labelled_T: Tensor
    ) -> None:
        if "final" in store and bool(store["final"].all()):
            return
        x_TI = x_TI[labelled_T] if self.labelled else x_TI
        most = min(round(self.rho * site.method.r), site.layer.in_features)
        if len(x_TI) < most:
            return
        last = store.get("V")
        store.update(grown(store, x_TI, most, self.niter))
        if last is not None:
            store["final"] = torch.cosine_similarity(last, store["V"]).abs() >= self.tau

    def found(self, site: Site, store: Tensors) -> Tensors:
        if not store:
            return {}
        share = store["S"].square() / store["total"].clamp_min(1e-30)
        return {"V": store["V"], "S": store["S"], "share": share}

    def begin(
        self, sites: Mapping[str, Site], found: Mapping[str, Tensors]
    ) -> tuple[dict[str, Any], dict[str, Tensors]]:
        """The ranks dealt out, and A and B of each layer that has one.

        raises  UserError if no layer saw a batch with as many tokens as it has components
        """
        seen = {key: found[key] for key in sites if found.get(key)}
        if sites and not seen:
            raise UserError(
                f"eva: every batch had fewer tokens than the {round(self.rho * self.r)} directions to be found",
                hint="use a larger train.micro_tokens, a smaller r, rho=1, or labelled=false for all tokens",
            )
        ranks = deal({k: part["share"] for k, part in seen.items()}, sum(sites[k].method.r for k in seen))
        tensors: dict[str, Tensors] = {}
        for key, rank in ranks.items():
            if rank:
                a_RI = seen[key]["V"][:rank].clone()
                if self.whiten:
                    a_RI /= seen[key]["S"][:rank, None].sqrt()
                b_OR = a_RI.new_zeros(sites[key].layer.out_features, rank)
                tensors[key] = {"A": nn.Parameter(a_RI), "B": nn.Parameter(b_OR)}
        return self.patterns(sites, ranks), tensors

    def patterns(self, sites: Mapping[str, Site], ranks: Mapping[str, int]) -> dict[str, Any]:
        """The settings that give each layer its rank, and its alpha."""
        rank_pattern: dict[str, int] = {}
        alpha_pattern: dict[str, float] = {}
        for key in sorted(sites, key=len, reverse=True):  # a pattern also matches names that end like it
            method = sites[key].method
            rank = ranks.get(key, method.r)
            alpha = method.alpha * rank / method.r if self.keep_scale else method.alpha
            if (rank, alpha) != (self.r, self.alpha):
                rank_pattern[re.escape(key)] = rank
                alpha_pattern |= {re.escape(key): alpha} if rank else {}
        return {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        return None  # its files are LoRA's


def grown(pca: Tensors, x_TI: Tensor, most: int, niter: int) -> Tensors:
    """The PCA of the tokens so far with x among them: `most` components V and S, the mean, and how many.

    total  the sum of squares around the mean, over all features
    """
    rows = x_TI.float()
    mean_I, tokens = rows.mean(0), rows.new_tensor(len(rows))
    rows = rows - mean_I
    total = rows.square().sum()
    if pca:
        before = pca["tokens"]
        shift_I = (before * tokens / (before + tokens)).sqrt() * (pca["mean"] - mean_I)
        rows = torch.cat([pca["S"][:, None] * pca["V"], rows, shift_I[None]])
        total = pca["total"] + total + shift_I.square().sum()
        mean_I = (before * pca["mean"] + tokens * mean_I) / (before + tokens)
        tokens = before + tokens
    _, s_K, v_KI = leading(rows, 2 * most, niter)
    return {"V": v_KI[:most], "S": s_K[:most], "mean": mean_I, "total": total, "tokens": tokens}


def deal(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many of the `budget` largest shares are each layer's; of equal shares the earlier layer's count."""
    every = torch.cat([share.cpu() for share in shares.values()])
    owner = torch.tensor([i for i, share in enumerate(shares.values()) for _ in share])
    kept = owner[every.argsort(descending=True, stable=True)[:budget]]
    return dict(zip(shares, kept.bincount(minlength=len(shares)).tolist()))
