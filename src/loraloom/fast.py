"""The fused path: which decoder layers are Llama-like, and their `forward` with two nodes of autograd.

A layer is taken if its parts have the names and kinds of a Llama layer's and a probe of it gives what its own code
gives; everything else keeps its own code, and `engage` says why. A fused layer goes its own way again, call by call,
where it is asked for what it does not do: a cache of keys, a mask of numbers, several adapters, a method that is no
low-rank pair.

source  tests/test_fast.py: values and gradients equal to the layers' own code, for every kind of model listed there
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapt import Adapters
from .attention import DocumentMask, attend, mask_of, takes_documents
from .decoder import After, Before, Parts
from .frozen import Frozen
from .group import Group
from .methods.base import LowRank
from .packing import Documents
from .quant import Weight4
from .targets import layer_number

CLOSE = 8  # roundings of the dtype that a probe may be off by, relative to the largest output


class Unlike(Exception):
    """Why a layer is not taken, in words."""


class FastLayer:
    """A decoder layer's fused forward, in place of its own."""

    def __init__(self, module: nn.Module, parts: Parts, adapters: Adapters) -> None:
        self.module, self.parts, self.adapters = module, parts, adapters
        attn: Any = module.self_attn
        self.scale = getattr(attn, "scaling", None)
        self.window = window_of(attn)
        self.qk_norms: tuple[Any, Any] | None = None
        if hasattr(attn, "q_norm"):
            self.qk_norms = attn.q_norm, attn.k_norm
        self.own = module.forward
        self._verdict: tuple[Any, str | None] = (None, None)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask", args[0] if args else None)
        angles: Any = kwargs.get("position_embeddings")
        if not isinstance(mask, DocumentMask) or not self.takes(hidden_states, angles, kwargs):
            return self.own(hidden_states, *args, **kwargs)
        shape = hidden_states.shape
        cos, sin = (flat(one, shape) for one in angles)
        return self.run(hidden_states.reshape(-1, shape[-1]), cos, sin, mask.documents).view(shape)

    def takes(self, x: Tensor, angles: Any, kwargs: dict[str, Any]) -> bool:
        """Whether this call is one that the fused code makes."""
        return (
            angles is not None
            and kwargs.get("past_key_values") is None
            and x.dtype == self.parts.qkv.frozen.dtype
            and not (x.device.type != "meta" and torch.is_autocast_enabled(x.device.type))
            and not self.adapters.merged
            and self.against_adapters() is None
        )

    def against_adapters(self) -> str | None:
        """Why the adapters in use cannot be fused, in words."""
        flow = self.adapters.flow
        if flow.mask_BMK is not None:
            return "rows or tokens have different adapters"
        if not flow.active:
            return None
        if len(flow.active) > 1:
            return "several adapters are in use"
        key = flow.active, len(self.adapters.overlays)
        if self._verdict[0] != key:
            self._verdict = key, self.examine(flow.active[0])
        return self._verdict[1]

    def examine(self, name: str) -> str | None:
        sites = [
            site
            for group in self.parts.groups()
            for bank in group.banks
            if bank is not None
            for site in bank.sites.get(name, ())
        ]
        for site in sites:
            if not isinstance(site.method, LowRank):
                return f"{type(site.method).__name__} is no low-rank pair"
            if site.layer.rows is not None:
                return "q, k and v of one projection are adapted apart"
            pair = site.method.pair(site.layer, site.p)
            if pair.gain is not None:
                return f"{type(site.method).__name__} scales the whole output"
            if pair.shared:
                return f"{type(site.method).__name__} shares its matrices among layers"
        inside = self.module_names()
        if any(
            overlay in inside and self.adapters.overlays[overlay].p.get(name)
            for overlay in self.adapters.overlays
        ):
            return "biases or modules of the layer are trained"
        return None

    def module_names(self) -> set[str]:
        below = {id(module) for module in self.module.modules()}
        return {name for name, module in self.adapters.model.named_modules() if id(module) in below}

    def release(self) -> None:
        """Give the layer its own code again, and its weights memories of their own."""
        if self.module.__dict__.get("forward") is self:
            del self.module.__dict__["forward"]
        for group in self.parts.groups():
            group.frozen.part()

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents) -> Tensor:
        """The layer on tokens in one line, (T, K)."""
        parts = self.parts
        computed = [group.pairs() for group in parts.groups()]
        qkv, o, gate_up, down = (
            group.wide(computes, tensors) for group, (computes, tensors) in zip(parts.groups(), computed)
        )
        turn = (cos, sin) if self.qk_norms is None else (torch.ones_like(cos), torch.zeros_like(sin))
        q, k, v, x = Before.apply(x, *turn, parts, qkv, *computed[0][1])
        if self.qk_norms is not None:
            q, k = (norm(part) for norm, part in zip(self.qk_norms, (q, k)))
            q, k = turned(q, cos, sin), turned(k, cos, sin)
        attn = attend(q, k, v, documents, scale=self.scale, window=self.window)
        pairs = [tensor for _, tensors in computed[1:] for tensor in tensors]
        return After.apply(attn.flatten(1), x, parts, (o, gate_up, down), *pairs)


def flat(angle: Tensor, shape: torch.Size) -> Tensor:
    """cos or sin (B or 1, T, E) for all tokens in one line."""
    return angle.expand(shape[0], -1, -1).reshape(-1, angle.shape[-1])


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def window_of(attn: Any) -> int | None:
    """How many keys a query sees, by the layer's own word."""
    if hasattr(attn, "sliding_window"):
        return attn.sliding_window
    return getattr(attn.config, "sliding_window", None)


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
        return ["fused layers: none: the model has no Llama-like decoder layers"]
    for name, module in layers:
        try:
            if not takes_documents(model):
                raise Unlike("model.attention is not varlen")
            if name in adapters.banks or name in adapters.overlays:
                raise Unlike("a method works on the layer as a whole")
            fast = FastLayer(module, parts_of(module, name, adapters, recompute), adapters)
            why = fast.against_adapters()
            if why is None and not next(module.parameters()).is_meta and not adapters.fast:
                why = other_output(fast)
            if why is not None:
                fast.release()
                raise Unlike(why)
        except Unlike as reason:
            told[str(reason)] += 1
            continue
        module.__dict__["forward"] = fast
        adapters.fast.append(fast)
    lines = [f"fused layers: {len(adapters.fast)} of {len(layers)}"]
    return lines + [f"{count} with their own code: {why}" for why, count in told.items()]


def decoder_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that have attention, an MLP and a number."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "self_attn") and hasattr(module, "mlp") and layer_number(name + ".x") is not None
    ]


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
    if None in norms or more:
        raise Unlike(f"it has other parts than a Llama layer: {', '.join(more) or 'no second norm'}")
    if any(child.p and child.training for child in module.children() if isinstance(child, nn.Dropout)):
        raise Unlike("the base trains with dropout")
    qkv = linears(attn, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
    gate_up = linears(mlp, ("gate_proj", "up_proj"), "gate_up_proj")
    o, down = linears(attn, ("o_proj",)), linears(mlp, ("down_proj",))
    dim = int(attn.head_dim)
    heads = o[0].in_features // dim
    groups = (sum(one.out_features for one in qkv) // dim - heads) // 2
    inside = {leaf for leaf, _ in attn.named_children()}
    if inside - {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}:
        raise Unlike(f"its attention has other parts: {', '.join(sorted(inside))}")
    if getattr(attn, "attn_logit_softcapping", None) or getattr(attn, "sinks", None) is not None:
        raise Unlike("its attention caps its scores")
    prefix = {id(m): n for n, m in adapters.model.named_modules()}

    def group(modules: list[nn.Linear]) -> Group:
        return Group(Frozen(modules), [prefix[id(one)] for one in modules], lambda: adapters.banks)

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
        heads=(heads, groups),
        dim=dim,
        recompute=recompute,
    )


def linears(holder: Any, names: tuple[str, ...], whole: str | None = None) -> list[nn.Linear]:
    """The linear layers of these names, or the one that has them all.

    raises  Unlike if there are none, or they cannot be multiplied as one
    """
    if whole is not None and hasattr(holder, whole):
        names = (whole,)
    found = [getattr(holder, name, None) for name in names]
    plain = [one for one in found if type(one) is nn.Linear]
    if len(plain) != len(names):
        raise Unlike(f"{'/'.join(names)} are not plain linear layers")
    weights = [one.weight for one in plain]
    kinds = {(isinstance(w, Weight4), w.dtype, w.device) for w in weights}
    if len(kinds) > 1:
        raise Unlike(f"{'/'.join(names)} are kept in different formats")
    if any(one._forward_hooks or one._forward_pre_hooks for one in plain):
        raise Unlike(f"{'/'.join(names)} carry hooks")
    return plain


def norm_weight(norm: Any) -> tuple[Tensor, float]:
    """The weight of an RMSNorm as it multiplies (Gemma's is one more than what it keeps), and its eps.

    raises  Unlike for another kind of norm
    """
    eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None)
    weight = getattr(norm, "weight", None)
    if eps is None or not isinstance(weight, Tensor) or getattr(norm, "bias", None) is not None:
        raise Unlike(f"{type(norm).__name__} is no RMSNorm")
    one_more = "Gemma" in type(norm).__name__
    return (1.0 + weight.detach().float() if one_more else weight.detach()), float(eps)


def act_of(mlp: Any) -> Any:
    """Which activation the gate has, by what it computes.

    raises  Unlike for one that the kernels do not have
    """
    own = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    if own is None:
        raise Unlike("its MLP has no gate")
    x = torch.linspace(-4, 4, 33, device="cpu")
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }
    for name, act in known.items():
        if torch.allclose(own(x), act(x), atol=1e-5):
            return name
    raise Unlike(f"its MLP's activation is {type(own).__name__}")


@torch.no_grad()
def other_output(fast: FastLayer) -> str | None:
    """A probe of the layer against its own code, the base alone; None if they agree."""
    frozen = fast.parts.qkv.frozen
    width = frozen.shape[1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 24, width, generator=generator).to(frozen.device, frozen.dtype)
    lengths = (11, 13)
    documents = Documents(torch.tensor([0, 11, 24], dtype=torch.int32, device=x.device), lengths)
    place = torch.cat([torch.arange(n) for n in lengths]).to(x.device)
    rotary = getattr(base_of(fast.adapters.model), "rotary_emb", None)
    if rotary is None:
        return "the model has no rotary embedding of its own"
    layer_type = getattr(fast.module.self_attn, "layer_type", None)
    try:
        angles = rotary(x, place[None])
    except TypeError:
        angles = rotary(x, place[None], layer_type)
    given = {"attention_mask": mask_of(documents), "position_embeddings": angles, "position_ids": place[None]}
    with fast.adapters.disabled():
        wanted = fast.own(x, **given)
        if not isinstance(wanted, Tensor):
            return "its layers give more than hidden states"
        got = fast(x, **given)
    off = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    fp8 = any(group.frozen.fp8 for group in fast.parts.groups())
    eps = max(torch.finfo(frozen.dtype).eps, torch.finfo(torch.float32).eps)  # norms of models sum in float32
    limit = 0.2 if fp8 else CLOSE * eps
    return None if bool(off <= limit) else f"its own code gives another output (by {float(off):.2g})"


def base_of(model: Any) -> Any:
    """The part of a causal model that holds the decoder's layers."""
    return next((m for m in model.modules() if hasattr(m, "rotary_emb") and hasattr(m, "layers")), model)
