"""What methods share that look at data before the first step: how much of it, and what is made of gradients.

shapes  T tokens, I in, O out; G (O, I), float32
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._svd import SVD, decomposed
from .base import Method, Site, Tensors, check, option

SMALL = 512  # a matrix whose smaller side is no larger is decomposed exactly: it takes no time worth saving


@dataclass(frozen=True, kw_only=True)
class SeesData(Method):
    """A method that is shown examples before the first step."""

    samples: int = option(256, "examples looked at before the first step")

    def __post_init__(self) -> None:
        super().__post_init__()
        check("samples", self.samples, whole=True, least=1)

    def probes(self) -> tuple[int, int]:
        return self.samples, 0


@dataclass(frozen=True, kw_only=True)
class SeesGradients(SeesData):
    """A method that starts from G = dL/dW, summed over the examples it is shown.

    Only G's singular vectors and the ratios of its singular values are used: neither depends on whether the
    loss is a sum or a mean.
    """

    samples: int = option(64, "examples whose gradient is taken before the first step")
    niter: int = option(4, "steps of the fast decomposition of large gradients; 0 is the exact one")

    needs: ClassVar[str | None] = "gradients"

    @staticmethod
    def denominator(r: int) -> float:
        """As rsLoRA's: both papers start so that the first output keeps its size as r grows."""
        return math.sqrt(r)

    def __post_init__(self) -> None:
        super().__post_init__()
        check("niter", self.niter, whole=True, least=0)

    def observe(
        self, site: Site, store: Tensors, x_TI: Tensor, g_TO: Tensor | None, labelled_T: Tensor
    ) -> None:
        """G += g^T x: the gradient that W would have, though it is frozen or kept in 4 bits."""
        assert g_TO is not None
        g_OI = g_TO.float().T @ x_TI.float()
        store["G"] = store["G"].add_(g_OI) if "G" in store else g_OI


def leading(w_OI: Tensor, least: int, niter: int) -> SVD:
    """At least the `least` largest singular values, or as many as there are; exact if niter is 0 or w small."""
    small = min(w_OI.shape) <= max(SMALL, least)
    return decomposed(w_OI, least, 0 if small else niter, torch.Generator().manual_seed(0))
