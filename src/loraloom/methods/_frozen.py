"""What methods share whose matrices are random, frozen, and stand once in memory for all layers.

Every layer uses the part that its size needs, so the matrices are as large as the largest layer. They are drawn
from a seed of their own by the rule of PEFT (one generator on the CPU, first A, then B), so that a file that
leaves them out can be read, and adapters of one seed on one model have the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import UserError
from ..layers import Layer
from .base import Method, Tensors, option


@dataclass(frozen=True, kw_only=True)
class Frozen(Method):
    """A method that trains vectors around shared, frozen matrices."""

    projection_seed: int = option(0, "of the frozen matrices; PEFT's projection_prng_key")

    def __post_init__(self) -> None:
        if isinstance(self.projection_seed, bool) or not isinstance(self.projection_seed, int):
            raise UserError(f"projection_seed is {self.projection_seed!r}", hint="it is a whole number")

    def bases(self, layers: Sequence[Layer], gen: torch.Generator) -> Tensors:
        """The frozen matrices of all layers, float32."""
        raise NotImplementedError

    def vectors(self, layer: Layer) -> Tensors:
        """What trains on one layer."""
        raise NotImplementedError

    def init(self, layer: Layer, gen: torch.Generator) -> Tensors:
        return self.init_all([layer], [gen])[0]

    def init_all(self, layers: Sequence[Layer], gens: Sequence[torch.Generator]) -> list[Tensors]:
        """Nothing is drawn by layer: `gens` stay as they are."""
        shared = self.bases(layers, torch.Generator().manual_seed(self.projection_seed))
        return [shared | self.vectors(layer) for layer in layers]
