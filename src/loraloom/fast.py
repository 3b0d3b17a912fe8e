"""The fused path: which decoder layers are Llama-like, and their `forward` with two nodes of autograd.

A layer is taken if its parts have the names and kinds of a Llama layer's and a probe of it gives what its own code
gives; everything else keeps its own code, and `engage` says why. A fused layer goes its own way again, call by call,
where it is asked for what it does not do: a cache of keys, a mask of numbers, several adapters, a method that is no
low-rank pair.

source  tests/test_fast.py: values and gradients equal to the layers' own code, for every kind of model listed there
"""

from __future__ import annotations

from collections import Counter
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from . import attention
from .adapt import Adapters
from .attention import DocumentMask, Watch, attend, first_line, mask_of, takes_documents
from .decoder import After, Before, Parts, Turn
from .frozen import Frozen
from .group import Group
from .head import hooks_of
from .kernels.block import WIDEST, turned
from .likeness import Unlike, act_of, decoder_blocks, drops, heads_of, linears, norm_weight, window_of
from .methods.base import LowRank, Site
from .packing import Documents
from .products8 import plain_products
from .quant import Weight4

CLOSE = 8  # roundings of the dtype that a probe may be off by, relative to the largest output
FAR = (
    2**24
)  # a position that no text has: a layer that reads more from positions than its angles shows it there


class FastLayer:
    """A decoder layer's fused forward, in place of its own."""

    def __init__(self, module: nn.Module, name: str, parts: Parts, adapters: Adapters) -> None:
        self.module, self.name, self.parts, self.adapters = module, name, parts, adapters
        attn: Any = module.self_attn
        self.scale = getattr(attn, "scaling", None)
        self.window = window_of(attn)
        self.turns = bool(getattr(attn, "use_rope", True))
        self.drops = drops(module)
        self.qk_norms: tuple[Any, Any] | None = None
        if hasattr(attn, "q_norm"):
            self.qk_norms = attn.q_norm, attn.k_norm
        self.own = module.forward
        self.hooks = [hooks for one in module.modules() if one is not module for hooks in hooks_of(one)]
        self.released = False
        self._verdict: tuple[Any, str | None] = (None, None)

    def __call__(self, hidden_states: Tensor, *args: Any, turn: Turn = "only", **kwargs: Any) -> Any:
        """In place of the module's forward; in a `second` turn the output is not to be read."""
        mask = kwargs.get("attention_mask", args[0] if args else None)
        angles: Any = kwargs.get("position_embeddings")
        if not isinstance(mask, DocumentMask) or not self.takes(hidden_states, angles, kwargs):
            return self.own(hidden_states, *args, **kwargs)
        shape = hidden_states.shape
        cos, sin = (flat(one, shape) for one in angles)
        x = hidden_states.reshape(-1, shape[-1]).contiguous()  # kernels take whole rows
        return self.run(x, cos, sin, mask.documents, turn).view(shape)

    def takes(self, x: Tensor, angles: Any, kwargs: dict[str, Any]) -> bool:
        """Whether this call is one that the fused code makes."""
        frozen = self.parts.qkv.frozen
        return (
            not self.released
            and angles is not None
            and angles[0].dim() == 3
            and kwargs.get("past_key_values") is None
            and (x.dtype, x.device) == (frozen.dtype, frozen.device)
            and not any(group.frozen.moved for group in self.parts.groups())
            and not (x.device.type != "meta" and torch.is_autocast_enabled(x.device.type))
            and not self.adapters.merged
            and not any(self.hooks)
            and not (self.drops and self.module.training)
            and self.against_adapters() is None
        )

    def against_adapters(self) -> str | None:
        """Why the adapters in use cannot be fused, in words."""
        flow = self.adapters.flow
        if len(flow.active) > 1:
            return "several adapters are in use"
        if flow.active:
            adapter = self.adapters.adapters[flow.active[0]]  # another one may get its name later
            if self._verdict[0] is not adapter:
                self._verdict = adapter, self.examine(adapter.name)
            if self._verdict[1] is not None:
                return self._verdict[1]
        return None if flow.mask_BMK is None else "rows or tokens have different adapters"

    def forget(self) -> None:
        """Keep nothing of the adapters that were in use."""
        self._verdict = None, None
        for group in self.parts.groups():
            group.forget()

    def examine(self, name: str) -> str | None:
        known = [key for group in self.parts.groups() for key in group.names]
        below = self.name + "."
        for key, bank in self.adapters.banks.items():
            if key.startswith(below) and key not in known and name in bank.sites:
                return f"a method works on {key.removeprefix(below)}"
        banks = [self.adapters.banks[key] for key in known if key in self.adapters.banks]
        for site in (site for bank in banks for site in bank.sites.get(name, ())):
            why = against(site)
            if why is not None:
                return why
        if any(key.startswith(below) and one.p.get(name) for key, one in self.adapters.overlays.items()):
            return "biases or modules of the layer are trained"
        return None

    def release(self) -> None:
        """Give the layer its own code again, and its weights memories of their own."""
        self.released = True  # for whoever still holds it as the layer's forward
        held: Any = self.module.__dict__.get("forward")
        if held is self:
            del self.module.__dict__["forward"]
        elif getattr(held, "inner", None) is self:  # computed again in the backward pass
            held.inner = self.own
        for group in self.parts.groups():
            group.frozen.part()

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents, turn: Turn = "only") -> Tensor:
        """The layer on tokens in one line, (T, K)."""
        parts = self.parts
        computed = [group.pairs() for group in parts.groups()]
        qkv, o, gate_up, down = (
            group.wide(computes, tensors) for group, (computes, tensors) in zip(parts.groups(), computed)
        )
        later = self.qk_norms is not None or not self.turns
        angles = (torch.ones_like(cos), torch.zeros_like(sin)) if later else (cos, sin)
        q, k, v, x = Before.apply(x, *angles, parts, qkv, *computed[0][1])
        if self.qk_norms is not None:
            q, k = (norm(part) for norm, part in zip(self.qk_norms, (q, k)))
            if self.turns:
                q, k = turned(q, cos, sin), turned(k, cos, sin)
        attn = attend(q, k, v, documents, scale=self.scale, window=self.window)
        del q, k, v  # nobody needs them where the layer is computed again
        pairs = [tensor for _, tensors in computed[1:] for tensor in tensors]
        return After.apply(attn.flatten(1), x, parts, (o, gate_up, down), turn, *pairs)


def flat(angle: Tensor, shape: torch.Size) -> Tensor:
    """cos or sin (B or 1, T, E) for all tokens in one line."""
    return angle.expand(shape[0], -1, -1).reshape(-1, angle.shape[-1]).contiguous()


def against(site: Site) -> str | None:
    """Why an adapter's update of one linear layer cannot be fused, in words."""
    name = type(site.method).__name__
    if not isinstance(site.method, LowRank):
        return f"{name} is no low-rank pair"
    if site.method.per_token:
        return f"{name} chooses among tokens"
    if site.layer.rows is not None:
        return "q, k and v of one projection, or gate and up, are adapted apart"
    pair = site.method.pair(site.layer, site.p)
    if pair.gain is not None:
        return f"{name} scales the whole output"
    return f"{name} shares its matrices among layers" if pair.shared else None


# ---- which layers ---------------------------------------------------------------------------------------------------


def engage(adapters: Adapters, *, recompute: str = "none") -> list[str]:
    """Fuse every decoder layer that can be; a line for each kind of answer: how many layers, and why not.

    recompute  "gate_up": the fused layers multiply gate and up again in the backward pass
    """
    model = adapters.model
    adapters.unfuse()
    told: Counter[str] = Counter()
    layers = decoder_blocks(model)
    if not layers:
        return [
            "fused layers: none: the model has no decoder layers of attention and an MLP, as Llama has them"
        ]
    for name, module in layers:
        try:
            fast = fused(module, name, adapters, recompute)
        except Unlike as reason:
            told[str(reason)] += 1
            continue
        module.__dict__["forward"] = fast
        adapters.fast.append(fast)
    lines = [f"fused layers: {len(adapters.fast)} of {len(layers)}"]
    lines += [f"{count} with their own code: {why}" for why, count in told.items()]
    mixed = [group for fast in adapters.fast for group in fast.parts.groups() if mixes(group)]
    if mixed:
        names = ", ".join(name.rpartition(".")[2] for name in mixed[0].names)
        lines.append(
            f"{len(mixed)} merged products stay in 16 bits, where a part of them has no 8-bit ones: {names}"
        )
    return lines


def mixes(group: Group) -> bool:
    """Whether some parts of a product would be multiplied in 8 bits, and others would not."""
    eight = [isinstance(weight, Weight4) and weight.fp8 for weight in group.frozen.weights()]
    return any(eight) and not all(eight)


def fused(module: nn.Module, name: str, adapters: Adapters, recompute: str) -> FastLayer:
    """A layer's fused forward, proved on the layer where it has numbers.

    raises  Unlike if it is not Llama-like, or the adapters in use cannot be fused
    """
    if not takes_documents(adapters.model):
        raise Unlike("model.attention is not varlen")
    if name in adapters.banks or name in adapters.overlays:
        raise Unlike("a method works on the layer as a whole")
    fast = FastLayer(module, name, parts_of(module, name, adapters, recompute), adapters)
    why = fast.against_adapters()
    if why is None and any(fast.hooks):
        why = "hooks stand on its parts"
    if why is None and fast.drops and module.training:
        why = "the base trains with dropout"
    if why is None and not next(module.parameters()).is_meta:
        why = other_output(fast)
    if why is not None:
        fast.release()
        raise Unlike(why)
    return fast


def parts_of(module: Any, name: str, adapters: Adapters, recompute: str) -> Parts:
    """What the fused code needs of a layer.

    raises  Unlike if it is not Llama-like
    """
    if "forward" in module.__dict__:
        raise Unlike("the layer's forward was replaced")
    attn, mlp = module.self_attn, module.mlp
    norms = [getattr(module, leaf, None) for leaf in ("input_layernorm", "post_attention_layernorm")]
    known = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    more = [
        leaf
        for leaf, child in module.named_children()
        if leaf not in known and not isinstance(child, nn.Dropout)
    ]
    if more:
        raise Unlike(f"it has other parts than a Llama layer: {', '.join(more)}")
    if None in norms:
        raise Unlike("it has no norm of its own before the MLP")
    qkv = linears(attn, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
    gate_up = linears(mlp, ("gate_proj", "up_proj"), "gate_up_proj")
    o, down = linears(attn, ("o_proj",)), linears(mlp, ("down_proj",))
    heads, dim = heads_of(attn, qkv, o[0])
    kinds = {(one[0].weight.dtype, one[0].weight.device) for one in (qkv, gate_up, o, down)}
    if len(kinds) > 1:
        raise Unlike("its weights are kept in different dtypes")
    if qkv[0].in_features > WIDEST:
        raise Unlike(f"its width is over {WIDEST:,}")
    if qkv[0].weight.dtype == torch.float64 and qkv[0].weight.is_cuda:
        raise Unlike("the kernels take sums in float32")
    names = {id(one): path for path, one in module.named_modules(prefix=name)}

    def group(modules: list[nn.Linear]) -> Group:
        return Group(Frozen(modules), [names[id(one)] for one in modules], adapters)

    act = act_of(mlp)
    weights = [norm_weight(norm) for norm in norms]
    return Parts(
        qkv=group(qkv),
        o=group(o),
        gate_up=group(gate_up),
        down=group(down),
        norms=(weights[0][0], weights[1][0]),
        eps=(weights[0][1], weights[1][1]),
        act=act,
        heads=heads,
        dim=dim,
        recompute=recompute,
    )


def other_output(fast: FastLayer) -> str | None:
    """A probe of the layer against its own code, the base alone; None if they agree."""
    frozen = fast.parts.qkv.frozen
    watch = Watch()  # of what only long documents would show: the window that the layer's own code names
    attention._watches.append(watch)
    try:
        wanted, got = probe(fast)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a layer makes of a call that it does not know
        return f"a probe of it failed: {first_line(error)}"
    finally:
        attention._watches.remove(watch)
    if not watch.widths:
        return "its attention takes no documents"
    if not isinstance(wanted, Tensor):
        return "its layers give more than hidden states"
    off = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    eps = max(torch.finfo(frozen.dtype).eps, torch.finfo(torch.float32).eps)  # norms of models sum in float32
    return None if bool(off <= CLOSE * eps) else "its own code gives another output"


@torch.no_grad()
def probe(fast: FastLayer) -> tuple[Any, Tensor]:
    """What a layer's own code and the fused one make of two short documents."""
    frozen, lengths = fast.parts.qkv.frozen, (11, 13)
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(1, 24, frozen.shape[1], generator=generator) / 64
    )  # small beside what the layer adds to it
    x = x.to(frozen.device, frozen.dtype)
    documents = Documents(torch.tensor([0, 11, 24], dtype=torch.int32, device=x.device), lengths)
    place = torch.cat([torch.arange(n) for n in lengths]).to(x.device)[None]
    rotary = base_of(fast.adapters.model).rotary_emb
    kind = getattr(fast.module.self_attn, "layer_type", None)
    more = {"layer_type": kind} if "layer_type" in signature(rotary.forward).parameters else {}
    given = {
        "attention_mask": mask_of(documents, fast.window),
        "position_embeddings": rotary(x, place, **more),
        "position_ids": place + FAR,
    }
    with fast.adapters.disabled(), plain_products(fast.module):
        return fast.own(x, **given), fast(x, **given)


def base_of(model: Any) -> Any:
    """The part of a causal model that holds the decoder's layers."""
    return next((m for m in model.modules() if hasattr(m, "rotary_emb") and hasattr(m, "layers")), model)
