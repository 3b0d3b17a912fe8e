"""What makes a decoder layer like Llama's: its parts, by their names, kinds and what they compute.

raises  Unlike, with the reason, for a layer that is not
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bank import Bank
from .kernels.block import turned
from .overlay import Overlay
from .quant import Weight4
from .targets import layer_number


class Unlike(Exception):
    """Why a layer is not taken, in words."""


def window_of(attn: Any) -> int | None:
    """How many keys a query sees, by the layer's own word."""
    if hasattr(attn, "sliding_window"):
        return attn.sliding_window
    return getattr(attn.config, "sliding_window", None)


def decoder_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that have attention, an MLP and a number."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "self_attn") and hasattr(module, "mlp") and layer_number(name + ".x") is not None
    ]


def heads_of(attn: Any, qkv: list[nn.Linear], o: nn.Linear) -> tuple[tuple[int, int], int]:
    """(H, G) and D.

    raises  Unlike if attention is more than q, k, v, perhaps with a norm over each head, and their softmax
    """
    known = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}
    more = [leaf for leaf, _ in attn.named_children() if leaf not in known]
    if more:
        raise Unlike(f"its attention has other parts: {', '.join(more)}")
    if getattr(attn, "attn_logit_softcapping", None) or getattr(attn, "sinks", None) is not None:
        raise Unlike("its attention caps its scores")
    dim = getattr(attn, "head_dim", None)
    sizes = [one.out_features for one in qkv]
    if not isinstance(dim, int) or o.in_features % dim or (len(sizes) == 3 and sizes[1] != sizes[2]):
        raise Unlike("its heads are not all of one width")
    heads = o.in_features // dim
    groups, rest = divmod(sum(sizes) - heads * dim, 2 * dim)
    if rest or (len(sizes) == 3 and sizes[0] != heads * dim):
        raise Unlike("its heads are not all of one width")
    for norm in (getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)):
        if norm is not None and tuple(getattr(norm, "weight", torch.empty(0)).shape) != (dim,):
            raise Unlike("the norms of q and k are not over each head")
    if other_turn(attn, dim):
        raise Unlike("positions turn its heads in another way than Llama's")
    return (heads, groups), dim


@torch.no_grad()
def other_turn(attn: Any, dim: int) -> bool:
    """Whether the function that its file has for positions is another one than Llama's."""
    made = getattr(sys.modules[type(attn).__module__], "apply_rotary_pos_emb", None)
    x = torch.linspace(-1, 1, 2 * dim, device="cpu").view(2, dim)
    angle = torch.linspace(0, 3, dim, device="cpu").view(2, dim // 2).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()
    try:
        got = made(x[None, None], x[None, None], cos[None], sin[None])[0] if made else None
    except (TypeError, RuntimeError, ValueError):
        return False  # called in another way; a probe of the layer will tell
    return got is not None and not torch.allclose(got[0, 0], turned(x[:, None], cos, sin)[:, 0], atol=1e-5)


def drops(module: Any) -> bool:
    """Whether a layer of the base drops values out, were it in train mode."""
    rates = [one.p for one in module.modules() if isinstance(one, nn.Dropout)]
    return any(rates) or bool(getattr(module.self_attn, "attention_dropout", 0.0))


def linears(holder: Any, names: tuple[str, ...], whole: str | None = None) -> list[nn.Linear]:
    """The linear layers of these names, or the one that has them all.

    raises  Unlike if there are none, or they cannot be multiplied as one
    """
    if whole is not None and hasattr(holder, whole):
        names = (whole,)
    found = [getattr(holder, name, None) for name in names]
    plain = [one for one in found if type(one) is nn.Linear]
    if any(one is None for one in found):
        raise Unlike(f"its {type(holder).__name__} has no {' and '.join(names)}")
    if len(plain) != len(names):
        raise Unlike(f"{'/'.join(names)} are not plain linear layers")
    weights = [one.weight for one in plain]
    kinds = {(w.codes.table if isinstance(w, Weight4) else None, w.dtype, w.device) for w in weights}
    if len(kinds) > 1:
        raise Unlike(f"{'/'.join(names)} are kept in different formats")
    own = (one.__dict__.get("forward") for one in plain)
    if any(one is not None and not isinstance(getattr(one, "__self__", None), Bank | Overlay) for one in own):
        raise Unlike(f"the forward of {'/'.join(names)} was replaced")
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
