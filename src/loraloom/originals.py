"""The base's weights as they were before they went into 4 bits, read once more from its files, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .errors import UserError
from .methods.base import Site
from .model import CLASSES, read_weights
from .on_load import Arrival
from .quant import Weight4

Take = Callable[[str, Tensor], None]  # a site's key and its weight (O, I)


def read_originals(
    folder: Path, sites: Mapping[str, Site], take: Take, *, dtype: torch.dtype, progress: bool = False
) -> None:
    """Hand every site the weight that was quantised: in the model's dtype, on the CPU.

    raises  UserError if the files hold 4 bits themselves, or not all of the weights
    """
    by_name: dict[str, list[str]] = {}
    for key, site in sites.items():
        by_name.setdefault(f"{site.layer.name}.weight", []).append(key)
    missing = set(by_name)

    def look(arrival: Arrival) -> Tensor:
        value = arrival.value
        if isinstance(value, Weight4) and arrival.name in by_name:
            raise UserError(
                f"{folder} is in 4 bits: the weights before quantisation are not in it",
                hint="name the model in its original format, with model.quantize=nf4",
            )
        for key in by_name.get(arrival.name, ()):
            site = sites[key]
            w_OI = site.layer.matrix(value)
            take(key, w_OI if site.layer.rows is None else w_OI[site.layer.rows])
        missing.discard(arrival.name)
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    read_weights(folder, CLASSES["causal"], look, {"dtype": dtype}, progress=progress)
    if missing:
        raise UserError(f"{folder} lacks weights of the model", details=few(sorted(missing)))


def few(names: Sequence[str], most: int = 10) -> list[str]:
    """The first names of a list, and how many more there are."""
    more = len(names) - most
    return [*names[:most], *([f"... and {more} more"] if more > 0 else [])]
