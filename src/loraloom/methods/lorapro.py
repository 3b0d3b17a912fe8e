"""LoRA-Pro: change the gradients of A and B so that the step of s B A is nearest to full fine-tuning's.

    g'_A = (B^T B)^-1 g_A / s^2 + X A
    g'_B = (I - B (B^T B)^-1 B^T) g_B (A A^T)^-1 / s^2 - B X

W moves by s (B g'_A + g'_B A): for every X (r, r) the same, the projection of W's gradient on what a step of A
and B can reach. X shares the part that both can express:

    sylvester   B^T B X + X A A^T = -(B^T B)^-1 g_A A^T / s^2: g'_A and g'_B nearest to g_A and g_B
    symmetric   X = -(B^T B)^-1 g_A A^T (A A^T)^-1 / (2 s^2): half to each
    zero        X = 0: all of it to A

Everything is LoRA's but this, which comes before any optimizer. The products are thin or r x r; B (B^T B)^-1 B^T
is never formed. While A or B is zero, as B is at the start, the gradients stay as they are: there is nothing to
project on yet. Directions below float32's rounding are left out, where the authors' code adds 1e-8; in its
symmetric choice A A^T is not inverted, which is not the half. The variant with moments of the whole gradient is
not this one: it takes the memory of full fine-tuning.

source  Wang et al. 2024, arXiv:2407.18242, theorems 2.1 to 2.3
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from .base import Site, option
from .lora import LoRA

CHOICES = ("sylvester", "symmetric", "zero")


@dataclass(frozen=True, kw_only=True)
class LoRAPro(LoRA):
    x: str = option("sylvester", "how A and B share what both can express: sylvester, symmetric or zero")

    rate_source: ClassVar[str] = "LoRA's; the paper tunes it per task"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.x not in CHOICES:
            raise UserError(f"x is {self.x!r}", hint=f"it can be {', '.join(CHOICES)}")

    @torch.no_grad()
    def before_step(self, sites: Sequence[Site], step: int) -> None:
        """Sites of one rank are decomposed together: one call for all of them."""
        groups: dict[tuple[int, torch.device], list[Site]] = {}
        for site in sites:
            if all(parameter.grad is not None for parameter in site.trainable):
                groups.setdefault((site.method.r, site.p["A"].device), []).append(site)
        for group in groups.values():
            grams = [site.p["B"].T @ site.p["B"] for site in group]
            grams += [site.p["A"] @ site.p["A"].T for site in group]
            values, vectors = torch.linalg.eigh(torch.stack(grams))
            tiny = torch.finfo(values.dtype).eps * values.shape[1] * values[:, -1:]
            values = torch.where(values > tiny, values, 0)
            n = len(group)
            for i, site in enumerate(group):
                self.correct(site, values[i], vectors[i], values[n + i], vectors[n + i])

    def correct(self, site: Site, lam: Tensor, u: Tensor, mu: Tensor, v: Tensor) -> None:
        """Put g'_A and g'_B in the gradients' place.

        lam, u  B^T B = u diag(lam) u^T
        mu, v   A A^T = v diag(mu) v^T
        """
        a_RI, b_OR = site.p["A"], site.p["B"]
        assert a_RI.grad is not None
        assert b_OR.grad is not None
        s2 = site.method.scale**2  # type: ignore[attr-defined]
        bb, aa = (u * inverse(lam)) @ u.T, (v * inverse(mu)) @ v.T
        step_a = bb @ a_RI.grad / s2
        step_b = b_OR.grad @ aa / s2
        both = step_a @ a_RI.T  # r x r: what A's step says where B could say it too
        step_b -= b_OR @ (bb @ (b_OR.T @ step_b))
        if self.x == "sylvester":
            x = -u @ (u.T @ both @ v * inverse(lam[:, None] + mu)) @ v.T
        elif self.x == "symmetric":
            x = -0.5 * both @ aa
        else:
            x = torch.zeros_like(both)
        begun = (lam[-1] > 0) & (mu[-1] > 0)
        a_RI.grad.copy_(torch.where(begun, step_a + x @ a_RI, a_RI.grad))
        b_OR.grad.copy_(torch.where(begun, step_b - b_OR @ x, b_OR.grad))

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        return None  # its files are LoRA's


def inverse(values: Tensor) -> Tensor:
    """1 / value, and 0 where there is none."""
    return torch.where(values > 0, 1 / values, 0)
