"""The loss on held-out examples: total nats over total targets, and the same of each example.

Training evaluates with it, and so does `loraloom eval`, so both mean the same number. Sums are taken in
float64 over all labelled tokens: neither packing nor the size of a batch moves the result beyond rounding.

source  tests/test_evaluate.py: equals one example at a time
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor, nn

from .data.examples import Example
from .dressing import dress, holding
from .errors import DataError, NonFinite
from .nll import evaluating, token_nll
from .packing import TOKENS, pack


@dataclass(frozen=True)
class Loss:
    """nats  total over all targets | targets  how many | per_example  (nats, targets) in the order given"""

    nats: float
    targets: int
    per_example: list[tuple[float, int]]

    @property
    def mean(self) -> float:
        """Nats per target."""
        return self.nats / self.targets

    @property
    def perplexity(self) -> float:
        return exp(
            min(self.mean, 700.0)
        )  # exp overflows beyond; such a model has no finite perplexity to compare


def held_out(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    pad_id: int,
    micro_tokens: int,
    packing: bool,
    on_batch: Callable[[int], None] | None = None,
) -> Loss:
    """The loss of the model as it is now, without gradients, on every labelled token.

    The model's dropout is off inside; the adapters' own is turned off by their `eval()`.

    on_batch  called after each forward pass with the number of examples it held

    raises  DataError if no token is labelled, NonFinite if an example's loss is not a number
    """
    device = next(model.parameters()).device
    nats = torch.zeros(len(examples), dtype=torch.float64)
    targets = torch.zeros(len(examples), dtype=torch.int64)
    found: list[tuple[Tensor, Tensor]] = []
    with evaluating(model), holding(model):
        for batch in pack(dress(model, examples), micro_tokens=micro_tokens, packing=packing, pad_id=pad_id):
            nll_L, _ = token_nll(model, batch.to(device))
            found.append((batch.token.flatten()[batch.target_at] // TOKENS, nll_L))
            if on_batch:
                on_batch(len(batch.rows))
    for member_L, nll_L in found:  # all passes are queued by now: a GPU is waited for once
        nats.index_add_(0, member_L, nll_L.cpu().double())
        targets.index_add_(0, member_L, torch.ones_like(member_L))
    if not targets.any():
        raise DataError(
            "no token of the held-out examples carries loss", hint="look at `loraloom data` and data.loss_on"
        )
    broken = (~nats.isfinite()).nonzero().flatten().tolist()
    if broken:
        broken = [i for i in broken if is_broken(model, examples[i], pad_id)] or broken
        raise NonFinite(
            f"the loss of {len(broken)} held-out examples is not a finite number",
            details=[examples[i].row for i in broken[:10]],
            hint="look at these rows; if all are broken, train a new run with a lower train.learning_rate",
        )
    return Loss(
        float(nats.sum()), int(targets.sum()), list(zip(nats.tolist(), targets.tolist(), strict=True))
    )


def is_broken(model: nn.Module, example: Example, pad_id: int) -> bool:
    """Whether an example's loss is no number where it stands alone: in one line it may break its neighbours'."""
    with evaluating(model), holding(model):
        (batch,) = pack(dress(model, [example]), micro_tokens=1, packing=False, pad_id=pad_id)
        nll_L, _ = token_nll(model, batch.to(next(model.parameters()).device))
        return not bool(nll_L.isfinite().all())
