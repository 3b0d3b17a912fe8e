"""Whose `forward` each module runs: its own, then an overlay's, then the bank's, outermost last.

A module is adapted by an attribute `forward` on that one instance; without adapters the attribute goes away,
or is again the one that stood there before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .bank import Bank, BlockBank
from .flow import Flow
from .layers import BlockLayer, Layer, view
from .overlay import Overlay
from .targets import Target, hidden_width, input_group, vocabulary


class Forwards:
    """The banks and overlays of one model, by module name, and the forwards that they stand before."""

    def __init__(self, model: nn.Module, flow: Flow) -> None:
        self.model, self.flow = model, flow
        self.banks: dict[str, Bank] = {}
        self.overlays: dict[str, Overlay] = {}
        self._own: dict[str, Any] = {}  # instance forwards that stood there before ours, or None
        self._slow: list[RemovableHandle] = []

    def bank(self, target: Target) -> Bank:
        """The bank of a target's module, put in place if it is new."""
        name = target.name
        if name not in self.banks:
            module = self.model.get_submodule(name)
            if target.block:
                layer: Layer = BlockLayer(module, name, hidden_width(self.model), vocabulary(self.model))
                self.banks[name] = BlockBank(layer, self.flow)
            else:
                self.banks[name] = Bank(view(module, name), self.flow, input_group(name))
            self.lay([name])
            self._no_shortcuts()
        return self.banks[name]

    def overlay(self, name: str) -> Overlay:
        """The overlay of a module, put in place if it is new."""
        if name not in self.overlays:
            self.overlays[name] = Overlay(self.model.get_submodule(name), name, self.flow)
            self.lay([name])
            self._no_shortcuts()
        return self.overlays[name]

    def forget(self, adapter: str) -> None:
        """Drop an adapter's tensors, and the forwards of modules that carry none any more."""
        for bank in self.banks.values():
            bank.sites.pop(adapter, None)
        for overlay in self.overlays.values():
            overlay.p.pop(adapter, None)
        self.drop_bare()

    def drop_bare(self) -> None:
        """Take away the banks and overlays that carry no adapter."""
        bare = [name for name, bank in self.banks.items() if not bank.sites]
        plain = [name for name, overlay in self.overlays.items() if not overlay.p]
        for name in bare:
            del self.banks[name]
        for name in plain:
            del self.overlays[name]
        self.lay([*bare, *plain])
        if not self.banks and not self.overlays:
            while self._slow:
                self._slow.pop().remove()

    def lay(self, names: Iterable[str] | None = None, *, off: bool = False) -> None:
        """Put the forwards of these modules, or of all, in order; `off` gives every module its own."""
        for name in list(self._own) if names is None else names:
            module = self.model.get_submodule(name)
            own = self._own.setdefault(name, module.__dict__.get("forward"))
            forward = own if own is not None else type(module).forward.__get__(module)
            overlay, bank = self.overlays.get(name), self.banks.get(name)
            if overlay is not None and not off:
                overlay.base_forward, forward = forward, overlay.forward
            if bank is not None and not off:
                bank.overlay, bank.base_forward, forward = overlay, forward, bank.forward
            if not off and (overlay is not None or bank is not None):
                module.__dict__["forward"] = forward
                continue
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own
            if not off:
                del self._own[name]

    def _no_shortcuts(self) -> None:
        """Keep torch's encoder layers from reading their parts' weights without calling them.

        They do so in evaluation, unless a hook stands on them.
        """
        if self._slow:
            return
        for module in self.model.modules():
            if isinstance(module, nn.TransformerEncoderLayer):
                self._slow.append(module.register_forward_pre_hook(nothing))


def nothing(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing but be there."""
