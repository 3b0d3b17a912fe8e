"""What the current forward pass is about: which adapters are in use, and which tokens are whose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Flow:
    """What all banks of a model share: which adapters are active, and what the current forward pass is about.

    active    names of the adapters in use, K of them
    mask_BMK  which of them owns a token, bool, M = T or 1 (the same for the whole row); None: each owns all
    token_BT  the numbers that key dropout; None: the place in the batch
    clock     steps, or forward passes where nobody counts steps: keys dropout too
    seen      `state()` of the last forward pass of the model
    """

    active: tuple[str, ...] = ()
    mask_BMK: Tensor | None = None
    tokens: tuple[int, int] | None = None  # (B, T) of the current pass
    token_BT: Tensor | None = None
    clock: int = 0
    training: bool = False
    seeds: dict[str, int] = field(default_factory=dict)
    seen: tuple[Any, ...] | None = None

    def state(self) -> tuple[Any, ...]:
        """What a recomputation of the pass must find again."""
        return self.active, id(self.mask_BMK), id(self.token_BT), self.clock, self.training

    def check_recomputation(self) -> None:
        """Refuse to recompute a layer (gradient checkpointing) for another choice of adapters.

        raises  RuntimeError: the gradient would be wrong
        """
        if self.seen is not None and self.seen != self.state():
            raise RuntimeError(
                "gradient checkpointing recomputes a layer after routed(), batch() or use() changed what it "
                "computes: call backward() inside the same block as the forward pass"
            )

    def owner(self) -> Tensor:
        """The index of the adapter that owns a token, (B, M) int64; K where none does."""
        assert self.mask_BMK is not None
        nobody = len(self.active)
        return torch.where(self.mask_BMK.any(-1), self.mask_BMK.int().argmax(-1), nobody)
