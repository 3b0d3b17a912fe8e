"""Folding adapters into the weights and back: the base's own parameters are kept aside, never written to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from .bank import Bank
from .errors import NonFinite
from .overlay import Overlay


class Pristine:
    """The base's own parameters, kept aside while merged ones stand in their places."""

    def __init__(self) -> None:
        self.kept: list[tuple[nn.Module, str, nn.Parameter]] = []

    def exchange(self, module: nn.Module, name: str, leaf: str, value: Tensor) -> None:
        """Put a new parameter in a module and keep its own.

        raises  NonFinite if a value is not finite
        """
        own = module._parameters[leaf]
        assert own is not None
        merged = value.to(own.dtype)
        if not merged.isfinite().all():
            raise NonFinite(
                f"the merged {name}.{leaf} is not finite",
                hint=f"the adapter holds NaN or infinity, or is too large for {own.dtype}",
            )
        self.kept.append((module, leaf, own))
        module._parameters[leaf] = nn.Parameter(merged, requires_grad=False)

    def restore(self) -> None:
        """Give every module its own parameters back: the very same tensors."""
        while self.kept:
            module, leaf, own = self.kept.pop()
            module._parameters[leaf] = own

    def fold(self, chosen: Sequence[str], banks: Iterable[Bank], overlays: Iterable[Overlay]) -> None:
        """Put W0 + delta, and the parameters that adapters own, in the base's places: all of them or none.

        chosen  the active adapters

        raises  NotMergeable if a method's effect is no change of W; NonFinite if a merged weight is not finite
        """
        try:
            for bank in banks:
                if any(name in bank.sites for name in chosen):
                    self.exchange(bank.module, bank.name, "weight", bank.merged_weight())
            for overlay in overlays:
                for adapter in chosen:
                    for name, tensor in overlay.p.get(adapter, {}).items():
                        path, _, leaf = name.rpartition(".")
                        place = overlay.name + (f".{path}" if path else "")
                        self.exchange(
                            overlay.module.get_submodule(path), place, leaf, tensor.detach().clone()
                        )
        except BaseException:
            self.restore()
            raise
