"""Modules that an adapter trains whole, or by their bias, without touching the base's own parameters.

The adapter owns copies of some parameters; while it is active the module's `forward` runs with them in place
of the base's. Everything else of the module is shared with the base, so a trained bias costs one vector.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .bank import Flow
from .errors import UserError


class Overlay:
    """All adapters' own parameters of one module, in place of its `forward`."""

    def __init__(self, module: nn.Module, name: str, flow: Flow) -> None:
        self.module, self.name, self.flow = module, name, flow
        self.twin = shallow_twin(module)  # the same tensors under a module whose forward nobody has replaced
        self.p: dict[
            str, dict[str, nn.Parameter]
        ] = {}  # by adapter, then by the parameter's name in the module
        self.base_forward = module.forward

    def add(self, adapter: str, names: list[str]) -> None:
        """Give an adapter float32 copies of the named parameters."""
        own = dict(self.module.named_parameters())
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
        dtypes = {name: tensor.dtype for name, tensor in self.module.named_parameters()}
        values: dict[str, Tensor] = {name: p.to(dtypes[name]) for name, p in self.p[chosen[0]].items()}
        return functional_call(self.twin, values, args, kwargs)


def shallow_twin(module: nn.Module) -> nn.Module:
    """A module of the same kind that shares every tensor, with its own table of parameters at each level."""
    twin = copy.copy(module)
    twin.__dict__ = {key: value for key, value in module.__dict__.items() if key != "forward"}
    twin._parameters = dict(module._parameters)
    twin._modules = {
        name: None if child is None else shallow_twin(child) for name, child in module._modules.items()
    }
    return twin
