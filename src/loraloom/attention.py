"""Attention within documents, by the kernel that is fastest for their lengths; and how transformers' models call it.

    out_THD = attend(q_THD, k_TGD, v_TGD, documents)

On a GPU in 16 bits documents of one length are rows of a dense batch where cuDNN's kernel gains more than its call
costs (Hopper), in a mixed batch each long document is one by itself, and one call serves the rest: the kernels for
short documents, or FlashAttention, whichever is faster.
Everywhere else each document is attended to by itself, which is the definition.

A model of transformers in attention "loraloom" gets the documents as its `attention_mask`, a `DocumentMask`: its
models hand a mask of four dimensions to every layer as it is, so no mask of T x T numbers is built, nothing asks the
device where documents begin, and a layer that the backward pass computes again finds them among its arguments.
Called without one, such as to generate, the model does what it does in attention "sdpa".

shapes  B rows of T tokens; T also all tokens in one line; H query heads, G key heads, D features of a head
source  tests/test_attention.py: each document's softmax in float64
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import attention as kernels
from .kernels.attention import HALF as HALF
from .kernels.attention_plan import LONG, Piece, pieces
from .kernels.attention_short import short, takes_short
from .packing import Documents

NAME = "loraloom"  # of this attention, to transformers

_cudnn_planned = [True]  # whether shapes of the meta device stand for a GPU of Hopper's kind; innermost last


def attend(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    documents: Documents,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention within each document, (T, H, D), differentiable.

    documents  may be empty; where their lengths are not known, only these two kernels and a CPU can serve them
    scale      of q . k; None: 1 / sqrt(D)
    window     keys that a query sees, itself among them; None: all

    raises  ValueError if shapes do not fit, or lengths must be known and are not
    """
    check(q_THD, k_TGD, v_TGD, documents)
    q_THD, k_TGD, v_TGD = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_THD, k_TGD, v_TGD))
    lengths, (_, heads, width) = documents.lengths, q_THD.shape
    if not kernels.takes_flash(q_THD):
        if not documents.known:
            if q_THD.device.type != "cpu":
                raise ValueError(
                    f"unknown lengths in {q_THD.dtype} on {q_THD.device}: no kernel reads starts"
                )
            lengths = tuple(documents.starts.diff().tolist())
        return kernels.one_by_one(q_THD, k_TGD, v_TGD, lengths, scale, window)
    if not documents.known:
        if takes_short(q_THD) and documents.longest < LONG:
            return short(q_THD, k_TGD, v_TGD, documents.bounds_of(len(q_THD)), scale, window)
        return kernels.varlen(q_THD, k_TGD, v_TGD, documents.starts, documents.longest, scale, window)
    plan = pieces(lengths, heads, width, window, has_fast_dense(q_THD.device), takes_short(q_THD))
    return run(plan, q_THD, k_TGD, v_TGD, documents, scale, window)


def check(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, documents: Documents) -> None:
    """raises  ValueError if tensors and documents do not fit together"""
    tokens, heads, width = q_THD.shape
    shared = k_TGD.shape[1]
    if k_TGD.shape != v_TGD.shape or k_TGD.shape != (tokens, shared, width) or heads % shared:
        raise ValueError(f"q {list(q_THD.shape)}, k {list(k_TGD.shape)} and v {list(v_TGD.shape)} do not fit")
    count, total = len(documents.lengths), sum(documents.lengths)
    if len(documents.starts) != count + 1 or (documents.known and total != tokens):
        raise ValueError(f"{count} documents of {total} tokens for {tokens} tokens")


def run(
    plan: Sequence[Piece],
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    documents: Documents,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Every piece by its kernel, put together."""
    sizes = [piece.tokens[1] - piece.tokens[0] for piece in plan]
    triples = [(q_THD, k_TGD, v_TGD)]
    if len(plan) > 1:
        triples = list(zip(*(x.split(sizes) for x in (q_THD, k_TGD, v_TGD)), strict=True))
    parts = [
        run_piece(piece, *triple, documents, scale, window)
        for piece, triple in zip(plan, triples, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def run_piece(
    piece: Piece,
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    documents: Documents,
    scale: float | None,
    window: int | None,
) -> Tensor:
    first, behind = piece.documents
    if piece.kind != "dense":
        if not kernels.takes_flash(q_THD):
            return kernels.one_by_one(q_THD, k_TGD, v_TGD, documents.lengths[first:behind], scale, window)
        if piece.kind == "short":
            bounds = documents.bounds_of(sum(documents.lengths))
            if piece.count < len(documents.lengths):
                bounds = bounds[:, slice(*piece.tokens)] - piece.tokens[0]
            return short(q_THD, k_TGD, v_TGD, bounds, scale, window)
        starts = documents.starts
        if piece.count < len(documents.lengths):
            starts = starts[first : behind + 1] - piece.tokens[0]
        return kernels.varlen(q_THD, k_TGD, v_TGD, starts, piece.longest, scale, window)
    if piece.padded == piece.longest:
        return kernels.dense(q_THD, k_TGD, v_TGD, piece.count, scale)
    # What is added stands behind, where no token of the document looks.
    more = (0, 0, 0, 0, 0, piece.padded - piece.longest)
    q, k, v = (F.pad(x.unflatten(0, (piece.count, -1)), more).flatten(0, 1) for x in (q_THD, k_TGD, v_TGD))
    out_CSHD = kernels.dense(q, k, v, piece.count, scale).unflatten(0, (piece.count, -1))
    return out_CSHD[:, : piece.longest].flatten(0, 1)


def has_fast_dense(device: torch.device) -> bool:
    """Whether cuDNN's dense attention is the faster one: on Hopper and later; of shapes, as `planning` says."""
    return _cudnn_planned[-1] if device.type == "meta" else hopper(device)


@cache
def hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9


@contextmanager
def planning(*, cudnn: bool) -> Iterator[None]:
    """Shapes inside stand for a GPU that has cuDNN's fast attention, or not."""
    _cudnn_planned.append(cudnn)
    try:
        yield
    finally:
        _cudnn_planned.pop()


class DocumentMask(Tensor):
    """An attention mask (1, 1, 0, 0) that carries documents. Whoever takes it for numbers fails: it has none."""

    documents: Documents
    window: int | None  # what a model's own mask would have let through, while `Watch` looks
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def mask_of(documents: Documents, window: int | None = None) -> DocumentMask:
    mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=documents.starts.device)
    carrier = mask.as_subclass(DocumentMask)
    carrier.documents, carrier.window = documents, window
    return carrier


def takes_documents(model: Any) -> bool:
    """Whether a model's attention reads a DocumentMask."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME


def arguments_of(
    model: Any, documents: Documents | None, position: Tensor | None, ids: Tensor
) -> dict[str, Any]:
    """What a model is called with to keep documents apart: positions, and the documents if it takes them."""
    arguments: dict[str, Any] = {} if position is None else {"position_ids": position}
    if documents is not None and takes_documents(model):
        if position is None:  # each row is a document
            arguments["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        arguments["attention_mask"] = mask_of(documents)
    return arguments


class Unfit(Exception):
    """What keeps a model's attention from being this one, in words."""


class Watch:
    """Looks on while a model attends: what its own masks let through must be what its layers say of themselves.

    Masks and windows are compared, so that what only long texts would show is seen on a short one.
    """

    def __init__(self) -> None:
        self.widths: set[int] = set()  # of the heads

    def mask(
        self,
        *,
        batch_size: int,
        q_length: int,
        kv_length: int,
        local_size: int | None = None,
        allow_is_causal_skip: bool = True,
        allow_is_bidirectional_skip: bool = False,
        use_vmap: bool = False,
        device: torch.device | str = "cpu",
        **_: Any,
    ) -> DocumentMask:
        """In place of a mask: whole rows as documents, and the window that the mask would have.

        raises  Unfit if it lets through other than the past, and a window of it
        """
        if allow_is_bidirectional_skip or use_vmap or not allow_is_causal_skip or q_length != kv_length:
            raise Unfit("its attention has a mask of its own")
        starts = torch.arange(batch_size + 1, dtype=torch.int32, device=device) * q_length
        return mask_of(Documents(starts, (q_length,) * batch_size), local_size)

    def layer(self, mask: Any, width: int, window: int | None) -> None:
        """raises  Unfit if a layer got no such mask, or another window than its mask's"""
        if not isinstance(mask, DocumentMask):
            raise Unfit("its attention makes its own mask")
        if mask.window != window:
            raise Unfit(f"its mask's window is {mask.window}, and its layers say {window}")
        self.widths.add(width)


_watches: list[Watch] = []  # the one that looks on is last


def interface(sdpa: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function for transformers; `sdpa` is its own, for calls without documents."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if _watches:
            _watches[-1].layer(attention_mask, query.shape[-1], kwargs.get("sliding_window"))
        if not isinstance(attention_mask, DocumentMask):
            return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        causal = kwargs.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            raise Unfit("its attention sees what comes later")
        more = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
        if more or dropout:
            raise Unfit(f"its attention has {', '.join(more) or 'dropout'}, which the fused kernels lack")
        if query.shape[2] != key.shape[2] or key.shape != value.shape:
            raise Unfit(f"queries {list(query.shape)}, keys {list(key.shape)} and values {list(value.shape)}")
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        out = attend(q, k, v, attention_mask.documents, scaling, kwargs.get("sliding_window"))
        return out.unflatten(0, (query.shape[0], -1)), None

    return attention


def masks(sdpa_mask: Callable[..., Any]) -> Callable[..., Any]:
    """The mask function for transformers, asked only where no DocumentMask was given: sdpa's."""

    def mask(*args: Any, **kwargs: Any) -> Any:
        return _watches[-1].mask(*args, **kwargs) if _watches else sdpa_mask(*args, **kwargs)

    return mask


def varlen_reason(model: Any) -> str | None:
    """None if a model in this attention computes with documents what it computes without them, else why not.

    One pass compares its masks with what its layers say; on a device with numbers, logits are then compared.
    """
    name = type(model).__name__
    device = next(model.parameters()).device
    ids = torch.randint(32, (1, 20), generator=torch.Generator().manual_seed(0)).to(device)
    watch = Watch()
    _watches.append(watch)
    try:
        with torch.no_grad():  # a mask of ones, so that nothing is read from positions
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception as error:  # whatever a model makes of a mask that it does not know
        return f"{name}: {first_line(error)}"
    finally:
        _watches.remove(watch)
    if not watch.widths:
        return f"{name} has attention of its own, which takes no documents"
    odd = [width for width in watch.widths if width % 8 or width > kernels.FLASH_MOST]
    if odd and device.type in ("cuda", "meta"):
        return f"{name} has heads of {odd[0]} features, which FlashAttention does not take"
    return None if device.type == "meta" else other_logits(model, ids)


def other_logits(model: Any, ids: Tensor) -> str | None:
    """Logits of two documents in a row against those of each alone, which have no mask but the causal one.

    What is allowed is a share of what joining the two does to the second, so that it does not hang on the weights.
    """
    name, sizes = type(model).__name__, (11, 9)
    documents = Documents(torch.tensor([0, 11, 20], dtype=torch.int32, device=ids.device), sizes)
    apart = torch.cat([torch.arange(size) for size in sizes])[None].to(ids.device)

    def logits(ids: Tensor, **arguments: Any) -> Tensor:
        output = model(input_ids=ids, use_cache=False, **arguments)
        return getattr(output, "logits", output)[0].cpu().double()

    try:
        with torch.no_grad():
            ours = logits(ids, **arguments_of(model, documents, apart, ids))
            alone = torch.cat([logits(part) for part in ids.split(sizes, dim=1)])
            joined = logits(ids)
    except Exception as error:
        return f"{name}: {first_line(error)}"
    size, shift, effect = (float(x.square().mean().sqrt()) for x in (alone, ours - alone, joined - alone))
    noise = 4 * torch.finfo(next(model.parameters()).dtype).eps * size
    if not shift <= max(noise, 0.05 * effect):
        return f"{name} gives documents in a row other logits than alone (they move by {shift:.2g})"
    return None


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
