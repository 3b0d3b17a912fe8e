"""The bank: the rows of all adapters on one layer, side by side, and who owns which.

    z = (x A^T) * e,   z[t, row] = 0 where token t does not own the row,   y = gain * (x W^T + z B^T) + bias

All adapters' rows of A stand in one (R, I) matrix and their columns of B in one (O, R), so that any mixture of
adapters in a batch costs two products. One adapter is the case K = 1: its own tensors are used as they are,
without a copy and without a mask.

shapes  B batch, T tokens, K active adapters, I in, O out, R rows of all active adapters
source  LoRA paper, arXiv:2106.09685, section 4.2 (a choice of adapter for each sample in a batch)
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .flow import Flow
from .kernels.dropout import keyed_dropout, token_key
from .kernels.lora_linear import Base, lora_linear
from .layers import BlockLayer, Conv1DLayer, Layer
from .methods.base import LowRank, Pair, Site, Tensors
from .quant import Weight4


@dataclass(frozen=True)
class Segment:
    """Rows that are multiplied together: those of all adapters, or a frozen pair that many layers share.

    owner_R  (R,) the index of each row's adapter; None if K = 1
    rows     where the columns' outputs belong in the module, if they are not spread already
    shared   A and B are frozen and used by other layers too
    """

    A: Tensor
    B: Tensor
    e: float | Tensor
    out: Tensor | None = None
    owner_R: Tensor | None = None
    rows: Tensor | None = None
    shared: bool = False


@dataclass(frozen=True)
class Compute:
    """What one layer computes for the active adapters."""

    segments: list[Segment]
    gain: Tensor | None  # (O,) if K = 1, else (K + 1, O) with a last row of ones for tokens that nobody owns
    others: list[tuple[int, Site]]  # methods that are no low-rank pair, with the index of their adapter
    rates: list[float]  # dropout by adapter

    @property
    def one_pair(self) -> bool:
        """Whether this is a single pair of all tokens and of the module's own, with nothing around it."""
        if len(self.segments) != 1 or self.gain is not None or self.others:
            return False
        one = self.segments[0]
        return one.out is None and one.owner_R is None and one.rows is None and not one.shared

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that gradients flow into."""
        for segment in self.segments:
            parts = (segment.A, segment.B, segment.e, segment.out)
            yield from (part for part in parts if isinstance(part, Tensor))
        if self.gain is not None:
            yield self.gain


class Bank:
    """All adapters on one module, in place of its `forward`; the module and its parameters stay as they are."""

    def __init__(self, layer: Layer, flow: Flow, group: str) -> None:
        module = layer.module
        self.layer, self.module, self.name, self.flow = layer, module, layer.name, flow
        # by adapter; several if q, k, v of one module are adapted apart
        self.sites: dict[str, list[Site]] = {}
        self.held: Compute | None = None
        self.group = zlib.crc32(group.encode())  # layers with one input share dropout masks
        self.base_forward = module.forward  # an overlay's, if it came first
        self.overlay: Any = None  # what trains this module's bias, if anything does

    # ---- what the layer computes ------------------------------------------------------------------------

    def build(self) -> Compute | None:
        """The active adapters' tensors side by side; None if none of them is on this layer."""
        wide: list[tuple[int, Site, Pair]] = []
        segments: list[Segment] = []
        others: list[tuple[int, Site]] = []
        gains: dict[int, Tensor] = {}
        many = len(self.flow.active) > 1 or self.flow.mask_BMK is not None or self.by_token()
        for k, name in enumerate(self.flow.active):
            for site in self.sites.get(name, ()):
                if not isinstance(site.method, LowRank):
                    others.append((k, site))
                    continue
                pair = site.method.pair(site.layer, site.p)
                if pair.gain is not None:
                    gain_O = site.layer.spread(pair.gain, 1.0)
                    gains[k] = gains[k] * gain_O if k in gains else gain_O
                if pair.shared:
                    segments.append(shared_segment(k, site, pair, many))
                else:
                    wide.append((k, site, pair))
        if wide:
            segments.insert(0, wide_segment(wide, many))
        if not segments and not others:
            return None
        rates = [next((s.method.dropout for s in self.sites.get(n, ())), 0.0) for n in self.flow.active]
        return Compute(segments, self.gain_table(gains, many), others, rates)

    def by_token(self) -> bool:
        """Whether an active method chooses among tokens: which, is known only when the model is called."""
        return any(s.method.per_token for name in self.flow.active for s in self.sites.get(name, ()))

    def gain_table(self, gains: dict[int, Tensor], many: bool) -> Tensor | None:
        """The adapters' gains, (O,) or (K + 1, O); None if no method has one."""
        if not gains:
            return None
        if not many:
            return gains[0]
        one_O = torch.ones_like(next(iter(gains.values())))
        return torch.stack([gains.get(k, one_O) for k in range(len(self.flow.active) + 1)])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with the active adapters' updates: every call of the module comes here."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:  # inside backward()
            self.flow.check_recomputation()
        compute = self.held or self.build()
        base = self.plain(x, compute) if compute is not None and not args and not kwargs else None
        if compute is not None and base is not None:
            pair, dropped = compute.segments[0], self.drop(x, compute)
            bias = self.module.bias
            apart = None if dropped is x else dropped
            return lora_linear(x, base, bias, pair.A, pair.B, pair.e, apart)  # type: ignore[arg-type]
        y = self.base_forward(self.entering(x, compute), *args, **kwargs)
        if compute is None:
            return y
        wx = self.layer.last(y)
        x = self.drop(x, compute)
        u = None
        for segment in compute.segments:
            part = self.low_rank(x, segment, wx)
            u = part if u is None else u + part
        for k, site in compute.others:
            if not site.method.puts:
                part = self.apart(x, k, site, wx)
                u = part if u is None else u + part
        if u is not None and compute.gain is not None:
            u = self.with_gain(u, wx, compute.gain)
        return self.layer.unlast(self.put(x, wx if u is None else wx + u, compute))

    def plain(self, x: Tensor, compute: Compute) -> Base | None:
        """The frozen layer, where it and one low-rank pair are all there is: they are one node then; else None."""
        w, kind = self.module.weight, type(self.layer)
        own = getattr(self.base_forward, "__func__", None)  # an overlay's, or a wrapper's, is another
        if not (compute.one_pair and kind in (Layer, Conv1DLayer) and own is type(self.module).forward):
            return None
        if kind is Layer and own is not nn.Linear.forward:
            return None
        if not isinstance(w, Tensor) or type(w) not in (nn.Parameter, Tensor, Weight4):
            return None
        if w.requires_grad or w.dtype != x.dtype:
            return None
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return None
        if torch.compiler.is_compiling():
            return None
        if not isinstance(w, Weight4):
            return Base(w.detach(), turned=kind is Conv1DLayer)
        return Base(w.codes, turned=w.flipped == (kind is Layer), eight=w.fp8)

    def put(self, x: Tensor, y: Tensor, compute: Compute) -> Tensor:
        """The output with what methods put in its place."""
        for k, site in compute.others:
            if site.method.puts:
                new = site.method.put(site.layer, self.cast(site, y.dtype), x, y)
                y = new if self.flow.mask_BMK is None else torch.where(self.fit(new)[..., k : k + 1], new, y)
        return y

    def entering(self, x: Tensor, compute: Compute | None) -> Tensor:
        """What the frozen layer reads: x, unless a method gives it something else."""
        for _, site in compute.others if compute is not None else ():
            x = site.method.enter(site.layer, x)
        return x

    def low_rank(self, x: Tensor, segment: Segment, wx: Tensor) -> Tensor:
        """The update of one segment, features last, in the dtype of the base's output."""
        cast = self.flow.casts if segment.shared else Tensor.to
        z = self.layer.down(x, cast(segment.A, wx.dtype))
        z = z * (segment.e.to(wx.dtype) if isinstance(segment.e, Tensor) else segment.e)
        if segment.owner_R is not None and self.flow.mask_BMK is not None:
            z = torch.where(self.fit(z)[..., segment.owner_R], z, 0)
        u = self.layer.up(z, cast(segment.B, wx.dtype))
        if segment.out is not None:
            u = u * segment.out.to(wx.dtype)
        if segment.rows is not None:
            u = torch.zeros_like(wx).index_add(-1, segment.rows.to(u.device), u)
        return u

    def cast(self, site: Site, dtype: torch.dtype) -> Tensors:
        """A site's tensors in the dtype of the computation."""
        return {name: self.flow.casts(tensor, dtype) for name, tensor in site.p.items()}

    def apart(self, x: Tensor, k: int, site: Site, wx: Tensor) -> Tensor:
        """The update of a method that is no low-rank pair."""
        p = self.cast(site, wx.dtype)
        rows = site.layer.rows
        u = site.method.update(site.layer, p, x, wx if rows is None else wx[..., rows])
        if rows is not None:
            u = torch.zeros_like(wx).index_add(-1, rows.to(u.device), u)
        return u if self.flow.mask_BMK is None else torch.where(self.fit(u)[..., k : k + 1], u, 0)

    def with_gain(self, u: Tensor, wx: Tensor, gain: Tensor) -> Tensor:
        """What is added when the bias-free output is scaled too: (gain - 1) x W^T + gain u.

        Written so that one product is kept for the backward pass, not two; zero where gain is 1 and u zero.
        """
        if self.flow.mask_BMK is not None:
            gain = gain[self.fit(u, self.flow.owner()[..., None])[..., 0]]
        gain, bias = gain.to(wx.dtype), self.layer.bias()
        if bias is not None and self.overlay is not None and len(self.flow.active) == 1:
            bias = self.overlay.p.get(self.flow.active[0], {}).get("bias", bias).to(wx.dtype)
        return (gain - 1) * ((wx if bias is None else wx - bias) + u) + u

    # ---- tokens -----------------------------------------------------------------------------------------

    def fit(self, z: Tensor, by_token: Tensor | None = None) -> Tensor:
        """A (B, M, ...) table shaped to go with z (..., features).

        raises  UserError if the layer's tokens are not the batch's, as behind a router
        """
        table = self.flow.mask_BMK if by_token is None else by_token
        assert table is not None
        batch, many, last = table.shape
        sizes, tokens = z.shape[:-1], self.flow.tokens
        if "experts" not in self.name.split("."):  # behind a router tokens come in an order of their own
            length = tokens[1] if tokens is not None else many
            if sizes[0] == batch and (many == 1 or (len(sizes) == 2 and sizes[1] == many)):
                return table.view(batch, *([1] * (len(sizes) - 2)), *([many] if len(sizes) > 1 else []), last)
            if tuple(sizes) == (1, length) and many in (1, length):  # one row for all, such as positions
                return table
            if tokens is not None and tuple(sizes) in ((batch * length,), (1, batch * length)):
                return table.expand(batch, length, last).reshape(*sizes, last)
        raise UserError(
            f"{self.name} sees {tuple(sizes)} tokens where the batch has {self.flow.tokens or (batch, many)}: "
            "it cannot be told which adapter each of them belongs to",
            hint="use one adapter at a time on this layer, or leave it out of target_modules",
        )

    def drop(self, x: Tensor, compute: Compute) -> Tensor:
        """The adapters' input with keyed dropout; x itself when not training or where no rate is set."""
        if not (self.flow.training and any(compute.rates) and self.layer.takes_dropout):
            return x
        features = self.layer.last(x)
        token = self.flow.token_BT
        if token is None or token.numel() != features.shape[:-1].numel():
            token = torch.arange(features.shape[:-1].numel(), device=x.device)
        token = token.reshape(features.shape[:-1])
        seeds = [self.flow.seeds[name] for name in self.flow.active]
        rate: Tensor | float = compute.rates[0]
        seed: Tensor | int = seeds[0]
        if self.flow.mask_BMK is not None:
            owner = self.fit(features, self.flow.owner()[..., None])[..., 0]
            token, owner = torch.broadcast_tensors(token, owner)
            rate = torch.tensor([*compute.rates, 0.0], dtype=torch.float64, device=x.device)[owner]
            seed = torch.tensor([*seeds, 0], device=x.device)[owner]
        if isinstance(seed, int):
            key = self.key(token, seed)
        else:
            key = token_key(token, seed=seed, step=self.flow.clock, group=self.group)
        dropped = keyed_dropout(features, key, rate)
        return self.layer.unlast(dropped)

    def key(self, token: Tensor, seed: int) -> Tensor:
        """The tokens' keys of one adapter, made once for all layers that share the input, forward and backward."""
        flow, place = self.flow, (self.group, seed)
        made_for, key = flow.keys.get(place, (None, token))
        own = (flow.clock, flow.token_BT, token.shape, token.device)
        if made_for is None or any(
            a is not b and (isinstance(b, Tensor) or a != b) for a, b in zip(made_for, own)
        ):
            key = token_key(token, seed=seed, step=flow.clock, group=self.group)
            flow.keys[place] = own, key
        return key

    # ---- holding: compute once a step -------------------------------------------------------------------

    def hold(self) -> list[tuple[Tensor, Tensor]]:
        """Build once and keep it; returns (built, stand-in) for each tensor whose gradient must go back.

        A tensor that is itself a parameter needs no stand-in: its gradient arrives by itself.
        """
        compute = self.build()
        if compute is None:
            return []
        pairs: list[tuple[Tensor, Tensor]] = []

        def stand_in(tensor: Any) -> Any:
            if not isinstance(tensor, Tensor) or tensor.is_leaf or not tensor.requires_grad:
                return tensor
            leaf = tensor.detach().requires_grad_()
            pairs.append((tensor, leaf))
            return leaf

        segments = [
            replace(s, A=stand_in(s.A), B=stand_in(s.B), e=stand_in(s.e), out=stand_in(s.out))
            for s in compute.segments
        ]
        self.held = replace(compute, segments=segments, gain=stand_in(compute.gain))
        return pairs

    # ---- merging ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W0 plus the active adapters' deltas, in the module's own layout: summed in float32, rounded once.

        dtype  to round to, the weight's own if None
        """
        own = self.module.weight.dtype
        assert isinstance(own, torch.dtype)
        total = self.layer.matrix(self.layer.whole_weight(torch.promote_types(own, torch.float32))).clone()
        for name in self.flow.active:
            for site in self.sites.get(name, ()):
                total += site.layer.spread(site.method.delta(site.layer, site.p).detach().to(total))
        return self.layer.like_weight(total).to(dtype or own).contiguous()


class BlockBank(Bank):
    """All adapters on a decoder block's output."""

    def __init__(self, layer: Layer, flow: Flow) -> None:
        super().__init__(layer, flow, layer.name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output with the active adapters' updates; what it gives beside hidden states stays."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:  # inside backward()
            self.flow.check_recomputation()
        output = self.base_forward(*args, **kwargs)
        compute = self.held or self.build()
        if compute is None:
            return output
        h = output[0] if isinstance(output, tuple) else output
        assert isinstance(self.layer, BlockLayer)
        self.layer.ids = self.flow.ids_BT
        parts = [self.apart(h, k, site, h) for k, site in compute.others if not site.method.puts]
        h = self.put(h, h + sum(parts) if parts else h, compute)
        return (h, *output[1:]) if isinstance(output, tuple) else h


def wide_segment(parts: list[tuple[int, Site, Pair]], many: bool) -> Segment:
    """All rows in one matrix; a single pair is used as it is."""
    if len(parts) == 1 and not many and parts[0][1].layer.rows is None:
        pair = parts[0][2]
        return Segment(pair.A, pair.B, pair.e, pair.out)
    a_RI = torch.cat([pair.A for _, _, pair in parts])
    b_OR = torch.cat([site.layer.spread(scaled(pair.B, pair.out)) for _, site, pair in parts], dim=1)
    rates = [pair.e for _, _, pair in parts]
    e: float | Tensor
    if all(isinstance(rate, float) and rate == rates[0] for rate in rates):
        e = rates[0]
    else:
        e = torch.cat([rate * a_RI.new_ones(len(pair.A)) for rate, (_, _, pair) in zip(rates, parts)])
    owner_R = None
    if many:
        owner_R = torch.tensor([k for k, _, pair in parts for _ in range(len(pair.A))], device=a_RI.device)
    return Segment(a_RI, b_OR, e, owner_R=owner_R)


def shared_segment(k: int, site: Site, pair: Pair, many: bool) -> Segment:
    """A frozen pair that other layers use too: never copied, so it stays apart from the wide rows."""
    owner_R = torch.full((len(pair.A),), k, device=pair.A.device) if many else None
    return Segment(pair.A, pair.B, pair.e, pair.out, owner_R, site.layer.rows, shared=True)


def scaled(b_OR: Tensor, out: Tensor | None) -> Tensor:
    return b_OR if out is None else out[:, None] * b_OR
