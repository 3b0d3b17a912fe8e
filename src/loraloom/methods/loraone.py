"""LoRA-One: let the start be the best step of rank r that full fine-tuning could take first.

    -G = -dL/dW = U S V^T over a few batches      s = alpha / sqrt(r)
    A = sqrt(S_r / S_1) V_r^T / sqrt(gamma),   B = U_r sqrt(S_r / S_1) / sqrt(gamma)

so that s B A points down the gradient, with spectral norm s / gamma. It is meant to change the model: nothing is
taken off W, and the first loss is the one after that step. Where the gradient has fewer than r directions,
LoRA's own start stands in for the others.

precondition  before each step, so that small singular values learn as fast as large ones:

    g_A <- (B^T B + d I)^-1 g_A,   g_B <- g_B (A A^T + d I)^-1       d = damping

source  Zhang, Liu and Chen 2025, arXiv:2502.01235, algorithm 1; alpha / sqrt(r), gamma and damping are those of
        the authors' code
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ._data import SeesGradients, leading
from ._svd import split, top
from .base import Site, Tensors, check, option
from .lora import LoRA


@dataclass(frozen=True, kw_only=True)
class LoRAOne(SeesGradients, LoRA):
    gamma: float = option(128.0, "the start's spectral norm is s / gamma")
    precondition: bool = option(True, "even out the gradients of A and B by each other's size")
    damping: float = option(1e-6, "what keeps the preconditioner's inverse finite")

    learning_rate: ClassVar[float] = 2e-5
    rate_source: ClassVar[str] = "the authors' code for Llama-2-7B, conf/model/llama.yaml"

    @property
    def identity(self) -> bool:
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        check("gamma", self.gamma, least=1e-9)
        check("damping", self.damping, least=0)

    def found(self, site: Site, store: Tensors) -> Tensors:
        if not store or not bool(store["G"].any()):
            return {}
        u_OR, s_R, v_RI = top(leading(-store["G"], 4 * site.method.r, self.niter), site.method.r)
        spare = (site.p["A"].detach(), site.p["B"].detach())
        ratio_R = s_R / s_R[0]
        noise = torch.finfo(s_R.dtype).eps * max(store["G"].shape)  # what rounding makes of a zero
        ratio_R = torch.where(ratio_R > noise, ratio_R, 0)
        a_RI, b_OR = split((u_OR, ratio_R, v_RI), self.gamma, spare)
        return {"A": nn.Parameter(a_RI.contiguous()), "B": nn.Parameter(b_OR.contiguous())}

    @torch.no_grad()
    def before_step(self, sites: Sequence[Site], step: int) -> None:
        for site in sites if self.precondition else ():
            a_RI, b_OR = site.p["A"], site.p["B"]
            if a_RI.grad is None or b_OR.grad is None:
                continue
            eye_RR = self.damping * torch.eye(len(a_RI), device=a_RI.device, dtype=a_RI.dtype)
            # without a check of the result, so that a GPU need not be waited for in each layer
            a_RI.grad = torch.linalg.solve_ex(b_OR.T @ b_OR + eye_RR, a_RI.grad)[0]
            b_OR.grad = torch.linalg.solve_ex(a_RI @ a_RI.T + eye_RR, b_OR.grad, left=False)[0]

    def peft_config(self) -> dict[str, Any]:
        return {"use_rslora": True}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        return None  # its files are rsLoRA's
