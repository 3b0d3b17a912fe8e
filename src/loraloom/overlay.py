"""Modules that an adapter trains whole, or by their bias, without touching the base's own parameters.

The adapter owns copies of some parameters; while it is active the module's `forward` runs with them in place
of the base's. Everything else of the module is shared with the base, so a trained bias costs one vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .flow import Flow


class Overlay:
    """All adapters' own parameters of one module, in place of its `forward`."""

    def __init__(self, module: nn.Module, name: str, flow: Flow) -> None:
        self.module, self.name, self.flow = module, name, flow
        # by adapter, then by the parameter's name in the module
        self.p: dict[str, dict[str, nn.Parameter]] = {}
        self.base_forward = module.forward

    def add(self, adapter: str, names: list[str]) -> None:
        """Give an adapter float32 copies of the named parameters (float64 stays float64).

        raises  UserError if one of them stands in several places of the module
        """
        own = dict(self.module.named_parameters())
        places = [id(tensor) for _, tensor in self.module.named_parameters(remove_duplicate=False)]
        tied = [name for name in names if places.count(id(own[name])) > 1]
        if tied:
            raise UserError(
                f"{self.name}.{tied[0]} stands in several places of {self.name}, which cannot be trained whole"
            )
        wide = {name: torch.promote_types(own[name].dtype, torch.float32) for name in names}
        copies = {name: nn.Parameter(own[name].detach().to(wide[name], copy=True)) for name in names}
        self.p.setdefault(adapter, {}).update(copies)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output with the active adapter's parameters."""
        chosen = [name for name in self.flow.active if name in self.p]
        if not chosen:
            return self.base_forward(*args, **kwargs)
        if len(self.flow.active) > 1 or self.flow.mask_BMK is not None:
            raise UserError(
                f"{self.name} is trained whole by {', '.join(chosen)}: rows cannot be mixed with other adapters'",
                hint="use one adapter at a time, or train without bias and modules_to_save",
            )
        with standing_in(self.module, self.p[chosen[0]]):
            return self.base_forward(*args, **kwargs)


@contextmanager
def standing_in(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module read these tensors, in its own dtype, where its parameters stand.

    The parameters themselves are not touched. `functional_call` would go through `module.__call__`, which
    leads back here and would run the module's hooks twice.
    """
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, value in values.items():
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            own = owner._parameters[leaf]
            assert own is not None
            kept.append((owner, leaf, own))
            owner._parameters[leaf] = value.to(own.dtype)  # type: ignore[assignment]
        yield
    finally:
        for owner, leaf, own in reversed(kept):
            owner._parameters[leaf] = own
