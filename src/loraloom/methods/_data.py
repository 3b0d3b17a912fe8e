"""What methods share that look at data before the first step: how much of it, and what is made of gradients.

shapes  T tokens, I in, O out; G (O, I), float32
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from ._svd import SVD, exact_svd, fast_svd
from .base import Method, Site, Tensors, option

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
    if niter == 0 or min(w_OI.shape) <= max(SMALL, least):
        return exact_svd(w_OI)
    return fast_svd(w_OI, least, niter, torch.Generator().manual_seed(0))


def check(name: str, value: Any, *, whole: bool = False, least: float, most: float = float("inf")) -> None:
    """Let a number in range pass.

    raises  UserError
    """
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        upto = "up" if most == float("inf") else f"to {most:g}"
        raise UserError(f"method.{name} is {value!r}", hint=f"it is {kind} from {least:g} {upto}")


def choose(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Let a known word pass.

    raises  UserError
    """
    if value not in known:
        raise UserError(f"method.{name} is {value!r}", hint=f"it can be {', '.join(known)}")
