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
from .quant import Weight4


class Overlay:
    """All adapters' own parameters of one module, in place of its `forward`."""

    def __init__(self, module: nn.Module, name: str, flow: Flow) -> None:
        self.module, self.name, self.flow = module, name, flow
        # by adapter, then by the parameter's name in the module
        self.p: dict[str, dict[str, nn.Parameter]] = {}
        self.base_forward = module.forward

    def add(
        self,
        adapter: str,
        names: list[str] | None,
        copies: dict[int, nn.Parameter],
        device: torch.device | None = None,
    ) -> None:
        """Give an adapter float32 copies (float64 stays float64) of the named parameters, or of all.

        copies  by the id of the base's parameter: what is one tensor in the base is one copy, wherever it stands
        device  of the copies, the base's own if None; of a base on meta they have no numbers yet
        """
        for name, own in self.module.named_parameters(remove_duplicate=False):
            if isinstance(own, Weight4) and (names is None or name in names):
                raise UserError(
                    f"{self.name} is kept in 4 bits, so it cannot be trained whole",
                    hint="load the model with this module kept in 16 bits: load_model(..., keep=[...])",
                )
            if names is None or name in names:
                if id(own) not in copies:
                    wide = torch.promote_types(own.dtype, torch.float32)
                    place = device or own.device
                    if own.is_meta:
                        copies[id(own)] = nn.Parameter(torch.empty(own.shape, dtype=wide, device=place))
                    else:
                        copies[id(own)] = nn.Parameter(own.detach().to(place, wide, copy=True))
                self.p.setdefault(adapter, {})[name] = copies[id(own)]

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
