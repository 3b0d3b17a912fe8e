"""AdaLoRA: a low-rank update in the form of an SVD, and one budget of ranks for all layers.

    y = x W^T + s (Lambda * (x Q^T)) P^T + bias        s = alpha / (r + 1e-5)

         x_I --- Q (r, I) --- * Lambda (r,) --- P (O, r) --- s --- + y_O        A = Q, B = P, E = Lambda

Lambda is zero at the start, Q and P are drawn from N(0, 0.02^2). A penalty keeps Q's rows and P's columns near
orthonormal. While the budget b(t) falls from all triplets to `target_r` a layer, the least important triplets
of all layers together lose their Lambda, and only that, so that they can come back:

    b(t) = b(T) + (b(0) - b(T)) (1 - (t - t_i) / (T - t_i - t_f))^3        t_i < t <= T - t_f

    importance of w     I = |w dL/dw|,  m <- beta1 m + (1 - beta1) I,  u <- beta2 u + (1 - beta2) |I - m|,  m u
    of a triplet        that of its Lambda, and the means over its row of Q and its column of P

t counts the optimizer steps taken. At T - t_f the mask is final. What ties with the last triplet to go goes with
it, and a layer may be left with none. T must be the run's true number of steps; the trainer knows it.

Differences from PEFT: `tinit` and `tfinal` can be shares of the run. Where PEFT is called with the steps before
the current one, as the authors do, t_f = 0 never reaches the final mask; here t = T does. Its files drop what the
last mask has dropped, which with deltaT > 1 may have come back; here a file drops the triplets whose Lambda is
zero, so that it computes what was trained.

source  Zhang et al. 2023, arXiv:2303.10512, sections 3.1 to 3.3. Its equation 12 is misprinted, b(t) is PEFT's.
        Its gamma goes with a sum of squared norms, PEFT's 0.5 with the mean of plain norms
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import Layer
from .base import Pair, Site, Tensors, option
from .lora import LoRA

TRAINED = ("A", "B", "E")
TRIPLETS = {"lora_A": 0, "lora_B": 1, "lora_E": 0}  # PEFT's names, and which dimension counts triplets
FORMS = ("mean", "squares")


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(LoRA):
    target_r: int = option(
        0, "ranks left at the end, on average over layers; 0: two thirds of r, as the paper"
    )
    tinit: float = option(0.1, "steps before the budget falls; below 1, a share of the run")
    tfinal: float = option(0.5, "steps at the end with the final mask; below 1, a share of the run")
    deltaT: int = option(10, "steps from one choice of triplets to the next")
    beta1: float = option(0.85, "of the mean of importance")
    beta2: float = option(0.85, "of the mean of its uncertainty")
    orth: float = option(0.5, "weight of the penalty; PEFT's orth_reg_weight, the paper's gamma")
    orth_form: str = option("mean", "mean of plain norms, as PEFT; or squares: their sum, as the paper (0.1)")

    learning_rate: ClassVar[float] = 5e-4
    rate_source: ClassVar[str] = "the paper's GLUE runs: 5e-4 (CoLA) to 2.2e-3"
    working: ClassVar[frozenset[str]] = frozenset({"keep"} | {f"{x}_{m}" for x in TRAINED for m in "mu"})

    peft_type: ClassVar[str | None] = "ADALORA"
    peft_keys: ClassVar[Mapping[str, str]] = {"A": "lora_A", "B": "lora_B", "E": "lora_E"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)!r}", hint="it is between 0 and 1")
        for name, least in (("target_r", 0), ("deltaT", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)!r}", hint=f"a whole number from {least} up")
        if self.orth < 0:
            raise UserError(f"orth is {self.orth!r}", hint="it is the weight of a penalty: zero or more")
        if self.orth_form not in FORMS:
            raise UserError(f"orth_form is {self.orth_form!r}", hint=f"it can be {' or '.join(FORMS)}")
        if min(self.tinit, self.tfinal) < 0 or (max(self.tinit, self.tfinal) < 1 <= self.tinit + self.tfinal):
            raise UserError(
                f"tinit {self.tinit} and tfinal {self.tfinal} leave the budget no steps to fall in",
                hint="as shares of the run, they must add up to less than 1",
            )

    @staticmethod
    def denominator(r: int) -> float:
        return r + 1e-5

    @property
    def scale(self) -> float:
        return (self.alpha if self.alpha > 0 else self.r) / self.denominator(self.r)

    def init(self, layer: Layer, gen: torch.Generator) -> Tensors:
        """A and B normal, E zero, also on an embedding: E alone keeps the start. No importance yet, all kept."""
        p: Tensors = {
            "A": nn.Parameter(torch.empty(self.r, layer.in_features).normal_(0, 0.02, generator=gen)),
            "B": nn.Parameter(torch.empty(layer.out_features, self.r).normal_(0, 0.02, generator=gen)),
            "E": nn.Parameter(torch.zeros(self.r)),
        }
        means = {f"{name}_{m}": torch.zeros(p[name].shape) for name in TRAINED for m in "mu"}
        return p | means | {"keep": torch.ones(self.r)}

    def pair(self, layer: Layer, p: Tensors) -> Pair:
        return Pair(p["A"], p["B"], p["E"] * self.scale)

    # ---- orthogonality ----------------------------------------------------------------------------------

    def penalty(self, sites: Sequence[Site]) -> Tensor | None:
        """How far Q Q^T and P^T P are from I over all layers, times `orth`."""
        if self.orth == 0 or not sites:
            return None
        grams = [g for site in sites for g in (site.p["A"] @ site.p["A"].T, site.p["B"].T @ site.p["B"])]
        off = [gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device) for gram in grams]
        if self.orth_form == "mean":
            return self.orth * together([o.norm() for o in off]).mean()
        return self.orth * together([o.square().sum() for o in off]).sum()

    # ---- the budget -------------------------------------------------------------------------------------

    @property
    def target(self) -> int:
        """Triplets left at the end, on average over layers."""
        return self.target_r or max(1, self.r * 2 // 3)

    def check_steps(self, num_steps: int) -> None:
        self.phases(num_steps)

    def phases(self, num_steps: int) -> tuple[int, int]:
        """t_i and T - t_f: the budget falls between them.

        raises  UserError if nothing lies between them
        """
        first, rest = (int(x * num_steps) if x < 1 else int(x) for x in (self.tinit, self.tfinal))
        if first >= num_steps - rest:
            raise UserError(
                f"adalora's tinit {self.tinit:g} and tfinal {self.tfinal:g} leave none of {num_steps} steps "
                "for the budget to fall in",
                hint="lower them, or train for more steps",
            )
        return first, num_steps - rest

    def budget(self, t: int, num_steps: int, whole: int, layers: int) -> int:
        """b(t): triplets left over all layers after t steps, of `whole` at the start."""
        first, last = self.phases(num_steps)
        target = min(whole, layers * self.target)
        if t <= first:
            return whole
        if t >= last:
            return target
        return int(target + (whole - target) * (1 - (t - first) / (last - first)) ** 3)

    @torch.no_grad()
    def after_step(self, sites: Sequence[Site], step: int, num_steps: int) -> None:
        """Take in the step's importance, as the gradient is after clipping; at their times, choose and mask."""
        t, (first, last) = step + 1, self.phases(num_steps)
        if t < last:
            for site in sites:
                self.track(site.p)
        if t == last or (first < t < last and t % self.deltaT == 0):
            whole = sum(len(site.p["E"]) for site in sites)
            choose(sites, whole - self.budget(t, num_steps, whole, len(sites)))
        if t > last:
            for site in sites:
                site.p["E"].mul_(site.p["keep"])

    def track(self, p: Tensors) -> None:
        """One step of the two running means; a tensor without a gradient mattered to nothing."""
        for name in TRAINED:
            grad, mean, unsure = p[name].grad, p[f"{name}_m"], p[f"{name}_u"]
            now = torch.zeros_like(mean) if grad is None else (p[name] * grad).abs()
            mean.copy_(self.beta1 * mean + (1 - self.beta1) * now)
            unsure.copy_(self.beta2 * unsure + (1 - self.beta2) * (now - mean).abs())

    # ---- as PEFT has it ---------------------------------------------------------------------------------

    def peft_config(self) -> dict[str, Any]:
        """PEFT asks for a schedule even of an adapter that is done: T follows t_i and t_f, shares are left out."""
        steps = {
            name: int(x) if x >= 1 else 0 for name, x in (("tinit", self.tinit), ("tfinal", self.tfinal))
        }
        return {
            "target_r": self.target,
            **steps,
            "total_step": sum(steps.values()) + 1,
            "deltaT": self.deltaT,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "orth_reg_weight": self.orth,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """PEFT's names and defaults."""
        return {
            "target_r": config.get("target_r", 8),
            "tinit": config.get("tinit", 0),
            "tfinal": config.get("tfinal", 0),
            "deltaT": config.get("deltaT", 1),
            "beta1": config.get("beta1", 0.85),
            "beta2": config.get("beta2", 0.85),
            "orth": config.get("orth_reg_weight", 0.5),
        }

    def packed(self, tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
        """Without the triplets whose Lambda is zero; before training, when all are, with all of them."""
        kept = {stem: tensors[f"{stem}.lora_E"][:, 0] != 0 for stem in stems(tensors)}
        if not any(marks.any() for marks in kept.values()) or all(marks.all() for marks in kept.values()):
            return tensors, {}
        packed = dict(tensors)
        for stem, marks in kept.items():
            for name, dim in TRIPLETS.items():
                part = tensors[f"{stem}.{name}"]
                packed[f"{stem}.{name}"] = part.index_select(dim, marks.nonzero()[:, 0])
        return packed, {"rank_pattern": {pattern_key(stem): marks.tolist() for stem, marks in kept.items()}}

    @classmethod
    def unpacked(cls, tensors: Tensors, config: Mapping[str, Any], whole: Mapping[str, Tensor]) -> Tensors:
        unpacked = dict(tensors)
        for stem in stems(tensors):
            marks = (config.get("rank_pattern") or {}).get(pattern_key(stem))
            for name, dim in TRIPLETS.items():
                part, like = tensors.get(f"{stem}.{name}"), whole.get(f"{stem}.{name}")
                if marks is not None and part is not None and like is not None:
                    unpacked[f"{stem}.{name}"] = with_zeros(part, dim, marks, like)
        return unpacked


def choose(sites: Sequence[Site], surplus: int) -> None:
    """Mark the least important triplets of all layers, `surplus` of them and what ties, and zero their Lambda."""
    scores = [triplet_scores(site.p) for site in sites]
    if surplus >= 1:  # there is no zeroth smallest
        limit = together(scores).kthvalue(surplus).values
    for site, score in zip(sites, scores):
        keep = torch.ones_like(score) if surplus < 1 else (score > limit.to(score.device)).to(score)
        site.p["keep"].copy_(keep)
        site.p["E"].mul_(site.p["keep"])


def triplet_scores(p: Tensors) -> Tensor:
    """(r,) how much the loss moves with each triplet, times how unsure that is."""
    of = {name: p[f"{name}_m"] * p[f"{name}_u"] for name in TRAINED}
    return of["E"] + (of["A"].mean(1) + of["B"].mean(0))


def together(parts: Sequence[Tensor]) -> Tensor:
    """Numbers of all layers, wherever they are, in one vector."""
    return torch.cat([part.reshape(-1).to(parts[0].device) for part in parts])


def stems(tensors: Mapping[str, Tensor]) -> list[str]:
    """The modules of a file, as its keys begin."""
    return [key.removesuffix(".lora_E") for key in tensors if key.endswith(".lora_E")]


def pattern_key(stem: str) -> str:
    """PEFT's patterns name modules without the prefix of its files' keys."""
    return f"{stem.removeprefix('base_model.model.')}.lora_E"


def with_zeros(part: Tensor, dim: int, marks: Sequence[bool], like: Tensor) -> Tensor:
    """A file's tensor in the adapter's shape, zero where a triplet was dropped; as it is if it does not fit."""
    places = torch.tensor(marks, dtype=torch.bool).nonzero()[:, 0]
    fits = part.dim() == 2 and part.shape[1 - dim] == like.shape[1 - dim]
    if fits and len(marks) == like.shape[dim] and len(places) == part.shape[dim]:
        return part.new_zeros(like.shape).index_copy(dim, places, part)
    return part
