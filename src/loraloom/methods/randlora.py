"""RandLoRA: a change of W of full rank, from random matrices that all layers share.

    y = x W^T + s x (U V)^T + bias        V = lambda * A * gamma,   s = alpha / r        U, A frozen

With D the smaller side of W, C the larger and N = ceil(D / r):

    A (r, 1, D), lambda (r, N), gamma (N, D)    V (r N, D):  V[k N + n] = lambda[k, n] * gamma[n] * A[k]
    B (C, N, r)                                 U (C, N r):  the columns of B side by side

and where D is the output side the change of W is (U V)^T. lambda is zero at the start, so that the model is
unchanged, and gamma is 1 / max(N, D). A layer trains N (r + D) numbers: a smaller r means more of them. V is
as large as W; it is made for each pass and made again in backward, so that nothing of that size is kept. The
shared A and B take their D and C from the widest input and output of all layers, whatever layers these are of.

alpha = 20 r, PEFT's advice, makes steps large: where training is unstable lower it, or the learning rate.
One A and B for all layers, so one r and alpha: `rank_pattern` and `alpha_pattern` cannot work.

PEFT draws A and B in bfloat16 (in float16 on machines without it: its files are read as they are, but such a
file that leaves them out cannot be made again), divides by their standard deviation and goes on in the base's
dtype. U and V are paired in its order: column m of U is of base m // r, row m of V of base m % N. As the bases
are random this is the paper's sum over bases with their columns exchanged.

sparse       entries -1, 0, 1 with probabilities 1/6, 2/3, 1/6
very_sparse  1 / (2 sqrt(D)) for -1 and for 1, as PEFT's code has it; its documentation says twice that

source  Albert et al. 2025, arXiv:2502.00987; r, alpha and the draw as in PEFT, bit for bit
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import Layer
from ._frozen import Frozen
from .base import Tensors, option


@dataclass(frozen=True, kw_only=True)
class RandLoRA(Frozen):
    r: int = option(32, "the rank of each base; a smaller one trains more")
    alpha: float = option(640.0, "the scale's numerator: 20 r")
    sparse: bool = option(False, "bases of -1, 0 and 1, two thirds of them 0")
    very_sparse: bool = option(False, "bases of -1, 0 and 1, nearly all of them 0")

    learning_rate: ClassVar[float] = 1e-4
    rate_source: ClassVar[str] = "the paper's commonsense runs of LLaMA-3-8B, and PEFT's benchmark"

    peft_type: ClassVar[str | None] = "RANDLORA"
    peft_keys: ClassVar[Mapping[str, str]] = {"lambda": "randlora_lambda", "gamma": "randlora_gamma"}
    peft_shared: ClassVar[Mapping[str, str]] = {"A": "randlora_A", "B": "randlora_B"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sparse", "very_sparse"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} is {getattr(self, name)!r}", hint="it is true or false")
        if self.sparse and self.very_sparse:
            raise UserError("sparse and very_sparse are both set", hint="choose one")

    # ---- tensors ----------------------------------------------------------------------------------------

    def bases(self, layers: Sequence[Layer], gen: torch.Generator) -> Tensors:
        wide_I, wide_O = (max(getattr(x, side) for x in layers) for side in ("in_features", "out_features"))
        d, c = sorted((wide_I, wide_O))
        n = num_bases(d, self.r)
        if self.sparse or self.very_sparse:
            share = 1 / (2 * (math.sqrt(d) if self.very_sparse else 3))
            a_R1D = ternary(torch.rand(self.r, 1, d, generator=gen), share)
            b_CNR = ternary(torch.rand(c, n, self.r, generator=gen), share)
        else:
            a_R1D = uniform(self.r, 1, d, gen=gen)
            b_CNR = torch.cat([uniform(c, 1, self.r, gen=gen) for _ in range(n)], dim=1)
        return {"A": of_unit_spread(a_R1D), "B": of_unit_spread(b_CNR)}

    def vectors(self, layer: Layer) -> Tensors:
        d = min(layer.in_features, layer.out_features)
        n = num_bases(d, self.r)
        gamma_ND = torch.full((n, d), 1 / max(n, d))
        return {"lambda": nn.Parameter(torch.zeros(self.r, n)), "gamma": nn.Parameter(gamma_ND)}

    def parts(self, layer: Layer, p: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What V is made of, with s in lambda, (r, N), (N, D) and (r, 1, D), and U: views of what is shared."""
        d, c = sorted((layer.in_features, layer.out_features))
        lambda_RN = p["lambda"] * (self.alpha / self.r)
        u_CM = p["B"][:c, : lambda_RN.shape[1]].flatten(1)
        return lambda_RN, p["gamma"], p["A"][..., :d], u_CM

    # ---- what it does -----------------------------------------------------------------------------------

    def update(self, layer: Layer, p: Tensors, x: Tensor, y: Tensor) -> Tensor:
        *v, u_CM = self.parts(layer, p)
        if layer.out_features < layer.in_features:
            return Remade.apply(layer.down(x, u_CM.T), *v, True)
        products = type(layer).down is Layer.down  # a lookup or a convolution is not: there V is kept
        z = Remade.apply(x, *v, False) if products else layer.down(x, scaled(*v))
        return layer.up(z, u_CM)

    def delta(self, layer: Layer, p: Tensors) -> Tensor:
        *v, u_CM = self.parts(layer, p)
        product_CD = u_CM @ scaled(*v)
        return product_CD.T if layer.out_features < layer.in_features else product_CD

    # ---- as PEFT has it ---------------------------------------------------------------------------------

    def peft_config(self) -> dict[str, Any]:
        return {
            "projection_prng_key": self.projection_seed,
            "save_projection": True,
            "sparse": self.sparse,
            "very_sparse": self.very_sparse,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        very = bool(config.get("very_sparse"))  # of the two, PEFT heeds this one
        return {
            "projection_seed": config.get("projection_prng_key", 0),
            "sparse": bool(config.get("sparse")) and not very,
            "very_sparse": very,
        }


class Remade(torch.autograd.Function):
    """x V^T, or x V where V is the second factor, with V made anew in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lambda_RN: Tensor, gamma_ND: Tensor, a_R1D: Tensor, second: bool
    ) -> Tensor:
        ctx.save_for_backward(x, lambda_RN, gamma_ND, a_R1D)
        ctx.second = second
        v_MD = scaled(lambda_RN, gamma_ND, a_R1D)
        return x @ (v_MD if second else v_MD.T)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, lambda_RN, gamma_ND, a_R1D = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            v_MD = scaled(lambda_RN, gamma_ND, a_R1D)
            grad_x = g @ (v_MD.T if ctx.second else v_MD)
            del v_MD
        left, right = (x, g) if ctx.second else (g, x)
        v_grad = left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])
        by_base_RND = v_grad.view(*lambda_RN.shape, -1) * a_R1D
        grad_lambda = torch.einsum("rnd,nd->rn", by_base_RND, gamma_ND)
        grad_gamma = torch.einsum("rnd,rn->nd", by_base_RND, lambda_RN)
        return grad_x, grad_lambda, grad_gamma, None, None


def scaled(lambda_RN: Tensor, gamma_ND: Tensor, a_R1D: Tensor) -> Tensor:
    """V, (r N, D)."""
    return (lambda_RN[..., None] * a_R1D * gamma_ND).flatten(0, 1)


def num_bases(d: int, r: int) -> int:
    """How many bases of rank r make full rank."""
    return -(-d // r)


def uniform(*shape: int, gen: torch.Generator) -> Tensor:
    basis = torch.empty(shape, dtype=torch.bfloat16)
    return nn.init.kaiming_uniform_(basis, a=math.sqrt(5), generator=gen)


def ternary(even: Tensor, share: float) -> Tensor:
    """-1 and 1 for the lowest and the highest share of uniform numbers, and 0 between."""
    return (even > 1 - share).float() - (even < share).float()


def of_unit_spread(basis: Tensor) -> Tensor:
    """A basis over its standard deviation, float32.

    raises  UserError if all its entries are the same
    """
    spread = basis.std() if basis.numel() > 1 else basis.new_zeros(())
    if not spread > 0:
        raise UserError(
            f"RandLoRA's basis of shape {tuple(basis.shape)} has the same number everywhere",
            hint="it is too small: use a larger r, or do without very_sparse",
        )
    return (basis / spread).float()
