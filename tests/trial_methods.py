"""Methods that exist only here: the members of the family that are least like LoRA, in the contract's words.

They show that the contract holds them without special cases. The dense truth that they are compared with
stands in test_contract_trial.py and shares no code with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from loraloom.methods.base import LowRank, Method, NotMergeable, Pair
from loraloom.methods.lora import LoRA


@dataclass(frozen=True, kw_only=True)
class VeRA(LowRank):
    """y + lambda_b * B (lambda_d * (A x)): A, B frozen and shared by all layers."""

    def init_all(self, layers, gens):
        wide_I, wide_O = max(x.in_features for x in layers), max(x.out_features for x in layers)
        gen = gens[0]
        a_RI = torch.randn(self.r, wide_I, generator=gen)
        b_OR = torch.randn(wide_O, self.r, generator=gen)
        return [
            {
                "A": a_RI,
                "B": b_OR,
                "lambda_d": nn.Parameter(torch.full((self.r,), 0.1)),
                "lambda_b": nn.Parameter(torch.zeros(x.out_features)),
            }
            for x in layers
        ]

    def pair(self, layer, p):
        a_RI, b_OR = p["A"][:, : layer.in_features], p["B"][: layer.out_features]
        return Pair(a_RI, b_OR, p["lambda_d"], out=p["lambda_b"], shared=True)


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """(m / ||W + sBA||) * (W + sBA) x, the norm held constant, and never a dense W + sBA."""

    def init(self, layer, gen):
        p = super().init(layer, gen)
        return p | {"m": nn.Parameter(self.norm(layer, p))}

    def norm(self, layer, p):
        with torch.no_grad():
            w, a, b, s = layer.weight().to(p["A"]), p["A"], p["B"], self.scale
            square = (w * w).sum(1) + 2 * s * ((w @ a.T) * b).sum(1) + s * s * ((b @ (a @ a.T)) * b).sum(1)
            return square.clamp(min=0).sqrt()

    def pair(self, layer, p):
        return Pair(p["A"], p["B"], self.scale, gain=p["m"] / self.norm(layer, p))


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(LowRank):
    """P diag(Lambda) Q, a budget over all layers."""

    gamma: float = 0.5
    keep: int = 3  # triplets over all layers

    def init(self, layer, gen):
        return {
            "A": nn.Parameter(torch.randn(self.r, layer.in_features, generator=gen) * 0.02),
            "B": nn.Parameter(torch.randn(layer.out_features, self.r, generator=gen) * 0.02),
            "E": nn.Parameter(torch.zeros(self.r)),
        }

    def pair(self, layer, p):
        return Pair(p["A"], p["B"], p["E"] * (self.alpha / (self.r + 1e-5)))

    def penalty(self, sites):
        eye = torch.eye(self.r)
        each = [(s.p["A"] @ s.p["A"].T - eye).norm() + (s.p["B"].T @ s.p["B"] - eye).norm() for s in sites]
        return self.gamma * torch.stack(each).sum() / (2 * len(each))

    @torch.no_grad()
    def after_step(self, sites, step, num_steps):
        score = torch.cat([(s.p["E"] * s.p["E"].grad).abs() for s in sites])
        threshold = score.topk(self.keep).values[-1]
        for s in sites:
            s.p["E"][(s.p["E"] * s.p["E"].grad).abs() < threshold] = 0


@dataclass(frozen=True, kw_only=True)
class PiSSA(LoRA):
    """The top singular part of W, as an offset: [A; A - A0], [B - B0, B0], exactly zero at the start."""

    def init(self, layer, gen):
        u, s, v = torch.linalg.svd(layer.weight().float(), full_matrices=False)
        root = (s[: self.r] / self.scale).sqrt()
        a_RI, b_OR = root[:, None] * v[: self.r], u[:, : self.r] * root
        return {"A": nn.Parameter(a_RI), "B": nn.Parameter(b_OR), "A0": a_RI.clone(), "B0": b_OR.clone()}

    def pair(self, layer, p):
        rows = torch.cat([p["A"], p["A"] - p["A0"]])
        columns = torch.cat([p["B"] - p["B0"], p["B0"]], 1)
        return Pair(rows, columns, self.scale)


@dataclass(frozen=True, kw_only=True)
class DeltaLoRA(LoRA):
    """W moves by the change of BA: in branch form, so W itself stays."""

    lam: float = 2.0
    start: int = 0

    def init(self, layer, gen):
        p = super().init(layer, gen)
        return p | {"A_K": p["A"].detach().clone(), "B_K": p["B"].detach().clone()}

    def pair(self, layer, p):
        a, b, lam = p["A"], p["B"], self.lam
        rows = torch.cat([a.detach() + (a - a.detach()) / (1 + lam), p["A_K"]])
        columns = torch.cat([b + lam * b.detach(), -lam * p["B_K"]], 1)
        return Pair(rows, columns, self.scale)

    @torch.no_grad()
    def after_step(self, sites, step, num_steps):
        if step <= self.start:
            for s in sites:
                s.p["A_K"].copy_(s.p["A"])
                s.p["B_K"].copy_(s.p["B"])


@dataclass(frozen=True, kw_only=True)
class ALoRA(LoRA):
    """LoRA from the last invocation token on."""

    token: int = 7
    per_token = True

    def token_mask(self, ids_BT, position_BT):
        hits = (ids_BT == self.token).long()
        later = hits.sum(1, keepdim=True) - hits.cumsum(1)  # invocations still to come
        return (later == 0) & (hits.sum(1, keepdim=True) > 0)


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """y + W_up relu(W_down y): works on the output, so there is nothing to merge."""

    def init(self, layer, gen):
        return {
            "down": nn.Parameter(torch.randn(self.r, layer.out_features, generator=gen) * 0.1),
            "up": nn.Parameter(torch.zeros(layer.out_features, self.r)),
        }

    def update(self, layer, p, x, y):
        return torch.relu(y @ p["down"].T) @ p["up"].T

    def delta(self, layer, p):
        raise NotMergeable("a bottleneck adapter is not a change of W")


TRIAL = {kind.__name__.lower(): kind for kind in (VeRA, DoRA, AdaLoRA, PiSSA, DeltaLoRA, ALoRA, Bottleneck)}
