"""What some methods must see before the first step: inputs, gradients, or the weights before quantisation.

The model runs over a few examples. Statistics of a layer may be as large as its weight, so the layers are
seen in groups, and each group's statistics are reduced to the size of an adapter before the next begins:

    for each group of layers     about a gigabyte of statistics, or one decoder layer if that is more
        for each batch           forward (and backward, for gradients), as far as the group needs
            method.observe       x and dL/dy of each layer, padding left out
        method.found             what it comes to
    method.begin                 over all layers: ranks, shares, and the tensors to start from

shapes  B rows, T tokens a row; x_TI the tokens of all rows that are no padding
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapt import Adapters
from .adapter import Adapter
from .errors import UserError
from .methods.base import Site, Tensors
from .nll import nll_sum
from .packing import IGNORED, Batch
from .progress import counted
from .step import train_step
from .targets import input_group, layer_number, output_head

BUDGET = 1 << 30  # bytes of statistics at once; about those of one decoder layer of a 7B model
Originals = Callable[[Mapping[str, Site], Callable[[str, Tensor], None]], None]


class Enough(Exception):
    """Every layer of the group has been seen: the rest of the forward pass is not needed."""


def prepare(
    adapters: Adapters,
    batches: Sequence[Batch],
    *,
    name: str | None = None,
    originals: Originals | None = None,
    progress: bool = False,
    budget: int = BUDGET,
) -> dict[str, Any]:
    """Let an adapter's method see what it must before training; returns the settings that this decided.

    batches    the examples to look at; a method that probes also takes its steps on them
    originals  hands the weights before quantisation to a function, for methods that need them

    raises  UserError if the layers cannot be seen, or the originals are not to be had
    """
    name = name or adapters.active[0]
    adapter = adapters.adapters[name]
    if adapter.ready or not adapter.sites:
        adapter.ready = True
        return {}
    if adapter.method.needs == "originals":
        found = from_originals(adapter, originals)
    else:
        probe(adapters, adapter, batches, progress=progress)
        found = look(adapters, adapter, batches, progress=progress, budget=budget)
    changes, tensors = adapter.method.begin(adapter.sites, found)
    if "rank_pattern" in changes:  # layers that were left out stay so
        out = {pattern: 0 for pattern, r in adapter.spec.rank_pattern.items() if r == 0}
        changes["rank_pattern"] = out | changes["rank_pattern"]
    if changes or adapter.method.probes()[1]:
        adapters.remove(name)
        adapter = adapters.add(name, replace(adapter.spec, **changes))
    fill(adapter, tensors)
    adapter.ready = True
    return changes


def fill(adapter: Adapter, tensors: Mapping[str, Tensors]) -> None:
    """Copy the tensors to start from into the adapter's own."""
    with torch.no_grad():
        for key, site in adapter.sites.items():
            for name, value in tensors.get(key, {}).items():
                site.p[name].copy_(value)


def from_originals(adapter: Adapter, originals: Originals | None) -> dict[str, Tensors]:
    if originals is None:
        raise UserError("this method needs the weights before quantisation", hint="pass originals=")
    found: dict[str, Tensors] = {}

    def take(key: str, w_OI: Tensor) -> None:
        site = adapter.sites[key]
        w_OI = w_OI.to(site.layer.device, torch.float32)
        found[key] = small(site.method.from_original(site, w_OI))

    originals(adapter.sites, take)
    return found


def small(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def probe(adapters: Adapters, adapter: Adapter, batches: Sequence[Batch], *, progress: bool) -> None:
    """The optimizer steps that a method takes on a part of the data before it looks (LoRA-drop)."""
    _, steps = adapter.method.probes()
    if not steps:
        return
    optimizer = torch.optim.AdamW(adapters.groups(adapter.method.learning_rate))
    adapter.ready = True  # for the probe itself
    adapters.train()
    with counted("probe steps", total=steps, shown=progress) as done:
        for step in range(steps):
            batch = [batches[step % len(batches)]]
            stats = train_step(
                adapters.model, adapters, optimizer, batch, step=step, num_steps=steps, max_norm=1.0
            )
            done(f"loss {stats.loss:.3f}")
    adapters.eval()
    adapter.ready = False


# ---- looking ------------------------------------------------------------------------------------------------


def look(
    adapters: Adapters, adapter: Adapter, batches: Sequence[Batch], *, progress: bool, budget: int
) -> dict[str, Tensors]:
    """What each layer's observations came to, a group of layers at a time."""
    if not batches:
        raise UserError("there are no examples for the method to see before training")
    groups = list(grouped(adapter, budget))
    device = next(adapters.model.parameters()).device
    targets = sum(batch.targets for batch in batches)
    found: dict[str, Tensors] = {}
    with counted("layers seen", total=len(adapter.sites), shown=progress) as done:
        for keys in groups:
            watch = Watch(adapters, {key: adapter.sites[key] for key in keys})
            with watch.hooks():
                for batch in batches:
                    watch.run(batch.to(device), targets)
            for key in keys:
                site = adapter.sites[key]
                found[key] = small(site.method.found(site, watch.store(key)))
                done(key)
    return found


def grouped(adapter: Adapter, budget: int) -> Iterator[list[str]]:
    """Keys of layers whose statistics are held at once: whole decoder layers, up to the budget."""
    parts: dict[Any, list[str]] = {}
    for key, site in adapter.sites.items():
        number = layer_number(site.layer.name)
        parts.setdefault(key if number is None else number, []).append(key)
    held: list[str] = []
    size = 0
    for keys in parts.values():
        more = sum(statistics_bytes(adapter.sites[key]) for key in keys)
        if held and size + more > budget:
            yield held
            held, size = [], 0
        held, size = [*held, *keys], size + more
    yield held


def statistics_bytes(site: Site) -> int:
    """At most, of one layer in float32: I x I for inputs, O x I for gradients."""
    layer = site.layer
    other = layer.out_features if site.method.needs == "gradients" else layer.in_features
    return 4 * layer.in_features * other


class Watch:
    """Shows a method what goes through some layers."""

    def __init__(self, adapters: Adapters, sites: Mapping[str, Site]) -> None:
        self.adapters, self.sites = adapters, sites
        self.needs = next(iter(sites.values())).method.needs
        self.stores: dict[str, Tensors] = {}
        self.modules: dict[nn.Module, list[str]] = {}
        for key, site in sites.items():
            self.modules.setdefault(site.layer.module, []).append(key)
        self.real_BT = self.labelled_BT = torch.empty(0)  # of the batch that runs
        self.unseen: set[nn.Module] = set()
        self.seen_inputs: dict[str, tuple[int, torch.Size]] = {}  # what was read, in the batch that runs
        self.apart: set[str] = set()  # layers that do not read what others of their group read

    def store(self, key: str) -> Tensors:
        """The statistics of a layer; one for all that read the same input, where inputs are all that counts."""
        return self.stores.setdefault(self.store_name(key), {})

    def store_name(self, key: str) -> str:
        layer = self.sites[key].layer
        if self.needs != "inputs" or key in self.apart:
            return key
        return f"{input_group(layer.name)} {layer.in_features} r={self.sites[key].method.r}"

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = [module.register_forward_hook(self.on_forward, with_kwargs=True) for module in self.modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, batch: Batch, targets: int) -> None:
        """One batch through the model: on the plain base, but for a method that looks at its own updates."""
        self.real_BT = torch.zeros(batch.ids.shape, dtype=torch.bool, device=batch.ids.device)
        for b, start, stop in batch.spans:
            self.real_BT[b, start:stop] = True
        self.labelled_BT = batch.labels != IGNORED
        self.unseen, self.seen_inputs = set(self.modules), {}
        model = self.adapters.model
        if self.needs == "gradients":
            with self.adapters.disabled():
                (nll_sum(model, batch) / targets).backward()
            return
        try:
            with torch.no_grad():
                if self.needs == "updates":
                    nll_sum(model, batch)
                    return
                with self.adapters.disabled():
                    nll_sum(model, batch)
        except Enough:
            pass

    def on_forward(self, module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor | None:
        x = args[0] if args else next(iter(kwargs.values()))
        keys = self.modules[module]
        result = None
        if self.needs == "gradients":
            x = x.detach()
            result = y if y.requires_grad else y.detach().requires_grad_()
            result.register_hook(lambda g, x=x: self.show(keys, x, g))
        else:
            self.show(keys, x, None)
            self.unseen.discard(module)
            if not self.unseen:
                raise Enough
        return result

    @torch.no_grad()
    def show(self, keys: Iterable[str], x: Tensor, g: Tensor | None) -> None:
        """Hand the rows of x, and of dL/dy, that are real tokens to the method."""
        for key in keys:
            site = self.sites[key]
            layer = site.layer
            if self.needs == "inputs":
                here, name = (x.data_ptr(), x.shape), self.store_name(key)
                if self.seen_inputs.get(name) == here:
                    continue
                if name in self.seen_inputs:  # as the key and value of RWKV
                    self.apart.add(key)
                self.seen_inputs[self.store_name(key)] = here
            x_TI = layer.inputs(x).flatten(0, -2)
            real_T, labelled_T = self.tokens(layer, x_TI)
            g_TO = None
            if g is not None:
                g_TO = layer.last(g)
                g_TO = (g_TO if layer.rows is None else g_TO[..., layer.rows]).flatten(0, -2)[real_T]
            site.method.observe(site, self.store(key), x_TI[real_T], g_TO, labelled_T[real_T])

    def tokens(self, layer: Any, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows are real tokens, and which carry loss.

        raises  UserError if they are not the batch's tokens, as behind a router
        """
        rows = len(x_TI)
        if rows == self.real_BT.numel() and "experts" not in layer.name.split("."):
            return self.real_BT.flatten(), self.labelled_BT.flatten()
        if layer.module is output_head(
            self.adapters.model
        ):  # it is given what it must predict, or little more
            every = torch.ones(rows, dtype=torch.bool, device=x_TI.device)
            return every, every
        raise UserError(
            f"{layer.name} sees {rows} tokens where the batch has {self.real_BT.numel()}: "
            "the method cannot tell which they are",
            hint="leave it out of target_modules, or use a method that needs no data",
        )
