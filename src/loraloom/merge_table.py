"""What a merge kept of each layer's update: the table that every merge prints.

units   norms in weight units, in float64; errors as shares of ||delta||, the norm of the update
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from .wording import percent

CHUNK = 1 << 18  # numbers whose differences are in memory in float64 at once
LARGE = 0.05  # of the update; a rounding above it deserves a finer number format


@dataclass(frozen=True)
class LayerError:
    """How much of one layer's update the merged weight holds.

    update    ||delta||, and as a share of ||W||
    error     ||merged - (W_trained + delta)|| / ||delta||: against the base that training saw
    rounding  the part of it that is the rounding to the result's number format
    """

    name: str
    update: float
    share: float
    error: float
    rounding: float


@dataclass(frozen=True)
class Merged:
    """What was written."""

    folder: str
    dtype: str
    base: str
    layers: list[LayerError]
    replaced: list[str]  # parameters that the adapter trained whole
    untied: bool  # whether a head and an embedding that were one tensor are two now
    notes: list[str]

    def total(self, what: str) -> float:
        """The error, or the rounding, of all layers together, as a share of the whole update."""
        update = math.hypot(*(row.update for row in self.layers))
        lost = math.hypot(*(getattr(row, what) * row.update for row in self.layers))
        return lost / update if update else 0.0

    @property
    def hint(self) -> str | None:
        """A finer number format, if rounding costs much of the update."""
        rounding = self.total("rounding")
        if rounding <= LARGE or self.dtype == "float32":
            return None
        finer = {"bfloat16": "--dtype float16 is 8 times finer, and float32 keeps it all"}
        return f"rounding to {self.dtype} costs {percent(rounding)} of the update: " + finer.get(
            self.dtype, "--dtype float32 keeps it all"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"error": self.total("error"), "rounding": self.total("rounding")}


def measure(name: str, w: Tensor, target: Tensor, total: Tensor, saved: Tensor) -> LayerError:
    """One line of the table.

    w       the weight that training saw; target is that plus delta, total is what was rounded to `saved`
    """
    size, update = norm(w), norm(target, w)
    share = update / size if size else math.inf
    if not update:
        return LayerError(name, 0.0, 0.0, 0.0, 0.0)
    return LayerError(name, update, share, norm(saved, target) / update, norm(saved, total) / update)


def norm(a: Tensor, b: Tensor | None = None) -> float:
    """||a - b|| in float64, or ||a||, a few rows at a time."""
    rows = max(1, CHUNK // max(1, a[0].numel()))
    total = 0.0
    for at in range(0, len(a), rows):
        part = a[at : at + rows].double()
        if b is not None:
            part = part - b[at : at + rows].to(part.device).double()
        total += float(part.square().sum())
    return math.sqrt(total)
