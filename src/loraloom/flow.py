"""What the current forward pass is about: which adapters are in use, and which tokens are whose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .casts import Casts
from .errors import UserError


@dataclass
class Flow:
    """What all banks of a model share: which adapters are active, and what the current forward pass is about.

    active    names of the adapters in use, K of them
    mask_BMK  which of them owns a token, bool, M = T or 1 (the same for the whole row); None: each owns all
    token_BT  the numbers that key dropout; None: the place in the batch
    clock     steps, or forward passes where nobody counts steps: keys dropout too
    seen      `state()` of the last forward pass of the model
    casts     frozen tensors in the dtypes that layers compute in
    keys      of dropout, by input and seed: what they were made for, and the keys of the tokens
    """

    active: tuple[str, ...] = ()
    mask_BMK: Tensor | None = None
    tokens: tuple[int, int] | None = None  # (B, T) of the current pass
    ids_BT: Tensor | None = None  # of the current pass
    token_BT: Tensor | None = None
    clock: int = 0
    training: bool = False
    seeds: dict[str, int] = field(default_factory=dict)
    seen: tuple[Any, ...] | None = None
    casts: Casts = field(default_factory=Casts)
    keys: dict[tuple[int, int], tuple[Any, Tensor]] = field(default_factory=dict)

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


class Text:
    """The ids of a text that grows: with a cache of keys and values a pass sees only what is new."""

    def __init__(self) -> None:
        self.ids_BS: Tensor | None = None

    def so_far(self, ids_BT: Tensor, cache: Any) -> Tensor:
        """All ids up to and with these; a pass without a cache, or with an empty one, starts anew.

        raises  UserError if the cache was filled by passes that were not seen
        """
        done = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
        if not done:
            self.ids_BS = ids_BT if cache is not None else None
            return ids_BT
        before = self.ids_BS
        if before is None or before.shape[0] != ids_BT.shape[0] or before.shape[1] < done:
            raise UserError(
                "an adapter that chooses tokens by their ids was put in use in the middle of a text",
                hint="start again without past_key_values",
            )
        self.ids_BS = torch.cat([before[:, :done], ids_BT], dim=1)
        return self.ids_BS
