"""Which products with quantised weights are taken in 8-bit floats, forward and backward, and why others are not.

    y = q(x) q(W)^T      dx = q(dy) q(W^T)^T      q: e4m3, each row by its own scale; adapters and the rest in 16 bits

A weight takes part if its sides are multiples of 16 and at most `LOST` of its weights would come out as zeros in
either layout: e4m3 has 18 binades under a channel's largest weight.

raises  UserError where 8-bit products are asked for and cannot be had
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from .errors import UserError
from .kernels.fp8 import fp8_reason, width_reason
from .kernels.matmul_frozen import release_buffers
from .quant import PIECE, AnyCodes, Weight4

LOST = 1e-3  # of the weights that are not zero, those that may come out as zeros
LEAST = 2.0**-10  # of a channel's scale: what e4m3 rounds to zero


def use_fp8(model: nn.Module, wanted: bool | Literal["auto"], device: torch.device) -> list[str]:
    """Let quantised weights be multiplied in 8-bit floats; gives notes on those that stay as they are.

    wanted  auto: where the device has the instructions; true on a CPU computes the same numbers, slowly
    """
    held = {name: p for name, p in model.named_parameters() if isinstance(p, Weight4)}
    if wanted is True and not held:
        raise UserError(
            "model.fp8=true: no weight of this model is quantised, and dense ones are multiplied as they are",
            hint="set model.quantize=fp8, or nf4; or leave model.fp8 out",
        )
    reason = fp8_reason(device)
    if wanted is True and reason is not None and device.type not in ("cpu", "meta"):
        raise UserError(
            f"model.fp8=true: there are no 8-bit products here: {reason}", hint="leave model.fp8 out"
        )
    if wanted is False or (wanted == "auto" and reason is not None):
        return []
    stay: dict[str, list[str]] = {}
    for name, weight in held.items():
        measured = weight.codes.with_channels()
        why = why_not(measured)
        if why is None:
            weight.codes = measured
        else:
            stay.setdefault(why, []).append(name)
    notes = [note(names, why) for why, names in stay.items()]
    if wanted is True and device.type != "meta" and sum(map(len, stay.values())) == len(held):
        raise UserError(
            "model.fp8=true: no weight of this model can be multiplied in 8-bit floats",
            details=notes,
            hint="leave model.fp8 out",
        )
    return notes


@contextmanager
def plain_products(model: nn.Module) -> Iterator[None]:
    """No product is taken in 8-bit floats inside: for proofs that compare two ways to compute the same.

    A last bit that differs may cross a rounding of e4m3, which is a sixteenth, and on through all layers.
    """
    held = [p for p in model.parameters() if isinstance(p, Weight4) and p.fp8]
    before = [weight.codes for weight in held]
    for weight, codes in zip(held, before):
        weight.codes = codes.without_channels()
    try:
        yield
    finally:
        for weight, codes in zip(held, before):
            weight.codes = codes
        if held:
            release_buffers()  # of 16-bit products; whichever weight has no others makes it again


def note(names: list[str], why: str) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"not multiplied in 8-bit floats: {shown} ({why})"


def why_not(codes: AnyCodes) -> str | None:
    """Why a weight, its channels measured, is not to be multiplied in 8-bit floats; None if it may."""
    odd = width_reason(*codes.shape)
    if odd is not None or codes.packed.is_meta:
        return odd
    parts = [codes] if codes.experts is None else [codes.expert(e) for e in range(codes.experts)]
    counts = torch.stack([count for part in parts for count in zeros(part)]).sum(0).tolist()
    lost = max(counts[1:]) / max(counts[0], 1)
    if lost > LOST:
        return f"{lost:.1%} of the weights are too small beside their channel's largest"
    return None


def zeros(codes: AnyCodes) -> Iterator[torch.Tensor]:
    """Piece by piece: weights that are not zero, and those of them that e4m3 makes zero over rows and over columns."""
    rows, columns = codes.both
    step = max(1, PIECE // codes.shape[1])
    for start in range(0, codes.shape[0], step):
        w = codes.lines(start, min(start + step, codes.shape[0]), torch.float32).abs_()
        some = w > 0
        low = w <= LEAST * rows[start : start + step, None], w <= LEAST * columns
        yield torch.stack([some.sum(), *((some & part).sum() for part in low)])
