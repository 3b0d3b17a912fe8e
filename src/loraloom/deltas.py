"""What one adapter does to one layer: its change of W, whether it learnt, the directions of its own A and B."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .analysis import Spectrum, Update, right_axes
from .layers import BlockLayer
from .methods.base import LowRank, Site
from .peft_tensors import folded


def has_update(site: Site) -> bool:
    """Whether a method changes W, if perhaps for some tokens only."""
    return isinstance(site.method, LowRank) or site.method.mergeable


@torch.no_grad()
def update_of(site: Site) -> Update:
    """The change of W: thin if the method is a low-rank pair alone."""
    if isinstance(site.method, LowRank):
        pair = site.method.pair(site.layer, site.p)
        if pair.gain is None:
            return Update(B=folded(pair).detach(), A=pair.A.detach())
    return Update(whole=site.method.delta(site.layer, site.p).detach())


def update_without(site: Site) -> Update | None:
    """The same without W; None for a method whose update needs it."""
    if isinstance(site.layer, BlockLayer) or not has_update(site):
        return None
    try:
        update = update_of(site)
    except NotImplementedError:  # torch's word for numbers that a weight on meta does not have
        return None
    parts = [part for part in (update.A, update.B, update.whole) if part is not None]
    return None if any(part.is_meta for part in parts) else update


def state_of(site: Site, update: Update) -> str:
    """learnt, not finite, or why the update is zero."""
    state = zero_or_not(update)
    if state != "zero":
        return state
    zero = [name for name, tensor in site.p.items() if isinstance(tensor, nn.Parameter) and not tensor.any()]
    return f"zero: {', '.join(zero)} is zero" if zero else state


def zero_or_not(update: Update) -> str:
    if not update.finite:
        return "not finite"
    if update.whole is not None:
        return "learnt" if bool(update.whole.any()) else "zero"
    assert update.A is not None
    assert update.B is not None
    alive = update.A.any(dim=1) & update.B.any(dim=0)
    return "learnt" if bool(alive.any()) else "zero"


@torch.no_grad()
def own_axes(site: Site) -> tuple[Tensor, Tensor] | None:
    """The right singular vectors of A and the left ones of B; None if a method does not train both.

    A is weighed as the forward pass weighs it: AdaLoRA's rows by Lambda.
    """
    a_RI, b_OR = site.p.get("A"), site.p.get("B")
    if not (isinstance(a_RI, nn.Parameter) and isinstance(b_OR, nn.Parameter)):
        return None
    e_R = site.p.get("E")
    a = a_RI.detach() if e_R is None else a_RI.detach() * e_R.detach().reshape(-1, 1)
    b = b_OR.detach()
    if not (a.isfinite().all() and b.isfinite().all() and a.any() and b.any()):
        return None
    return right_axes(a), right_axes(b.T)


def directions(update: Update, found: Spectrum, r: int) -> int:
    """How many singular directions count: all of a thin product's, and r of what has full rank by its nature."""
    return found.rank if update.whole is None else min(r, found.rank)
